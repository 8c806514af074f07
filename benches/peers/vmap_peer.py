"""Naive per-example gradients: torch.func's vmap(grad) over padded batches, whole gradients kept in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from worker import (
    Method,
    Run,
    Scoring,
    TokenizedExample,
    Work,
    by_length,
    completion_loss,
    cosine_scores,
    dot_scores,
    load_model,
    main,
    padded,
    trainable,
)

TOKENS = 4096  # in a padded batch: vmap keeps every example's activations


def whole(scorer: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Callable[[Work], Scoring]:
    """vmap(grad) of the adapter's factors, inner products of whole gradients."""

    def prepare(work: Work) -> Scoring:
        model = load_model(work)
        factors = {name: p.detach() for name, p in trainable(model).items()}

        def loss(factors: dict[str, torch.Tensor], ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            # a mask made ready keeps transformers from looking at values, which vmap forbids; padding is on the
            # right and carries no loss, so causal attention needs none; the flash kernel has no batching rule
            options = {"attention_mask": {"full_attention": None}, "use_cache": False}
            with sdpa_kernel(SDPBackend.MATH):
                output = torch.func.functional_call(model, factors, kwargs={"input_ids": ids[None], **options})
            return completion_loss(output.logits[0], labels)

        gradient = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))

        def rows_of(examples: Sequence[TokenizedExample]) -> torch.Tensor:
            rows = torch.empty(len(examples), sum(p.numel() for p in factors.values()))
            for places in by_length(examples, TOKENS):
                found = gradient(factors, *padded([examples[i] for i in places]))
                rows[places] = torch.cat([g.flatten(1) for g in found.values()], dim=1)
            return rows

        def score(work: Work, run: Run) -> torch.Tensor:
            with run.stage("gradients"):
                rows, queries = rows_of(work.pool), rows_of(work.queries)
            run.keeps(rows)
            with run.stage("scoring"):
                return scorer(rows, queries)

        return score

    return prepare


METHODS = {
    "dot": Method(whole(dot_scores), "dot", "vmap(grad), whole gradients"),
    "cosine": Method(whole(cosine_scores), "cosine", "vmap(grad), whole gradients"),
}

if __name__ == "__main__":
    main("vmap", METHODS)
