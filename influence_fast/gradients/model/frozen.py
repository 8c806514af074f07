"""Freeze a model while it is open, and have its layers recomputed in the backward; everything is put back."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from influence_fast.gradients.model.fused_layers import overridden


@contextlib.contextmanager
def recomputing(layers: Sequence[Any]) -> Iterator[None]:
    """Set `layers` (of `OpenedModel.recomputable`) to be recomputed in the backward while the block runs."""
    try:
        for layer in layers:
            layer.gradient_checkpointing = layer.training = True
        yield
    finally:
        for layer in layers:
            layer.gradient_checkpointing = layer.training = False


@contextlib.contextmanager
def frozen(model: Any) -> Iterator[None]:
    """Disable dropout, and gradients of all parameters, while the block runs.

    Layers that the model recomputes do so without reentrant checkpointing, which needs inputs that ask for gradients.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    training = {module: module.training for module in model.modules()}
    asking = [parameter for parameter in model.parameters() if parameter.requires_grad]
    stack = contextlib.ExitStack()
    try:
        model.eval()
        for module in model.modules():
            # such a layer recomputes only while training; its own flag touches nothing else
            if isinstance(module, GradientCheckpointingLayer) and getattr(module, "gradient_checkpointing", False):
                module.training = True
                stack.enter_context(overridden(module, "_gradient_checkpointing_func", _checkpoint()))
        for parameter in asking:
            parameter.requires_grad_(False)
        yield
    finally:
        stack.close()
        for parameter in asking:
            parameter.requires_grad_(True)
        for module, flag in training.items():
            module.training = flag


def _checkpoint() -> Callable[..., Any]:
    from torch.utils.checkpoint import checkpoint

    return functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=False)


def recomputes(base: Any) -> bool:
    """Tell whether the model has its own gradient checkpointing switched on."""
    return any(getattr(module, "gradient_checkpointing", False) for module in base.modules())


@contextlib.contextmanager
def recomputable_layers(base: Any) -> Iterator[list[Any]]:
    """Yield the layers that `recomputing` can switch; none where the model does so already, or cannot."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers: list[Any] = [module for module in base.modules() if isinstance(module, GradientCheckpointingLayer)]
    if recomputes(base) or not getattr(base, "supports_gradient_checkpointing", False):
        yield []
        return
    # Set here and not by the model's own switch, which would make the embedding's output ask for a gradient too and
    # leave that behind. Nothing is random with dropout off.
    with contextlib.ExitStack() as stack:
        for layer in layers:
            stack.enter_context(overridden(layer, "_gradient_checkpointing_func", _checkpoint()))
        yield layers
