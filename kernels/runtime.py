# mypy: disable-error-code="no-untyped-def"
"""What every kernel file needs around its kernel: Triton if it is there, one launch door, one set of checks.

Triton is optional. Without it every file here still imports, and its PyTorch `reference` and `cost` still work; only
a launch is refused. Triton picks its interpreter when it is imported, by TRITON_INTERPRET=1.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from influence_fast.errors import ConfigError

try:
    import triton
    import triton.language as tl
    from triton import jit

    WHY_NO_TRITON = ""
    INTERPRETED = bool(triton.knobs.runtime.interpret)
    _UPCAST = tl.constexpr(INTERPRETED)
except ImportError as error:
    WHY_NO_TRITON = f"triton cannot be imported ({error}); install influence-fast[kernels]"
    INTERPRETED = False
    triton = tl = None

    def jit(function: Any = None, **options: Any) -> Any:
        """Replace `triton.jit`: the kernel's text stays importable, and a launch says why it cannot run."""
        return function if function is not None else jit


@jit
def dot(a, b, total, PRECISION: tl.constexpr):
    """Return total + a @ b with float32 sums.

    The interpreter multiplies the raw 16 bits of bfloat16, so it gets float32: the same numbers, as products of two
    bfloat16 are exact there.
    """
    if _UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total, input_precision=PRECISION)


DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PRECISIONS = ("ieee", "tf32", "tf32x3")


class Cost(NamedTuple):
    """The least work a call can do: floating-point operations, and bytes moved if each operand moves once."""

    flops: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Launch:
    """One kernel launch as the launcher would make it; `recording` collects these instead of running them."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int


_recorded: list[Launch] | None = None


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Record launches within this context instead of running them; tensors may lie on any device, `meta` too.

    So the ahead-of-time compile checks see exactly the arguments and configurations that a real call would use.
    """
    global _recorded
    before, _recorded = _recorded, []
    try:
        yield _recorded
    finally:
        _recorded = before


def is_recording() -> bool:
    """Return whether launches are listed and not run, so that what kernels write is no number."""
    return _recorded is not None


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    arguments: dict[str, Any],
    constants: dict[str, Any],
    *,
    device: torch.device,
    num_warps: int,
    num_stages: int,
) -> None:
    """Run `kernel` over `grid` on the current stream of `device`."""
    if _recorded is not None:
        _recorded.append(Launch(kernel, grid, arguments, constants, num_warps, num_stages))
        return
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](**arguments, **constants, num_warps=num_warps, num_stages=num_stages)


def unavailable(device: torch.device | str, lowest: tuple[int, int] = (8, 0)) -> str:
    """Return why a Triton kernel cannot run on tensors of this device; empty if it can, or is only recorded.

    lowest: compute capability that it needs.
    """
    if _recorded is not None:
        return ""
    if WHY_NO_TRITON:
        return WHY_NO_TRITON
    kind = torch.device(device).type
    if kind == "cuda" and not torch.cuda.is_available():
        return "no CUDA device is visible"
    if kind == "cuda" and not INTERPRETED:
        capability = torch.cuda.get_device_capability(device)
        return "" if capability >= lowest else f"compute capability {capability} is below {lowest[0]}.{lowest[1]}"
    if INTERPRETED and kind in ("cpu", "cuda"):
        return ""
    return f"Triton kernels need CUDA tensors, not {kind!r} (or TRITON_INTERPRET=1 set before Python starts)"


def processors(device: torch.device) -> int:
    """Count the streaming multiprocessors of the GPU.

    The number only decides how work is spread, never the order of a sum.
    """
    if device.type == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 132


def check_device(name: str, lowest: tuple[int, int] = (8, 0), **tensors: Tensor | None) -> torch.device:
    """Return the one device that all given tensors share.

    Raises ConfigError if they do not share one, or if no kernel can run there.
    """
    present = {key: tensor for key, tensor in tensors.items() if tensor is not None}
    devices = {tensor.device for tensor in present.values()}
    if len(devices) != 1:
        where = ", ".join(f"{key} on {tensor.device}" for key, tensor in present.items())
        raise ConfigError(f"{name}: tensors must share one device, got {where}; move them with .to(device)")
    device = devices.pop()
    if why := unavailable(device, lowest):
        raise ConfigError(f"{name}: {why}; the PyTorch `reference` beside the kernel runs anywhere")
    return device


def check_shape(name: str, key: str, tensor: Tensor, shape: tuple[int | str, ...]) -> None:
    """Raise ConfigError unless `tensor` has this shape; a letter stands for any size, a number for exactly that."""
    fits = tensor.dim() == len(shape) and all(
        isinstance(want, str) or have == want for have, want in zip(tensor.shape, shape, strict=True)
    )
    if not fits:
        wanted = ", ".join(str(size) for size in shape)
        raise ConfigError(f"{name}: {key} must have shape ({wanted}), got {tuple(tensor.shape)}")


def check_dtype(name: str, **tensors: Tensor | None) -> torch.dtype:
    """Return the one dtype that all given tensors share, out of `DTYPES`; raise ConfigError otherwise."""
    dtypes = {key: tensor.dtype for key, tensor in tensors.items() if tensor is not None}
    distinct = set(dtypes.values())
    if len(distinct) != 1 or not distinct <= set(DTYPES):
        got = ", ".join(f"{key} {dtype}" for key, dtype in dtypes.items()).replace("torch.", "")
        raise ConfigError(f"{name}: operands must share one dtype of float32, bfloat16, float16; got {got}")
    return distinct.pop()


def check_last_stride(name: str, **tensors: Tensor) -> None:
    """Raise ConfigError unless the last dimension of each tensor is contiguous."""
    for key, tensor in tensors.items():
        if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise ConfigError(f"{name}: the last dimension of {key} must be contiguous; call .contiguous() on it")


def check_precision(name: str, precision: str) -> None:
    """Raise ConfigError unless `precision` is one that `tl.dot` knows for float32 operands."""
    if precision not in PRECISIONS:
        raise ConfigError(f"{name}: precision must be one of {', '.join(PRECISIONS)}, not {precision!r}")


def ceil_div(a: int, b: int) -> int:
    """Return the smallest n with n * b >= a."""
    return -(-a // b)


def padded(n: int, least: int = 16) -> int:
    """Return the next power of two from n on, at least what a tensor-core operand needs on a side."""
    return max(least, 1 << (n - 1).bit_length())
