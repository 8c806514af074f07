"""Adapters of experts in a list, as older model classes have them, over experts in one parameter.

peft puts the factors of all experts into one pair (`gradients/model/lora_parameters.py`), those of two linears that the
parameter holds (gate and up) side by side. Here is checked that all that the file stores came to be there, and no more.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from influence_fast.data.adapter_names import plain_name

_EXPERT = re.compile(r"\.experts\.(\d+)\.\w+$|\.gate$")
_LAYER = re.compile(r"\.layers\.(\d+)\.")


def is_listed(module: str, modules: Collection[str]) -> bool:
    """Return whether `module` is an expert's linear, or a router, that a model with these `modules` has not as such."""
    return module not in modules and _EXPERT.search(module) is not None


class ExpertFactors:
    """The factors of a loaded adapter's wrapped parameters; `take` finds each stored one in them.

    stored: (module, factor) of those that the file stores under these very names, which are no others' places.
    """

    def __init__(self, wrapped: nn.Module, stored: Collection[tuple[str, str | None]]) -> None:
        from peft.tuners.lora.layer import ParamWrapper

        self._layers: dict[str, list[Any]] = {}
        self._squares = 0.0
        for name, module in wrapped.named_modules():
            if isinstance(module, ParamWrapper) and (plain_name(name), "lora_A") not in stored:
                self._layers.setdefault(_layer(name), []).append(module)
                pairs: list[Any] = [*module.lora_A.values(), *module.lora_B.values()]
                self._squares += math.fsum(_squares(linear.weight) for linear in pairs)
        self._taken = 0.0

    def take(self, module: str, factor: str, values: torch.Tensor) -> bool:
        """Return whether the stored factor of an expert's linear `module` is among the loaded ones, and count it."""
        found = _EXPERT.search(module)
        expert = int(found[1] or 0) if found else 0
        self._taken += _squares(values)
        return any(_holds(wrapper, expert, factor, values) for wrapper in self._layers.get(_layer(module), ()))

    @property
    def whole(self) -> bool:
        """Return whether there is nothing in the loaded factors but what was taken."""
        return abs(self._squares - self._taken) <= 1e-6 * self._squares


def _layer(name: str) -> str:
    found = _LAYER.search(f".{name}")
    return found[1] if found else ""


def _squares(values: torch.Tensor) -> float:
    return float(values.detach().double().square().sum())


def _holds(wrapper: Any, expert: int, factor: str, values: torch.Tensor) -> bool:
    """Return whether one expert's part of a wrapper's factor has `values` [r, d_in] or [d_out, r] as a block."""
    experts = wrapper.num_experts
    if expert >= experts:
        return False
    for linear in getattr(wrapper, factor).values():
        if factor == "lora_A":
            own = linear.weight.detach().unflatten(0, (experts, -1))[expert]
        else:
            own = linear.weight.detach().unflatten(1, (-1, experts))[:, :, expert]
        rows, columns = values.shape
        if own.shape[0] % rows or own.shape[1] % columns:
            continue
        blocks = own.unflatten(0, (-1, rows)).unflatten(2, (-1, columns)).transpose(1, 2)
        same = blocks == values.to(own.device, own.dtype)
        if bool(same.all(dim=3).all(dim=2).any()):
            return True
    return False
