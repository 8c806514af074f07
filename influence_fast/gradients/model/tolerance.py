"""Which differences between two ways of computing a model's outputs are rounding, by dtype."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

# Relative errors of hidden states. fp64: 1e-15 was measured; a wrong mask gives 1e-2 and more. fp32: 1e-6 was measured
# on tiny models and 5e-5 on rows of a real one. Lower precisions round every layer, by some 1e-2 in all.
_FLOORS = {torch.float64: 1e-9, torch.float32: 1e-4}
FLOOR_16 = 0.03
_FLOOR_8 = 0.15
_OFFSET_LOSS_16 = 0.2  # of one token's loss: logits of 20 are rounded by 0.06 in bf16; divided by the root of the count


@dataclass(frozen=True, slots=True)
class Tolerance:
    """Which relative error of outputs is rounding, for a model of `dtype` with products of `unit` relative rounding."""

    dtype: torch.dtype
    floor: float
    unit: float

    @classmethod
    def of(cls, dtype: torch.dtype, device: torch.device, fp8: bool = False) -> Tolerance:
        """Return the tolerance for a model's dtype; TF32 products on a GPU round as 16-bit ones do."""
        if fp8:
            return cls(torch.bfloat16, _FLOOR_8, 2.0**-4)
        unit = torch.finfo(dtype).eps
        if dtype == torch.float32 and device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32:
            return cls(dtype, 1e-2, 2.0**-10)
        return cls(dtype, _FLOORS.get(dtype, FLOOR_16), unit)

    def difference(self, outputs: torch.Tensor, plain: torch.Tensor) -> float:
        """Return the relative error of outputs [n, d]: over all of them, or of the median token in low precision.

        A token that a rounded sum sends to another expert differs altogether, with nothing wrong; a dropped mask
        changes most tokens of a text of twice its length.
        """
        if outputs.shape != plain.shape:
            return math.inf
        apart, wide = (outputs - plain).double(), plain.double()
        if self.floor < FLOOR_16:
            return float(apart.norm() / wide.norm().clamp_min(torch.finfo(torch.float64).tiny))
        return float((apart.norm(dim=1) / wide.norm(dim=1).clamp_min(1e-30)).median())

    def of_loss(self, count: int) -> float:
        """Return the error of a mean loss over `count` tokens, relative to 1 + loss, that is rounding."""
        return self.floor if self.floor < 1e-2 else self.floor + _OFFSET_LOSS_16 / math.sqrt(max(1, count))
