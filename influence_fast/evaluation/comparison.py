"""Compare two answers by their readings; a `Judge` compares their expressions.

The conventions, where mathematics leaves a choice:

- A unit, a percent sign, a currency or the base of a numeral may be left off: 5 cm answers 5, 50% answers 50 and 0.5,
  101_2 answers 101. Units on both sides must agree, after conversion: 5 m is 500 cm and no 5 cm.
- A numeral in another base is another answer, for writing it so was the question: 101_2 is no 5.
- Lists and sets have no order, points do. A list without brackets may stand for a point, in its order.
- `x = 5` answers 5; assignments to two names differ. An interval is what its inequality is.
- A decimal is itself: 0.33 is no 1/3. Only for an irrational number at least six decimals stand.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Protocol, TypeVar

from influence_fast.evaluation.expression_values import contains, exact
from influence_fast.evaluation.expressions import Node, number
from influence_fast.evaluation.units import COUNTED, DEGREE, DOZEN, PERCENT, RADIAN, Unit
from influence_fast.evaluation.values import (
    Clock,
    Equation,
    Items,
    Matrix,
    Numeral,
    Ratio,
    Region,
    Scalar,
    Span,
    Unread,
    Value,
    Words,
)

_Item = TypeVar("_Item")

MANY = 60  # items of a list without order, compared each with each


class Undecided(Exception):
    """Raised where the comparison needs more than exact arithmetic, or a form that is not read."""


class Judge(Protocol):
    """Decide whether two expressions are equal, and whether two sides of an equation are in proportion."""

    def equal(self, a: Node, b: Node) -> bool: ...

    def proportional(self, a: Node, b: Node) -> bool: ...


class Exact:
    """Judge rational numbers exactly; raises Undecided for anything else."""

    def equal(self, a: Node, b: Node) -> bool:
        if a == b:
            return True
        x, y = exact(a), exact(b)
        if x is None or y is None:
            raise Undecided
        return x == y

    def proportional(self, a: Node, b: Node) -> bool:
        if a == b:
            return True
        raise Undecided


def equal_values(answers: Sequence[Value], golds: Sequence[Value], judge: Judge) -> bool:
    """Return whether any reading of the answer equals any of the gold.

    Raises Undecided where none does and some could not be compared.
    """
    if _all_clocks(answers) and _all_clocks(golds):
        answers, golds = answers[:1], golds[:1]
    undecided = False
    for answer in answers:
        for gold in golds:
            try:
                if _equal(answer, gold, judge):
                    return True
            except Undecided:
                undecided = True
    if undecided:
        raise Undecided
    return False


def _all_clocks(values: Sequence[Value]) -> bool:
    return bool(values) and isinstance(values[0], Clock)


def _equal(a: Value, b: Value, judge: Judge) -> bool:
    if isinstance(a, Unread) or isinstance(b, Unread):
        return _unread(a, b)
    if isinstance(a, Equation) or isinstance(b, Equation):
        return _equations(a, b, judge)
    for kind, compare in _SAME_KIND:
        if isinstance(a, kind) and isinstance(b, kind):
            return compare(a, b, judge)
    for first, second in ((a, b), (b, a)):
        if isinstance(first, Numeral) and isinstance(second, Scalar):
            value = exact(second.node)
            return value is not None and str(value) == first.digits
        if isinstance(first, Ratio) and isinstance(second, Scalar) and len(first.terms) == 2:
            return not second.units and judge.equal(("div", *first.terms), second.node)
        if isinstance(first, Items) and first.kind == "set" and isinstance(second, Scalar):
            return len(first.items) == 1 and _equal(first.items[0], second, judge)
        if isinstance(first, Items) and first.kind == "set" and not first.items and isinstance(second, Words):
            return second.text in ("none", "no solution")
        if isinstance(first, Items) and first.kind == "list" and isinstance(second, Scalar):
            # The list is one answer, written in several ways.
            return all(_equal(item, second, judge) for item in first.items)
    return False


def _unread(a: Value, b: Value) -> bool:
    """Return False for words and times, which are no mathematics; raises Undecided where a form is not read here."""
    if isinstance(a, Words | Clock) or isinstance(b, Words | Clock):
        return False
    raise Undecided


# --- numbers ----------------------------------------------------------------------------------------------------


def _scalars(a: Scalar, b: Scalar, judge: Judge) -> bool:
    if a.units and b.units:
        return any(_quantities(a.node, unit, b.node, other, judge) for unit in a.units for other in b.units)
    if (a.units and b.label) or (b.units and a.label) or (a.label and b.label and not a.label & b.label):
        return False
    if judge.equal(a.node, b.node):
        return True
    for first, second in ((a, b), (b, a)):
        for unit in first.units:
            if unit.dimensions == PERCENT.dimensions and judge.equal(_times(first.node, Fraction(1, 100)), second.node):
                return True
            if unit.dimensions == DOZEN.dimensions and judge.equal(_times(first.node, Fraction(12)), second.node):
                return True
            if unit.dimensions == DEGREE.dimensions and contains(second.node, "const"):
                return judge.equal(_in_radians(first.node), second.node)
    return False


def _times(node: Node, factor: Fraction) -> Node:
    return node if factor == 1 else ("mul", node, ("num", factor, 0))


def _in_radians(node: Node) -> Node:
    return ("mul", node, ("div", ("const", "pi"), number(180)))


def _quantities(a: Node, unit: Unit, b: Node, other: Unit, judge: Judge) -> bool:
    if unit.dimensions == other.dimensions:
        if unit.offset != other.offset:
            a, b = ("add", _times(a, unit.factor), ("num", unit.offset, 0)), _times(b, other.factor)
            return judge.equal(a, ("add", b, ("num", other.offset, 0)))
        return judge.equal(_times(a, unit.factor / other.factor), b)
    for (x, p), (y, q) in (((a, unit), (b, other)), ((b, other), (a, unit))):
        if p.dimensions == DEGREE.dimensions and q.dimensions == RADIAN.dimensions:
            return judge.equal(_in_radians(x), y)
    if _powers(unit) == _powers(other) and (_counted(unit) or _counted(other)):
        return judge.equal(a, b)
    return False


def _powers(unit: Unit) -> list[int]:
    return sorted(power for _, power in unit.dimensions)


def _counted(unit: Unit) -> bool:
    return [name for name, _ in unit.dimensions] == [COUNTED]


def _numerals(a: Numeral, b: Numeral, judge: Judge) -> bool:
    return a == b


def _ratios(a: Ratio, b: Ratio, judge: Judge) -> bool:
    return len(a.terms) == len(b.terms) and all(
        judge.equal(("mul", x, b.terms[0]), ("mul", a.terms[0], y)) for x, y in zip(a.terms, b.terms, strict=True)
    )


def _clocks(a: Clock, b: Clock, judge: Judge) -> bool:
    if a.half and b.half:
        return a.minutes % 1440 == b.minutes % 1440
    if a.half or b.half:
        stated, open_ = (a, b) if a.half else (b, a)
        return stated.minutes % 720 == open_.minutes % 720 and (open_.minutes <= 780)
    return a.minutes == b.minutes


def _words(a: Words, b: Words, judge: Judge) -> bool:
    return a.text == b.text


# --- several values ---------------------------------------------------------------------------------------------


def _items(a: Items, b: Items, judge: Judge) -> bool:
    kinds = {a.kind, b.kind}
    if "numbers" in kinds:
        return kinds == {"numbers", "list"} and _in_order(a.items, b.items, judge)
    if kinds == {"tuple"}:
        return _in_order(a.items, b.items, judge)
    if "tuple" in kinds:
        listed, point = (a, b) if b.kind == "tuple" else (b, a)
        return listed.kind == "list" and _in_order(_assigned(listed.items), point.items, judge)
    if "set" in kinds:
        return _covers(a.items, b.items, judge) and _covers(b.items, a.items, judge)
    return len(a.items) == len(b.items) and _matched(list(a.items), list(b.items), judge)


def _assigned(items: Sequence[Value]) -> list[Value]:
    """Return the values of `y = 7, x = 3` in the order of their names; other items unchanged."""
    if all(isinstance(item, Equation) and item.left is not None and item.left[0] == "var" for item in items):
        return [item.right for item in sorted(items, key=lambda item: str(item.left))]  # type: ignore[union-attr]
    return list(items)


def _in_order(a: Sequence[Value], b: Sequence[Value], judge: Judge) -> bool:
    return len(a) == len(b) and all(_equal(x, y, judge) for x, y in zip(a, b, strict=True))


def _covers(a: Sequence[Value], b: Sequence[Value], judge: Judge) -> bool:
    """Return whether every item of `a` is one of `b`."""
    if len(a) > MANY or len(b) > MANY:
        return _sorted_exactly(a) == _sorted_exactly(b)
    return all(any(_equal(x, y, judge) for y in b) for x in a)


def _matched(a: list[Value], b: list[Value], judge: Judge) -> bool:
    if len(a) > MANY:
        return _sorted_exactly(a) == _sorted_exactly(b)
    return _paired(a, b, lambda x, y: _equal(x, y, judge))


def _paired(firsts: Sequence[_Item], seconds: Sequence[_Item], same: Callable[[_Item, _Item], bool]) -> bool:
    """Return whether every item of `firsts` can be paired with an item of `seconds` of its own that is the same."""
    rest = list(seconds)
    for first in firsts:
        at = next((i for i, second in enumerate(rest) if same(first, second)), None)
        if at is None:
            return False
        rest.pop(at)
    return True


def _sorted_exactly(values: Sequence[Value]) -> list[Fraction]:
    found = [exact(value.node) if isinstance(value, Scalar) else None for value in values]
    if any(value is None for value in found):
        raise Undecided
    return sorted(value for value in found if value is not None)


def _matrices(a: Matrix, b: Matrix, judge: Judge) -> bool:
    return len(a.rows) == len(b.rows) and all(_in_order(x, y, judge) for x, y in zip(a.rows, b.rows, strict=True))


def _regions(a: Region, b: Region, judge: Judge) -> bool:
    first, second = _merged(a.spans), _merged(b.spans)
    return len(first) == len(second) and _paired(first, second, lambda x, y: _spans(x, y, judge))


def _spans(a: Span, b: Span, judge: Judge) -> bool:
    for x, y, same in (
        (a.low, b.low, a.low_closed == b.low_closed),
        (a.high, b.high, a.high_closed == b.high_closed),
    ):
        if (x is None) != (y is None) or not same:
            return False
        if x is not None and y is not None and not judge.equal(x, y):
            return False
    return True


def _merged(spans: Sequence[Span]) -> list[Span]:
    """Join intervals that overlap or touch, where all ends are rational."""
    keyed = []
    for span in spans:
        low = exact(span.low) if span.low is not None else Fraction(-(10**40))
        high = exact(span.high) if span.high is not None else Fraction(10**40)
        if low is None or high is None:
            return list(spans)
        keyed.append((low, not span.low_closed, high, span))
    keyed.sort(key=lambda entry: entry[:2])
    found: list[tuple[Fraction, Span]] = []
    for low, _, high, span in keyed:
        if low > high or (low == high and not (span.low_closed and span.high_closed)):
            # The interval is empty.
            continue
        if found:
            end, last = found[-1]
            if low < end or (low == end and (span.low_closed or last.high_closed)):
                wider = high > end or (high == end and span.high_closed)
                tail = span if wider else last
                found[-1] = (max(end, high), Span(last.low, last.low_closed, tail.high, tail.high_closed))
                continue
        found.append((high, span))
    return [span for _, span in found]


# --- equations --------------------------------------------------------------------------------------------------


def _equations(a: Value, b: Value, judge: Judge) -> bool:
    if isinstance(a, Equation) and isinstance(b, Equation):
        if a.left is None or b.left is None:
            return _equal(a.right, b.right, judge)
        if a.left == b.left and _equal(a.right, b.right, judge):
            return True
        if not (isinstance(a.right, Scalar) and isinstance(b.right, Scalar)):
            return False
        if a.left[0] == b.left[0] == "var" and not (contains(a.right.node, "var") or contains(b.right.node, "var")):
            return a.left == b.left and _equal(a.right, b.right, judge)
        return judge.proportional(_difference(a), _difference(b))
    equation, other = (a, b) if isinstance(a, Equation) else (b, a)
    assert isinstance(equation, Equation)
    return _equal(equation.right, other, judge)


def _difference(equation: Equation) -> Node:
    assert equation.left is not None
    assert isinstance(equation.right, Scalar)
    return ("add", equation.left, ("neg", equation.right.node))


_SAME_KIND: tuple[tuple[type, Callable[..., bool]], ...] = (
    (Scalar, _scalars),
    (Numeral, _numerals),
    (Ratio, _ratios),
    (Clock, _clocks),
    (Words, _words),
    (Items, _items),
    (Matrix, _matrices),
    (Region, _regions),
)
