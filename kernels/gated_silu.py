# mypy: disable-error-code="no-untyped-def"
"""The middle of a gated MLP, and its gradients: y = silu(a) b, silu(a) = a / (1 + exp(-a)).

    db = g silu(a)        da = g b s (1 + a (1 - s)),  s = 1 / (1 + exp(-a))

a (gate), b (up), g, y, da, db of one shape. Only a and b are kept of a forward: PyTorch keeps silu(a) as well, and
moves 14 numbers for each of y where this moves 8.

Bytes: a, b and y once forward; a, b, g, da and db once backward.
"""

from __future__ import annotations

import torch
from torch import Tensor

from influence_fast.errors import ConfigError
from influence_fast.kernels.runtime import Cost, ceil_div, check_device, check_dtype, check_shape, jit, launch, tl

BLOCK = 2048


@jit
def _sigmoid(a):
    # exp of a positive number could overflow to inf / inf; of a negative one it cannot.
    small = tl.exp(-tl.abs(a))
    return tl.where(a >= 0, 1.0, small) / (1.0 + small)


@jit
def _gated_silu_kernel(a, b, y, size, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < size
    gate = tl.load(a + i, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(b + i, mask=mask, other=0.0).to(tl.float32)
    silu = (gate * _sigmoid(gate)).to(y.dtype.element_ty).to(tl.float32)  # rounded as PyTorch's is
    tl.store(y + i, silu * up, mask=mask)


@jit
def _gated_silu_backward_kernel(g, a, b, da, db, size, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < size
    grad = tl.load(g + i, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(a + i, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(b + i, mask=mask, other=0.0).to(tl.float32)
    share = _sigmoid(gate)
    tl.store(db + i, grad * gate * share, mask=mask)
    tl.store(da + i, grad * up * share * (1.0 + gate * (1.0 - share)), mask=mask)


def gated_silu(a: Tensor, b: Tensor) -> Tensor:
    """Return silu(a) * b, of their shape and dtype.

    a, b: of one shape and dtype (float32, bfloat16 or float16), contiguous

    Raises ConfigError for shapes, dtypes or devices that do not fit.
    """
    device = _checked("gated_silu", a=a, b=b)
    y = torch.empty_like(a)
    _launch(_gated_silu_kernel, {"a": a, "b": b, "y": y}, device)
    return y


def gated_silu_backward(g: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return (da, db) of the gradient g of `gated_silu(a, b)`; all of one shape and dtype, contiguous.

    Raises ConfigError for shapes, dtypes or devices that do not fit.
    """
    device = _checked("gated_silu_backward", g=g, a=a, b=b)
    da, db = torch.empty_like(a), torch.empty_like(b)
    _launch(_gated_silu_backward_kernel, {"g": g, "a": a, "b": b, "da": da, "db": db}, device)
    return da, db


def _checked(name: str, **tensors: Tensor) -> torch.device:
    shape = tuple(tensors["a"].shape)
    for key, tensor in tensors.items():
        check_shape(name, key, tensor, shape)
        if not tensor.is_contiguous():
            raise ConfigError(f"{name}: {key} must be contiguous; call .contiguous() on it")
    check_dtype(name, **tensors)
    return check_device(name, **tensors)


def _launch(kernel, arguments, device: torch.device) -> None:
    size = arguments["a"].numel()
    if size:
        arguments = {**arguments, "size": size}
        launch(kernel, (ceil_div(size, BLOCK),), arguments, {"BLOCK": BLOCK}, device=device, num_warps=4, num_stages=1)


def reference(a: Tensor, b: Tensor) -> Tensor:
    """Compute `gated_silu` in PyTorch, differentiable."""
    return torch.nn.functional.silu(a) * b


def cost(size: int, *, backward: bool = False, itemsize: int = 2) -> Cost:
    """Return the least work of one call: an exponential and a few products a number, each read and written once."""
    return Cost((10 if backward else 5) * size, (5 if backward else 3) * size * itemsize)
