"""Inner products of stored gradient rows with queries, and what selection needs of them, in one pass over the rows.

    scores[i, q] = row_scale[i] * sum_j rows[i, j] queries[q, j]      (divided by both norms with normalize=True)

The (N, Q) matrix is written only where it is asked for: group means, the top k and ranks are taken block by block,
while a block's scores are in cache. Ranks need whole columns, so as many columns as fit in 224 MiB are held at a time
and the rows are read once for each such set of columns. Memory above rows and results stays below 512 MiB, whatever
N and Q (up to 20 million rows; beyond, one column and its sort are 20 bytes a row).

The work is done by `influence_fast._native` (csrc/), or by `products.pytorch` where that is missing. On a CUDA
device int8 and bf16 rows go to our kernels (`products.cuda`), streamed from the host where they lie there, and
fp32 rows to PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, overload

import numpy as np
import torch

from influence_fast.errors import DataError
from influence_fast.philox import key
from influence_fast.products import cuda as inner_products_cuda
from influence_fast.products import native
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

__all__ = ["InnerProducts", "inner_products", "quantize_rows", "to_bf16"]

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
    out: Array | None = ...,
    threads: int | None = ...,
    precision: str = ...,
    isa: str | None = ...,
    device: str | torch.device | None = ...,
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
    out: Array | None = ...,
    threads: int | None = ...,
    precision: str = ...,
    isa: str | None = ...,
    device: str | torch.device | None = ...,
) -> InnerProducts: ...
def inner_products(
    rows: Any,
    queries: Array,
    *,
    row_scales: Array | None = None,
    normalize: bool = False,
    groups: Sequence[Sequence[int]] | None = None,
    topk: int | None = None,
    ranks: bool = False,
    out: Array | None = None,
    threads: int | None = None,
    precision: str = "fast",
    isa: str | None = None,
    device: str | torch.device | None = None,
) -> Array | InnerProducts:
    """Scores N rows against Q queries; sums are accumulated in fp32 (int32 for int8 rows).

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
        out: fp32 [N, Q] to write the scores to; with `groups`, `topk` or `ranks` it also asks for them.
        threads: by default every core this process may use, or OMP_NUM_THREADS.
        precision: "fast" rounds queries to the dtype of the rows (int8: scale max|q| / 127), which lets the matrix
            units multiply; "high" keeps 16 significant bits of a query, at twice the multiplications. For few
            queries the time is that of reading the rows, and "high" is free. fp32 rows meet fp32 queries either way.
        isa: a path of `native.available()`, for tests; the variable INFLUENCE_FAST_ISA does the same. On a device
            "torch" asks for PyTorch, other names say nothing.
        device: "cuda" scores rows of the host on a GPU, streamed block by block; results come back to the host. By
            default rows are scored where they lie, which is faster for up to some hundred queries: with 200,000 int8
            rows of 8,192 numbers 2 queries take 16 cores 17 ms and 512 take them 326, and an H200 109 and 299.

    Returns:
        fp32 scores [N, Q] (`out` if given), or `InnerProducts` when any of `groups`, `topk` and `ranks` is given.

    Raises:
        DataError: shapes, dtypes or strides do not fit, or a group is empty or names no query.
        NumericError: a NaN or infinite value in the queries, or in rows, which are named.
        ConfigError: unknown `isa`, or a `device` that is not there.
    """
    source = source_of(rows, row_scales)
    if source.kind == "int8" and row_scales is None and source.array is not None:
        raise DataError("int8 rows need row_scales, one a row; pass numpy.ones(N, numpy.float32) for plain integers")
    q_count, width = shape_of(queries, "queries")
    if source.count and width != source.width:
        raise DataError(
            f"queries have {width} numbers and rows {source.width}: project both in the same way, or transpose"
        )
    if precision not in ("fast", "high"):
        raise DataError(f"unknown precision {precision!r}; use 'fast' or 'high'")
    members = check_groups(groups, q_count, ranks)
    keep = check_topk(topk, source.count)
    fused = groups is not None or topk is not None or ranks
    threads = native.default_threads() if threads is None else positive("threads", threads)

    target = scoring_device(source, device)
    engine, path = native.engine(isa) if target is None else native.device_engine(target, source.kind, isa)
    new = _allocator(target)
    scores = check_out(out, source.count, q_count) if out is not None else None
    if scores is None and not fused:
        scores = _allocator(target if source.on_device else None)((source.count, q_count), np.float32)
    sums = new((source.count, len(members)), np.float64, zero=True) if groups is not None else None
    rank_sums = new((source.count, len(members)), np.float64, zero=True) if ranks else None
    top: list[tuple[Array, Array]] = []

    chunk = _columns_at_once(q_count, source, precision, ranks)
    sort_threads = max(1, min(threads, _SORT_BYTES // (16 * max(1, source.count))))
    held = new((chunk, source.count), np.float32) if ranks else None
    for first in range(0, q_count, chunk):
        last = min(q_count, first + chunk)
        begin, query = _members_in(members, first, last)
        packed = engine.Queries(
            query_values(queries, first, last, target),
            rows=source.kind,
            high=precision == "high",
            isa="" if target is not None or path == native.TORCH else path,
            threads=threads,
        )
        columns = held[: last - first] if held is not None else None
        best = engine.TopK(last - first, keep, threads) if keep else None
        bad: list[int] = []
        for start, block, scales in source.blocks():
            stop = start + block.shape[0]
            bad += engine.score(
                packed,
                block,
                scales,
                start,
                normalize,
                None if scores is None else scores[start:stop, first:last],
                columns,
                None if sums is None else sums[start:stop],
                begin,
                query,
                best,
                threads,
            )
        if path == native.CUDA:
            bad += inner_products_cuda.finish(packed)
        check_finite(bad, source)
        if best is not None:
            top.append(best.result())
        if columns is not None:
            engine.rank(columns, begin, query, rank_sums, sort_threads)

    def as_rows(array: Array) -> Array:
        if source.is_torch:
            return torch.as_tensor(array, device=source.device)
        return array.cpu().numpy() if isinstance(array, torch.Tensor) else np.asarray(array)

    if not fused:
        return out if out is not None else as_rows(scores)
    sizes = np.array([len(group) for group in members], dtype=np.float64)
    if not isinstance(sums if sums is not None else rank_sums, np.ndarray):
        sizes = torch.as_tensor(sizes, device=target)  # type: ignore[assignment]
    means = sums
    if means is not None:
        means /= sizes
        means = means.float() if isinstance(means, torch.Tensor) else means.astype(np.float32)
    if rank_sums is not None:
        rank_sums /= sizes
    best_rows = None
    if topk is not None:
        values = np.concatenate([v for v, _ in top]) if top else np.empty((q_count, keep), np.float32)
        indices = np.concatenate([r for _, r in top]) if top else np.empty((q_count, keep), np.int64)
        best_rows = (as_rows(values), as_rows(indices))
    return InnerProducts(
        scores=out,
        group_means=None if means is None else as_rows(means),
        mean_ranks=None if rank_sums is None else as_rows(rank_sums),
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
    engine, _ = native.engine()
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
    engine, _ = native.engine()
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


def _allocator(device: torch.device | None) -> Callable[..., Array]:
    def new(shape: tuple[int, ...], dtype: type, zero: bool = False) -> Array:
        if device is None:
            return np.zeros(shape, dtype) if zero else np.empty(shape, dtype)
        make = torch.zeros if zero else torch.empty
        return make(shape, dtype=torch.float64 if dtype is np.float64 else torch.float32, device=device)

    return new
