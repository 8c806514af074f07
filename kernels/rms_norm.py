# mypy: disable-error-code="no-untyped-def"
"""Root-mean-square norm of rows under a frozen weight, and the gradient of its input.

    y = n (w + o)        n = x / sqrt(mean(x^2) + eps)
    dx = (g' - n mean(g' n)) / sqrt(mean(x^2) + eps)        g' = g (w + o)

x, g, y, dx (N, d), w (d,), o 0, or 1 for models that store w - 1. The weight is frozen: it has no gradient. Of a
forward only x is kept, in its own dtype: models that write this in PyTorch keep it in float32 and go over it a dozen
times each way.

Bytes: x and y once forward; x, g and dx once backward. A program holds whole rows in registers.
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

MAX_FEATURES = 16_384
_TILE = 4096  # numbers a program holds, if a row is not longer


@jit
def _normalised(x, w, count, features, eps, offset, stride_x, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Load and normalise this program's rows.

    Returns their numbers and columns, which of them there are, n as float32 [ROWS, BLOCK],
    1 / sqrt(mean(x^2) + eps) [ROWS, 1] and w + o [1, BLOCK].
    """
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    mask = (row < count) & (column < features)
    x = tl.load(x + row * stride_x + column, mask=mask, other=0.0).to(tl.float32)
    scale = (1.0 / tl.sqrt(tl.sum(x * x, axis=1) / features + eps))[:, None]
    weight = tl.load(w + column, mask=column < features, other=0.0).to(tl.float32) + offset
    return row, column, mask, x * scale, scale, weight


@jit(do_not_specialize=["count"])
def _rms_norm_kernel(
    x,  # [N, d]
    w,  # [d]
    y,  # [N, d]
    count,
    features,
    eps,
    offset,
    stride_x,
    stride_y,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROUND_FIRST: tl.constexpr,
):
    row, column, mask, normal, _, weight = _normalised(x, w, count, features, eps, offset, stride_x, ROWS, BLOCK)
    if ROUND_FIRST:
        normal = normal.to(y.dtype.element_ty).to(tl.float32)
    tl.store(y + row * stride_y + column, normal * weight, mask=mask)


@jit(do_not_specialize=["count"])
def _rms_norm_backward_kernel(
    g,  # [N, d]
    x,  # [N, d]
    w,  # [d]
    dx,  # [N, d]
    count,
    features,
    eps,
    offset,
    stride_g,
    stride_x,
    stride_dx,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, column, mask, normal, scale, weight = _normalised(x, w, count, features, eps, offset, stride_x, ROWS, BLOCK)
    weighted = tl.load(g + row * stride_g + column, mask=mask, other=0.0).to(tl.float32) * weight
    along = (tl.sum(weighted * normal, axis=1) / features)[:, None]
    tl.store(dx + row * stride_dx + column, (weighted - normal * along) * scale, mask=mask)


def configuration(features: int) -> dict[str, int]:
    """Return the rows of a program, and its warps.

    They give 32 numbers a lane, which is several wide loads on their way at once.
    """
    block = padded(features)
    rows = max(1, _TILE // block)
    return {"ROWS": rows, "BLOCK": block, "num_warps": rows * block // 1024}


def rms_norm(x: Tensor, w: Tensor, eps: float, *, offset: float = 0.0, round_first: bool = True) -> Tensor:
    """Return y = x / sqrt(mean(x^2) + eps) * (w + offset), (N, d) of the dtype of x.

    x: (N, d), w: (d,), one dtype of float32, bfloat16 or float16, last dimension contiguous, d up to 16,384
    round_first: n is rounded to that dtype before it meets the weight, as Llama's norm does, and not only the product

    Raises ConfigError for shapes, dtypes or devices that do not fit.
    """
    count, features, device = _checked("rms_norm", w, x=x)
    y = torch.empty(count, features, dtype=x.dtype, device=device)
    _launch(
        _rms_norm_kernel,
        {"x": x, "w": w, "y": y, "count": count, "features": features, "eps": eps, "offset": offset}
        | {"stride_x": x.stride(0), "stride_y": y.stride(0)},
        {"ROUND_FIRST": round_first},
        device,
    )
    return y


def rms_norm_backward(g: Tensor, x: Tensor, w: Tensor, eps: float, *, offset: float = 0.0) -> Tensor:
    """Return dx (N, d) of the gradient g (N, d) of `rms_norm(x, w, eps, offset=offset)`, of the dtype of x.

    Raises ConfigError for shapes, dtypes or devices that do not fit.
    """
    count, features, device = _checked("rms_norm_backward", w, x=x, g=g)
    dx = torch.empty(count, features, dtype=x.dtype, device=device)
    _launch(
        _rms_norm_backward_kernel,
        {"g": g, "x": x, "w": w, "dx": dx, "count": count, "features": features, "eps": eps, "offset": offset}
        | {"stride_g": g.stride(0), "stride_x": x.stride(0), "stride_dx": dx.stride(0)},
        {},
        device,
    )
    return dx


def _checked(name: str, w: Tensor, **rows: Tensor) -> tuple[int, int, torch.device]:
    shape: tuple[int | str, ...] = ("N", "d")
    for key, tensor in rows.items():
        check_shape(name, key, tensor, shape)
        shape = tuple(tensor.shape)
    count, features = rows["x"].shape
    check_shape(name, "w", w, (features,))
    check_last_stride(name, w=w, **rows)
    check_dtype(name, w=w, **rows)
    if not 1 <= features <= MAX_FEATURES:
        raise ConfigError(f"{name}: rows of {features} numbers; it takes 1 to {MAX_FEATURES}")
    return count, features, check_device(name, w=w, **rows)


def _launch(kernel, arguments, constants, device: torch.device) -> None:
    if not arguments["count"]:
        return
    tiles = configuration(arguments["features"])
    num_warps = tiles.pop("num_warps")
    grid = (ceil_div(arguments["count"], tiles["ROWS"]),)
    launch(kernel, grid, arguments, {**tiles, **constants}, device=device, num_warps=num_warps, num_stages=1)


def reference(x: Tensor, w: Tensor, eps: float, *, offset: float = 0.0, round_first: bool = True) -> Tensor:
    """Compute `rms_norm` in PyTorch, differentiable: sums in float32, or in float64 for such numbers."""
    wide = x if x.dtype == torch.float64 else x.float()
    normal = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if round_first:
        normal = normal.to(x.dtype)
    return (normal * (w.to(normal.dtype) + offset)).to(x.dtype)


def cost(count: int, features: int, *, backward: bool = False, itemsize: int = 2) -> Cost:
    """Return the least work of one call: some 4 operations a number, 8 backward; each row read and written once."""
    moved = (3 if backward else 2) * count * features + features
    return Cost((8 if backward else 4) * count * features, moved * itemsize)
