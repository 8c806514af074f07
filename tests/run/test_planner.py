"""The planner: what fits the budget, best expected fidelity first, with costs from this model and this data."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from influence_fast.errors import ConfigError, DataError
from influence_fast.gradients.rows.row_spec import RowSpec
from influence_fast.influence.building import build_store
from influence_fast.influence.methods import Method
from influence_fast.run import planner


def row(cost: float, lds: float, **settings: Any) -> dict[str, Any]:
    found = {"lds": lds, "low": lds - 0.1, "high": lds + 0.1, "agreement": 0.9}
    settings = dataclasses.asdict(Method(**{"fisher": "data", **settings}))
    return {"settings": settings, "cost": cost, "worlds": {"demo": found, "other": found}}


@pytest.fixture(autouse=True)
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    rows = [
        row(1.0, 0.30, name="best", dim=8),
        row(0.5, 0.20, name="cheap", dim=8, tokens=0.5),
        row(0.9, 0.25, name="small", dim=8, store_dtype="int8"),
    ]
    (tmp_path / "fidelity.json").write_text(json.dumps({"rows": rows}))
    monkeypatch.setattr(planner, "TABLE", tmp_path / "fidelity.json")
    planner.fidelity_table.cache_clear()
    yield
    planner.fidelity_table.cache_clear()


def examples(n: int = 12) -> list[dict[str, Any]]:
    ids = torch.arange(1, 11)
    return [{"id": f"e{i}", "input_ids": ids, "labels": ids} for i in range(n)]


def names(proposals: list[planner.Proposal]) -> list[str]:
    return [proposal.method.name for proposal in proposals]


def test_without_a_budget_the_best_comes_first(tiny_lora: Any) -> None:
    proposals = planner.plan(tiny_lora(), examples(), tokens_per_second=60)
    assert names(proposals) == ["best", "small", "cheap"]
    assert [p.seconds for p in proposals] == pytest.approx([2.0, 1.8, 1.0])
    assert proposals[0].lds["demo"] == pytest.approx((0.3, 0.2, 0.4))


def test_what_is_fitted_beside_the_pool_is_counted_once(
    tiny_lora: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On labels that the model draws for 6 of 12 examples, which takes a third more than a gradient."""
    (tmp_path / "more.json").write_text(
        json.dumps({"rows": [row(1.0, 0.3, name="drawn", dim=8, fisher="model", fisher_examples=6),
                             row(1.0, 0.3, name="cosine", dim=8, preconditioner="cosine", fisher="model"),
                             row(1.0, 0.3, name="plain", dim=8)]})
    )  # fmt: skip
    monkeypatch.setattr(planner, "TABLE", tmp_path / "more.json")
    planner.fidelity_table.cache_clear()
    found = {p.method.name: p for p in planner.plan(tiny_lora(), examples(), tokens_per_second=60)}
    assert found["cosine"].seconds == found["plain"].seconds == pytest.approx(2.0)
    assert found["drawn"].seconds == pytest.approx(2.0 + 2.0 * 6 / 12 * 4 / 3)
    # bf16 rows, and half as many in fp32
    assert found["drawn"].bytes == 2 * found["plain"].bytes


def test_a_budget_leaves_what_fits(tiny_lora: Any) -> None:
    assert names(planner.plan(tiny_lora(), examples(), seconds=1.9, tokens_per_second=60)) == ["small", "cheap"]
    whole = planner.plan(tiny_lora(), examples(), tokens_per_second=60)[0].bytes
    assert names(planner.plan(tiny_lora(), examples(), bytes=whole - 1, tokens_per_second=60)) == ["small"]


def test_the_bytes_are_those_of_the_store(tiny_lora: Any, tmp_path: Path) -> None:
    model = tiny_lora()
    for proposal in planner.plan(model, examples(), tokens_per_second=60):
        path = tmp_path / proposal.method.name
        build_store(
            path,
            model,
            examples(),
            RowSpec.of(proposal.method.gradients().projection(), dtype=proposal.method.store_dtype),
        )
        stored = sum(f.stat().st_size for kind in ("rows-*", "scales-*") for f in path.glob(kind))
        assert proposal.bytes <= stored <= proposal.bytes + 256  # files are padded to 64 bytes


def test_the_rate_is_measured_where_none_is_given(tiny_lora: Any) -> None:
    model = tiny_lora()
    assert planner.measure(model, examples()) > 0
    assert planner.plan(model, examples())[0].seconds > 0
    assert "best" in planner.describe(planner.plan(model, examples()))


def test_a_budget_that_nothing_fits_says_what_would(tiny_lora: Any) -> None:
    with pytest.raises(ConfigError, match="the fastest way takes about 1 s"):
        planner.plan(tiny_lora(), examples(), seconds=0.5, tokens_per_second=60)
    with pytest.raises(DataError, match="no examples to plan for"):
        planner.plan(tiny_lora(), [])
