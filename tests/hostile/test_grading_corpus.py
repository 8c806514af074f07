"""The grading room: hostile texts each end in under five seconds with a verdict, never an exception, never right.

`benches/hostile_grading.py` draws thousands more, in some minutes.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator

import pytest

from influence_fast.evaluation import grading
from influence_fast.evaluation.grading import ANSWER_KINDS, equal_answers, grade

# It depends on a clock or on other processes: a failure is run once more and listed (RERUN).
pytestmark = pytest.mark.flaky(reruns=1)

COUNT = 330
LIMIT = 5.0  # seconds that a text may take, a new worker included
TIMEOUT = 0.3  # seconds that comparing may take: short, so that many overruns fit into a test
GOLDS = {"math": r"\frac{\pi}{7}", "last_number": r"\frac{\pi}{7}", "choice": "J"}  # no text below comes to these
FORMS = (r"\boxed{%s}", "The answer is %s.", "#### %s", "**Final Answer**\n\n%s", "A: %s", "Answer: $%s$", "%s")


def nested(rng: random.Random) -> str:
    left, right = rng.choice(
        [
            *[("(", ")"), ("{", "}"), ("[", "]"), (r"\{", r"\}"), (r"\sqrt{", "}"), (r"\frac{1}{", "}"), ("|", "|")],
            *[("-", ""), ("2^{", "}"), (r"\text{", "}"), (r"\boxed{", "}"), (r"\left(", r"\right)"), ("x_{", "}")],
            *[(r"\sin ", ""), ("1+(", ")"), (r"\begin{pmatrix}", r"\end{pmatrix}"), ("f(", ")"), ("(1,", ")")],
        ]
    )
    depth = rng.choice([30, 200, 700, 20_000])
    return left * depth + "1" + right * depth


def huge(rng: random.Random) -> str:
    n = rng.choice(["9", "99", "10^{9}", "9^{9^{9}}", "123456789", "9" * 1500])
    return rng.choice(
        [
            *[f"9^{{{n}}}", f"9^9^9^{n}", f"2**{n}", f"{n}!", f"({n}!)!", f"1/{n}!!", f"1e{n}", f"0.{'0' * 1500}1^{n}"],
            *[
                rf"\binom{{{n}}}{{50}}",
                rf"\sqrt[{n}]{{2}}",
                f"(x+1)^{{{n}}}",
                f"{n}%",
                f"{n} km",
                f"({n}, {n}]",
                f"{n}_2",
            ],
            *[
                rf"\log_{{2}} {n}",
                rf"\sin({n})",
                rf"e^{{{n}}}",
                rf"\sum_{{k=1}}^{{{n}}} k^k",
                f"{n}:{n}",
                f"{n} {n}/{n}",
            ],
        ]
    )


def unbalanced(rng: random.Random) -> str:
    pieces = ["{", "}", "(", ")", "[", "]", r"\{", r"\}", "$", "|", "\\", r"\frac", "^", "_", "&", r"\\", "1", ",", "="]
    return "".join(rng.choice(pieces) for _ in range(rng.choice([1, 5, 50, 400])))


def characters(rng: random.Random) -> str:
    blocks = [(0, 31), (0x7F, 0x9F), (0xD800, 0xDFFF), (0x200B, 0x202E), (0x300, 0x36F), (0xFFF0, 0xFFFF)]
    blocks += [(0x1D400, 0x1D7FF), (0x660, 0x669), (0xBC, 0xBE), (0x2070, 0x209C), (0x2150, 0x218B), (0x3000, 0x33FF)]
    return "".join(chr(rng.randint(*rng.choice(blocks))) for _ in range(rng.choice([1, 3, 40, 1500])))


def look_alikes(rng: random.Random) -> str:
    spellings = [
        "π∕𝟟",
        "рi/7",
        "\\ρi/7",
        "π/𝟽𝟽",
        "ᴨ/7",
        "∏/7",
        "п/7",
        "π\u202e7/",
        "⅞π",
        "π₇",
        "π⁷",
        "３½",
        "½½½",
        "²³",
        "1⁄0",
    ]
    return rng.choice(spellings) * rng.choice([1, 2, 30])


def bombs(rng: random.Random) -> str:
    return rng.choice(
        [
            r"\def\a{\a\a}\a",
            r"\newcommand{\x}{\x\x}\x" * rng.choice([1, 40]),
            r"\input{/etc/passwd}",
            r"\begin{array}" * 100,
            r"\begin{pmatrix}" + r"1 & 2 \\ " * rng.choice([10, 180]) + r"\end{pmatrix}",
            r"\pm 1" * rng.choice([2, 30, 300]),
            r"\sqrt" * 500,
            r"\frac" * 500 + "1",
            r"\left" * 500,
            "x" * 1900,
            "x y z " * 300,
            "1 cm " * 400,
            "1 000 " * 300,
            "1,000," * 300,
            "approximately " * 140,
            r"x = " * 400,
            "<" * 1000,
            r"\cup".join(f"({i},{i + 1})" for i in range(rng.choice([5, 150]))),
            ",".join(rf"\sqrt{{{i}}}" for i in range(rng.choice([5, 160]))),
            r"\{" + ",".join(map(str, range(rng.choice([5, 500])))) + r"\}",
            "one hundred million " * 90,
            "+".join(f"x_{{{i}}}" for i in range(rng.choice([5, 250]))),
            "*".join("(a+b+c+d)" for _ in range(rng.choice([3, 180]))),
            rf"\int_0^{{{rng.choice([1, 9, 10**9])}}} \sin(x^x) e^{{x^x}} dx",
            rf"\lim_{{x\to\infty}} x^{{x^{{{rng.randint(2, 99)}}}}}",
            r"\prod_{k=1}^{10^9} k!",
            "__import__('os').system('exit 1')",
            "eval(input())",
        ]
    )


def long(rng: random.Random) -> str:
    unit = rng.choice(
        ["9", "{", r"\boxed{", "The answer is ", "\n#### ", "(A)", "\nA: ", " ", r"\\", "1 ", ",", "\ud800"]
    )
    return unit * (rng.choice([3_000, 300_000]) // len(unit))


FAMILIES: dict[str, Callable[[random.Random], str]] = {
    "nested": nested,
    "huge": huge,
    "unbalanced": unbalanced,
    "characters": characters,
    "look-alikes": look_alikes,
    "bombs": bombs,
    "long": long,
}


def corpus(family: str) -> Iterator[tuple[str, str]]:
    """Yield (kind of answer, text), the same at every run."""
    rng = random.Random(family)
    for _ in range(-(-COUNT // len(FAMILIES))):
        yield rng.choice(ANSWER_KINDS), rng.choice(FORMS).replace("%s", FAMILIES[family](rng))


def test_the_corpus_has_its_size_and_is_the_same_at_every_run() -> None:
    assert sum(len(list(corpus(family))) for family in FAMILIES) >= 300
    assert list(corpus("huge")) == list(corpus("huge"))


@pytest.mark.parametrize("family", FAMILIES)
def test_hostile_texts_end_in_time_with_a_verdict(family: str) -> None:
    equal_answers(r"\sqrt{8}", r"2\sqrt{2}", timeout=60.0)  # the worker starts before the clock does
    late, right = [], []
    for kind, text in corpus(family):
        start = time.process_time()
        verdict = grade(text, GOLDS[kind], timeout=TIMEOUT, kind=kind)
        if time.process_time() - start > LIMIT:  # this process's own work: a busy machine is no fault
            late.append(text[:100])
        if verdict.correct:
            right.append(text[:100])
    assert (late, right) == ([], [])


@pytest.mark.parametrize("family", ["nested", "huge", "unbalanced", "characters", "bombs"])
def test_hostile_references_end_with_a_verdict_too(family: str) -> None:
    for _, text in list(corpus(family))[:12]:
        assert not grade(r"\boxed{\frac{\pi}{7}}", text[:3000], timeout=TIMEOUT).correct
        assert not grading.equal_answers(text[:1500], r"\sqrt{7}", timeout=TIMEOUT)[0]
