"""Hooks on a model's layers and sums: gather their outputs, round them once more, or see how they are rounded."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode


@contextlib.contextmanager
def captured(module: Any) -> Iterator[list[torch.Tensor]]:
    """Collect the last hidden states [1, n, d] that `module` gives out while the block runs."""
    seen: list[torch.Tensor] = []

    def keep(_: Any, __: Any, output: Any) -> None:
        hidden = getattr(output, "last_hidden_state", None)
        if isinstance(hidden, torch.Tensor):
            seen.append(hidden.clone())

    handle = module.register_forward_hook(keep)
    try:
        yield seen
    finally:
        handle.remove()


def _layers(decoder: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the outermost members of lists of modules, by name; every module where there is no list."""
    lists = [name for name, module in decoder.named_modules() if isinstance(module, nn.ModuleList)]
    outer = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    found = [
        (f"{name}.{place}" if name else place, layer)
        for name in outer
        for place, layer in decoder.get_submodule(name).named_children()
    ]
    return found or [(name, module) for name, module in decoder.named_modules() if name]


def outputs_of(output: Any, whole: bool) -> torch.Tensor:
    """Return what a model or its decoder gives for one row of tokens, [T, d]: the last hidden states, or the logits.

    whole: whether a whole model was called, so that its logits are meant.
    """
    hidden = getattr(output, "last_hidden_state", None)
    found: torch.Tensor = (output.logits if whole or hidden is None else hidden)[0]
    return found


def _first_tensor(output: Any) -> torch.Tensor | None:
    if isinstance(output, torch.Tensor):
        return output
    values = output if isinstance(output, tuple | list) else getattr(output, "values", tuple)()
    return next((value for value in values if isinstance(value, torch.Tensor)), None)


@contextlib.contextmanager
def recorded_layers(decoder: nn.Module) -> Iterator[list[tuple[str, torch.Tensor]]]:
    """Collect the layers' outputs in the order of their calls."""
    seen: list[tuple[str, torch.Tensor]] = []

    def keep(name: str, output: Any) -> None:
        if (tensor := _first_tensor(output)) is not None:
            seen.append((name, tensor.detach().clone()))

    handles = [
        layer.register_forward_hook(lambda _, __, output, name=name: keep(name, output))  # type: ignore[misc]
        for name, layer in _layers(decoder)
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def rounded_layers(decoder: nn.Module, unit: float) -> Iterator[None]:
    """Change every number that a layer gives out by `unit` of itself, up or down, while the block runs."""
    generator = torch.Generator().manual_seed(0)

    def shake(_: Any, __: Any, output: Any) -> Any:
        tensor = _first_tensor(output)
        if tensor is None or not tensor.is_floating_point():
            return output
        signs = torch.randint(0, 2, tensor.shape, generator=generator).mul_(2).sub_(1)
        moved = tensor * (1 + unit * signs).to(tensor.device, tensor.dtype)
        if tensor is output:
            return moved
        if isinstance(output, tuple):
            return tuple(moved if value is tensor else value for value in output)
        return output

    handles = [layer.register_forward_hook(shake) for _, layer in _layers(decoder)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class CoarsestRounding(TorchDispatchMode):
    """Watch a forward for the coarsest dtype that its float64 numbers are turned into; `unit` is that dtype's rounding.

    A model whose norms are computed in float32 rounds there, whatever the dtype of its weights.
    """

    unit = torch.finfo(torch.float64).eps

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and args[0].dtype == torch.float64 and found.is_floating_point():
            self.unit = max(self.unit, torch.finfo(found.dtype).eps)
        return found


def as_rows(tensor: torch.Tensor) -> torch.Tensor:
    """Return a layer's output as [n, d], a number a row where it has one dimension."""
    return tensor.reshape(-1, tensor.shape[-1]) if tensor.dim() > 1 else tensor[:, None]
