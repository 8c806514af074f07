r"""Answers in forms of writing that change their look and not what they say, and dates, which are no arithmetic."""

from __future__ import annotations

import pytest

from influence_fast.evaluation.grading import equal_answers, grade

EQUAL = [
    ("1.234.567", "1234567"),
    ("1_234_567", "1234567"),
    ("12,34,567", "1234567"),
    (r"\color{red}{7}", "7"),
    (r"\textcolor{blue}{7}", "7"),
    ("negative 5", "-5"),
    (r"\text{negative } 5", "-5"),
    ("March 5", "5 March"),
    ("Jan 5, 2020", "2020-01-05"),
]
DIFFERENT = [
    ("2020-06-05", "2009"),
    ("5/6/2020", r"\frac{5}{12120}"),
    ("March 5", "March 6"),
    ("June 5, 2020", "June 5, 2021"),
    ("negative 5", "5"),
    ("12,34,567", "12"),
]


@pytest.mark.parametrize(("answer", "gold"), EQUAL)
def test_the_same_answer_written_otherwise_is_equal(answer: str, gold: str) -> None:
    assert equal_answers(answer, gold)[0]


@pytest.mark.parametrize(("answer", "gold"), DIFFERENT)
def test_another_date_or_number_is_not_equal(answer: str, gold: str) -> None:
    assert not equal_answers(answer, gold)[0]


@pytest.mark.parametrize(
    ("text", "extracted", "kind"),
    [
        ("Therefore, the answer is:\n\\[\n\\frac{3}{4}\n\\]", r"\frac{3}{4}", "math"),
        ("The answer is\n$$12$$", "12", "math"),
        ("the result is 1.5e3", "1.5e3", "last_number"),
        ("from 3-5", "5", "last_number"),
        ("it is -5", "-5", "last_number"),
    ],
)
def test_answers_are_found_on_the_next_line_and_in_ranges(text: str, extracted: str, kind: str) -> None:
    assert grade(text, extracted, kind=kind).extracted == extracted
