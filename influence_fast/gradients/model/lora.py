"""Hold one LoRA linear of a model as plain tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from influence_fast.data.adapter_names import plain_name
from influence_fast.gradients.model.lora_parts import AdapterPart, Magnitude, part_factors
from influence_fast.gradients.rows.factors import Columns, Factor, make_factor
from influence_fast.gradients.rows.projection import Projection


@dataclass(frozen=True, eq=False)
class LoraLinear:
    """One LoRA linear, `y = W x + b + s B (A x)`, as plain tensors; with r = 0 a plain one, whose weight is trained.

    Several active adapters are one of all their columns (see `lora_parts`).
    """

    name: str
    layer: nn.Module
    weight: torch.Tensor  # [d_out, d_in]; of a quantised base an empty one, of the activations' dtype
    bias: torch.Tensor | None  # [d_out]; None where a quantised base adds its own, and under a magnitude vector
    a: torch.Tensor  # [r, d_in]
    b: torch.Tensor  # [d_out, r]
    scaling: float
    quantized: bool = False  # the base layer itself multiplies (see `quantized`)
    parts: tuple[AdapterPart, ...] = ()  # of other adapters than one plain pair
    added_bias: torch.Tensor | None = None  # [d_out] of the adapter, a part of `bias` unless the base is quantised
    magnitude: Magnitude | None = None  # of DoRA

    named_by: ClassVar[str] = "target_modules"  # the setting that chose it, for messages
    noun: ClassVar[str] = "LoRA layer"

    @property
    def key(self) -> str:
        """Return the name that seeds the projection: the same with and without the peft wrapper."""
        return plain_name(self.name)

    @property
    def d_in(self) -> int:
        return self.a.shape[1]

    @property
    def d_out(self) -> int:
        return self.b.shape[0]

    @property
    def r(self) -> int:
        return self.a.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the products with the base weight; of a quantised base the activations'."""
        return self.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.weight.device

    def factors(self, projection: Projection | None = None) -> tuple[Factor, ...]:
        """Return what this module adds to a row, in the row's order; projected columns stand after those of A and B."""
        if self.parts:
            return part_factors(self.key, (self.d_out, self.d_in), self.r, self.parts, projection)
        return tuple(
            make_factor(
                name,
                (self.d_out, self.d_in),
                Columns(0, self.r),
                projection,
                (self.r, self.r),
                self.scaling,
                f"{self.key}/rank",
            )
            for name in (("lora_A", "lora_B") if self.r else ("weight",))
        )

    @property
    def base(self) -> Any:
        """Return the layer that holds the base weight."""
        return self.layer.get_base_layer()  # type: ignore[operator]

    @property
    def sharded(self) -> bool:
        """Return whether FSDP2 holds the weight, which is then whole only while the layer around it runs."""
        return hasattr(self.weight, "full_tensor")  # a DTensor; to import that class costs everybody a second

    @property
    def live_weight(self) -> torch.Tensor:
        """Return `weight` [d_out, d_in], or what FSDP2 has gathered of it for the layer that is running."""
        if not self.sharded:
            return self.weight
        base = self.base
        return base.weight.detach() if isinstance(base, nn.Linear) else base.weight.detach().T

    @property
    def live_bias(self) -> torch.Tensor | None:
        """Return the bias [d_out], as `live_weight` does the weight."""
        if not self.sharded or self.bias is None:
            return self.bias
        base = self.base
        if base.bias is None:
            return self.added_bias
        own: torch.Tensor = base.bias.detach()
        return own if self.added_bias is None else own + self.added_bias
