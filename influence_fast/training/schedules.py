"""The learning rate of every step of a training, by its scheduler.

A Trainer logs the rate of one step in `logging_steps` (500 by default), so that the mean of logged points over a span
is not the span's mean: without one in the span it is a rate of another span. Here the scheduler itself is run again
with the settings that the checkpoint holds, and what comes out is compared with the scheduler's state and every logged
point before it is believed.
"""

from __future__ import annotations

import io
import json
import math
import pickle
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from influence_fast.training.optimizer_states import optimizer_file

ARGUMENTS = "training_args.bin"
SCHEDULER = "scheduler.pt"
_LARGEST = 1 << 22  # bytes of an arguments file that is read; they have about 6 kB
_RELATIVE = 1e-5  # rates that are logged are rounded by no more


@dataclass(frozen=True)
class Schedule:
    """A scheduler by the settings that make it: transformers' name, the top rate, and steps."""

    name: str
    learning_rate: float
    warmup_steps: int
    max_steps: int
    options: Mapping[str, Any] = field(default_factory=dict)

    def rates(self, steps: int) -> np.ndarray:
        """Return the rates of steps 1 to `steps` and of the next, [steps + 1] fp64.

        Raises ValueError or TypeError for a scheduler that is unknown, lacks an option, or goes by measured losses.
        """
        from transformers import get_scheduler

        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=self.learning_rate)
        scheduler: Any = get_scheduler(
            self.name,
            optimizer,
            num_warmup_steps=self.warmup_steps,
            num_training_steps=self.max_steps,
            scheduler_specific_kwargs=dict(self.options),
        )
        if not isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR):
            raise ValueError(f"the rates of {self.name} follow from measured losses")
        (factor,) = scheduler.lr_lambdas
        return np.array([self.learning_rate * float(factor(step)) for step in range(steps + 1)])


def checkpoint_rates(
    checkpoint: Path, step: int, since: int, max_steps: int, logged: Sequence[tuple[int, float]]
) -> np.ndarray | None:
    """Return the rates of steps `since` + 1 to `step` of the training that saved `checkpoint`, [step - since] fp64.

    Args:
        checkpoint: the folder, with `training_args.bin` or beside a `training.json`.
        step: the optimizer steps made by then.
        max_steps: of the whole training, as `trainer_state.json` has them.
        logged: (step, rate) as they were logged.

    None where the settings are not known, or do not give the scheduler's state or the rates that were logged.
    """
    state = _scheduler_state(checkpoint)
    for schedule in _candidates(checkpoint, max_steps):
        try:
            rates = schedule.rates(step)
        except (ValueError, TypeError, ZeroDivisionError, KeyError):
            continue
        if _agrees(rates, state, step, [(at, rate) for at, rate in logged if since < at <= step]):
            return rates[since:step]
    return None


def _agrees(rates: np.ndarray, state: Mapping[str, Any] | None, step: int, logged: Sequence[tuple[int, float]]) -> bool:
    """Return whether rates are those of a scheduler's state after `step` steps and of the logged points.

    Up to version 5 transformers logged the rate of the next step.
    """
    scale = float(np.abs(rates).max()) or 1.0

    def near(a: float, b: float) -> bool:
        return math.isclose(a, b, rel_tol=_RELATIVE, abs_tol=_RELATIVE * scale * 1e-3)

    if state is not None and (state.get("last_epoch") != step or not near(state["_last_lr"][0], rates[step])):
        return False  # with another last_epoch, some steps were skipped (overflows in fp16)
    if state is None and not logged:
        return False
    return any(all(near(rate, rates[at - 1 + shift]) for at, rate in logged) for shift in (0, 1))


def group_rates(checkpoint: Path) -> list[float]:
    """Return the different learning rates of the groups of parameters in a checkpoint, in their order; [] if unknown.

    Top rates decide before those of the step: a schedule that has come to zero makes all groups the same. Groups
    without parameters do not count where the optimizer's file tells them.
    """
    kinds = _optimizer_rates(checkpoint)
    if not any(kinds):
        state = _scheduler_state(checkpoint) or {}
        kinds = [list(state.get(key) or ()) for key in ("base_lrs", "_last_lr")]
    found = [list(dict.fromkeys(map(float, rates))) for rates in kinds if rates]
    return next((rates for rates in found if len(rates) > 1), found[0] if found else [])


def _optimizer_rates(checkpoint: Path) -> list[list[Any]]:
    """Return top rates and rates of the optimizer's groups, [] each if some group does not say."""
    path = optimizer_file(checkpoint)
    if path is None:
        return []
    try:  # mapped, as the moments beside the rates are not wanted
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        groups = [group for group in loaded["param_groups"] if group["params"]]
        rates = [[group.get(key) for group in groups] for key in ("initial_lr", "lr")]
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError, AttributeError, KeyError, TypeError, ValueError):
        return []  # who reads the moments says what is wrong with the file
    return [kind if all(isinstance(rate, (float, int, torch.Tensor)) for rate in kind) else [] for kind in rates]


def _scheduler_state(checkpoint: Path) -> Mapping[str, Any] | None:
    try:
        state = torch.load(checkpoint / SCHEDULER, map_location="cpu", weights_only=True)
        return state if {"last_epoch", "_last_lr"} <= state.keys() and len(state["_last_lr"]) else None
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError, AttributeError):
        return None


# ---- settings --------------------------------------------------------------------------------------------


def _candidates(checkpoint: Path, max_steps: int) -> list[Schedule]:
    found = (_by_arguments(checkpoint / ARGUMENTS, max_steps), _by_record(checkpoint.parent, max_steps))
    return [schedule for schedule in found if schedule is not None]


def _by_record(folder: Path, max_steps: int) -> Schedule | None:
    """Read the schedule from the record of `finetune`."""
    try:
        train = json.loads((folder / "training.json").read_text(encoding="utf-8"))["train"]
        warmup = round(train["warmup_ratio"] * max_steps)
        return Schedule(str(train["schedule"]), float(train["learning_rate"]), warmup, max_steps)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _by_arguments(path: Path, max_steps: int) -> Schedule | None:
    """Read the schedule from the arguments that transformers' Trainer pickles."""
    arguments = read_arguments(path)
    try:
        warmup = float(arguments.get("warmup_steps") or 0)
        if warmup < 1:  # a share of the steps, by one name or the other
            warmup = math.ceil(max_steps * (warmup or float(arguments.get("warmup_ratio") or 0)))
        options = arguments.get("lr_scheduler_kwargs") or {}
        options = json.loads(options) if isinstance(options, str) else dict(options)
        name = str(arguments["lr_scheduler_type"])
        return Schedule(name, float(arguments["learning_rate"]), int(warmup), max_steps, options)
    except (KeyError, TypeError, ValueError):
        return None


class _Inert:
    """Stands for every class and function in a pickle: takes what it is given and does nothing."""

    def __new__(cls, *arguments: Any, **more: Any) -> _Inert:
        made = object.__new__(cls)
        made.arguments = arguments
        made.state = {}
        return made

    arguments: tuple[Any, ...]
    state: Any

    def __init__(self, *arguments: Any, **more: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        pass

    def extend(self, values: Any) -> None:
        pass

    def add(self, value: Any) -> None:
        pass


class _InertUnpickler(pickle.Unpickler):
    """Reads a pickle's plain values without importing or calling anything that it names."""

    def find_class(self, module: str, name: str) -> Any:
        return _Inert

    def persistent_load(self, pid: Any) -> Any:
        return None


def read_arguments(path: Path) -> dict[str, Any]:
    """Read the plain fields of pickled `TrainingArguments`, enums by their values; {} where they cannot be read.

    Nothing in the file is run: every class that it names is replaced by one that does nothing.
    """
    try:
        if path.stat().st_size > _LARGEST:
            return {}
        with zipfile.ZipFile(path) as archive:
            (name,) = [name for name in archive.namelist() if name.endswith("data.pkl")]
            if archive.getinfo(name).file_size > _LARGEST:
                return {}
            loaded = _InertUnpickler(io.BytesIO(archive.read(name))).load()
    except (OSError, zipfile.BadZipFile, pickle.UnpicklingError, *_MALFORMED):
        return {}
    state = getattr(loaded, "state", None)
    if not isinstance(state, dict):
        return {}
    return {str(key): _plain(value) for key, value in state.items()}


_MALFORMED = (ValueError, EOFError, TypeError, AttributeError, IndexError, KeyError, NotImplementedError, MemoryError)


def _plain(value: Any) -> Any:
    return value.arguments[0] if isinstance(value, _Inert) and len(value.arguments) == 1 else value
