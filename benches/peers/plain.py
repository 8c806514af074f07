"""A plain LoRA forward and backward over pool and queries, in padded batches by length: what the rest is measured by.

The token budget of a batch is the fastest of `BUDGETS` over a few examples, tried before anything is timed.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from worker import Method, Run, Scoring, TokenizedExample, Work, by_length, load_model, main, padded

BUDGETS = (1024, 2048, 4096)


def forward_backward(work: Work) -> Scoring:
    """peft's model and transformers' own loss; gradients accumulate, as in training."""
    model = load_model(work)

    def step(examples: Sequence[TokenizedExample], budget: int) -> None:
        for places in by_length(examples, budget):
            batch = [examples[i] for i in places]
            ids, labels = padded(batch)
            mask = (ids != 0).long()
            for row, e in zip(mask, batch, strict=True):
                row[: len(e["input_ids"])] = 1
            model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss.backward()

    def seconds(budget: int) -> float:
        sample = work.pool[: 40 if len(work.pool) > 40 else 2]
        start = time.perf_counter()
        step(sample, budget)
        return time.perf_counter() - start

    step(work.pool[:2], BUDGETS[0])
    budget = min(BUDGETS, key=seconds)

    def score(work: Work, run: Run) -> None:
        with run.stage("gradients"):
            step([*work.pool, *work.queries], budget)
        model.zero_grad(set_to_none=True)
        run.notes.append(f"padded batches of {budget} tokens")

    return score


METHODS = {"step": Method(forward_backward, "none", "plain peft forward and backward")}

if __name__ == "__main__":
    main("plain", METHODS)
