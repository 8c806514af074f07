"""Makes Triton's interpreter convert numbers as cards and PyTorch do, and round a multiply-add once.

Of itself it cuts the digits of bfloat16 off, which errs by twice as much, and always towards zero, which adds up where
a model rounds after every operation; e4m3 it does not round to even; subnormal bfloat16 numbers it reads wrongly.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


def nearest_even(numbers: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """float32 to the bits of bfloat16, as uint16."""
    bits = np.ascontiguousarray(numbers, dtype=np.float32).view(np.uint32)
    rounded = ((bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16).astype(np.uint16)
    return np.where(np.isnan(numbers), np.uint16(0x7FC0), rounded)


def round_as_cards_do() -> None:
    """From here on in this process; Triton's interpreter must be on."""
    from triton.language import bfloat16, float8e4nv, float32
    from triton.runtime import interpreter

    own = interpreter._convert_float

    def convert(numbers: Any, source: Any, target: Any, rounding_mode: Any) -> Any:
        if source == float32 and target == bfloat16:
            return nearest_even(numbers)
        if source == bfloat16 and target == float32:
            return (np.ascontiguousarray(numbers).astype(np.uint32) << 16).view(np.float32)
        if source == float32 and target == float8e4nv:
            return torch.from_numpy(np.ascontiguousarray(numbers)).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
        return own(numbers, source, target, rounding_mode)

    def fused(builder: Any, x: Any, y: Any, z: Any) -> Any:
        """x y + z of float32: the product is exact in float64, and so is a remainder."""
        total = x.data.astype(np.float64) * y.data + z.data
        return interpreter.TensorHandle(total.astype(z.data.dtype), z.dtype.scalar)

    interpreter._convert_float = convert
    interpreter.InterpreterBuilder.create_fma = fused
