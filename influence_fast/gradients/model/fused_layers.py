"""Norms, gated MLPs and rotary embeddings of a model by one kernel each way, in the place of dozens of operations.

What may be replaced is found out and not looked up: the forward of a module's class is run on random numbers with
stand-ins for its weights and linears, and so is a model's rotary function; only where they give what the kernel
computes is the kernel used. Whatever does anything else stays as it is, and so does every other model: all that is
changed, for as long as an engine is open, are forwards of this model's own modules.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

Forward = Callable[..., Any]

_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
_ROTARY = "apply_rotary_pos_emb"  # its name in transformers' modules
_SAME = 1e-6  # relative error of what float32 computes twice


@dataclass
class Fused:
    """Which kinds of modules the kernels compute, and so keep less for the backward (`memory.layer_bytes`)."""

    norms: bool = False
    mlps: bool = False


@contextlib.contextmanager
def fused(base: nn.Module, dtype: torch.dtype) -> Iterator[Fused]:
    """Replace the parts of `base` that kernels can compute by the kernels, while the block runs.

    dtype: of the tensors between the layers; norms with weights of another are left alone. The parameters must be
    frozen: the kernels give no gradient of a norm's weight.
    """
    found = Fused()
    with contextlib.ExitStack() as stack:
        for module in base.modules():
            if "forward" in vars(module):
                continue  # of somebody else's making
            forward = _norm(module, dtype)
            if forward is not None:
                found.norms = True
            elif (forward := _gated_mlp(module)) is not None:
                found.mlps = True
            else:
                forward = _attention(module)
            if forward is not None:
                stack.enter_context(overridden(module, "forward", forward))
        yield found


@contextlib.contextmanager
def overridden(instance: Any, name: str, value: Any) -> Iterator[None]:
    """Set `instance.name = value`; afterwards its own attribute from before is there again, or its class's."""
    before = vars(instance).get(name)
    setattr(instance, name, value)
    try:
        yield
    finally:
        if before is None:
            delattr(instance, name)
        else:
            setattr(instance, name, before)


def _norm(module: nn.Module, dtype: torch.dtype) -> Forward | None:
    weight, eps = getattr(module, "weight", None), _eps(module)
    if eps is None or not isinstance(weight, nn.Parameter) or weight.dim() != 1 or weight.dtype != dtype:
        return None
    if getattr(module, "bias", None) is not None or hasattr(weight, "full_tensor"):
        return None  # a full_tensor: spread over processes, and whole only while FSDP says so
    from influence_fast.kernels.rms_norm import MAX_FEATURES

    kind: Any = type(module)
    found = _norm_kind(kind.forward, kind, eps)
    if found is None or weight.numel() > MAX_FEATURES:
        return None
    offset, round_first = found
    own = module.forward

    def forward(x: torch.Tensor) -> torch.Tensor:
        if x.dtype != dtype:
            return own(x)
        return _RmsNorm.apply(x, weight.detach(), eps, offset, round_first)

    return forward


def _eps(module: nn.Module) -> float | None:
    for name in ("variance_epsilon", "eps"):
        if isinstance(value := getattr(module, name, None), float):
            return value
    return None


@functools.cache
def _norm_kind(forward: Forward, kind: Any, eps: float) -> tuple[float, bool] | None:
    """Return (offset, round_first) with which `rms_norm` is the forward of this class; None if it is not."""
    from influence_fast.kernels.rms_norm import reference

    generator = torch.Generator().manual_seed(0)
    # small numbers too, where eps counts
    x = torch.randn(6, 64, generator=generator) * eps ** torch.tensor([0.0, 0.0, 0.5, 0.5, 1.0, 1.0])[:, None]
    w = 1 + 0.3 * torch.randn(64, generator=generator)

    def by_class(dtype: torch.dtype) -> torch.Tensor | None:
        settings = {"variance_epsilon": eps, "eps": eps, "normalized_shape": (64,), "bias": None}
        return _on_stand_in(forward, kind, x.to(dtype), weight=nn.Parameter(w.to(dtype)), **settings)

    own, half = by_class(x.dtype), by_class(torch.bfloat16)
    if own is None or half is None or own.dtype != x.dtype or half.dtype != torch.bfloat16:
        return None
    for offset in (0.0, 1.0):
        if _agree(own, reference(x, w, eps, offset=offset)):
            made = {
                first: reference(x.bfloat16(), w.bfloat16(), eps, offset=offset, round_first=first)
                for first in (True, False)
            }
            return offset, bool((half - made[True]).norm() <= (half - made[False]).norm())
    return None


def _gated_mlp(module: nn.Module) -> Forward | None:
    children = dict(module.named_children())
    if any(name not in children for name in (*_PROJECTIONS, "act_fn")):
        return None
    act: Any = children["act_fn"]
    if "forward" in vars(act) or act._forward_hooks or act._forward_pre_hooks or act._backward_hooks:
        return None  # somebody watches it, or steers by it
    if not _is_gated_silu(type(module).forward, type(module), act):
        return None
    gate, up, down = (children[name] for name in _PROJECTIONS)

    def forward(x: torch.Tensor) -> torch.Tensor:
        return down(_GatedSilu.apply(gate(x), up(x)))

    return forward


def _is_gated_silu(forward: Forward, kind: Any, activation: nn.Module) -> bool:
    """Return whether this class, with this activation, is down(silu(gate(x)) * up(x)) and nothing more.

    Roundings are compared too.
    """
    from influence_fast.kernels.gated_silu import reference

    generator = torch.Generator().manual_seed(0)
    wide = 3 * torch.randn(5, 32, generator=generator)
    for x in (wide, wide.bfloat16()):
        found = _on_stand_in(
            forward,
            kind,
            x,
            gate_proj=lambda x: x[:, :16],
            up_proj=lambda x: x[:, 16:],
            down_proj=lambda y: y + 0.5,
            act_fn=activation,
        )
        expected = reference(x[:, :16], x[:, 16:]) + 0.5
        if found is None or found.dtype != x.dtype:
            return False
        if not (_agree(found, expected) if x.dtype == torch.float32 else torch.equal(found, expected)):
            return False
    return True


def _attention(module: nn.Module) -> Forward | None:
    """Return the module's own forward, with another function for the rotary one that it finds in its file."""
    own = _without_decorators(type(module).forward)
    if not inspect.isfunction(own) or _ROTARY not in own.__code__.co_names or _ROTARY not in own.__globals__:
        return None
    if not _is_rotary(own.__globals__[_ROTARY]):
        return None
    around = own.__globals__ | {_ROTARY: _rotary_by_kernel(own.__globals__[_ROTARY])}
    made = types.FunctionType(own.__code__, around, own.__name__, own.__defaults__, own.__closure__)
    made.__kwdefaults__ = own.__kwdefaults__
    return types.MethodType(made, module)


def _without_decorators(function: Any) -> Any:
    """Return what transformers' own decorators, which rename arguments, are around; None if somebody else wraps it."""
    import transformers

    theirs = Path(transformers.__file__).parent
    while inspect.isfunction(function) and hasattr(function, "__wrapped__"):
        if not Path(function.__code__.co_filename).is_relative_to(theirs):
            return None
        function = function.__wrapped__
    return function


@functools.cache
def _is_rotary(function: Forward) -> bool:
    """Return whether a model's `apply_rotary_pos_emb(q, k, cos, sin)` turns halves of heads, as `rotary` does."""
    from influence_fast.kernels.rotary import reference

    generator = torch.Generator().manual_seed(0)
    q, k, cos, sin = (torch.randn(1, *shape, generator=generator) for shape in ((4, 3, 8), (2, 3, 8), (3, 8), (3, 8)))
    try:
        with torch.no_grad():
            found = function(q, k, cos, sin)
        return all(
            _agree(own.flatten(0, 2), reference(x, cos, sin).flatten(0, 2))
            for own, x in zip(found, (q, k), strict=True)
        )
    except Exception:
        return False  # it takes other arguments


def _rotary_by_kernel(own: Forward) -> Forward:
    """Return `own` with the kernel for four tensors that it can turn; all else is left to `own`."""

    def rotary(*args: Any, **kwargs: Any) -> Any:
        if kwargs or len(args) != 4 or not _turnable(*args):
            return own(*args, **kwargs)
        q, k, cos, sin = args
        return _Rotary.apply(q, cos, sin), _Rotary.apply(k, cos, sin)

    return rotary


def _turnable(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> bool:
    from influence_fast.kernels.runtime import DTYPES

    heads = all(x.dim() == 4 and x.shape[0] == 1 and x.dtype == cos.dtype for x in (q, k))
    if not heads or cos.dtype not in DTYPES or sin.dtype != cos.dtype:
        return False
    return cos.shape == sin.shape == (1, *q.shape[2:]) and q.shape[2:] == k.shape[2:]


class _StandIn:
    """Attributes and methods of a class that a forward finds on `self`, and nothing else."""

    def __init__(self, kind: type[nn.Module], **attributes: Any) -> None:
        vars(self).update(attributes, _kind=kind)

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._kind, name)
        if not inspect.isfunction(method):
            raise AttributeError(name)
        return types.MethodType(method, self)


def _on_stand_in(forward: Forward, kind: Any, x: torch.Tensor, **attributes: Any) -> torch.Tensor | None:
    """Run the forward of a class on `x`, with these attributes for its own; None if it needs others."""
    if len(inspect.signature(forward).parameters) != 2:  # self and x
        return None
    try:
        with torch.no_grad():
            found = forward(_StandIn(kind, **attributes), x)
    except Exception:
        return None
    return found if isinstance(found, torch.Tensor) and found.shape[0] == x.shape[0] else None


def _dense(x: torch.Tensor) -> torch.Tensor:
    """Return x, or a copy of it whose last dimension is contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _agree(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Return whether two matrices agree row by row, so that rows of small numbers count."""
    if found.shape != expected.shape:
        return False
    return bool(((found - expected).norm(dim=1) <= _SAME * expected.norm(dim=1)).all())


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float, round_first: bool
    ) -> torch.Tensor:
        from influence_fast.kernels.rms_norm import rms_norm

        ctx.save_for_backward(x, weight)
        ctx.how = eps, offset
        rows = _dense(x.reshape(-1, x.shape[-1]))
        return rms_norm(rows, weight, eps, offset=offset, round_first=round_first).view(x.shape)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        from influence_fast.kernels.rms_norm import rms_norm_backward

        x, weight = ctx.saved_tensors
        eps, offset = ctx.how
        g, rows = (_dense(part.reshape(-1, x.shape[-1])) for part in (grads[0], x))
        return rms_norm_backward(g, rows, weight, eps, offset=offset).view(x.shape), None, None, None, None


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        from influence_fast.kernels.rotary import rotary

        cos, sin = _dense(cos), _dense(sin)
        ctx.save_for_backward(cos, sin)
        return rotary(_dense(x), cos, sin)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        from influence_fast.kernels.rotary import rotary

        return rotary(_dense(grads[0]), *ctx.saved_tensors, backward=True), None, None


class _GatedSilu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        from influence_fast.kernels.gated_silu import gated_silu

        ctx.save_for_backward(gate, up)
        return gated_silu(gate.contiguous(), up.contiguous())

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        from influence_fast.kernels.gated_silu import gated_silu_backward

        gate, up = (part.contiguous() for part in ctx.saved_tensors)
        return gated_silu_backward(grads[0].contiguous(), gate, up)
