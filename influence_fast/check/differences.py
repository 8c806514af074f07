"""Central differences of a model's plain loss along directions in its adapter's parameters.

The derivative of a loss along a unit direction u is `(l(theta + eps u) - l(theta - eps u)) / (2 eps)`: two plain
forwards, no backward and no hook, so it holds for any attention, mask, quantised base or router. Its error is eps^2
times a third derivative, and what the losses are rounded by, over 2 eps.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from influence_fast.data.adapter_names import ADAPTER_MARK
from influence_fast.data.fingerprints import active_adapters
from influence_fast.data.packing import IGNORED
from influence_fast.gradients.model.fused_layers import overridden
from influence_fast.gradients.rows.layout import LayoutEntry

# Tokens whose logits are in fp64 at a time: with a vocabulary of 152k they take 0.3 GB.
_CHUNK = 256


@dataclass(frozen=True, slots=True)
class Difference:
    """The loss difference of one example between two positions of the adapter.

    measured: l(theta + d) - l(theta - d) by plain forwards. predicted: the row's product with 2 d, as it was made in
    the parameters' dtype. distance: |2 d|.
    """

    measured: float
    predicted: float
    distance: float

    def error(self, norm: float) -> float:
        """Return the derivative's signed error relative to a norm; NaN where the dtype kept the adapter in place."""
        return (self.measured - self.predicted) / (self.distance * norm) if self.distance else math.nan


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return every parameter of the active adapters by its name: LoRA's factors and the parameters beside them."""
    active = active_adapters(model)
    found = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        parts = name.split(".")
        place = next((i for i, part in enumerate(parts) if part.startswith(ADAPTER_MARK)), None)
        if place is None:
            continue
        if active is None or (place + 1 < len(parts) and parts[place + 1] in active):
            found[name] = parameter
    return found


def scored_parameters(
    layout: Sequence[LayoutEntry], parameters: Mapping[str, nn.Parameter]
) -> tuple[list[str], list[str]]:
    """Return the names of the parameters in `layout`, entry by entry, and the names of all other adapter parameters.

    Raises KeyError naming a factor that matches no parameter, or more than one.
    """
    names = []
    for entry in layout:
        # peft keeps this bias in B.
        is_bias = entry.factor.startswith("lora_bias")
        factor = entry.factor.replace("lora_bias", "lora_B")
        start, numbers = f"{entry.module}.{factor}", math.prod(entry.shape)
        fitting = [
            name
            for name, parameter in parameters.items()
            if (name == start or name.startswith(f"{start}."))
            and parameter.numel() == numbers
            and name.endswith(".bias") == is_bias
        ]
        if len(fitting) != 1:
            raise KeyError(f"{entry.module}.{entry.factor}")
        names.append(fitting[0])
    return names, sorted(set(parameters) - set(names))


@contextlib.contextmanager
def fixed_norms(model: nn.Module, forward: Callable[[], object]) -> Iterator[bool]:
    """Hold the norms that DoRA divides by constant inside the block, and yield whether there are any.

    DoRA's gradients take them for constants, which differences of the losses themselves do not. forward: a function
    that calls every such layer once.
    """
    norms: dict[Any, torch.Tensor] = {}

    def fixed(layer: Any, own: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def norm(*args: Any, **kwargs: Any) -> torch.Tensor:
            if layer not in norms:
                norms[layer] = own(*args, **kwargs)
            return norms[layer]

        return norm

    layers: list[Any] = [module for module in model.modules() if hasattr(module, "get_weight_norm")]
    with contextlib.ExitStack() as stack:
        for layer in layers:
            stack.enter_context(overridden(layer, "get_weight_norm", fixed(layer, layer.get_weight_norm)))
        if layers:
            forward()
        yield bool(norms)


@contextlib.contextmanager
def restored(parameters: Sequence[nn.Parameter]) -> Iterator[list[torch.Tensor]]:
    """Yield copies of the parameters' values, and restore them to the bit whatever the block does."""
    copies = [parameter.detach().clone() for parameter in parameters]
    try:
        yield copies
    finally:
        with torch.no_grad():
            for parameter, copy in zip(parameters, copies, strict=True):
                parameter.copy_(copy)


@torch.no_grad()
def differences(
    losses: Callable[[], Sequence[float]],
    rows: torch.Tensor,
    direction: torch.Tensor,
    parameters: Sequence[nn.Parameter],
    step: float,
) -> list[Difference]:
    """Measure each example's loss with the parameters moved by +-step along a direction, and put them back.

    Args:
        losses: gives the examples' losses at the parameters' present numbers.
        rows: [E, k], each example's gradient of all parameters, one after the other.
        direction: [k], of norm 1.
        parameters: in the order of the rows.
        step: how far they are moved each way.

    Returns:
        A difference an example. What the parameters' dtype made of the step is what the prediction uses.
    """
    sizes = [parameter.numel() for parameter in parameters]
    parts = [part.view(p.shape) for part, p in zip(direction.split(sizes), parameters, strict=True)]
    with restored(parameters) as given:
        reached = []
        measured = []
        for sign in (1, -1):
            for parameter, copy, part in zip(parameters, given, parts, strict=True):
                wide = torch.promote_types(parameter.dtype, torch.float32)
                parameter.copy_(copy.to(wide) + sign * step * part.to(parameter.device, wide))
            measured.append(list(losses()))
            reached.append([parameter.detach().clone() for parameter in parameters])
        predicted = torch.zeros(len(rows), dtype=torch.float64)
        squared = 0.0
        for high, low, columns in zip(*reached, rows.split(sizes, dim=1), strict=True):
            moved = (high.double() - low.double()).flatten()
            predicted += (columns.double() @ moved.to(columns.device)).cpu()
            squared += float(moved.square().sum())
    return [
        Difference(above - below, float(product), math.sqrt(squared))
        for above, below, product in zip(*measured, predicted, strict=True)
    ]


@torch.no_grad()
def rounding(
    losses: Callable[[], Sequence[float]], parameters: Sequence[nn.Parameter], step: float, seed: int
) -> list[float]:
    """Estimate the rounding error of each example's loss from its third difference over steps too short for curvature.

    Args:
        losses: as for `differences`. step: so short that its third power is nothing. seed: of a random direction.

    Returns:
        A standard deviation an example: of l(2) - 2 l(1) + 2 l(-1) - l(-2), over the root of 10.
    """
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.randn(p.shape, generator=generator).to(p.device, p.dtype) for p in parameters]
    norm = math.sqrt(sum(float(part.double().square().sum()) for part in parts))
    total: list[float] | None = None
    with restored(parameters) as given:
        for place, weight in ((2, 1), (1, -2), (-1, 2), (-2, -1)):
            for parameter, copy, part in zip(parameters, given, parts, strict=True):
                parameter.copy_(copy + place * step / norm * part)
            weighted = [weight * loss for loss in losses()]
            total = weighted if total is None else [a + b for a, b in zip(total, weighted, strict=True)]
    return [abs(value) / math.sqrt(10) for value in total or []]


@torch.no_grad()
def plain_losses(model: Any, examples: Sequence[Mapping[str, Any]]) -> list[float]:
    """Return each example's mean completion loss by `model(input_ids)` alone, with its token weights.

    Logits are widened to fp64, so that a sum over many tokens adds no rounding of its own.
    """
    device = model.get_input_embeddings().weight.device
    found = []
    for example in examples:
        logits = model(input_ids=example["input_ids"][None].to(device)).logits[0, :-1]
        targets = example["labels"][1:].to(logits.device, torch.int64)
        counted = (targets != IGNORED).nonzero().squeeze(1)
        weights = example.get("weights", torch.ones(len(targets) + 1))[1:].to(logits.device, torch.float64)
        total = 0.0
        for places in counted.split(_CHUNK):
            losses = nn.functional.cross_entropy(logits[places].double(), targets[places], reduction="none")
            total += float(losses @ weights[places])
        found.append(total / len(counted))
    return found
