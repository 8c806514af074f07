"""LoRA on an embedding: y = c E[id] + c s B A[:, id], where c is a scale that the model's own embedding has, else 1.

    forward    h = A[:, id]        z = R_in[id], the rows that the tokens pick
    backward   [u | y'] = c g [B | R_out]
    dA[:, v] = s sum of u_t over the tokens t that are v,     dB = s sum_t c g_t h_t^T

A row of an example is a sum over its tokens as of any LoRA linear whose inputs are one-hot, which are never made: exact
sums go by token. A tied head multiplies with the base weight alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from influence_fast.data.adapter_names import plain_name
from influence_fast.errors import ModelError
from influence_fast.gradients.model.fused_layers import overridden
from influence_fast.gradients.model.lora_parameters import LoraParameter
from influence_fast.gradients.model.lora_parts import EMBEDDING_FACTORS, join_adapters, part_factors
from influence_fast.gradients.rows.factors import Block, Columns, Factor, tokens_of
from influence_fast.gradients.rows.projection import Projection
from influence_fast.gradients.rows.row_sketch import BucketSums
from influence_fast.gradients.step.reduction import Reducer


@dataclass(frozen=True, eq=False, kw_only=True)
class LoraEmbedding(LoraParameter):
    """LoRA on an embedding, its active adapters as one.

    weight: [V, d]. a: [r, V]. b: [d, r].
    """

    @property
    def key(self) -> str:
        return plain_name(self.name)

    def factors(self, projection: Projection | None = None) -> tuple[Factor, ...]:
        return part_factors(self.key, (self.d_out, self.d_in), self.r, self.parts, projection, EMBEDDING_FACTORS)


def embedding_of(name: str, layer: Any, active: Sequence[str], named: bool) -> LoraEmbedding:
    """Return what a LoRA layer over an embedding holds; `active` and `named` as for `join_adapters`.

    Raises ModelError for DoRA, and for weights that are spread over processes.
    """
    base = layer.get_base_layer()
    if any(adapter in layer.lora_magnitude_vector for adapter in active):
        raise ModelError(
            f"{name}: DoRA (use_dora) on an embedding is not supported: leave that module out of target_modules, or "
            "train the adapter without use_dora"
        )
    if hasattr(base.weight, "full_tensor"):
        raise ModelError(
            f"{name}: LoRA on an embedding that is spread over processes (FSDP) is not supported: leave that module "
            "out of target_modules, or run the model whole"
        )
    joined = join_adapters(layer, active, named)
    return LoraEmbedding(
        name=name,
        layer=layer,
        weight=base.weight.detach(),
        bias=None,
        a=joined.a,
        b=joined.b,
        scaling=joined.scaling,
        parts=joined.parts,
        parameter="weight",
        module=base,
        pair=(layer.lora_embedding_A[active[0]], layer.lora_embedding_B[active[0]]),
        experts=1,
    )


class EmbeddingPart:
    """One LoRA embedding of an open model."""

    packs = True  # whether it takes packs of several examples

    def __init__(self, number: int, member: LoraEmbedding, reducer: Reducer) -> None:
        self.number, self.member, self.reducer = number, member, reducer
        self.members = [(number, member)]
        self.anchor: torch.Tensor | None = None
        self.base: Any = member.module
        r_in, r_out = (one.to(member.device, member.dtype) for one in self._columns())
        # [V, r + p], what a token picks
        self.rows: torch.Tensor = torch.cat([member.a.T.to(member.dtype), r_in], dim=1)
        self.padding: int | None = self.base.padding_idx  # type: ignore[assignment]
        if self.padding is not None:  # whose A has no gradient in peft; its h is that of any token
            self.rows[self.padding, member.r :] = 0
        self.out_of = torch.cat([member.b.to(member.dtype), r_out], dim=1)  # [d, r + p]
        scale = getattr(member.layer, "_get_embed_scale", lambda: None)()
        self.scale = 1.0 if scale is None else float(scale)

    def _columns(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self.reducer.projected:
            return self.reducer.columns(self.number)
        return torch.zeros(self.member.d_in, 0), torch.zeros(self.member.d_out, 0)

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """Replace the layer's forward by this one while the block runs."""

        def forward(ids: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            found: torch.Tensor = _Embed.apply(self.anchor, ids, self)
            return found

        with overridden(self.member.layer, "forward", forward):
            yield

    def begin(self, anchor: torch.Tensor) -> None:
        """Start a step, whose backward is to reach this layer."""
        self.anchor = anchor

    def finish(self) -> None:
        """End a step."""
        self.anchor = None

    def add(self, ids: torch.Tensor, g: torch.Tensor) -> None:
        """Give what a backward left to the reducer: ids [T], gradients of the outputs g [T, d]."""
        bounds = self.reducer.cu_seqlens
        if len(ids) != bounds[-1]:
            raise ModelError(
                f"{self.member.name}: looks up {len(ids)} tokens of a pack of {bounds[-1]}, and whose they are is not "
                "known: leave that module out of target_modules"
            )
        g = g * self.scale
        kept, out_of = self.rows[ids], g @ self.out_of
        if self.reducer.projected:
            self.reducer.add(self.number, kept, out_of, g, None)
            return
        parts = [part.to(self.reducer.dtype) for part in (kept, out_of, g)]
        for example, (start, end) in enumerate(pairwise(bounds)):
            kept, out_of, g = (part[start:end] for part in parts)
            blocks = self.reducer.blocks[self.number]
            grads = [self._sum(block, ids[start:end], kept, out_of, g)[None] for block in blocks]
            self.reducer.add_factors(self.number, example, grads)

    def _sum(
        self, block: Block, ids: torch.Tensor, kept: torch.Tensor, out_of: torch.Tensor, g: torch.Tensor
    ) -> torch.Tensor:
        """Return one factor's sum over an example's tokens, scaled: [r, V] or [d, r]."""
        factor = block.factor
        if isinstance(factor.right, Columns):
            return (g.T @ tokens_of(factor.right, kept)).mul_(factor.scale)
        learnt = torch.ones(len(ids), dtype=g.dtype, device=g.device)
        if self.padding is not None:
            learnt[ids == self.padding] = 0
        sums = BucketSums.of(ids, learnt, self.member.d_in)
        return sums(tokens_of(factor.left, out_of).T.contiguous()).mul(factor.scale)


class _Embed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor | None, ids: torch.Tensor, part: EmbeddingPart) -> torch.Tensor:
        member = part.member
        y: torch.Tensor = part.base(ids)
        h = nn.functional.embedding(ids, member.a.T)
        ctx.save_for_backward(ids)
        ctx.part = part
        return (y + (h @ member.b.T) * (member.scaling * part.scale)).to(y.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        (ids,) = ctx.saved_tensors
        ctx.part.add(ids.reshape(-1), grads[0].reshape(-1, grads[0].shape[-1]).to(ctx.part.member.dtype))
        return None, None, None
