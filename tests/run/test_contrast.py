"""Runs and scores by contrast queries: answers that the data holds, and own answers sampled several times."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from worlds import write_model, write_rows

from influence_fast.cli import main
from influence_fast.config import load_config
from influence_fast.errors import ConfigError
from influence_fast.influence.scores import ScoreTable
from influence_fast.run import pipeline
from influence_fast.statistics.ranks import average_ranks


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_model(folder / "model")
    for name, n in (("pool", 24), ("test", 6)):
        write_rows(folder / f"{name}.jsonl", n, seed=n)
    rows = [
        {
            "id": f"v{a}{b}{'r' if right else 'w'}",
            "prompt": f"what is {a} plus {b}",
            "completion": f"The answer is {a + b + (not right)}",
            "answer": str(a + b),
            "ok": right,
        }
        for a in range(3)
        for b in range(2)
        for right in (True, False)
        if (a, b, right) != (2, 1, False)  # one question has a right answer alone
    ]
    (folder / "validation.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return folder


def settings(world: Path, name: str, **influence: Any) -> Path:
    path = world / f"{name}.yaml"
    found = {
        "output": str(world / name),
        "model": {"path": "model"},
        "data": {"pool": "pool.jsonl", "validation": "validation.jsonl", "test": "test.jsonl"},
        "training": {"epochs": 8, "learning_rate": 5e-3, "batch_size": 8},
        "lora": {"r": 4, "alpha": 8},
        "gradients": {"dim": 4},
        "influence": {"preconditioner": "cosine", "queries": "contrast", "explain": 0, **influence},
        "pruning": {"strategies": ["contrast", "contrast_loss"], "fractions": [0.25]},
        "evaluation": {"max_new_tokens": 6},
    }
    path.write_text(yaml.safe_dump(found))
    return path


def test_a_run_contrasts_the_answers_of_the_data(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = settings(world, "given", verdicts="ok")
    results = pipeline.run(load_config(config), progress=False)
    assert [cell["strategy"] for cell in results["cells"]] == ["full", "contrast", "contrast_loss"]
    assert results["queries"] == {"correct": 6, "incorrect": 5}
    assert "5 validation questions are contrasted; of the others 1 have right answers alone" in str(results["warnings"])
    assert not (world / "given" / "own_answers.json").exists()  # nobody was asked
    table = ScoreTable.load(world / "given" / "scores.parquet")
    # every question has one answer a side but one, so that the contrast is nearly the difference of the means
    assert np.corrcoef(table["s_contrast"], table["s_incorrect"] - table["s_correct"])[0, 1] > 0.9
    assert np.array_equal(table["rank_contrast"], average_ranks(table["s_contrast"]))
    assert np.isfinite(table["base_loss"]).all()
    dropped = {c["strategy"]: c["dropped"] for c in results["cells"]}
    assert dropped == {"full": 0, "contrast": 6, "contrast_loss": 6}
    assert "contrast_loss" in (world / "given" / "report.html").read_text()
    again = pipeline.run(load_config(config), progress=False)
    assert again["cells"] == results["cells"]
    assert main(["run", str(settings(world, "given", verdicts="answer"))]) == 2
    assert "influence.verdicts" in capsys.readouterr().err


def test_a_run_samples_answers_of_both_kinds(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(model: Any, tokenizer: Any, validation: Any, how: Any, *_: Any, **__: Any) -> list[dict[str, Any]]:
        assert (how.samples, how.temperature, how.generation) == (3, 0.9, "explicit")
        return [
            {"id": e.id, "generation": f"The answer is {text}", "token_ids": [], "correct": right, "ended": True}
            for e in validation
            for text, right in ((e.answer, True), ("7", False), ("8", False))
        ][:-11]

    monkeypatch.setattr(pipeline, "own_answers", answer)
    config = settings(world, "sampled", samples=3, temperature=0.9)
    found = yaml.safe_load(config.read_text())
    found["training"]["epochs"] = 1
    found["pruning"]["strategies"] = ["contrast"]
    config.write_text(yaml.safe_dump(found))
    results = pipeline.run(load_config(config), progress=False)
    assert results["queries"] == {"correct": 8, "incorrect": 14}
    assert "7 validation questions are contrasted; of the others 1 have" in str(results["warnings"])
    assert {"s_correct", "s_incorrect", "s_contrast"} <= set(ScoreTable.load(world / "sampled" / "scores.csv").columns)


def test_strategies_of_contrast_want_contrast_queries(world: Path) -> None:
    with pytest.raises(ConfigError) as raised:
        load_config(settings(world, "plain", queries="own_answers"))
    assert "pruning.strategies: 'contrast' reads right and wrong answers" in str(raised.value)
    assert "influence.queries: contrast" in str(raised.value)


def test_scores_are_contrasted_on_the_command_line(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = next((world / "given" / "adapters").glob("full*"))
    options = ["--model", str(world / "model"), "--adapter", str(adapter), "--data", str(world / "pool.jsonl")]
    options += ["--validation", str(world / "validation.jsonl"), "--preconditioner", "cosine", "--dim", "4"]
    table = world / "s.csv"
    asked = ["--queries", "contrast", "--verdicts", "ok", "--strategies", "contrast_loss"]
    assert main(["score", *options, *asked, "--output", str(table)]) == 0
    assert "5 contrasted questions" in capsys.readouterr().out
    found = ScoreTable.load(table)
    assert {"s_contrast", "base_loss"} <= set(found.columns)
    kept = ["--data", str(world / "pool.jsonl"), "--scores", str(table), "--fraction", "0.25"]
    assert main(["prune", *kept, "--strategy", "contrast", "--output", str(world / "kept.jsonl")]) == 0
    order = [found.ids[i] for i in np.argsort(-found["s_contrast"])]
    lines = (world / "kept.jsonl").read_text().splitlines()
    assert {json.loads(line)["id"] for line in lines} == set(order[6:])
    capsys.readouterr()
    assert main(["score", *options, "--verdicts", "ok", "--output", str(world / "t.csv")]) == 2
    assert "--verdicts is read by --queries contrast alone" in capsys.readouterr().err
    assert main(["score", *options, "--strategies", "contrast", "--output", str(world / "t.csv")]) == 2
    assert "set --queries contrast, or leave the strategy out" in capsys.readouterr().err
