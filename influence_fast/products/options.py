"""The rarer choices of an inner-product call in one value, and the keywords that they were before."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from influence_fast.deprecation import OldCall, moved

Array = Any  # numpy array or torch tensor


@dataclass(frozen=True, slots=True)
class ProductOptions:
    """Where inner products are written and how they are computed; the defaults serve nearly every call.

    out: fp32 [N, Q] to write the scores to; with `groups`, `topk` or `ranks` it also asks for them.
    threads: by default every core this process may use, or OMP_NUM_THREADS.
    precision: "fast" rounds queries to the dtype of the rows (int8: scale max|q| / 127), which lets the matrix units
        multiply; "high" keeps 16 significant bits of a query, at twice the multiplications. For few queries the time
        is that of reading the rows, and "high" is free. fp32 rows meet fp32 queries either way.
    isa: a path of `native.available()`, for tests; the variable INFLUENCE_FAST_ISA does the same. On a GPU "torch"
        asks for plain PyTorch and "mma" for the kernel of csrc/cuda whatever the rows; other names say nothing.
    device: "cuda" scores rows of the host on a GPU, streamed block by block; results come back to the host. By
        default rows are scored where they lie, which is faster for up to some hundred queries: with 200,000 int8
        rows of 8,192 numbers 2 queries take 16 cores 17 ms and 512 take them 326, and an H200 109 and 299.

    Example:
        >>> ProductOptions(threads=2).precision
        'fast'
    """

    out: Array | None = None
    threads: int | None = None
    precision: str = "fast"
    isa: str | None = None
    device: str | torch.device | None = None


_MOVED = ("out", "threads", "precision", "isa", "device")
_STAYED = ("row_scales", "normalize", "groups", "topk", "ranks")


def old_keywords() -> OldCall:
    """Return how `inner_products` was called when the fields of `ProductOptions` were keywords of its own."""
    return OldCall(
        positional=("rows", "queries"),
        keywords=(*_STAYED, *_MOVED, "options"),
        marks=_MOVED,
        translate=_translated,
        instead="inner_products(..., options=ProductOptions(...))",
    )


def _translated(values: dict[str, Any]) -> dict[str, Any]:
    options = values.pop("options", None) or ProductOptions()
    return {"options": replace(options, **moved(values, _MOVED)), **values}
