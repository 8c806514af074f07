"""Which LoRA layers of a model cannot be scored, told before anything is trained on them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from influence_fast.gradients.model.lora_bases import is_supported
from influence_fast.gradients.model.routed_modules import routed_modules

_TOKENS = 24  # so that every router spreads them


def unscorable_layers(model: Any) -> dict[str, str]:
    """Return the LoRA layers of a peft model that have no gradient this package computes: why, by the module's name.

    These are layers over something else than a plain product, and layers that the model's forward on text never calls
    (of a vision tower, say). The second takes one forward of 24 tokens, which is left out on the meta device and where
    the model cannot be called with tokens alone.
    """
    from peft.tuners.lora import LoraLayer

    base = model.get_base_model()
    layers: dict[str, Any] = {name: module for name, module in base.named_modules() if isinstance(module, LoraLayer)}
    found = {
        name: f"it is a {type(layer.get_base_layer()).__name__}"
        for name, layer in layers.items()
        if not is_supported(layer)
    }
    calls = _calls(base, list(layers.values()))
    if calls is not None:
        uncalled = {place for place, count in enumerate(calls) if not count}
        names = list(layers)
        for place in sorted(uncalled - routed_modules(names, set(), uncalled)):
            found.setdefault(names[place], "a text never comes through it")
    return found


def _calls(base: Any, layers: list[nn.Module]) -> list[int] | None:
    """Count how often a forward on text calls each of `layers`; None if that is not known."""
    embeddings = base.get_input_embeddings().weight
    if embeddings.device.type == "meta":
        return None
    calls = [0] * len(layers)

    def counting(place: int) -> Callable[..., None]:
        def count(*_: Any) -> None:
            calls[place] += 1

        return count

    handles = [layer.register_forward_pre_hook(counting(place)) for place, layer in enumerate(layers)]
    training = {module: module.training for module in base.modules()}
    ids = torch.arange(_TOKENS, device=embeddings.device) % len(embeddings)
    try:
        base.eval()
        with torch.no_grad():
            base(input_ids=ids[None], use_cache=False)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # of the model's own code, which may want more than tokens; training will say so
        return None
    finally:
        for handle in handles:
            handle.remove()
        for module, flag in training.items():
            module.training = flag
    return calls
