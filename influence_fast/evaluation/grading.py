"""Grade a model's text against the reference: find the answer it states and compare the two.

Equal texts, numbers, and all that exact arithmetic decides are compared here; what needs sympy or math-verify goes to
the grading worker. The conventions are in `comparison`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from influence_fast.evaluation.answer_text import MAX_ANSWER, normalise
from influence_fast.evaluation.comparison import Exact, Undecided, equal_values
from influence_fast.evaluation.extraction import choice_letter, extract_answer, extract_choice, stated_choice
from influence_fast.evaluation.readings import readings
from influence_fast.evaluation.spelled_forms import spelled
from influence_fast.evaluation.worker import WORKER

__all__ = [
    "ANSWER_KINDS",
    "Grade",
    "choice_letter",
    "equal_answers",
    "extract_answer",
    "extract_choice",
    "grade",
    "normalise",
]

ANSWER_KINDS = ("math", "last_number", "choice")


@dataclass(frozen=True, slots=True)
class Grade:
    """The grade of an answer.

    `extracted` is the answer found in the text (None: there is none); `note` says how it was compared.
    """

    correct: bool
    extracted: str | None
    note: str


def grade(text: str, gold: str, *, timeout: float = 5.0, kind: str = "math") -> Grade:
    """Grade whether `text` comes to the answer `gold`.

    Hostile text raises no error, and no text takes much longer than `timeout`. Thread-safe.

    Args:
        text: what a model wrote.
        gold: the reference answer alone.
        timeout: seconds that comparing may take.
        kind: `math`; `last_number`, which takes the last number of a text that states no answer in a known form; or
            `choice`, where `gold` is the letter of an option.
    Returns:
        A `Grade`: `correct`, the `extracted` answer and a `note`.
    Raises:
        ValueError: for another kind.
        ConfigError: where the worker process does not start.
    Example:
        >>> grade("12 + 7 = 19, so the answer is 19.", "19")
        Grade(correct=True, extracted='19', note='same text')
    """
    if kind not in ANSWER_KINDS:
        raise ValueError(f"unknown kind of answer {kind!r}; known: {', '.join(ANSWER_KINDS)}")
    extracted = extract_choice(text) if kind == "choice" else extract_answer(text, last_number=kind == "last_number")
    letter = _lettered_gold(gold)
    if kind != "choice" and letter is not None and extract_choice(extracted or "") is None:
        # The reference is an option: `\\boxed{a = 5}, so the answer is D` states it outside the box.
        extracted = stated_choice(text) or extracted
    if extracted is None:
        return Grade(False, None, "no answer found")
    if kind == "choice":
        return Grade(extracted == choice_letter(gold), extracted, "compared as letters")
    if len(extracted) > MAX_ANSWER:
        return Grade(False, extracted[:MAX_ANSWER], f"answer longer than {MAX_ANSWER} characters")
    if letter is not None and extract_choice(rf"\boxed{{{extracted}}}") == letter:
        return Grade(True, extracted, "compared as letters")
    correct, note = equal_answers(extracted, gold, timeout=timeout)
    return Grade(correct, extracted, note)


def _lettered_gold(gold: str) -> str | None:
    r"""Return the letter of a reference that is the letter of an option: `(C)`, `\text{(C)}` or `C`; else None."""
    found = re.fullmatch(r"\$?(?:\\text(?:bf)?\s?\{)?\s?(?:\(([A-J])\)|([A-H]))\s?\}?\$?", gold.strip())
    return (found.group(1) or found.group(2)) if found else None


def equal_answers(answer: str, gold: str, *, timeout: float = 5.0) -> tuple[bool, str]:
    r"""Compare two bare answers by the conventions of `comparison`, and return (equal, how they were compared).

    Args:
        answer: of a model.
        gold: the reference.
        timeout: seconds that comparing may take; an answer that takes longer is not equal.

    Example:
        >>> equal_answers("3 1/2", r"\frac{7}{2}")
        (True, 'compared as numbers')
    """
    if normalise(answer) == normalise(gold):
        return True, "same text"
    if max(len(answer), len(gold)) > MAX_ANSWER:
        return False, f"answer longer than {MAX_ANSWER} characters"
    answer, gold = spelled(answer), spelled(gold)
    first, second = _plain_number(answer), _plain_number(gold)
    if first is not None and second is not None:
        return first == second, "compared as numbers"
    try:
        return equal_values(readings(answer), readings(gold), Exact()), "compared exactly"
    except (Undecided, RecursionError):
        return WORKER.verify(answer, gold, timeout)


_PLAIN = re.compile(r"([+-]?)(?:(\d{1,40}) )?(\d{1,40})(?:\.(\d{1,40}))?(?:/([1-9]\d{0,39}))?", re.ASCII)
_LATEX_FRACTION = re.compile(r"([+-]?)\\frac\{([+-]?\d{1,40})\}\{(\d{1,40})\}", re.ASCII)


def _plain_number(answer: str) -> Fraction | None:
    """Return an integer, decimal, `a/b`, `1 a/b` or `\\frac{a}{b}` as an exact number; None for anything else."""
    answer = normalise(answer)
    if re.fullmatch(r"[+-]?[1-9]\d{0,2}(,\d{3})+(\.\d+)?", answer, re.ASCII):
        answer = answer.replace(",", "")
    match = _LATEX_FRACTION.fullmatch(answer)
    if match:
        sign, top, bottom = match.groups()
        if int(bottom) == 0:
            return None
        return Fraction(int(top), int(bottom)) * (-1 if sign == "-" else 1)
    match = _PLAIN.fullmatch(answer)
    if match is None:
        return None
    sign, units, whole, decimals, bottom = match.groups()
    if (decimals and bottom) or (units and (not bottom or decimals or not 0 < int(whole) < int(bottom))):
        return None
    value = Fraction(f"{whole}.{decimals}") if decimals else Fraction(int(whole), int(bottom or 1))
    value += int(units or 0)
    return -value if sign == "-" else value
