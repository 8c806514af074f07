"""LoRA on a parameter (peft's `target_parameters`), as on the fused weights of experts: where its factors are.

For a parameter P [E, d_out, d_in] of E experts, peft keeps one pair of factors

    lora_A [r E, d_in]      A_e = its rows e r ... (e + 1) r
    lora_B [d_out, r E]     B_e = its columns e, E + e, 2 E + e, ...

and P_e + s B_e A_e takes the place of P_e. A module whose class says `is_transposed` has P [E, d_in, d_out], to which
the transpose is added. A parameter of two dimensions is one expert of shape [d_out, d_in].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from influence_fast.data.adapter_names import plain_name
from influence_fast.errors import ModelError
from influence_fast.gradients.model.lora import LoraLinear


@dataclass(frozen=True, eq=False, kw_only=True)
class LoraParameter(LoraLinear):
    """LoRA on one parameter of a module, as peft's `ParamWrapper` has it; all its experts' factors are one pair.

    weight: the parameter, [E, d_out, d_in], [E, d_in, d_out] or of two dimensions. a: [r E, d_in]. b: [d_out, r E].
    """

    parameter: str  # its name in `module`
    module: nn.Module
    pair: tuple[nn.Parameter, nn.Parameter]  # of which `a` and `b` are the numbers
    experts: int

    @property
    def key(self) -> str:
        """Return the name that seeds the projection: that of the parameter, however many wrappers are around its
        module.
        """
        return f"{plain_name(self.name).replace('.base_layer', '')}.{self.parameter}"

    @property
    def sharded(self) -> bool:
        return False

    @property
    def rank(self) -> int:
        """Return the rank of one expert's update."""
        return self.r // self.experts


def parameter_of(name: str, layer: Any, adapter: str) -> LoraParameter:
    """Return what `layer`, the wrapper of a parameter, holds under its active adapter.

    Raises ModelError where the parameter is spread over processes.
    """
    weight = layer.get_param()
    if hasattr(weight, "full_tensor"):  # a DTensor
        raise ModelError(
            f"{name}: LoRA on the parameter {layer.parameter_name} cannot be scored where it is spread over processes "
            "(FSDP): load the model on one device, or leave it out of target_parameters"
        )
    a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    return LoraParameter(
        name=name,
        layer=layer,
        weight=weight.detach(),
        bias=None,
        a=a.detach(),
        b=b.detach(),
        scaling=float(layer.scaling[adapter]),
        parameter=layer.parameter_name,
        module=layer.get_base_layer(),
        pair=(a, b),
        experts=layer.num_experts,
    )


def outermost(members: Sequence[LoraParameter]) -> nn.Module:
    """Return the one of the wrappers around a module that the model calls."""
    return min(members, key=lambda member: len(member.name)).layer
