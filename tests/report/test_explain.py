"""Answer by answer: the right examples in the right lists, and a page that holds any text."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from influence_fast.data.examples import Example
from influence_fast.influence.queries import Queries, make_queries, with_tasks
from influence_fast.influence.scorer import TopInfluences
from influence_fast.report.explain import explanations, save_explanations

IDS = ["a", "b", "c", "d"]
MATRIX = np.array([[3.0, -1.0], [-2.0, 0.0], [1.0, 5.0], [-4.0, -0.5]], np.float32)  # [N, Q]


def top_of(matrix: np.ndarray, k: int) -> TopInfluences:
    order = np.argsort(-matrix.T, axis=1, kind="stable")
    lists = order[:, :k], order[:, ::-1][:, :k]
    raising, lowering = ((np.take_along_axis(matrix.T, rows, axis=1), rows) for rows in lists)
    return TopInfluences(raising, lowering)


@pytest.fixture
def queries() -> Queries:
    asked = [Example("q0", "2 + 2?", "It is 5.", "4"), Example("q1", "1 + 1?", "It is 2.", "2")]
    return Queries(asked, {"correct": [1], "incorrect": [0], "GSM8K": [1]}, [])


@pytest.fixture
def pool() -> dict[str, Example]:
    labels = {"a": "wrong_step", "b": "clean", "c": "wrong_step", "d": None}
    return {name: Example(name, f"prompt of {name}", f"completion of {name}", label=labels[name]) for name in IDS}


def test_each_answer_has_what_raised_and_what_lowered_it(queries: Queries) -> None:
    first, second = explanations(top_of(MATRIX, 3), IDS, queries)
    assert (first["id"], first["groups"], first["answer"]) == ("q0", ["incorrect"], "It is 5.")
    assert first["raising"] == [{"id": "a", "influence": 3.0}, {"id": "c", "influence": 1.0}]
    assert first["lowering"] == [{"id": "d", "influence": -4.0}, {"id": "b", "influence": -2.0}]
    assert second["groups"] == ["correct", "GSM8K"]
    assert [one["id"] for one in second["raising"]] == ["c"]  # not b, which does nothing
    assert [one["id"] for one in second["lowering"]] == ["a", "d"]


def test_an_answer_of_no_group_is_left_out(queries: Queries) -> None:
    only = Queries(queries.examples, {"correct": [1]}, [])
    assert [one["id"] for one in explanations(top_of(MATRIX, 2), IDS, only)] == ["q1"]


def test_files_hold_what_was_found(tmp_path: Path, queries: Queries, pool: dict[str, Example]) -> None:
    found = explanations(top_of(MATRIX, 2), IDS, queries)
    lines, page = save_explanations(found, pool, tmp_path / "x", title="A title")
    assert [json.loads(line) for line in lines.read_text().splitlines()] == found
    html = page.read_text()
    assert html.index("<h2>Incorrect answers") < html.index("<h2>Correct answers") < html.index("<h2>GSM8K answers")
    for text in (
        "A title: answer by answer",
        "It is 5.",
        "prompt of d",
        "completion of c",
        "<b>+3</b>",
        "<b>\u22124</b>",
    ):
        assert text in html, text
    wrong = html[html.index("<h2>Incorrect answers") : html.index("<h2>Correct answers")]
    rows = [line for line in wrong.splitlines() if line.startswith('<tr><th scope="row"><span class="chip">')]
    assert [re.findall(r">([^<>\u00a0]+)[<\u00a0]", row) for row in rows] == [
        ["wrong_step", "100.0", "0.0", "50.0"],
        ["clean", "0.0", "50.0", "25.0"],
        ["none", "0.0", "50.0", "25.0"],
    ]
    assert html.count('<article class="trace" id="e') == len(pool)  # each named example once
    for place in range(len(pool)):
        assert f'href="#e{place}"' in html


def test_texts_cannot_break_the_page(tmp_path: Path, queries: Queries, pool: dict[str, Example]) -> None:
    evil = "</pre><script>alert(1)</script>" + "x" * 10_000 + "\ud800"
    pool = {name: Example(evil if name == "a" else name, evil, evil) for name in IDS}
    _, page = save_explanations(explanations(top_of(MATRIX, 2), IDS, queries), pool, tmp_path / "x")
    html = page.read_text()
    assert "<script" not in html
    assert "further characters are left out" in html
    assert "Known labels" not in html  # none has one


def test_examples_that_are_named_often_are_counted(tmp_path: Path, queries: Queries, pool: dict[str, Example]) -> None:
    both = Queries(queries.examples, {"correct": [0, 1]}, [])
    _, page = save_explanations(explanations(top_of(MATRIX, 2), IDS, both), pool, tmp_path / "x")
    table = page.read_text().split("<tbody>")[2].split("</tbody>")[0]
    rows = [row for row in table.split("<tr>") if "<code>" in row]
    assert [("<code>a" in r, "<code>c" in r, "<code>d" in r) for r in rows] == [
        (True, False, False),
        (False, True, False),
        (False, False, True),
    ]
    assert rows[1].count('<td class="n">2</td>') == rows[1].count('<td class="n">0</td>') == 1


def test_reference_solutions_are_not_shown_as_the_models_answers(
    tmp_path: Path, queries: Queries, pool: dict[str, Example]
) -> None:
    validation = [Example(f"v{i}", "2 + 2?", "4", row=i) for i in range(2)]
    asked = with_tasks(make_queries(validation, None, None), ["GSM8K", "GSM8K"])
    assert asked.sizes == "2 reference solutions, 2 reference solutions of GSM8K"
    found = explanations(top_of(MATRIX, 2), IDS, asked)
    assert [one["reference"] for one in found] == [True, True]
    html = save_explanations(found, pool, tmp_path / "x")[1].read_text()
    for heading in ("Answer by answer", "Reference solutions", "GSM8K reference solutions"):
        assert re.search(rf"<h[12]>{heading}</h[12]>", html), heading
    assert "answer by answer" not in html.lower().replace("answer by answer", "", 2)  # <title> and <h1>
    assert "The answers are the reference solutions, which the model did not write." in html
    assert "orrect answers" not in html
    assert '<p class="what">answer</p>' not in html
    # where the model got nothing right, the solutions stand in for one group alone
    wrong = [{"id": "v0", "generation": "5", "correct": False}]
    mixed = make_queries(validation[:1], wrong, "reference", needed=("correct",))
    assert mixed.sizes == "1 reference solutions, 1 incorrect answers"
    html = save_explanations(explanations(top_of(MATRIX, 2), IDS, mixed), pool, tmp_path / "y")[1].read_text()
    assert "<h2>Incorrect answers</h2>" in html
    assert "<h2>Reference solutions</h2>" in html
    assert "Some answers are reference solutions, which" in html


def test_no_answers_make_an_empty_page(tmp_path: Path, pool: dict[str, Any]) -> None:
    lines, page = save_explanations([], pool, tmp_path / "x")
    assert lines.read_text() == ""
    assert "Answer by answer" in page.read_text()
