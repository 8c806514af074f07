"""How far a kernel may lie from its float64 reference, as a relative norm, and why."""

from __future__ import annotations

import torch
from torch import Tensor

# The reference always starts from the very numbers the kernel was given, so rounding of inputs counts nowhere.
TOLERANCES: dict[torch.dtype, float] = {
    # Sums of up to a few thousand float32 terms: about 2^-24 sqrt(n), measured 1e-7 to 3e-7. A lost term of a sum or
    # a TF32 product (1e-3) is far outside.
    torch.float32: 1e-5,
    # One rounding to 8 bits at the store, 2^-9 at most and 2e-3 in the norm. A bfloat16 sum (1e-2 from some tens of
    # terms on) is outside.
    torch.bfloat16: 1e-2,
    # The same with 11 bits.
    torch.float16: 2e-3,
}


def relative_norm(actual: Tensor, expected: Tensor) -> float:
    """|actual - expected| / |expected| over all entries, in float64; NaN or infinity anywhere gives infinity.

    Raises ValueError where shapes differ, or where the reference is zero everywhere and says nothing.
    """
    if actual.shape != expected.shape:
        raise ValueError(f"shapes differ: {tuple(actual.shape)} and {tuple(expected.shape)}")
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    if not bool(torch.isfinite(actual).all()):
        return float("inf")
    size = float(expected.norm())
    if size == 0.0:
        raise ValueError("the reference is zero everywhere: the comparison would say nothing")
    return float((actual - expected).norm()) / size
