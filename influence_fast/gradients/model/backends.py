"""Which code computes the gradient path's products: Triton kernels or PyTorch. Chosen once, when an engine opens.

    auto     triton where a CUDA device can run it, else torch
    triton   the kernels of `influence_fast.kernels`; an error, with the reason, where they cannot run
    torch    PyTorch alone (on a CPU: one fused matrix product a layer and pass)
    native   none of these: the C++ and CUDA module takes over once there are rows (see `native`); asking for it here is
             an error that says so

The environment variable INFLUENCE_FAST_BACKEND names the default; a call's own `backend=` wins. `choose` returns an
object, `TORCH` or `TRITON`, that computes what the two compute differently: nothing else asks for the name.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from influence_fast.errors import ConfigError, did_you_mean
from influence_fast.gradients.model.fused_layers import Fused, fused
from influence_fast.gradients.model.loss import by_kernel, by_pytorch
from influence_fast.row_codec import to_int8

if TYPE_CHECKING:
    from influence_fast.kernels.segments import Segments

VARIABLE = "INFLUENCE_FAST_BACKEND"
BACKENDS = ("auto", "triton", "torch")
NATIVE = "native"
NOT_NATIVE = "no gradients: the C++ and CUDA module computes inner products of rows and quantises them"


class Torch:
    """Compute by PyTorch's own operations, on any device."""

    name = "torch"
    # Whether sums over examples are launches of the Triton kernels, which read `segments` and nothing on the host.
    launches_kernels = False
    # What a message tells a user to change where this backend's numbers are not the model's.
    remedy = ""

    token_losses = staticmethod(by_pytorch)

    def int8_rows(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return float32 rows [n, k] as (int8 [n, k], float32 scales [n]); see `row_codec.to_int8`."""
        return to_int8(rows)

    def fp8_rows(self, matrix: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        """Return a matrix [n, k] as (e4m3 [rows, k], float32 scales [rows, 1]); rows beyond n are zeros."""
        from influence_fast.kernels.fp8_rows import reference

        return reference(matrix, rows)

    def segments(
        self, lengths: Sequence[int], *, room: tuple[int, int] | None = None, longest: int | None = None
    ) -> Segments | None:
        """Return the kernels' tables of examples of these lengths, on the host; None where no kernel reads them."""
        return None

    def fused_layers(self, base: Any, dtype: torch.dtype) -> contextlib.AbstractContextManager[Fused]:
        """Compute parts of a model by fused kernels while the block runs, and yield which (`fused_layers.fused`)."""
        return contextlib.nullcontext(Fused())

    def sign_matrix(self, seed: int, name: str, rows: int, columns: int, device: torch.device) -> Tensor | None:
        """Return `philox.sign_matrix` as a kernel on `device` makes it; None where PyTorch draws it."""
        return None

    def skinny_product(self, x: Tensor, weight: Tensor) -> Tensor:
        """Return x [T, d] @ weight [d, c] for a small c."""
        return x @ weight

    @property
    def only_recorded(self) -> bool:
        """Return whether launches are recorded and not run, so that there are no numbers to compare."""
        return False


class Triton(Torch):
    """Compute by the kernels of `influence_fast.kernels`, each of which reads its inputs once."""

    name = "triton"
    launches_kernels = True
    remedy = "pass backend='torch'"

    token_losses = staticmethod(by_kernel)

    def int8_rows(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        from influence_fast.kernels.quantize_rows import quantize_rows

        return quantize_rows(rows)

    def fp8_rows(self, matrix: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        from influence_fast.kernels.fp8_rows import fp8_rows

        # A transposed weight is copied once, when the engine opens.
        return fp8_rows(matrix if matrix.stride(-1) == 1 else matrix.contiguous(), rows)

    def segments(
        self, lengths: Sequence[int], *, room: tuple[int, int] | None = None, longest: int | None = None
    ) -> Segments | None:
        from influence_fast.kernels.segments import Segments

        return Segments.from_lengths(lengths, room=room, longest=longest)

    def fused_layers(self, base: Any, dtype: torch.dtype) -> contextlib.AbstractContextManager[Fused]:
        return fused(base, dtype)

    def sign_matrix(self, seed: int, name: str, rows: int, columns: int, device: torch.device) -> Tensor | None:
        if device.type != "cuda":
            return None
        from influence_fast.kernels.counter import fill_signs

        return fill_signs(seed, name, rows, columns, device=device)

    def skinny_product(self, x: Tensor, weight: Tensor) -> Tensor:
        """Return x @ weight in one pass over x; the bits of a token's row may depend on T where PyTorch multiplies."""
        if len(x) == 0:
            return x @ weight
        from influence_fast.kernels.skinny_project import MAX_COLUMNS, MOST_COLUMNS_16_BIT, skinny_project

        if x.element_size() == 2 and weight.shape[1] > MOST_COLUMNS_16_BIT:
            return x @ weight
        x = x.contiguous()
        parts = [skinny_project(x, part) for part in weight.split(MAX_COLUMNS, dim=1)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    @property
    def only_recorded(self) -> bool:
        from influence_fast.kernels.runtime import is_recording

        return is_recording()


TORCH, TRITON = Torch(), Triton()


def choose(requested: str | None, device: torch.device, dtype: torch.dtype) -> tuple[Torch, str]:
    """Return the backend for a model of `dtype` on `device`, and why it is that one.

    Raises ConfigError for an unknown name, and for "triton" where its kernels cannot run.
    """
    source = "backend" if requested is not None else VARIABLE
    name = requested if requested is not None else os.environ.get(VARIABLE, "auto")
    if name == NATIVE:
        raise ConfigError(f"{source}: native computes {NOT_NATIVE}; choose {', '.join(BACKENDS)}")
    if name not in BACKENDS:
        raise ConfigError(f"{source}: unknown value {name!r}; {did_you_mean(name, BACKENDS)}")
    if name == TORCH.name:
        return TORCH, f"asked for by {source}"
    why_not = _why_not_triton(device, dtype)
    if name == TRITON.name:
        if why_not:
            raise ConfigError(f"{source}: triton cannot be used: {why_not}; choose 'auto' or 'torch'")
        return TRITON, f"asked for by {source}"
    if why_not:
        return TORCH, why_not
    if device.type != "cuda":
        return TORCH, "the model is not on a CUDA device"
    return TRITON, "a CUDA device is there"


def _why_not_triton(device: torch.device, dtype: torch.dtype) -> str:
    from influence_fast.kernels.runtime import DTYPES, unavailable

    reason = unavailable(device)
    if not reason and dtype not in DTYPES:
        reason = f"its kernels do not compute in {str(dtype).removeprefix('torch.')}"
    return reason
