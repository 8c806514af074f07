"""What runs a model in the middle of its training leaves no trace."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

from influence_fast.training.undisturbed import undisturbed


class Drifting(torch.nn.Module):
    """A module that keeps the longest text it has seen, as some rotary embeddings do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(3, 3)
        self.register_buffer("seen", torch.zeros(1))
        self.longest = 0

    def forward(self, x: torch.Tensor) -> Any:
        self.longest = max(self.longest, len(x))
        self.seen += len(x)
        return self.linear(x) * torch.rand(()) * random.random() * float(np.random.rand())  # noqa: NPY002


def test_a_model_and_the_random_states_are_as_before() -> None:
    torch.manual_seed(0)
    model = Drifting()
    model.linear.bias.requires_grad_(False)
    model(torch.ones(2, 3)).sum().backward()
    gradient = model.linear.weight.grad
    assert gradient is not None
    before = gradient.clone()
    draws: list[Any] = []
    for disturbed in (False, True):
        random.seed(1), np.random.seed(1), torch.manual_seed(1)  # noqa: NPY002
        if disturbed:
            with undisturbed(model):
                model.eval()
                model.requires_grad_(True)
                model(torch.ones(7, 3)).sum().backward()
                model.extra = 3  # type: ignore[assignment]
        draws.append((random.random(), float(np.random.rand()), float(torch.rand(()))))  # noqa: NPY002
    assert draws[0] == draws[1]
    assert model.linear.weight.grad is gradient
    assert torch.equal(gradient, before)
    assert model.linear.bias.grad is None
    assert not model.linear.bias.requires_grad
    assert model.training
    assert not hasattr(model, "extra")
    assert model.longest == 2
    assert float(model.seen) == 2
