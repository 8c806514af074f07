# mypy: disable-error-code="no-untyped-def"
"""Take scores, group sums and the top k from a tile of matrix products, in one pass over the tile.

    score[i, q] = row_factor[i] * sum_p factor[p, q] planes[p, i, q]

planes (P, n, >= Q) are products of n rows with Q queries as cuBLAS leaves them, int32 or float32: one for each term of
a query and each stretch of columns that is summed on its own. The tile is small enough to be in the L2 cache still, so
what this pass costs beside the product is a read of that cache, and the full (N, Q) matrix never exists.

A program owns some rows and goes through the queries block by block, so no other one adds to the group sums of its
rows: they need no atomics and have the same bits in every run. For the top k a score that beats the k-th best so far is
written to a list of candidates, in any order; `_merge_kernel` puts them in their places among the best. Score and row
make one 64-bit key, of which no two are equal, so the order in which candidates came does not show.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from influence_fast.errors import ConfigError
from influence_fast.kernels.runtime import Cost, ceil_div, check_device, check_shape, jit, launch, padded, tl

# A merge compares each new key with as many as are kept; PyTorch sorts where more are asked for.
MOST_KEPT = 1024
# Scores of a program at a time, 4 a thread, which load as 16 bytes. With 8 or 16 a thread spills registers where every
# result is wanted: the addresses of each are 64 bits.
_TILE = 1024
_COMPARED = 2048  # pairs of keys that a merge compares at a time, without spills either
LOWEST = -(2**63)  # key of a place that no row has taken
LAST_ROW = 2**32 - 1


@jit(do_not_specialize=["rows", "start"])
def _score_tile_kernel(
    planes,  # [P, n, stride_row] int32 or float32
    factor,  # [P, Q] float32
    row_factor,  # [n] float32, or unused
    bad,  # [n] int32: set to 1 where a score is not finite
    scores,  # [n, Q] float32, or unused
    columns,  # [Q, N] float32, or unused
    group_sums,  # [n, G] float64, added to, or unused
    entry_begin,  # [blocks + 1] int32: entries of each block of queries
    entry_group,  # [entries] int32
    entry_mask,  # [entries, BLOCK_Q] int8: 1 for the block's queries that are in the group
    best,  # [Q, K] int64, descending, or unused
    found,  # [Q] int32: candidates
    candidates,  # [Q, capacity] int64
    rows,  # n
    start,  # first row of the tile among all
    queries,  # Q
    keep,
    kept,  # K
    capacity,
    stride_plane,
    stride_row,
    stride_score,
    stride_column,
    stride_group,
    PLANES: tl.constexpr,
    BY_ROW: tl.constexpr,
    SCORES: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUPS: tl.constexpr,
    TOPK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    LAST_ROW: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    i_mask = i < rows
    by_row = tl.zeros([BLOCK_N], dtype=tl.float32) + 1.0
    if BY_ROW:
        by_row = tl.load(row_factor + i, mask=i_mask, other=0.0)
    unusable = tl.zeros([BLOCK_N], dtype=tl.int32)
    for block in range(0, tl.cdiv(queries, BLOCK_Q)):
        q = (block * BLOCK_Q + tl.arange(0, BLOCK_Q)).to(tl.int64)
        q_mask = q < queries
        mask = i_mask[:, None] & q_mask[None, :]
        value = tl.zeros([BLOCK_N, BLOCK_Q], dtype=tl.float32)
        for p in tl.static_range(PLANES):
            product = tl.load(planes + p * stride_plane + i[:, None] * stride_row + q[None, :], mask=mask, other=0)
            by_query = tl.load(factor + p * queries + q, mask=q_mask, other=0.0)
            value += product.to(tl.float32) * by_query[None, :]
        value *= by_row[:, None]
        # Both comparisons are false for a NaN.
        finite = (value < float("inf")) & (value > -float("inf"))
        unusable = tl.maximum(unusable, tl.max((mask & (finite == 0)).to(tl.int32), axis=1))
        if SCORES:
            tl.store(scores + i[:, None] * stride_score + q[None, :], value, mask=mask)
        if COLUMNS:
            tl.store(columns + q[None, :] * stride_column + start + i[:, None], value, mask=mask)
        if GROUPS:
            for entry in range(tl.load(entry_begin + block), tl.load(entry_begin + block + 1)):
                member = tl.load(entry_mask + entry * BLOCK_Q + tl.arange(0, BLOCK_Q))
                part = tl.where((member != 0)[None, :] & mask, value, 0.0)
                target = group_sums + i * stride_group + tl.load(entry_group + entry)
                before = tl.load(target, mask=i_mask, other=0.0)
                tl.store(target, before + tl.sum(part.to(tl.float64), axis=1), mask=i_mask)
            # The next block of queries may add to the same groups, by other threads.
            tl.debug_barrier()
        if TOPK:
            value = tl.where(value == 0.0, 0.0, value)  # -0 and 0 are one score
            bits = value.to(tl.int32, bitcast=True)
            ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
            key = (ordered.to(tl.int64) << 32) + (LAST_ROW - (start + i))[:, None]
            least = tl.load(best + q * kept + keep - 1, mask=q_mask, other=0)
            enters = mask & finite & (key > least[None, :])
            slot = tl.atomic_add(
                found + q[None, :] + tl.zeros([BLOCK_N, BLOCK_Q], dtype=tl.int64), 1, mask=enters, sem="relaxed"
            )
            tl.store(candidates + q[None, :] * capacity + slot, key, mask=enters)
    tl.store(bad + i, 1, mask=i_mask & (unusable != 0))


@jit
def _merge_kernel(
    best,  # [Q, KEPT] int64, descending
    found,  # [Q] int32, zeroed
    candidates,  # [Q, capacity] int64
    keep,
    capacity,
    KEPT: tl.constexpr,
    STEP: tl.constexpr,
    LOWEST: tl.constexpr,
):
    q = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, KEPT)
    step = tl.arange(0, STEP)
    best += q * KEPT
    candidates += q * capacity
    count = tl.load(found + q)
    for first in range(0, count, KEPT):
        more = tl.load(candidates + first + lane, mask=first + lane < count, other=LOWEST)
        if tl.max(more, axis=0) > tl.load(best + keep - 1):
            # All keys differ, so a key's place among both lists is the number of keys above it.
            top = tl.load(best + lane)
            top_place = lane
            more_place = tl.zeros([KEPT], dtype=tl.int32)
            for at in range(0, KEPT, STEP):
                new = tl.load(candidates + first + at + step, mask=first + at + step < count, other=LOWEST)
                old = tl.load(best + at + step)
                top_place += tl.sum((new[None, :] > top[:, None]).to(tl.int32), axis=1)
                more_place += tl.sum((new[None, :] > more[:, None]).to(tl.int32), axis=1)
                more_place += tl.sum((old[None, :] > more[:, None]).to(tl.int32), axis=1)
            tl.debug_barrier()  # all threads have read the old list
            tl.store(best + top_place, top, mask=(top_place < KEPT) & (top > LOWEST))
            tl.store(best + more_place, more, mask=(more_place < KEPT) & (more > LOWEST))
            tl.debug_barrier()  # the next step reads the new one
    tl.store(found + q, 0)


def query_block(queries: int) -> int:
    """Return how many queries a program takes at a time."""
    return min(padded(queries, 8), 128)


@dataclass(frozen=True, slots=True)
class GroupTables:
    """Members of groups by blocks of queries, on the device: an entry for each group with members in a block.

    begin: [blocks + 1] int32 entries of each block. group: [entries] int32. mask: [entries, `query_block`] int8.
    """

    begin: Tensor
    group: Tensor
    mask: Tensor

    @classmethod
    def of(cls, begin: np.ndarray, query: np.ndarray, queries: int, device: torch.device) -> GroupTables:
        """Cut lists of queries (those of group g are query[begin[g]:begin[g + 1]]) at the borders of the blocks."""
        width = query_block(queries)
        blocks = ceil_div(max(1, queries), width)
        group = np.repeat(np.arange(len(begin) - 1), np.diff(begin))
        order, entry = np.unique(query // width * max(1, len(begin) - 1) + group, return_inverse=True)
        mask = np.zeros((max(1, len(order)), width), np.int8)
        mask[entry, query % width] = 1
        of_block = order // max(1, len(begin) - 1)
        first = np.searchsorted(of_block, np.arange(blocks + 1)).astype(np.int32)
        groups = np.append(order % max(1, len(begin) - 1), 0).astype(np.int32)  # an address even where none is left
        return cls(*(torch.from_numpy(table).to(device) for table in (first, groups, mask)))


@dataclass(frozen=True, slots=True)
class RunningTop:
    """The best rows of each query so far, as keys that hold score and row, and room for a tile's candidates.

    keys: [Q, K] int64, descending, `LOWEST` where there is no row yet. found: [Q] int32, zeros between two tiles.
    candidates: [Q, capacity] int64, with a place for every row of a tile. keep: of the K, those that are asked for.
    """

    keys: Tensor
    found: Tensor
    candidates: Tensor
    keep: int

    @classmethod
    def of(cls, queries: int, keep: int, tile_rows: int, device: torch.device) -> RunningTop:
        """Make an empty list; raises ConfigError for more than MOST_KEPT rows a query."""
        if not 1 <= keep <= MOST_KEPT:
            raise ConfigError(f"score_tile: the top {keep} are asked for, and it keeps 1 to {MOST_KEPT}")
        keys = torch.full((queries, padded(keep, 32)), LOWEST, dtype=torch.int64, device=device)
        found = torch.zeros(queries, dtype=torch.int32, device=device)
        return cls(keys, found, torch.empty(queries, tile_rows, dtype=torch.int64, device=device), keep)

    def result(self) -> tuple[Tensor, Tensor]:
        """Return fp32 scores and int64 rows [Q, keep], highest first, ties to the lower row; -inf and -1 for none."""
        keys = self.keys[:, : self.keep]
        ordered = (keys >> 32).to(torch.int32)
        bits = ordered ^ ((ordered >> 31) & 0x7FFFFFFF)
        none = keys == LOWEST
        values = torch.where(none, -torch.inf, bits.view(torch.float32))
        return values, torch.where(none, -1, LAST_ROW - (keys & LAST_ROW))


@dataclass(frozen=True, slots=True)
class Tile:
    """Products of n rows with Q queries and where they belong.

    planes: (P, n, >= Q) int32 or float32, last dimension contiguous. factor: (P, Q) float32.
    bad: (n,) int32, set to 1 where a score of the row is not finite. start: the first row among all.
    row_factor: (n,) float32, or None for ones.
    """

    planes: Tensor
    factor: Tensor
    bad: Tensor
    start: int = 0
    row_factor: Tensor | None = None


@dataclass(frozen=True, slots=True)
class TileResults:
    """What is taken from a tile; None where not wanted.

    scores: (n, Q) float32, last dimension contiguous. columns: (Q, N) float32, of which the tile's rows are written.
    group_sums: (n, G) float64, added to, last dimension contiguous, by the lists of `groups`. top: merged into.
    """

    scores: Tensor | None = None
    columns: Tensor | None = None
    group_sums: Tensor | None = None
    groups: GroupTables | None = None
    top: RunningTop | None = None


def score_tile(tile: Tile, results: TileResults) -> None:
    """Take `results` from `tile`: queued on the current stream, the host waits for nothing.

    Raises ConfigError for shapes, dtypes or devices that do not fit.
    """
    name = "score_tile"
    check_shape(name, "planes", tile.planes, ("P", "n", "Q"))
    planes, rows, _ = tile.planes.shape
    check_shape(name, "factor", tile.factor, (planes, "Q"))
    queries = tile.factor.shape[1]
    check_shape(name, "bad", tile.bad, (rows,))
    device = check_device(name, planes=tile.planes, factor=tile.factor, bad=tile.bad, row_factor=tile.row_factor)
    _check(name, tile, results)
    if rows == 0 or queries == 0:
        return
    scores, columns, sums, top = results.scores, results.columns, results.group_sums, results.top
    block_q = query_block(queries)
    block_n = _TILE // block_q
    unused = tile.factor
    groups = results.groups if results.groups is not None else GroupTables(unused, unused, unused)
    launch(
        _score_tile_kernel,
        (ceil_div(rows, block_n),),
        {
            "planes": tile.planes,
            "factor": tile.factor,
            "row_factor": tile.row_factor if tile.row_factor is not None else unused,
            "bad": tile.bad,
            "scores": scores if scores is not None else unused,
            "columns": columns if columns is not None else unused,
            "group_sums": sums if sums is not None else unused,
            "entry_begin": groups.begin,
            "entry_group": groups.group,
            "entry_mask": groups.mask,
            "best": top.keys if top is not None else unused,
            "found": top.found if top is not None else unused,
            "candidates": top.candidates if top is not None else unused,
            "rows": rows,
            "start": tile.start,
            "queries": queries,
            "keep": top.keep if top is not None else 0,
            "kept": top.keys.shape[1] if top is not None else 0,
            "capacity": top.candidates.shape[1] if top is not None else 0,
            "stride_plane": tile.planes.stride(0),
            "stride_row": tile.planes.stride(1),
            "stride_score": scores.stride(0) if scores is not None else 0,
            "stride_column": columns.stride(0) if columns is not None else 0,
            "stride_group": sums.stride(0) if sums is not None else 0,
        },
        {
            "PLANES": planes,
            "BY_ROW": tile.row_factor is not None,
            "SCORES": scores is not None,
            "COLUMNS": columns is not None,
            "GROUPS": sums is not None,
            "TOPK": top is not None,
            "BLOCK_N": block_n,
            "BLOCK_Q": block_q,
            "LAST_ROW": LAST_ROW,
        },
        device=device,
        num_warps=8,
        num_stages=1,
    )
    if top is not None:
        _merge(top, device)


def _merge(top: RunningTop, device: torch.device) -> None:
    launch(
        _merge_kernel,
        (top.keys.shape[0],),
        {
            "best": top.keys,
            "found": top.found,
            "candidates": top.candidates,
            "keep": top.keep,
            "capacity": top.candidates.shape[1],
        },
        {"KEPT": top.keys.shape[1], "STEP": max(2, min(32, _COMPARED // top.keys.shape[1])), "LOWEST": LOWEST},
        device=device,
        num_warps=4,
        num_stages=1,
    )


def _check(name: str, tile: Tile, results: TileResults) -> None:
    """ConfigError where a result does not fit the tile."""
    (_, rows, width), queries = tile.planes.shape, tile.factor.shape[1]
    if width < queries or tile.planes.stride(2) != 1 or tile.planes.dtype not in (torch.int32, torch.float32):
        raise ConfigError(f"{name}: planes must be rows of at least {queries} int32 or float32 numbers")
    if not tile.factor.is_contiguous() or tile.start + rows > LAST_ROW:
        raise ConfigError(f"{name}: factor must be contiguous, and rows below {LAST_ROW}")
    if results.scores is not None:
        check_shape(name, "scores", results.scores, (rows, queries))
    if results.columns is not None:
        check_shape(name, "columns", results.columns, (queries, "N"))
        if tile.start + rows > results.columns.shape[1]:
            raise ConfigError(f"{name}: rows {tile.start} to {tile.start + rows} lie beyond the columns")
    if results.group_sums is not None:
        check_shape(name, "group_sums", results.group_sums, (rows, "G"))
        if results.groups is None or results.groups.mask.shape[1] != query_block(queries):
            raise ConfigError(f"{name}: group_sums need the `GroupTables` of {queries} queries")
    if results.top is not None and results.top.candidates.shape[1] < rows:
        raise ConfigError(f"{name}: the top k has room for {results.top.candidates.shape[1]} rows, and {rows} came")
    for key in ("scores", "columns", "group_sums"):
        array: Any = getattr(results, key)
        if array is not None and array.shape[1] > 1 and array.stride(1) != 1:
            raise ConfigError(f"{name}: the last dimension of {key} must be contiguous; call .contiguous() on it")


def reference(tile: Tile) -> Tensor:
    """Return the scores of a tile in float64: (n, Q)."""
    queries = tile.factor.shape[1]
    scores = (tile.planes[:, :, :queries].double() * tile.factor.double()[:, None]).sum(0)
    return scores if tile.row_factor is None else scores * tile.row_factor.double()[:, None]


def cost(planes: int, rows: int, queries: int, written: int) -> Cost:
    """Floor of one pass: a multiplication and an addition a product, each read once, and `written` bytes."""
    return Cost(2 * planes * rows * queries, 4 * planes * rows * queries + written)
