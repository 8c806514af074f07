"""Compare an opened model with its own plain forward: a few texts on opening, and the first pack of the user's data."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch

from influence_fast.data.packing import IGNORED, Pack, pack_examples, teaches
from influence_fast.errors import ModelError, truncated_list
from influence_fast.gradients.model import packed_attention as attention
from influence_fast.gradients.model.layer_outputs import outputs_of
from influence_fast.gradients.model.referee import Referee
from influence_fast.gradients.rows.precision import FP8
from influence_fast.gradients.step.opened import OpenedModel
from influence_fast.gradients.step.step import losses_of

# Of the user's own data, what is compared with plain forwards. At 2,048 tokens the logits of a vocabulary of 152k take
# 0.6 GB in 16 bits; 4 forwards of a build of 1,000 examples are a thousandth of it.
COMPARED_EXAMPLES, COMPARED_TOKENS = 4, 2048


@torch.no_grad()
def compare_opened(opened: OpenedModel, loss_reduction: str, dtype: torch.dtype) -> None:
    """Raise ModelError where the outputs or losses of a few texts are not those of the plain forward.

    dtype: in which losses are weighted and summed.
    """
    referee = _referee_of(opened)
    if referee is None:
        return
    seen: list[torch.Tensor] = []
    whole = opened.whole_model_logits
    handle = opened.module.register_forward_hook(lambda _, __, output: seen.append(outputs_of(output, whole)))
    errors, losses, wanted, texts = [], [], [], []
    try:
        for pack in referee.packs(opened.mode.packs_pay):
            if len(pack.input_ids) == 1:
                continue  # a text of one token has no loss
            found = losses_of(opened, pack, loss_reduction, dtype).tolist()
            errors += referee.errors(pack, seen.pop(), whole)
            for place, loss in zip(pack.indices, found, strict=True):
                text = referee.texts[place]
                if text.loss is not None:
                    losses.append(loss / (len(text.ids) - 1) if loss_reduction == "sum" else loss)
                    wanted.append(text.loss)
                    texts.append((text.ids, text.labels))
    finally:
        handle.remove()
    if not referee.accepts(errors):
        raise _refusal(opened, referee, max(errors))
    agreeing = referee.losses_agree(losses, wanted, texts) if referee.usable else [True]
    if not all(agreeing):
        raise _refusal(opened, referee, max(abs(a - b) for a, b in zip(losses, wanted, strict=True)))


def compare_losses(
    opened: OpenedModel,
    pack: Pack,
    losses: torch.Tensor,
    names: Sequence[str],
    loss_reduction: str,
    dtype: torch.dtype,
) -> None:
    """Raise ModelError where losses [E] of a pack, reduced as said, are not those of the plain forward.

    names: the pack's examples, for the message. Costs a plain forward an example, of at most 4 examples and 2,048
    tokens of the pack; where its first example is longer, of that one's first 2,048 tokens.
    """
    referee = _referee_of(opened)
    if referee is None:
        return
    texts = first_texts(pack)
    ours = losses[: len(texts)].tolist()
    if len(texts[0][0]) < pack.lengths[0] or pack.weights is not None:  # plain losses have no weights
        cut = pack_examples([{"input_ids": ids, "labels": labels} for ids, labels in texts], COMPARED_TOKENS)
        ours = losses_of(opened, cut[0], loss_reduction, dtype).tolist()
    if loss_reduction == "sum":
        counts = [int((labels[1:] != IGNORED).sum()) for _, labels in texts]
        ours = [loss / count for loss, count in zip(ours, counts, strict=True)]
    plain = referee.plain_losses(texts)
    agreeing = referee.losses_agree(ours, plain, texts)
    if all(agreeing):
        return
    found = zip(names, ours, plain, agreeing, strict=False)
    differing = [f"{name} (loss {a:.6g}, plain {b:.6g})" for name, a, b, same in found if not same]
    remedy = _remedy(opened) or (
        "take one example at a time (max_tokens=1)"
        if opened.mode.packs_pay and len(pack.indices) > 1
        else "load the model with attn_implementation='eager', or in float32"
    )
    raise ModelError(
        f"{referee.name}: the engine's mean losses are not those of the model's own forward for "
        f"{truncated_list(differing)}: {remedy}"
    )


def first_texts(pack: Pack) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return (input_ids [n], labels [n]) of the first examples of a pack to compare; of a longer one its beginning."""
    texts: list[tuple[torch.Tensor, torch.Tensor]] = []
    tokens = 0
    for start, end in pairwise(pack.cu_seqlens[: COMPARED_EXAMPLES + 1]):
        if texts and tokens + end - start > COMPARED_TOKENS:
            break
        ids, targets = pack.input_ids[start:end], pack.targets[start:end]
        labels = torch.cat([targets.new_tensor([IGNORED]), targets[:-1]])
        if len(ids) > COMPARED_TOKENS:
            ids, labels = ids[:COMPARED_TOKENS], labels[:COMPARED_TOKENS]
            labels = labels if teaches(labels) else torch.where(labels == IGNORED, ids, labels)
        texts.append((ids, labels))
        tokens += len(ids)
    return texts


def _referee_of(opened: OpenedModel) -> Referee | None:
    """Return the plain outputs to compare with; None if there are no numbers, as of kernels that are only recorded."""
    return None if opened.backend.only_recorded else opened.referee


def _remedy(opened: OpenedModel) -> str:
    """Return what to change where the engine's numbers are not the model's; empty if it is not known."""
    if opened.precision == FP8:
        return "leave precision at 'auto'"
    return opened.backend.remedy


def _refusal(opened: OpenedModel, referee: Referee, error: float) -> ModelError:
    def ours(pack: Pack) -> None:
        opened.call(attention.PackedTokens.of(pack).to(opened.device))
        for group in opened.groups:
            group.forget()

    return referee.refusal(ours, error, _remedy(opened))
