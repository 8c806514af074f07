"""The examples run, with at most ten added lines each, and their scores are products of exact rows."""

from __future__ import annotations

import ast
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

import influence_fast as inf

EXAMPLES = Path(__file__).parents[2] / "examples"
NAMES = ["dpo", "hf_dataset", "padded_dataloader", "sft_trainer", "training_loop"]
MARK = "# added"


def test_every_example_is_listed() -> None:
    assert sorted(path.stem for path in EXAMPLES.glob("*.py") if path.stem != "tiny") == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_an_example_adds_at_most_ten_lines_to_an_ordinary_script(name: str) -> None:
    lines = (EXAMPLES / f"{name}.py").read_text().splitlines()
    added = [line for line in lines if line.endswith(MARK)]
    ordinary = "\n".join(line for line in lines if not line.endswith(MARK))
    assert 1 <= len(added) <= 10
    assert "influence_fast" not in ordinary
    assert " inf." not in ordinary
    ast.parse(ordinary)


@pytest.mark.parametrize("name", NAMES)
def test_an_example_runs_and_scores(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    done: dict[str, Any] = runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert capsys.readouterr().out
    scores, model = done["scores"], done["model"]
    if name == "dpo":
        pairs = done["pairs"]
        rows = inf.per_example_gradients(model, pairs, loss_reduction="sum")
        wanted = (rows[0::2] + rows[1::2]) @ done["rows"].mean(0)
    else:
        held = done["train"].remove_columns("influence") if name == "hf_dataset" else done["train"]
        wanted = inf.per_example_gradients(model, held) @ inf.per_example_gradients(model, done["validation"]).mean(0)
    if name == "training_loop":
        assert sorted(scores) == [1, 3]
        scores = scores[3]
    if name == "sft_trainer":
        assert sorted(done["callback"].scores) == [2, 3]
        last = torch.from_numpy(done["callback"].scores[3]["s_validation"])
        assert (last - scores[:, 0].double()).norm() < 1e-5 * last.norm()
        scores = scores[:, 0]
    assert (scores - wanted).norm() < 1e-4 * wanted.norm()
    assert wanted.norm() > 0
