"""The proof on a tiny model: every part is there, nothing is retrained twice, mistakes are found before the work."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from worlds import write_model, write_rows

from influence_fast.cli import main
from influence_fast.config import load_config
from influence_fast.data.examples import load_examples
from influence_fast.errors import ConfigError, DataError, ModelError
from influence_fast.influence.methods import shorten
from influence_fast.validation import retraining
from influence_fast.validation.lds import linear_datamodeling_scores
from influence_fast.validation.page import text_tables
from influence_fast.validation.retraining import Retraining, retrain
from influence_fast.validation.validate import drop_priority, validate

# It depends on a clock or on other processes: a failure is run once more and listed (RERUN).
pytestmark = pytest.mark.flaky(reruns=1)

NARROW = {"name": "narrow", "preconditioner": "cosine", "dim": 4}
FITTED = {"name": "fitted", "dim": 8, "width": 40, "sketch_examples": 16}
PROXY = {"name": "proxy", "preconditioner": "cosine", "dim": 16, "proxy": "PROXY"}
WIDE = NARROW | {"name": "wide", "dim": 256, "store_dtype": "fp32"}
SETTINGS: dict[str, Any] = {
    "model": {"path": "model"},
    "training": {"epochs": 6, "learning_rate": 5e-3, "batch_size": 8, "save_checkpoints": True},
    "lora": {"r": 4, "alpha": 8},
    "influence": {"queries": "reference"},
    "pruning": {"strategies": ["random"], "fractions": [0.25]},
    "evaluation": {"max_new_tokens": 6},
    "validate": {
        "methods": [
            "cosine",
            "less",
            "exact-dot",
            "exact-cosine",
            "loss",
            "ekfac-cosine",
            NARROW,
            WIDE,
            FITTED,
            PROXY,
        ],
        "default": "cosine",
        "subsets": 4,
        "leave_out_sets": 3,
        "remove": [0.2],
        "removal_methods": ["cosine"],
        "draws": 50,
    },
}


@pytest.fixture(scope="module")
def proof(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("proof")
    write_model(folder / "model")
    write_model(folder / "small", hidden=16)
    for name, n in (("pool", 24), ("validation", 6), ("test", 4)):
        write_rows(folder / f"{name}.jsonl", n, seed=n)
    data = {"pool": "pool.jsonl", "validation": "validation.jsonl", "test": "test.jsonl"}
    text = yaml.safe_dump(SETTINGS | {"output": str(folder / "run"), "data": data})
    (folder / "config.yaml").write_text(text.replace("PROXY", str(folder / "small")))
    assert main(["validate", "--quiet", str(folder / "config.yaml")]) == 0
    return folder, json.loads((folder / "run" / "validation.json").read_text())


def test_every_part_is_there(proof: tuple[Path, dict[str, Any]]) -> None:
    folder, results = proof
    names = {"cosine", "less", "exact-dot", "exact-cosine", "loss", "ekfac-cosine", "narrow", "wide", "fitted", "proxy"}
    for part, subsets, size in (("lds", 4, 12), ("leave_out", 3, 22)):
        assert (results[part]["subsets"], results[part]["seeds"], results[part]["size"]) == (subsets, 2, size)
        for group, kind in (("all", "queries"), ("correct", "mean")):
            rows = [r for r in results[part]["rows"] if (r["group"], r["of"]) == (group, kind)]
            assert {row["method"] for row in rows} == names
            assert all(-1 <= row["low"] <= row["high"] <= 1 for row in rows)
    assert {row["method"] for row in results["detection"]} == names
    assert {(r["method"], r["direction"]) for r in results["removal"]} == {
        ("cosine", "helpful"),
        ("cosine", "harmful"),
        ("random", "random"),
    }
    costs = {row["method"]: row for row in results["cost"]["rows"]}
    assert costs["wide"]["spearman_to_exact"]["queries"] > costs["narrow"]["spearman_to_exact"]["queries"] > 0.4
    assert costs["wide"]["spearman_to_exact"]["correct"] > 0.9
    assert costs["fitted"]["bytes_per_example"] == 40 * 2
    assert costs["fitted"]["seconds"]["fitting the sketch"] > 0
    assert costs["proxy"]["seconds"]["fine-tuning the proxy"] > 0
    # of a model of another width, on the same examples: other numbers of about the same order
    assert 0.1 < costs["proxy"]["spearman_to_exact"]["queries"] < 0.999
    page = (folder / "run" / "validation.html").read_text()
    assert "Linear datamodeling score" in page
    assert "6 reference solutions as queries" in page
    assert "mean loss of reference solutions" in page
    assert "right answers" not in page
    assert "Each method was timed once" in page
    assert "4 training sets are too few to tell methods apart" in page
    assert "too few" not in text_tables(results | {"lds": results["lds"] | {"subsets": 64}, "leave_out": None})
    assert "<svg" in page
    assert "http://" not in page.replace("http://www.w3.org", "")


def test_the_score_is_that_of_the_kept_retrainings(proof: tuple[Path, dict[str, Any]]) -> None:
    folder, results = proof
    config = load_config(folder / "config.yaml")
    from influence_fast.validation.lds import draw_subsets

    masks = draw_subsets(24, 12, 4, config.seed)
    losses = []
    for i in range(4):
        found = [np.load(folder / "run" / "retrained" / f"half-{i:04d}-seed{s}.npz") for s in (0, 1)]
        losses.append([f["losses"] for f in found])
        assert np.abs(losses[-1][0] - losses[-1][1]).max() > 0
    assert not list((folder / "run" / "validate").glob(".*")), "a method's gradients were left behind"
    matrix = np.load(folder / "run" / "validate" / "cosine.npz")["matrix"]
    wanted = linear_datamodeling_scores({"m": matrix}, masks, np.array(losses), draws=50)["m"]
    (row,) = [r for r in results["lds"]["rows"] if (r["method"], r["group"], r["of"]) == ("cosine", "all", "queries")]
    assert (row["value"], row["low"], row["high"]) == (wanted.value, wanted.low, wanted.high)


def test_nothing_is_done_twice(proof: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, results = proof

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr("influence_fast.training.fine_tuning.finetune", refuse)
    monkeypatch.setattr("influence_fast.validation.validate.score_by", refuse)
    again = validate(load_config(folder / "config.yaml"), progress=False)
    assert json.loads(json.dumps(again))["lds"] == results["lds"]


@pytest.mark.exhaustive
def test_processes_and_interruptions_change_no_outcome(proof: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    import dataclasses

    folder, _ = proof
    config = dataclasses.replace(load_config(folder / "config.yaml"), output=str(tmp_path / "run"))
    queries = load_examples(folder / "validation.jsonl")
    work = [Retraining(f"half-{i}-seed0", np.arange(i, 24, 2), 0) for i in range(2)]
    two = retrain(config, queries, work, processes=2, verbose=False)
    (tmp_path / "run" / "retrained" / "half-1-seed0.npz").unlink()
    one = retrain(config, queries, work, processes=1, verbose=False)
    for job in work:
        np.testing.assert_allclose(one[job.name].losses, two[job.name].losses, rtol=1e-5)
    assert not list((tmp_path / "run" / "retrained").glob(".*"))


def test_the_folder_is_there_before_processes_open_it(
    proof: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Of two that make it at one time, one may find it half made, which is a folder of something else."""
    import dataclasses

    class Opened(Exception):
        pass

    def pool(*args: Any, **options: Any) -> Any:
        raise Opened((tmp_path / "run" / "config.yaml").exists())

    folder, _ = proof
    config = dataclasses.replace(load_config(folder / "config.yaml"), output=str(tmp_path / "run"))
    monkeypatch.setattr(retraining, "ProcessPoolExecutor", pool)
    with pytest.raises(Opened, match="True"):
        retrain(config, [], [Retraining("half-0-seed0", np.arange(3), 0)], processes=2, verbose=False)


def test_a_retraining_of_other_rows_is_not_taken(proof: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = proof
    config = load_config(folder / "config.yaml")
    queries = load_examples(folder / "validation.jsonl")
    with pytest.raises(DataError, match=r"half-0000-seed0\.npz is a retraining on other rows"):
        retrain(config, queries, [Retraining("half-0000-seed0", np.arange(3), 0)], verbose=False)


def test_a_killed_process_is_a_clear_error(
    proof: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import dataclasses

    folder, _ = proof
    config = dataclasses.replace(load_config(folder / "config.yaml"), output=str(tmp_path / "run"))
    monkeypatch.setattr(retraining, "_open", _die)
    queries = load_examples(folder / "validation.jsonl")
    work = [Retraining(f"half-{i}", np.arange(10), i) for i in range(2)]
    with pytest.raises(
        DataError, match=r"killed by signal 9 \(out of memory\?\); 0 of 2 retrainings are done and kept"
    ):
        retrain(config, queries, work, processes=2, verbose=False)


@pytest.mark.parametrize(
    ("raised", "kind", "message"),
    [
        (ModelError("no model at gone; check the path"), ModelError, "no model at gone; check the path"),
        (ValueError("two\nlines"), DataError, r"could not open its model and data \(ValueError: two lines\)"),
    ],
)
def test_what_fails_at_the_start_of_a_process_is_raised_by_its_work(
    raised: Exception, kind: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fails(*_: Any) -> Any:
        raise raised

    monkeypatch.setattr(retraining, "_World", fails)
    monkeypatch.setattr(retraining, "_world", None)
    config: Any = None
    retraining._open(config, [], 1)
    with pytest.raises(kind, match=message):
        retraining._work(Retraining("half-0", np.arange(3), 0), tmp_path, "")


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        ([0, -9, -15], r"was killed by signal 9 \(out of memory\?\)$"),
        ([-15, 1, -15], "ended with exit code 1 and the traceback above"),
        ([-15, None], r"was killed \(out of memory\?\)$"),
    ],
)
def test_a_process_that_failed_is_told_from_one_that_was_killed(codes: list[int | None], message: str) -> None:
    processes: Any = [SimpleNamespace(join=lambda seconds: None, exitcode=code) for code in codes]
    assert re.search(message, retraining._end_of(processes))


def _die(*_: Any) -> None:
    import os
    import signal

    os.kill(os.getpid(), signal.SIGKILL)


def change(folder: Path, tmp_path: Path, **validate_settings: Any) -> str:
    raw = yaml.safe_load((folder / "config.yaml").read_text())
    raw["validate"] |= validate_settings
    for name in ("pool", "validation", "test"):
        raw["data"][name] = str(folder / raw["data"][name])
    raw["model"]["path"] = str(folder / "model")
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(raw))
    return str(path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"methods": ["cosin"]}, "unknown method 'cosin'; did you mean 'cosine'"),
        ({"methods": ["dot"]}, "'cosine' is not among the methods (dot)"),
        ({"methods": ["cosine", "cosine"]}, "a name comes twice"),
        ({"methods": ["cosine", {"name": "x", "dims": 3}]}, "unknown key 'dims'"),
        ({"methods": ["cosine", {"name": "x", "tokens": 0}]}, "tokens is 0"),
        ({"methods": ["cosine", {"name": "x", "sketch": "eigne"}]}, "did you mean 'eigen'"),
        ({"methods": ["cosine", {"name": "x", "sketch": "eigen"}]}, "needs the width"),
        ({"methods": ["cosine", {"name": "x", "store_dtype": "int4"}]}, "method x: store_dtype: unknown value 'int4'"),
        ({"methods": ["cosine", {"name": "x", "projection": "none", "width": 9}]}, "leave out width and layers"),
        ({"methods": ["cosine", {"name": "x", "proxy": "p", "checkpoints": True}]}, "a proxy has one adapter"),
        ({"methods": ["cosine", {"name": "x", "proxy": "missing-model"}]}, "missing-model"),
        ({"share": 1.5}, "validate.share is 1.5"),
        ({"subsets": 2}, "at least 3"),
        ({"external": {"other": "missing.npz"}}, "no scores of another tool"),
    ],
)
def test_mistakes_are_named(
    proof: tuple[Path, dict[str, Any]],
    tmp_path: Path,
    settings: dict[str, Any],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["validate", "--quiet", change(proof[0], tmp_path, **settings)]) == 2
    assert message in capsys.readouterr().err


def test_methods_that_read_checkpoints_say_so_before_any_work(
    proof: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    import dataclasses

    config = load_config(proof[0] / "config.yaml")
    training = dataclasses.replace(config.training, save_checkpoints=False)
    with pytest.raises(
        ConfigError, match=r"less read checkpoints with optimizer state: set training\.save_checkpoints"
    ):
        validate(dataclasses.replace(config, training=training, output=str(tmp_path / "run")), progress=False)


def test_scores_of_another_tool_are_compared_too(proof: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, _ = proof
    matrix = np.load(folder / "run" / "validate" / "cosine.npz")["matrix"]
    np.savez(tmp_path / "other.npz", scores=matrix)
    config = change(folder, tmp_path, external={"other": str(tmp_path / "other.npz")})
    found = validate(load_config(config), progress=False)
    rows = {r["method"]: r for r in found["lds"]["rows"] if (r["group"], r["of"]) == ("all", "queries")}
    assert rows["other"]["value"] == rows["cosine"]["value"]
    assert rows["other"]["default_ahead"] == {"value": 0.0, "low": 0.0, "high": 0.0}


def test_shortened_traces_keep_their_prompt_and_a_token() -> None:
    example = {"id": "a", "input_ids": torch.arange(10), "labels": torch.tensor([-100] * 4 + list(range(4, 10)))}
    assert shorten(example, 0.5)["input_ids"].tolist() == list(range(7))
    assert shorten(example, 0.5)["labels"].tolist() == [-100] * 4 + [4, 5, 6]
    assert len(shorten(example, 0.01)["input_ids"]) == 5
    assert shorten(example, 1.0) == example


def test_priority_is_the_difference_of_ranks() -> None:
    matrix = np.array([[3.0, 1.0], [2.0, 5.0], [1.0, 2.0]])
    assert drop_priority(matrix, {"correct": [0], "incorrect": [1]}).tolist() == [-2.0, 1.0, 1.0]
    assert drop_priority(matrix, {"correct": [0]}).tolist() == [-3.0, -2.0, -1.0]


@pytest.mark.exhaustive
def test_damaged_files_are_made_again_and_a_changed_proxy_is_scored_anew(
    proof: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    import dataclasses
    import shutil

    folder, results = proof
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    config = dataclasses.replace(load_config(tmp_path / "config.yaml"), output=str(tmp_path / "run"))
    methods = [*config.validate.methods[:-1], PROXY | {"proxy": str(tmp_path / "small")}]
    config = dataclasses.replace(config, validate=dataclasses.replace(config.validate, methods=tuple(methods)))
    retrained, scores = tmp_path / "run" / "retrained" / "half-0001-seed0.npz", tmp_path / "run" / "validate"
    retrained.write_bytes(retrained.read_bytes()[:100])
    (scores / "cosine.npz").write_bytes(b"")
    with pytest.warns(UserWarning, match="is damaged, and is made again"):
        again = validate(config, progress=False)
    assert [row["value"] for row in again["lds"]["rows"]] == pytest.approx(
        [row["value"] for row in results["lds"]["rows"]], abs=1e-6
    )
    first = np.load(scores / "proxy.npz")["matrix"]
    write_model(tmp_path / "small", hidden=24)
    validate(config, progress=False)
    assert not np.array_equal(first, np.load(scores / "proxy.npz")["matrix"])
    assert len(list(scores.glob("proxy-*"))) == 3
