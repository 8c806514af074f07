"""Makes Triton's interpreter round float32 to bfloat16 as cards and PyTorch do; of itself it cuts the digits off.

Cutting off errs by twice as much, and always towards zero, which adds up where a model rounds after every operation.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def nearest_even(numbers: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """float32 to the bits of bfloat16, as uint16."""
    bits = np.ascontiguousarray(numbers, dtype=np.float32).view(np.uint32)
    rounded = ((bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16).astype(np.uint16)
    return np.where(np.isnan(numbers), np.uint16(0x7FC0), rounded)


def round_as_cards_do() -> None:
    """From here on in this process; Triton's interpreter must be on."""
    from triton.language import bfloat16, float32
    from triton.runtime import interpreter

    own = interpreter._convert_float

    def convert(numbers: Any, source: Any, target: Any, rounding_mode: Any) -> Any:
        if source == float32 and target == bfloat16:
            return nearest_even(numbers)
        return own(numbers, source, target, rounding_mode)

    interpreter._convert_float = convert
