"""Extraction of the answer that a text states, in all its known forms."""

from __future__ import annotations

import pytest

from influence_fast.data.boxed import last_boxed, last_boxes
from influence_fast.evaluation.extraction import choice_letter, extract_answer, extract_choice, stated_choice

BOXES = [
    (r"so \boxed{42}.", "42"),
    (r"\boxed{1} then \boxed{\frac{1}{\sqrt{2}}} done", r"\frac{1}{\sqrt{2}}"),
    (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
    (r"\fbox{7}", "7"),
    (r"\boxed 5.", "5"),
    (r"\boxed {5}", "5"),
    (r"\boxed\frac{1}{2}", r"\frac{1}{2}"),
    (r"\boxed{3} and then \boxed{unclosed", "3"),
    (r"\boxed{x = \boxed{5}}", "5"),
    (r"\boxed{3} and \boxed{7}", "3, 7"),
    (r"$\boxed{3}$ and $\boxed{7}$.", "3, 7"),
    (r"$x = \boxed{3}$ or $x = \boxed{7}$", "3, 7"),
    (r"\boxed{3}, \boxed{5}, and \boxed{7}", "3, 5, 7"),
    (r"\boxed{3} \text{ and } \boxed{7}", "3, 7"),
    (r"\(\boxed{3}\), \(\boxed{7}\)", "3, 7"),
    (r"\boxed{3}. Wait, that is wrong. \boxed{7}", "7"),
    (r"\boxed{3}\boxed{7}", "7"),
    (r"\boxed{7}, \boxed{7}", "7"),
    (r"First \boxed{1}. So \boxed{3} and \boxed{7}.", "3, 7"),
    (r"#### 3 but \boxed{4}", "4"),
    (r"\boxedness{3}", None),
]
HASHES = [
    ("4+5=9\n#### 9", "9"),
    ("#### 1,234\n", "1,234"),
    ("#### 18 dollars", "18 dollars"),
    ("#### $18", "$18"),
    ("#### **18**", "18"),
    ("#### $\\frac{1}{2}$", r"\frac{1}{2}"),
    ("#### -7.5.", "-7.5"),
    ("#### yes", "yes"),
    ("so it is #### 9", "9"),
    ("#### Answer\n\n12", "12"),
    ("#### Answer: 12", "12"),
    ("#### Final Answer\n**12**", "12"),
    ("#### Step 1: add 3\nThe answer is 9.", "9"),
    ("#### 1. First, add\nThe answer is 9.", "9"),
    ("#### Conclusion\nThe answer is 9.", "9"),
    ("#### 9\n\nQ: what else?", "9"),
    ("##### 9", None),
]
STATED = [
    ("The answer is 12.", "12"),
    ("The answer is 3.5. So we stop.", "3.5"),
    ("The answer is $\\frac{1}{2}$.", r"\frac{1}{2}"),
    ("The answer is \\(x^2\\).", "x^2"),
    ("The final answer is: 12", "12"),
    ("The answer is **12**.", "12"),
    ("The answer is: **12**", "12"),
    ("The answer to the question is 12.", "12"),
    ("the answer is approximately 3.14", "3.14"),
    ("The answer is about 12 meters.", "12 meters"),
    ("The answer is $\\approx 3.14$", r"\approx 3.14"),
    ("The answer is $5$ cm.", "5 cm"),
    ("The answer is $3$ and $7$.", "$3$ and $7$"),
    ("The answer is $18 a day.", "$18 a day"),
    ("The answer is 3:30 p.m. on Monday", "3:30 p.m. on Monday"),
    ("**Final Answer: 8**", "8"),
    ("**Final Answer:** 8", "8"),
    ("Final answer: $8$", "8"),
    ("Answer = 8", "8"),
    ("The answer should be $8$.", "8"),
    ("The answer is:\n8", "8"),
    ("The answer is 8, not 9.", "8"),
    ("The answer is no, because 9 is odd.", "no"),
    ("<think>7?</think><answer>8</answer>", "8"),
    ("<answer>\n$8$\n</answer>", "8"),
    ("<answer>8", None),
    ("**Answer**: 8", "8"),
    ("The answer is 1.\nNo, the answer is 2.", "2"),
    ("**Final Answer**\n\n73", "73"),
    ("**Final Answer:**\n\n$73$", "73"),
    ("### Answer\n73", "73"),
    ("### Answer\n\n**73**", "73"),
    ("## Final Answer:\n73 apples.", "73 apples"),
    ("Answer:\n73", "73"),
    ("Final Answer\n$$\n73\n$$", "73"),
    ("### Answer\nThe answer is 73.", "73"),
    ("The answer is 1.\n### Answer\n73", "73"),
    ("**Final Answer**\n\n- 73", "73"),
    ("That gives 3.\nA: 18", "18"),
    ("A: 2,125", "2,125"),
    ("A: $18", "$18"),
    ("A: 3\nB: 4\nC: 5", None),
    ("Answer choices: 1, 2, 3", None),
    ("nothing of the kind 17", None),
    ("the answers are unknowable", None),
    ("", None),
]


@pytest.mark.parametrize(("text", "expected"), BOXES + HASHES + STATED)
def test_extracts_the_stated_answer(text: str, expected: str | None) -> None:
    assert extract_answer(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("we get 3 and then -17.5 pens", "-17.5"),
        (r"\boxed{3} of 5", "3"),
        ("that is 1,234, he said", "1,234"),
        ("half, so .5", ".5"),
        ("none at all", None),
    ],
)
def test_last_number_is_taken_where_nothing_is_stated(text: str, expected: str | None) -> None:
    assert extract_answer(text, last_number=True) == expected


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("(C)", "C"),
        ("C", "C"),
        ("So\n\n**B.**\n", "B"),
        (r"\boxed{C}", "C"),
        (r"\boxed{c}", "C"),
        (r"$\boxed{\text{(C)}}$", "C"),
        (r"\boxed{\textbf{(C)}\ 42}", "C"),
        (r"\boxed{C. 3 eV}", "C"),
        (r"\boxed{C: 3 eV}", "C"),
        (r"\boxed{C) 3 eV}", "C"),
        (r"\boxed{\text{Option C}}", "C"),
        (r"\boxed{C \quad 5}", "C"),
        (r"\boxed{a = 5}, so... Answer: D", "D"),
        (r"\boxed{A = 5}. Answer: D", "D"),
        (r"\boxed{D = 5}. The answer is (B)", "B"),
        (r"\boxed{F = ma}. Answer: D", "D"),
        (r"\boxed{a + b}. Answer: D", "D"),
        (r"\boxed{a, b}. Answer: D", "D"),
        (r"\boxed{A cat}. Answer: D", "D"),
        (r"\boxed{42}. Answer: \boxed{D}", "D"),
        (r"\boxed{B \cdot h}. Answer: D", "D"),
        ("Answer: C", "C"),
        ("**Answer:** D", "D"),
        ("**Answer**: D", "D"),
        ("Answer: $C$", "C"),
        ("the answer is C", "C"),
        ("The answer is (b).", "B"),
        ("The answer is A.", "A"),
        ("The correct answer is option A because of x", "A"),
        ("The correct choice is: E", "E"),
        ("Option B is wrong. The answer is D", "D"),
        ("I think (A) is wrong and (B) is right", "B"),
        (r"\boxed{Carbon}, so the answer is B", "B"),
        ("The answer is (A). No, the answer is (C).", "C"),
        ("The answer is A = 5", None),
        ("The answer is A long story", None),
        ("the answer is a long story", None),
        ("the answer is I have no idea", None),
        ("Answer: Carbon", None),
        (r"\boxed{42}", None),
        ("no letters here", None),
        ("", None),
    ],
)
def test_extracts_the_chosen_letter(text: str, letter: str | None) -> None:
    assert extract_choice(text) == letter


def test_choice_letter_reads_only_single_letters() -> None:
    assert [choice_letter(gold) for gold in ("b", "(B)", "B.", " B) ", "BC", "12", "")] == ["B"] * 4 + [None] * 3


LONG = 1_000_000
UNITS = [
    *["9", "x", "{", "}", " ", "\n", "\t", "(", "\\", "$", "*", "#", "_", "`", ",", ".", "-", "9,", "A", "A: ", "a*"],
    *["\\boxed{", "\\boxed ", "\\boxed", "\\fbox{}", "\\boxed{1}, ", "\\boxed{1} and ", "####", "#### ", "\n#### "],
    *["answer", "answer ", "The answer is ", "answer:", "final answer", "Answer\n", "\nAnswer:", "**Answer**\n"],
    *["option ", "option (", "(A", "(A)", "\n(A)\n", "\nA:", "B:\n", "\\text{", "about ", "is ", "= ", "\\(", "$$"],
    *["### ", "\n**", "1 a.m. ", "<answer>", "<answer>1"],
]


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.timeout(60)
def test_a_megabyte_of_repeats_is_searched_in_linear_time(unit: str) -> None:
    # Quadratic work on a million characters takes minutes, and so is ended by the limit above.
    text = (unit * (LONG // len(unit) + 1))[:LONG]
    for search in (extract_choice, stated_choice, last_boxed, last_boxes):
        search(text)
    extract_answer(text, last_number=True)
    extract_answer("The answer is " + text)
    choice_letter(text)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"<think>\boxed{4}</think>The answer is 5.", "5"),
        (r"\boxed{4} is wrong</think> So \boxed{5}.", "5"),
        (r"<think>\boxed{4}</think>Done.", None),
        ("<think>\\boxed{4}</think>\n", "4"),
        (r"<think>\boxed{4}", "4"),
    ],
)
def test_thoughts_are_no_answer_where_something_follows(text: str, answer: str | None) -> None:
    assert extract_answer(text) == answer


def test_an_option_in_thoughts_is_none_where_something_follows() -> None:
    assert extract_choice(r"<think>\boxed{A}</think>The answer is B.") == "B"
