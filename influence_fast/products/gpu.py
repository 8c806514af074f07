"""Inner products of int8 and bf16 rows on a GPU: the product by cuBLAS, everything else in one pass over its tiles.

Rows are taken tile by tile, so that a tile's products are still in the L2 cache when `kernels.score_tile` takes scores,
group sums, columns and the top k from them, and the full [N, Q] matrix never exists. Ranks are PyTorch's sort of whole
columns and `kernels.column_ranks`. Needs Triton and no compiler; where csrc/cuda was compiled, its kernel streams rows
of the host, and takes the rows that `by_hand` names.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from influence_fast.kernels import column_ranks, row_factors, score_tile
from influence_fast.kernels.runtime import unavailable
from influence_fast.products import cuda, native, pytorch
from influence_fast.products.blocks import Block, Wanted
from influence_fast.products.terms import GRANULE, Terms

__all__ = ["KINDS", "Queries", "TopK", "by_hand", "finish", "rank", "score", "why_not"]

KINDS = cuda.KINDS
_TILE_BYTES = 32 << 20  # of products: they stay in the L2 cache (50 MB on an H200) until they are read
_COPY_BYTES = 64 << 20  # of rows copied to where cuBLAS takes them
_ROW_MULTIPLE = 128
_FEWEST_ROWS = 32  # torch._int_mm refuses 16 and fewer
_QUERY_MULTIPLE = 8  # and numbers of queries that are no multiple of this
# |row| <= 128 times |query| <= 127 stays below 2^31 over these.
_INT8_COLUMNS = 131_072
# Tensor cores cut their fp32 sums off where others round: some 5e-6 of a sum over 4096 columns, in proportion beyond.
# Queries in one term of bf16 are off by up to 4e-3 themselves, so twice as long sums do not show there.
_BF16_COLUMNS = {1: 8192, 2: 4096}
# Queries up to which the kernel of csrc/cuda takes rows at odd addresses; see `by_hand`.
_FEW_QUERIES = 64


def why_not(device: torch.device) -> str:
    """Return why this engine cannot run on `device`, or an empty string."""
    return unavailable(device)


def by_hand(rows: Tensor, queries: int) -> bool:
    """Tell whether the mma kernel of csrc/cuda is to take rows that lie on the GPU, in place of cuBLAS.

    Only where cuBLAS cannot read the rows as they lie (addresses, strides or widths that are no multiples of 16 bytes),
    so that they would first be copied, and there are few queries. On an H200, 200,000 rows of 8,192 numbers,
    milliseconds in which the GPU is busy (docs/results.md; a copy reads and writes the rows at 4 TB/s):

        queries   int8: mma   cuBLAS   copy      bf16: mma   cuBLAS   copy
        2              0.69    <0.55    0.8           1.32     0.99    1.6
        64             0.88     0.55    0.8           1.83     0.86    1.6
        512            3.66     2.32    0.8           7.57     2.07    1.6

    Rows that cuBLAS can read it always reads faster; with its copy it loses up to 64 queries and wins at 512.
    """
    return not _fits_cublas(rows) and queries <= _FEW_QUERIES


class Queries:
    """Queries as cuBLAS takes them: one or two terms of the rows' dtype.

    values: [Q, k] fp32 on the device. rows: "bfloat16" or "int8". high: a second term holds what the first rounded
    away. isa and threads are not used.
    """

    def __init__(self, values: Tensor, rows: str, high: bool = False, isa: str = "", threads: int = 1) -> None:
        self.values, self.rows, self.high, self.device = values, rows, high, values.device
        self.terms = Terms(values, rows, high, _QUERY_MULTIPLE)
        self.count, self.width = self.terms.count, self.terms.width
        columns = self.terms.terms.shape[2]
        longest = _INT8_COLUMNS if rows == "int8" else _BF16_COLUMNS[self.terms.terms.shape[0]]
        self.stretches = [(first, min(columns, first + longest)) for first in range(0, columns, longest)]
        self.flags: list[tuple[int, Tensor]] = []  # (first row, int32 [n]: 1 where a score is not finite)
        self._planes: Tensor | None = None
        self._tables: tuple[Any, Any, score_tile.GroupTables] | None = None
        self._factors: dict[bool, Tensor] = {}
        self._mma: cuda.Queries | None = None

    @property
    def tile_rows(self) -> int:
        """Rows of a tile, whose products fill _TILE_BYTES."""
        planes, padded, _ = self.terms.terms.shape
        fit = _TILE_BYTES // (4 * max(1, padded) * planes * len(self.stretches))
        return max(_ROW_MULTIPLE, fit // _ROW_MULTIPLE * _ROW_MULTIPLE)

    def planes(self, rows: int) -> Tensor:
        """Return memory for the products of a tile: [planes, rows, Q (padded)], kept for the next one."""
        terms, padded, _ = self.terms.terms.shape
        dtype = torch.int32 if self.rows == "int8" else torch.float32
        shape = (terms * len(self.stretches), rows, padded)
        if self._planes is None or self._planes.shape != shape:
            self._planes = torch.empty(shape, dtype=dtype, device=self.device)
        return self._planes

    def factors(self, normalize: bool) -> Tensor:
        """Return what each plane is multiplied by, [planes, Q]."""
        if normalize not in self._factors:
            by_term = self.terms.factors(normalize)
            self._factors[normalize] = by_term.repeat_interleave(len(self.stretches), 0).contiguous()
        return self._factors[normalize]

    def tables(self, begin: Any, query: Any) -> score_tile.GroupTables:
        """Return the members of each group on the device; made once for the same lists."""
        if self._tables is None or self._tables[0] is not begin or self._tables[1] is not query:
            self._tables = (begin, query, score_tile.GroupTables.of(begin, query, self.count, self.device))
        return self._tables[2]

    def for_mma(self) -> cuda.Queries:
        """Return the same queries for the kernel of csrc/cuda."""
        if self._mma is None:
            self._mma = cuda.Queries(self.values, self.rows, self.high)
        return self._mma


class TopK(pytorch.TopK):
    """The k highest scores of each query, ties to the lower row; kept on the device of the first scores."""

    def __init__(self, queries: int, k: int, threads: int = 1) -> None:
        super().__init__(queries, k, threads)
        self._queries = queries
        self._running: score_tile.RunningTop | None = None

    def running(self, tile_rows: int, device: torch.device) -> score_tile.RunningTop | None:
        """Return the list that `score_tile` merges tiles of so many rows into; None for more rows than it keeps."""
        if self.k > score_tile.MOST_KEPT:
            return None
        held = self._running
        if held is None or held.candidates.shape[1] < tile_rows:
            made = score_tile.RunningTop.of(self._queries, self.k, tile_rows, device)
            if held is not None:
                made.keys.copy_(held.keys)
            self._running = held = made
        return held

    def offer(self, start: int, scores: Tensor) -> None:
        """Take scores [n, Q] of rows start ... start + n, later than all rows before."""
        top = self.running(scores.shape[0], scores.device)
        if top is None:
            return super().offer(start, scores)
        ones = torch.ones(1, scores.shape[1], device=scores.device)
        bad = torch.empty(scores.shape[0], dtype=torch.int32, device=scores.device)
        score_tile.score_tile(score_tile.Tile(scores[None], ones, bad, start), score_tile.TileResults(top=top))

    def result(self) -> tuple[Any, Any]:
        """Return fp32 scores and int64 rows [Q, k] as numpy arrays."""
        if self._running is not None:
            self.scores, self.rows = self._running.result()
        return super().result()


def score(queries: Queries, block: Block, wanted: Wanted) -> list[int]:
    """Queue the work of a block on PyTorch's current stream; `finish` names the rows with a score that is not finite.

    rows, scales and scores may be numpy arrays or tensors of the device; columns and group_sums are of the device.
    """
    on_device = isinstance(block.rows, Tensor) and block.rows.device == queries.device
    if not native.cuda_why() and (not on_device or by_hand(block.rows, queries.count)):
        return cuda.score(queries.for_mma(), block, wanted)
    n = block.rows.shape[0]
    flags = torch.zeros(n, dtype=torch.int32, device=queries.device)
    queries.flags.append((block.start, flags))
    if n == 0 or queries.count == 0:
        return []
    out = pytorch.tensor(wanted.scores) if wanted.scores is not None else None
    direct = out is not None and out.device == queries.device and (out.stride(1) == 1 or queries.count == 1)
    rows_at_once = min(queries.tile_rows, -(-n // _ROW_MULTIPLE) * _ROW_MULTIPLE)
    if not on_device or not _fits_cublas(block.rows):
        row_bytes = queries.terms.terms.shape[2] * queries.terms.terms.element_size()
        copied = _COPY_BYTES // row_bytes // _ROW_MULTIPLE * _ROW_MULTIPLE
        rows_at_once = min(rows_at_once, max(_ROW_MULTIPLE, copied))
    for first in range(0, n, rows_at_once):
        last = min(n, first + rows_at_once)
        part, asked = block.part(first, last), wanted.part(first, last)
        held = None
        if out is not None:
            held = out[first:last] if direct else torch.empty(last - first, queries.count, device=queries.device)
        unmerged = _score_tile(queries, part, asked, flags[first:last], held)
        if out is not None and held is not None and not direct:
            out[first:last] = held
        if unmerged is not None:
            wanted.topk.offer(part.start, unmerged)
    return []


def _score_tile(queries: Queries, part: Block, wanted: Wanted, bad: Tensor, scores: Tensor | None) -> Tensor | None:
    """Multiply a tile and take its results; return its scores where the top k is longer than the pass keeps."""
    rows = _as_tensor(part.rows).to(queries.device)
    n = rows.shape[0]
    scales = None if part.scales is None else pytorch.tensor(part.scales).to(queries.device)
    by_row = row_factors.row_factors(_contiguous(rows), scales) if wanted.normalize else scales
    planes = multiply(queries, rows)[:, :n]
    top = None if wanted.topk is None else wanted.topk.running(n, queries.device)
    unmerged = wanted.topk is not None and top is None
    if unmerged and scores is None:
        scores = torch.empty(n, queries.count, device=queries.device)
    tables = None if wanted.group_sums is None else queries.tables(wanted.group_begin, wanted.group_query)
    score_tile.score_tile(
        score_tile.Tile(planes, queries.factors(wanted.normalize), bad, part.start, by_row),
        score_tile.TileResults(scores, wanted.columns, wanted.group_sums, tables, top),
    )
    return scores if unmerged else None


def multiply(queries: Queries, rows: Tensor) -> Tensor:
    """Return the products of rows [n, k] with the terms of queries, [planes, at least n, Q (padded)].

    A plane is one term over one stretch of columns, short enough to be summed in int32, or in the fp32 of tensor cores.
    """
    n = rows.shape[0]
    columns = queries.terms.terms.shape[2]
    if n < _FEWEST_ROWS or not _fits_cublas(rows):
        copy = torch.zeros(max(n, _FEWEST_ROWS), columns, dtype=rows.dtype, device=rows.device)
        copy[:n, : rows.shape[1]] = rows
        rows = copy
    planes = queries.planes(rows.shape[0])
    places = [(term, *stretch) for term in queries.terms.terms for stretch in queries.stretches]
    for plane, (term, first, last) in zip(planes, places, strict=True):
        left, right = rows[:, first:last], term[:, first:last].T
        if queries.rows == "int8":
            torch._int_mm(left, right, out=plane)
        elif rows.device.type == "cuda":
            # In fp32: a product of two bf16 matrices is rounded to bf16 otherwise.
            torch.ops.aten.mm.dtype_out(left, right, torch.float32, out=plane)
        else:
            torch.mm(left.float(), right.float(), out=plane)
    return planes


def finish(queries: Queries) -> list[int]:
    """Wait for all blocks; return the rows with a NaN or infinite score, in order."""
    bad: list[int] = [] if queries._mma is None else cuda.finish(queries._mma)
    for start, flags in queries.flags:
        bad += (start + torch.nonzero(flags)[:, 0]).tolist()
    queries.flags.clear()
    return sorted(bad)


def rank(columns: Tensor, group_begin: Any, group_query: Any, sums: Tensor, threads: int = 1) -> None:
    """Add ranks (1 = lowest, ties averaged) in the columns [Q, N] of each group to `sums` [N, G].

    The columns are overwritten.
    """
    lists = [torch.from_numpy(np.asarray(part, np.int32)).to(columns.device) for part in (group_begin, group_query)]
    column_ranks.add_column_ranks(columns, lists[0], lists[1], sums)


def _fits_cublas(rows: Tensor) -> bool:
    """Tell whether cuBLAS reads rows as they lie: addresses, strides and widths in whole granules."""
    size = rows.element_size()
    places = (rows.data_ptr(), rows.stride(0) * size, rows.shape[1] * size)
    apart = rows.stride(1) == 1 and rows.stride(0) >= rows.shape[1] > 0
    return apart and all(place % GRANULE == 0 for place in places)


def _as_tensor(rows: Any) -> Tensor:
    """Rows as int8 or bfloat16."""
    made = pytorch.tensor(rows)
    return made.view(torch.bfloat16) if made.dtype == torch.int16 else made


def _contiguous(rows: Tensor) -> Tensor:
    return rows if rows.shape[1] < 2 or rows.stride(1) == 1 else rows.contiguous()
