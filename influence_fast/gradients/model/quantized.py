"""Frozen base weights in 4 or 8 bits (QLoRA): their products are the quantised layer's own, forward and backward.

    y = layer(x)     the layer as it stands, with its bias: what the plain model computes
    dx = g W         W dequantised for this product alone, or the layer's own backward where it names no W

What autograd makes of a layer decides: when an engine opens, `product_of` compares dx of a few random tokens with it,
so that a dequantised weight of another layout, or a layer that depends on x otherwise than as a product, is found.
Memory: one dequantised weight at a time, of the layer whose backward runs.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from influence_fast.errors import ModelError, one_line
from influence_fast.gradients.model import packed_attention as attention
from influence_fast.gradients.model.backends import Torch
from influence_fast.gradients.model.fused_layers import overridden

if TYPE_CHECKING:
    from influence_fast.gradients.model.lora import LoraLinear

# Relative error of dx to autograd's on random tokens. Measured: 0 for the same operations in the same dtype, 3e-7 for
# others in fp32, 4e-3 in bf16; a transposed, permuted or rescaled weight gives 0.1 and more.
_MOST, _MOST_16 = 1e-4, 2e-2
_TOKENS = 4
_REMEDY = (
    "quantise weights alone (bitsandbytes nf4, fp4 or int8, torchao Int8WeightOnlyConfig), or load the model "
    "unquantised"
)


@dataclass(frozen=True, slots=True)
class Kind:
    """One way of quantising a linear.

    weight: the layer's weight [d_out, d_in] as its own backward multiplies with it, for a gradient of a dtype; None
    where the layer cannot give it now. Without it the layer's own backward is run.
    """

    name: str
    matches: Callable[[Any], bool]
    weight: Callable[[Any, torch.dtype], Tensor | None] | None = None


def kind_of(layer: Any) -> Kind | None:
    """Return how a layer's weight is quantised; None for a layer that is no quantised linear."""
    return next((kind for kind in _KINDS if kind.matches(layer)), None)


def _of_class(*names: str) -> Callable[[Any], bool]:
    """Match instances of classes `package.Name`, without importing the package."""
    wanted = {tuple(name.split(".")) for name in names}
    return lambda layer: any((c.__module__.partition(".")[0], c.__name__) in wanted for c in type(layer).__mro__)


def _weight_4bit(layer: Any, dtype: torch.dtype) -> Tensor | None:
    from bitsandbytes.functional import dequantize_4bit

    state = layer.weight.quant_state
    if getattr(state, "packing_format_for_cpu", False):
        return None  # reordered for a product of CPUs with bf16 arithmetic, which has no inverse to the bit
    return dequantize_4bit(layer.weight.data, state).to(dtype)


def _weight_8bit(layer: Any, dtype: torch.dtype) -> Tensor:
    state = layer.state  # takes the numbers over from the parameter in the first forward
    held = state if state.CB is not None else layer.weight
    scales = held.SCB.unsqueeze(1).mul(1.0 / 127.0)
    found: Tensor = held.CB.to(dtype, copy=True).mul_(scales)
    return found


def _has_tensor_subclass(layer: Any) -> bool:
    weight = getattr(layer, "weight", None)
    # DTensors (FSDP2) are such tensors too
    return hasattr(weight, "__tensor_flatten__") and not hasattr(weight, "full_tensor")


def sizes_of(layer: Any) -> tuple[int, int] | None:
    """Return (d_out, d_in) that a linear layer names; None where it names none."""
    for names in (("out_features", "in_features"), ("outfeatures", "infeatures")):
        found = tuple(getattr(layer, name, None) for name in names)
        if all(isinstance(n, int) for n in found):
            return found  # type: ignore[return-value]
    return None


def _has_no_plain_weight(layer: Any) -> bool:
    """Tell whether a layer with a linear's sizes holds no matrix of these sizes in 16 bits or more."""
    sizes = sizes_of(layer)
    if sizes is None:
        return False
    weight = getattr(layer, "weight", None)
    plain = isinstance(weight, Tensor) and weight.is_floating_point() and weight.element_size() > 1
    return not plain or tuple(weight.shape) != sizes  # type: ignore[union-attr]


_KINDS = (
    Kind("bitsandbytes 4-bit", _of_class("bitsandbytes.Linear4bit"), _weight_4bit),
    Kind("bitsandbytes 8-bit", _of_class("bitsandbytes.Linear8bitLt"), _weight_8bit),
    Kind("HQQ", _of_class("hqq.HQQLinear"), lambda layer, dtype: layer.dequantize().to(dtype)),
    Kind("torchao", _has_tensor_subclass, lambda layer, dtype: layer.weight.dequantize().to(dtype)),
    Kind("quantised", _has_no_plain_weight),  # GPTQ, AWQ and others
)


class QuantizedProduct:
    """The products of one quantised base layer, bias included."""

    def __init__(self, layer: Any, dtype: torch.dtype, weight: Callable[[torch.dtype], Tensor] | None) -> None:
        self.layer = layer
        self.dtype = dtype  # of what goes in and comes out
        self._weight = weight
        # bitsandbytes multiplies in a dtype of its own, forward and backward
        self._inner: torch.dtype = getattr(layer, "compute_dtype", None) or dtype

    def operand(self, matrix: Tensor, backend: Torch) -> Tensor:
        """Return what `forward` and `backward` take for a matrix: itself."""
        return matrix

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return x [T, d_in] through the layer, [T, d_out]; the layer adds its bias itself."""
        y: Tensor = self.layer(x)
        return y

    def backward(self, g: Tensor) -> Tensor:
        """Return g W, [T, d_in] for g [T, d_out]."""
        if self._weight is not None:
            return (g.to(self._inner) @ self._weight(self._inner)).to(self.dtype)
        # the map is linear: its backward is the same at every x
        x = torch.ones(len(g), sizes_of(self.layer)[1], dtype=self.dtype, device=g.device)  # type: ignore[index]
        return _autograd(self.layer, x, g)


def _autograd(layer: Any, x: Tensor, g: Tensor) -> Tensor:
    """Return dx by the layer's own backward; ModelError where it has none."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        y = layer(x)
        if not y.requires_grad:
            raise ModelError("no gradient passes through it")
        (dx,) = torch.autograd.grad(y, x, g.to(y.dtype), allow_unused=True)
    if dx is None:
        raise ModelError("no gradient passes through it")
    return dx


def products_of(linears: Sequence[LoraLinear], dtypes: Sequence[torch.dtype]) -> list[QuantizedProduct | None]:
    """Return the product of each linear's base, None for one that is not quantised.

    dtypes: of each linear's input. Raises ModelError as `product_of`.
    """
    return [
        product_of(linear.name, linear.layer.get_base_layer(), dtype)  # type: ignore[operator]
        if linear.quantized
        else None
        for linear, dtype in zip(linears, dtypes, strict=True)
    ]


def product_of(name: str, layer: Any, dtype: torch.dtype) -> QuantizedProduct:
    """Return a quantised layer's products, compared with autograd through the layer on a few random tokens.

    Raises ModelError, naming the module and how it is quantised, for a layer that passes no gradient or is no product.
    """
    kind, sizes = kind_of(layer), sizes_of(layer)
    assert kind is not None
    called = f"{name}: the base layer is {kind.name} ({type(layer).__name__})"
    if sizes is None:
        raise ModelError(f"{called}, and names no in_features and out_features: load the model unquantised")
    tensor = next((t for t in [*layer.parameters(), *layer.buffers()]), None)
    device = torch.device("cpu") if tensor is None else tensor.device
    by_kind = kind.weight
    dequantised = None if by_kind is None else lambda inner: by_kind(layer, inner)
    if device.type == "meta":
        return QuantizedProduct(layer, dtype, dequantised)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    x, g = (torch.randn(_TOKENS, n, generator=generator).to(device, dtype) for n in reversed(sizes))
    try:
        if by_kind is not None and by_kind(layer, dtype) is None:
            return _by_columns(layer, dtype, x)
        wanted = _autograd(layer, x, g)
        for weight in (dequantised, None) if dequantised is not None else (None,):
            product = QuantizedProduct(layer, dtype, weight)  # type: ignore[arg-type]
            if _agree(product.backward(g), wanted, _coarsest(layer, dtype)):
                return product
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of the library's own code
        raise ModelError(f"{called}: {one_line(error, 160)}; {_REMEDY}") from error
    raise ModelError(f"{called}, whose gradient is no product with one weight; {_REMEDY}")


def _coarsest(layer: Any, dtype: torch.dtype) -> float:
    inner = getattr(layer, "compute_dtype", None) or dtype
    return _MOST if min(torch.finfo(inner).bits, torch.finfo(dtype).bits) >= 32 else _MOST_16


def _agree(found: Tensor, wanted: Tensor, most: float) -> bool:
    if found.shape != wanted.shape or not bool(found.isfinite().all()):
        return False
    return bool((found.double() - wanted.double()).norm() <= most * wanted.double().norm())


def _by_columns(layer: Any, dtype: torch.dtype, x: Tensor) -> QuantizedProduct:
    """Return the products of a layer that gives neither its weight nor a gradient, W being its outputs for unit x."""

    def weight(inner: torch.dtype) -> Tensor:
        with torch.no_grad():
            zero = layer(x.new_zeros(1, x.shape[1]))
            return (layer(torch.eye(x.shape[1], dtype=dtype, device=x.device)) - zero).T.to(inner)

    with torch.no_grad():
        wanted, zero = layer(x), layer(torch.zeros_like(x))
    if not _agree(x @ weight(dtype).T, wanted - zero, _MOST_16):
        raise ModelError("its outputs are no product with one weight")
    return QuantizedProduct(layer, dtype, weight)


# ---- while an engine is open --------------------------------------------------------------------------------


@contextlib.contextmanager
def settled(base: nn.Module) -> Iterator[None]:
    """Set quantised layers of `base` to compute each example of a pack as if it were alone, while the block runs.

    LLM.int8() takes the columns of x that hold an outlier in any token at full precision, so that a token's output
    depends on the tokens beside it: such a layer is called once an example. 4-bit layers keep their codes as they are:
    on CPUs with bf16 arithmetic they would reorder them in a forward without gradients, and then pass none.
    """
    quiet = logging.getLogger("bitsandbytes.autograd._functions")  # says in every product that x is rounded to fp16
    level = quiet.level
    layers: list[Any] = list(base.modules())
    with contextlib.ExitStack() as stack:
        for layer in layers:
            if _KINDS[0].matches(layer):
                # left so afterwards: reordering rounds the scales, and the weights would have another hash
                layer.support_avx512bf16_for_cpu = False
            elif _KINDS[1].matches(layer) and layer.state.threshold > 0:
                stack.enter_context(overridden(layer, "forward", _an_example_at_a_time(layer.forward)))
        quiet.setLevel(logging.ERROR)
        try:
            yield
        finally:
            quiet.setLevel(level)


@contextlib.contextmanager
def unrounded(model: nn.Module, dtype: torch.dtype) -> Iterator[bool]:
    """Set bitsandbytes' layers to multiply as their backward does, for the block; yield whether that is another way.

    dtype: of what goes in. LLM.int8() rounds x to 8 bits, and 4-bit layers may multiply in 16 bits, which the backward
    passes over: a loss that moves in steps has no difference quotient to compare with a gradient. With the backward's
    own weight and x as it is, it has.
    """
    layers: list[Any] = [layer for layer in model.modules() if _rounds(layer, dtype)]
    with contextlib.ExitStack() as stack:
        for layer in layers:
            stack.enter_context(overridden(layer, "forward", _as_backward(layer)))
            if hasattr(layer, "compute_dtype"):
                stack.enter_context(overridden(layer, "compute_dtype", dtype))
        yield bool(layers)


def _rounds(layer: Any, dtype: torch.dtype) -> bool:
    if not _KINDS[0].matches(layer):
        return _KINDS[1].matches(layer)
    inner = (layer.compute_dtype, layer.weight.quant_state.dtype)
    return any(one is not None and one.itemsize < dtype.itemsize for one in inner)


def _as_backward(layer: Any) -> Callable[[Tensor], Tensor]:
    kind, given = kind_of(layer), layer.forward

    def forward(x: Tensor) -> Tensor:
        weight = None if kind is None or kind.weight is None else kind.weight(layer, x.dtype)
        if weight is None:
            return given(x)  # type: ignore[no-any-return]
        return nn.functional.linear(x, weight, None if layer.bias is None else layer.bias.to(x.dtype))

    return forward


def _an_example_at_a_time(forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def split(x: Tensor) -> Tensor:
        if x.dtype == torch.float16:
            # not rounded first, x itself has its outliers set to zero and back, which autograd forbids of what is kept
            x = x.clone()
        bounds = attention.current_bounds()
        tokens = math.prod(x.shape[:-1])
        if bounds is None or len(bounds) <= 2 or bounds[-1] != tokens:
            return forward(x)
        flat = x.reshape(tokens, x.shape[-1])
        parts = [forward(flat[start:end]) for start, end in pairwise(bounds)]
        return torch.cat(parts).view(*x.shape[:-1], -1)

    return split
