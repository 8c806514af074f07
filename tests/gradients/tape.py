"""A CUDA graph's stand-in on the CPU: what a function computed, done again on the same memory.

Like a graph it repeats operations and kernel launches and nothing of the Python around them: a number that Python read
while the tape ran is a constant of it, and so is every branch taken.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from influence_fast.kernels import runtime

Results = tuple[torch.Tensor, torch.Tensor]


class Tape(TorchDispatchMode):
    """Lists what runs while it is entered; `replay` runs it again."""

    def __init__(self) -> None:
        super().__init__()
        self.entries: list[Callable[[], None]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func.is_view or func._schema.name.startswith("aten::empty"):
            return out

        def again() -> None:
            found = func(*args, **kwargs)
            if not func._schema.is_mutable:
                for old, new in zip(tree_leaves(out), tree_leaves(found), strict=True):
                    if isinstance(old, torch.Tensor):
                        old.copy_(new)

        self.entries.append(again)
        return out

    def launch(self, *args: Any, **kwargs: Any) -> None:
        """`kernels.runtime.launch`, listed too."""

        def again() -> None:
            with _disable_current_modes():
                runtime.launch(*args, **kwargs)

        again()
        self.entries.append(again)

    def replay(self) -> None:
        with torch.no_grad():
            for again in self.entries:
                again()


class TapeRecorder:
    """`graphs.CudaRecorder` by tapes."""

    def __init__(self, device: torch.device | None = None) -> None:
        self.replays = 0

    def record(self, run: Callable[[], Results]) -> tuple[Callable[[], None], Results]:
        tape = Tape()
        with tape, _launching_by(tape.launch):
            results = run()

        def replay() -> None:
            self.replays += 1
            tape.replay()

        # as a graph does not compute while it is recorded
        for result in results:
            result.detach().fill_(torch.nan)
        return replay, results


@contextmanager
def _launching_by(launch: Callable[..., None]) -> Iterator[None]:
    """While it is entered, every kernel file launches by this."""
    names = [name for name, module in sys.modules.items() if name.startswith("influence_fast.kernels.") and module]
    patches = [mock.patch.object(sys.modules[name], "launch", launch) for name in names if _has_own_launch(name)]
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in patches:
            patch.stop()


def _has_own_launch(name: str) -> bool:
    return name != runtime.__name__ and hasattr(sys.modules[name], "launch")
