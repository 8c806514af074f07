"""Grading: extraction, equality, and survival of answers that are out to break it."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest

from influence_fast.grading import Grade, equal_answers, extract_answer, grade, normalise

MATH500 = Path(__file__).parents[2] / "shared" / "data" / "math500.jsonl"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"so \boxed{42}.", "42"),
        (r"\boxed{1} then \boxed{\frac{1}{\sqrt{2}}} done", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\fbox{7}", "7"),
        (r"\boxed 5.", "5"),
        (r"\boxed{3} and then \boxed{unclosed", "3"),
        ("4+5=9\n#### 9", "9"),
        ("#### 1,234\n", "1,234"),
        ("5+7=12\nThe answer is 12.", "12"),
        ("The answer is 3.5. So we stop.", "3.5"),
        ("The answer is $\\frac{1}{2}$.", r"\frac{1}{2}"),
        ("**Final Answer: 8**", "8"),
        ("The answer is 1.\nNo, the answer is 2.", "2"),
        (r"#### 3 but \boxed{4}", "4"),
        ("nothing of the kind 17", None),
        ("", None),
    ],
)
def test_extracts_the_stated_answer(text: str, expected: str | None) -> None:
    assert extract_answer(text) == expected


def test_last_number_is_taken_only_when_asked_for() -> None:
    text = "we get 3 and then -17.5 pens"
    assert extract_answer(text) is None
    assert extract_answer(text, last_number=True) == "-17.5"
    assert extract_answer(r"\boxed{3} of 5", last_number=True) == "3"
    assert extract_answer("none at all", last_number=True) is None


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("12", "12."),
        ("1,234", "1234"),
        ("0.50", r"\frac12"),
        ("-3/6", r"-\frac{1}{2}"),
        (r"\dfrac{2}{3}", r"\frac{2}{3}"),
        (r"\text{Evelyn}", "Evelyn"),
        ("x = 5", "5"),
        (r"\{1,2\}", r"\{2,1\}"),
        (r"2\sqrt{3}", r"\sqrt{12}"),
        (r"(x+1)^2", r"x^2+2x+1"),
    ],
)
def test_equal_answers_are_equal(answer: str, gold: str) -> None:
    assert equal_answers(answer, gold)[0]


@pytest.mark.parametrize(
    ("answer", "gold"),
    [("12", "21"), ("0.5", "0.49"), ("(1,2)", "(2,1)"), (r"\sqrt{3}", r"\sqrt{2}"), ("1e5", "7"), ("Evelyn", "Eve")],
)
def test_different_answers_are_different(answer: str, gold: str) -> None:
    assert not equal_answers(answer, gold)[0]


def test_plain_answers_need_no_worker() -> None:
    assert grade("The answer is 12.", "12") == Grade(True, "12", "same text")
    assert grade("The answer is 13.", "12") == Grade(False, "13", "compared as numbers")
    assert grade("who knows", "12") == Grade(False, None, "no answer found")


def test_normalise_keeps_what_differs() -> None:
    assert normalise(r" \left( 3, \frac{\pi}{2} \right) ") == r"(3,\frac{\pi}{2})"
    assert normalise("1 2") == "12"
    assert normalise("a") != normalise("A")


HOSTILE = [
    "",
    "{{{{{{",
    "}}}}\\boxed{",
    r"\boxed{" * 5000,
    r"\boxed{" + "{" * 5000 + "}" * 4999,
    r"\boxed{" + "9" * 1900 + "}",
    r"\boxed{\frac{1}{0}}",
    r"\boxed{\left( \right. \frac{}{}}",
    "\\boxed{" + "x" * 1_000_000 + "}",
    "#### " + "9" * 1_000_000,
    "The answer is " * 70_000,
    "a" * 1_000_000,
    "\\" * 100_000,
    "\x00\ud800 \\boxed{\x00}",
    "\\boxed{__import__('os').system('exit 1')}",
    "```python\nwhile True: pass\n```\nThe answer is `f(x)`.",
    r"\boxed{\int_0^\infty \sin(x^x) dx}",
    r"\boxed{\infty - \infty}",
]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_text_is_graded_wrong_and_in_time(text: str) -> None:
    start = time.monotonic()
    verdict = grade(text, r"\frac{\pi}{7}", timeout=2.0)
    assert not verdict.correct
    assert time.monotonic() - start < 150  # starting the worker on a busy machine included


@pytest.mark.parametrize("answer", ["9^{9^{9^{9}}}", "9^9^9^9", "10^{10^{10}}", "(x+1)^{300000}", "(((((10!)!)!)!)!)"])
def test_the_worker_outlives_runaway_answers(answer: str) -> None:
    assert not equal_answers(answer, "7", timeout=1.0)[0]
    assert equal_answers(r"\sqrt{8}", r"2\sqrt{2}", timeout=30.0)[0]  # the next item is served as ever


def test_grading_works_off_the_main_thread_and_from_several_at_once() -> None:
    found: list[bool] = []
    pairs = [(r"\sqrt{8}", r"2\sqrt{2}"), (r"\sqrt{8}", r"3\sqrt{2}")] * 4
    threads = [
        threading.Thread(target=lambda a=a, b=b: found.append(equal_answers(a, b, timeout=30.0)[0])) for a, b in pairs
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == [False] * 4 + [True] * 4


@pytest.mark.skipif(not MATH500.exists(), reason=f"needs {MATH500.name} beside the repository")
def test_reference_solutions_agree_with_their_own_answers() -> None:
    rows = [json.loads(line) for line in MATH500.read_text(encoding="utf-8").splitlines()]
    right = sum(grade(row["solution"], row["answer"]).correct for row in rows)
    assert right / len(rows) >= 0.99
    # and each is told apart from its neighbour's, save for equal answers
    rolled = [(row["solution"], other["answer"]) for row, other in zip(rows, rows[1:] + rows[:1], strict=True)]
    assert sum(grade(text, gold).correct for text, gold in rolled) / len(rows) < 0.05
