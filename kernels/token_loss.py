# mypy: disable-error-code="no-untyped-def"
"""Cross-entropy of a chunk of tokens from their logits, and its gradient in the logits' own place.

    loss_t = log sum_v exp(z_tv) - z_tc        d loss_t / d z_tv = w_t (softmax(z_t)_v - [v = c])

z (n, V) logits, c (n,) targets, w (n,) weights. At a vocabulary of 152k the operations that PyTorch makes of this read
and write fp32 copies of the logits a dozen times, which takes longer than the head's products where the model is
small; here the logits are read twice and the gradient is written over them.

Bytes: z twice (the second time from the L2 cache, as far as it reaches), the gradient once. One program a token: every
lane keeps the largest number it has met and a sum relative to it, so nothing is exchanged until the end of the row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from influence_fast.errors import ConfigError
from influence_fast.kernels.runtime import (
    Cost,
    check_device,
    check_dtype,
    check_last_stride,
    check_shape,
    jit,
    launch,
    padded,
    tl,
)

BLOCK = 4096


@jit
def _token_loss_kernel(
    logits,  # [n, V], overwritten if GRADIENT
    targets,  # [n] int64
    weights,  # [n] float32, or unused
    losses,  # [n] float32
    vocabulary,
    stride_row,
    BLOCK: tl.constexpr,
    GRADIENT: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    logits += t * stride_row
    target = tl.load(targets + t)
    at_target = tl.load(logits + target).to(tl.float32)
    highest = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], dtype=tl.float32)  # of exp(z - highest)
    for start in range(0, vocabulary, BLOCK):
        v = start + lane
        z = tl.load(logits + v, mask=v < vocabulary, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(highest, z)
        shift = tl.where(higher == float("-inf"), 0.0, higher)  # of two infinities nothing could be taken
        total = total * tl.exp(highest - shift) + tl.exp(z - shift)
        highest = higher
    peak = tl.max(highest, axis=0)
    sums = tl.sum(total * tl.exp(highest - peak), axis=0)
    tl.store(losses + t, tl.log(sums) + (peak - at_target))
    if GRADIENT:
        weight = tl.load(weights + t)
        scale = weight / sums
        for start in range(0, vocabulary, BLOCK):
            v = start + lane
            z = tl.load(logits + v, mask=v < vocabulary, other=float("-inf")).to(tl.float32)
            gradient = tl.exp(z - peak) * scale
            gradient = tl.where(v == target, gradient - weight, gradient)
            tl.store(logits + v, gradient, mask=v < vocabulary)


def token_loss(logits: Tensor, targets: Tensor, losses: Tensor, *, weights: Tensor | None = None) -> Tensor:
    """Write each token's loss into `losses` and return it; with `weights`, `logits` become the gradient.

    logits: (n, V) float32, bfloat16 or float16, rows contiguous
    targets: (n,) int64, in 0 ... V - 1 (not checked: that would wait for the device)
    losses: (n,) float32
    weights: (n,) float32, what each token's gradient is multiplied by

    Raises ConfigError for shapes, dtypes or devices that do not fit.
    """
    name = "token_loss"
    check_shape(name, "logits", logits, ("n", "V"))
    tokens, vocabulary = logits.shape
    check_last_stride(name, logits=logits)
    check_dtype(name, logits=logits)
    for key, tensor, dtype in (
        ("targets", targets, torch.int64),
        ("losses", losses, torch.float32),
        ("weights", weights, torch.float32),
    ):
        if tensor is None:
            continue
        check_shape(name, key, tensor, (tokens,))
        if tensor.dtype != dtype or not tensor.is_contiguous():
            raise ConfigError(f"{name}: {key} must be contiguous {dtype}, got {tensor.dtype}")
    if vocabulary < 1:
        raise ConfigError(f"{name}: logits have no numbers, got {tuple(logits.shape)}")
    device = check_device(name, logits=logits, targets=targets, losses=losses, weights=weights)
    if tokens:
        launch(
            _token_loss_kernel,
            (tokens,),
            {
                "logits": logits,
                "targets": targets,
                "weights": losses if weights is None else weights,
                "losses": losses,
                "vocabulary": vocabulary,
                "stride_row": logits.stride(0),
            },
            {"BLOCK": min(padded(vocabulary), BLOCK), "GRADIENT": weights is not None},
            device=device,
            num_warps=8,
            num_stages=2,
        )
    return losses


def reference(logits: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Compute `token_loss` in PyTorch, in the dtype of `logits`: losses (n,), gradient (n, V)."""
    losses = logits.logsumexp(dim=1) - logits.gather(1, targets[:, None]).squeeze(1)
    gradient = logits.softmax(dim=1).scatter_add(1, targets[:, None], -torch.ones_like(logits[:, :1]))
    return losses, gradient * weights[:, None].to(gradient.dtype)


def cost(tokens: int, vocabulary: int, *, itemsize: int = 2) -> Cost:
    """Return the least work of one call with gradient.

    It is two exponentials, a sum and a product a number; each number is read once and written once.
    """
    return Cost(4 * tokens * vocabulary, 2 * tokens * vocabulary * itemsize + tokens * (8 + 4 + 4))
