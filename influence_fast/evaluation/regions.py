r"""Read inequalities, unions and differences of sets as unions of intervals."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

from influence_fast.evaluation.answer_tokens import Token
from influence_fast.evaluation.expression_values import contains, exact
from influence_fast.evaluation.expressions import Node
from influence_fast.evaluation.quantities import node_of
from influence_fast.evaluation.values import Items, Region, Scalar, Span, Unread, Value, Words

ORDER = {"<": ("high", False), r"\le": ("high", True), ">": ("low", False), r"\ge": ("low", True)}
_FLIPPED = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le"}


def inequality(sides: Sequence[Sequence[Token]], signs: Sequence[str]) -> Region | None:
    nodes = [node_of(side) for side in sides]
    if any(node is None for node in nodes) or any(sign not in ORDER for sign in signs):
        return None
    ends: dict[str, tuple[Node | None, bool]] = {"low": (None, False), "high": (None, False)}
    middle = 1 if len(nodes) == 3 else 0 if nodes[0] and nodes[0][0] == "var" else 1
    variable = nodes[middle] if len(nodes) in (2, 3) else None
    if variable is None or variable[0] != "var":
        return None
    for at, node in enumerate(nodes):
        if at == middle:
            continue
        assert node is not None
        if contains(node, "var"):
            return None
        sign = signs[min(at, middle)]
        side, closed = ORDER[sign if at > middle else _FLIPPED[sign]]
        if ends[side] != (None, False):
            return None
        ends[side] = (None, False) if infinite(node) else (node, closed)
    return Region((Span(*ends["low"], *ends["high"]),))


def infinite(node: Node) -> bool:
    return node in (("const", "inf"), ("neg", ("const", "inf")))


def union(values: Sequence[Value]) -> Value:
    spans: list[Span] = []
    sets: list[Value] = []
    for value in values:
        if isinstance(value, Items) and value.kind == "tuple" and len(value.items) == 2:
            low, high = value.items
            if not (isinstance(low, Scalar) and isinstance(high, Scalar)):
                return Unread()
            spans.append(
                Span(
                    None if infinite(low.node) else low.node,
                    False,
                    None if infinite(high.node) else high.node,
                    False,
                )
            )
        elif isinstance(value, Region):
            spans += value.spans
        elif isinstance(value, Items) and value.kind == "set":
            sets += value.items
        else:
            return Unread()
    if sets and not spans:
        return Items("set", tuple(sets))
    for point in sets:
        if not isinstance(point, Scalar):
            return Unread()
        spans.append(Span(point.node, True, point.node, True))
    return Region(tuple(spans))


def intersection(regions: Sequence[Region]) -> Region | None:
    low: tuple[Node | None, bool] = (None, False)
    high: tuple[Node | None, bool] = (None, False)
    for region in regions:
        if len(region.spans) != 1:
            return None
        span = region.spans[0]
        for node, closed, is_low in ((span.low, span.low_closed, True), (span.high, span.high_closed, False)):
            if node is None:
                continue
            if (low if is_low else high)[0] is not None:
                return None
            if is_low:
                low = (node, closed)
            else:
                high = (node, closed)
    return Region((Span(*low, *high),))


def without_points(whole: Value, points: Value, text: str) -> Value:
    r"""Return `R \setminus {a, b}` as the intervals that remain, where the points are rational; else Unread."""
    if isinstance(whole, Unread | Words) and re.match(r"\s*\\mathbb\s*\{?\s*R", text):
        whole = Region((Span(None, False, None, False),))
    if not (isinstance(whole, Region) and whole.spans == (Span(None, False, None, False),)):
        return Unread(text)
    nodes = [item.node for item in points.items if isinstance(item, Scalar)] if isinstance(points, Items) else []
    if not nodes or any(exact(node) is None for node in nodes):
        return Unread(text)
    ends: list[Node | None] = [None, *sorted(nodes, key=lambda node: exact(node) or 0), None]
    return Region(tuple(Span(low, False, high, False) for low, high in itertools.pairwise(ends)))
