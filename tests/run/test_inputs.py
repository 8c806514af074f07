"""A run's folder knows what it was made of: what changed since is refused by name, what is damaged is made again."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from worlds import write_model, write_rows

from influence_fast.cli import main
from influence_fast.config import RunConfig, load_config
from influence_fast.data.examples import Example
from influence_fast.errors import ConfigError, DataError
from influence_fast.influence.scores import ScoreTable
from influence_fast.run import pipeline
from influence_fast.run.dry_run import plan
from influence_fast.run.inputs import examples_hash, hash_files
from influence_fast.run.workdir import LOCK, RunFolder
from influence_fast.training.fine_tuning import finetune

Change = Callable[[Path], Any]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small finished run in `run`, with every kind of input beside it: one model scores under an adapter that is
    given, another is fine-tuned."""
    folder = tmp_path_factory.mktemp("inputs")
    write_model(folder / "model")
    write_model(folder / "target", hidden=48)
    for name, n in (("pool", 16), ("validation", 6), ("test", 5)):
        write_rows(folder / f"{name}.jsonl", n, seed=n)
    _edit(folder / "validation.jsonl", lambda rows: [row | {"task": f"task {i % 2}"} for i, row in enumerate(rows)])
    _write_adapter(folder)
    settings = {
        "output": "run",
        "model": {"path": "model", "adapter": "adapter"},
        "target_model": {"path": "target"},
        "data": {"pool": "pool.jsonl", "validation": "validation.jsonl", "test": "test.jsonl"},
        "training": {"max_steps": 1},
        "lora": {"r": 2},
        "gradients": {"dim": 4},
        "influence": {"preconditioner": "less", "optimizer": "optimizer", "fallback": "reference", "tasks": "task"},
        "pruning": {"strategies": ["less", "embedding"], "fractions": [0.25]},
        "evaluation": {"max_new_tokens": 4},
        "validate": {"methods": ["cosine"], "default": "cosine", "removal_methods": [], "subsets": 0},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    pipeline.run(_config(folder), progress=False)
    return folder


@pytest.fixture
def world(finished: Path, tmp_path: Path) -> Path:
    """A copy, free to be changed: that it lies elsewhere and has other times is no change."""
    shutil.copytree(finished, tmp_path / "world", copy_function=shutil.copyfile)
    return tmp_path / "world"


def _config(folder: Path, **changes: Any) -> RunConfig:
    config = dataclasses.replace(load_config(folder / "config.yaml"), output=str(folder / "run"))
    for name, values in changes.items():
        config = dataclasses.replace(config, **{name: dataclasses.replace(getattr(config, name), **values)})
    return config


def _write_adapter(folder: Path) -> None:
    """An adapter, and a checkpoint of it with Adam's state."""
    from peft import LoraConfig, get_peft_model

    from influence_fast.training.models import load_model
    from influence_fast.training.sft import NAMES

    torch.manual_seed(0)
    model = get_peft_model(load_model(folder / "model"), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    for name, parameter in named:
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    for name in ("adapter", "optimizer"):
        model.save_pretrained(folder / name)
    optimizer = torch.optim.AdamW([p for _, p in named], lr=1e-3)
    for _, parameter in named:
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    torch.save(optimizer.state_dict(), folder / "optimizer" / "optimizer.pt")
    (folder / "optimizer" / NAMES).write_text(json.dumps([name for name, _ in named]))


def _edit(path: Path, change: Callable[[list[Any]], list[Any]]) -> None:
    rows = change([json.loads(line) for line in path.read_text().splitlines()])
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def rows(name: str, change: Callable[[list[Any]], list[Any]]) -> Change:
    return lambda world: _edit(world / name, change)


def field(name: str, key: str, value: str) -> Change:
    return rows(name, lambda found: [*found[:-1], found[-1] | {key: value}])


def setting(name: str, **values: Any) -> Change:
    return lambda world: (world / name).write_text(json.dumps(json.loads((world / name).read_text()) | values))


def scaled(name: str) -> Change:
    def change(world: Path) -> None:
        tensors = {key: 1.01 * value for key, value in load_file(world / name).items()}
        save_file(tensors, world / name, {"format": "pt"})

    return change


def cut(name: str) -> Change:
    return lambda world: (world / name).write_bytes((world / name).read_bytes()[: (world / name).stat().st_size // 2])


def emptied(name: str) -> Change:
    return lambda world: (world / name).write_bytes(b"")


def gone(name: str) -> Change:
    def change(world: Path) -> None:
        path = world / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return change


def template(folder: str) -> Change:
    text = "{% for m in messages %}{{ m['content'] + ' ' }}{% endfor %}"
    return lambda world: (world / folder / "chat_template.jinja").write_text(text)


CHANGES: dict[str, tuple[Change, str]] = {
    "pool rows reordered": (rows("pool.jsonl", lambda found: found[::-1]), "data.pool"),
    "pool completion": (field("pool.jsonl", "completion", "The answer is 9"), "data.pool"),
    "pool prompt": (field("pool.jsonl", "prompt", "what is 9 plus 9"), "data.pool"),
    "pool answer": (field("pool.jsonl", "answer", "9"), "data.pool"),
    "pool label": (field("pool.jsonl", "label", "other"), "data.pool"),
    "pool id": (field("pool.jsonl", "id", "other"), "data.pool"),
    "pool row added": (rows("pool.jsonl", lambda found: [*found, found[0] | {"id": "new"}]), "data.pool"),
    "pool row removed": (rows("pool.jsonl", lambda found: found[:-1]), "data.pool"),
    "pool cut": (cut("pool.jsonl"), "pool.jsonl"),
    "pool empty": (emptied("pool.jsonl"), "pool.jsonl"),
    "pool gone": (gone("pool.jsonl"), "pool.jsonl"),
    "validation question": (field("validation.jsonl", "prompt", "what is 9 plus 9"), "data.validation"),
    "validation answer": (field("validation.jsonl", "answer", "9"), "data.validation"),
    "validation solution": (field("validation.jsonl", "completion", "The answer is 9"), "data.validation"),
    "validation task": (field("validation.jsonl", "task", "task 0"), "influence.tasks"),
    "validation row removed": (rows("validation.jsonl", lambda found: found[1:]), "data.validation"),
    "validation gone": (gone("validation.jsonl"), "validation.jsonl"),
    "test question": (field("test.jsonl", "prompt", "what is 9 plus 9"), "data.test"),
    "test answer": (field("test.jsonl", "answer", "9"), "data.test"),
    "test row added": (rows("test.jsonl", lambda found: [*found, found[0] | {"id": "new"}]), "data.test"),
    "test empty": (emptied("test.jsonl"), "test.jsonl"),
    "base weights": (scaled("model/model.safetensors"), "model.path"),
    "base weights cut": (cut("model/model.safetensors"), "model.path"),
    "base settings": (setting("model/config.json", rms_norm_eps=0.01), "model.path"),
    "base generation": (setting("model/generation_config.json", repetition_penalty=1.5), "generation_config.json"),
    "base template": (template("model"), "the tokenizer of model.path"),
    "base gone": (gone("model"), "model.path"),
    "adapter weights": (scaled("adapter/adapter_model.safetensors"), "model.adapter"),
    "adapter weights cut": (cut("adapter/adapter_model.safetensors"), "model.adapter"),
    "adapter alpha": (setting("adapter/adapter_config.json", lora_alpha=99), "model.adapter"),
    "adapter settings cut": (cut("adapter/adapter_config.json"), "model.adapter"),
    "adapter gone": (gone("adapter"), "model.adapter"),
    "target replaced": (lambda world: write_model(world / "target", hidden=64), "target_model.path"),
    "target weights": (scaled("target/model.safetensors"), "target_model.path"),
    "target generation": (setting("target/generation_config.json", top_k=3), "target_model.path"),
    "target template": (template("target"), "the tokenizer of target_model.path"),
    "optimizer": (cut("optimizer/optimizer.pt"), "influence.optimizer"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_input_is_refused_by_name(world: Path, change: str, capsys: pytest.CaptureFixture[str]) -> None:
    apply, named = CHANGES[change]
    before = {path: path.read_bytes() for path in (world / "run").glob("*.json")}
    apply(world)
    assert main(["run", "--quiet", str(world / "config.yaml"), "--output", str(world / "run")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert named in error
    if named.startswith(("data.", "model.", "the ", "target", "influence.", "generation")):
        assert "changed since this run began" in error
    assert {path: path.read_bytes() for path in before} == before


def test_files_that_were_only_moved_and_touched_are_no_change(world: Path) -> None:
    for path in world.rglob("*"):
        os.utime(path, (1, 1))
    (world / "pool.jsonl").write_text((world / "pool.jsonl").read_text() + "\n")  # no row
    assert pipeline.Pipeline(_config(world), progress=False).folder.warnings == []


def test_all_changes_are_named_at_once(world: Path) -> None:
    for change in ("base generation", "adapter alpha", "target weights"):
        CHANGES[change][0](world)
    with pytest.raises(
        ConfigError,
        match=r"model\.path \(.*: generation_config\.json\), model\.adapter \(.*: adapter_config\.json\), "
        r"target_model\.path \(.*: model\.safetensors\) have changed",
    ):
        pipeline.Pipeline(_config(world), progress=False)


def test_held_out_examples_are_inputs_too(tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    write_rows(tmp_path / "pool.jsonl", 12, seed=1)
    data = {"pool": "pool.jsonl", "holdout_validation": 3, "holdout_test": 3}
    settings = {"output": "run", "model": {"path": "model"}, "data": data}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    run = pipeline.Pipeline(_config(tmp_path), progress=False)
    assert {"data.holdout_validation", "data.holdout_test"} <= json.loads((run.folder / "inputs.json").read_text())[
        "inputs"
    ].keys()
    (tmp_path / "run" / "own_answers.json").write_text("{}")
    field("pool.jsonl", "label", "other")(tmp_path)
    with pytest.raises(ConfigError, match=r"^data\.pool \("):
        pipeline.Pipeline(_config(tmp_path), progress=False)


def test_validate_refuses_the_same_changes(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    CHANGES["test answer"][0](world)
    command = ["validate", "--quiet", str(world / "config.yaml"), "--output", str(world / "run")]
    assert main(command) == 2
    assert "data.test" in capsys.readouterr().err


def test_a_dry_run_names_what_changed(world: Path) -> None:
    assert plan(_config(world)).stops == []
    CHANGES["validation answer"][0](world)
    (said,) = plan(_config(world)).stops
    assert said.startswith("data.validation (")


# ---- half-done runs ----------------------------------------------------------------------------------------


def _undone(world: Path, *names: str) -> None:
    for name in names:
        path = world / "run" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def test_a_test_set_is_refused_though_it_judged_nothing_yet(world: Path) -> None:
    _undone(world, "cells", "evaluations")
    CHANGES["test answer"][0](world)
    with pytest.raises(ConfigError, match=r"data\.test \(.*or delete inputs\.json to go on with what is there now"):
        pipeline.Pipeline(_config(world), progress=False)
    (world / "run" / "inputs.json").unlink()
    (said,) = pipeline.Pipeline(_config(world), progress=False).folder.warnings
    assert "cannot be checked" in said


def test_another_test_set_is_taken_while_it_judged_nothing_yet(world: Path) -> None:
    _undone(world, "cells", "evaluations")
    shutil.copyfile(world / "test.jsonl", world / "other.jsonl")
    _edit(world / "other.jsonl", lambda found: found[:-1])
    config = _config(world)
    moved = dataclasses.replace(
        config.data, test=dataclasses.replace(config.data.test, path=str(world / "other.jsonl"))
    )
    (said,) = pipeline.Pipeline(dataclasses.replace(config, data=moved), progress=False).folder.warnings
    assert "data.test" in said
    assert "goes on with the new one" in said


def test_new_validation_questions_are_taken_once_what_they_made_is_deleted(world: Path) -> None:
    _undone(world, "cells", "evaluations", "scoring_seconds.json", "baselines")
    CHANGES["validation question"][0](world)
    with pytest.raises(
        ConfigError,
        match=r"made with the other: inputs\.json, own_answers\.json, adapters/\*-\*-seed\*, pruned/",
    ):
        pipeline.Pipeline(_config(world), progress=False)
    _undone(world, "own_answers.json", "inputs.json", *(f"adapters/{name}-25-seed0" for name in ("less", "embedding")))
    trained = (world / "run" / "adapters" / "full-seed0" / "training.json").read_bytes()
    pipeline.run(_config(world), progress=False)
    answers = json.loads((world / "run" / "own_answers.json").read_text())["value"]
    assert len(answers) == 6
    assert (world / "run" / "adapters" / "full-seed0" / "training.json").read_bytes() == trained


def test_the_pool_may_change_before_anything_is_finished(world: Path) -> None:
    for path in (world / "run").iterdir():
        if path.name not in ("config.yaml", "inputs.json"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    CHANGES["pool completion"][0](world)
    pipeline.Pipeline(_config(world), progress=False)


def test_a_folder_without_a_record_of_inputs_goes_on_with_a_warning(world: Path) -> None:
    (world / "run" / "inputs.json").unlink()
    results = pipeline.run(_config(world), progress=False)
    (said,) = [warning for warning in results["warnings"] if "inputs" in warning]
    assert "cannot be checked" in said
    again = pipeline.run(_config(world), progress=False)
    assert said in again["warnings"]
    CHANGES["pool label"][0](world)
    with pytest.raises(ConfigError, match=r"data\.pool"):
        pipeline.run(_config(world), progress=False)


# ---- damaged pieces ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", [emptied, cut])
def test_damaged_pieces_are_made_again(
    world: Path, damage: Callable[[str], Change], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All at once: each comes out as it was."""
    before = json.loads((world / "run" / "results.json").read_text())
    names = [
        "scoring_seconds.json", "own_answers.json", "cells/less-25-seed0.json", "evaluations/base.json",
        "baselines/embedding_rank.json", "adapter.json", "results.json", "scores.csv", "stores.json",
    ]  # fmt: skip
    for name in names:
        damage(f"run/{name}")(world)
    with pytest.warns(UserWarning, match=r"own_answers\.json is damaged, and is made again"):
        after = pipeline.run(_config(world), progress=False)
    assert after["cells"] == before["cells"]
    assert after["queries"] == before["queries"]
    parquet, csv = (ScoreTable.load(world / "run" / f"scores.{suffix}") for suffix in ("parquet", "csv"))
    assert "embedding_rank" in parquet.columns
    assert parquet.ids == csv.ids


@pytest.mark.parametrize("damage", [emptied, cut, gone])
def test_a_damaged_score_table_is_named_or_made_again(world: Path, damage: Callable[[str], Change]) -> None:
    damage("run/scores.parquet")(world)
    with pytest.raises(DataError, match=r"scores\.parquet.*: delete it, scoring_seconds\.json and baselines"):
        pipeline.run(_config(world), progress=False)
    _undone(world, "cells")
    run = pipeline.Pipeline(_config(world), progress=False)
    reference = run.reference_adapter()
    assert len(run.scores(reference, run.queries(reference)).ids) == 16


@pytest.mark.parametrize("damage", [emptied, cut, gone])
def test_damaged_transcripts_are_named(world: Path, damage: Callable[[str], Change]) -> None:
    damage("run/transcripts/embedding-25-seed0.jsonl")(world)
    with pytest.raises(DataError, match=r"embedding-25-seed0\.jsonl is damaged or missing: delete evaluations/"):
        pipeline.run(_config(world), progress=False)


@pytest.mark.parametrize("damage", [emptied, cut])
@pytest.mark.parametrize("name", ["config.yaml", "inputs.json"])
def test_a_damaged_record_is_one_line(world: Path, name: str, damage: Callable[[str], Change]) -> None:
    damage(f"run/{name}")(world)
    with pytest.raises(ConfigError, match=name):
        pipeline.run(_config(world), progress=False)


# ---- settings ----------------------------------------------------------------------------------------------

OTHER_SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "influence.damping": ({"influence": {"damping": 0.5}}, "scoring_seconds.json"),
    "influence.queries": ({"influence": {"queries": "reference"}}, "scoring_seconds.json"),
    "gradients.dim": ({"gradients": {"dim": 8}}, "scoring_seconds.json"),
    "evaluation.max_new_tokens": ({"evaluation": {"max_new_tokens": 9}}, "own_answers.json"),
    "evaluation.temperature": ({"evaluation": {"temperature": 0.5}}, "evaluations/base.json"),
    "pruning.max_similar": ({"pruning": {"max_similar": 0.5}}, "cells/random-25-seed0.json"),
    "pruning.pass_rate_samples": ({"pruning": {"pass_rate_samples": 2}}, "baselines/pass_rate.json"),
    "data.test.limit": ({"data": {"test": None, "holdout_test": 3}}, "adapters/full-seed0"),
    "training.epochs": ({"training": {"epochs": 7}}, "adapters/full-seed0"),
    "lora.r": ({"lora": {"r": 3}}, "adapters/full-seed0"),
}


@pytest.mark.parametrize("name", OTHER_SETTINGS)
def test_a_setting_may_change_until_its_first_piece(finished: Path, tmp_path: Path, name: str) -> None:
    changes, piece = OTHER_SETTINGS[name]
    config = dataclasses.replace(_config(finished), output=str(tmp_path / "run"))
    other = dataclasses.replace(_config(finished, **changes), output=str(tmp_path / "run"))
    for one in (config, other, config):
        RunFolder(one)
    path = tmp_path / "run" / piece
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{}")
    RunFolder(config)
    key = name.rpartition(".")[0] if name == "data.test.limit" else name
    with pytest.raises(ConfigError, match=rf"another configuration \((?:{key}|data\.holdout_test)"):
        RunFolder(other)
    if not piece.startswith("adapters"):
        with pytest.raises(ConfigError, match=rf"or delete what was made with the other: {piece.partition('/')[0]}"):
            RunFolder(other)
        path.unlink()
        RunFolder(other)


def test_a_full_cell_does_not_hold_what_only_pruned_cells_read(finished: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(_config(finished), output=str(tmp_path))
    RunFolder(config)
    (tmp_path / "cells").mkdir()
    (tmp_path / "cells" / "full-seed0.json").write_text("{}")
    RunFolder(dataclasses.replace(_config(finished, pruning={"max_similar": 0.5}), output=str(tmp_path)))


def test_settings_of_evaluation_do_not_hold_scores_of_references(finished: Path, tmp_path: Path) -> None:
    asked = {"influence": {"queries": "reference", "fallback": None}}
    RunFolder(dataclasses.replace(_config(finished, **asked), output=str(tmp_path)))
    (tmp_path / "scoring_seconds.json").write_text("{}")
    other = asked | {"evaluation": {"max_new_tokens": 9}}
    RunFolder(dataclasses.replace(_config(finished, **other), output=str(tmp_path)))


def test_the_remedy_of_an_error_keeps_the_fine_tuning(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No own answer is right; then the scores need other settings than the store that is half made."""
    for name in ("pool.jsonl", "validation.jsonl", "test.jsonl"):
        shutil.copy(finished / name, tmp_path / name)
    shutil.copytree(finished / "model", tmp_path / "model")
    raw = yaml.safe_load((finished / "config.yaml").read_text()) | {"model": {"path": "model"}}
    raw |= {"influence": {"preconditioner": "cosine"}, "pruning": {"strategies": ["low_benefit"], "fractions": [0.25]}}
    del raw["target_model"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(raw))
    reused: list[bool] = []

    def counted(*args: Any, **options: Any) -> Any:
        result = finetune(*args, **options)
        reused.append(result.reused)
        return result

    monkeypatch.setattr(pipeline, "finetune", counted)
    with pytest.raises(ConfigError, match=r"use influence\.queries: reference"):
        pipeline.run(_config(tmp_path), progress=False)
    asked = {"influence": {"queries": "reference"}}
    with monkeypatch.context() as patched:
        patched.setattr("influence_fast.influence.scorer.Scorer.scores", _stopped)
        with pytest.raises(KeyboardInterrupt):
            pipeline.run(_config(tmp_path, **asked), progress=False)
    results = pipeline.run(_config(tmp_path, gradients={"dim": 8}, **asked), progress=False)
    assert reused[:3] == [False, True, True]
    assert results["queries"] == {"correct": 6}
    first, second = sorted(path.parent.name for path in (tmp_path / "run").glob("store*/manifest.json"))
    assert first == "store"
    assert second.startswith("store-")


def _stopped(*_: Any, **__: Any) -> Any:
    raise KeyboardInterrupt


def test_rows_of_the_same_settings_are_found_again(finished: Path, tmp_path: Path) -> None:
    folder = RunFolder(dataclasses.replace(_config(finished), output=str(tmp_path)))
    first, second = folder.store("store", {"dim": 4}), folder.store("store", {"dim": 8})
    assert first == tmp_path / "store"
    assert second != first
    assert folder.store("store", {"dim": 4}) == first
    assert folder.store("store", {"dim": 8}) == second
    assert folder.store("store-checkpoint-1", {"dim": 8}) == tmp_path / "store-checkpoint-1"


def test_a_run_at_work_keeps_its_record(finished: Path, tmp_path: Path) -> None:
    """Another process that may not work on the folder changes no setting that the first one goes on with."""
    config = dataclasses.replace(_config(finished), output=str(tmp_path / "run"))
    other = dataclasses.replace(_config(finished, gradients={"dim": 8}), output=str(tmp_path / "run"))
    folder = RunFolder(config)
    RunFolder(other)  # nothing is finished, and nobody at work
    with folder.alone():
        record = (tmp_path / "run" / "config.yaml").read_text()
        assert yaml.safe_load(record)["gradients"]["dim"] == 4
        with pytest.raises(ConfigError, match="another process is at work"):
            RunFolder(other)
        assert (tmp_path / "run" / "config.yaml").read_text() == record
        RunFolder(config)


def test_a_record_waits_for_a_process_that_writes_one(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Processes that begin on one run together write the same record, one after the other."""
    import fcntl

    config = dataclasses.replace(_config(finished), output=str(tmp_path / "run"))
    (tmp_path / "run").mkdir()
    waits = []
    with (tmp_path / "run" / LOCK).open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)

        def release(seconds: float) -> None:
            waits.append(seconds)
            fcntl.flock(held, fcntl.LOCK_UN)

        monkeypatch.setattr("influence_fast.run.workdir.time.sleep", release)
        RunFolder(config)
    assert len(waits) == 1
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["gradients"]["dim"] == 4


# ---- hashes ------------------------------------------------------------------------------------------------


def test_every_field_of_an_example_counts_but_its_row() -> None:
    example = Example("a", "p", "c", answer="1", label="x")
    others = {"id": "b", "prompt": "q", "completion": "d", "answer": "2", "label": None, "context": (("system", "s"),)}
    changed = [dataclasses.replace(example, **{name: value}) for name, value in others.items()]
    assert len({examples_hash([one]) for one in [example, *changed]}) == 7
    assert examples_hash([example]) == examples_hash([dataclasses.replace(example, row=5)])
    assert examples_hash(changed) != examples_hash(changed[::-1])


def test_files_are_hashed_whole_and_named_by_their_folder(tmp_path: Path) -> None:
    for name in ("checkpoint-1/a", "checkpoint-2/a", "checkpoint-2/b"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name if name.endswith("a") else "")
    found = hash_files(tmp_path.glob("checkpoint-*/*"))
    assert list(found) == ["checkpoint-1/a", "checkpoint-2/a", "checkpoint-2/b"]
    assert len(set(found.values())) == 3
    assert list(hash_files([tmp_path / "checkpoint-1" / "a"])) == ["a"]
