"""Shared runs of words between training examples and evaluation items."""

from __future__ import annotations

import numpy as np
import pytest

from influence_fast.data.decontamination import contaminated, plain_prompt
from influence_fast.data.examples import Example

TESTS = {
    "aime": [
        Example(
            "7", "Find the number of ordered pairs (a, b) with a + b = 1000.", "We count digits that are not zero."
        ),
        Example("8", "What is 2 plus 2?", "4"),
    ]
}


def test_shared_runs_are_reported_with_words_and_item() -> None:
    pool = [
        Example("clean", "How many apples are there in the basket now?", "There are seven apples in the basket."),
        Example("question", "Please: FIND the number of ordered pairs (a,b) with a+b=1000!", "c"),
        Example("solution", "Another one.", "First, we count digits that are not zero and go on."),
        Example("seven words", "the number of ordered pairs a b", "x"),
        Example("short", "what is 2 PLUS 2", "x"),
        Example("another operator", "what is 2 plus 3", "x"),
        Example("longer", "what is 2 plus 2 minus 1", "x"),
    ]
    found = {o.id: o for o in contaminated(pool, TESTS)}
    assert list(found) == ["question", "short"]
    assert found["question"].ngram == "find the number of ordered pairs a b"
    assert found["question"].why == "shares 8 words with aime/7"
    assert (found["short"].item, found["short"].why) == ("aime/8", "shares 5 words with aime/8")
    assert [o.id for o in contaminated(pool, TESTS, n=7)] == ["question", "solution", "seven words", "short"]


def test_the_runs_found_are_those_of_plain_sets() -> None:
    rng = np.random.default_rng(0)

    def text(n: int) -> str:
        return " ".join(f"w{v}" for v in rng.integers(0, 6, n))

    tests = [Example(str(i), text(12), text(9)) for i in range(5)]
    pool = [Example(f"p{i}", text(int(rng.integers(1, 40))), text(int(rng.integers(1, 40)))) for i in range(200)]

    def runs(example: Example) -> set[str]:
        rows = [example.prompt.split(), example.completion.split()]
        return {" ".join(row[i : i + 4]) for row in rows for i in range(len(row) - 3)}

    union = set().union(*map(runs, tests))
    expected = [e.id for e in pool if runs(e) & union]
    found = contaminated(pool, {"t": tests}, n=4)
    assert [o.id for o in found] == expected
    assert 0 < len(expected) < 200
    by_item = {f"t/{test.id}": runs(test) for test in tests}
    assert all(o.ngram in by_item[o.item] for o in found)


def test_the_wording_of_the_format_is_no_contamination() -> None:
    format = "Reason step by step and put your final answer in a box. "
    tests = [Example(str(i), format + f"Question number {i} is about trains.", "x") for i in range(5)]
    pool = [Example("a", format + "How many apples?", "c")]
    assert contaminated(pool, {"t": tests}) == []
    assert len(contaminated(pool, {"t": tests[:3]})) == 1  # too few items to tell
    copies = [Example(str(i), tests[0].prompt, "x") for i in range(5)]  # one question several times is one question
    assert len(contaminated(pool, {"t": copies})) == 1
    assert contaminated(pool, {}) == []


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("What is 2 + 2?", "what is 2+2", True),
        ("What is $2+2$?", "What is 2+2?", True),
        ("**Compute** 3 apples!", "Compute 3 apples", True),
        ("Solve: x (now)", "Solve x now", True),
        ("a well-known fact", "A well known fact", True),
        ("3-4", "3 - 4", True),
        ("What is 3 * 4", "What is 3 / 4", False),
        ("x - y", "x + y", False),
        ("-3", "3", False),
    ],
)
def test_when_short_prompts_are_the_same(one: str, other: str, same: bool) -> None:
    assert (plain_prompt(one) == plain_prompt(other)) is same


def test_operators_tell_short_questions_apart() -> None:
    tests = {"t": [Example("minus", "What is 3 - 4?", "-1")]}
    pool = [Example(name, f"what is  3 {name} 4", "x") for name in ("+", "*", "-", "/")]
    assert [(o.id, o.why) for o in contaminated(pool, tests)] == [("-", "shares 4 words with t/minus")]


@pytest.mark.timeout(10)
def test_long_runs_of_spaces_cost_no_more_than_one() -> None:
    space = " \n\t\u2003" * 100_000
    assert plain_prompt(f"what is{space}4{space}- 3{space}") == plain_prompt("what is 4 - 3") == "what is 4 - 3"
    pool = [Example("spaced", f"What is 2{space}plus 2?", space), Example("other", f"what is{space}- 2 plus 2", "")]
    assert [overlap.id for overlap in contaminated(pool, TESTS)] == ["spaced"]
