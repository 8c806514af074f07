"""Scores of steps on the command line: a table whose steps sum to the examples' scores, and its page."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from worlds import write_model, write_rows

import influence_fast as inf
from influence_fast.cli import main
from influence_fast.errors import DataError
from influence_fast.influence.scores import ScoreTable
from influence_fast.influence.step_scores import StepTable, step_scores
from influence_fast.report.steps import SHOWN_TRACES, steps_page
from influence_fast.statistics.ranks import average_ranks


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_model(folder / "model")
    write_rows(folder / "pool.jsonl", 12, seed=1)
    rows = [
        {
            "id": f"v{a}{'r' if right else 'w'}",
            "prompt": f"what is {a} plus 1",
            "completion": f"The answer is {a + 1 + (not right)}",
            "ok": right,
        }
        for a in range(3)
        for right in (True, False)
    ]
    (folder / "validation.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    model, tokenizer = inf.load_model(str(folder / "model")), inf.load_tokenizer(str(folder / "model"))
    tokens = inf.tokenize(inf.load_examples(str(folder / "pool.jsonl")), tokenizer).examples
    config = inf.TrainConfig(epochs=4, learning_rate=5e-3, batch_size=4)
    inf.finetune(
        model, tokenizer, tokens, folder / "adapter", config=config, lora=inf.LoraSettings(r=4), progress=False
    )
    return folder


def options(world: Path) -> list[str]:
    found = ["--model", str(world / "model"), "--adapter", str(world / "adapter"), "--data", str(world / "pool.jsonl")]
    return ["score", *found, "--validation", str(world / "validation.jsonl"), "--dim", "4", "--quiet"]


@pytest.mark.parametrize("preconditioner", ["none", "cosine", "ekfac_cosine"])
def test_steps_sum_to_the_scores_of_their_examples(
    world: Path, preconditioner: str, capsys: pytest.CaptureFixture[str]
) -> None:
    output = world / f"{preconditioner}.parquet"
    asked = ["--queries", "contrast", "--verdicts", "ok", "--preconditioner", preconditioner, "--steps", "tokens"]
    assert main([*options(world), *asked, "--output", str(output)]) == 0
    said = capsys.readouterr().out
    assert f"step by step: {output}.steps.parquet" in said
    assert f"step by step: {output}.steps.html" in said
    scores, steps = ScoreTable.load(output), StepTable.load(f"{output}.steps.parquet")
    rows = steps.of_examples()
    assert list(rows) == scores.ids
    for group in ("correct", "incorrect", "contrast"):
        sums = np.array([steps[f"s_{group}"][rows[name]].sum() for name in scores.ids])
        wanted = scores[f"s_{group}"]
        # rows are stored in 8 bits
        assert np.linalg.norm(sums - wanted) < 0.01 * np.linalg.norm(wanted)
        assert np.array_equal(steps[f"rank_{group}"], average_ranks(steps[f"s_{group}"]))
        for members in rows.values():
            inside = average_ranks(steps[f"s_{group}"][members])
            assert np.array_equal(steps[f"rank_in_trace_{group}"][members], inside)
    assert np.array_equal(steps["harm"], steps["s_contrast"])
    means = [np.average(steps["loss"][rows[name]], weights=steps["tokens"][rows[name]]) for name in scores.ids]
    assert np.allclose(means, scores["loss"], rtol=1e-4)
    assert "".join(steps["text"][rows[scores.ids[0]]]).replace("<eos>", "").strip().startswith("The answer is")


def test_directions_give_the_scores_of_groups(world: Path) -> None:
    model = inf.load_finetuned(inf.load_model(str(world / "model")), world / "adapter")
    tokenizer = inf.load_tokenizer(str(world / "model"))
    tokens = inf.tokenize(inf.load_examples(str(world / "pool.jsonl")), tokenizer).examples
    spec = inf.RowSpec(dim=4, dtype="fp32")
    store = inf.build_store(world / "directions", model, tokens, spec)
    queries = inf.per_example_gradients(model, tokens[:3], projection=spec.projection())
    scorer = inf.Scorer.fit(store, preconditioner="ekfac", model=model, examples=tokens)
    groups = {"correct": [0, 2], "incorrect": [1]}
    directions = scorer.directions(queries, groups)
    table = scorer.scores(queries, groups)
    exact = inf.per_example_gradients(model, tokens).double()
    for name, direction in directions.items():
        found = (exact @ direction.double()).numpy()
        assert np.linalg.norm(found - table[f"s_{name}"]) < 1e-4 * np.linalg.norm(table[f"s_{name}"])
    applied = scorer.apply(queries)
    mean = applied[[0, 2]].mean(dim=0)
    assert float((directions["correct"] - mean).norm()) < 1e-5 * float(mean.norm())


def test_without_contrast_harm_is_wrong_less_right(world: Path) -> None:
    model = inf.load_finetuned(inf.load_model(str(world / "model")), world / "adapter")
    tokenizer = inf.load_tokenizer(str(world / "model"))
    tokens = inf.tokenize(inf.load_examples(str(world / "pool.jsonl")), tokenizer).examples
    width = inf.per_example_gradients(model, tokens[:1]).shape[1]
    directions = {
        name: torch.randn(width, generator=torch.Generator().manual_seed(i))
        for i, name in enumerate(("correct", "incorrect"))
    }
    lengths = np.linspace(0, 2, len(tokens))
    table = step_scores(model, tokens, directions, steps="tokens", tokenizer=None, lengths=lengths, progress=False)
    assert np.allclose(table["harm"], table["s_incorrect"] - table["s_correct"])
    assert (table["harm"][table.of_examples()[tokens[0]["id"]]] == 0).all()  # a row without length scores 0
    alone = step_scores(
        model, tokens, {"correct": directions["correct"]}, steps="tokens", tokenizer=None, progress=False
    )
    assert np.allclose(alone["harm"], -alone["s_correct"])


def test_tables_of_steps_are_read_again(tmp_path: Path) -> None:
    text = ['a, "b"\n', "\n", "null", ""]
    columns = {
        "step": np.array([0, 1, 0, 1]), "start": np.array([0, 7, 0, 4]), "end": np.array([7, 8, 4, 4]),
        "tokens": np.array([3, 1, 1, 1]), "harm": np.array([0.25, -1e-30, 3.0, 0.0]),
    }  # fmt: skip
    table = StepTable(["007", "007", "nan", "nan"], text, columns)
    for suffix in (".csv", ".parquet"):
        table.save(tmp_path / f"t{suffix}")
        found = StepTable.load(tmp_path / f"t{suffix}")
        assert (found.ids, found.text) == (table.ids, table.text)
        assert all(np.array_equal(found[name], columns[name]) for name in columns)
    assert list(table.of_examples()["nan"]) == [2, 3]
    with pytest.raises(DataError, match="no column 'rank'"):
        table["rank"]


@pytest.mark.parametrize(
    ("content", "named"),
    [("id,step\n1,2\n", "no column 'text'"), ("", "no table of steps"), ('{"a": 1}\n', "no column 'id'")],
)
def test_other_files_are_no_tables_of_steps(tmp_path: Path, content: str, named: str) -> None:
    (tmp_path / "t.csv").write_text(content)
    with pytest.raises(DataError, match=named):
        StepTable.load(tmp_path / "t.csv")
    with pytest.raises(DataError, match="no such table of steps"):
        StepTable.load(tmp_path / "none.csv")


def test_the_page_shows_the_worst_traces_first_and_escapes_texts() -> None:
    count = SHOWN_TRACES + 5
    ids = [f"t{i}" for i in range(count) for _ in range(2)]
    harm = np.array([value for i in range(count) for value in (float(i), -1.0)])
    plain = np.zeros(2 * count)
    columns = {"step": np.tile([0, 1], count), "start": plain, "end": plain, "tokens": plain + 1, "loss": plain + 0.5}
    columns |= {"s_correct": -harm, "harm": harm}
    table = StepTable(ids, ["<script>x</script>\n", "fine"] * count, columns)
    pool = [inf.Example(f"t{i}", "why <b>?", "", label="wrong" if i == 3 else None) for i in range(count)]
    page = steps_page(table, pool, title="Mine")
    assert "Mine: step by step" in page
    assert "<script>" not in page
    assert "&lt;script&gt;x&lt;/script&gt;" in page
    assert page.index(f"<code>t{count - 1}</code></h4>") < page.index(f"<code>t{count - 2}</code></h4>")
    assert "<code>t4</code></h4>" not in page  # the least harmful are left to the table
    assert f"The {SHOWN_TRACES} whose worst step harms most" in page
    assert "minus its influence on right answers" in page


def test_steps_that_cannot_be_scored_are_named(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--queries", "reference", "--output", str(world / "x.csv")]
    assert main([*options(world), *more, "--steps", "words"]) == 2
    error = capsys.readouterr().err
    assert "--steps" in error
    assert "lines" in error
    assert not (world / "x.csv").exists()
    given = options(world)
    del given[3:5]  # the adapter
    assert main([*given, *more, "--steps", "lines", "--target", "q_proj"]) == 2
    assert "--steps" in capsys.readouterr().err
