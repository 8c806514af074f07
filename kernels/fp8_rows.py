# mypy: disable-error-code="no-untyped-def"
"""Rows to e4m3 with one float32 scale a row, for 8-bit products: read once, where PyTorch goes over them four times.

    scale = max|row| / 448, at least the smallest normal number        e4m3 = row / scale, to nearest, halves to even

matrix (n, k) of any row stride, e4m3 (rows, k), scales (rows, 1). Rows beyond n, which cards want beside few (see
`gradients.fp8`), are zeros with the scale 1. A row with a NaN has that scale and numbers; one with an infinite number
an infinite scale, NaN where it is infinite, and zeros.

The bits are PyTorch's on a CPU: both quotients are rounded to nearest. For the numbers that is done by multiplying with
the reciprocal, which a row has once, and correcting twice (Markstein): the remainder of a fused multiply-add is exact,
the first correction leaves less than one unit in the last place, and from there the second one is the rounded quotient.
Remainders of rows so small that these would have no float32 number are taken 2^100 times as large. (Remainders of
numbers a millionth of the row's largest may have none; they become zeros whatever their last place.)

Bytes: the matrix once (a row no longer than a tile stays in registers; of a longer one the second read comes from the
L1 cache), e4m3 and scales once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from influence_fast.errors import ConfigError
from influence_fast.kernels.runtime import (
    Cost,
    ceil_div,
    check_device,
    check_dtype,
    check_last_stride,
    check_shape,
    jit,
    launch,
    padded,
    tl,
)

LOWEST_CAPABILITY = (8, 9)  # of GPUs that round to e4m3, and multiply it
FORMAT = torch.float8_e4m3fn
LARGEST = torch.finfo(FORMAT).max
TINY = torch.finfo(torch.float32).tiny
FAINT, LIFT = 2.0**-40, 2.0**100
_TILE = 4096  # numbers a program holds at a time


@jit
def _load(matrix, row, column, count, width, stride_row):
    mask = (row < count) & (column < width)
    return tl.load(matrix + row * stride_row + column, mask=mask, other=0.0).to(tl.float32)


@jit
def _size_bits(x):
    """Return the bits of |x|, ordered as the sizes are: infinity above all numbers and NaN above infinity.

    A maximum of numbers would lose NaN.
    """
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@jit
def _to_e4m3(x, minus_lift, divisor, minus_reciprocal):
    """Return the bytes of the e4m3 numbers of x / scale. The signs are such that a zero keeps its own."""
    y = x * minus_lift
    q = y * minus_reciprocal
    q = tl.fma(tl.fma(q, divisor, y), minus_reciprocal, q)
    q = tl.fma(tl.fma(q, divisor, y), minus_reciprocal, q)
    return q.to(tl.float8e4nv).to(tl.uint8, bitcast=True)


@jit(do_not_specialize=["count", "total"])
def _fp8_rows_kernel(
    matrix,  # [n, k]
    out,  # [total, k] bytes, contiguous
    scales,  # [total] float32
    count,  # n
    total,
    width,
    stride_row,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
    LARGEST: tl.constexpr,
    TINY: tl.constexpr,
    FAINT: tl.constexpr,
    LIFT: tl.constexpr,
):
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    lane = tl.arange(0, BLOCK)[None, :]
    if WHOLE:
        x = _load(matrix, row, lane, count, width, stride_row)
        highest = _size_bits(x)
    else:
        highest = tl.zeros([ROWS, BLOCK], dtype=tl.int32)
        for start in range(0, width, BLOCK):
            highest = tl.maximum(highest, _size_bits(_load(matrix, row, start + lane, count, width, stride_row)))
    peak = tl.max(highest, axis=1)[:, None].to(tl.float32, bitcast=True)
    scale = tl.div_rn(peak, tl.zeros_like(peak) + LARGEST)
    scale = tl.where(scale < TINY, TINY, scale)
    tl.store(scales + row, tl.where(row < count, scale, 1.0), mask=row < total)
    lift = tl.where(peak < FAINT, LIFT, 1.0)
    # Under an infinite scale all reciprocals and corrections are zeros, if nothing is multiplied with the scale itself.
    divisor = tl.where(scale == float("inf"), 0.0, scale * lift)
    minus_reciprocal = tl.div_rn(tl.zeros_like(peak) - 1.0, scale * lift)
    out += row * width
    if WHOLE:
        made = _to_e4m3(x, -lift, divisor, minus_reciprocal)
        tl.store(out + lane, made, mask=(row < total) & (lane < width))
    else:
        for start in range(0, width, BLOCK):
            x = _load(matrix, row, start + lane, count, width, stride_row)
            made = _to_e4m3(x, -lift, divisor, minus_reciprocal)
            tl.store(out + start + lane, made, mask=(row < total) & (start + lane < width))


def configuration(width: int) -> dict[str, int]:
    """Return the rows of a program, the numbers of each held at a time, whether those are the row, and its warps.

    32 numbers a lane, as `rms_norm` has; of rows that are read twice 8, which is one wide load, so that few rows are
    under way on a processor and its L1 cache has them still.
    """
    block = min(padded(width), _TILE)
    rows, whole = _TILE // block, width <= block
    return {"ROWS": rows, "BLOCK": block, "WHOLE": whole, "num_warps": _TILE // (32 * (32 if whole else 8))}


def fp8_rows(matrix: Tensor, rows: int | None = None) -> tuple[Tensor, Tensor]:
    """Quantize (n, k) rows to (e4m3 (rows, k) contiguous, float32 scales (rows, 1)).

    matrix: (n, k) float32, bfloat16 or float16, last dimension contiguous
    rows: at least n, and n by default; those beyond are zeros with the scale 1

    Raises ConfigError for shapes, dtypes or devices that do not fit; a GPU needs compute capability 8.9.
    """
    name = "fp8_rows"
    check_shape(name, "matrix", matrix, ("n", "k"))
    check_last_stride(name, matrix=matrix)
    check_dtype(name, matrix=matrix)
    count, width = matrix.shape
    total = count if rows is None else rows
    if width < 1 or total < count:
        raise ConfigError(
            f"{name}: cannot make {total} rows of {tuple(matrix.shape)}; it takes n or more, and k from 1"
        )
    device = check_device(name, lowest=LOWEST_CAPABILITY, matrix=matrix)
    out = torch.empty(total, width, dtype=torch.uint8, device=device)
    scales = torch.empty(total, 1, dtype=torch.float32, device=device)
    if total:
        tiles = configuration(width)
        num_warps = tiles.pop("num_warps")
        launch(
            _fp8_rows_kernel,
            (ceil_div(total, tiles["ROWS"]),),
            {"matrix": matrix, "out": out, "scales": scales, "count": count, "total": total, "width": width}
            | {"stride_row": matrix.stride(0)},
            {**tiles, "LARGEST": LARGEST, "TINY": TINY, "FAINT": FAINT, "LIFT": LIFT},
            device=device,
            num_warps=num_warps,
            num_stages=1,
        )
    return out.view(FORMAT), scales


def reference(matrix: Tensor, rows: int | None = None) -> tuple[Tensor, Tensor]:
    """Compute the same bits in PyTorch, for any float dtype: (e4m3 (rows, k) contiguous, float32 scales (rows, 1))."""
    wide = torch.promote_types(matrix.dtype, torch.float32)
    largest = torch.linalg.vector_norm(matrix, torch.inf, dim=1, keepdim=True, dtype=wide).float()
    # By a plain number PyTorch multiplies with 1 / 448 on a GPU. A row of zeros must not be divided by zero.
    scales = (largest / torch.full_like(largest, LARGEST)).clamp_min(TINY)
    values = (matrix / scales).to(FORMAT).contiguous()
    more = 0 if rows is None else rows - len(matrix)
    if more == 0:
        return values, scales
    # as bytes, which everything can be done with; zero is zero in e4m3 too
    values = torch.nn.functional.pad(values.view(torch.uint8), (0, 0, 0, more)).view(FORMAT)
    return values, torch.nn.functional.pad(scales, (0, 0, 0, more), value=1.0)


def cost(count: int, width: int, *, itemsize: int = 2) -> Cost:
    """Return the least work of one call: a quotient a number; the matrix, e4m3 and scales once."""
    return Cost(count * width, count * width * (itemsize + 1) + count * 4)
