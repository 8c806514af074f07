"""Which native path is active, and why not where it is not. `influence-fast doctor` prints `status()`."""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from types import ModuleType
from typing import Any

import torch

from influence_fast.errors import ConfigError, did_you_mean

ISA_VARIABLE = "INFLUENCE_FAST_ISA"
TORCH = "torch"  # the name that asks for the fallback
CUDA = "cuda"  # cuBLAS and the passes of kernels/, chosen where rows or the call name a CUDA device
MMA = "mma"  # the kernel of csrc/cuda

_REINSTALL = "install g++ or clang++ and reinstall influence-fast"


@functools.cache
def load() -> tuple[ModuleType | None, str]:
    """(`influence_fast._native`, "") or (None, why it cannot be used)."""
    try:
        return importlib.import_module("influence_fast._native"), ""
    except ModuleNotFoundError as error:
        if error.name != "influence_fast._native":
            return None, str(error)
        return None, _build_info("NATIVE_WHY") or f"it was not built; {_REINSTALL}"
    except ImportError as error:
        return None, f"it does not load here ({error}); {_REINSTALL}"


def chosen(isa: str | None = None) -> str:
    """Return the path that computes inner products on the CPU.

    isa: one of `available()`, "torch" for the fallback, or None: the variable INFLUENCE_FAST_ISA, else the best.
    Warns once where the native module is missing. Raises ConfigError for a path that is not available.
    """
    name = isa or os.environ.get(ISA_VARIABLE, "")
    if name == TORCH:
        return TORCH
    if load()[0] is None:
        if name:
            raise ConfigError(f"instruction set {name!r} needs the native module; use {TORCH!r} or {_REINSTALL}")
        _warn_once()
        return TORCH
    if name and name not in available():
        raise ConfigError(f"instruction set {name!r} is not available here; {did_you_mean(name, available())}")
    return name or available()[0]


def cuda_why() -> str:
    """Why the CUDA kernels cannot be used, or an empty string."""
    module, why = load()
    if module is None:
        return why
    if not module.build_config()["cuda"]["compiled"]:
        return f"not compiled: {_build_info('CUDA_WHY') or 'no CUDA when the package was installed'}"
    if not torch.cuda.is_available():
        return module.cuda_why() or "this PyTorch is built without CUDA, or sees no device"
    return str(module.cuda_why())


def available() -> list[str]:
    """Paths usable on this machine, best first; the last one is "torch"."""
    module, _ = load()
    return [*(module.build_config()["available"] if module else []), TORCH]


def build_config() -> dict[str, Any]:
    """What was compiled ("compiled"), what runs here ("available") and how ("paths"); {} without the module."""
    module, _ = load()
    return dict(module.build_config()) if module else {}


def status() -> list[tuple[str, bool, str]]:
    """(path, active, what it is or why it is not active), best first."""
    module, why = load()
    if module is None:
        return [
            ("inner products: native", False, why),
            ("inner products: torch", True, "PyTorch products and sorts, several times slower"),
        ]
    config = build_config()
    try:
        active_name = chosen()
        note = f"not chosen; {ISA_VARIABLE}=%s chooses it"
    except ConfigError as error:
        active_name, note = "", str(error)
    rows = []
    for name in available():
        if name == TORCH:
            what = "PyTorch products and sorts, several times slower"
        else:
            what = ", ".join(f"{dtype} by {how}" for dtype, how in config["paths"][name].items())
        active = name == active_name
        reason = note % name if "%s" in note else note
        rows.append((f"inner products: {name}", active, what if active else f"{what} ({reason})"))
    missing = [name for name in config["compiled"] if name.split("_")[0] not in {n.split("_")[0] for n in available()}]
    rows += [(f"inner products: {name}", False, "compiled, but this processor lacks it") for name in missing]
    return [*rows, _cuda_status(config)]


def _cuda_status(config: dict[str, Any]) -> tuple[str, bool, str]:
    cuda, why = config["cuda"], cuda_why()
    what = f"tensor cores for int8 and bf16 rows on a device; sm_{', sm_'.join(cuda['architectures'])}"
    if not why and os.environ.get(ISA_VARIABLE) == TORCH:
        why = f"not chosen; {ISA_VARIABLE}={TORCH} asks for PyTorch"
    if why and cuda["compiled"]:
        why = f"{what} ({why})"
    return f"inner products: {CUDA}", not why, why or what


def default_threads() -> int:
    """Cores this process may use, or OMP_NUM_THREADS where that is fewer."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    asked = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    return min(cores, int(asked)) if asked.isdigit() and int(asked) > 0 else cores


@functools.cache
def _warn_once() -> None:
    warnings.warn(
        f"influence_fast._native is missing, so inner products use slower PyTorch code: {load()[1]}", stacklevel=5
    )


def _build_info(name: str) -> str:
    try:
        return str(getattr(importlib.import_module("influence_fast._build_info"), name, ""))
    except ImportError:
        return ""
