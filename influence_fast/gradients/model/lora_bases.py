"""Which layers under LoRA have gradients here, and how a message names the ones that do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from influence_fast.gradients.model.quantized import kind_of


def other_targets(names: Sequence[str], refused: Sequence[str], setting: str = "target_modules") -> str:
    """Return the end of a message that names values of `setting` for the layers `names` that are not `refused`.

    A target is the end of a module's name, as peft takes it: its last part, or its last two where a refused layer has
    the same last part.
    """
    short, long = ({_ending(name, parts) for name in refused} for parts in (1, 2))
    working = set()
    for name in set(names) - set(refused):
        if (last := _ending(name, 1)) not in short:
            working.add(last)
        elif (ending := _ending(name, 2)) not in long:
            working.add(ending)
    return f", as by {setting}={sorted(working)}" if working else ""


def _ending(name: str, parts: int) -> str:
    return ".".join(name.split(".")[-parts:])


def is_supported(layer: Any) -> bool:
    """Tell whether gradients of LoRA on the base of `layer` are computed: on products, embeddings, and parameters."""
    from peft.tuners.lora.layer import ParamWrapper

    base = layer.get_base_layer()
    if layer.lora_embedding_A:
        # else what a token's row is, or its gradient, depends on the other tokens
        return isinstance(base, nn.Embedding) and base.max_norm is None and not base.scale_grad_by_freq
    return isinstance(layer, ParamWrapper) or is_a_product(base)


def is_a_product(base: Any) -> bool:
    """Tell whether a layer computes x W^T + b and nothing else; a subclass of nn.Linear is tried on random tokens.

    A quantised one is taken to, and compared with autograd when an engine opens.
    """
    if kind_of(base) is not None:
        return True
    if type(base) is nn.Linear or type(base).__name__ == "Conv1D":
        return True
    if not isinstance(base, nn.Linear):
        return False
    weight = base.weight
    if hasattr(weight, "full_tensor"):  # a DTensor, whole only while the layer around it runs
        return type(base).forward is nn.Linear.forward
    if weight.device.type == "meta":
        return True
    x = torch.randn(2, base.in_features, generator=torch.Generator().manual_seed(0)).to(weight.device, weight.dtype)
    with torch.no_grad():
        try:
            found = base(x)
        except Exception:  # a forward of another kind
            return False
        wanted = nn.functional.linear(x, weight, base.bias)
    most = 1e-5 if weight.dtype in (torch.float32, torch.float64) else 1e-2
    if not isinstance(found, torch.Tensor) or found.shape != wanted.shape:  # a router, which gives several
        return False
    return bool((found - wanted).norm() <= most * wanted.norm())
