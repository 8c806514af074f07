# mypy: disable-error-code="no-untyped-def"
"""Compute what makes a row's inner products cosines: the sign of its scale over its norm.

    factor[i] = sign(scale[i]) / |row i|        0 for a row of zeros, NaN where scale or norm is not finite

Squares are summed in float64 (int8: exactly, in int32, a block of columns at a time). Bytes: rows once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from influence_fast.errors import ConfigError
from influence_fast.kernels.runtime import Cost, check_device, check_last_stride, check_shape, jit, launch, padded, tl

BLOCK = 2048


@jit
def _row_factors_kernel(
    rows,  # [n, k] int8 or bfloat16
    scales,  # [n] float32, or unused
    factors,  # [n] float32
    width,
    stride_row,
    BLOCK: tl.constexpr,
    SCALED: tl.constexpr,
    WHOLE: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    total = tl.zeros([1], dtype=tl.float64)
    for first in range(0, width, BLOCK):
        x = tl.load(rows + i * stride_row + first + lane, mask=first + lane < width, other=0)
        if WHOLE:
            whole = x.to(tl.int32)
            total += tl.sum(whole * whole, axis=0).to(tl.float64)
        else:
            exact = x.to(tl.float32).to(tl.float64)
            total += tl.sum(exact * exact, axis=0)
    norm = tl.sqrt(total)
    scale = tl.zeros([1], dtype=tl.float32) + (tl.load(scales + i) if SCALED else 1.0)
    size = tl.abs(scale)
    usable = (size < float("inf")) & (norm < float("inf"))
    sign = tl.where(scale > 0.0, 1.0, tl.where(scale < 0.0, -1.0, 0.0)).to(tl.float64)
    factor = tl.where(norm == 0.0, 0.0, sign / tl.where(norm == 0.0, 1.0, norm))
    factor = tl.where(usable, factor, float("nan"))
    tl.store(factors + i + tl.zeros([1], dtype=tl.int64), factor.to(tl.float32))


def row_factors(rows: Tensor, scales: Tensor | None = None) -> Tensor:
    """Return the sign of each row's scale over its norm, (n,) float32.

    rows: (n, k) int8 or bfloat16, last dimension contiguous. scales: (n,) float32, or None for ones. Raises
    ConfigError for other shapes or dtypes, or where no kernel can run.
    """
    name = "row_factors"
    check_shape(name, "rows", rows, ("n", "k"))
    check_last_stride(name, rows=rows)
    if rows.dtype not in (torch.int8, torch.bfloat16):
        raise ConfigError(f"{name}: rows must be int8 or bfloat16, got {rows.dtype}")
    if scales is not None:
        check_shape(name, "scales", scales, (rows.shape[0],))
    device = check_device(name, rows=rows, scales=scales)
    factors = torch.empty(rows.shape[0], dtype=torch.float32, device=device)
    if rows.shape[0]:
        launch(
            _row_factors_kernel,
            (rows.shape[0],),
            {
                "rows": rows,
                "scales": scales if scales is not None else factors,
                "factors": factors,
                "width": rows.shape[1],
                "stride_row": rows.stride(0),
            },
            {
                "BLOCK": min(padded(rows.shape[1]), BLOCK),
                "SCALED": scales is not None,
                "WHOLE": rows.dtype == torch.int8,
            },
            device=device,
            num_warps=4,
            num_stages=2,
        )
    return factors


def reference(rows: Tensor, scales: Tensor | None = None) -> Tensor:
    """Return the same numbers by PyTorch, (n,) float32."""
    norm = torch.linalg.vector_norm(rows.double(), dim=1)
    sign = torch.ones_like(norm) if scales is None else scales.double().sign()
    finite = torch.isfinite(norm) if scales is None else torch.isfinite(norm) & torch.isfinite(scales)
    factor = torch.where(norm == 0, 0.0, sign / torch.where(norm == 0, 1.0, norm))
    return torch.where(finite, factor, torch.nan).float()


def cost(rows: int, width: int, itemsize: int = 1) -> Cost:
    """Floor of one call: a square and a sum a number; rows once."""
    return Cost(2 * rows * width, rows * width * itemsize + 4 * rows)
