r"""The kinds of answers: a number with a unit, a list, an interval, a matrix, an equation, a time, words."""

from __future__ import annotations

from dataclasses import dataclass, field

from influence_fast.evaluation.expressions import Node
from influence_fast.evaluation.units import Unit


@dataclass(frozen=True, slots=True)
class Scalar:
    """A number or expression; `units` are the possible meanings of its unit, `label` the other words behind it."""

    node: Node
    units: tuple[Unit, ...] = ()
    label: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Numeral:
    """The digits of a number in a base that is written to it: `101_2`."""

    digits: str
    base: int


@dataclass(frozen=True, slots=True)
class Items:
    """Several values: a `list` (`3, 7`), `set` (`{3, 7}`), `tuple` (`(3, 7)`) or `numbers` (`1,234` read as a list)."""

    kind: str
    items: tuple[Value, ...]


@dataclass(frozen=True, slots=True)
class Span:
    """An interval; an end that is None is infinite."""

    low: Node | None
    low_closed: bool
    high: Node | None
    high_closed: bool


@dataclass(frozen=True, slots=True)
class Region:
    """A union of intervals."""

    spans: tuple[Span, ...]


@dataclass(frozen=True, slots=True)
class Matrix:
    """Rows of a matrix or vector."""

    rows: tuple[tuple[Value, ...], ...]


@dataclass(frozen=True, slots=True)
class Equation:
    """An equation `left = right`; a chain of equalities keeps its first and last side. `left` is None for words."""

    left: Node | None
    right: Value


@dataclass(frozen=True, slots=True)
class Clock:
    """A time of day, in minutes after midnight; `half` says whether a.m., p.m. or 24 hours leave no doubt."""

    minutes: int
    half: bool


@dataclass(frozen=True, slots=True)
class Ratio:
    """A ratio `a : b` of two or more terms."""

    terms: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Words:
    """An answer in words, without case, punctuation and articles; one letter keeps its case."""

    text: str


@dataclass(frozen=True, slots=True)
class Unread:
    """Mathematics that is none of the forms above."""

    text: str = field(default="")


Value = Scalar | Numeral | Items | Region | Matrix | Equation | Clock | Ratio | Words | Unread
