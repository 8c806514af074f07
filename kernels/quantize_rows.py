# mypy: disable-error-code="no-untyped-def"
"""Rows to int8 with one float32 scale a row, on the GPU where they were made: a quarter of the bytes cross the bus.

    scale = max|row| / 127        rows[e, j] ~ scale * int8[e, j],   to nearest, halves to even

The same bits as `influence_fast.quantize_rows`: both quotients are rounded to nearest (`div.rn`, not the
fast division of the compiler), and a scale below the smallest normal number becomes 0. A row with a NaN or infinite
number has the scale NaN and zeros, so that the host, which must not be waited for here, can name it later.

Bytes: rows twice (the second time from the L2 cache, where a row of a 7B model has 400 KB), int8 and scales once. One
program a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from influence_fast.errors import ConfigError
from influence_fast.kernels.runtime import Cost, check_device, check_last_stride, check_shape, jit, launch, padded, tl
from influence_fast.row_codec import TINY

# 1.5 * 2^23: a number below 2^22 added to it loses exactly its fraction, to nearest even.
ROUNDER = 12582912.0
BLOCK = 4096


@jit
def _quantize_rows_kernel(
    rows,  # [E, K] float32
    out,  # [E, K] int8, contiguous
    scales,  # [E] float32
    width,
    stride_row,
    BLOCK: tl.constexpr,
    TINY: tl.constexpr,
    ROUNDER: tl.constexpr,
):
    e = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    rows += e * stride_row
    out += e * width
    highest = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, width, BLOCK):
        j = start + lane
        size = tl.abs(tl.load(rows + j, mask=j < width, other=0.0))
        # A NaN is below nothing, so it too becomes infinite here, where a maximum might lose it.
        highest = tl.maximum(highest, tl.where(size < float("inf"), size, float("inf")))
    peak = tl.max(highest, axis=0)
    scale = tl.div_rn(peak, 127.0)
    scale = tl.where(scale < TINY, 0.0, scale)
    scale = tl.where(peak == float("inf"), float("nan"), scale)
    tl.store(scales + e, scale)
    divisor = tl.where(scale > 0.0, scale, float("inf"))  # x / infinity is 0: rows of zeros, and bad ones
    for start in range(0, width, BLOCK):
        j = start + lane
        x = tl.load(rows + j, mask=j < width, other=0.0)
        x = tl.where(peak == float("inf"), 0.0, x)
        t = tl.minimum(tl.maximum(tl.div_rn(x, tl.zeros([BLOCK], dtype=tl.float32) + divisor), -127.0), 127.0)
        tl.store(out + j, ((t + ROUNDER) - ROUNDER).to(tl.int8), mask=j < width)


def quantize_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize float32 rows (E, K), last dimension contiguous, to (int8 (E, K) contiguous, float32 scales (E,)).

    |row - scale * int8| <= scale / 2 up to rounding; rows of zeros have scale 0, rows that are not finite scale NaN.
    Raises ConfigError for other shapes or dtypes, or where no kernel can run.
    """
    name = "quantize_rows"
    check_shape(name, "rows", rows, ("E", "K"))
    check_last_stride(name, rows=rows)
    if rows.dtype != torch.float32:
        raise ConfigError(f"{name}: rows must be float32, got {rows.dtype}")
    if rows.shape[1] < 1:
        raise ConfigError(f"{name}: rows have no numbers, got {tuple(rows.shape)}")
    device = check_device(name, rows=rows)
    out = torch.empty(rows.shape, dtype=torch.int8, device=device)
    scales = torch.empty(rows.shape[0], dtype=torch.float32, device=device)
    if rows.shape[0]:
        launch(
            _quantize_rows_kernel,
            (rows.shape[0],),
            {
                "rows": rows,
                "out": out,
                "scales": scales,
                "width": rows.shape[1],
                "stride_row": rows.stride(0),
            },
            {"BLOCK": min(padded(rows.shape[1]), BLOCK), "TINY": TINY, "ROUNDER": ROUNDER},
            device=device,
            num_warps=8,
            num_stages=2,
        )
    return out, scales


def cost(examples: int, width: int) -> Cost:
    """Return the least work of one call: a quotient a number; rows once in float32, int8 and scales once."""
    return Cost(examples * width, examples * width * (4 + 1) + examples * 4)
