"""Work on a model in the middle of its training that the training cannot tell was done."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

_PLAIN = (bool, int, float, str, type(None))


@contextlib.contextmanager
def random_states_kept() -> Iterator[None]:
    """Restore the random states of Python, numpy and torch, on every device in use, when the block ends."""
    python, numbers, host = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    cards = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    metal = torch.mps.get_rng_state() if torch.backends.mps.is_available() else None
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numbers)  # noqa: NPY002
        torch.set_rng_state(host)
        if cards:
            torch.cuda.set_rng_state_all(cards)
        if metal is not None:
            torch.mps.set_rng_state(metal)


@contextlib.contextmanager
def undisturbed(model: torch.nn.Module) -> Iterator[None]:
    """Restore all that running a model may change beside its frozen weights, when the block ends.

    These are random states, the mode and every plain setting of each module, its buffers and the numbers in them (some
    rotary embeddings follow the longest text that they have seen), which parameters ask for gradients, and the
    gradients that have been accumulated. Inside the block no gradient is accumulated, so that one that is there cannot
    be added to.
    """
    modules = list(model.modules())
    settings = [{k: v for k, v in vars(module).items() if isinstance(v, _PLAIN)} for module in modules]
    buffers = [
        (module, name, b, b.clone()) for module in modules for name, b in module._buffers.items() if b is not None
    ]
    parameters = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    for parameter, _, _ in parameters:
        parameter.grad = None
    with random_states_kept():
        try:
            yield
        finally:
            for parameter, asks, gradient in parameters:
                parameter.requires_grad_(asks)
                parameter.grad = gradient
            for module, plain in zip(modules, settings, strict=True):
                _restore(module, plain)
            with torch.no_grad():
                for module, name, buffer, numbers in buffers:
                    buffer.copy_(numbers)
                    module._buffers[name] = buffer


def _restore(module: torch.nn.Module, plain: dict[str, Any]) -> None:
    now = vars(module)
    for name in [n for n, v in now.items() if n not in plain and isinstance(v, _PLAIN)]:
        del now[name]
    now.update(plain)
