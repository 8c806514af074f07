# mypy: disable-error-code="no-untyped-def"
"""Rotary position embedding of queries or keys, and its gradient.

    [x1 | x2] -> [x1 c1 - x2 s1 | x2 c2 + x1 s2]        (halves of a head; c = cos, s = sin of a token's angles)
    [g1 | g2] -> [g1 c1 + g2 s2 | g2 c2 - g1 s1]        backward

x (1, h, T, D), as a projection leaves it: a view of (T, h D). What is made lies the same way, so that attention over
packed tokens (T, h, D) needs no copy. cos, sin (1, T, D).

Bytes: x and the result once; the angles once for each _HEADS heads, from the L2 cache.
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

_HEADS = 8  # that a program turns by the angles it has loaded
_TOKENS = 16


@jit(do_not_specialize=["tokens"])
def _rotary_kernel(
    x,  # [heads, T, D]
    cos,  # [T, D]
    sin,  # [T, D]
    out,  # [heads, T, D]
    tokens,
    heads,
    half,  # D / 2
    stride_xh,
    stride_xt,
    stride_ct,
    stride_st,
    stride_oh,
    stride_ot,
    BACKWARD: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    t = (tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T))[:, None]
    d = tl.arange(0, BLOCK_D)[None, :]
    mask = (t < tokens) & (d < half)
    c1 = tl.load(cos + t * stride_ct + d, mask=mask, other=0.0).to(tl.float32)
    c2 = tl.load(cos + t * stride_ct + half + d, mask=mask, other=0.0).to(tl.float32)
    s1 = tl.load(sin + t * stride_st + d, mask=mask, other=0.0).to(tl.float32)
    s2 = tl.load(sin + t * stride_st + half + d, mask=mask, other=0.0).to(tl.float32)
    if BACKWARD:
        s1, s2 = -s2, -s1
    begin = tl.program_id(1).to(tl.int64) * HEADS
    x += begin * stride_xh + t * stride_xt + d
    out += begin * stride_oh + t * stride_ot + d
    for _ in range(begin, tl.minimum(begin + HEADS, heads)):
        first = tl.load(x, mask=mask, other=0.0).to(tl.float32)
        second = tl.load(x + half, mask=mask, other=0.0).to(tl.float32)
        tl.store(out, first * c1 - second * s1, mask=mask)
        tl.store(out + half, second * c2 + first * s2, mask=mask)
        x += stride_xh
        out += stride_oh


def rotary(x: Tensor, cos: Tensor, sin: Tensor, *, backward: bool = False) -> Tensor:
    """Turn heads (1, h, T, D) by their tokens' angles: a view of (1, T, h, D), contiguous.

    x: any strides but the last; cos, sin: (1, T, D); one dtype of float32, bfloat16 or float16
    backward: x is the gradient of what was made, and becomes that of what went in

    Raises ConfigError for shapes, dtypes or devices that do not fit.
    """
    name = "rotary"
    check_shape(name, "x", x, (1, "h", "T", "D"))
    _, heads, tokens, size = x.shape
    check_shape(name, "cos", cos, (1, tokens, size))
    check_shape(name, "sin", sin, (1, tokens, size))
    check_last_stride(name, x=x, cos=cos, sin=sin)
    dtype = check_dtype(name, x=x, cos=cos, sin=sin)
    device = check_device(name, x=x, cos=cos, sin=sin)
    if size % 2:
        raise ConfigError(f"{name}: heads of {size} numbers have no halves")
    out = torch.empty(1, tokens, heads, size, dtype=dtype, device=device).transpose(1, 2)
    if out.numel():
        launch(
            _rotary_kernel,
            (ceil_div(tokens, _TOKENS), ceil_div(heads, _HEADS)),
            {
                "x": x,
                "cos": cos,
                "sin": sin,
                "out": out,
                "tokens": tokens,
                "heads": heads,
                "half": size // 2,
                "stride_xh": x.stride(1),
                "stride_xt": x.stride(2),
                "stride_ct": cos.stride(1),
                "stride_st": sin.stride(1),
                "stride_oh": out.stride(1),
                "stride_ot": out.stride(2),
            },
            {"BACKWARD": backward, "HEADS": _HEADS, "BLOCK_T": _TOKENS, "BLOCK_D": padded(size // 2)},
            device=device,
            num_warps=4,
            num_stages=2,
        )
    return out


def reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Compute `rotary` in PyTorch, in the dtype of x, differentiable."""
    first, second = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat([-second, first], dim=-1) * sin[:, None]


def cost(tokens: int, heads: int, size: int, *, itemsize: int = 2) -> Cost:
    """Return the least work of one call: each number read and written once, the angles read once."""
    return Cost(3 * tokens * heads * size, 2 * tokens * (heads + 1) * size * itemsize)
