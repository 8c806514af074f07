"""Where each factor's numbers stand in a gradient row."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from influence_fast.errors import ModelError
from influence_fast.gradients.rows.projection import Projection

if TYPE_CHECKING:
    from influence_fast.gradients.model.lora import LoraLinear

_LAYER_NUMBER = re.compile(r"\.(?:layers|h|blocks|block|layer)\.(\d+)\.")


class LayoutEntry(NamedTuple):
    """One factor's place in a gradient row.

    `module` is the name `model.named_modules()` gives the layer, `factor` what `factors.SIDES` calls it (`"lora_A"`,
    `"lora_B"`), `shape` the factor's shape as stored in the row (C order), `offset` the index of its first number.
    """

    module: str
    factor: str
    shape: tuple[int, int]
    offset: int

    @property
    def columns(self) -> slice:
        """Return the factor's numbers in a row."""
        return slice(self.offset, self.offset + self.shape[0] * self.shape[1])


Module = TypeVar("Module", "LoraLinear", LayoutEntry)


def layout_of(linears: list[LoraLinear], projection: Projection | None = None) -> list[LayoutEntry]:
    """Return the row layout of `linears`: exact factors, or their projections (before any sketch of the whole row)."""
    entries: list[LayoutEntry] = []
    offset = 0
    for linear in in_top_layers(linears, projection):
        for factor in linear.factors(projection):
            entries.append(LayoutEntry(linear.name, factor.name, factor.shape, offset))
            offset = entries[-1].columns.stop
    return entries


def in_top_layers(modules: Sequence[Module], projection: Projection | None) -> list[Module]:
    """Return those of `modules` that `projection.layers` leaves in a row; modules above all layers (a head) stay.

    Raises ModelError where no module's name has a layer's number to go by.
    """
    if projection is None or projection.layers == 1:
        return list(modules)
    numbers = [_layer_number(module) for module in modules]
    known = [number for number in numbers if number is not None]
    if not known:
        raise ModelError(
            f"the LoRA modules' names have no layer number ({_module_name(modules[0])}): leave projection layers at 1"
        )
    count = max(known) + 1
    lowest = count - math.ceil(projection.layers * count - 1e-9)
    return [
        module
        for module, n in zip(modules, numbers, strict=True)
        if not _is_an_embedding(module) and (n is None or n >= lowest)
    ]


def _layer_number(module: LoraLinear | LayoutEntry) -> int | None:
    found = _LAYER_NUMBER.search(_module_name(module))
    return int(found[1]) if found else None


def _is_an_embedding(module: LoraLinear | LayoutEntry) -> bool:
    name = module.factor if isinstance(module, LayoutEntry) else module.factors()[0].name
    return name.startswith("lora_embedding")


def _module_name(module: LoraLinear | LayoutEntry) -> str:
    return module.module if isinstance(module, LayoutEntry) else module.name


def layout_width(layout: Sequence[LayoutEntry]) -> int:
    """Return the count of numbers in a row of this layout."""
    last = layout[-1]
    return int(last.columns.stop)
