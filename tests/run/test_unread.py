"""Settings that nothing reads are said, those that something reads are not."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

from influence_fast.cli import main
from influence_fast.config import (
    DataConfig,
    EvalConfig,
    LoraSettings,
    ModelConfig,
    PruningConfig,
    RunConfig,
    Source,
    TrainConfig,
    load_config,
)
from influence_fast.data.examples import write_rows
from influence_fast.gradients.rows.row_spec import RowSpec
from influence_fast.influence.settings import InfluenceConfig
from influence_fast.run.unread import unread_settings
from influence_fast.selection.strategies import STRATEGIES

RECIPES = sorted(Path(__file__).parents[2].glob("recipes/*.yaml"))


def config_of(**changes: Any) -> RunConfig:
    source = Source("some/where")
    parts = {"model": ModelConfig("a/model"), "data": DataConfig(source, validation=source, test=source)}
    return RunConfig("run", **(parts | changes))


@pytest.mark.parametrize(
    ("changes", "keys"),
    [
        ({}, []),
        ({"influence": InfluenceConfig(damping=0.5, fisher="data")}, []),
        ({"influence": InfluenceConfig("cosine", damping=0.5)}, ["influence.damping"]),
        ({"influence": InfluenceConfig("adam", damping=0.5)}, []),
        ({"influence": InfluenceConfig("cosine", fisher="data")}, ["influence.fisher"]),
        ({"influence": InfluenceConfig("ekfac", fisher_examples=9)}, []),
        ({"influence": InfluenceConfig(fisher="data", fisher_examples=9)}, ["influence.fisher_examples"]),
        # a row that is no longer than its width is not sketched
        ({"influence": InfluenceConfig(fisher_examples=9), "gradients": RowSpec(width=64)}, []),
        (
            {"influence": InfluenceConfig(fisher_examples=9), "gradients": RowSpec(width=64, sketch="eigen")},
            ["influence.fisher_examples"],
        ),
        ({"influence": InfluenceConfig(fisher="data"), "gradients": RowSpec(width=64, sketch_examples=9)}, []),
        ({"gradients": RowSpec(sketch_examples=9)}, ["gradients.sketch_examples"]),
        ({"gradients": RowSpec(sketch="random")}, ["gradients.sketch"]),
        ({"gradients": RowSpec("none", dim=9, seed=3)}, ["gradients.dim"]),  # the seed draws labels
        ({"influence": InfluenceConfig(damping=0.5), "gradients": RowSpec(width=64)}, []),
        (
            {"influence": InfluenceConfig(damping=0.5), "gradients": RowSpec(width=64, sketch="random")},
            ["influence.damping"],
        ),
        (
            {"gradients": RowSpec("sjlt", dim=9, width=64, seed=3), "influence": InfluenceConfig("cosine")},
            ["gradients.dim"],
        ),
        ({"influence": InfluenceConfig(queries="reference", fallback="reference")}, ["influence.fallback"]),
        ({"evaluation": EvalConfig(top_p=0.5)}, ["evaluation.top_p"]),
        ({"evaluation": EvalConfig(top_p=0.5), "pruning": PruningConfig(("easy",))}, []),
        ({"training": TrainConfig(max_steps=3, epochs=2)}, ["training.epochs"]),
        ({"pruning": PruningConfig(("random",), pass_rate_samples=9)}, ["pruning.pass_rate_samples"]),
        ({"pruning": PruningConfig(("easy",), pass_rate_samples=9)}, []),
        ({"training": TrainConfig(seed=3)}, ["training.seed"]),
        ({"influence": InfluenceConfig(tasks="subject")}, ["influence.tasks"]),
        ({"influence": InfluenceConfig(tasks="subject"), "pruning": PruningConfig(("random", "less"))}, []),
        ({"lora": LoraSettings(r=4), "model": ModelConfig("a/model", adapter="an/adapter")}, []),  # the grid reads it
    ],
    ids=str,
)
def test_what_nothing_reads_is_named(changes: dict[str, Any], keys: list[str]) -> None:
    if changes.get("influence") == InfluenceConfig(queries="reference", fallback="reference"):
        changes = changes | {"pruning": PruningConfig(("low_benefit",))}
    found = unread_settings(config_of(**changes))
    assert [line.split(" is ")[0] for line in found] == keys


def test_a_strategy_of_ones_own_reads_its_task(monkeypatch: pytest.MonkeyPatch) -> None:
    class Algebra:
        needs = ("s_algebra",)

    monkeypatch.setitem(STRATEGIES, "algebra", Algebra())
    changes = {"influence": InfluenceConfig(tasks="subject"), "pruning": PruningConfig(("algebra",))}
    assert unread_settings(config_of(**changes)) == []


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_splits_and_traces_that_a_local_file_does_not_have(tmp_path: Path, kind: str) -> None:
    pairs, traces = tmp_path / f"pairs.{kind}", tmp_path / f"traces.{kind}"
    write_rows([{"prompt": "p", "completion": "c"}], pairs)
    write_rows([{"problem": "p", "generations": ["c", "d"], "answer": "1"}], traces)
    data = DataConfig(
        Source(str(pairs), split="validation", trace="all"),
        validation=Source(str(traces), trace="all"),
        test=Source("some/where", split="validation", trace="all"),
    )
    assert unread_settings(config_of(data=data)) == [
        "data.pool.split is 'validation', which nothing reads here: a single file has no splits",
        "data.pool.trace is 'all', which nothing reads here: the file's rows have no traces to choose from",
    ]
    renamed = Source(str(traces), trace="all", columns={"prompt": "problem", "completion": "answer"})
    found = unread_settings(config_of(data=dataclasses.replace(data, pool=renamed)))
    assert [line.split(" is ")[0] for line in found] == ["data.pool.trace"]
    pairs.write_text("")  # what is wrong with it is for the run to say
    found = unread_settings(config_of(data=data))
    assert [line.split(" is ")[0] for line in found] == ["data.pool.split"]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_have_none(path: Path) -> None:
    assert unread_settings(load_config(path)) == []


def test_the_command_says_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = dataclasses.asdict(config_of(influence=InfluenceConfig("cosine", damping=0.5)))
    part = {"damping": 0.5, "preconditioner": "cosine"}
    wanted = {key: settings[key] for key in ("output", "model", "data")} | {"influence": part}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(wanted))
    assert main(["run", str(tmp_path / "run.yaml"), "--dry-run"]) == 0
    said = capsys.readouterr().err
    assert "warning: influence.damping is 0.5, which nothing reads here: nothing is inverted" in said
