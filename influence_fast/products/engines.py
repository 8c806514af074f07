"""Which module computes inner products: C++ on the CPU, cuBLAS with fused passes or an mma kernel on a GPU, PyTorch."""

from __future__ import annotations

import os
from types import ModuleType

import torch

from influence_fast.products import cpp, cuda, gpu, native, pytorch


def engine(isa: str | None = None) -> tuple[ModuleType, str]:
    """Return what computes inner products on the CPU, and the instruction set to name to it.

    isa: as of `native.chosen`, whose warning and ConfigError are those of this call.
    """
    name = native.chosen(isa)
    return (pytorch if name == native.TORCH else cpp), name


def device_engine(device: torch.device, rows: str, isa: str | None = None) -> tuple[ModuleType, str]:
    """Return what computes inner products on `device`: cuBLAS with fused passes, the mma kernel, or PyTorch.

    rows: "float32", "bfloat16" or "int8". isa: "torch" (or the variable INFLUENCE_FAST_ISA) asks for PyTorch, "mma" for
    the kernel of csrc/cuda where it was compiled; names of instruction sets say nothing about a device.
    """
    name = isa or os.environ.get(native.ISA_VARIABLE, "")
    if name == native.TORCH or device.type != "cuda" or rows not in cuda.KINDS:
        return pytorch, native.TORCH
    if name != native.MMA and not gpu.why_not(device):
        return gpu, native.CUDA
    if not native.cuda_why() and torch.cuda.get_device_capability(device)[0] >= 8:
        return cuda, native.MMA
    return pytorch, native.TORCH
