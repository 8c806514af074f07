"""Inner products of stored gradient rows with queries, and what selection needs of them, in one pass over the rows.

    scores[i, q] = row_scale[i] * sum_j rows[i, j] queries[q, j]      (divided by both norms with normalize=True)

The (N, Q) matrix is written only where it is asked for: group means, the top k and ranks are taken block by block,
while a block's scores are in cache. Ranks need whole columns, so as many columns as fit in 224 MiB are held at a time
and the rows are read once for each such set of columns. Memory above rows and results stays below 512 MiB, whatever
N and Q (up to 20 million rows; beyond, one column and its sort are 20 bytes a row).

The work is done by `influence_fast._native` (csrc/), or by `products.pytorch` where that is missing. On a CUDA
device int8 and bf16 rows that lie there are multiplied by cuBLAS and read once more by fused kernels (`products.gpu`),
those of the host are streamed to the kernels of csrc/cuda (`products.cuda`), and fp32 rows go to PyTorch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, overload

import numpy as np
import torch

from influence_fast.deprecation import also_called_as
from influence_fast.errors import DataError
from influence_fast.philox import key
from influence_fast.products import engines, native
from influence_fast.products.blocks import Block, Wanted
from influence_fast.products.inputs import (
    Array,
    Source,
    check_finite,
    check_groups,
    check_out,
    check_topk,
    positive,
    query_values,
    scoring_device,
    shape_of,
    source_of,
)
from influence_fast.products.options import ProductOptions, old_keywords

__all__ = ["InnerProducts", "ProductOptions", "inner_products", "quantize_rows", "to_bf16"]

_COLUMN_BYTES = 224 << 20  # fp32 columns held for ranks
_SORT_BYTES = 128 << 20  # 16 bytes a row for each thread that sorts
_QUERY_BYTES = 64 << 20  # packed queries
_MAX_COLUMNS = 4096  # of queries in one pass: bounds the scores of a block of rows


@dataclass(frozen=True, slots=True)
class InnerProducts:
    """Results of the fused call; None where not asked for. Arrays are of the kind of `rows` (numpy for stores).

    scores: fp32 [N, Q], the `out` that was given.
    group_means: fp32 [N, G], mean score over the queries of each group.
    mean_ranks: fp64 [N, G], mean over the queries of a group of the row's rank in that query's column:
        1 = lowest score, ties share the mean of their ranks (scipy.stats.rankdata(method="average")).
    topk: (fp32 values [Q, k], int64 rows [Q, k]), highest first, ties to the lower row.
    """

    scores: Array | None = None
    group_means: Array | None = None
    mean_ranks: Array | None = None
    topk: tuple[Array, Array] | None = None


@overload
def inner_products(
    rows: Any,
    queries: Array,
    *,
    row_scales: Array | None = ...,
    normalize: bool = ...,
    groups: None = ...,
    topk: None = ...,
    ranks: Literal[False] = ...,
    options: ProductOptions | None = ...,
) -> Array: ...
@overload
def inner_products(
    rows: Any,
    queries: Array,
    *,
    row_scales: Array | None = ...,
    normalize: bool = ...,
    groups: Sequence[Sequence[int]] | None = ...,
    topk: int | None = ...,
    ranks: bool = ...,
    options: ProductOptions | None = ...,
) -> InnerProducts: ...
@also_called_as(old_keywords())
def inner_products(
    rows: Any,
    queries: Array,
    *,
    row_scales: Array | None = None,
    normalize: bool = False,
    groups: Sequence[Sequence[int]] | None = None,
    topk: int | None = None,
    ranks: bool = False,
    options: ProductOptions | None = None,
) -> Array | InnerProducts:
    """Score N rows against Q queries; sums are accumulated in fp32 (int32 for int8 rows).

    Args:
        rows: [N, k] numpy array or torch tensor: fp32, bf16 (torch.bfloat16, or its bits as numpy uint16) or int8
            with `row_scales`; contiguous along k. Or a store: an object with `len()` and `blocks()`, which yields
            (index of the first row, [n, k] rows, fp32 [n] scales or None) in order, for example memory-mapped
            shards; its `ids`, if any, name rows in messages. CUDA tensors are scored on their device.
        queries: [Q, k] of any floating dtype.
        row_scales: fp32 [N], multiplied into the scores; required for int8 rows.
        normalize: cosines: divided by the norms of the row and of the query. A zero vector has cosine 0.
        groups: lists of query numbers (no names: a list of lists); they may overlap, and may not be empty.
        topk: rows to return for each query (at most N).
        ranks: mean rank of every row in the columns of each group (one group of all queries where `groups` is None).
        options: where scores are written, threads, precision and device; see `ProductOptions`.

    Returns:
        fp32 scores [N, Q] (`options.out` if given), or `InnerProducts` when any of `groups`, `topk` and `ranks` is
        given.

    Raises:
        DataError: shapes, dtypes or strides do not fit, or a group is empty or names no query.
        NumericError: a NaN or infinite value in the queries, or in rows, which are named.
        ConfigError: unknown `isa`, or a `device` that is not there.

    Example:
        >>> rows, queries = np.eye(3, dtype=np.float32), np.ones((2, 3), np.float32)
        >>> inner_products(rows, queries).shape
        (3, 2)
        >>> inner_products(rows, queries, groups=[[0, 1]]).group_means.tolist()
        [[1.0], [1.0], [1.0]]
    """
    choices = ProductOptions() if options is None else options
    source = source_of(rows, row_scales)
    if source.kind == "int8" and row_scales is None and source.array is not None:
        raise DataError("int8 rows need row_scales, one a row; pass numpy.ones(N, numpy.float32) for plain integers")
    q_count, width = shape_of(queries, "queries")
    if source.count and width != source.width:
        raise DataError(
            f"queries have {width} numbers and rows {source.width}: project both in the same way, or transpose"
        )
    if choices.precision not in ("fast", "high"):
        raise DataError(f"unknown precision {choices.precision!r}; use 'fast' or 'high'")
    members = check_groups(groups, q_count, ranks)
    keep = check_topk(topk, source.count)
    threads = native.default_threads() if choices.threads is None else positive("threads", choices.threads)
    target = scoring_device(source, choices.device)
    engine, path = (
        engines.engine(choices.isa) if target is None else engines.device_engine(target, source.kind, choices.isa)
    )
    call = _Call(source, queries, members, keep, normalize, choices.precision == "high", threads, target, engine, path)
    results = _new_results(call, choices.out, groups is not None, topk is not None, ranks)
    chunk = _columns_at_once(q_count, source, choices.precision, ranks)
    held = call.new((chunk, source.count), np.float32) if ranks else None
    for first in range(0, q_count, chunk):
        _score_columns(call, results, first, min(q_count, first + chunk), held)
    if not results.fused:
        return choices.out if choices.out is not None else call.as_rows(results.scores)
    return _finished(call, results, choices.out)


@dataclass(frozen=True, slots=True)
class _Call:
    """One call of `inner_products`, checked; target: the device it is scored on, None for the CPU's own paths."""

    source: Source
    queries: Array
    members: list[list[int]]  # queries of each group
    keep: int  # of the top k
    normalize: bool
    high: bool
    threads: int
    target: torch.device | None
    engine: Any
    path: str

    def new(self, shape: tuple[int, ...], dtype: type, zero: bool = False) -> Array:
        """Return memory where the engine writes results."""
        return _new(self.target, shape, dtype, zero)

    def as_rows(self, array: Array) -> Array:
        """Return results as an array of the kind of the rows."""
        if self.source.is_torch:
            return torch.as_tensor(array, device=self.source.device)
        return array.cpu().numpy() if isinstance(array, torch.Tensor) else np.asarray(array)


@dataclass(frozen=True, slots=True)
class _Results:
    """What the passes over the rows fill; None where not asked for."""

    fused: bool
    scores: Array | None
    sums: Array | None  # float64 [N, G]
    rank_sums: Array | None  # float64 [N, G]
    top: list[tuple[Array, Array]] | None  # of each set of columns


def _new_results(call: _Call, out: Array | None, groups: bool, topk: bool, ranks: bool) -> _Results:
    source, shape = call.source, (call.source.count, len(call.members))
    fused = groups or topk or ranks
    q_count = call.queries.shape[0]
    scores = check_out(out, source.count, q_count) if out is not None else None
    if scores is None and not fused:
        scores = _new(call.target if source.on_device else None, (source.count, q_count), np.float32)
    sums = call.new(shape, np.float64, zero=True) if groups else None
    rank_sums = call.new(shape, np.float64, zero=True) if ranks else None
    return _Results(fused, scores, sums, rank_sums, [] if topk else None)


def _score_columns(call: _Call, results: _Results, first: int, last: int, held: Array | None) -> None:
    """Score all rows against the queries `first` to `last`; held: memory for at least as many columns, for ranks."""
    source, engine = call.source, call.engine
    begin, query = _members_in(call.members, first, last)
    packed = engine.Queries(
        query_values(call.queries, first, last, call.target),
        rows=source.kind,
        high=call.high,
        isa="" if call.target is not None or call.path == native.TORCH else call.path,
        threads=call.threads,
    )
    columns = held[: last - first] if held is not None else None
    best = engine.TopK(last - first, call.keep, call.threads) if call.keep else None
    bad: list[int] = []
    for start, rows, scales in source.blocks():
        part = slice(start, start + rows.shape[0])
        wanted = Wanted(
            normalize=call.normalize,
            scores=None if results.scores is None else results.scores[part, first:last],
            columns=columns,
            group_sums=None if results.sums is None else results.sums[part],
            group_begin=begin,
            group_query=query,
            topk=best,
            threads=call.threads,
        )
        bad += engine.score(packed, Block(start, rows, scales), wanted)
    bad += engine.finish(packed)
    check_finite(bad, source)
    if best is not None and results.top is not None:
        results.top.append(best.result())
    if columns is not None:
        sort_threads = max(1, min(call.threads, _SORT_BYTES // (16 * max(1, source.count))))
        engine.rank(columns, begin, query, results.rank_sums, sort_threads)


def _finished(call: _Call, results: _Results, out: Array | None) -> InnerProducts:
    sizes = np.array([len(group) for group in call.members], dtype=np.float64)
    sums, rank_sums, q_count = results.sums, results.rank_sums, call.queries.shape[0]
    if not isinstance(sums if sums is not None else rank_sums, np.ndarray):
        sizes = torch.as_tensor(sizes, device=call.target)  # type: ignore[assignment]
    means = sums
    if means is not None:
        means /= sizes
        means = means.float() if isinstance(means, torch.Tensor) else means.astype(np.float32)
    if rank_sums is not None:
        rank_sums /= sizes
    best_rows = None
    if results.top is not None:
        empty = (np.empty((q_count, call.keep), np.float32), np.empty((q_count, call.keep), np.int64))
        values, indices = (np.concatenate(parts) for parts in zip(*results.top, strict=True)) if results.top else empty
        best_rows = (call.as_rows(values), call.as_rows(indices))
    return InnerProducts(
        scores=out,
        group_means=None if means is None else call.as_rows(means),
        mean_ranks=None if rank_sums is None else call.as_rows(rank_sums),
        topk=best_rows,
    )


def quantize_rows(
    rows: Array, *, stochastic: bool = False, seed: int = 0, first_row: int = 0, threads: int | None = None
) -> tuple[Array, Array]:
    """fp32 rows [N, k] as (int8 [N, k], fp32 scales [N]), scale = max|row| / 127, row ≈ scale * int8.

    Nearest: |error| <= scale / 2. Stochastic: |error| < scale, and the mean over seeds is the row itself (unbiased);
    its random numbers depend on (seed, first_row + i, column) alone, so parts of a matrix quantise as the whole does.
    Both bounds hold up to fp32 rounding of row / scale. Rows of zeros have scale 0.

    Raises NumericError naming rows with a NaN or infinite value, DataError for anything but fp32 rows.
    """
    source = source_of(rows, None)
    if source.kind != "float32" or source.array is None:
        raise DataError(f"quantize_rows takes fp32 rows, not {source.kind}; convert them first")
    engine, _ = engines.engine()
    key0, key1 = key(seed, "quantize")
    quantized, scales, bad = engine.quantize(
        source.array, stochastic, key0, key1, first_row, threads or native.default_threads()
    )
    check_finite(bad, source)
    return (torch.from_numpy(quantized), torch.from_numpy(scales)) if source.is_torch else (quantized, scales)


def to_bf16(rows: Array, *, threads: int | None = None) -> Array:
    """fp32 [N, k] to bf16, to nearest even: a bfloat16 tensor for tensors, bits as uint16 for numpy arrays."""
    if isinstance(rows, torch.Tensor):
        return rows.to(torch.bfloat16)
    source = source_of(rows, None)
    if source.kind != "float32":
        raise DataError(f"to_bf16 takes fp32 rows, not {source.kind}; convert them first")
    engine, _ = engines.engine()
    return engine.to_bf16(source.array, threads or native.default_threads())


def _columns_at_once(q_count: int, source: Source, precision: str, ranks: bool) -> int:
    """Queries in one pass over the rows, within the memory stated at the top of this file."""
    itemsize = {"float32": 4, "bfloat16": 4, "int8": 2}[source.kind]  # of the widest panel of any path
    terms = 2 if precision == "high" else 1
    columns = min(_MAX_COLUMNS, _QUERY_BYTES // max(1, source.width * itemsize * terms))
    if ranks:
        columns = min(columns, _COLUMN_BYTES // max(1, 4 * source.count))
    if columns > 64:
        columns -= columns % 64  # whole panels
    return max(1, min(q_count, columns))


def _members_in(groups: list[list[int]], first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
    """CSR lists of the members within [first, last), counted from `first`."""
    inside = [[q - first for q in group if first <= q < last] for group in groups]
    begin = np.cumsum([0, *(len(group) for group in inside)], dtype=np.int64)
    return begin, np.array([q for group in inside for q in group], dtype=np.int64)


def _new(device: torch.device | None, shape: tuple[int, ...], dtype: type, zero: bool = False) -> Array:
    if device is None:
        return np.zeros(shape, dtype) if zero else np.empty(shape, dtype)
    make = torch.zeros if zero else torch.empty
    return make(shape, dtype=torch.float64 if dtype is np.float64 else torch.float32, device=device)
