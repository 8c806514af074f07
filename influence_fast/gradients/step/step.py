"""One packed step: a forward and an activation backward of an opened model, from which rows and losses come."""

from __future__ import annotations

import torch

from influence_fast.data.packing import Pack
from influence_fast.errors import ModelError
from influence_fast.gradients.model import packed_attention as attention
from influence_fast.gradients.model.frozen import recomputing
from influence_fast.gradients.model.loss import CompletionLoss
from influence_fast.gradients.rows.row_sketch import segment_sums
from influence_fast.gradients.step.opened import OpenedModel
from influence_fast.gradients.step.reduction import Reducer
from influence_fast.gradients.step.step_inputs import StepInputs

Hidden = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]


def step(
    opened: OpenedModel, reducer: Reducer, inputs: StepInputs, recompute: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rows [E, k] and losses [E] of inputs on the device; reads no number on the host.

    recompute: whether the layers are recomputed in the backward, to keep less.
    """
    reducer.begin(inputs.tokens.cu_seqlens, inputs.segments)
    anchor = torch.empty((), device=opened.device, requires_grad=True)
    for group in opened.groups:
        group.anchor, group.tokens = anchor, inputs.tokens.input_ids.shape[1]
    for part in opened.parameters:
        part.begin(anchor)
    bounds = attention.example_bounds(inputs.tokens.cu_seqlens)
    with torch.enable_grad(), bounds, recomputing(opened.recomputable if recompute else []):
        loss, losses = _loss(opened, inputs)
        if not loss.requires_grad:
            raise ModelError(
                f"{type(opened.base).__name__}: no gradient reaches the LoRA layers, as where a model computes its "
                "layers in a backward of its own (reversible layers, reentrant checkpointing): call "
                "gradient_checkpointing_disable(), or choose another model"
            )
        with attention.unchanged_order():
            loss.backward()
    for group in opened.groups:
        group.anchor = None
    for part in opened.parameters:
        part.finish()
    return reducer.finish(), losses


@torch.no_grad()
def losses_of(opened: OpenedModel, pack: Pack, loss_reduction: str, dtype: torch.dtype) -> torch.Tensor:
    """Return the losses of a pack [E] without a backward pass, weighted in `dtype`."""
    inputs = StepInputs.of(pack, loss_reduction, dtype)  # nothing is summed
    return _loss(opened, inputs.to(opened.device))[1]


def hidden_of(opened: OpenedModel, inputs: StepInputs) -> Hidden:
    """Return what the loss needs: the last hidden states of the completion tokens, the head's weight and bias.

    Where the model's head is more than a product: the tokens' logits, and no weight.
    """
    try:
        output = opened.call(inputs.tokens)
    finally:
        for group in opened.groups:
            group.forget()
    if opened.whole_model_logits:
        return output.logits[0, inputs.positions], None, None
    hidden, head = output.last_hidden_state[0, inputs.positions], opened.head
    return hidden, head.weight.detach(), None if head.bias is None else head.bias.detach()


def _loss(opened: OpenedModel, inputs: StepInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the pack's summed loss, to differentiate, and the loss of each example [E]."""
    hidden, weight, bias = hidden_of(opened, inputs)
    compute = opened.backend.token_losses
    loss, token_losses = CompletionLoss.apply(hidden, weight, bias, inputs.targets, inputs.weights, compute)
    return loss, segment_sums(token_losses * inputs.weights, inputs.edges)
