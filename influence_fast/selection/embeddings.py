"""Representation-based selection: RDS+, the baseline that influence has to beat.

Ivison et al., "Large-Scale Data Selection for Instruction Tuning" (2025): an example is the mean of its last hidden
states under the pretrained model, later tokens weighing more; the queries take examples by turns, each its most
similar one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from influence_fast.data.packing import Pack, example_name, pack_examples
from influence_fast.errors import DataError, NumericError, truncated_list
from influence_fast.gradients.model.pack_isolation import Separation
from influence_fast.gradients.model.referee import Referee, call, decoder_of
from influence_fast.gradients.per_example import DEFAULT_MAX_TOKENS

_AHEAD = 1024  # wishes looked at in one step


@torch.no_grad()
def example_embeddings(
    model: nn.Module, examples: Sequence[Mapping[str, Any]], max_tokens: int | None = None
) -> torch.Tensor:
    """Return the position-weighted mean of each example's last hidden states: `sum_t t h_t / sum_t t`, t = 1, 2, ...

    Args:
        model: a causal LM that transformers can run; of a peft model the adapter counts unless it is disabled.
        examples: `{"input_ids", "labels"}`, as `tokenize` makes them; prompt and completion both count.
        max_tokens: tokens in one packed batch; changes speed and memory, not the numbers.

    Returns:
        (E, d) fp32 on the CPU (fp64 for an fp64 model).

    Raises:
        NumericError: an embedding is NaN or infinite; the message names the examples.
    """
    wrapped: Any = model
    base = wrapped.get_base_model() if hasattr(model, "get_base_model") else wrapped
    decoder = decoder_of(base)
    parameter = next(base.parameters())
    wide = torch.float64 if parameter.dtype == torch.float64 else torch.float32
    rows: list[torch.Tensor | None] = [None] * len(examples)
    was_training = model.training
    model.eval()
    try:
        with Referee(base, decoder, parameter.device).settled(False) as found:
            if not found.packs_pay:
                max_tokens = 1  # one example a pack: in this model they would see each other
            for pack in pack_examples(examples, max_tokens or DEFAULT_MAX_TOKENS.get(parameter.device.type, 4096)):
                hidden = _hidden_states(decoder, pack, parameter.device, found).to(wide)  # [T, d]
                weights = (pack.position_ids + 1).to(hidden)
                parts = zip(pack.indices, hidden.split(pack.lengths), weights.split(pack.lengths), strict=True)
                for index, states, weight in parts:
                    rows[index] = (weight @ states / weight.sum()).cpu()
    finally:
        model.train(was_training)
    out = torch.stack([row for row in rows if row is not None])
    bad = out.isfinite().all(dim=1).logical_not().nonzero().flatten().tolist()
    if bad:
        names = truncated_list(example_name(examples[i], i) for i in bad)
        raise NumericError(f"the embedding is NaN or infinite for {names}: run the model in float32")
    return out


def cosine_similarity(rows: torch.Tensor, queries: torch.Tensor) -> np.ndarray:
    """Return [E, Q] cosines of rows [E, d] with queries [Q, d]; 0 for a row of zeros."""
    return (nn.functional.normalize(rows, dim=1) @ nn.functional.normalize(queries, dim=1).T).numpy()


def round_robin_order(similarity: np.ndarray, *, seed: int = 0) -> np.ndarray:
    """Return (E,) float64: when each example is taken, 1 = first.

    `similarity` [E, Q]: the queries take turns, and each takes its most similar example that nobody has yet. Equal
    similarities fall by a seeded shuffle, not by the examples' order.

    Raises DataError for no examples or no queries.
    """
    if similarity.ndim != 2 or 0 in similarity.shape:
        raise DataError(f"no examples or no queries to take them: similarity has shape {similarity.shape}")
    total, queries = similarity.shape
    shuffle = np.random.default_rng(seed).permutation(total)
    wishes = np.empty((queries, total), dtype=np.int32)  # best first
    for query in range(queries):
        wishes[query] = shuffle[np.argsort(-similarity[shuffle, query], kind="stable")]
    order = np.zeros(total, dtype=np.float64)
    taken = np.zeros(total, dtype=bool)
    following = [0] * queries
    for turn in range(total):
        query = turn % queries
        first = following[query]
        while True:
            ahead = taken[wishes[query, first : first + _AHEAD]]
            free = int(ahead.argmin())  # the first that is False, if any is
            if not ahead[free]:
                break
            first += len(ahead)
        example = wishes[query, first + free]
        taken[example], order[example] = True, turn + 1
        following[query] = first + free + 1
    return order


def embedding_ranks(
    model: nn.Module, examples: Sequence[Mapping[str, Any]], queries: Sequence[Mapping[str, Any]]
) -> np.ndarray:
    """Return (E,) float64: the `round_robin_order` of tokenized `examples` by tokenized `queries`.

    The embeddings are the pretrained model's: an adapter on `model` is switched off for them.
    """
    with pretrained(model):
        rows, asked = example_embeddings(model, examples), example_embeddings(model, queries)
    return round_robin_order(cosine_similarity(rows, asked))


def pretrained(model: Any) -> contextlib.AbstractContextManager[Any]:
    """Disable the adapter of `model` while the block runs, where it has one."""
    return model.disable_adapter() if hasattr(model, "disable_adapter") else contextlib.nullcontext()


def _hidden_states(decoder: Any, pack: Pack, device: torch.device, mode: Separation) -> torch.Tensor:
    """Return [T, d]: the decoder's last hidden states, after its final norm."""
    hidden: torch.Tensor = call(decoder, decoder.config, pack, device, mode).last_hidden_state[0]
    return hidden
