"""PyTorch's variable-length attention, as it documents it, by operations that run anywhere."""

from __future__ import annotations

import torch


def varlen_attn(
    query: torch.Tensor,  # [T, heads, d]
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> torch.Tensor:
    """`torch.nn.attention.varlen.varlen_attn`: window_size is (left, right) neighbours, -1 for all.

    From nothing but tensors on the device, as the kernel does it: no bound is read on the host.
    """
    assert enable_gqa == (query.shape[1] != key.shape[1])
    times, count = query.shape[1] // key.shape[1], query.shape[0]
    left, right = (size if size >= 0 else count for size in window_size)
    place = torch.arange(count)
    owner = torch.searchsorted(cu_seq_q, place, right=True)
    behind = place[:, None] - place[None, :]
    seen = (owner[:, None] == owner[None, :]) & (behind <= left) & (-behind <= right)
    q, k, v = query.transpose(0, 1), *(part.repeat_interleave(times, 1).transpose(0, 1) for part in (key, value))
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    weights = (q @ k.transpose(1, 2) * scale).masked_fill(~seen, -torch.inf).softmax(dim=-1)
    return (weights @ v).transpose(0, 1)
