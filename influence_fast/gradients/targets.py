"""Which linears' gradients a row is of: a LoRA adapter's, or plain ones that a projection's `target` names.

A plain linear y = W x + b has one factor, its weight, with G = sum_t g_t x_t^T (d_out, d_in); "kron" makes
R_out^T G R_in (p, p) of the p columns that each side was multiplied by, so that no G is formed. Biases, norms,
embeddings and, unless it is named, the output head are in no row.
"""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from influence_fast.data.wrappers import unwrapped
from influence_fast.errors import ConfigError, ModelError, did_you_mean, truncated_list, warn_once
from influence_fast.gradients.find_lora import find_lora_linears
from influence_fast.gradients.model.lora import LoraLinear
from influence_fast.gradients.model.lora_bases import is_a_product, other_targets
from influence_fast.gradients.model.quantized import kind_of
from influence_fast.gradients.rows.factors import Columns, Factor, make_factor
from influence_fast.gradients.rows.layout import LayoutEntry, in_top_layers, layout_of, layout_width
from influence_fast.gradients.rows.projection import ALL_LINEAR, Projection

logger = logging.getLogger(__name__)

WEIGHT = "weight"
TRANSPOSED = "weight.T"  # of a layer that holds its weight as [d_in, d_out] (GPT-2's Conv1D)
# Numbers in an exact row of whole weights: 134 MB in fp32. A pack holds as many rows as it has examples.
MOST_EXACT = 1 << 25


@dataclass(frozen=True, eq=False)
class PlainLinear(LoraLinear):
    """A linear without an adapter, whose weight's gradient is asked for: r = 0."""

    named_by: ClassVar[str] = "target"
    noun: ClassVar[str] = "linear"

    @classmethod
    def of(cls, name: str, layer: Any) -> PlainLinear:
        """Return the linear `layer` of a model, which calls it `name`."""
        weight = (layer.weight if isinstance(layer, nn.Linear) else layer.weight.T).detach()
        bias = None if layer.bias is None else layer.bias.detach()
        d_out, d_in = weight.shape
        a, b = (torch.empty(shape, dtype=weight.dtype, device=weight.device) for shape in ((0, d_in), (d_out, 0)))
        return cls(name, layer, weight, bias, a, b, 1.0)

    def factors(self, projection: Projection | None = None) -> tuple[Factor, ...]:
        name = WEIGHT if isinstance(self.layer, nn.Linear) else TRANSPOSED
        ends = self.d_out, self.d_in
        return (make_factor(name, ends, Columns(0, 0), projection, (0, 0), self.scaling, f"{self.key}/rank"),)

    @property
    def base(self) -> Any:
        return self.layer


def find_linears(model: nn.Module, projection: Projection | None = None) -> list[LoraLinear]:
    """Return the linears that a row of `projection` is of, in `named_modules` order.

    Raises ModelError as `find_lora_linears`, and where `projection.target` names what has no gradient of its own, or
    the model carries an adapter beside it.
    """
    if projection is None or projection.target is None:
        return in_top_layers(find_lora_linears(model), projection)
    target = projection.target
    found = _find_plain(unwrapped(model), target if isinstance(target, str) else tuple(target))
    return in_top_layers(found, projection)


def gradient_layout(model: nn.Module, projection: Projection | None = None) -> list[LayoutEntry]:
    """Return the order in which `per_example_gradients(model, ..., projection=projection)` lays out a row.

    With `projection=None` the row is the exact LoRA gradient: for each LoRA layer, in the order of their parameters in
    the model, `lora_A (r, d_in)` then `lora_B (d_out, r)`, flattened in C order; of E experts in one parameter
    (`target_parameters`) these are `(r E, d_in)` and `(d_out, r E)`, as peft keeps them, and of an embedding
    `lora_embedding_A (r, V)` and `lora_embedding_B (d, r)`. After a B comes its bias `lora_bias (d_out, 1)`
    (lora_bias=True), and at the end `lora_magnitude_vector (d_out, 1)` (DoRA), where the adapter has them. With several
    adapters active in the model every factor's name ends in its adapter's, as `lora_A.<adapter>`, and a layer's are in
    the order of `model.named_parameters()`: all its A, then each B.

    `one_sided` rows hold `dA R_in (r, p)` and `R_out^T dB (p, r)`. Rows of plain linears (`projection.target`) hold
    `weight (d_out, d_in)` of each, or `R_out^T G R_in (p, p)`; `weight.T` where the layer keeps it as (d_in, d_out).

    The flat kinds (`sjlt`, `rademacher`) and a `width` sketch this row to `width` numbers afterwards; the layout that
    is returned is then the one that is sketched. `projection.layers` leaves the modules of lower layers out, and an
    embedding.

    Raises ModelError when the model has no LoRA layer or an unsupported one (see `find_linears`).
    """
    return layout_of(find_linears(model, projection), projection)


def check_exact(projection: Projection | None, layout: Sequence[LayoutEntry]) -> None:
    """Raise ConfigError for exact rows of plain linears that are too long to be of use."""
    if projection is None or not projection.exact or (width := layout_width(layout)) <= MOST_EXACT:
        return
    raise ConfigError(
        f"an exact row of these weights has {width:,} numbers ({4 * width / 1e9:.1f} GB in fp32), where "
        f"{MOST_EXACT:,} are the most: project them by kind 'kron', or name fewer in target"
    )


@torch.no_grad()
def linear_for_losses(model: nn.Module) -> list[LoraLinear]:
    """Return linears to open a model with for losses alone: its adapter's, or a plain one that sees all tokens.

    Raises ModelError as `find_lora_linears`, and for a model without an adapter where no plain linear is called.
    """
    if _carries_adapter(model):
        return find_lora_linears(model)
    head = _head(model)
    candidates = [*_linears(model), *((name, m) for name, m in model.named_modules() if m is head and _is_linear(m))]
    linears = [(name, layer) for name, layer in candidates if _fault(layer) is None]
    seen: dict[str, list[int]] = {name: [] for name, _ in linears}
    handles = [
        layer.register_forward_pre_hook(lambda _, args, name=name: seen[name].append(args[0][..., 0].numel()))
        for name, layer in linears
    ]
    try:
        model(input_ids=torch.zeros(1, 2, dtype=torch.int64, device=next(model.parameters()).device))
    finally:
        for handle in handles:
            handle.remove()
    called = next(((name, layer) for name, layer in linears if seen[name] == [2]), None)
    if called is None:
        raise ModelError(f"{type(model).__name__}: it calls no plain linear, by which its losses could be taken here")
    return [PlainLinear.of(*called)]


def _linears(model: nn.Module) -> list[tuple[str, Any]]:
    """Return every linear but the output head, as peft's "all-linear" takes them."""
    head = _head(model)
    return [(name, layer) for name, layer in model.named_modules() if _is_linear(layer) and layer is not head]


def _is_linear(layer: Any) -> bool:
    return isinstance(layer, nn.Linear) or type(layer).__name__ == "Conv1D"


def _head(model: Any) -> Any:
    return model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None


def _carries_adapter(model: nn.Module) -> bool:
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    return isinstance(model, PeftModel) or any(isinstance(module, BaseTunerLayer) for module in model.modules())


def _find_plain(model: nn.Module, target: str | tuple[str, ...]) -> list[LoraLinear]:
    if _carries_adapter(model):
        raise ModelError(
            f"target={target!r} asks for gradients of the model's own weights, and the model carries an adapter: call "
            "merge_and_unload() (or leave out --adapter), or leave target out to have the adapter's gradients"
        )
    named = target != ALL_LINEAR
    chosen = _named(model, (target,) if isinstance(target, str) else target) if named else _linears(model)
    tied = _tied(model)
    shared = [(name, tied[layer]) for name, layer in chosen if layer in tied]
    names = [name for name, _ in chosen]
    if shared and named:
        name, other = shared[0]
        raise ModelError(
            f"{name}: its weight is {other}'s too, whose part of the gradient no row of a linear has; leave it out of "
            f"target{working_targets(names, [n for n, _ in shared]) or f', as by target={ALL_LINEAR!r}'}"
        )
    if shared:
        warn_once(
            logger, f"target {ALL_LINEAR!r} leaves out {truncated_list(name for name, _ in shared)}: tied weights"
        )
    chosen = [(name, layer) for name, layer in chosen if layer not in tied]
    faults = {name: fault for name, layer in chosen if (fault := _fault(layer)) is not None}
    if faults:
        name = next(iter(faults))
        raise ModelError(f"{name}: {faults[name]}; leave it out of target{working_targets(names, list(faults))}")
    if not chosen:
        raise ModelError(f"{type(model).__name__} has no linear with a weight of its own, which target asks for")
    _say_what_is_left(model, [layer for _, layer in chosen])
    return [PlainLinear.of(name, layer) for name, layer in chosen]


def _named(model: nn.Module, targets: Iterable[str]) -> list[tuple[str, Any]]:
    """Return the linears that `targets` name, by the end of a name or by a regular expression of all of it."""
    modules = [(name, module) for name, module in model.named_modules() if name]
    chosen: set[str] = set()
    for target in targets:
        if target == ALL_LINEAR:
            chosen |= {name for name, _ in _linears(model)}
            continue
        found = [(name, module) for name, module in modules if _matches(target, name)]
        chosen |= {name for name, module in found if _is_linear(module)}
        others = [(name, module) for name, module in found if not _is_linear(module)]
        ended = [(name, module) for name, module in others if _ends(target, name)]
        if ended or (others and len(others) == len(found)):
            name, module = (ended or others)[0]
            inner = sorted({n.rpartition(".")[2] for n, m in modules if n.startswith(f"{name}.") and _is_linear(m)})
            raise ModelError(
                f"target {target!r}: {name} is a {type(module).__name__}, and rows are of the weights of linears; "
                + (f"name those in it: {truncated_list(inner, 10)}" if inner else "leave it out")
            )
        if not found:
            known = {name.rpartition(".")[2] for name, module in modules if _is_linear(module)}
            raise ModelError(
                f"target {target!r} is the end of no linear's name, nor a regular expression of one; "
                f"{did_you_mean(target, {ALL_LINEAR, *known})}"
            )
    return [(name, module) for name, module in modules if name in chosen]


def _ends(target: str, name: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _matches(target: str, name: str) -> bool:
    return _ends(target, name) or re.fullmatch(target, name) is not None


def _tied(model: nn.Module) -> dict[Any, str]:
    """Return the modules whose weight is another module's too, each with the other's name."""
    owners: dict[int, list[tuple[str, Any]]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append((name, module))
    return {
        module: next(other for other, owner in sharing if owner is not module)
        for sharing in owners.values()
        for _, module in sharing
        if any(owner is not module for _, owner in sharing)
    }


def _fault(layer: Any) -> str | None:
    """Tell why the gradient of a linear's weight is not that of a product; None where it is."""
    weight = layer._parameters.get("weight")
    if kind_of(layer) is not None:
        return f"its weight is quantised ({type(layer).__name__}), and has no gradient"
    if weight is None:
        return "its weight is computed from other parameters (a parametrization)"
    if not weight.is_floating_point() or not (type(weight) is nn.Parameter or hasattr(weight, "full_tensor")):
        return f"its weight is quantised ({type(weight).__name__}), and has no gradient"
    return None if is_a_product(layer) else f"a {type(layer).__name__} is not a plain product"


def _say_what_is_left(model: nn.Module, layers: Sequence[Any]) -> None:
    counts = {id(parameter): parameter.numel() for parameter in model.parameters()}
    taken = sum(layer.weight.numel() for layer in layers)
    total = sum(counts.values())
    if taken < total:
        warn_once(
            logger,
            f"rows are of the weights of {len(layers)} linears, {100 * taken / total:.0f} % of the model's "
            "parameters: biases, norms, embeddings and what target leaves out are not in gradients and scores",
        )


def working_targets(names: Sequence[str], refused: Sequence[str]) -> str:
    """Return the end of a message that names a target for the linears `names` without those `refused`."""
    kept = [name for name in names if name not in refused]
    if endings := other_targets(kept + list(refused), refused, "target"):
        return endings
    parts = [name.split(".")[:-1] for name in kept]
    shared = list(itertools.takewhile(lambda same: len(set(same)) == 1, zip(*parts, strict=False)))
    prefix = ".".join(same[0] for same in shared)
    if prefix and not any(name.startswith(f"{prefix}.") for name in refused):
        return f", as by target='{prefix.replace('.', '[.]')}[.].*'"
    return ""
