"""Contrast queries: the difference of a wrong and a right answer to the same question.

For a question v with right answers R and wrong answers W,

    c_v = mean over w in W of u(w) - mean over r in R of u(r),    u(q) = H^-1 q / |H^-1/2 q|

and a training example's contrast score is the mean over questions of its inner product with c_v, divided by the
example's own length where the preconditioner does so (`cosine`, `ekfac_cosine`, ...). What both answers share, the
question, its topic and the style of a solution, falls out of the difference; what remains tells the mistake. High:
more training on the example makes wrong answers likelier than right ones. Unit lengths keep one long gradient from
deciding alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from influence_fast.errors import DataError


class Pair(NamedTuple):
    """Places, among the queries, of the right and the wrong answers to one question."""

    right: tuple[int, ...]
    wrong: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Pairs:
    """Pairs of right and wrong answers, and the questions that have only one kind.

    Attributes:
        pairs: one a question that has both kinds, in the order of the questions' first answers.
        right_only, wrong_only: the names of the other questions.
    """

    pairs: tuple[Pair, ...]
    right_only: tuple[str, ...]
    wrong_only: tuple[str, ...]


def pair_answers(questions: Sequence[str], groups: Mapping[str, Sequence[int]]) -> Pairs:
    """Pair right and wrong answers to the same question.

    Args:
        questions: of each query, the name of the question that it answers.
        groups: places of the queries that are "correct" and "incorrect"; others are left alone.

    Returns:
        A `Pairs`.

    Raises:
        DataError: a place that is no query's, or that is in both groups.

    Example:
        >>> from influence_fast.influence.contrast import pair_answers
        >>> pair_answers(["a", "a", "b"], {"correct": [0, 2], "incorrect": [1]})
        Pairs(pairs=(Pair(right=(0,), wrong=(1,)),), right_only=('b',), wrong_only=())
    """
    right, wrong = (sorted(set(groups.get(name, ()))) for name in ("correct", "incorrect"))
    if set(right) & set(wrong):
        raise DataError(f"queries are both correct and incorrect: {sorted(set(right) & set(wrong))}")
    found: dict[str, tuple[list[int], list[int]]] = {}
    for place in sorted([*right, *wrong]):
        if not 0 <= place < len(questions):
            raise DataError(f"the groups name query {place}, and there are {len(questions)}")
        found.setdefault(questions[place], ([], []))[place in set(wrong)].append(place)
    return Pairs(
        tuple(Pair(tuple(r), tuple(w)) for r, w in found.values() if r and w),
        tuple(name for name, (_, w) in found.items() if not w),
        tuple(name for name, (r, _) in found.items() if not r),
    )


def unit_queries(queries: torch.Tensor, preconditioned: torch.Tensor) -> torch.Tensor:
    """Divide H^-1 q of each query by |H^-1/2 q| = sqrt(q . H^-1 q), [Q, k] fp64; zero rows stay zero."""
    wide = preconditioned.double()
    lengths = (queries.double() * wide).sum(dim=1, keepdim=True).clamp(min=0).sqrt()
    return wide / torch.where(lengths > 0, lengths, 1.0)


def contrasts(unit: torch.Tensor, pairs: Sequence[Pair]) -> torch.Tensor:
    """Return the contrast c_v of each pair, [P, k] fp64, of unit-length preconditioned queries [Q, k].

    Raises DataError if there is no pair, one lacks a side, or names a place that is no query's.
    """
    if not pairs:
        raise DataError("no question has both a right and a wrong answer, so there is nothing to contrast")
    signs = torch.zeros(len(pairs), len(unit), dtype=torch.float64)
    for row, (right, wrong) in enumerate(pairs):
        for places, sign in ((right, -1.0), (wrong, 1.0)):
            if not places or min(places) < 0 or max(places) >= len(unit):
                raise DataError(f"pair {row} is {tuple(right)} and {tuple(wrong)}, of {len(unit)} queries")
            signs[row, list(places)] += sign / len(places)
    return signs @ unit.double().cpu()
