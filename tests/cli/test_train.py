"""The verb `train`: its settings reach the training, what it takes is said, and influence is scored along it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from influence_fast.cli import main
from influence_fast.influence.scores import ScoreTable
from influence_fast.training import memory


@pytest.fixture(scope="module")
def world(tiny_model: Any, tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    tiny_model(num_hidden_layers=1).save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    for name, count in (("train", 6), ("validation", 2)):
        rows = [{"id": f"{name}-{i}", "prompt": f"{i}+{i}=", "completion": str(2 * i)} for i in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def arguments(world: Path, output: str, *more: str) -> list[str]:
    return [
        *("train", "--model", str(world / "model"), "--data", str(world / "train.jsonl")),
        *("--output", str(world / output), "--device", "cpu", "--batch-size", "2", "--max-steps", "2", *more),
    ]


def test_train_scores_influence_and_takes_its_settings(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--rank", "2", "--alpha", "3", "--gradient-accumulation-steps", "2", "--gradient-checkpointing"]
    along = ["--influence", str(world / "validation.jsonl"), "--influence-every", "1"]
    assert main(arguments(world, "out", *options, *along)) in (0, None)
    said = capsys.readouterr().out
    assert "memory: weights and adapter" in said
    assert "at batches of 2 rows" in said
    assert "influence: " in said
    record = json.loads((world / "out" / "training.json").read_text())
    assert record["lora"]["alpha"] == 3
    assert record["lora"]["r"] == 2
    assert record["train"]["gradient_accumulation_steps"] == 2
    assert record["train"]["gradient_checkpointing"] is True
    files = sorted(path.name for path in (world / "out" / "influence").iterdir())
    assert files == ["made-with.json", "step-000001.parquet", "step-000002.parquet"]
    table = ScoreTable.load(world / "out" / "influence" / files[-1])
    assert table.ids == [f"train-{i}" for i in range(6)]
    assert (table["s_validation"] != 0).all()
    # the training is finished, and scores of other validation examples are not these
    assert main(arguments(world, "out", *options, *along)) in (0, None)
    along[1] = str(world / "train.jsonl")
    assert main(arguments(world, "out", *options, *along)) == 2
    assert "made with other validation examples" in capsys.readouterr().err


def test_train_says_what_does_not_go(
    world: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(arguments(world, "other", "--influence-every", "1")) == 2
    assert "--influence-every goes with --influence" in capsys.readouterr().err
    validation = str(world / "validation.jsonl")
    assert main(arguments(world, "other", "--influence", validation, "--influence-every", "0")) == 2
    assert "--influence-every is 0; it must be at least 1" in capsys.readouterr().err
    assert main(arguments(world, "other\udcff")) == 2
    assert re.search(r"--output is .*other.udcff', a name that is not UTF-8", capsys.readouterr().err)
    monkeypatch.setattr(memory, "_free", lambda device: 1000)
    assert main(arguments(world, "other")) == 2
    said = capsys.readouterr()
    assert "memory: weights and adapter" in said.out
    for option in ("--batch-size 2", "--gradient-accumulation-steps", "--gradient-checkpointing", "--ignore-memory"):
        assert option in said.err
    assert main(arguments(world, "other", "--ignore-memory")) in (0, None)
    assert (world / "other" / "adapter_model.safetensors").exists()
    capsys.readouterr()
    again = ["--ignore-memory", "--influence", str(world / "validation.jsonl")]
    assert main(arguments(world, "other", *again)) == 2
    assert "was trained before, without --influence" in capsys.readouterr().err
