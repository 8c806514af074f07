"""Embeddings against plain forwards in float64, and queries taking examples by turns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from influence_fast.errors import DataError, NumericError
from influence_fast.selection.embeddings import (
    cosine_similarity,
    embedding_ranks,
    example_embeddings,
    round_robin_order,
)


def ragged(lengths: list[int], seed: int = 0) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(0, 320, (n,), generator=generator) for n in lengths]
    return [{"id": f"e{i}", "input_ids": row, "labels": row.clone()} for i, row in enumerate(ids)]


def one_by_one(model: Any, examples: list[dict[str, Any]]) -> torch.Tensor:
    rows = []
    for example in examples:
        hidden = model(input_ids=example["input_ids"][None], output_hidden_states=True).hidden_states[-1][0]
        weights = torch.arange(1, len(hidden) + 1, dtype=torch.float64)
        rows.append((weights[:, None] * hidden.double()).sum(0) / weights.sum())
    return torch.stack(rows).detach()


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "llama"])
@pytest.mark.parametrize("max_tokens", [None, 40, 1])
def test_packed_embeddings_are_those_of_single_forwards(
    tiny_model: Callable[..., Any], kind: str, max_tokens: int | None
) -> None:
    model, examples = tiny_model(kind, torch.float64), ragged([7, 1, 33, 12, 2, 50, 19])
    before = model.config._attn_implementation
    ours = example_embeddings(model, examples, max_tokens)
    reference = one_by_one(model, examples)
    assert ours.dtype == torch.float64
    assert float(((ours - reference).norm(dim=1) / reference.norm(dim=1)).max()) < 1e-12
    assert model.config._attn_implementation == before


def test_a_model_with_a_mask_of_its_own_keeps_it() -> None:
    from benches.model_zoo import tiny

    for kind in ("gemma2", "roberta"):
        model, examples = tiny(kind), [{k: e[k] % 128 for k in ("input_ids", "labels")} for e in ragged([9, 20, 3])]
        torch.testing.assert_close(example_embeddings(model, examples), one_by_one(model, examples))


def test_fp32_rows_are_fp32(tiny_model: Callable[..., Any]) -> None:
    examples = ragged([5, 9])
    ours = example_embeddings(tiny_model(), examples)
    assert ours.dtype == torch.float32
    assert ours.shape == (2, 32)
    assert float((ours - one_by_one(tiny_model(dtype=torch.float64), examples)).norm()) < 1e-4


def test_ranks_are_the_pretrained_models(tiny_lora: Callable[..., Any], tiny_model: Callable[..., Any]) -> None:
    examples, queries = ragged([9, 14, 3, 21, 6]), ragged([8, 5], seed=1)
    adapted = tiny_lora(dtype=torch.float64)
    plain = tiny_model(dtype=torch.float64)
    assert float((example_embeddings(adapted, examples) - example_embeddings(plain, examples)).norm()) > 1e-3
    assert np.array_equal(embedding_ranks(adapted, examples, queries), embedding_ranks(plain, examples, queries))


def test_an_embedding_that_is_not_finite_is_named(tiny_model: Callable[..., Any]) -> None:
    model, examples = tiny_model(), ragged([4, 5])
    with torch.no_grad():
        model.get_input_embeddings().weight[examples[1]["input_ids"][0]] = torch.nan
    examples[0]["input_ids"][:] = examples[1]["input_ids"][0] + 1 if examples[1]["input_ids"][0] < 319 else 0
    with pytest.raises(NumericError, match=r"infinite for e1: "):
        example_embeddings(model, examples)


def by_hand(similarity: np.ndarray) -> list[int]:
    """The order of taking, by the definition: each query in turn, its best of what is left."""
    left, order = set(range(len(similarity))), []
    while left:
        query = len(order) % similarity.shape[1]
        best = max(left, key=lambda i: similarity[i, query])
        left.remove(best)
        order.append(best)
    return order


@pytest.mark.parametrize(("examples", "queries"), [(1, 1), (30, 1), (50, 7), (5, 9), (2500, 3)])
def test_queries_take_turns(examples: int, queries: int) -> None:
    similarity = np.random.default_rng(examples).standard_normal((examples, queries))
    ranks = round_robin_order(similarity)
    assert list(np.argsort(ranks)) == by_hand(similarity)
    assert sorted(ranks) == list(range(1, examples + 1))


def test_equal_similarities_do_not_fall_by_order() -> None:
    ranks = [round_robin_order(np.zeros((60, 2)), seed=seed) for seed in range(30)]
    assert np.array_equal(ranks[0], round_robin_order(np.zeros((60, 2)), seed=0))
    mean = np.mean(ranks, axis=0)
    assert mean.min() > 10
    assert mean.max() < 51


def test_cosines_and_empty_sides() -> None:
    rows, queries = torch.randn(6, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    expected = torch.nn.functional.cosine_similarity(rows[:, None], queries[None], dim=2)
    np.testing.assert_allclose(cosine_similarity(rows, queries), expected.numpy(), rtol=1e-12)
    with pytest.raises(DataError, match="no examples or no queries"):
        round_robin_order(np.zeros((3, 0)))
