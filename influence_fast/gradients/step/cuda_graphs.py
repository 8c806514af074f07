"""CUDA graphs: a step of one shape is recorded once, and then replayed by a single launch.

A small model on a fast card waits for the host, which launches some hundred operations a layer one by one
(`python -m benches.launches`): at Qwen2.5-0.5B's shape a replayed step takes half as long (benches/results/gpu-*). A
recorded step is the same kernels on the same memory: a pack is padded to the step's shape (`StepShape`), its tensors
are copied to where the step reads them, in one copy, and the whole of forward, backward and sums is one launch.

Where steps may be recorded all packs are padded, whether theirs is recorded yet, or ever: a row has the same bits
whatever was computed before it, so a store that goes on after a crash is the one that it would have been.

A step may be recorded if nothing in it depends on numbers that the host has looked at. Whatever would look at them
waits for the card, which a recording forbids: such a model is found out first, said once, and run operation by
operation.

On wherever they can be. INFLUENCE_FAST_CUDA_GRAPHS=0 in the environment turns them off, and 1 has it said where they
cannot be; a call's own `cuda_graphs=` wins, and True is an error there.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from influence_fast.errors import ConfigError, warn_once
from influence_fast.gradients.step.step_inputs import StepInputs, StepShape
from influence_fast.transfer import joined, to_device

logger = logging.getLogger(__name__)

# Each holds some thousand kernel nodes and its rows; packs of one data set have some ten shapes, at most some fifty.
MOST_GRAPHS = 64
MOST_BYTES = 2 << 30  # of the rows and losses of all of them

VARIABLE = "INFLUENCE_FAST_CUDA_GRAPHS"
_SWITCH = {"": None, "0": False, "1": True}

Step = Callable[[StepInputs], tuple[Tensor, Tensor]]


def wanted() -> bool | None:
    """Parse the environment variable: False disables graphs, True warns where there can be none, None is auto.

    Raises ConfigError for a value of the variable but 0 and 1.
    """
    value = os.environ.get(VARIABLE, "")
    if value not in _SWITCH:
        raise ConfigError(f"{VARIABLE}: unknown value {value!r}; set it to 1 or 0")
    return _SWITCH[value]


@dataclass(frozen=True, slots=True)
class Wish:
    """Say whether CUDA graphs are to be used, and what happens where they cannot be.

    wanted: use them where they can be. asked_for: by the call itself, so that ConfigError is raised where they cannot.
    said: by the environment, so that a warning is logged.
    """

    wanted: bool
    asked_for: bool
    said: bool

    @classmethod
    def of(cls, cuda_graphs: bool | None) -> Wish:
        """Make it of a call's own option; None leaves it to the environment (ConfigError as `wanted`)."""
        asked = wanted() if cuda_graphs is None else cuda_graphs
        return cls(asked is not False, cuda_graphs is True, asked is True)

    def granted(self, why_not: str) -> bool:
        """Tell whether graphs are used, given why they cannot be (empty if they can)."""
        if not self.wanted or not why_not:
            return self.wanted
        if self.asked_for:
            raise ConfigError(f"cuda_graphs: CUDA graphs cannot be used: {why_not}; leave them off")
        if self.said:
            warn_once(logger, f"{VARIABLE}: CUDA graphs are not used here: {why_not}")
        return False


class Recorder(Protocol):
    """Records what a function launches."""

    def record(self, run: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Callable[[], None], tuple[Tensor, Tensor]]:
        """Record `run`; return a function that launches it again, and where the results then are."""
        ...


class CudaRecorder:
    """By CUDA's stream capture. All graphs share one memory pool: they run one after the other."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.pool = torch.cuda.graph_pool_handle()

    def record(self, run: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Callable[[], None], tuple[Tensor, Tensor]]:
        with _ONE_AT_A_TIME, torch.cuda.device(self.device):
            _check_that_nothing_waits(run)
            graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.device)
            # thread_local: threads that wait for nothing on a card may go on, as those that write rows do
            options: dict[str, Any] = {"pool": self.pool, "capture_error_mode": "thread_local"}
            try:
                with torch.cuda.graph(graph, stream=_stream(self.device), **options):
                    results = run()
            except RuntimeError as error:
                self._abandon(before)
                first = error.__context__  # the error that the capture's own end hides
                raise RuntimeError(str(first if isinstance(first, RuntimeError) else error)) from error
        return graph.replay, results

    def _abandon(self, stream: Any) -> None:
        """Undo what PyTorch leaves after a capture that failed: its stream, and the pool it was allocating from."""
        torch.cuda.set_stream(stream)
        end = getattr(torch._C, "_cuda_endAllocateToPool", None)
        if end is not None:
            with contextlib.suppress(RuntimeError):
                end(torch.cuda.current_device(), self.pool)


# What a check looks for is looked for in the whole process.
_ONE_AT_A_TIME = threading.Lock()


def _check_that_nothing_waits(run: Callable[[], Any]) -> None:
    """Raise RuntimeError if `run` would wait for the GPU: found in a capture, the process would not recover from it."""
    before = torch.cuda.get_sync_debug_mode()
    _set_sync_debug_mode("error")
    try:
        run()
    finally:
        _set_sync_debug_mode(before)


def _set_sync_debug_mode(mode: int | str) -> None:
    with warnings.catch_warnings():  # that it is a prototype, which tells a user nothing
        warnings.filterwarnings("ignore", message="Synchronization debug mode")
        torch.cuda.set_sync_debug_mode(mode)


@functools.cache
def _stream(device: torch.device) -> Any:
    """Return a GPU's stream for captures, kept: cuBLAS keeps a workspace for each."""
    return torch.cuda.Stream(device)


@dataclass(frozen=True, slots=True)
class _Recorded:
    memory: Tensor  # uint8, where the step reads its inputs
    replay: Callable[[], None]
    results: tuple[Tensor, Tensor]


class StepGraphs:
    """Runs a step operation by operation the first time a shape is seen, and recorded from the second time on.

    The first run compiles kernels and fills caches, which a recording cannot; a shape seen once is not worth one.
    """

    def __init__(self, step: Step, device: torch.device, recorder: Recorder) -> None:
        self._step = step
        self._device = device
        self._recorder = recorder
        self._seen: set[StepShape] = set()
        self._graphs: dict[StepShape, _Recorded] = {}
        self._bytes = 0  # of their results
        self.refused = False  # whether a step could not be recorded

    @property
    def most_tokens(self) -> int:
        """Return the tokens of the largest step recorded; 0 for none."""
        return max((shape.tokens for shape in self._graphs), default=0)

    @property
    def _full(self) -> bool:
        """Return whether no more steps are recorded."""
        return self.refused or len(self._graphs) >= MOST_GRAPHS or self._bytes >= MOST_BYTES

    def run(self, shape: StepShape, inputs: StepInputs, examples: int) -> tuple[Tensor, Tensor]:
        """Return rows and losses of the first `examples` of the padded `inputs`, which are on the host."""
        graph = self._graphs.get(shape)
        if graph is not None:
            graph.memory.copy_(_pinned(joined(inputs.tensors), self._device), non_blocking=True)
        elif shape in self._seen and not self._full:
            graph = self._record(shape, inputs)
        self._seen.add(shape)
        if graph is None:
            rows, losses = self._step(inputs.to(self._device))
            return rows[:examples], losses[:examples]
        graph.replay()
        rows, losses = graph.results
        return rows[:examples].clone(), losses[:examples].clone()  # the next replay writes to the same place

    def _record(self, shape: StepShape, inputs: StepInputs) -> _Recorded | None:
        """Record the step, with `inputs` where it reads them.

        None if it cannot be recorded, which is said, once for all.
        """
        memory = to_device(joined(inputs.tensors), self._device)
        try:
            replay, results = self._recorder.record(lambda: self._step(inputs.within(memory)))
        except RuntimeError as error:
            why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            warn_once(
                logger,
                "this model's step cannot be recorded as a CUDA graph, so each operation is launched by itself "
                f"({VARIABLE}=0 spares the attempt): {why}",
            )
            self.refused = True
            return None
        self._bytes += sum(result.nbytes for result in results)
        return self._graphs.setdefault(shape, _Recorded(memory, replay, results))


def _pinned(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.pin_memory() if device.type == "cuda" else tensor
