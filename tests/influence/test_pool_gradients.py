"""Rows of a pool and of its queries, as `score` and `validate` make them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import influence_fast as inf
from influence_fast.errors import StoreError
from influence_fast.gradients.rows.projection import Projection
from influence_fast.gradients.rows.row_spec import RowSpec
from influence_fast.influence.pool_gradients import pool_gradients
from influence_fast.influence.scorer import Scorer
from influence_fast.influence.settings import InfluenceConfig
from influence_fast.store.queries import query_gradients


def make_examples(count: int, seed: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(0, 90, (n,), generator=generator) for n in range(4, 4 + count)]
    return [{"id": f"{seed}-{i}", "input_ids": row, "labels": row} for i, row in enumerate(ids)]


@pytest.mark.parametrize("kind", ["none", "one_sided"])
def test_the_store_and_the_queries_have_rows_of_one_projection(
    tiny_lora: Callable[..., Any], tmp_path: Path, kind: str
) -> None:
    model, pool, queries = tiny_lora(), make_examples(6, 0), make_examples(3, 1)
    settings = RowSpec(kind=kind, dim=4, dtype="fp32", loss_reduction="sum")
    seconds: dict[str, float] = {}
    influence = InfluenceConfig("none")
    made = pool_gradients(model, pool, queries, tmp_path / "store", settings, influence, seconds, progress=False)
    options = {"projection": None if kind == "none" else Projection(dim=4), "loss_reduction": "sum"}
    rows, asked = (inf.per_example_gradients(model, part, **options) for part in (pool, queries))
    assert torch.equal(made.store.rows(), rows)
    assert torch.equal(made.queries, asked)
    assert made.moments is None
    assert list(seconds) == ["training gradients", "query gradients"]
    scores = Scorer.fit(made.store, preconditioner=influence.preconditioner, fisher="data").matrix(made.queries)
    torch.testing.assert_close(torch.from_numpy(scores), rows @ asked.T, rtol=1e-5, atol=1e-6)


def test_a_sketch_is_fitted_once_and_kept_beside_the_rows(tiny_lora: Callable[..., Any], tmp_path: Path) -> None:
    model, pool, queries = tiny_lora(), make_examples(6, 0), make_examples(3, 1)
    settings, influence = RowSpec(dim=4, width=24, dtype="fp32"), InfluenceConfig("ekfac_cosine")
    first: dict[str, float] = {}
    made = pool_gradients(model, pool, queries, tmp_path / "store", settings, influence, first, progress=False)
    assert next(iter(first)) == "fitting the sketch"
    assert made.store.projection.sketch is not None
    assert made.queries.shape == (3, 24)
    again = pool_gradients(model, pool, queries, tmp_path / "store", settings, influence, {}, progress=False)
    assert torch.equal(again.store.rows(), made.store.rows())
    assert torch.equal(again.queries, made.queries)


def test_query_gradients_are_made_as_the_stores_rows_were(tiny_lora: Callable[..., Any], tmp_path: Path) -> None:
    model, pool, queries = tiny_lora(), make_examples(6, 0), make_examples(3, 1)
    settings = RowSpec(dim=4, width=24, dtype="fp32", loss_reduction="sum")
    influence = InfluenceConfig("ekfac_cosine")
    made = pool_gradients(model, pool, queries, tmp_path / "store", settings, influence, {}, progress=False)
    assert torch.equal(query_gradients(made.store, model, queries), made.queries)
    other = inf.per_example_gradients(model, queries, projection=Projection(dim=4, width=24))  # the sketch left out
    assert other.shape == made.queries.shape
    assert not torch.allclose(other, made.queries, rtol=0.1)
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "lora_B" in name).add_(0.1)
    with pytest.raises(StoreError, match="made with another adapter"):
        query_gradients(made.store, model, queries)
