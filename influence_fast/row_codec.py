"""Encode rows of fp32 numbers in fewer bytes and decode them: the only definition of the int8 and bf16 formats.

    bf16    to nearest even; arrays hold the bits as uint16, tensors are bfloat16
    int8    scale = max|row| / 127 in fp32, row ~ scale * int8, to nearest, halves to even

The kernel `kernels.quantize_rows` and the native module give the same int8 bits. Nothing of the package is imported
here, so that kernels may import it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

TINY = torch.finfo(torch.float32).tiny
_LARGEST = torch.finfo(torch.float32).max


def int8_scales(peak: Tensor) -> Tensor:
    """Return the scale of rows whose largest absolute numbers are `peak` [n] float32; 0 below the smallest normal one.

    The quotient is rounded to nearest on every device: by a plain number PyTorch would multiply with 1 / 127 on a GPU.
    """
    scales = peak / torch.full_like(peak, 127.0)
    return torch.where(scales < TINY, 0.0, scales)


def to_int8(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize float32 rows [n, k] with PyTorch to (int8 [n, k], float32 scales [n]).

    |row - scale * int8| <= scale / 2 up to rounding. Rows of zeros have scale 0; rows that are not finite have the
    scale NaN and zeros.
    """
    peak = rows.abs().amax(dim=1)
    finite = torch.isfinite(peak)
    scales = int8_scales(peak)
    usable = (scales > 0) & finite
    divisor = torch.where(usable, scales, 1.0)
    t = torch.where(usable[:, None], rows / divisor[:, None], 0.0).clamp(-127, 127)
    return t.round().to(torch.int8), torch.where(finite, scales, torch.nan)


def bf16_bits(rows: Tensor) -> np.ndarray:
    """Return the bf16 bits of CPU rows of any float dtype, as uint16 of the same shape."""
    bits: np.ndarray = rows.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    return bits


def bf16_of_bits(bits: np.ndarray) -> Tensor:
    """Return a bfloat16 tensor that shares the memory of `bits`, writable uint16."""
    return torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)


def encoded(rows: Tensor, dtype: str, quantize: Callable[[Tensor], tuple[Tensor, Tensor]] = to_int8) -> list[Tensor]:
    """Return rows [n, k] in a store's format `dtype`: [rows], or for int8 [int8 [n, k], fp32 scales [n]].

    quantize: the function that rounds float32 rows to int8 on their device. A row that is not finite has the scale NaN.
    """
    if dtype == "bf16":
        return [rows.to(torch.bfloat16)]
    if dtype == "int8":
        # A sketch's product may be stored by columns.
        return list(quantize(rows.to(torch.float32).contiguous()))
    return [rows]


def decoded(tensors: Sequence[Tensor]) -> Tensor:
    """Return the fp32 rows [n, k] of what `encoded` returned; encoding them again gives the same bits."""
    if len(tensors) == 1:
        return tensors[0].float() if tensors[0].dtype == torch.bfloat16 else tensors[0]
    quantized, scales = tensors
    # The largest number of a row, m, gives the scale s = fl(m / 127), and fl(fl(127 s) / 127) is s again for every s
    # that comes of some m; only 127 s may be beyond fp32 where m was not.
    return (quantized.float() * scales[:, None]).clamp(-_LARGEST, _LARGEST)


def decoded_arrays(raw: np.ndarray, scales: np.ndarray | None) -> Tensor:
    """Return stored rows as a new [n, k] fp32 tensor.

    raw: [n, k] float32, bf16 bits (uint16), or int8 with `scales` [n] float32.
    """
    if raw.dtype == np.uint16:
        return bf16_of_bits(np.array(raw)).float()
    values = torch.from_numpy(np.array(raw)).float()
    return values if scales is None else values * torch.from_numpy(np.array(scales))[:, None]
