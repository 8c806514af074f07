"""What an engine is handed for one block of rows: the rows, and the results that are wanted of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

Array = Any  # numpy array or torch tensor


@dataclass(frozen=True, slots=True)
class Block:
    """Rows that follow one another: [n, k] with fp32 [n] scales or None, the first of them row `start` of all."""

    start: int
    rows: Array
    scales: Array | None = None

    def part(self, first: int, last: int) -> Block:
        """Return the rows `first` to `last` of this block as a block."""
        by_row = None if self.scales is None else self.scales[first:last]
        return Block(self.start + first, self.rows[first:last], by_row)


@dataclass(frozen=True, slots=True)
class Wanted:
    """Results of a block; None where not asked for.

    normalize: cosines in place of products
    scores: fp32 [n, Q] of the block, written
    columns: fp32 [Q, N] of all rows, of which the block's are written
    group_sums: float64 [n, G] of the block, added to
    group_begin, group_query: int64 lists of the groups' queries: those of g are query[begin[g]:begin[g + 1]]
    topk: the engine's `TopK`, which the block's scores are offered to
    """

    normalize: bool = False
    scores: Array | None = None
    columns: Array | None = None
    group_sums: Array | None = None
    group_begin: Any = None
    group_query: Any = None
    topk: Any = None
    threads: int = 1

    def part(self, first: int, last: int) -> Wanted:
        """Return what is wanted of the rows `first` to `last` of the block."""
        scores = None if self.scores is None else self.scores[first:last]
        sums = None if self.group_sums is None else self.group_sums[first:last]
        return replace(self, scores=scores, group_sums=sums)
