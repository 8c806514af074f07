"""The dry run against the real thing: the same rows, tokens and bytes, with no weights and no network."""

from __future__ import annotations

import dataclasses
import json
import math
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from influence_fast.cli import main
from influence_fast.config import DataConfig, ModelConfig, PruningConfig, RunConfig, Source, load_config
from influence_fast.data.examples import load_examples, tokenize
from influence_fast.errors import ConfigError, ModelError
from influence_fast.gradients.rows.row_spec import RowSpec
from influence_fast.influence.building import build_store
from influence_fast.influence.settings import InfluenceConfig
from influence_fast.run.dry_run import model_shape, plan
from influence_fast.run.dry_run_text import describe
from influence_fast.run.workdir import RunFolder
from influence_fast.training.fine_tuning import finetune
from influence_fast.training.models import load_tokenizer
from influence_fast.training.settings import LoraSettings, TrainConfig

RECIPES = sorted(Path(__file__).parents[2].glob("recipes/*.yaml"))
LORA = LoraSettings(r=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_config: Any, tiny_tokenizer: Any) -> Path:
    """A model's configuration and tokenizer, without weights, and a pool."""
    path = tmp_path_factory.mktemp("dry")
    tiny_config("llama").save_pretrained(path / "model")
    tiny_tokenizer().save_pretrained(path / "model")
    rows = [{"prompt": "1+1?" * (1 + i % 5), "completion": f"It is {i}. " * (1 + i % 7)} for i in range(23)]
    (path / "pool.jsonl").write_text("".join(json.dumps(row | {"answer": "2"}) + "\n" for row in rows))
    return path


def config_of(folder: Path, **changes: Any) -> RunConfig:
    pool = Source(str(folder / "pool.jsonl"))
    settings: dict[str, Any] = {
        "output": str(folder / "run"),
        "model": ModelConfig(str(folder / "model")),
        "data": DataConfig(pool, validation=pool, test=Source("some/where", limit=7)),
        "lora": LORA,
        "gradients": RowSpec(dim=3),
        "training": TrainConfig(epochs=2, batch_size=4),
        "pruning": PruningConfig(strategies=("random", "combined"), fractions=(0.25,), seeds=(0, 1)),
    }
    return RunConfig(**{**settings, **changes})


@pytest.mark.parametrize("gradients", [{}, {"width": 50}, {"dtype": "int8"}, {"kind": "kron"}, {"layers": 0.5}])
def test_rows_tokens_and_bytes_are_those_of_the_run(
    folder: Path, tmp_path: Path, tiny_model: Any, tiny_lora: Any, gradients: dict[str, Any]
) -> None:
    config = config_of(folder, gradients=RowSpec(dim=3, **gradients), pruning=PruningConfig(strategies=("full",)))
    found = plan(config)
    tokenizer = load_tokenizer(folder / "model")
    examples = tokenize(load_examples(folder / "pool.jsonl"), tokenizer).examples
    tuned = tiny_lora("llama")
    store = build_store(tmp_path / "store", tuned, examples, replace(config.gradients, sketch="random"))
    size = sum(p.stat().st_size for name in ("rows", "scales") for p in (tmp_path / "store").glob(f"{name}-*.bin"))
    assert found.row == store.width
    assert found.store_bytes == size
    assert found.pool == found.examples == len(examples)
    assert found.model is not None
    assert found.model.trained == sum(p.numel() for n, p in tuned.named_parameters() if "lora_" in n)
    assert found.model.parameters == sum(p.numel() for p in tiny_model("llama").parameters())
    assert found.longest == max(len(e["input_ids"]) for e in examples)
    if not gradients:
        model = tiny_model("llama")
        result = finetune(
            model, tokenizer, examples, tmp_path / "out", config=config.training, lora=LORA, progress=False
        )
        assert found.fine_tunings == 1
        assert found.training_tokens == result.tokens_seen


def test_the_grid_is_counted(folder: Path) -> None:
    found = plan(config_of(folder), tokens_per_second=100)
    assert (found.cells, found.fine_tunings) == (6, 6)
    assert found.tokens is not None
    assert found.training_tokens == round(found.tokens * 2 * 2 * (1 + 0.75 + 0.75))
    # labels are drawn for all of the pool
    assert found.seconds == {"fine-tunings": found.training_tokens / 100, "gradients": 2 * found.tokens / 100}
    assert found.fitted == found.examples == 23
    assert found.fitted_bytes == 2 * (found.store_bytes or 0)  # fp32 beside bf16
    assert "of labels that the model draws" in describe(config_of(folder), found)
    data = plan(config_of(folder, influence=InfluenceConfig(fisher="data")), tokens_per_second=1)
    assert (data.fitted, data.fitted_bytes, data.seconds["gradients"]) == (0, 0, found.tokens)
    other = plan(config_of(folder, target_model=ModelConfig(str(folder / "model"))))
    assert other.fine_tunings == 7  # and the model that scores
    assert other.training_tokens == found.training_tokens + 2 * found.tokens
    held = config_of(folder)
    held = dataclasses.replace(held, data=DataConfig(held.data.pool, holdout_validation=4, holdout_test=5))
    assert (plan(held).pool, plan(held).validation, plan(held).test) == (14, 4, 5)


def test_memory_is_the_sum_of_formulas_with_their_inputs(folder: Path) -> None:
    config = config_of(folder)
    found = plan(config)
    assert found.model is not None
    assert found.longest is not None
    weights, factors, activations = (amount for _, amount in found.memory)
    assert weights == 4 * found.model.parameters
    assert factors == 16 * found.model.trained
    assert activations == 4 * found.longest * found.model.layers * 34 * found.model.hidden * 2
    again = dataclasses.replace(config, training=TrainConfig(batch_size=4, gradient_checkpointing=True))
    assert plan(again).memory[2][1] < activations
    eight = dataclasses.replace(config, gradients=dataclasses.replace(config.gradients, precision="fp8"))
    for recomputing, memory in plan(eight).gradient_memory.items():
        more = set(memory.throughout) - set(found.gradient_memory[recomputing].throughout)
        assert more == {"e4m3 copies of W and W^T, with their scales"}
    text = describe(config, found)
    assert f"{found.model.parameters:,} x 4 bytes (float32)" in text
    assert "time               unknown: give --tokens-per-second" in text


def test_what_is_on_the_hub_is_unknown_and_not_asked_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from huggingface_hub import constants

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("asked the network")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    config = config_of(
        folder,
        model=ModelConfig("nobody/nothing"),
        data=DataConfig(Source("a/b"), holdout_validation=3, holdout_test=4),
    )
    found = plan(config)
    assert (found.pool, found.examples, found.tokens, found.model, found.store_bytes) == (None, 1000, None, None, None)
    assert "2 r dim numbers" in describe(config, found)
    known = plan(
        dataclasses.replace(config, gradients=RowSpec(width=64, dtype="int8")),
        rows=107, tokens_per_example=10.0,
    )  # fmt: skip
    assert (known.pool, known.tokens, known.store_bytes) == (100, 1000, 100 * (64 + 4))
    bounded = dataclasses.replace(config, data=dataclasses.replace(config.data, max_length=50))
    assert "at most (max_length) 50,000 for each 1,000 examples" in describe(bounded, plan(bounded))
    assert constants.HF_HUB_OFFLINE is False


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.name)
def test_recipes_plan(path: Path) -> None:
    config = load_config(path)
    found = plan(config)
    strategies, grid = len(config.pruning.strategies), config.pruning
    assert found.cells == len(grid.seeds) * (1 + strategies * len(grid.fractions))
    assert "cells" in describe(config, found)


def test_the_command_prints_the_plan_and_does_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import yaml

    raw = {
        "output": str(folder / "never"),
        "model": {"path": "model"},
        "data": {"pool": "pool.jsonl", "validation": "pool.jsonl", "test": "pool.jsonl", "max_length": 40},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(raw))
    assert main(["run", str(folder / "config.yaml"), "--dry-run", "--tokens-per-second", "1000"]) == 0
    out = capsys.readouterr().out
    assert "cells              9 = 1 seeds x (1 full + 4 strategies x 2 fractions)" in out
    assert "examples are longer than max_length and would be left out" in out
    assert "time, fine-tunings" in out
    assert not (folder / "never").exists()
    assert main(["run", str(folder / "config.yaml"), "--rows", "3"]) == 2
    assert "--rows is for --dry-run only" in capsys.readouterr().err
    assert main(["run", str(folder / "config.yaml"), "--dry-run", "--rows", "0"]) == 2
    assert "--rows is 0; it must be above 0" in capsys.readouterr().err


def test_a_folder_that_the_run_cannot_use_is_said(folder: Path, tmp_path: Path) -> None:
    config = config_of(folder, output=str(tmp_path / "run"))
    assert "warning" not in describe(config, plan(config))
    RunFolder(config)
    (tmp_path / "run" / "scoring_seconds.json").write_text("{}")
    assert "warning" not in describe(config, plan(config))
    other = dataclasses.replace(config, gradients=RowSpec(dim=5))
    said = describe(other, plan(other))
    assert "\nwarning            the run would stop at once: " in f"\n{said}"
    assert "holds a run of another configuration (gradients.dim" in said
    (tmp_path / "run" / "config.yaml").rename(tmp_path / "run" / "else.yaml")
    assert "is not empty and holds no run" in describe(config, plan(config))
    assert not (tmp_path / "run" / "config.yaml").exists()
    lost = dataclasses.replace(
        config,
        output=str(tmp_path / "new"),
        data=DataConfig(Source("../poool.jsonl"), holdout_test=3, holdout_validation=3),
    )
    assert "the run would stop at once: ../poool.jsonl: no such file or folder" in describe(lost, plan(lost))


def test_bad_input_is_named(folder: Path, tmp_path: Path) -> None:
    held = DataConfig(Source(str(folder / "pool.jsonl")), holdout_validation=10, holdout_test=20)
    with pytest.raises(ConfigError, match=r"holding out 30 of the pool's 23"):
        plan(config_of(folder, data=held))
    with pytest.raises(ConfigError, match=r"--rows: the pool is on this machine \(23 examples\)"):
        plan(config_of(folder), rows=5)
    with pytest.raises(ConfigError, match="--tokens-per-example: the pool and its tokenizer are on this machine"):
        plan(config_of(folder), tokens_per_example=5)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=str(tmp_path)):
        model_shape(ModelConfig(str(tmp_path)), config_of(folder))


def test_memory_of_the_gradients_is_that_of_their_largest_batch(folder: Path) -> None:
    config = config_of(folder)
    found = plan(config)
    assert found.gradient_batch == 16_384
    kept, again = found.gradient_memory[False], found.gradient_memory[True]
    assert kept.peak > again.peak > sum(again.throughout.values()) > 4 * found.model.parameters
    text = describe(config, found)
    assert "a batch of 16,384 tokens, layers computed again; fullest at" in text
    short = plan(config_of(folder, gradients=RowSpec(dim=3, max_tokens=1)))
    assert short.gradient_batch == found.longest
    assert short.gradient_memory[True].batch < again.batch / 10
    exact = config_of(folder, gradients=RowSpec(kind="sjlt", width=50))
    assert plan(exact).gradient_memory == {}
    assert "memory, gradients" not in describe(exact, plan(exact))


@pytest.mark.parametrize(
    ("training", "stores"),
    [
        ({"epochs": 3, "save_checkpoints": True}, 3),
        ({"epochs": 2, "save_checkpoints": 5, "batch_size": 2}, None),
        ({"max_steps": 12, "save_checkpoints": 5}, 3),
    ],
)
def test_scores_over_checkpoints_take_a_store_each(folder: Path, training: dict[str, Any], stores: int | None) -> None:
    one = plan(config_of(folder), tokens_per_second=1)
    config = config_of(folder, training=TrainConfig(**training), influence=InfluenceConfig(checkpoints=True))
    found = plan(config, tokens_per_second=1)
    assert found.examples == one.examples
    if stores is None:
        stores = math.ceil(2 * math.ceil(one.examples / 2) / 5)
    assert (found.stores, found.store_bytes, found.seconds["gradients"]) == (
        stores,
        stores * one.store_bytes,
        stores * one.seconds["gradients"],
    )
    assert one.store_bytes is not None
    assert f"{stores} checkpoints x {one.examples} rows" in describe(config, found)
