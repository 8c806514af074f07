"""Labels drawn from the model itself, whose gradients' second moments are its Fisher information.

    F = E over examples, and over labels c ~ p(. | x) of the model, of grad log p(c | x) grad log p(c | x)^T

which is the Gauss-Newton matrix of its loss. With the data's own labels in their place it is the *empirical* Fisher,
which is another matrix wherever the model does not fit its data (Kunstner et al. 2019, arXiv 1905.12558; Martens 2020,
arXiv 1412.1193). Against retraining, scores by the former did better on real solutions, `fisher` by far; on the demo's,
`fisher` did better, `ekfac` as well and a fitted sketch worse (benches/results/proof-*.json).

The input is the data's: each completion token is drawn given the tokens before it, not the ones drawn before it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from influence_fast.data.held import Held, as_examples
from influence_fast.data.packing import IGNORED
from influence_fast.gradients.engine import LossEngine
from influence_fast.gradients.per_example import packs_for
from influence_fast.philox import key, philox4x32

_STREAM = 2  # the fourth word of the counter: 0 and 1 are the signs' and the SJLT's


def sample_labels(
    model: nn.Module,
    examples: Held,
    *,
    seed: int = 0,
    max_tokens: int | None = None,
    precision: str = "auto",
    heartbeat: Callable[[], None] = lambda: None,
) -> list[dict[str, Any]]:
    """Draw each label that counts from the model's prediction of that token.

    Args:
        model: a peft model, as for `per_example_gradients`.
        examples: `{"input_ids", "labels"}`, 1-D int tensors; what else they hold is kept.
        seed: with an example's tokens it decides the draws: not its neighbours, nor the device but for the rounding
            of probabilities.
        max_tokens, precision: as for `per_example_gradients`.
        heartbeat: is called after each batch.

    Returns:
        Copies with other `labels`, in the same order; one forward pass.

    Raises as `per_example_gradients`.
    """
    examples = as_examples(examples)
    with LossEngine(model, precision=precision) as engine:
        packs = packs_for(engine, examples, max_tokens)
        drawn = [dict(example) for example in examples]
        for pack in packs:
            uniform = [_uniform(seed, examples[i]) for i in pack.indices]
            made = engine.draw(pack, torch.cat(uniform)).cpu()
            heartbeat()
            for i, mine in zip(pack.indices, made.split([len(numbers) for numbers in uniform]), strict=True):
                labels = examples[i]["labels"].clone()
                labels[1:][labels[1:] != IGNORED] = mine.to(labels.dtype)
                drawn[i]["labels"] = labels
    return drawn


def _uniform(seed: int, example: Mapping[str, Any]) -> torch.Tensor:
    """Return uniform numbers [n] fp64 in (0, 1), one a label that counts."""
    name = hashlib.sha256(example["input_ids"].cpu().to(torch.int64).numpy().tobytes()).hexdigest()
    index = torch.arange(int((example["labels"][1:] != IGNORED).sum()))
    zero = torch.zeros_like(index)
    word = philox4x32((index, zero, zero, zero + _STREAM), key(seed, f"{name}/labels"))[0]
    return (word.double() + 0.5) / 2**32
