"""Compare expressions by sympy, and forms that are not read by math-verify. Runs in the grading worker only.

A tree becomes a sympy expression; numbers are compared by digits (60, then 400), expressions with variables at points.
What math-verify calls equal is believed only if it read both answers: after a change of any one number, letter or sign
of either the verdict must change, or the parser had dropped it (it reads `1+\\frac1e` as 1).
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

from influence_fast.evaluation.answer_text import clean
from influence_fast.evaluation.comparison import Exact, Undecided, equal_values
from influence_fast.evaluation.expression_values import exact
from influence_fast.evaluation.expressions import Node
from influence_fast.evaluation.readings import readings

DIGITS = (60, 400)
# Decimals that an irrational number needs at least.
LONGEST_DECIMAL = 6
# Changes of an answer that math-verify is tried on.
CHANGES = 24
_POINTS = (Fraction(7, 5), Fraction(-13, 11), Fraction(31, 17), Fraction(-5, 23))


class Symbolic(Exact):
    """Judge by sympy the expressions that exact arithmetic leaves undecided."""

    def __init__(self) -> None:
        self._known: dict[tuple[Node, bool], Any] = {}
        # Whether `log` without a base is to base 10.
        self._decimal = False

    def equal(self, a: Node, b: Node) -> bool:
        try:
            return super().equal(a, b)
        except Undecided:
            pass
        for self._decimal in (False, True) if _has_log(a) or _has_log(b) else (False,):
            if _equal(self._expression(a), self._expression(b)) or _rounded(a, b, self) or _rounded(b, a, self):
                return True
        return False

    def proportional(self, a: Node, b: Node) -> bool:
        first, second = self._expression(a), self._expression(b)
        if first.free_symbols != second.free_symbols or not first.free_symbols:
            return False
        ratios = []
        for x, y in _at_points(first, second):
            if x == 0 or y == 0:
                return False
            ratios.append(x / y)
        return bool(ratios) and all(_close(ratios[0], ratio, 25) for ratio in ratios[1:])

    def _expression(self, node: Node) -> Any:
        key = (node, self._decimal)
        if key not in self._known:
            self._known[key] = _to_sympy(node, self._decimal)
        return self._known[key]


def _has_log(node: Any) -> bool:
    """Return whether `log` occurs without a base, which may be that of calculus or base 10."""
    return isinstance(node, tuple) and (node[:2] == ("call", "log") or any(_has_log(child) for child in node))


def _to_sympy(node: Node, decimal: bool = False) -> Any:
    import sympy

    kind = node[0]
    if kind == "num":
        return sympy.Rational(node[1].numerator, node[1].denominator)
    if kind == "var":
        return sympy.Symbol(node[1])
    if kind == "const":
        return {"pi": sympy.pi, "e": sympy.E, "i": sympy.I, "inf": sympy.oo}[node[1]]
    if kind == "call":
        names = {
            "arcsin": "asin",
            "arccos": "acos",
            "arctan": "atan",
            "abs": "Abs",
            "floor": "floor",
            "ceil": "ceiling",
        }
        inner = _to_sympy(node[2], decimal)
        if node[1] == "log":
            return sympy.log(inner, 10) if decimal else sympy.log(inner)
        if node[1] == "sqrt":
            return sympy.sqrt(inner)
        return getattr(sympy, names.get(str(node[1]), str(node[1])))(inner)
    parts = [_to_sympy(child, decimal) for child in node[1:]]
    operations = {
        "add": lambda a, b: a + b,
        "mul": lambda a, b: a * b,
        "div": lambda a, b: a / b,
        "pow": lambda a, b: a**b,
        "neg": lambda a: -a,
        "fact": sympy.factorial,
        "fact2": sympy.factorial2,
        "binom": sympy.binomial,
    }
    if kind not in operations:
        raise Undecided
    return operations[kind](*parts)


def _equal(a: Any, b: Any) -> bool:
    import sympy

    if a == b:
        return a is not sympy.nan and a is not sympy.zoo
    if a.free_symbols or b.free_symbols:
        pairs = list(_at_points(a, b))
        return len(pairs) >= 2 and all(_close(x, y, 25) for x, y in pairs)
    if any(x.has(sympy.oo, -sympy.oo, sympy.nan, sympy.zoo) for x in (a, b)):
        return False
    difference = a - b
    if difference.is_Rational:
        return bool(difference == 0)
    for digits in DIGITS:
        if not _close(a.evalf(digits, maxn=20 * digits), b.evalf(digits, maxn=20 * digits), digits - 10):
            return False
    return True


def _close(x: Any, y: Any, digits: int) -> bool:
    import sympy

    if not (x.is_number and y.is_number):
        return False
    size = max(abs(x), abs(y))
    return bool(size == 0) or bool(abs(x - y) < size * sympy.Rational(1, 10**digits))


def _at_points(a: Any, b: Any) -> Any:
    """Yield the values of two expressions in the same variables at a few points, where both have one."""
    import sympy

    names = sorted(a.free_symbols | b.free_symbols, key=str)
    for step, start in enumerate(_POINTS):
        point = {
            name: sympy.Rational(start.numerator, start.denominator) * (1 + sympy.Rational(i + 1, 7 + step) * 3)
            for i, name in enumerate(names)
        }
        x, y = (value.subs(point).evalf(40, maxn=400) for value in (a, b))
        if all(v.is_number and v.is_finite is not False and not v.has(sympy.nan, sympy.zoo) for v in (x, y)):
            yield x, y


def _rounded(decimal: Node, other: Node, judge: Symbolic) -> bool:
    """Return whether `decimal` is an irrational number rounded or cut at six decimals or more, six of which count."""
    sign, literal = (-1, decimal[1]) if decimal[0] == "neg" else (1, decimal)
    if literal[0] != "num" or literal[2] < LONGEST_DECIMAL or exact(other) is not None:
        return False
    scaled = literal[1] * 10 ** literal[2]
    if abs(scaled) < 10 ** (LONGEST_DECIMAL - 1):
        return False
    value = judge._expression(other)
    if value.free_symbols or not value.is_real:
        return False
    return abs(Fraction(str(value.evalf(60))) * 10 ** literal[2] - sign * scaled) < 1


# --- math-verify ------------------------------------------------------------------------------------------------


def verdict(answer: str, gold: str) -> tuple[bool, str]:
    """Compare two bare answers by all methods, and return (equal, how they were compared)."""
    try:
        return equal_values(readings(answer), readings(gold), Symbolic()), "compared by sympy"
    except Undecided:
        pass
    note = "compared by math-verify"
    answer, gold = clean(answer), clean(gold)
    if not _verified(answer, gold):
        return False, note
    for changed in _changes(answer):
        if _verified(changed, gold):
            return False, "math-verify reads only a part of the answer"
    for changed in _changes(gold):
        if _verified(answer, changed):
            return False, "math-verify reads only a part of the reference"
    return True, note


def _verified(answer: str, gold: str) -> bool:
    import math_verify

    def parse(text: str) -> list[Any]:
        config = [math_verify.LatexExtractionConfig()]
        return list(
            math_verify.parse(f"${text}$", extraction_config=config, fallback_mode="no_fallback", parsing_timeout=None)
        )

    first, second = parse(gold), parse(answer)
    return bool(first and second) and bool(math_verify.verify(first, second, timeout_seconds=None))


_CHANGED = re.compile(r"\\[A-Za-z]+|\d+|[A-Za-z]|[+-]")


def _changes(text: str) -> list[str]:
    """Return the text with each number, letter and sign changed in turn."""
    found = []
    for match in _CHANGED.finditer(text):
        piece = match.group()
        if piece.startswith("\\"):
            continue
        if piece.isdigit():
            other = str(int(piece[-18:]) + 7)
        else:
            other = {"+": "-", "-": "+"}.get(piece, "w" if piece != "w" else "v")
        if piece == "d" or _bound(text, piece):
            continue
        found.append(text[: match.start()] + other + text[match.end() :])
        if len(found) == CHANGES:
            break
    return found


def _bound(text: str, letter: str) -> bool:
    """Return whether a letter is the variable of a sum or an integral, whose name does not matter."""
    return letter.isalpha() and bool(re.search(rf"_\{{?\s*{letter}\s*=|\bd\s*{letter}\b|{letter}\s*\\to", text))
