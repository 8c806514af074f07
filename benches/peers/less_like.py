"""A loop as LESS has it: batch size 1, backward, the flat gradient by a dense Rademacher matrix to 8192 numbers.

(Xia et al., "LESS: Selecting Influential Data for Targeted Instruction Tuning", ICML 2024.) Its own projector is for
CUDA and makes the matrix anew for every 16 gradients; drawing it is most of the price on a CPU, so here it is made
once for as many gradients as `HELD` numbers allow. No Adam moments and one checkpoint, as in every other row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from worker import (
    PROJECTION_WIDTH,
    Method,
    Run,
    Scoring,
    TokenizedExample,
    Work,
    cosine_scores,
    dot_scores,
    load_model,
    main,
    trainable,
)

HELD = 1 << 28  # numbers of gradients kept until they are projected: 1 GiB
BLOCK = 512  # numbers of a gradient projected at a time: half the time of 4096, whose signs leave the caches


def rademacher(gradients: torch.Tensor, width: int, seed: int) -> torch.Tensor:
    """[n, parameters] by a matrix of random signs [parameters, width], drawn block by block."""
    rng = np.random.Generator(np.random.Philox(seed))
    out = torch.zeros(len(gradients), width)
    for start in range(0, gradients.shape[1], BLOCK):
        block = gradients[:, start : start + BLOCK]
        bits = np.frombuffer(rng.bytes(block.shape[1] * width // 8), dtype=np.uint8)
        signs = torch.from_numpy(np.unpackbits(bits)).view(block.shape[1], width).to(torch.float32).mul_(2).sub_(1)
        out.addmm_(block, signs)
    return out / width**0.5


def loop(scorer: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Callable[[Work], Scoring]:
    """One example, one backward; projected rows kept; inner products."""

    def prepare(work: Work) -> Scoring:
        model = load_model(work)
        factors = list(trainable(model).values())
        parameters = sum(p.numel() for p in factors)

        def rows_of(examples: Sequence[TokenizedExample], seed: int) -> torch.Tensor:
            parts = []
            step = max(1, HELD // parameters)
            for start in range(0, len(examples), step):
                held = torch.empty(len(examples[start : start + step]), parameters)
                for row, e in zip(held, examples[start : start + step], strict=True):
                    model(input_ids=e["input_ids"][None], labels=e["labels"][None], use_cache=False).loss.backward()
                    torch.cat([p.grad.flatten() for p in factors], out=row)
                    model.zero_grad(set_to_none=True)
                parts.append(rademacher(held, PROJECTION_WIDTH, seed))
            return torch.cat(parts)

        def score(work: Work, run: Run) -> torch.Tensor:
            with run.stage("gradients"):
                # together, so that the matrix is drawn once
                rows, queries = rows_of([*work.pool, *work.queries], work.seed).split(
                    [len(work.pool), len(work.queries)]
                )
            run.keeps(rows)
            with run.stage("scoring"):
                return scorer(rows, queries)

        return score

    return prepare


METHODS = {
    "dot": Method(loop(dot_scores), "dot", f"batch size 1, Rademacher to {PROJECTION_WIDTH}"),
    "cosine": Method(loop(cosine_scores), "cosine", f"batch size 1, Rademacher to {PROJECTION_WIDTH}"),
}

if __name__ == "__main__":
    main("less_like", METHODS)
