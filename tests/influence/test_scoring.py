"""Scores from a store against float64 numpy: means, ranks, groups, preconditioners, and the statistics around them."""

from __future__ import annotations

import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from influence_fast.errors import ConfigError, DataError
from influence_fast.gradients.rows.projection import Projection
from influence_fast.gradients.rows.row_spec import RowSpec
from influence_fast.influence.building import build_store
from influence_fast.influence.row_access import blocks_of, factors_of
from influence_fast.influence.scorer import Scorer
from influence_fast.store.building import BuildOptions
from influence_fast.store.reader import Store

N, Q = 37, 6


@pytest.fixture
def exact(tiny_lora: Any) -> torch.Tensor:
    from influence_fast.gradients.rows.layout import layout_width
    from influence_fast.gradients.targets import gradient_layout

    width = layout_width(gradient_layout(tiny_lora(), Projection(dim=4)))
    generator = torch.Generator().manual_seed(0)
    return torch.randn(N + Q, width, generator=generator) * torch.logspace(-2, 2, width)


def store_of(path: Path, model: Any, exact: torch.Tensor, dtype: str = "fp32") -> Store:
    def rows(model: Any, examples: list[dict[str, Any]], spec: RowSpec) -> Any:
        yield list(range(len(examples))), torch.stack([exact[int(e["id"][1:])] for e in examples])

    ids = torch.tensor([1, 2, 3])
    examples = [{"id": f"d{i}", "input_ids": ids, "labels": ids} for i in range(N)]
    options = BuildOptions(shard_rows=10, gradients=rows)
    return build_store(path, model, examples, RowSpec(dim=4, dtype=dtype), options=options)


@pytest.fixture
def store(tmp_path: Path, tiny_lora: Any, exact: torch.Tensor) -> Store:
    return store_of(tmp_path / "store", tiny_lora(), exact)


GROUPS = {"correct": [0, 2, 5], "incorrect": [1, 2]}


@pytest.mark.parametrize("name", ["none", "cosine", "fisher"])
def test_scores_agree_with_float64(store: Store, exact: torch.Tensor, name: str) -> None:
    rows, queries = exact[:N].double().numpy(), exact[N:].double().numpy()
    if name == "fisher":
        for start, end in blocks_of(store):
            block = rows[:, start:end]
            fisher = block.T @ block / N
            fisher += 0.1 * np.trace(fisher) / (end - start) * np.eye(end - start)
            queries[:, start:end] = np.linalg.solve(fisher, queries[:, start:end].T).T
    if name == "cosine":
        rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        queries = queries / np.linalg.norm(queries, axis=1, keepdims=True)
    scores = rows @ queries.T
    table = Scorer.fit(store, preconditioner=name, fisher="data").scores(exact[N:], GROUPS)
    assert table.ids == [f"d{i}" for i in range(N)]
    for group, members in GROUPS.items():
        mean = scores[:, members].mean(axis=1)
        assert np.linalg.norm(table.columns[f"s_{group}"] - mean) < 1e-5 * np.linalg.norm(mean)
        np.testing.assert_array_equal(table.columns[f"rank_{group}"], stats.rankdata(table.columns[f"s_{group}"]))
        ranks = stats.rankdata(scores[:, members], axis=0).mean(axis=1)
        np.testing.assert_allclose(table.columns[f"mean_rank_{group}"], ranks, atol=1e-5)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("name", ["none", "cosine", "fisher_cosine", "ekfac_cosine", "less"])
def test_the_matrix_and_its_group_means_agree(
    tmp_path: Path, tiny_lora: Any, exact: torch.Tensor, dtype: str, name: str
) -> None:
    exact /= exact.norm(dim=0)  # four decades in one row are more than 8 bits can hold
    store = store_of(tmp_path / "store", tiny_lora(), exact, dtype)
    matrix = Scorer.fit(store, preconditioner=name, fisher="data").matrix(exact[N:])
    table = Scorer.fit(store, preconditioner=name, fisher="data").scores(exact[N:], GROUPS)
    for group, members in GROUPS.items():
        wanted = matrix[:, members].astype(np.float64).mean(axis=1)
        assert np.linalg.norm(table.columns[f"s_{group}"] - wanted) < 1e-5 * np.linalg.norm(wanted)
    if name != "none":
        assert 0.05 < np.abs(matrix).max() <= 1.01


@pytest.mark.parametrize("name", ["none", "cosine", "fisher_cosine", "ekfac_cosine"])
def test_top_influences_are_the_ends_of_the_matrix(store: Store, exact: torch.Tensor, name: str) -> None:
    matrix = Scorer.fit(store, preconditioner=name, fisher="data").matrix(exact[N:])
    order = np.argsort(matrix, axis=0)  # [N, Q], lowest first
    top = Scorer.fit(store, preconditioner=name, fisher="data").top(exact[N:], 5)
    for (values, rows), expected in ((top.raising, order[::-1][:5].T), (top.lowering, order[:5].T)):
        np.testing.assert_array_equal(rows, expected)
        np.testing.assert_allclose(values, np.take_along_axis(matrix.T, expected, axis=1), rtol=1e-5)
    scorer = Scorer.fit(store, preconditioner=name, fisher="data")
    table, again = scorer.scores(exact[N:], GROUPS), scorer.top(exact[N:], 5)
    alone = Scorer.fit(store, preconditioner=name, fisher="data").scores(exact[N:], GROUPS)
    for column, values in alone.columns.items():
        np.testing.assert_array_equal(table.columns[column], values)
    np.testing.assert_array_equal(again.lowering[1], top.lowering[1])
    assert Scorer.fit(store, preconditioner=name, fisher="data").top(exact[N:], 500).raising[0].shape == (Q, N)


def test_a_zero_row_scores_zero_in_every_metric(tmp_path: Path, tiny_lora: Any, exact: torch.Tensor) -> None:
    exact[3] = 0
    store = store_of(tmp_path / "store", tiny_lora(), exact)
    for name in ("fisher_cosine", "less"):
        matrix = Scorer.fit(store, preconditioner=name, fisher="data").matrix(exact[N:])
        assert (matrix[3] == 0).all()
        assert np.abs(matrix[4]).min() > 0


def test_blocks_are_the_modules(store: Store) -> None:
    blocks = blocks_of(store)
    assert blocks[0][0] == 0
    assert blocks[-1][1] == store.width
    assert all(end == start for (_, end), (start, _) in pairwise(blocks))
    assert len(blocks) == len({entry.module for entry in store.manifest.modules})


def test_an_empty_group_is_left_out(store: Store, exact: torch.Tensor) -> None:
    table = Scorer.fit(store, preconditioner="none").scores(exact[N:], {"correct": [], "incorrect": [1]})
    assert "s_correct" not in table.columns
    assert "s_incorrect" in table.columns
    with pytest.raises(DataError, match="every group is empty"):
        Scorer.fit(store, preconditioner="none").scores(exact[N:], {"correct": []})


def test_misfits_are_named(store: Store, exact: torch.Tensor) -> None:
    with pytest.raises(DataError, match="groups are named"):
        Scorer.fit(store, fisher="data").scores(exact[N:], [[0, 1]])  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="must be an open one"):
        Scorer.fit(str(store.path), fisher="data").scores(exact[N:], GROUPS)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="project them as the store was"):
        Scorer.fit(store, fisher="data").scores(exact[N:, :-1], GROUPS)
    with pytest.raises(ConfigError, match="did you mean 'fisher'"):
        Scorer.fit(store, preconditioner="fischer", fisher="data").scores(exact[N:], GROUPS)


def test_int8_rows_that_lose_factors_are_said_where_h_raises_them(tmp_path: Path, tiny_lora: Any, exact: Any) -> None:
    """`exact` goes from 0.01 to 100 along a row: 8 bits of the largest number leave nothing of the first factors."""
    coarse = store_of(tmp_path / "int8", tiny_lora(), exact, "int8")
    even = store_of(tmp_path / "even", tiny_lora(), exact / exact.std(dim=0), "int8")
    wide = store_of(tmp_path / "bf16", tiny_lora(), exact, "bf16")
    with pytest.warns(UserWarning, match=r"too few for \d+ of \d+ LoRA factors \(.*lora_A.*'ekfac_cosine' weighs all"):
        Scorer.fit(coarse, preconditioner="ekfac_cosine", fisher="data").scores(exact[N:], GROUPS)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        Scorer.fit(coarse, preconditioner="cosine").scores(exact[N:], GROUPS)
        Scorer.fit(even, preconditioner="ekfac_cosine", fisher="data").scores(exact[N:], GROUPS)
        Scorer.fit(wide, preconditioner="ekfac_cosine", fisher="data").scores(exact[N:], GROUPS)
        # the A of a new adapter, whose B is zero: nothing that 8 bits could lose
        fresh = exact / exact.std(dim=0)
        (first, *_) = factors_of(wide) or ()
        fresh[:, : first.shape[0] * first.shape[1]] = 0
        Scorer.fit(store_of(tmp_path / "fresh", tiny_lora(), fresh, "int8"), fisher="data").scores(fresh[N:], GROUPS)
