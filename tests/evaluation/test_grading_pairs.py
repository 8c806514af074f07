"""Verdicts on pairs of answers, right both ways: equal ones are equal, different ones differ, in either order."""

from __future__ import annotations

from pathlib import Path

import pytest

from influence_fast.evaluation.answer_text import clean, normalise
from influence_fast.evaluation.grading import equal_answers, grade

# It depends on a clock or on other processes: a failure is run once more and listed (RERUN).
pytestmark = pytest.mark.flaky(reruns=1)

TABLE = Path(__file__).with_name("pairs.tsv")
PAIRS = [
    line.split("\t")
    for line in TABLE.read_text(encoding="utf-8").splitlines()
    if line and not line.startswith("# ")  # a heading
]


def test_the_table_has_both_verdicts_and_no_pair_twice() -> None:
    assert len(PAIRS) >= 250
    assert {verdict for _, _, verdict in PAIRS} == {"equal", "different"}
    assert len({(answer, gold) for answer, gold, _ in PAIRS}) == len(PAIRS)


@pytest.mark.parametrize(("answer", "gold", "verdict"), PAIRS)
def test_pairs_are_told_apart_in_either_order(answer: str, gold: str, verdict: str) -> None:
    found = [equal_answers(answer, gold, timeout=60.0), equal_answers(gold, answer, timeout=60.0)]
    assert [equal for equal, _ in found] == [verdict == "equal"] * 2, found


@pytest.mark.parametrize("answer", sorted({answer for pair in PAIRS for answer in pair[:2]}))
def test_every_answer_equals_itself_behind_markup(answer: str) -> None:
    assert equal_answers(answer, answer) == (True, "same text")
    assert equal_answers(f" {answer} ", answer, timeout=60.0)[0]
    assert clean(clean(answer)) == clean(answer)


def test_normalise_keeps_what_differs() -> None:
    assert normalise(r" \left( 3, \frac{\pi}{2} \right) ") == r"(3,\frac{\pi}{2})"
    assert normalise("1 2") == "1 2"
    assert normalise("1 000") == normalise("1{,}000") == "1000"
    assert normalise(r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}") != normalise(r"\begin{pmatrix} 1 \ 2 \end{pmatrix}")
    assert normalise("a") != normalise("A")


@pytest.mark.parametrize(
    ("text", "gold", "correct"),
    [
        (r"\boxed{3} and \boxed{7}", "3, 7", True),
        (r"\boxed{3} and \boxed{7}", "7", False),
        (r"\boxed{15\frac{39}{40}} or $\boxed{\frac{639}{40}}$", r"\frac{639}{40}", True),
        ("**Final Answer**\n\n73", "73", True),
        ("### Answer\n73", "74", False),
        ("#### 18 dollars", "18", True),
        ("#### 18 dollars", "19", False),
        ("The answer is approximately 3.14", "3.14", True),
        (r"\boxed{a = 5}, which is option D. Answer: D", "D", True),
        (r"\boxed{a = 5}, which is option D. Answer: D", r"\text{(D)}", True),
        (r"\boxed{a = 5}, which is option D. Answer: D", "A", False),
        (r"\boxed{\text{(C)}\ 42}", r"\text{(C)}", True),
        (r"\boxed{C}", r"\text{(C)}", True),
        (r"\boxed{D}", r"\text{(C)}", False),
        ("so 5 km\nA: 18", "18", True),
        ("so 5 km\nA: 18", "5", False),
    ],
)
def test_texts_are_graded_by_the_answer_they_state(text: str, gold: str, correct: bool) -> None:
    assert grade(text, gold, timeout=60.0).correct == correct
