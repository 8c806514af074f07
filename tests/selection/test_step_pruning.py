"""Cutting steps out of traces: which go, and what the source's rows are afterwards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import influence_fast as inf
from influence_fast.cli import main
from influence_fast.errors import ConfigError, DataError
from influence_fast.influence.step_scores import StepTable
from influence_fast.selection.step_pruning import select_steps, without_steps

TEXTS = {"a": ["1+1=2\n", "2+2=5\n", "So 5"], "b": ["Fine\n", "Done"], "c": ["alone"]}


def table(harm: list[float] | None = None, texts: dict[str, list[str]] | None = None) -> StepTable:
    texts = texts or TEXTS
    steps = [(name, number, text) for name, parts in texts.items() for number, text in enumerate(parts)]
    starts = [sum(map(len, texts[name][:number])) for name, number, _ in steps]
    # the last step of a trace goes on with the end of its turn
    said = [text + "<eos>" * (number == len(texts[name]) - 1) for name, number, text in steps]
    columns = {
        "step": np.array([number for _, number, _ in steps]),
        "start": np.array(starts),
        "end": np.array([start + len(text) for start, text in zip(starts, said, strict=True)]),
        "tokens": np.array([len(text) for _, _, text in steps]),
        "harm": np.array(harm if harm is not None else [0.1, 0.9, 0.5, -1.0, 0.0, 0.8]),
    }
    return StepTable([name for name, _, _ in steps], said, columns)


def test_steps_go_in_order_until_their_tokens_are_the_share() -> None:
    steps = table()
    assert select_steps(steps, count=2).drop.tolist() == [1, 5]
    tokens = steps["tokens"]
    for fraction in (0.0, 0.1, 0.3, 0.6):
        found = select_steps(steps, fraction=fraction)
        order = np.argsort(-steps["harm"], kind="stable")
        sums = np.concatenate([[0], np.cumsum(tokens[order])])
        assert abs(found.dropped_tokens - fraction * tokens.sum()) == np.abs(sums - fraction * sums[-1]).min()
        assert sorted(order[: len(found.drop)].tolist()) == found.drop.tolist()
        assert found.tokens == tokens.sum()
        assert sorted([*found.keep, *found.drop]) == list(range(len(steps)))
    ties = table([0.0] * 6)
    assert {tuple(select_steps(ties, count=3, seed=seed).drop) for seed in range(20)} != {(0, 1, 2)}
    with pytest.raises(ConfigError, match="would leave none"):
        select_steps(steps, fraction=1.0)
    with pytest.raises(ConfigError, match="either a fraction"):
        select_steps(steps)
    with pytest.raises(ConfigError, match="between 0 and 1"):
        select_steps(steps, fraction=float("nan"))
    with pytest.raises(DataError, match="NaN"):
        select_steps(table([np.nan] * 6), count=1)
    with pytest.raises(DataError, match="no column 'luck'"):
        select_steps(steps, count=1, by="luck")


def test_texts_lose_the_steps_and_nothing_else() -> None:
    examples = [inf.Example(name, "?", "".join(parts)) for name, parts in TEXTS.items()]
    steps = table()
    found = without_steps(examples, steps, select_steps(steps, count=2))
    assert found.keys() == {"a", "c"}
    assert found["a"] is not None
    assert found["a"].completion == "1+1=2\nSo 5"
    assert found["c"] is None
    last = without_steps(examples, steps, select_steps(table([0, 0, 1, 0, 0, 0]), count=1))
    assert last["a"] is not None
    assert last["a"].completion == "1+1=2\n2+2=5"
    with pytest.raises(DataError, match="not those of its text"):
        without_steps([inf.Example("a", "?", "other"), *examples[1:]], steps, select_steps(steps, count=1))
    with pytest.raises(DataError, match="ids that the data does not"):
        without_steps(examples[1:], steps, select_steps(steps, count=1))


ROWS: dict[str, list[dict[str, Any]]] = {
    "columns": [{"id": n, "prompt": "?", "completion": "".join(parts), "source": 7} for n, parts in TEXTS.items()],
    "messages": [
        {"id": n, "messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "".join(parts)}]}
        for n, parts in TEXTS.items()
    ],
}


@pytest.mark.parametrize("schema", list(ROWS))
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_rows_keep_their_schema(tmp_path: Path, schema: str, suffix: str, capsys: pytest.CaptureFixture[str]) -> None:
    data, output = tmp_path / f"d.{suffix}", tmp_path / f"kept.{suffix}"
    from influence_fast.data.row_files import write_rows

    write_rows(ROWS[schema], data)
    table().save(tmp_path / "steps.csv")
    steps = ["--steps", str(tmp_path / "steps.csv")]
    asked = ["prune", "--data", str(data), *steps, "--output", str(output)]
    assert main([*asked, "--count", "2"]) == 0
    assert "cut 2 of 6 steps" in capsys.readouterr().out
    rows = list(inf.load_examples(str(output)))
    assert [(e.id, e.completion) for e in rows] == [("a", "1+1=2\nSo 5"), ("b", "Fine\nDone")]
    if suffix == "jsonl":
        first = json.loads(output.read_text().splitlines()[0])
        assert set(first) == set(ROWS[schema][0])
    assert main([*asked, "--fraction", "0.2", "--strategy", "combined"]) == 2
    assert "--strategy is of whole examples" in capsys.readouterr().err
    assert main(["prune", "--data", str(data), "--count", "1", "--output", str(output)]) == 2
    assert "give --scores and --strategy, or --steps" in capsys.readouterr().err


def test_traces_of_one_row_are_cut_apart(tmp_path: Path) -> None:
    texts = {"r#0": ["One\n", "Two"], "r#1": ["Three\n", "Four"]}
    row = {"id": "r", "problem": "?", "generations": ["".join(parts) for parts in texts.values()]}
    row |= {"correctness_math_verify": [True, False], "messages": [{"role": "assistant", "content": "One\nTwo"}]}
    (tmp_path / "d.jsonl").write_text(json.dumps(row) + "\n")
    table([1.0, 0.0, 2.0, 3.0], texts).save(tmp_path / "steps.parquet")
    asked = ["prune", "--data", str(tmp_path / "d.jsonl"), "--trace", "all", "--steps", str(tmp_path / "steps.parquet")]
    assert main([*asked, "--count", "3", "--output", str(tmp_path / "k.jsonl")]) == 0
    found = json.loads((tmp_path / "k.jsonl").read_text())
    assert found["generations"] == ["Two"]
    assert found["correctness_math_verify"] == [True]
    assert found["messages"][-1]["content"] == "Two"


def test_a_completion_in_several_columns_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"id": "a", "prompt": "?", "reasoning": "1+1=2\n2+2=5", "completion": "So 5"}
    (tmp_path / "d.jsonl").write_text(json.dumps(row) + "\n")
    options = ["--columns", "reasoning=reasoning"]
    (example,) = inf.load_examples(str(tmp_path / "d.jsonl"), columns={"reasoning": "reasoning"})
    table([1.0, 0.0], {"a": [example.completion[:8], example.completion[8:]]}).save(tmp_path / "s.csv")
    asked = ["prune", "--data", str(tmp_path / "d.jsonl"), *options, "--steps", str(tmp_path / "s.csv")]
    assert main([*asked, "--count", "1", "--output", str(tmp_path / "k.jsonl")]) == 2
    assert "no column holds the completion as a whole" in capsys.readouterr().err
    assert not (tmp_path / "k.jsonl").exists()
