"""Adam's state as trainers save it, read without running anything that the file holds."""

from __future__ import annotations

import json
import logging
import math
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from influence_fast.errors import ModelError, one_line, shown, warn_once
from influence_fast.guards import reading

logger = logging.getLogger(__name__)

FILES = ("optimizer.pt", "optimizer.bin")  # of transformers' Trainer, and of accelerate's save_state
BETA2 = 0.999  # AdamW's default in torch, and that of transformers' Trainer
_ADAM = {"exp_avg", "exp_avg_sq", "step"}
#: What the state of another optimizer is told by: a key, and what it is.
_OTHERS = (
    ("absmax2", "an 8-bit Adam of bitsandbytes (quantized moments)"),
    ("qmap2", "an 8-bit Adam of bitsandbytes (quantized moments)"),
    ("absmax1", "an 8-bit optimizer of bitsandbytes (quantized moments)"),
    ("state2", "an Adam of bitsandbytes, or a paged one"),
    ("state1", "an optimizer of bitsandbytes with one moment (Lion, SGD)"),
    ("exp_avg_sq_row", "Adafactor (second moments by row and column)"),
    ("exp_avg_sq_col", "Adafactor (second moments by row and column)"),
    ("row_var", "Adafactor (second moments by row and column)"),
    ("exp_inf", "Adamax"),
    ("square_avg", "RMSprop or Adadelta"),
    ("sum", "Adagrad"),
    ("momentum_buffer", "SGD or Muon with momentum"),
    ("exp_avg", "Lion, or another with a first moment alone"),
)


@dataclass(frozen=True)
class AdamState:
    """Adam's state of one parameter: `second` is its second moment as the optimizer divides by it.

    `second` has the parameter's shape and is not corrected for its bias; `unbiased` is. `values` is what was saved.
    """

    values: Mapping[str, torch.Tensor]
    beta2: float

    @property
    def second(self) -> torch.Tensor:
        return self.values["max_exp_avg_sq"] if "max_exp_avg_sq" in self.values else self.values["exp_avg_sq"]

    @property
    def unbiased(self) -> torch.Tensor:
        """Return the unbiased second moments, v / (1 - beta2^step), in fp64."""
        return self.second.to(torch.float64) / (1 - self.beta2 ** float(self.values["step"]))

    @property
    def fault(self) -> str:
        """Return why `unbiased` is no second moment, as a part of a message; empty if it is one."""
        step = float(self.values["step"])
        if not 0 < step < math.inf:
            return f"step {step:g} (the optimizer made none, or the file was changed)"
        if not 0 <= self.beta2 < 1:
            return f"beta2 {self.beta2:g}, which is not from 0 to below 1"
        if not bool(self.second.isfinite().all()):
            return "NaN or infinite second moments"
        return "negative second moments" if bool((self.second < 0).any()) else ""


@dataclass(frozen=True)
class OptimizerState:
    """State that an optimizer saved: `groups` of parameters (numbers, or names if FSDP gathered it), their states.

    Every state is Adam's. `states` lacks parameters that never had a gradient.
    """

    groups: list[list[Any]]
    states: dict[Any, AdamState]


def optimizer_file(folder: Path) -> Path | None:
    """Return the file of the optimizer's state in a checkpoint's folder, or None."""
    return next((folder / name for name in FILES if (folder / name).is_file()), None)


def read_adam(folder: Path, beta2: float | None = None) -> OptimizerState:
    """Read Adam's state from a checkpoint's folder.

    beta2: decides where the file does not say; by default 0.999 does, which is then said once.

    Raises ModelError: no such file, damaged, not loadable without running code, or another optimizer's (named).
    """
    path = optimizer_file(folder)
    if path is not None:
        with reading(path, ModelError):
            return _read_adam(path, beta2)
    raise ModelError(f"{folder} has no {' or '.join(FILES)}: train again with save_checkpoints set")


def _read_adam(path: Path, beta2: float | None) -> OptimizerState:
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError, KeyError, AttributeError) as error:
        raise ModelError(
            f"{path} cannot be read as plain tensors ({one_line(error, 160)}): it is damaged, or of an optimizer with "
            "states of its own kind (8 bits); give a checkpoint of AdamW"
        ) from error
    try:
        states = dict(loaded["state"])
        groups = list(loaded["param_groups"]) or [{"params": list(states)}]
        members = [list(group["params"]) for group in groups]
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{path} is no optimizer's state (no state and param_groups); give a checkpoint") from error
    for group, parameters in zip(groups, members, strict=True):
        if "step" in group:  # apex counts the steps of a group, not of each parameter
            own = {name: states[name] for name in parameters if isinstance(states.get(name), Mapping)}
            states |= {name: {"step": group["step"], **values} for name, values in own.items() if values}
    _check_adam(path, states)
    found: dict[Any, AdamState] = {}
    for group, parameters in zip(groups, members, strict=True):
        beta = _beta2_of(path, group, beta2)
        found |= {name: AdamState(states[name], beta) for name in parameters if states.get(name)}
    return OptimizerState(members, found)


def named_adam(folder: Path, names: Path, beta2: float | None = None) -> dict[str, AdamState]:
    """Read Adam's state by parameter name; `names` lists the parameters in the optimizer's order, as JSON.

    Raises ModelError as `read_adam`, and where the list is not of these states.
    """
    try:
        with reading(names, ModelError):
            ordered: Sequence[str] = json.loads(names.read_text(encoding="utf-8")) if names.exists() else []
    except ModelError as error:
        raise ModelError(
            f"{names} is damaged ({one_line(error, 160)}): train again with save_checkpoints set"
        ) from error
    if not names.exists():
        raise ModelError(f"{folder} has no {names.name}: train again with save_checkpoints set")
    if not isinstance(ordered, list) or not all(isinstance(name, str) for name in ordered):
        raise ModelError(f"{names} is no list of names: train again with save_checkpoints set")
    state = read_adam(folder, beta2)
    numbers = [number for group in state.groups for number in group]
    if len(numbers) != len(ordered):
        raise ModelError(
            f"{names} names {len(ordered)} parameters, and the optimizer beside it has {len(numbers)}: they are of "
            "different checkpoints"
        )
    return {name: state.states[number] for number, name in zip(numbers, ordered, strict=True) if number in state.states}


def _check_adam(path: Path, states: Mapping[Any, Any]) -> None:
    for name, values in states.items():
        keys = set(values) if isinstance(values, Mapping) else set()
        if keys >= _ADAM:
            _check_moments(path, name, values)
            continue
        if not keys:
            continue
        if keys >= _ADAM - {"step"}:
            raise ModelError(
                f"{path} has moments of Adam without their step (it keeps {', '.join(sorted(map(str, keys)))}), by "
                "which they are corrected for their bias: give a checkpoint as its trainer saved it"
            )
        kind = next((name for key, name in _OTHERS if key in keys), f"none that is known (it keeps {sorted(keys)})")
        raise ModelError(
            f"{path} is not Adam's: the optimizer is {kind}, whose state has no second moment of every number; train "
            "with AdamW (optim: adamw_torch), or score without the optimizer's moments"
        )
    if not any(isinstance(values, Mapping) and values for values in states.values()):
        raise ModelError(
            f"{path} is not Adam's: the optimizer is SGD without momentum, or made no step, and keeps no state; train "
            "with AdamW (optim: adamw_torch), or score without the optimizer's moments"
        )


def _check_moments(path: Path, name: Any, values: Mapping[str, Any]) -> None:
    """Raise ModelError for moments that are no dense tensors of numbers, or a step that is no number."""
    moments = [key for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq") if key in values]
    for key in moments:
        moment = values[key]
        dense = isinstance(moment, torch.Tensor) and moment.layout == torch.strided
        dense = dense and not (moment.is_nested or moment.is_meta or moment.is_quantized)
        if not dense or not moment.dtype.is_floating_point or moment.shape != values[moments[0]].shape:
            raise ModelError(
                f"{path}: {key} of parameter {shown(name)} is no dense tensor of floats like the other moment; give a "
                "checkpoint of AdamW"
            )
    try:
        step = float(values["step"])
    except (TypeError, ValueError, RuntimeError, NotImplementedError):
        step = -1.0
    # NaN is refused with the factor's name, where that is known
    if step < 0 or step == float("inf"):
        raise ModelError(
            f"{path}: the step of parameter {shown(name)} is no number of steps; give a checkpoint of AdamW"
        )


def _beta2_of(path: Path, group: Mapping[str, Any], given: float | None) -> float:
    betas = group.get("betas")
    if betas is not None:
        pair = isinstance(betas, list | tuple) and len(betas) >= 2 and isinstance(betas[1], int | float)
        if not pair or not 0 <= betas[1] < 1:
            raise ModelError(f"{path}: betas is {shown(betas)}, which are not Adam's; give a checkpoint of AdamW")
        return float(betas[1])
    if group.get("beta2") is not None:
        return float(group["beta2"])
    if given is None:
        warn_once(logger, f"{path} does not say its betas; {BETA2} is taken for beta2: give another by beta2=")
    return BETA2 if given is None else float(given)
