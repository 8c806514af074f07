"""Do LoRA layers see a pack's tokens in the pack's order? Tried by differentiation, as packs are (`pack_isolation`).

Sums over an example are over the rows between its bounds. A layer of as many rows in another order, as of tokens
sorted by expert, would add one example's gradient to another's row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from influence_fast.data.packing import Pack
from influence_fast.gradients.model.packed_attention import PackedTokens


@torch.enable_grad()
def out_of_order(
    call: Callable[[PackedTokens], Any],
    embeddings: nn.Module,
    layers: Sequence[nn.Module],
    ids: torch.Tensor,
    device: torch.device,
) -> nn.Module | None:
    """Return the first of `layers` whose rows do not belong to the examples of their places; None where all do.

    call: passes a pack through the model. ids: [n] int64 tokens, of which two examples are made. Costs a forward and a
    backward of n tokens. Layers that see another number of rows are not judged.
    """
    half, count = len(ids) // 2, len(ids)
    positions = torch.cat([torch.arange(half), torch.arange(count - half)])
    pack = Pack([0, 1], ids, positions, ids, [0, half, count])
    leaves: list[torch.Tensor] = []
    seen: list[tuple[nn.Module, torch.Tensor]] = []

    def from_a_leaf(_: Any, __: Any, embedded: torch.Tensor) -> torch.Tensor:
        leaves.append(embedded.detach().requires_grad_())
        return leaves[-1].clone()  # which a model may scale in place

    handles = [embeddings.register_forward_hook(from_a_leaf)]
    handles += [layer.register_forward_pre_hook(lambda own, args: seen.append((own, args[0]))) for layer in layers]
    try:
        call(PackedTokens.of(pack).to(device))
    finally:
        for handle in handles:
            handle.remove()
    rows = [(layer, x.reshape(-1, x.shape[-1])) for layer, x in seen if x.requires_grad]
    rows = [(layer, x) for layer, x in rows if len(x) == count]
    if len(leaves) != 1 or not rows or _apart(leaves[0], [x for _, x in rows], half):
        return None
    return next((layer for layer, x in rows if not _apart(leaves[0], [x], half)), None)


def _apart(leaf: torch.Tensor, rows: Sequence[torch.Tensor], half: int) -> bool:
    """Return whether the first `half` of rows [n, d] have no gradient in the embeddings of the rest, nor these in
    those.
    """
    for place, part in ((slice(None, half), slice(half, None)), (slice(half, None), slice(None, half))):
        # other weights for every number: a norm has a constant sum of squares
        sums = [(x[place] * _weights(x[place])).sum() for x in rows]
        (gradient,) = torch.autograd.grad(sums, leaf, retain_graph=True)
        other = gradient.reshape(-1, gradient.shape[-1])[part]
        if bool(other.isfinite().all()) and bool(other.ne(0).any()):
            return False
    return True


def _weights(x: torch.Tensor) -> torch.Tensor:
    return torch.arange(x.numel(), device=x.device).cos().view(x.shape).to(x.dtype)
