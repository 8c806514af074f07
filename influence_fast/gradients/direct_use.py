"""Find weights that a model reads in another way than through their linear's forward, which no row would see."""

from __future__ import annotations

import torch

from influence_fast.data.packing import Pack
from influence_fast.errors import ModelError
from influence_fast.gradients.model.lora import LoraLinear
from influence_fast.gradients.step.opened import OpenedModel
from influence_fast.gradients.step.step import hidden_of
from influence_fast.gradients.step.step_inputs import StepInputs
from influence_fast.gradients.targets import PlainLinear, working_targets


def check_weights(opened: OpenedModel) -> None:
    """Raise ModelError for a plain linear whose weight the open model reads beside the replaced forward.

    That forward is on detached weights: what asks for a gradient after it was reached by another way. Two tokens.
    """
    linears: list[LoraLinear] = [linear for linear in opened.linears if isinstance(linear, PlainLinear)]
    if not linears or any(linear.sharded for linear in linears) or opened.device.type == "meta":
        return
    two = torch.zeros(2, dtype=torch.int64)
    inputs = StepInputs.of(Pack([0], two, torch.arange(2), two, [0, 2]), "mean", torch.float32)
    weights = [linear.base.weight for linear in linears]
    try:
        for weight in weights:
            weight.requires_grad_(True)
        with torch.enable_grad():
            hidden = hidden_of(opened, inputs.to(opened.device))[0]
            if not hidden.requires_grad:
                return
            found = torch.autograd.grad(hidden.sum(), weights, allow_unused=True)
    finally:
        for weight in weights:
            weight.requires_grad_(False)
    wrong = [linear.name for linear, grad in zip(linears, found, strict=True) if grad is not None]
    if wrong:
        raise ModelError(
            f"{wrong[0]}: the model reads its weight beside calling it, and no row would see that part of the "
            f"gradient; leave it out of target{working_targets([linear.name for linear in linears], wrong)}"
        )
