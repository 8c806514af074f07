"""The rarer choices of an inner-product call in one value, and the keywords that they were before."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import Any, TypedDict

import torch

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


class MovedKeywords(TypedDict, total=False):
    """Keywords of `inner_products` that `ProductOptions` took over; they work for one more release."""

    out: Array | None
    threads: int | None
    precision: str
    isa: str | None
    device: str | torch.device | None


def with_moved(options: ProductOptions | None, moved: MovedKeywords) -> ProductOptions:
    """Return `options` with the keywords given in the old way, for which it warns once at the caller's line.

    Raises TypeError for a keyword that never was one.
    """
    options = ProductOptions() if options is None else options
    if not moved:
        return options
    for name in moved:
        if name not in ProductOptions.__slots__:
            raise TypeError(f"inner_products() got an unexpected keyword argument {name!r}")
    given = ", ".join(f"{name}=..." for name in moved)
    warnings.warn(
        f"inner_products({given}) is deprecated: pass options=ProductOptions({given})",
        DeprecationWarning,
        stacklevel=3,
    )
    return replace(options, **moved)
