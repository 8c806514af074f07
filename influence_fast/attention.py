"""Attention over a pack: each example attends to itself alone, at the cost of its own length squared.

Registered with transformers as an attention implementation. A dense block-diagonal mask would compute the whole
(T, T) product; here one SDPA call an example computes only its block, so an example's numbers do not depend on
its neighbours. Models that run flash-attention or flex attention keep theirs: transformers hands them the same
`cu_seq_lens` and positions.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from influence_fast.errors import ModelError

PACKED = "influence_fast_packed"


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,  # [1, heads, T, head_dim]
    key: torch.Tensor,  # [1, kv_heads, T, head_dim]
    value: torch.Tensor,  # [1, kv_heads, T, head_dim]
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    cu_seq_lens_q: list[int] | torch.Tensor | None = None,
    packed_probe: list[int] | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: returns ([1, T, heads, head_dim], None)."""
    for unsupported in ("softcap", "s_aux", "position_bias"):
        if kwargs.get(unsupported) is not None:
            raise ModelError(f"attention with {unsupported} is not supported in packed batches")
    if packed_probe is not None and cu_seq_lens_q is not None:
        packed_probe.append(1)  # the boundaries do reach the attention
    if cu_seq_lens_q is None:
        lengths = [query.shape[2]]
    else:
        bounds = cu_seq_lens_q.tolist() if isinstance(cu_seq_lens_q, torch.Tensor) else cu_seq_lens_q
        lengths = [end - start for start, end in pairwise(bounds)]
    grouped = query.shape[1] != key.shape[1]
    # split, not slicing: its backward is one concatenation, where each slice's would be a zero-filled copy
    parts = zip(query.split(lengths, dim=2), key.split(lengths, dim=2), value.split(lengths, dim=2), strict=True)
    outputs = []
    for q, k, v in parts:
        n = q.shape[2]
        mask = None
        if sliding_window is not None and n > sliding_window:
            distance = torch.arange(n, device=q.device)[:, None] - torch.arange(n, device=q.device)[None, :]
            mask = (distance >= 0) & (distance < sliding_window)
        out = scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=grouped
        )
        outputs.append(out.transpose(1, 2))
    return torch.cat(outputs, dim=1), None


def register() -> None:
    """Makes `PACKED` known to transformers; harmless to repeat."""
    from transformers import AttentionInterface

    AttentionInterface.register(PACKED, packed_attention)
