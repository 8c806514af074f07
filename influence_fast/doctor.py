"""Report what is installed, which computing paths are active, and why the others are not."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

PACKAGES = (
    "influence-fast",
    "torch",
    "triton",
    "transformers",
    "peft",
    "datasets",
    "accelerate",
    "math-verify",
    "numpy",
    "safetensors",
)


def versions() -> dict[str, str]:
    """Return the versions of Python and of those packages in `PACKAGES` that are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def environment() -> dict[str, Any]:
    """Return a description of the machine: system, cores, memory, torch's threads, GPU."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found: dict[str, Any] = {
        "system": f"{platform.system()} {platform.machine()}",
        "cores": cores,
        "torch threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        found["memory"] = f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB"
    return found


def paths() -> list[tuple[str, bool, str]]:
    """Return (path, whether it is active, what it is or why not) of every computing path, in engine order."""
    from influence_fast.products import native

    return [*_gradients(), *native.status(), _cublas(), *_optional()]


def _cublas() -> tuple[str, bool, str]:
    """Return whether inner products of int8 and bf16 rows on a GPU go through cuBLAS, and if not, why."""
    import torch

    from influence_fast.products import gpu, native

    what = "int8 and bf16 rows on a GPU, with fused passes for scales, group means, top k and ranks"
    why = gpu.why_not(torch.device("cuda")) if torch.cuda.is_available() else "there is no CUDA device here"
    asked = os.environ.get(native.ISA_VARIABLE, "")
    if not why and asked in (native.TORCH, native.MMA):
        why = f"not chosen; {native.ISA_VARIABLE}={asked} asks for another"
    return "inner products: cuBLAS", not why, f"{what} ({why})" if why else what


def _gradients() -> list[tuple[str, bool, str]]:
    import torch

    from influence_fast.gradients.model import backends
    from influence_fast.gradients.step import cuda_graphs

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    chosen, why = backends.choose(None, device, dtype)
    notes = {
        "triton": "fused kernels for projections, sums over examples and the loss",
        "torch": "PyTorch products; no weight gradient is formed",
    }
    rows = []
    for name, note in notes.items():
        active = name == chosen.name
        reason = why if name == "triton" or active else "the other backend was chosen"
        rows.append((f"gradients: {name}", active, f"{note} ({reason})"))
    off = cuda_graphs.wanted() is False
    note = "steps seen twice are replayed" if chosen.launches_kernels else "they need the triton backend"
    if off:
        note = f"off by {cuda_graphs.VARIABLE}=0"
    rows.append(("gradients: CUDA graphs", chosen.launches_kernels and not off, note))
    return [*rows, (f"gradients: {backends.NATIVE}", False, backends.NOT_NATIVE)]


def _optional() -> list[tuple[str, bool, str]]:
    rows = []
    for name, use in (("vllm", "faster generation"), ("flash-attn", "faster attention over packs on a GPU")):
        try:
            rows.append((name, True, f"{version(name)}: {use}"))
        except PackageNotFoundError:
            rows.append((name, False, f"not installed (optional: {use})"))
    return rows
