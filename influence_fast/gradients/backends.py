"""Which code computes the gradient path's products: Triton kernels or PyTorch. Chosen once, when an engine opens.

    auto     triton where a CUDA device can run it, else torch
    triton   the kernels of `influence_fast.kernels`; an error, with the reason, where they cannot run
    torch    PyTorch alone (on a CPU: one fused matrix product a layer and pass)
    native   none of these: the C++ and CUDA module takes over once there are rows (see `native`); asking for it here is
             an error that says so

The environment variable INFLUENCE_FAST_BACKEND names the default; a call's own `backend=` wins.
"""

from __future__ import annotations

import os

import torch

from influence_fast.errors import ConfigError, did_you_mean

VARIABLE = "INFLUENCE_FAST_BACKEND"
BACKENDS = ("auto", "triton", "torch")
NATIVE = "native"
NOT_NATIVE = "no gradients: the C++ and CUDA module computes inner products of rows and quantises them"


def choose(requested: str | None, device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """("triton" | "torch", why) for a model of `dtype` on `device`.

    Raises ConfigError for an unknown name, and for "triton" where its kernels cannot run.
    """
    source = "backend" if requested is not None else VARIABLE
    name = requested if requested is not None else os.environ.get(VARIABLE, "auto")
    if name == NATIVE:
        raise ConfigError(f"{source}: native computes {NOT_NATIVE}; choose {', '.join(BACKENDS)}")
    if name not in BACKENDS:
        raise ConfigError(f"{source}: unknown value {name!r}; {did_you_mean(name, BACKENDS)}")
    if name == "torch":
        return "torch", f"asked for by {source}"
    why_not = _why_not_triton(device, dtype)
    if name == "triton":
        if why_not:
            raise ConfigError(f"{source}: triton cannot be used: {why_not}; choose 'auto' or 'torch'")
        return "triton", f"asked for by {source}"
    if why_not:
        return "torch", why_not
    if device.type != "cuda":
        return "torch", "the model is not on a CUDA device"
    return "triton", "a CUDA device is there"


def _why_not_triton(device: torch.device, dtype: torch.dtype) -> str:
    from influence_fast.kernels.runtime import DTYPES, unavailable

    reason = unavailable(device)
    if not reason and dtype not in DTYPES:
        reason = f"its kernels do not compute in {str(dtype).removeprefix('torch.')}"
    return reason
