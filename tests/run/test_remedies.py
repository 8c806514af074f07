"""What a message says to delete is all that has to go: after that a run gives what a fresh folder gives."""

from __future__ import annotations

import dataclasses
import gzip
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from worlds import write_model, write_rows

from influence_fast.cli import main
from influence_fast.config import load_config
from influence_fast.errors import ConfigError
from influence_fast.run import pipeline

SETTINGS: dict[str, Any] = {
    "output": "run",
    "model": {"path": "model"},
    "data": {"pool": "pool.jsonl", "validation": "validation.jsonl", "test": "test.jsonl"},
    "training": {"max_steps": 4, "learning_rate": 0.05, "batch_size": 4},
    "lora": {"r": 2},
    "gradients": {"dim": 4},
    "influence": {"preconditioner": "none", "queries": "reference", "explain": 2},
    "pruning": {"strategies": ["random", "low_benefit", "hard"], "fractions": [0.5]},
    "evaluation": {"max_new_tokens": 4},
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("remedies")
    write_model(folder / "model")
    for name, n in (("pool", 16), ("validation", 4), ("test", 4)):
        write_rows(folder / f"{name}.jsonl", n, seed=n)
    (folder / "config.yaml").write_text(yaml.safe_dump(SETTINGS))
    _run(folder, folder / "run")
    return folder


@pytest.fixture
def world(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished, tmp_path / "world")
    return tmp_path / "world"


def _run(world: Path, output: Path) -> dict[str, Any]:
    config = dataclasses.replace(load_config(world / "config.yaml"), output=str(output))
    return pipeline.run(config, progress=False)


def _set(part: str, **values: Any) -> Callable[[Path], None]:
    def change(world: Path) -> None:
        raw = yaml.safe_load((world / "config.yaml").read_text())
        raw[part] = raw.get(part, {}) | values
        (world / "config.yaml").write_text(yaml.safe_dump(raw))

    return change


def _other_solutions(world: Path) -> None:
    rows = [json.loads(line) for line in (world / "validation.jsonl").read_text().splitlines()]
    rows = [row | {"completion": f"# # answer {i + 9}"} for i, row in enumerate(rows)]
    (world / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _delete_what_is_named(message: str, run: Path) -> None:
    found = re.search(r"delete what was made with the other: (.*?)(?: \(in |$)", message)
    assert found, message
    for pattern in found[1].split(", "):
        paths = list(run.glob(pattern))
        assert paths, f"{pattern!r} of {message!r} names nothing"
        for path in paths:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _made(run: Path) -> dict[str, Any]:
    """All that depends on selections, without times."""
    found: dict[str, Any] = {}
    for path in sorted([*run.glob("cells/*"), *run.glob("evaluations/*")]):
        value = json.loads(path.read_text())["value"]
        found[str(path.relative_to(run))] = {k: v for k, v in value.items() if k != "seconds"}
    for path in sorted([*run.glob("transcripts/*.jsonl"), *run.glob("pruned/*.jsonl")]):
        found[str(path.relative_to(run))] = path.read_text()
    for path in sorted(run.glob("adapters/*/training.json")):
        found[str(path.relative_to(run))] = json.loads(path.read_text())["examples"]
    found["scores"] = (run / "scores.csv").read_text()
    return found


CHANGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "preconditioner": (_set("influence", preconditioner="cosine"), "low_benefit-50"),
    "validation solutions": (_other_solutions, "low_benefit-50"),
    "max_similar": (_set("pruning", max_similar=0.5), "low_benefit-50"),
    "pass rates": (_set("pruning", pass_rate_samples=1, pass_rate_temperature=5.0), "hard-50"),
    "answers": (_set("evaluation", max_new_tokens=2), "hard-50"),
}


@pytest.mark.parametrize(
    "name",
    [
        name if name in ("preconditioner", "answers") else pytest.param(name, marks=pytest.mark.exhaustive)
        for name in CHANGES
    ],
)
def test_deleting_exactly_what_is_named_gives_a_fresh_result(world: Path, name: str) -> None:
    change, cell = CHANGES[name]
    before = _made(world / "run")
    change(world)
    with pytest.raises(ConfigError) as error:
        _run(world, world / "run")
    _delete_what_is_named(str(error.value), world / "run")
    assert (world / "run" / "adapters" / "full-seed0").exists()
    _run(world, world / "run")
    _run(world, world / "fresh")
    again, fresh = _made(world / "run"), _made(world / "fresh")
    assert again == fresh
    assert fresh != before
    if cell.startswith("low_benefit"):  # the change is one that selects others
        assert fresh[f"pruned/{cell}.jsonl"] != before[f"pruned/{cell}.jsonl"]


def test_an_evaluation_of_another_adapter_is_made_again(world: Path) -> None:
    """As a process leaves it that ends before the cell, when the selection then becomes another."""
    run = world / "run"
    _set("influence", preconditioner="cosine")(world)
    for pattern in ("scoring_seconds.json", "cells/*-*-seed*", "adapters/*-*-seed*", "baselines/*"):
        for path in run.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["influence"]["preconditioner"] = "cosine"
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    path = run / "evaluations" / "low_benefit-50-seed0.json"
    stale = json.loads(path.read_text())
    stale["value"]["accuracy"] = 0.123
    path.write_text(json.dumps(stale))
    with pytest.warns(UserWarning, match=r"low_benefit-50-seed0\.json was made of something else, and is made again"):
        _run(world, run)
    _run(world, world / "fresh")
    assert _made(run) == _made(world / "fresh")


def test_an_evaluation_that_says_no_adapter_is_made_again_only_for_a_new_cell(world: Path) -> None:
    path = world / "run" / "evaluations" / "low_benefit-50-seed0.json"
    old = json.loads(path.read_text())
    del old["of"]
    path.write_text(json.dumps(old))
    _run(world, world / "run")
    assert json.loads(path.read_text()) == old
    (world / "run" / "cells" / "low_benefit-50-seed0.json").unlink()
    with pytest.warns(UserWarning, match="is made again"):
        _run(world, world / "run")
    assert json.loads(path.read_text())["value"] == old["value"]
    assert "of" in json.loads(path.read_text())


def test_a_cell_of_another_selection_is_not_taken(world: Path) -> None:
    path = world / "run" / "cells" / "low_benefit-50-seed0.json"
    cell = json.loads(path.read_text())
    cell["value"]["accuracy"] = 0.123
    path.write_text(json.dumps(cell | {"of": "another"}))
    with pytest.warns(UserWarning, match="was made of something else"):
        results = _run(world, world / "run")
    assert [c["accuracy"] for c in results["cells"] if c["strategy"] == "low_benefit"] != [0.123]


def test_pass_rates_are_sampled_where_the_models_own_settings_are_asked_for(
    world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _set("evaluation", generation="model")(world)
    results = _run(world, world / "other")
    assert {cell["strategy"] for cell in results["cells"]} == {"full", "random", "low_benefit", "hard"}
    command = [
        "score", "--quiet", "--model", world / "model", "--adapter", world / "run" / "adapters" / "full-seed0",
        "--data", world / "pool.jsonl", "--validation", world / "validation.jsonl", "--dim", 4,
        "--fallback", "reference", "--generation", "model", "--max-new-tokens", 4, "--output", world / "s.csv",
    ]  # fmt: skip
    assert main([str(part) for part in command]) == 0, capsys.readouterr().err


# ---- lists of single answers -------------------------------------------------------------------------------


def _longest(run: Path) -> int:
    lines = (run / "explained.jsonl").read_text().splitlines()
    return max(len(one[way]) for one in map(json.loads, lines) for way in ("raising", "lowering"))


def test_lists_of_single_answers_follow_the_setting(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = world / "run"
    cells, first = (run / "scores.csv").read_text(), (run / "explained.jsonl").read_text()
    assert _longest(run) == 2
    _set("influence", explain=5)(world)
    assert _run(world, run)["explained"] == "explained.html"
    assert _longest(run) == 5
    _set("influence", explain=2)(world)
    (run / "explained_count.json").unlink()  # as an earlier version leaves it
    _run(world, run)
    assert (run / "explained.jsonl").read_text() == first
    (run / "explained.jsonl").unlink()
    _run(world, run)
    assert (run / "explained.jsonl").read_text() == first
    monkeypatch.setattr(pipeline, "explained_scores", None)  # nothing is left to be scored
    _run(world, run)
    _set("influence", explain=0)(world)
    assert _run(world, run)["explained"] is None
    assert (run / "scores.csv").read_text() == cells


# ---- settings under which nothing is another ---------------------------------------------------------------


def _packed(world: Path) -> None:
    (world / "packed.jsonl.gz").write_bytes(gzip.compress((world / "pool.jsonl").read_bytes()))
    _set("data", pool="packed.jsonl.gz")(world)


ALIKE = {
    "columns": _set("data", pool={"path": "pool.jsonl", "columns": {"prompt": "prompt"}}),
    "limit": _set("data", validation={"path": "validation.jsonl", "limit": 4}),
    "device": _set("model", device="cpu"),
    "tokenizer": _set("model", tokenizer="model"),
    "packed": _packed,
}


@pytest.mark.parametrize("name", ALIKE)
def test_settings_that_read_the_same_are_no_change(world: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ALIKE[name](world)
    for work in ("explained_scores", "evaluate"):
        monkeypatch.setattr(pipeline, work, None)
    before = _made(world / "run")
    _run(world, world / "run")
    assert _made(world / "run") == before


def test_settings_that_read_other_examples_are_still_refused(world: Path) -> None:
    _set("data", pool={"path": "pool.jsonl", "limit": 15})(world)
    with pytest.raises(ConfigError, match=r"another configuration \(data\.pool\.limit"):
        _run(world, world / "run")
