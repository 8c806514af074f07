"""LoRA on parameters of modules of no known kind, as of routers: autograd's gradients through the model's own forward.

Right for any use of the parameter. A module that treats its tokens one by one is called once for each example of a
pack, with a copy of the factors for each; any other takes one example at a time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from influence_fast.gradients.model.fused_layers import overridden
from influence_fast.gradients.model.lora_parameters import LoraParameter, outermost
from influence_fast.gradients.step.lora_embedding import EmbeddingPart, LoraEmbedding
from influence_fast.gradients.step.reduction import Reducer
from influence_fast.gradients.step.routed import RoutedExperts, is_experts

# Numbers of a parameter whose updated copy for each example of a pack is small beside the activations.
_SMALL = 1 << 20


def _add(reducer: Reducer, number: int, example: int, grads: Sequence[torch.Tensor]) -> None:
    """Add one example's gradients of lora_A and lora_B, the adapter's scaling in them."""
    grad_a, grad_b = (grad.to(reducer.dtype) for grad in grads)
    if reducer.projected:
        r_in, r_out = (one.to(grad_a.device, reducer.dtype) for one in reducer.columns(number))
        grad_a, grad_b = grad_a @ r_in, r_out.T @ grad_b
    reducer.add_factors(number, example, [grad_a[None], grad_b[None]])


class AutogradParameters:
    """LoRA on parameters of a module that takes one example at a time."""

    packs = False

    def __init__(self, numbers: Sequence[int], members: Sequence[LoraParameter], reducer: Reducer) -> None:
        self.members, self.reducer = list(zip(numbers, members, strict=True)), reducer

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """Set the factors to ask for a gradient while the block runs; one that they had is kept aside."""
        factors = [factor for _, member in self.members for factor in member.pair]
        kept = [factor.grad for factor in factors]
        try:
            for factor in factors:
                factor.grad = None
                factor.requires_grad_(True)
            yield
        finally:
            for factor, grad in zip(factors, kept, strict=True):
                factor.requires_grad_(False)
                factor.grad = grad

    def begin(self, anchor: torch.Tensor) -> None:
        """Drop what a step that failed has left."""
        for _, member in self.members:
            for factor in member.pair:
                factor.grad = None

    def finish(self) -> None:
        """Add the factors' gradients to the reducer's row, of the one example that there was."""
        for number, member in self.members:
            grads = [torch.zeros_like(one) if one.grad is None else one.grad for one in member.pair]
            for factor in member.pair:
                factor.grad = None
            _add(self.reducer, number, 0, grads)


class SplitModule:
    """LoRA on small parameters of a module that treats tokens one by one: it is called for each example of a pack."""

    packs = True

    def __init__(self, numbers: Sequence[int], members: Sequence[LoraParameter], reducer: Reducer) -> None:
        self.layer: Any = outermost(members)
        self.members, self.reducer = list(zip(numbers, members, strict=True)), reducer
        names = {id(parameter): name for name, parameter in self.layer.named_parameters()}
        self._names = [[names[id(factor)] for factor in member.pair] for _, member in self.members]
        self._copies: list[tuple[int, list[list[torch.Tensor]]]] = []  # of each call: the example, its factors
        self._stepping = False  # else nothing but losses is asked for
        self._own = self.layer.forward

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """Replace the module's forward by this one while the block runs."""
        with overridden(self.layer, "forward", self.forward):
            yield

    def begin(self, anchor: torch.Tensor) -> None:
        """Start a step; drop what one that failed has left."""
        self._copies, self._stepping = [], True

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return what the module gives for the tokens of a pack."""
        if not self._stepping:  # losses alone
            return self._own(x, *args, **kwargs)
        if args or kwargs:
            raise TypeError("a module is called for each example with its tokens alone")
        return self._split(x, self.reducer.cu_seqlens, self._with_copies)

    def _with_copies(self, example: int, tokens: torch.Tensor) -> Any:
        copies = [[factor.detach().requires_grad_() for factor in member.pair] for _, member in self.members]
        self._copies.append((example, copies))
        places = {
            name: copy for pair in zip(self._names, copies, strict=True) for name, copy in zip(*pair, strict=True)
        }
        with overridden(self.layer, "forward", self._own):
            return torch.func.functional_call(self.layer, places, (tokens,))

    @staticmethod
    def _split(x: torch.Tensor, bounds: Sequence[int], call: Any) -> Any:
        """Call a module for each part of tokens x [T, d] or [1, T, d], and put its outputs together again."""
        parts = [x[..., start:end, :] for start, end in pairwise(bounds)]
        found = [call(place, part) for place, part in enumerate(parts)]
        if isinstance(found[0], torch.Tensor):
            return torch.cat(found, dim=found[0].dim() - 2)
        return tuple(torch.cat(outputs, dim=outputs[0].dim() - 2) for outputs in zip(*found, strict=True))

    def finish(self) -> None:
        """Add the gradients of each example's factors to its row."""
        for example, copies in self._copies:
            for (number, _), pair in zip(self.members, copies, strict=True):
                if any(copy.grad is not None for copy in pair):  # else of a forward that was only recomputed
                    grads = [torch.zeros_like(copy) if copy.grad is None else copy.grad for copy in pair]
                    _add(self.reducer, number, example, grads)
        self._copies, self._stepping = [], False

    @torch.no_grad()
    def agrees(self, called: tuple[Any, ...]) -> bool:
        """Tell whether the module, called as in `called`, gives the same for some of the tokens at a time."""
        if len(called) != 1 or not isinstance(called[0], torch.Tensor) or not called[0].is_floating_point():
            return False
        if any(member.weight.dim() != 2 or member.weight.numel() > _SMALL for _, member in self.members):
            return False
        x = called[0]
        if x.dim() not in (2, 3) or x.numel() != x.shape[-2] * x.shape[-1]:
            return False
        if x.is_meta:
            return True
        third = x.shape[-2] // 3
        try:
            whole = self.layer(x)
            apart = self._split(x, [0, third, third + 1, x.shape[-2]], lambda _, part: self.layer(part))
        except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
            return False
        wholes, parts = ([one] if isinstance(one, torch.Tensor) else list(one) for one in (whole, apart))
        most = 1e-4 if torch.finfo(x.dtype).eps < 1e-4 else 0.1  # where rounding sends a token to other experts
        return len(wholes) == len(parts) and all(_same(*both, most) for both in zip(wholes, parts, strict=True))


def _same(one: Any, other: Any, most: float) -> bool:
    if not isinstance(one, torch.Tensor) or one.shape != other.shape or one.dtype != other.dtype:
        return False
    if not one.is_floating_point():
        return float((one != other).double().mean()) <= most
    return bool((one - other).norm() <= most * one.norm())


Part = RoutedExperts | SplitModule | AutogradParameters | EmbeddingPart


def parameter_parts(
    members: Sequence[tuple[int, LoraParameter]],
    calls: dict[nn.Module, tuple[Any, ...]],
    reducer: Reducer,
) -> list[Part]:
    """Return for each module with LoRA on parameters, and each embedding, how its gradients are made.

    members: each with its place among all LoRA modules. calls: what each of these modules' outermost wrappers was
    called with.
    """
    modules: dict[nn.Module, list[tuple[int, LoraParameter]]] = {}
    parts: list[Part] = []
    for number, member in members:
        if isinstance(member, LoraEmbedding):
            parts.append(EmbeddingPart(number, member, reducer))
        else:
            modules.setdefault(member.module, []).append((number, member))
    for held in modules.values():
        numbers, own = [number for number, _ in held], [member for _, member in held]
        called = calls.get(outermost(own), ())
        part = (RoutedExperts if is_experts(own) else SplitModule)(numbers, own, reducer)
        parts.append(part if part.agrees(called) else AutogradParameters(numbers, own, reducer))
    return parts
