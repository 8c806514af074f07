"""The whole road on a tiny model: every piece is there, the run can be taken up again, mistakes are one line."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from worlds import WORDS, write_model, write_rows

from influence_fast.cli import main
from influence_fast.config import PruningConfig, load_config
from influence_fast.data.examples import Example, load_examples
from influence_fast.errors import ConfigError, ModelError
from influence_fast.influence.queries import Queries, make_queries, with_tasks
from influence_fast.influence.scores import ScoreTable
from influence_fast.run import pipeline
from influence_fast.run.results import _detection, known_harmful
from influence_fast.run.workdir import RunFolder

CELLS = [("random", 0.25), ("random", 0.5), ("embedding", 0.25), ("embedding", 0.5)]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_model(folder / "model")
    for name, n in (("pool", 40), ("validation", 24), ("test", 10)):
        write_rows(folder / f"{name}.jsonl", n, seed=n)
    settings = {
        "output": str(folder / "run"),
        "model": {"path": "model"},
        "data": {"pool": "pool.jsonl", "validation": "validation.jsonl", "test": "test.jsonl"},
        "training": {"epochs": 20, "learning_rate": 5e-3, "batch_size": 8},
        "lora": {"r": 4, "alpha": 8},
        "gradients": {"dim": 4},
        "influence": {"preconditioner": "fisher"},
        "pruning": {"strategies": ["random", "combined", "perplexity_high"], "fractions": [0.25]},
        "evaluation": {"max_new_tokens": 6},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    return folder


@pytest.fixture(scope="module")
def results(world: Path) -> dict[str, Any]:
    return pipeline.run(load_config(world / "config.yaml"), progress=False)


def test_every_piece_is_there(world: Path, results: dict[str, Any]) -> None:
    run = world / "run"
    assert [cell["strategy"] for cell in results["cells"]] == ["full", "random", "combined", "perplexity_high"]
    assert [cell["dropped"] for cell in results["cells"]] == [0, 10, 10, 10]
    assert all(0 <= cell["low"] <= cell["accuracy"] <= cell["high"] <= 1 for cell in results["cells"])
    assert results["cells"][1]["harmful_total"] == 10
    assert results["cells"][1]["expected_by_chance"] == 2.5
    assert results["queries"]["correct"] > 0
    assert results["queries"]["incorrect"] > 0
    table = ScoreTable.load(run / "scores.csv")
    assert table.ids == [f"pool-{i}" for i in range(40)]
    assert {"s_correct", "s_incorrect", "rank_correct", "mean_rank_incorrect", "loss", "tokens"} <= set(table.columns)
    for column in ("rank_correct", "rank_incorrect"):  # 1 = lowest in every file
        assert [trace[column] for trace in results["scores"]] == table.columns[column].tolist()
        assert table.columns[column].argmin() == table.columns[column.replace("rank", "s")].argmin()
    page = (run / "report.html").read_text()
    assert "<html" in page
    assert "perplexity_high" in page
    assert json.loads((run / "results.json").read_text())["cells"] == results["cells"]
    assert yaml.safe_load((run / "config.yaml").read_text())["gradients"]["dim"] == 4
    assert len((run / "transcripts" / "base.jsonl").read_text().splitlines()) == 10


def test_pruned_data_keeps_the_inputs_own_rows(world: Path, results: dict[str, Any]) -> None:
    kept = [json.loads(line) for line in (world / "run/pruned/combined-25.jsonl").read_text().splitlines()]
    original = [json.loads(line) for line in (world / "pool.jsonl").read_text().splitlines()]
    assert len(kept) == 30
    assert all(row in original for row in kept)


def test_scores_are_inner_products_of_exact_pieces(world: Path, results: dict[str, Any]) -> None:
    """The table against a float64 computation from scratch: gradients, damped Fisher of labels that the model draws,
    mean over the groups."""
    import influence_fast as inf
    from influence_fast.data.examples import tokenize
    from influence_fast.gradients.fisher_labels import sample_labels
    from influence_fast.gradients.rows.projection import Projection
    from influence_fast.gradients.targets import gradient_layout
    from influence_fast.influence.row_access import module_blocks
    from influence_fast.training.fine_tuning import load_finetuned
    from influence_fast.training.models import load_model, load_tokenizer

    run = world / "run"
    model = load_finetuned(load_model(world / "model"), run / "adapters" / "full-seed0")
    tokenizer = load_tokenizer(world / "model")
    projection = Projection(dim=4)
    pool = tokenize(load_examples(world / "pool.jsonl"), tokenizer).examples
    drawn = sample_labels(model, pool)
    model = model.double()
    drawn_rows = inf.per_example_gradients(model, drawn, projection=projection)
    rows = inf.per_example_gradients(model, pool, projection=projection)
    answers = json.loads((run / "own_answers.json").read_text())["value"]
    queries = make_queries(load_examples(world / "validation.jsonl"), answers, None)
    asked = inf.per_example_gradients(model, tokenize(queries.examples, tokenizer).examples, projection=projection)
    scores = torch.zeros(len(pool), len(queries.examples), dtype=torch.float64)
    for start, end in module_blocks(gradient_layout(model, projection)):
        block = rows[:, start:end]
        fisher = drawn_rows[:, start:end].T @ drawn_rows[:, start:end] / len(drawn_rows)
        damped = fisher + 0.1 * fisher.diagonal().mean() * torch.eye(end - start)
        scores += block @ torch.linalg.solve(damped, asked[:, start:end].T)
    table = ScoreTable.load(run / "scores.parquet")
    for group, members in queries.groups.items():
        expected = scores[:, members].mean(dim=1).numpy()
        got = table.columns[f"s_{group}"]
        # the store holds bf16: 2^-9 a number, averaged over a row
        assert np.linalg.norm(got - expected) < 2e-2 * np.linalg.norm(expected)
    place = {name: i for i, name in enumerate(table.ids)}
    told = [json.loads(line) for line in (run / "explained.jsonl").read_text().splitlines()]
    assert [one["id"] for one in told] == [example.id for example in queries.examples]
    for q, one in enumerate(told):
        for direction, best in (("raising", scores[:, q].max()), ("lowering", scores[:, q].min())):
            (first, *_) = one[direction]
            assert first["influence"] == pytest.approx(float(best), rel=0.05)
            assert float(scores[place[first["id"]], q]) == pytest.approx(float(best), rel=0.05)
    assert 'href="explained.html"' in (run / "report.html").read_text()


def test_a_second_run_computes_nothing_again(
    world: Path, results: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("computed again")

    for name in ("evaluate", "own_answers", "explained_scores"):
        monkeypatch.setattr(pipeline, name, refuse)
    again = pipeline.run(load_config(world / "config.yaml"), progress=False)
    assert again["cells"] == results["cells"]
    assert again["queries"] == results["queries"]


def test_an_interrupted_run_goes_on(
    world: Path, results: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped at its second cell, then run again: the finished pieces stay and the outcome is that of one run."""
    import dataclasses

    config = dataclasses.replace(load_config(world / "config.yaml"), output=str(tmp_path / "run"))
    finetune, calls = pipeline.finetune, []

    def stops(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return finetune(*args, **kwargs)

    monkeypatch.setattr(pipeline, "finetune", stops)
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(config, progress=False)
    assert not (tmp_path / "run" / "report.html").exists()
    monkeypatch.setattr(pipeline, "finetune", finetune)
    resumed = pipeline.run(config, progress=False)
    reference = json.loads((world / "run" / "results.json").read_text())
    strip = lambda cells: [{k: v for k, v in cell.items() if k != "seconds"} for cell in cells]  # noqa: E731
    assert strip(resumed["cells"]) == strip(reference["cells"])


def test_another_configuration_does_not_overwrite_a_run(world: Path, results: dict[str, Any]) -> None:
    raw = yaml.safe_load((world / "config.yaml").read_text())
    raw["gradients"]["dim"] = 8
    (world / "other.yaml").write_text(yaml.safe_dump(raw))
    with pytest.raises(ConfigError, match=r"another configuration \(gradients.dim: 4 against 8\)"):
        pipeline.run(load_config(world / "other.yaml"), progress=False)


@pytest.fixture(scope="module")
def crossed(world: Path) -> tuple[Path, dict[str, Any]]:
    """Scores from one model, fine-tuning of another of other width and tokens, two seeds."""
    write_model(world / "other-model", hidden=48, words=[*reversed(WORDS), "more", "words"])
    raw = yaml.safe_load((world / "config.yaml").read_text())
    raw |= {"output": str(world / "crossed"), "target_model": {"path": "other-model"}}
    raw["influence"]["queries"] = "reference"
    raw["training"] |= {"epochs": 4}
    raw["pruning"] = {"strategies": ["random", "low_benefit"], "fractions": [0.25], "seeds": [0, 1]}
    (world / "crossed.yaml").write_text(yaml.safe_dump(raw))
    return world / "crossed", pipeline.run(load_config(world / "crossed.yaml"), progress=False)


def _training_record(run: Path, name: str) -> dict[str, Any]:
    return json.loads((run / "adapters" / name / "training.json").read_text())


def test_seeds_share_what_they_can_and_only_random_draws_again(crossed: tuple[Path, dict[str, Any]]) -> None:
    run, results = crossed
    assert [(c["strategy"], c["seed"]) for c in results["cells"]] == [
        (strategy, seed) for seed in (0, 1) for strategy in ("full", "random", "low_benefit")
    ]
    data = {name: [_training_record(run, f"{name}-seed{s}")["examples"] for s in (0, 1)] for name in
            ("full", "random-25", "low_benefit-25")}  # fmt: skip
    assert data["low_benefit-25"][0] == data["low_benefit-25"][1]
    assert data["full"][0] == data["full"][1]
    assert data["random-25"][0] != data["random-25"][1]
    assert [_training_record(run, f"full-seed{s}")["train"]["seed"] for s in (0, 1)] == [0, 1]
    assert [p.name for p in (run / "adapters").glob("reference*")] == ["reference-seed0"]
    assert len(list((run / "evaluations").glob("base*"))) == 1
    stores = sorted(path.parent.name.partition("-")[0] for path in run.glob("**/manifest.json"))
    assert stores == ["store", "store.fisher"]


def test_scores_of_one_model_prune_the_data_of_another(world: Path, crossed: tuple[Path, dict[str, Any]]) -> None:
    from influence_fast.data.examples import tokenize
    from influence_fast.data.fingerprints import dataset_fingerprint, weight_hashes
    from influence_fast.evaluation.evaluate import EvalConfig, evaluate
    from influence_fast.training.fine_tuning import load_finetuned
    from influence_fast.training.models import load_model, load_tokenizer

    run, results = crossed
    pool = load_examples(world / "pool.jsonl")
    kept = load_examples(run / "pruned/low_benefit-25.jsonl")
    for name, model, examples in (
        ("reference-seed0", "model", pool),
        ("full-seed1", "other-model", pool),
        ("low_benefit-25-seed1", "other-model", kept),
    ):
        record = _training_record(run, name)
        tokens = tokenize(examples, load_tokenizer(world / model)).examples
        assert record["model"] == list(weight_hashes(load_model(world / model)))
        assert record["examples"] == dataset_fingerprint(tokens), name
    # what is judged is the other model, with its own tokens, before and after
    other, tokenizer = load_model(world / "other-model"), load_tokenizer(world / "other-model")
    test, config = load_examples(world / "test.jsonl"), EvalConfig(max_new_tokens=6)
    for name, adapter in (("base", None), ("random-25-seed1", run / "adapters/random-25-seed1")):
        model = other if adapter is None else load_finetuned(other, adapter)
        expected = [item.generation for item in evaluate(model, tokenizer, test, config=config).items]
        lines = (run / "transcripts" / f"{name}.jsonl").read_text().splitlines()
        assert [json.loads(line)["generation"] for line in lines] == expected
    assert "fine-tuning the model that scores" in [row["stage"] for row in results["cost"]]


def test_the_reports_statistics_are_those_of_the_transcripts(crossed: tuple[Path, dict[str, Any]]) -> None:
    from influence_fast.statistics.paired_tests import compare

    run, results = crossed

    def answers(name: str) -> np.ndarray:
        files = [(run / "transcripts" / f"{name}-seed{seed}.jsonl").read_text().splitlines() for seed in (0, 1)]
        return np.array([[json.loads(line)["correct"] for line in lines] for lines in files], dtype=float)

    for row in results["comparisons"]:
        other = answers("full" if row["against"] == "full" else "random-25")
        expected = compare(answers("low_benefit-25"), other, seed=0)
        assert {key: row[key] for key in expected} == expected
        assert row["p_adjusted"] >= row["p"]
    assert [row["against"] for row in results["comparisons"]] == ["random", "full"]
    assert {s["strategy"]: s["accuracy"] for s in results["settings"]}["full"] == pytest.approx(answers("full").mean())
    saved = json.loads((run / "results.json").read_text())
    assert (saved["comparisons"], saved["settings"]) == (results["comparisons"], results["settings"])
    assert "Paired comparisons" in (run / "report.html").read_text()


def test_a_lost_cell_is_the_only_one_done_again(
    world: Path, crossed: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, results = crossed
    name = "random-25-seed1"
    for lost in (f"cells/{name}", f"evaluations/{name}"):
        (run / f"{lost}.json").unlink()
    evaluate, finetune, asked, trained = pipeline.evaluate, pipeline.finetune, [], []

    def counted(*args: Any, **kwargs: Any) -> Any:
        asked.append(kwargs["transcripts"].stem)
        return evaluate(*args, **kwargs)

    def tuned(*args: Any, **kwargs: Any) -> Any:
        result = finetune(*args, **kwargs)
        trained.append((Path(args[3]).name, result.reused))
        return result

    monkeypatch.setattr(pipeline, "evaluate", counted)
    monkeypatch.setattr(pipeline, "finetune", tuned)
    again = pipeline.run(load_config(world / "crossed.yaml"), progress=False)
    assert asked == [name]
    assert trained == [("reference-seed0", True), (name, True)]
    assert again["comparisons"] == results["comparisons"]


@pytest.mark.parametrize("empty", ["correct", "incorrect"])
def test_an_empty_group_is_said_by_name(world: Path, empty: str) -> None:
    validation = load_examples(world / "validation.jsonl")
    answers = [{"id": e.id, "generation": "The answer", "correct": empty == "incorrect"} for e in validation]
    with pytest.raises(ConfigError, match=f"there is no {empty} group"):
        make_queries(validation, answers, None)
    if empty == "correct":
        queries = make_queries(validation, answers, "reference")
        assert len(queries.groups["correct"]) == len(queries.groups["incorrect"]) == len(validation)
        assert queries.warnings


@pytest.mark.parametrize("fallback", [None, "reference"])
def test_answers_that_are_all_empty_are_said_to_be_that(world: Path, fallback: str | None) -> None:
    validation = load_examples(world / "validation.jsonl")
    answers = [{"id": e.id, "generation": "\n", "correct": False} for e in validation]
    with pytest.raises(ConfigError, match="empty"):
        make_queries(validation, answers, fallback)
    if fallback is not None:
        queries = make_queries(validation, answers, fallback, needed=("correct",))
        assert queries.groups == {"correct": list(range(24))}


def test_a_group_that_no_strategy_reads_may_be_empty(world: Path) -> None:
    validation = load_examples(world / "validation.jsonl")
    answers = [{"id": e.id, "generation": "The answer", "correct": True} for e in validation]
    queries = make_queries(validation, answers, None, needed=("correct",))
    assert list(queries.groups) == ["correct"]
    assert queries.warnings == ["no own answer is incorrect, so there are no scores of that group"]


def test_answers_that_were_cut_ask_without_an_end(world: Path) -> None:
    validation = load_examples(world / "validation.jsonl")[:2]
    answers = [
        {"id": e.id, "generation": "The answer", "correct": right, "ended": right}
        for e, right in zip(validation, (True, False), strict=True)
    ]
    queries = make_queries(validation, answers, None)
    assert [example.ended for example in queries.examples] == [True, False]


def test_a_run_of_an_earlier_version_goes_on(world: Path, results: dict[str, Any], tmp_path: Path) -> None:
    """Its record has not the settings that came since; at their defaults they are no difference."""
    record = world / "run" / "config.yaml"
    whole = record.read_text()
    raw = yaml.safe_load(whole)
    del raw["gradients"]["sketch"], raw["pruning"]["max_similar"]
    record.write_text(yaml.safe_dump(raw))
    RunFolder(load_config(world / "config.yaml"))
    older = raw | {"influence": {k: v for k, v in raw["influence"].items() if not k.startswith("fisher")}}
    record.write_text(yaml.safe_dump(older))  # its scores are of the data's labels, as they then all were
    with pytest.raises(ConfigError, match=r"another configuration \(influence.fisher: 'data' against 'model'"):
        RunFolder(load_config(world / "config.yaml"))
    config = load_config(world / "config.yaml")
    RunFolder(dataclasses.replace(config, influence=dataclasses.replace(config.influence, fisher="data")))
    record.write_text(yaml.safe_dump(raw | {"a_later_setting": 1}))
    with pytest.raises(ConfigError, match=r"another configuration \(a_later_setting"):
        RunFolder(load_config(world / "config.yaml"))
    for path in ("pool.jsonl", str(world / "pool.jsonl"), "./pool.jsonl"):  # as given, once
        raw["data"]["pool"]["path"] = path
        record.write_text(yaml.safe_dump(raw))
        RunFolder(load_config(world / "config.yaml"))
    raw["data"]["pool"]["path"] = "other.jsonl"
    record.write_text(yaml.safe_dump(raw))
    RunFolder(load_config(world / "config.yaml"))  # the examples are those of its record
    record.write_text(yaml.safe_dump(raw))
    inputs = shutil.move(world / "run" / "inputs.json", tmp_path / "inputs.json")
    with pytest.raises(ConfigError, match=r"data.pool.path: 'other.jsonl' against '../pool.jsonl'"):
        RunFolder(load_config(world / "config.yaml"))
    shutil.move(inputs, world / "run" / "inputs.json")
    record.write_text(whole)


def test_a_run_whose_rows_were_sketched_at_random_stays_that(world: Path, tmp_path: Path) -> None:
    def config(sketch: str) -> Any:
        made = load_config(world / "config.yaml")
        gradients = dataclasses.replace(made.gradients, width=32, sketch=sketch)
        influence = dataclasses.replace(made.influence, preconditioner="default")
        return dataclasses.replace(made, output=str(tmp_path / "run"), gradients=gradients, influence=influence)

    RunFolder(config("random"))
    record = tmp_path / "run" / "config.yaml"
    raw = yaml.safe_load(record.read_text())
    del raw["gradients"]["sketch"], raw["gradients"]["sketch_examples"]
    record.write_text(yaml.safe_dump(raw))
    (tmp_path / "run" / "scoring_seconds.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"gradients.sketch: 'random' against 'auto'"):
        RunFolder(config("auto"))
    RunFolder(config("random"))


def test_a_run_moves_with_its_data(world: Path, results: dict[str, Any], tmp_path: Path) -> None:
    for name in ("model", "run"):
        shutil.copytree(world / name, tmp_path / name)
    for name in ("pool.jsonl", "validation.jsonl", "test.jsonl"):
        shutil.copy(world / name, tmp_path / name)
    raw = yaml.safe_load((world / "config.yaml").read_text()) | {"output": str(tmp_path / "run")}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(raw))
    RunFolder(load_config(tmp_path / "config.yaml"))


def test_a_finished_run_takes_more_strategies_seeds_and_fractions(
    world: Path, results: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(world / "run", tmp_path / "run")
    config = dataclasses.replace(load_config(world / "config.yaml"), output=str(tmp_path / "run"))
    more = PruningConfig(("random", "embedding"), fractions=(0.25, 0.5), seeds=(0, 1))
    made: list[str] = []

    def counted(*args: Any, **options: Any) -> Any:
        made.append(Path(args[3]).name)
        return finetune(*args, **options)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("computed again")

    finetune = pipeline.finetune
    monkeypatch.setattr(pipeline, "finetune", counted)
    for name in ("own_answers", "explained_scores"):
        monkeypatch.setattr(pipeline, name, refuse)
    again = pipeline.run(dataclasses.replace(config, pruning=more), progress=False)
    assert [(c["strategy"], c["fraction"], c["seed"]) for c in again["cells"]] == [
        *[(s, f, seed) for seed in (0, 1) for s, f in [("full", 0.0), *CELLS]],
    ]
    assert again["cells"][1] == results["cells"][1]  # random at a quarter, as it was
    assert set(made) == {
        "full-seed0", "random-50-seed0", "embedding-25-seed0", "embedding-50-seed0",
        "full-seed1", "random-25-seed1", "random-50-seed1", "embedding-25-seed1", "embedding-50-seed1",
    }  # fmt: skip
    assert "embeddings" in [row["stage"] for row in again["cost"]]
    with pytest.raises(ConfigError, match=r"pruning.seeds: \[0\] against \[5\]"):
        RunFolder(dataclasses.replace(config, pruning=PruningConfig(("random",), seeds=(5,))))


def test_a_run_goes_on_from_another_folder_and_under_another_title(
    world: Path, results: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(world)
    assert load_config("config.yaml") == load_config(world / "config.yaml")
    record = yaml.safe_load((world / "run" / "config.yaml").read_text())
    assert record["data"]["pool"]["path"] == "../pool.jsonl"
    RunFolder(dataclasses.replace(load_config("config.yaml"), title="Another one"))


def test_what_follows_the_answers_can_be_decided_until_there_are_scores(
    world: Path, results: dict[str, Any], tmp_path: Path
) -> None:
    config = load_config(world / "config.yaml")
    other = dataclasses.replace(config, influence=dataclasses.replace(config.influence, fallback="reference"))
    with pytest.raises(ConfigError, match=r"influence\.fallback"):
        RunFolder(other)
    RunFolder(dataclasses.replace(config, output=str(tmp_path / "run")))
    RunFolder(dataclasses.replace(other, output=str(tmp_path / "run")))


def test_no_verb_writes_over_what_it_reads(
    world: Path, results: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, scores = tmp_path / "data.jsonl", tmp_path / "scores.csv"
    data.write_bytes((world / "pool.jsonl").read_bytes())
    scores.write_bytes((world / "run" / "scores.csv").read_bytes())
    prune = ["prune", "--data", str(data), "--scores", str(scores), "--strategy", "combined", "--fraction", "0.1"]
    evaluate = ["eval", "--model", str(world / "model"), "--data", str(data)]
    other = tmp_path / "other.jsonl"
    other.write_bytes(data.read_bytes())
    for command, said in (
        ([*prune, "--output", str(data)], "is also read from"),
        ([*prune, "--output", str(tmp_path / "." / "scores.csv")], "is also read from"),
        ([*evaluate, "--output", str(data)], "is also read from"),
        (["score", *evaluate[1:], "--adapter", "x", "--validation", str(other), "--output", str(data)], "is also read"),
        ([*evaluate, "--output", str(other), "--quiet"], "holds no transcripts"),
    ):
        assert main(command) == 2
        assert said in capsys.readouterr().err
    assert data.read_bytes() == other.read_bytes() == (world / "pool.jsonl").read_bytes()


def test_columns_of_other_names(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [json.loads(line) for line in (world / "pool.jsonl").read_text().splitlines()]
    renamed = [{"q": row["prompt"], "a": row["completion"], "id": 5} for row in rows[:6]]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, renamed)) + "\n")
    command = ["train", "--model", str(world / "model"), "--data", str(tmp_path / "data.jsonl"), "--quiet"]
    command += ["--output", str(tmp_path / "adapter"), "--max-steps", "2", "--target-modules", "q_proj"]
    assert main([*command, "--columns", "prompt=q,completion=a"]) == 2
    assert "ids must be unique" in capsys.readouterr().err
    assert main([*command, "--columns", "prompt=q,completion=a,id=", "--save-checkpoints", "1"]) == 0
    assert len(list((tmp_path / "adapter").glob("checkpoint-*"))) == 2
    saved = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert saved["target_modules"] == ["q_proj"]


def test_ctrl_c_says_what_is_kept(
    world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "run", stop)
    assert main(["run", str(world / "config.yaml")]) == 130
    assert "stopped: what was finished is kept; run the same command again" in capsys.readouterr().err


def test_the_tokenizer_of_another_model_is_refused_before_any_work(world: Path, tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    write_model(tmp_path / "other", words=[*WORDS, "more", "words"])
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "model" / name).write_text((tmp_path / "other" / name).read_text())
    raw = yaml.safe_load((world / "config.yaml").read_text()) | {"output": str(tmp_path / "run")}
    raw["model"] = {"path": str(tmp_path / "model")}
    (world / "mixed.yaml").write_text(yaml.safe_dump(raw))
    with pytest.raises(ModelError, match="has token 'words' with id 30, the model has embeddings for 29"):
        pipeline.run(load_config(world / "mixed.yaml"), progress=False)


def test_the_verbs_one_by_one(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*arguments: Any) -> str:
        code = main([str(a) for a in arguments])
        captured = capsys.readouterr()
        assert code == 0, captured.err
        return captured.out

    model, pool, validation = world / "model", world / "pool.jsonl", world / "validation.jsonl"
    adapter, scores, kept = tmp_path / "adapter", tmp_path / "scores.csv", tmp_path / "kept.jsonl"
    run("train", "--model", model, "--data", pool, "--output", adapter, "--epochs", 2, "--rank", 4, "--quiet")
    out = run(
        "score", "--model", model, "--adapter", adapter, "--data", pool, "--validation", validation,
        "--queries", "reference", "--output", scores, "--dim", 4, "--quiet",
    )  # fmt: skip
    assert "40 examples against 24 reference solutions" in out
    assert "rows=40" in run("inspect", f"{scores}.store")
    assert "every checksum holds" in run("verify", f"{scores}.store")
    out = run("prune", "--data", pool, "--scores", scores, "--strategy", "low_benefit", "--count", 7, "--output", kept)
    assert "kept 33 and dropped 7 of 40" in out
    assert "warning" not in out
    more = tmp_path / "more.jsonl"
    more.write_text(pool.read_text() + pool.read_text().splitlines()[0].replace("pool-0", "new") + "\n")
    options = ("--strategy", "low_benefit", "--count", 7, "--output", tmp_path / "kept-more.jsonl")
    out = run("prune", "--data", more, "--scores", scores, *options)
    assert "warning: 1 examples have no score and are not in the output: new" in out
    assert len(kept.read_text().splitlines()) == 33
    table = ScoreTable.load(f"{kept}.table.csv")
    assert table.columns["kept"].sum() == 33
    out = run(
        "eval", "--model", model, "--adapter", adapter, "--data", world / "test.jsonl",
        "--output", tmp_path / "t.jsonl", "--max-new-tokens", 6, "--quiet",
    )  # fmt: skip
    assert "accuracy 0." in out
    assert "gradients: torch" in run("doctor")


SCORE = ["score", "--model", "{model}", "--adapter", "x", "--data", "{pool}", "--validation", "{pool}"]
SCORE += ["--output", "s.csv"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "absent.yaml"], "no such configuration file"),
        (["prune", "--data", "{pool}", "--scores", "absent.csv", "--strategy", "combined", "--fraction", "0.1",
          "--output", "x.jsonl"], "no such score table"),
        (["prune", "--data", "{pool}", "--scores", "{pool}", "--strategy", "combined", "--fraction", "0.1",
          "--output", "x.jsonl"], "is no score table"),
        (["train", "--model", "{model}", "--data", "{pool}", "--limit", "0", "--output", "x"], "limit is 0"),
        ([*SCORE, "--preconditioner", "fischer"], "--preconditioner: unknown value 'fischer'; did you mean 'fisher'"),
        ([*SCORE, "--fallback", "refrence"], "--fallback: unknown value 'refrence'; did you mean 'reference'"),
        ([*SCORE, "--store-dtype", "int4"], "--store-dtype: unknown value 'int4'"),
        ([*SCORE, "--preconditioner", "cosine", "--fisher", "data"], "--fisher is read by ekfac, fisher, datainf"),
        ([*SCORE, "--preconditioner", "less", "--fisher-examples", "5"], "--fisher-examples is read by ekfac, fisher"),
        ([*SCORE[:-1], "s.txt"], "s.txt: a score table is written as .parquet or .csv"),
        ([*SCORE, "--fisher", "data", "--fisher-examples", "5"], "--fisher-examples is read by"),
        ([*SCORE, "--width", "9", "--sketch", "eigne"], "--sketch: 'eigne' is no store's folder; did you mean"),
        (["eval", "--model", "{world}/absent/model", "--data", "{pool}", "--output", "x.jsonl"], "absent/model"),
        (["train", "--model", "{model}", "--data", "{world}/absent.jsonl", "--output", "x"], "absent.jsonl"),
        (["report", "{world}/absent"], "absent"),
        (["inspect", "{world}/absent"], "absent"),
        (["inspect", "{pool}"], "is not a gradient store"),
        ([*SCORE, "--preconditioner", "cosine", "--damping", "0.7"], "--damping is 0.7, which nothing reads here"),
        ([*SCORE, "--queries", "reference", "--fallback", "reference"], "--fallback is 'reference', which nothing"),
        ([*SCORE, "--queries", "reference", "--max-new-tokens", "3"], "--max-new-tokens is of the model's own answers"),
        ([*SCORE, "--queries", "reference", "--strategies", "combined"], "reads the model's wrong answers"),
        ([*SCORE, "--explain", "-1"], "--explain is -1"),
        (["train", "--model", "{model}", "--data", "{pool}", "--output", "x", "--truncate"], "give that too"),
        (["train", "--model", "{model}", "--data", "{pool}", "--output", "x", "--learning-rate", "0"],
         "--learning-rate"),
        (["train", "--model", "{model}", "--data", "{pool}", "--output", "x", "--rank", "0"], "--rank"),
        (["train", "--model", "{model}", "--data", "{named}", "--output", "x"],
         "name yours with --columns prompt=...,completion=..."),
        (["train", "--model", "{model}", "--data", "{pool}", "--output", "{pool}/x", "--max-steps", "1"],
         "another path"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line_and_exit_code_2(
    world: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    named = world / "named.jsonl"  # columns of other names
    named.write_text('{"q": "1 + 1", "a": "2"}\n')
    fill = {"world": world, "model": world / "model", "pool": world / "pool.jsonl", "named": named}
    code = main([argument.format(**fill) for argument in arguments])
    said = capsys.readouterr().err
    # Libraries that are imported here for the first time may warn.
    (error,) = (line for line in said.splitlines() if not line.startswith("warning: `torch"))
    assert code == 2
    assert message in error
    assert error.startswith("error: ")


def test_labels_that_are_all_alike_tell_nothing_apart() -> None:
    labels = {"a": "clean", "b": "wrong_step", "c": None, "d": "off_topic"}
    pool = [Example(name, "p", "c", label=label) for name, label in labels.items()]
    harmful = known_harmful(pool, ["d", "a", "b"])
    assert harmful is not None
    assert harmful.tolist() == [True, False, True]
    assert known_harmful(pool, ["a", "c"]) is None
    assert known_harmful(pool, ["b", "d"]) is None


@pytest.mark.filterwarnings("error")
def test_a_pool_of_harmful_examples_alone_has_no_detection(world: Path, results: dict[str, Any]) -> None:
    table = ScoreTable.load(world / "run" / "scores.parquet")
    pool = [Example(name, "p", "c", label="wrong_answer") for name in table.ids]
    assert _detection(pool, table, (0.25,), 0) is None
    pool[0] = dataclasses.replace(pool[0], label="clean")
    found = _detection(pool, table, (0.25,), 0)
    assert found
    assert all(np.isfinite(row.auc) for row in found)


@pytest.fixture(scope="module")
def chosen(world: Path) -> Path:
    """The folder of a run with the baselines that ask for more, near-duplicates, tasks and a leaked test question."""

    def row(name: str, a: int, b: int) -> dict[str, str]:
        answer = str(a + b)
        return {
            "id": name,
            "prompt": f"what is {a} plus {b}",
            "completion": f"The answer is {answer}",
            "answer": answer,
        }

    def write(name: str, rows: list[dict[str, str]]) -> None:
        (world / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    write("test2.jsonl", [row(f"t{i}", 5 + i, 6) for i in range(4)])
    pool = [json.loads(line) for line in (world / "pool.jsonl").read_text().splitlines()]
    write("pool2.jsonl", [*pool, {**row("leak", 7, 6), "label": "clean"}])
    asked = [row(f"v{i}", i % 3, 2) | {"task": "odd" if i % 2 else "even"} for i in range(6)]
    write("validation2.jsonl", asked)
    settings = yaml.safe_load((world / "config.yaml").read_text())
    data = {"pool": "pool2.jsonl", "validation": "validation2.jsonl", "test": "test2.jsonl", "decontaminate": True}
    settings |= {
        "output": str(world / "chosen"),
        "data": data,
        "training": {"epochs": 1, "batch_size": 8},
        "influence": {"queries": "reference", "tasks": "task"},
        "pruning": {
            "strategies": ["embedding", "difficulty", "less"],
            "fractions": [0.25],
            "max_similar": 1.0,
            "pass_rate_samples": 2,
        },
    }
    (world / "chosen.yaml").write_text(yaml.safe_dump(settings))
    pipeline.run(load_config(world / "chosen.yaml"), progress=False)
    return world / "chosen"


def test_a_run_computes_what_its_strategies_read(chosen: Path) -> None:
    table = ScoreTable.load(chosen / "scores.parquet")
    assert sorted(table.columns["embedding_rank"]) == list(range(1, 41))
    assert set(table.columns["pass_rate"]) <= {0.0, 0.5, 1.0}
    halves = table.columns["s_even"] + table.columns["s_odd"]  # three questions each
    np.testing.assert_allclose(halves / 2, table.columns["s_correct"], rtol=1e-4, atol=1e-6)
    results = json.loads((chosen / "results.json").read_text())
    assert {"embeddings", "pass rates"} <= {row["stage"] for row in results["cost"]}
    assert results["queries"] == {"correct": 6, "even": 3, "odd": 3}


def test_questions_that_the_pool_shares_with_what_is_held_out_are_named(world: Path, results: dict[str, Any]) -> None:
    said = [warning for warning in results["warnings"] if "ask a question of the" in warning]
    assert [warning.split(" pool examples")[0].split(" of ")[1] for warning in said] == ["40", "40"]  # nine sums in all
    assert "validation set, which raises their scores: pool-0, pool-1" in said[0]
    assert "test set, and give its answer away: pool-0" in said[1]


def test_a_run_sets_leaked_questions_aside(chosen: Path) -> None:
    results = json.loads((chosen / "results.json").read_text())
    assert results["data"]["pool"] == 40
    assert results["data"]["set_aside"] == [{"id": "leak", "why": "shares 5 words with test/t2"}]
    assert "1 of 41 pool examples share words with the test set" in results["warnings"][0]
    assert "leak (test/t2: 'what is 7 plus 6')" in results["warnings"][0]


def test_a_run_keeps_one_of_each_cluster_and_says_why(chosen: Path) -> None:
    for strategy in ("embedding", "difficulty", "less"):
        path = chosen / "pruned" / f"{strategy}-25.jsonl"
        kept = [json.loads(line) for line in path.read_text().splitlines()]
        assert len({row["completion"] for row in kept}) == len(kept) > 1
        for suffix in ("csv", "parquet"):
            table = ScoreTable.load(f"{path}.table.{suffix}")
            why = dict(zip(table.ids, table.texts["why"], strict=True))
            assert [name for name in table.ids if why[name] == "kept"] == [row["id"] for row in kept]
            assert all(text.startswith(("kept", "dropped: near-duplicate of pool")) for text in why.values())


def test_prune_groups_near_duplicates_and_test_questions(
    chosen: Path, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def prune(*extra: Any) -> ScoreTable:
        table, kept = chosen / "scores.parquet", tmp_path / "kept.jsonl"
        code = main(
            [str(a) for a in ("prune", "--data", world / "pool2.jsonl", "--scores", table, *extra, "--output", kept)]
        )
        assert code == 0, capsys.readouterr().err
        return ScoreTable.load(f"{kept}.table.csv")

    pool = [json.loads(line) for line in (world / "pool2.jsonl").read_text().splitlines()]
    label = {row["id"]: row["label"] for row in pool}
    grouped = prune("--strategy", "less", "--fraction", 0.5, "--groups", "label")
    kept = [label[name] for name, stays in zip(grouped.ids, grouped.columns["kept"], strict=True) if stays]
    assert (kept.count("wrong_answer"), kept.count("clean")) == (5, 15)
    one_each = prune("--strategy", "embedding", "--count", 1, "--max-similar", 1)
    assert one_each.columns["kept"].sum() == len({row["completion"] for row in pool if row["id"] != "leak"})
    capsys.readouterr()
    leaked = prune("--strategy", "random", "--count", 2, "--decontaminate", world / "validation2.jsonl")
    out = capsys.readouterr().out
    shared = {row["id"] for row in pool if row["prompt"] in {f"what is {a} plus 2" for a in range(3)}}
    assert 2 < len(shared) < 40
    assert {name for name, why in zip(leaked.ids, leaked.texts["why"], strict=True) if why != "kept"} == shared
    assert "shares 5 words with validation2/v" in out
    assert (
        f"of the dropped, {len(shared)} had to go (near-duplicates or test questions) and 0 are random's choice" in out
    )
    # the same questions under other names, in a split of their own
    from datasets import Dataset, DatasetDict

    asked = [json.loads(line) for line in (world / "validation2.jsonl").read_text().splitlines()]
    renamed = [{"q": r["prompt"], "a": r["completion"]} for r in asked]
    DatasetDict(test=Dataset.from_list(renamed)).save_to_disk(str(tmp_path / "both"))
    at = ["--strategy", "random", "--count", 2, "--decontaminate", tmp_path / "both", "--decontaminate-split", "test"]
    again = prune(*at, "--decontaminate-columns", "prompt=q,completion=a")
    assert {name for name, why in zip(again.ids, again.texts["why"], strict=True) if why != "kept"} == shared
    files = ["--data", world / "pool2.jsonl", "--scores", chosen / "scores.parquet", "--output", tmp_path / "y.jsonl"]
    assert main([str(a) for a in ["prune", *files, *at]]) == 2
    assert "name yours with --decontaminate-columns prompt=...,completion=..." in capsys.readouterr().err
    assert main([str(a) for a in ["prune", *files, *at[:-2]]]) == 2
    assert "has no split 'train'; known: test; name one by --decontaminate-split" in capsys.readouterr().err
    code = main(["prune", "--data", str(world / "pool2.jsonl"), "--scores", str(chosen / "scores.csv"), "--strategy",
                 "perplexity_hi", "--count", "1", "--output", str(tmp_path / "x.jsonl")])  # fmt: skip
    assert code == 2
    assert "did you mean 'perplexity_high'" in capsys.readouterr().err


def test_score_adds_what_the_named_strategies_read(
    chosen: Path, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the command line, with the run's own adapter: the columns are those of the run."""
    arguments = [
        "score", "--model", world / "model", "--adapter", chosen / "adapters" / "full-seed0", "--dim", 4,
        "--data", world / "pool.jsonl", "--validation", world / "validation2.jsonl", "--queries", "reference",
        "--tasks", "task", "--strategies", "embedding", "--output", tmp_path / "s.parquet", "--quiet",
        "--explain", 3,
    ]  # fmt: skip
    assert main([str(a) for a in arguments]) == 0
    said = capsys.readouterr().out
    assert "embeddings" in said
    assert f"answer by answer: {tmp_path / 's.parquet.explained.html'}" in said
    told = [json.loads(line) for line in (tmp_path / "s.parquet.explained.jsonl").read_text().splitlines()]
    assert all(one["groups"] in (["correct", "odd"], ["correct", "even"]) for one in told)
    assert all(1 <= len(one["raising"]) <= 3 for one in told)
    page = (tmp_path / "s.parquet.explained.html").read_text()
    assert all(told_id in page for one in told for told_id in (one["id"], one["raising"][0]["id"]))
    ours, runs = ScoreTable.load(tmp_path / "s.parquet"), ScoreTable.load(chosen / "scores.parquet")
    assert np.array_equal(ours.columns["embedding_rank"], runs.columns["embedding_rank"])
    np.testing.assert_allclose(ours.columns["s_odd"], runs.columns["s_odd"], rtol=1e-4, atol=1e-6)
    arguments[arguments.index("embedding")] = "embeding"
    assert main([str(a) for a in arguments]) == 2
    assert "did you mean 'embedding'" in capsys.readouterr().err


def test_validation_rows_are_read_as_they_are_said_to_be(
    world: Path, chosen: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A saved set with both splits, of columns with other names."""
    from datasets import Dataset, DatasetDict

    pool, asked = (
        [json.loads(line) for line in (world / name).read_text().splitlines()]
        for name in ("pool.jsonl", "validation2.jsonl")
    )
    renamed = [{"q": r["prompt"], "a": r["completion"], "gold": r["answer"], "uid": r["id"]} for r in asked]
    both = DatasetDict(train=Dataset.from_list(pool), test=Dataset.from_list(renamed))
    both.save_to_disk(str(tmp_path / "both"))
    arguments = ["score", "--model", world / "model", "--adapter", chosen / "adapters" / "full-seed0", "--dim", 4]
    arguments += ["--data", tmp_path / "both", "--validation", tmp_path / "both", "--queries", "reference"]
    arguments += ["--output", tmp_path / "s.csv", "--quiet"]
    names = ["--validation-columns", "prompt=q,completion=a,answer=gold,id=uid", "--validation-limit", 4]
    assert main([str(a) for a in [*arguments, "--validation-split", "test", *names]]) == 0
    said = capsys.readouterr().out
    assert "against 4 reference solutions" in said
    assert "the training data" not in said
    assert main([str(a) for a in [*arguments, "--validation-split", "test"]]) == 2
    assert "name yours with --validation-columns" in capsys.readouterr().err
    assert main([str(a) for a in [*arguments, "--limit", 5, "--store", tmp_path / "other"]]) == 0
    assert "warning: the validation questions are the training data" in capsys.readouterr().out


def test_score_asks_no_question_twice_when_it_is_stopped_after_the_answers(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chosen: Path
) -> None:
    from influence_fast.evaluation import generation
    from influence_fast.run import scoring

    arguments = ["score", "--model", world / "model", "--adapter", chosen / "adapters" / "full-seed0", "--dim", 4]
    arguments += ["--data", world / "pool.jsonl", "--validation", world / "validation.jsonl", "--max-new-tokens", 6]
    arguments += ["--fallback", "reference", "--output", tmp_path / "s.csv", "--quiet"]

    def stopped(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(scoring, "score_pool", stopped)
        assert main([str(a) for a in arguments]) == 130
    answers = (tmp_path / "s.csv.answers.jsonl").read_text()
    assert answers.count("\n") == len((world / "validation.jsonl").read_text().splitlines())
    monkeypatch.setattr(generation, "_answer", stopped)
    assert main([str(a) for a in arguments]) == 0
    assert (tmp_path / "s.csv.answers.jsonl").read_text() == answers
    assert len(ScoreTable.load(tmp_path / "s.csv").ids) == 40


def test_a_run_says_what_of_its_adapter_is_not_scored_and_whose_answers_it_asked(world: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    from influence_fast.training.models import load_model

    settings = LoraConfig(r=2, target_modules=["q_proj"], bias="all")
    model: Any = get_peft_model(load_model(world / "model"), settings)
    model.save_pretrained(tmp_path / "adapter")
    raw = yaml.safe_load((world / "config.yaml").read_text())
    raw |= {
        "output": str(tmp_path / "run"),
        "model": {"path": str(world / "model"), "adapter": str(tmp_path / "adapter")},
        "training": {"max_steps": 1},
        "influence": {"queries": "reference", "preconditioner": "cosine"},
        "pruning": {"strategies": ["low_benefit"], "fractions": [0.25]},
    }
    (world / "beside.yaml").write_text(yaml.safe_dump(raw))
    results = pipeline.run(load_config(world / "beside.yaml"), progress=False)
    (said,) = [warning for warning in results["warnings"] if "more than LoRA factors" in warning]
    assert "(bias='all')" in said
    assert results["references"] == ["correct"]
    page = (tmp_path / "run" / "report.html").read_text()
    assert "more than LoRA factors" in page
    assert "the reference solutions of the validation questions" in page


def test_tasks_may_not_be_called_as_groups_are() -> None:
    examples = [Example(str(i), "p", "c", row=i) for i in range(2)]
    queries = Queries(examples, {"correct": [0], "incorrect": [1]}, [])
    with pytest.raises(ConfigError, match="a task cannot be called 'correct'"):
        with_tasks(queries, ["correct", "x"])
    named = with_tasks(queries, ["a", "b"])
    assert named.groups == {"correct": [0], "incorrect": [1], "a": [0]}
    assert named.warnings == ["no correct answer to ask for the tasks b"]


def test_scores_over_checkpoints_are_their_weighted_sum(world: Path, tmp_path: Path) -> None:
    from influence_fast.influence.checkpoints import learning_rates
    from influence_fast.training.files import list_checkpoints

    config = load_config(world / "config.yaml")
    config = dataclasses.replace(
        config,
        output=str(tmp_path / "run"),
        training=dataclasses.replace(config.training, epochs=2, save_checkpoints=True),
        influence=dataclasses.replace(config.influence, checkpoints=True, queries="reference", preconditioner="none"),
        pruning=dataclasses.replace(config.pruning, strategies=("random", "low_benefit")),
    )
    run = pipeline.Pipeline(config, progress=False)
    reference = Path(run.reference_adapter())
    table = run.scores(reference, run.queries(reference))
    saved = list_checkpoints(reference)
    assert len(saved) == 2
    total = np.zeros(len(table.ids))
    for path, rate in zip(saved, learning_rates(saved, average=True), strict=True):
        single = run._score_under(path, run.queries(reference), f"single-{path.name}", config.influence).table
        assert single.ids == table.ids
        total += rate * single.columns["s_correct"]
    np.testing.assert_allclose(table.columns["s_correct"], total, rtol=1e-6)
    moved = json.loads((tmp_path / "run" / "ranking-over-training.json").read_text())
    assert [row["checkpoint"] for row in moved] == [path.name for path in saved]
    assert "<svg" in (tmp_path / "run" / "ranking-over-training.svg").read_text()


def test_checkpoints_that_will_not_be_there_are_said_at_once(world: Path) -> None:
    config = load_config(world / "config.yaml")
    influence = dataclasses.replace(config.influence, checkpoints=True)
    with pytest.raises(ConfigError, match=r"set training\.save_checkpoints"):
        dataclasses.replace(config, influence=influence)


def test_two_processes_do_not_work_on_one_run(world: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(load_config(world / "config.yaml"), output=str(tmp_path / "run"))
    with (
        RunFolder(config).alone(),
        pytest.raises(ConfigError, match=r"run: another process is at work on this run; wait for it"),
    ):
        pipeline.run(config, progress=False)
    with RunFolder(config).alone():
        pass
