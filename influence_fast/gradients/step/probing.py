"""Run a few tokens through a model to learn what its layers see, before an engine calls it in packs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from influence_fast.data.packing import Pack
from influence_fast.errors import ModelError, truncated_list, warn_once
from influence_fast.gradients.model import packed_attention as attention
from influence_fast.gradients.model.lora import LoraLinear
from influence_fast.gradients.model.lora_bases import other_targets
from influence_fast.gradients.model.lora_parameters import LoraParameter
from influence_fast.gradients.model.pack_isolation import Separation
from influence_fast.gradients.model.referee import Referee
from influence_fast.gradients.model.routed_modules import routed_modules
from influence_fast.gradients.model.token_order import out_of_order
from influence_fast.gradients.step.autograd_parameters import AutogradParameters, Part, SplitModule
from influence_fast.gradients.step.routed import RoutedExperts

logger = logging.getLogger(__name__)


_PROBED = 24  # tokens: each of 128 experts of which a token takes 8 meets one or two


def call_packed(module: Any, config: Any, mode: Separation, tokens: attention.PackedTokens, **kwargs: Any) -> Any:
    return attention.call(
        module,
        config._attn_implementation,
        tokens,
        with_bounds=mode.takes_bounds,
        with_positions=not mode.own_attention,
        **kwargs,
    )


def probe_tokens(referee: Referee | None) -> torch.Tensor:
    """Return the tokens [n] int64 of `probe`: enough that a router spreads them."""
    if referee is None:
        return torch.zeros(2, dtype=torch.int64)
    return max((text.ids for text in referee.texts), key=len)[:_PROBED]


def probe(
    call: Callable[..., Any],
    linears: Sequence[LoraLinear],
    mode: Separation,
    implementation: str | None,
    ids: torch.Tensor,
) -> tuple[dict[int, torch.Tensor], dict[nn.Module, tuple[Any, ...]], Separation, str]:
    """Run the tokens `ids` to learn which LoRA linears share an input, what wrappers of parameters are called with, how
    to call the model for what its layers see, and why no step can be a CUDA graph."""
    inputs: dict[int, torch.Tensor] = {}
    wrapped: dict[nn.Module, tuple[Any, ...]] = {}
    calls = [0] * len(linears)

    def called(n: int, layer: nn.Module, args: tuple[Any, ...]) -> None:
        calls[n] += 1
        if isinstance(linears[n], LoraParameter):
            wrapped[layer] = args
        else:
            inputs[n] = args[0]

    handles = [
        member.layer.register_forward_pre_hook(lambda layer, args, n=n: called(n, layer, args))
        for n, member in enumerate(linears)
    ]
    pack = Pack([0], ids, torch.arange(len(ids)), ids, [0, len(ids)])
    tokens = attention.PackedTokens.of(pack).to(linears[0].device)
    seen: list[bool] = []
    try:
        with torch.no_grad():
            call(tokens, packed_probe=seen)
    finally:
        for handle in handles:
            handle.remove()
    strange = {n for n, x in inputs.items() if x.numel() != len(ids) * linears[n].d_in}
    mode, why = _heed_calls(linears, calls, strange, mode), ""
    if not mode.packs_pay:
        why = "the examples of a pack would see each other in this model"
    elif max(calls) > 1:
        why = "a LoRA layer is called more than once, and its sums take each pack's bounds on the host"
    elif implementation == attention.PACKED and not all(seen):
        why = (
            "this model's attention runs an example at a time (it takes a 16-bit model, with heads of up to 256 "
            "numbers in multiples of 8)"
        )
    return inputs, wrapped, mode, why


def _heed_calls(linears: Sequence[LoraLinear], calls: Sequence[int], strange: set[int], mode: Separation) -> Separation:
    """Return how to call a model whose LoRA layers were called so often, and say which of them text leaves out.

    A layer that is not called has no part in the loss: its gradient is zero. One that sees other tokens than the text's
    (some of them, as a routed expert, a prompt before it, several streams of it) has those of one example where
    examples go one at a time, and its sums are over all that it sees.

    Raises ModelError where text reaches none.
    """
    names = [member.name for member in linears]
    uncalled = {n for n, count in enumerate(calls) if not count}
    routed = routed_modules(names, strange, uncalled)
    unused = [names[n] for n in sorted(uncalled - routed)]
    if len(unused) == len(names):
        raise ModelError(
            f"{unused[0]}: the model's forward on text calls no {linears[0].noun}, as where they are those of images "
            f"or of an encoder: name layers of the text decoder in {linears[0].named_by}"
        )
    if unused:
        warn_once(
            logger,
            f"the model's forward on text never calls the {linears[0].noun}s {truncated_list(unused)}, whose gradients "
            f"are zero; rows are shorter without them{other_targets(names, unused, linears[0].named_by)}",
        )
    if not routed:
        return mode
    if mode.packs_pay:
        name = names[min(routed)]
        warn_once(logger, f"{name}: sees other tokens than a text's (a routed expert?), so examples go one at a time")
    return replace(mode, apart=False)


def heed_order(
    base: Any, linears: Sequence[LoraLinear], call: Callable[..., Any], ids: torch.Tensor, mode: Separation
) -> Separation:
    """Return how to call a model of which some LoRA layer may see a pack's tokens in another order."""
    layers = {id(member.layer): member.layer for member in linears}
    found = out_of_order(call, base.get_input_embeddings(), list(layers.values()), ids, linears[0].device)
    if found is None:
        return mode
    name = next(member.name for member in linears if member.layer is found)
    warn_once(logger, f"{name}: sees the tokens of a pack in another order, so examples go one at a time")
    return replace(mode, apart=False)


def heed_parameters(parts: Sequence[Part], mode: Separation) -> Separation:
    """Return how to call a model with LoRA on parameters, and say what of its experts is not scored."""
    kinds = {type(part) for part in parts}
    if RoutedExperts in kinds and SplitModule not in kinds:
        warn_once(
            logger,
            "routed experts are scored at the model's own choice of experts, which has no gradient; its routers have "
            "no LoRA and are left out",
        )
    alone = [part for part in parts if isinstance(part, AutogradParameters)]
    if not alone:
        return mode
    if mode.packs_pay:
        _, member = alone[0].members[0]
        what = f"LoRA on the parameter {member.parameter} of {type(member.module).__name__}"
        warn_once(logger, f"{member.name}: {what} is differentiated as it stands, so examples go one at a time")
    return replace(mode, apart=False)
