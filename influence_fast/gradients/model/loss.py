"""Cross-entropy on completion tokens that never holds (T, vocab) logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

# (logits [m, vocab], targets [m], losses [m], weights [m] or None) -> d loss / d logits, or None without weights.
TokenLosses = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor | None]

# Logits held at once on a CPU, in numbers: 4M fp32 numbers are 16 MiB, which stays near its caches.
_CPU_LOGITS = 1 << 22
# But so many tokens at least: each chunk reads the head's weight twice, and at a vocabulary of 152k chunks of the 27
# tokens that would fit take twice as long as these.
_CPU_TOKENS = 256
# Tokens at once on a card, where below some 300 (operations a byte that cards do) reading the weight takes longer than
# multiplying by it, and every chunk is a dozen launches.
CARD_TOKENS = 1024


def tokens_at_once(vocabulary: int, device: torch.device) -> int:
    """Return how many tokens' logits are held at a time."""
    return max(_CPU_TOKENS, _CPU_LOGITS // vocabulary) if device.type == "cpu" else CARD_TOKENS


class CompletionLoss(torch.autograd.Function):
    """Weighted token losses from hidden states; the gradient is formed with the loss, chunk by chunk.

    For token t with logits z = W h_t and target c: loss = logsumexp(z) - z_c, d loss / d h = W^T (softmax(z) - e_c).
    The head is frozen, so nothing but d loss / d h is ever needed and the logits can be dropped at once.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,  # [n, d], completion tokens only
        weight: torch.Tensor | None,  # [vocab, d]; None: `hidden` are the logits already, d = vocab
        bias: torch.Tensor | None,  # [vocab]
        targets: torch.Tensor,  # [n] int64
        token_weights: torch.Tensor,  # [n] fp32 (fp64 for an fp64 model)
        compute: TokenLosses,  # `by_kernel` or `by_pytorch`
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (the weighted sum of the losses, the unweighted loss of each token [n])."""
        n = hidden.shape[0]
        step = tokens_at_once(len(weight) if weight is not None else hidden.shape[1], hidden.device)
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        losses = torch.empty(n, dtype=wide, device=hidden.device)
        wants_grad = ctx.needs_input_grad[0]
        grad = torch.empty_like(hidden) if wants_grad else hidden.new_empty(0)
        for start in range(0, n, step):
            rows = slice(start, min(start + step, n))
            # no name for the logits here: PyTorch's way lets them go once it has them in fp32
            numbers = compute(
                hidden[rows].clone() if weight is None else torch.nn.functional.linear(hidden[rows], weight, bias),
                targets[rows],
                losses[rows],
                token_weights[rows] if wants_grad else None,
            )
            if numbers is None:
                continue
            if weight is None:
                grad[rows] = numbers
            else:
                torch.mm(numbers.to(weight.dtype), weight, out=grad[rows])
        ctx.save_for_backward(grad)
        ctx.mark_non_differentiable(losses)
        return (losses * token_weights).sum(), losses

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        (grad,) = ctx.saved_tensors
        return grad * grad_outputs[0].to(grad.dtype), None, None, None, None, None


def drawn_tokens(
    hidden: torch.Tensor,  # [n, d]
    weight: torch.Tensor | None,  # [vocab, d]; None: `hidden` are the logits already
    bias: torch.Tensor | None,  # [vocab]
    uniform: torch.Tensor,  # [n] fp64 in (0, 1)
) -> torch.Tensor:
    """Draw tokens [n] int64 from softmax(W h + b): the first whose cumulated probability exceeds `uniform`."""
    drawn = []
    step = tokens_at_once(len(weight) if weight is not None else hidden.shape[1], hidden.device)
    for rows, numbers in zip(hidden.split(step), uniform.split(step), strict=True):
        logits = rows if weight is None else torch.nn.functional.linear(rows, weight, bias)
        total = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(dim=1).cumsum(dim=1)
        # below 1, which some round to, and times the last sum, which rounding leaves a little beside 1
        below = numbers.to(total.dtype).clamp_(max=1 - torch.finfo(total.dtype).eps)
        wanted = below[:, None] * total[:, -1:]
        drawn.append(torch.searchsorted(total, wanted, right=True).squeeze(1).clamp_(max=total.shape[1] - 1))
    return torch.cat(drawn)


def by_kernel(
    logits: torch.Tensor, targets: torch.Tensor, losses: torch.Tensor, weights: torch.Tensor | None
) -> torch.Tensor | None:
    """Fill `losses` [m]; with `weights` [m] return d loss / d logits [m, vocab], which the logits become."""
    from influence_fast.kernels.token_loss import token_loss

    token_loss(logits, targets, losses, weights=weights)
    return None if weights is None else logits


def by_pytorch(
    logits: torch.Tensor, targets: torch.Tensor, losses: torch.Tensor, weights: torch.Tensor | None
) -> torch.Tensor | None:
    """Fill and return what `by_kernel` does, with PyTorch and in the dtype of the losses."""
    logits, target = logits.to(losses.dtype), targets[:, None]
    at_target = logits.gather(1, target)
    largest = logits.amax(dim=1, keepdim=True)
    numbers = logits.sub_(largest).exp_()
    total = numbers.sum(dim=1, keepdim=True)
    losses.copy_((total.log() + largest - at_target).squeeze(1))
    if weights is None:
        return None
    share = weights[:, None].to(numbers.dtype)  # some fp64 models give out fp32 logits
    return numbers.mul_(share / total).scatter_add_(1, target, -share)
