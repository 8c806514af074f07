"""Find the LoRA layers of a model that its active adapters change, as plain tensors."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from influence_fast.data.adapter_names import is_adapter_parameter
from influence_fast.data.fingerprints import held_adapters
from influence_fast.data.wrappers import unwrapped
from influence_fast.errors import ModelError, truncated_list, warn_once
from influence_fast.gradients.model.adapter_kinds import check_active_kinds, check_together
from influence_fast.gradients.model.lora import LoraLinear
from influence_fast.gradients.model.lora_bases import is_a_product, is_supported, other_targets
from influence_fast.gradients.model.lora_parameters import parameter_of
from influence_fast.gradients.model.lora_parts import Magnitude, join_adapters
from influence_fast.gradients.model.quantized import kind_of
from influence_fast.gradients.model.trained_beside import _beside_in, _unfrozen_in, beside_warning
from influence_fast.gradients.step.lora_embedding import embedding_of

logger = logging.getLogger(__name__)


def find_lora_linears(model: nn.Module) -> list[LoraLinear]:
    """Find every LoRA linear of `model` that its active adapters change, in the order of their parameters in the model.

    Raises ModelError when there is none, one is of a kind whose gradient this package does not compute, or an adapter
    is of another kind than LoRA, merged or disabled.
    """
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lora.layer import ParamWrapper

    model = unwrapped(model)
    check_active_kinds(model)
    layers: list[tuple[str, Any]] = [(name, m) for name, m in model.named_modules() if isinstance(m, LoraLayer)]
    if not layers:
        raise ModelError(
            "the model has no LoRA adapter: load one (peft.PeftModel.from_pretrained) or add a fresh one "
            "(peft.get_peft_model) before asking for per-example gradients; for those of its own weights, as of a "
            "fully fine-tuned model, name a target: Projection(kind='kron', target='all-linear'), --target all-linear"
        )
    active = [(name, layer, adapters) for name, layer in layers if (adapters := _active_in(layer))]
    if not active:
        held = sorted({adapter for _, layer in layers for adapter in held_adapters(layer) or ()})
        raise ModelError(
            f"no layer has the active adapter {truncated_list(layers[0][1].active_adapters)}; they have "
            f"{truncated_list(held)}: call set_adapter with one of these"
        )
    refused = [name for name, layer, _ in active if not is_supported(layer)]
    if refused:
        kind = type(model.get_submodule(refused[0]).get_base_layer()).__name__  # type: ignore[operator]
        raise ModelError(
            f"{refused[0]}: LoRA over {kind} is not supported (linears that are a plain product are); leave that "
            f"module out of target_modules{other_targets([name for name, _, _ in active], refused)}"
        )
    if any(isinstance(layer, ParamWrapper) for _, layer, _ in active):  # inside another's base layer, which is first
        places = {id(parameter): place for place, parameter in enumerate(model.parameters())}
        active.sort(key=lambda one: min((places[id(p)] for p in one[1].lora_A.parameters()), default=-1))
    quantised = any(kind_of(layer.get_base_layer()) is not None for _, layer, _ in active)
    activations = _activation_dtype(model) if quantised else torch.float32  # read of quantised ones alone
    several = len({adapter for _, _, adapters in active for adapter in adapters}) > 1
    found = [_as_plain(name, layer, adapters, activations, several) for name, layer, adapters in active]
    if others := _beside_in(model):
        warn_once(logger, beside_warning(others))
    if unfrozen := _unfrozen_in(model):
        warn_once(
            logger,
            f"parameters beside LoRA factors ask for gradients ({truncated_list(unfrozen)}); gradients and scores here "
            "are of the factors alone: train with these frozen to have all of it scored",
        )
    return found


def _active_in(layer: Any) -> list[str]:
    """Return the active adapters that have factors in `layer`; none if it belongs to another adapter."""
    held = held_adapters(layer) or ()
    return [name for name in layer.active_adapters if name in held]


def _as_plain(name: str, layer: Any, active: list[str], activations: torch.dtype, several: bool) -> LoraLinear:
    """Take a layer's active adapters as one; `several`: whether more than one is active in the model."""
    from peft.tuners.lora.layer import ParamWrapper

    if layer.disable_adapters:
        raise ModelError(f"{name}: the adapter is disabled; leave disable_adapter() first, or enable its layers")
    if layer.merged:
        raise ModelError(f"{name}: the adapter is merged into the base weights; call unmerge_adapter() first")
    check_together(name, layer, active)
    if layer.lora_embedding_A:
        return embedding_of(name, layer, active, several)
    if not isinstance(layer, ParamWrapper) or _is_weight(layer):
        return _linear_of(name, layer, active, activations, several)
    if several:
        raise ModelError(
            f"{name}: several adapters are active ({truncated_list(active)} here), and LoRA on parameters has rows of "
            "one alone: activate one at a time by set_adapter"
        )
    return parameter_of(name, layer, active[0])


def _is_weight(layer: Any) -> bool:
    """Return whether a wrapper of a parameter is around a linear's weight and nothing else is: it is that linear's
    LoRA.
    """
    base = layer.base_layer
    return getattr(layer, "parameter_name", "") == "weight" and isinstance(base, nn.Linear) and is_a_product(base)


def _linear_of(name: str, layer: Any, active: list[str], activations: torch.dtype, several: bool) -> LoraLinear:
    base = layer.get_base_layer()
    joined = join_adapters(layer, active, several)
    if quantised := kind_of(base) is not None:
        weight, bias = joined.a.new_empty(0, dtype=activations), None
    else:
        weight = (base.weight if isinstance(base, nn.Linear) else base.weight.T).detach()
        bias = None if base.bias is None else base.bias.detach()
    magnitude = None
    if active[0] in layer.lora_magnitude_vector:
        magnitude, bias = Magnitude.of(name, layer, active[0], weight, bias, joined), None
    added = None if joined.added_bias is None else joined.added_bias.to(weight.dtype)
    if added is not None and not quantised and not hasattr(bias, "full_tensor"):
        bias = added if bias is None else bias + added
    return LoraLinear(
        name=name,
        layer=layer,
        weight=weight,
        bias=bias,
        a=joined.a,
        b=joined.b,
        scaling=joined.scaling,
        quantized=quantised,
        parts=joined.parts,
        added_bias=added,
        magnitude=magnitude,
    )


def _activation_dtype(model: Any) -> torch.dtype:
    """Return the widest dtype of the parameters that are neither factors nor quantised: norms and embeddings.

    They make what flows between quantised layers; a head may be wider and changes nothing before it.
    """
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    apart = set() if head is None else {id(parameter) for parameter in head.parameters()}
    apart -= {id(parameter) for parameter in base.get_input_embeddings().parameters()} if apart else set()
    dtypes = {
        parameter.dtype
        for name, parameter in model.named_parameters()
        if parameter.is_floating_point()
        and parameter.element_size() > 1
        and id(parameter) not in apart
        and not is_adapter_parameter(name)
        and not hasattr(parameter, "__tensor_flatten__")
    }
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).bits, default=torch.float32)
