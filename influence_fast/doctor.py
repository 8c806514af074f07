"""What is installed, which paths are active, and for those that are not, why."""

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
    """Python's and the relevant packages' versions, those that are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def environment() -> dict[str, Any]:
    """The machine in words: system, cores, memory, threads of torch, GPU."""
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
    """(path, active, what it is or why it is not active), in the order of the engine."""
    from influence_fast import native

    return [_gradients(), _triton(), *native.status(), *_optional()]


def _gradients() -> tuple[str, bool, str]:
    import torch

    device = "CUDA" if torch.cuda.is_available() else "CPU"
    return ("gradients: torch", True, f"fused linear passes on {device}; no weight gradient is formed")


def _triton() -> tuple[str, bool, str]:
    import torch

    try:
        found = version("triton")
    except PackageNotFoundError:
        return ("gradients: triton", False, "triton is not installed: pip install 'influence-fast[kernels]'")
    if not torch.cuda.is_available():
        return ("gradients: triton", False, f"triton {found} is installed, but torch sees no CUDA device")
    return ("gradients: triton", False, f"triton {found}; the kernels are not yet part of the gradient path")


def _optional() -> list[tuple[str, bool, str]]:
    rows = []
    for name, use in (("vllm", "faster generation"), ("flash-attn", "faster attention over packs on a GPU")):
        try:
            rows.append((name, True, f"{version(name)}: {use}"))
        except PackageNotFoundError:
            rows.append((name, False, f"not installed (optional: {use})"))
    return rows
