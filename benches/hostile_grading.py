"""Grades answers that are out to break the grader: none may crash it, hang it, or pass for right.

python -m benches.hostile_grading            # all 5,000; prints the figures
python -m benches.hostile_grading --count 500 --seed 1
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from influence_fast.evaluation.grading import ANSWER_KINDS, equal_answers, grade

COUNT = 5000
TIMEOUT = 0.5  # seconds; short, so that thousands of overruns end
# what a verdict may take on top: a second of grace for the worker, and the making of a new one (an import of sympy)
GRACE = 1.0 + 15.0
GOLDS = {"math": r"\frac{\pi}{7}", "last_number": r"\frac{\pi}{7}", "choice": "J"}  # no answer below comes to these

_FORMS = (r"\boxed{%s}", "The answer is %s.", "#### %s", r"So $\boxed{%s}$, done.", "Answer: $%s$", "%s", r"\fbox{%s}")
_LATEX = (
    r"\frac \sqrt { } ( ) [ ] ^ _ + - * / = < > , . ; : ! ? 1 2 3 99 x y n \left \right \sum \int \lim \infty \text"
)
_LATEX += r" \binom \log \sin \begin{pmatrix} \end{pmatrix} & \\ \cup \in \mathbb{R} { } ' \{ \} | \cdot \pm %"
_TOKENS = _LATEX.split()
_CODE = (
    "__import__('os').system('exit 1')",
    "exec('while True: pass')",
    "```python\nwhile True: pass\n```",
    "'; DROP TABLE answers; --",
    "<script>alert(1)</script>",
    "$(yes > /dev/null)",
    "lambda: (lambda f: f(f))(lambda f: f(f))",
    "open('/dev/zero').read()",
    "{{ 7 * 7 }}{% for i in range(10**9) %}{% endfor %}",
    "\\input{/etc/passwd}\\def\\x{\\x\\x}\\x",
)


def _nested(rng: random.Random, left: str, core: str, right: str, most: int) -> str:
    depth = rng.randint(2, most)
    return left * depth + core + right * depth


def _unbalanced(rng: random.Random) -> str:
    return "".join(rng.choice("{}{}\\(") for _ in range(rng.randint(1, 400))) + rng.choice(["", "1", "}" * 50])


def _tower(rng: random.Random) -> str:
    base, depth = str(rng.choice([2, 9, 10, "x", 1.5])), rng.randint(3, 8)
    if rng.random() < 0.5:
        return _braced_tower(base, depth)
    return rng.choice(["^", "**"]).join([base] * depth)


def _braced_tower(base: str, depth: int) -> str:
    return base if depth == 1 else f"{base}^{{{_braced_tower(base, depth - 1)}}}"


def _nothing(rng: random.Random) -> str:
    return "".join(rng.choice(" \t\n\r\v\f\u200b\ufeff") for _ in range(rng.randint(0, 50)))


def _megabyte(rng: random.Random) -> str:
    unit = rng.choice(
        ["9", "x", "{", "\\boxed{", " ", "\n", "The answer is ", "(", "\\frac", "####", "(A)", "a*", "\\"]
    )
    return (unit * (1_000_000 // len(unit) + 1))[:1_000_000]


def _unicode(rng: random.Random) -> str:
    blocks = ((0x20, 0x7E), (0x300, 0x36F), (0x590, 0x6FF), (0x2000, 0x22FF), (0xD800, 0xDFFF), (0xFF10, 0xFF5A))
    blocks += ((0x1D400, 0x1D7FF), (0x1F300, 0x1FAFF), (0xE0000, 0xE007F))
    return "".join(chr(rng.randint(*rng.choice(blocks))) for _ in range(rng.randint(1, 200)))


def _fraction(rng: random.Random) -> str:
    text = "1"
    for _ in range(rng.randint(2, 120)):
        text = rng.choice([r"\frac{1}{%s}", r"\frac{%s}{0}", r"\frac{%s}{2}", r"1+\frac{1}{%s}"]) % text
    return text


def _factorial(rng: random.Random) -> str:
    text = str(rng.choice([5, 10, 99, 10**6, 10**12]))
    for _ in range(rng.randint(1, 6)):
        text = f"({text}!)"
    return rng.choice([text, rf"\binom{{{text}}}{{{10**6}}}", f"{text}!!", rf"\frac{{{text}}}{{{text}}}"])


def _control(rng: random.Random) -> str:
    return "".join(rng.choice("\x00\x01\x07\x08\x1b\x7f\x851{}") for _ in range(rng.randint(1, 100)))


def _deep(rng: random.Random) -> str:
    left, right = rng.choice([("(", ")"), ("{", "}"), (r"\sqrt{", "}"), (r"\left(", r"\right)"), ("|", "|"), ("-", "")])
    return _nested(rng, left, "1", right, 900 // len(left))


def _number(rng: random.Random) -> str:
    digits = "".join(rng.choice("0123456789") for _ in range(rng.randint(50, 3000)))
    return rng.choice(
        [digits, f"0.{digits}", f"-{digits}/{digits[::-1]}", f"1e{digits[:9]}", f"{digits}!", f"7^{digits}"]
    )


def _collection(rng: random.Random) -> str:
    items = ",".join(str(rng.randint(0, 10**6)) for _ in range(rng.randint(2, 250)))
    return rng.choice(
        [
            rf"\{{{items}\}}",
            f"({items})",
            r"\{1,2,\dots,10^{9}\}",
            rf"[1,{items}]\cup(2,\infty)",
            f"{items} or {items}",
        ]
    )


def _calculus(rng: random.Random) -> str:
    n = rng.choice(["10^{9}", r"\infty", "10^6", "99999"])
    return rng.choice(
        [
            rf"\sum_{{k=1}}^{{{n}}} \frac{{1}}{{k^k}}",
            rf"\prod_{{k=1}}^{{{n}}} k!",
            rf"\int_0^{{{n}}} \sin(x^x) e^{{x^x}} dx",
            rf"\lim_{{x\to{n}}} x^{{x^x}}",
            rf"(x+y+z+1)^{{{rng.randint(50, 10**5)}}}",
            r"\sqrt[3]{" * rng.randint(2, 60) + "x" + "}" * 60,
            rf"\log_{{{n}}}(\cos(\tan(e^{{{n}}})))",
            rf"x^{{{rng.randint(100, 5000)}}} - 1 = 0",
        ]
    )


def _tokens(rng: random.Random) -> str:
    return rng.choice([" ", ""]).join(rng.choice(_TOKENS) for _ in range(rng.randint(1, 120)))


def _bait(rng: random.Random) -> str:
    parts = [
        "answer",
        "answer is",
        "final answer:",
        "option",
        " " * 500,
        "*" * 300,
        "\n" * 200,
        "$",
        "\\text{",
        "(",
        "A",
        "(B",
    ]
    return "".join(rng.choice(parts) for _ in range(rng.randint(5, 400)))


def _code(rng: random.Random) -> str:
    return rng.choice(_CODE)


FAMILIES: dict[str, tuple[Callable[[random.Random], str], int]] = {  # how it is made, and its weight
    "unbalanced braces": (_unbalanced, 10),
    "towers of powers": (_tower, 6),
    "nothing": (_nothing, 4),
    "1 MB": (_megabyte, 4),
    "code": (_code, 6),
    "unicode": (_unicode, 10),
    "nested fractions": (_fraction, 8),
    "factorials": (_factorial, 6),
    "control characters": (_control, 8),
    "deep nesting": (_deep, 8),
    "huge numbers": (_number, 8),
    "collections": (_collection, 6),
    "calculus": (_calculus, 5),
    "LaTeX at random": (_tokens, 10),
    "bait for searches": (_bait, 8),
}


def hostile_answers(count: int, seed: int = 0) -> Iterator[tuple[str, str, str]]:
    """`count` answers as (family, kind of answer, text), one at a time; the same for the same seed."""
    rng = random.Random(seed)
    names = list(FAMILIES)
    weights = [FAMILIES[name][1] for name in names]
    for _ in range(count):
        family = rng.choices(names, weights)[0]
        text = FAMILIES[family][0](rng)
        kind = rng.choice(ANSWER_KINDS)
        yield family, kind, text if family == "1 MB" and rng.random() < 0.5 else rng.choice(_FORMS).replace("%s", text)


@dataclass
class Figures:
    """What came of grading: seconds by family, and everything that went wrong, by text."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    timed_out: int = 0
    crashes: list[str] = field(default_factory=list)
    over_limit: list[str] = field(default_factory=list)
    passed_for_right: list[str] = field(default_factory=list)
    good_ones_lost: int = 0


def run(count: int, seed: int = 0, timeout: float = TIMEOUT) -> Figures:
    """Grades `count` hostile answers; after each overrun an honest one must be graded right by the next worker."""
    found = Figures()
    equal_answers(r"\sqrt{8}", r"2\sqrt{2}", timeout=60.0)  # the worker starts before the clock does
    for family, kind, text in hostile_answers(count, seed):
        what = f"{family}, {kind}: {text[:80]!r}"
        start = time.perf_counter()
        try:
            verdict = grade(text, GOLDS[kind], timeout=timeout, kind=kind)
        except Exception as error:
            found.crashes.append(f"{what}: {type(error).__name__}: {error}")
            continue
        spent = time.perf_counter() - start
        found.seconds.setdefault(family, []).append(spent)
        if spent > timeout + GRACE:
            found.over_limit.append(f"{what}: {spent:.1f} s")
        if verdict.correct:
            found.passed_for_right.append(what)
        if "timed out" in verdict.note or "died" in verdict.note:
            found.timed_out += 1
            found.good_ones_lost += not equal_answers(r"\sqrt{8}", r"2\sqrt{2}", timeout=60.0)[0]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=COUNT)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    start = time.perf_counter()
    found = run(args.count, args.seed)
    everything = sorted(second for family in found.seconds.values() for second in family)
    print(
        f"{args.count} hostile answers, seed {args.seed}, limit {TIMEOUT} s: {time.perf_counter() - start:.1f} s in all"
    )
    print(
        f"crashes {len(found.crashes)}, over the limit and {GRACE:.0f} s {len(found.over_limit)}, passed for right "
        f"{len(found.passed_for_right)}, stopped at the limit {found.timed_out}, honest answers lost after that "
        f"{found.good_ones_lost}"
    )
    middle, late, last = (everything[int(share * (len(everything) - 1))] for share in (0.5, 0.99, 1.0))
    print(f"seconds an answer: median {middle:.4f}, 99 % {late:.3f}, most {last:.3f}\n")
    print(f"{'family':<22} {'answers':>8} {'mean s':>8} {'most s':>8}")
    for family, seconds in sorted(found.seconds.items()):
        print(f"{family:<22} {len(seconds):>8} {sum(seconds) / len(seconds):>8.4f} {max(seconds):>8.3f}")
    for what in found.crashes + found.over_limit + found.passed_for_right:
        print(what.encode("ascii", "backslashreplace").decode())
    if found.crashes or found.over_limit or found.passed_for_right or found.good_ones_lost:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
