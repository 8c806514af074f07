r"""Evaluate parsed expressions exactly, and expand their `\pm` signs."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

from influence_fast.evaluation.expressions import Node

BITS = 200_000  # of an exact number; 2006! has 19,000


FACTORIALS = 5000  # the largest n whose n! is evaluated


def contains(node: Any, *names: str) -> bool:
    """Return whether an operation or kind of the given names occurs in a tree."""
    if not isinstance(node, tuple):
        return False
    return node[0] in names or any(contains(child, *names) for child in node[1:])


def signs_expanded(node: Node) -> list[Node]:
    r"""Return the two values of an expression with `\pm`, the upper signs first; itself where it has none."""
    if not contains(node, "pm", "mp"):
        return [node]
    return [_with_sign(node, upper) for upper in (True, False)]


def _with_sign(node: Any, upper: bool) -> Any:
    if not isinstance(node, tuple):
        return node
    if node[0] in ("pm", "mp"):
        inner = _with_sign(node[1], upper)
        return inner if (node[0] == "pm") == upper else ("neg", inner)
    return tuple(_with_sign(child, upper) for child in node)


def exact(node: Node) -> Fraction | None:
    """Evaluate a tree to its rational number; None for one that is not rational, or too large to hold.

    Example:
        >>> exact(("pow", ("num", Fraction(1, 2), 0), ("num", Fraction(3), 0)))
        Fraction(1, 8)
    """
    try:
        return _exact(node)
    except (_NotRational, ZeroDivisionError, OverflowError):
        return None


class _NotRational(Exception):
    pass


def _exact(node: Node) -> Fraction:
    kind = node[0]
    if kind == "num":
        return Fraction(node[1])
    if kind in ("var", "const", "call", "pm", "mp", "fact2"):
        raise _NotRational
    operands = [_exact(child) for child in node[1:]]
    if kind == "neg":
        return -operands[0]
    if kind == "fact":
        return Fraction(math.factorial(_whole(operands[0], FACTORIALS)))
    if kind == "binom":
        return Fraction(math.comb(_whole(operands[0], FACTORIALS), _whole(operands[1], FACTORIALS)))
    value = _OPERATIONS[kind](*operands)
    if value.numerator.bit_length() + value.denominator.bit_length() > BITS:
        raise _NotRational
    return value


def _whole(value: Fraction, largest: int) -> int:
    if value.denominator != 1 or not 0 <= value <= largest:
        raise _NotRational
    return int(value)


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator != 1:
        raise _NotRational
    if base in (1, 0) and exponent >= 0:
        return base if exponent else Fraction(1)
    bits = max(base.numerator.bit_length(), base.denominator.bit_length())
    if bits * abs(exponent) > BITS:
        raise _NotRational
    return Fraction(base ** int(exponent))


_OPERATIONS = {
    "add": lambda a, b: a + b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "pow": _power,
}
