"""Products with the frozen base weights in 8 bits: `precision="fp8"`.

    x W^T   rows of x and rows of W      as e4m3, each row by a scale of its own
    g W     rows of g and rows of W^T    the same: a product can take scales out of its sum only along what is left

    scale = max|row| / 448, in fp32        row ~ scale * e4m3, to nearest

W and W^T are rounded once, when the engine opens (2 bytes a weight for both, and 4 for each row's scale); x and g in
every product, by the kernel `fp8_rows` where the Triton kernels run. The gradient is e4m3 too: with a scale a row it
needs no wider range, and on a small model its third bit of mantissa brought the rows closer to fp32's than e5m2's range
did (`python -m benches.fp8_effect`).

The products are `torch._scaled_mm`'s. With a scale a row it runs on cards of compute capability 8.9 and above (CUTLASS,
or cuBLAS on 9.0), wants both dimensions of W in multiples of 16, and gives bf16 (fp32 on 9.0 alone). cuBLAS is known to
refuse long sums for up to 256 tokens, and odd numbers of them: on a card rows of zeros follow those (`padded`). Linears
of other shapes keep their own dtype's product, on the CPU too, so that rows do not depend on where they were made. A
CPU multiplies in fp32 after the rounding: the same numbers but for the order of the sums, no faster.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from influence_fast.errors import ConfigError, truncated_list, warn_once
from influence_fast.gradients.model.backends import TORCH, Torch
from influence_fast.gradients.model.lora import LoraLinear
from influence_fast.gradients.rows.precision import FP8, check_precision

logger = logging.getLogger(__name__)

MULTIPLE = 16
FEWEST_ROWS = 272  # in multiples of 16 too


@dataclass(frozen=True, slots=True)
class Rows:
    """A matrix of `count` rows, of which row i is `scales[i] * values[i]`; rows beyond are zeros."""

    values: Tensor  # [count or more, k] e4m3, contiguous
    scales: Tensor  # [as many, 1] fp32
    count: int


def to_fp8(matrix: Tensor, backend: Torch = TORCH) -> Rows:
    """Round the rows of a matrix [n, k] of any float dtype; a row with a NaN or infinite number has such a scale.

    On a GPU there are as many rows as it multiplies. backend: what rounds; the bits are the same by all.
    """
    count = len(matrix)
    values, scales = backend.fp8_rows(matrix, padded(count) if matrix.is_cuda else count)
    return Rows(values, scales, count)


def padded(n: int) -> int:
    """Return how many rows a GPU multiplies in place of n: a multiple of MULTIPLE, FEWEST_ROWS at least."""
    return max(FEWEST_ROWS, -(-n // MULTIPLE) * MULTIPLE)


@dataclass(frozen=True, slots=True)
class Product:
    """A product of rows on one device.

    dtype: what `torch._scaled_mm` gives, or without `scaled_mm` what the fp32 product is cast to.
    """

    dtype: torch.dtype
    scaled_mm: bool = True

    @classmethod
    def on(cls, device: torch.device, dtype: torch.dtype) -> Product:
        """Choose the product for a model of `dtype`: in its dtype if the device gives it, else in bf16.

        Raises ConfigError naming the device where it has no such product.
        """
        name = str(device)
        if device.type == "cuda":
            name = torch.cuda.get_device_name(device)
            from influence_fast.kernels.fp8_rows import LOWEST_CAPABILITY

            capability = torch.cuda.get_device_capability(device)
            if torch.version.hip is None and capability < LOWEST_CAPABILITY:
                raise ConfigError(
                    f"precision: fp8 needs a card of compute capability {_dotted(LOWEST_CAPABILITY)} or above, and "
                    f"{name} has {_dotted(capability)}; use 'auto'"
                )
        why = ""
        for wanted in dict.fromkeys((dtype, torch.bfloat16)):
            product = cls(wanted)
            try:
                product(*(to_fp8(torch.zeros(MULTIPLE, MULTIPLE, device=device)) for _ in range(2)))
            except (RuntimeError, ValueError) as error:
                why = str(error).partition("\n")[0]
            else:
                return product
        if device.type == "cpu":  # one with AMX: PyTorch hands it to oneDNN, with one scale a tensor alone
            return cls(dtype, scaled_mm=False)
        raise ConfigError(f"precision: fp8 cannot be used on {name} ({why}); use 'auto'")

    def __call__(self, left: Rows, right: Rows) -> Tensor:
        """Multiply left [n, k] with the transpose of right [m, k]: [n, m]."""
        values, scales = right.values[: right.count].T, right.scales[: right.count].T
        if self.scaled_mm:
            made = torch._scaled_mm(left.values, values, scale_a=left.scales, scale_b=scales, out_dtype=self.dtype)
        else:
            made = (left.values.float() @ values.float() * left.scales * scales).to(self.dtype)
        return made[: left.count]


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(str(n) for n in capability)


class Fp8Weight:
    """A frozen weight [d_out, d_in] in 8 bits, for products with its rows and with its columns."""

    def __init__(self, weight: Tensor, product: Product, backend: Torch = TORCH) -> None:
        self.dtype = weight.dtype
        self.product = product
        self.rows = to_fp8(weight, backend)  # [d_out, d_in]
        self.columns = to_fp8(weight.T, backend)  # [d_in, d_out]

    def operand(self, matrix: Tensor, backend: Torch) -> Rows:
        """Return what `forward` and `backward` take for a matrix: its rows in 8 bits."""
        return to_fp8(matrix, backend)

    def forward(self, x: Rows, bias: Tensor | None) -> Tensor:
        """Return x [T, d_in] W^T + bias: [T, d_out] in the weight's dtype."""
        y = self.product(x, self.rows).to(self.dtype)
        return y if bias is None else y.add_(bias)

    def backward(self, g: Rows) -> Tensor:
        """Return g [T, d_out] W: [T, d_in] in the weight's dtype."""
        return self.product(g, self.columns).to(self.dtype)


def weights_of(linears: Sequence[LoraLinear], backend: Torch = TORCH) -> list[Fp8Weight | None]:
    """Round the base weight of each linear to 8 bits; None for shapes that do not fit, which are logged once.

    backend: as in `to_fp8`. Raises ConfigError: a weight is sharded or quantised, the device has no such product, or no
    weight fits.
    """
    check_precision(FP8, sharded=any(linear.sharded for linear in linears))
    if quantised := truncated_list(linear.name for linear in linears if linear.quantized):
        raise ConfigError(
            f"precision: fp8 rounds base weights to 8 bits, and these are quantised already: {quantised}; use 'auto'"
        )
    first = linears[0]
    product = Product.on(first.device, first.dtype)
    others = [linear for linear in linears if not _fits(linear)]
    if others:
        names = truncated_list(f"{linear.name} ({linear.d_out} x {linear.d_in})" for linear in others)
        if len(others) == len(linears):
            raise ConfigError(
                f"precision: fp8 wants weights whose sides are multiples of {MULTIPLE}, and there is none: {names}; "
                "use 'auto'"
            )
        warn_once(logger, f"precision fp8: sides are no multiples of {MULTIPLE}, multiplied in {first.dtype}: {names}")
    return [Fp8Weight(linear.weight, product, backend) if _fits(linear) else None for linear in linears]


def _fits(linear: LoraLinear) -> bool:
    return linear.d_in % MULTIPLE == 0 and linear.d_out % MULTIPLE == 0
