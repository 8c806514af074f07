"""The operations of `influence_fast._native` (csrc/), with the arguments that the other engines take."""

from __future__ import annotations

from typing import Any

from influence_fast.products import native
from influence_fast.products.blocks import Block, Wanted

__all__ = ["Queries", "TopK", "finish", "quantize", "rank", "score", "to_bf16"]


def _module() -> Any:
    return native.load()[0]


def Queries(values: Any, **how: Any) -> Any:
    """Pack queries [Q, k] for the kernels of an instruction set."""
    return _module().Queries(values, **how)


def TopK(queries: int, k: int, threads: int = 1) -> Any:
    """Make the list of the k highest scores of each query, ties to the lower row."""
    return _module().TopK(queries, k, threads)


def score(queries: Any, block: Block, wanted: Wanted) -> list[int]:
    """Compute what is wanted of a block; return its rows with a NaN or infinite score. See `csrc/score.h`."""
    bad: list[int] = _module().score(
        queries,
        block.rows,
        block.scales,
        block.start,
        wanted.normalize,
        wanted.scores,
        wanted.columns,
        wanted.group_sums,
        wanted.group_begin,
        wanted.group_query,
        wanted.topk,
        wanted.threads,
    )
    return bad


def finish(queries: Any) -> list[int]:
    """Return the rows with a NaN or infinite score that `score` has not named: none here."""
    return []


def rank(columns: Any, group_begin: Any, group_query: Any, sums: Any, threads: int = 1) -> None:
    """Add ranks (1 = lowest, ties averaged) in the columns [Q, N] of each group to `sums` [N, G]."""
    _module().rank(columns, group_begin, group_query, sums, threads)


def quantize(*arguments: Any) -> tuple[Any, Any, list[int]]:
    """Round fp32 rows to int8; see `csrc/quantize.h`."""
    made: tuple[Any, Any, list[int]] = _module().quantize(*arguments)
    return made


def to_bf16(values: Any, threads: int = 1) -> Any:
    """Round fp32 [N, k] to bf16 bits as uint16, to nearest even."""
    return _module().to_bf16(values, threads)
