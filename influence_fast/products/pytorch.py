"""The operations of `influence_fast._native` in PyTorch: the same names, arguments and results, on any device.

Used where the native module is missing and for tensors that are not on the CPU; the reference of the tests too.
Arrays may be numpy (memory is shared) or tensors of one device; bf16 rows are uint16 arrays or bfloat16 tensors.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from influence_fast.philox import philox4x32
from influence_fast.products.blocks import Block, Wanted
from influence_fast.row_codec import bf16_bits, int8_scales

_SLAB_BYTES = 1 << 26  # of fp32 rows or scores held at a time


class Queries:
    """Queries rounded as `csrc/queries.h` says: to the dtype of the rows, `high` keeping 16 significant bits.

    values: [Q, k] fp32. rows: "float32", "bfloat16" or "int8". isa and threads are not used.
    """

    def __init__(self, values: Any, rows: str, high: bool = False, isa: str = "", threads: int = 1) -> None:
        q = tensor(values).float()
        self.rows = rows
        self.count = q.shape[0]
        self.factor = torch.ones(q.shape[0], dtype=torch.float32, device=q.device)  # [Q], of `values`
        if rows == "int8":
            # by a plain number PyTorch multiplies with 1 / 127 on a card
            self.factor = q.abs().amax(1) / torch.full_like(self.factor, 127.0) if q.shape[1] else self.factor * 0
            t = (q / torch.where(self.factor > 0, self.factor, 1.0)[:, None]).clamp(-127, 127)
            q = t.round()
            if high:
                q = q + ((t - q) * 254.0).round() / 254.0
        elif rows == "bfloat16" and not high:
            q = q.bfloat16().float()
        self.values = q  # [Q, k]
        self.norm = torch.linalg.vector_norm(q, dim=1, dtype=torch.float64)  # [Q], before the factor


class TopK:
    """The k highest scores of each query, ties to the lower row."""

    def __init__(self, queries: int, k: int, threads: int = 1) -> None:
        self.k = k
        self.scores = torch.full((queries, k), -torch.inf)
        self.rows = torch.full((queries, k), -1, dtype=torch.int64)

    def offer(self, start: int, scores: Tensor) -> None:
        """scores: [n, Q] of rows start ... start + n, later than all rows before."""
        rows = torch.arange(start, start + len(scores), device=scores.device).expand(scores.shape[1], -1)
        all_scores = torch.cat([self.scores.to(scores.device), scores.T], 1)
        all_rows = torch.cat([self.rows.to(scores.device), rows], 1)
        best = torch.sort(all_scores, dim=1, descending=True, stable=True).indices[:, : self.k]
        self.scores, self.rows = all_scores.gather(1, best), all_rows.gather(1, best)

    def result(self) -> tuple[Any, Any]:
        return self.scores.cpu().numpy(), self.rows.cpu().numpy()


def score(queries: Queries, block: Block, wanted: Wanted) -> list[int]:
    """Compute what is wanted of a block; return its rows with a NaN or infinite score. See `csrc/score.h`."""
    n, k = block.rows.shape
    slab = max(1, _SLAB_BYTES // (4 * max(1, k, queries.count)))
    bad: list[int] = []
    for first in range(0, n, slab):
        last = min(n, first + slab)
        bad += _score_slab(queries, block.part(first, last), wanted.part(first, last))
    return bad


def _score_slab(queries: Queries, block: Block, wanted: Wanted) -> list[int]:
    device = queries.values.device
    x = _row_values(block.rows).to(device)  # [m, k]
    s = x @ queries.values.T  # [m, Q]
    by_row = torch.ones(len(x), device=device)
    if block.scales is not None:
        by_row = tensor(block.scales).to(device)
    if wanted.normalize:
        norm = torch.linalg.vector_norm(x, dim=1, dtype=torch.float64)
        sign = torch.where(torch.isfinite(by_row) & torch.isfinite(norm), by_row.sign(), torch.nan)
        by_row = torch.where(norm == 0, sign * 0, sign / norm).float()
        s = s * torch.where(queries.norm == 0, 0.0, 1.0 / queries.norm).float() * by_row[:, None]
    else:
        s = s * queries.factor * by_row[:, None]
    finite = torch.isfinite(s).all(1)
    bad = [] if finite.all() else (block.start + torch.nonzero(~finite)[:, 0]).tolist()
    if wanted.scores is not None:
        tensor(wanted.scores)[:] = s
    if wanted.columns is not None:
        tensor(wanted.columns)[:, block.start : block.start + len(x)] = s.T
    if wanted.group_sums is not None:
        sums = tensor(wanted.group_sums)
        for g, members in enumerate(_members(wanted.group_begin, wanted.group_query)):
            sums[:, g] += s[:, members.to(device)].sum(1, dtype=torch.float64)
    if wanted.topk is not None:
        wanted.topk.offer(block.start, s)
    return bad


def finish(queries: Queries) -> list[int]:
    """Return the rows with a NaN or infinite score that `score` has not named: none here."""
    return []


def rank(columns: Any, group_begin: Any, group_query: Any, sums: Any, threads: int = 1) -> None:
    """sums[row, g] += ranks (1 = lowest, ties averaged) in the columns of group g.  columns [Q, N], sums [N, G]"""
    by_column, total = tensor(columns), tensor(sums)
    groups = [set(members.tolist()) for members in _members(group_begin, group_query)]
    for c in range(by_column.shape[0]):
        inside = [g for g, members in enumerate(groups) if c in members]
        if inside:
            total[:, inside] += average_ranks(by_column[c])[:, None]


def average_ranks(values: Tensor) -> Tensor:
    """[N] -> fp64 [N], as scipy.stats.rankdata(values, method="average")."""
    ordered, place = values.sort()
    _, run, length = ordered.unique_consecutive(return_inverse=True, return_counts=True)
    last = length.cumsum(0)
    ranks = torch.empty(len(values), dtype=torch.float64, device=values.device)
    ranks[place] = ((last - length + 1 + last).double() / 2)[run]
    return ranks


def quantize(
    rows: Any, stochastic: bool, key0: int, key1: int, first_row: int, threads: int = 1
) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """See `csrc/quantize.h`; the same bytes as the native path."""
    x = tensor(rows).float()
    n, k = x.shape
    peak = x.abs().amax(1) if k else torch.zeros(n)
    finite = torch.isfinite(peak)
    scale = torch.where(finite, int8_scales(peak), 0.0)
    t = torch.where(scale[:, None] > 0, x / torch.where(scale > 0, scale, 1.0)[:, None], 0.0).clamp(-127, 127)
    if stochastic:
        row = torch.arange(first_row, first_row + n, dtype=torch.int64)[:, None]
        block = torch.arange(-(-k // 4), dtype=torch.int64)[None, :]
        counter = (block, row & 0xFFFFFFFF, row >> 32, torch.full((), 2, dtype=torch.int64))
        words = torch.stack(philox4x32(counter, (key0, key1)), -1).reshape(n, -1)[:, :k]
        low = t.floor()
        t = low + ((words >> 8).float() * 2.0**-24 < t - low).float()
    else:
        t = t.round()
    return t.to(torch.int8).numpy(), scale.numpy(), torch.nonzero(~finite)[:, 0].tolist()


def to_bf16(values: Any, threads: int = 1) -> np.ndarray:
    """fp32 [N, k] -> bf16 bits as uint16, to nearest even."""
    return bf16_bits(tensor(values))


def tensor(array: Any) -> Tensor:
    """A tensor over the same memory; a copy where PyTorch has no view: read-only memory, rows in reverse."""
    if isinstance(array, Tensor):
        return array
    if array.dtype == np.uint16:
        array = array.view(np.int16)
    copy = not array.flags.writeable or any(stride < 0 for stride in array.strides)
    return torch.from_numpy(array.copy() if copy else array)


def _row_values(rows: Any) -> Tensor:
    x = tensor(rows)
    if x.dtype == torch.int16:
        x = x.view(torch.bfloat16)
    return x.float()


def _members(begin: Any, query: Any) -> list[Tensor]:
    flat = torch.as_tensor(np.asarray(query))
    return [flat[b:e] for b, e in zip(begin[:-1].tolist(), begin[1:].tolist(), strict=True)]
