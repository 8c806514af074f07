"""What is given to a store, a scorer or a table by mistake is refused in one line, and not read as something else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import influence_fast as inf
from influence_fast.errors import ConfigError, DataError, ModelError
from influence_fast.gradients.rows.projection import Projection


def make_examples(count: int, seed: int = 0) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(0, 90, (4 + n % 5,), generator=generator) for n in range(count)]
    return [{"id": f"e{i}", "input_ids": row, "labels": row} for i, row in enumerate(ids)]


ROWS = make_examples(6)


@pytest.fixture(scope="module")
def model(tiny_lora: Callable[..., Any]) -> Any:
    return tiny_lora(num_hidden_layers=1)


@pytest.fixture(scope="module")
def store(model: Any, tmp_path_factory: pytest.TempPathFactory) -> inf.Store:
    return inf.build_store(tmp_path_factory.mktemp("s") / "s", model, ROWS, inf.RowSpec("none", dtype="fp32"))


@pytest.fixture(scope="module")
def scorer(store: inf.Store) -> inf.Scorer:
    return inf.Scorer.fit(store, preconditioner="none")


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"a": [True, False]}, "a mask of booleans"),  # once read as the queries 1 and 0
        ({"a": torch.tensor([False, True])}, "a mask of booleans"),
        ({"a": np.array([True, False])}, "a mask of booleans"),
        ({1: [0], "1": [1]}, "two groups are called '1'"),
        ({"a": 0}, "group 'a' is 0; give a list"),
        ({"a": slice(0, 2)}, "group 'a' is slice"),
        ({"a": "01"}, "group 'a' is '01'"),
    ],
)
def test_groups_that_are_no_lists_of_queries_are_named(scorer: inf.Scorer, groups: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        scorer.scores(torch.ones(2, scorer.store.width), groups)


def test_groups_of_any_whole_numbers_are_the_same(scorer: inf.Scorer) -> None:
    queries = scorer.store.rows([0, 1, 2])
    wanted = scorer.matrix(queries)[:, [0, 2]].mean(axis=1)
    for members in ([0, 2], (0, 2), {0, 2}, range(0, 3, 2), np.array([0, 2]), torch.tensor([0, 2]).int(), iter([0, 2])):
        table = scorer.scores(queries, {"a": members})  # type: ignore[dict-item]
        np.testing.assert_allclose(table["s_a"], wanted, rtol=1e-5)


def test_queries_that_are_no_rows_are_named(scorer: inf.Scorer) -> None:
    with pytest.raises(DataError, match="queries are None: give rows"):
        scorer.scores(None, {"a": [0]})  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"one row: give \[Q, k\]"):
        scorer.matrix(scorer.store[0])
    with pytest.raises(DataError, match="k is None"):
        scorer.top(scorer.store.rows([0]), k=None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"damping": True}, "damping must be above 0, not True"),
        ({"damping": float("inf")}, "damping must be above 0, not inf"),
        ({"damping": None}, "damping must be above 0, not None"),
        ({"fisher_examples": -3}, "fisher_examples is -3"),  # once all examples but three
        ({"fisher_examples": 2.5}, "fisher_examples is 2.5"),
        ({"moments": torch.ones(3)}, "moments are read by 'adam' and 'less'"),
    ],
)
def test_settings_of_a_fit_are_checked_before_it(store: inf.Store, settings: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        inf.Scorer.fit(store, preconditioner="fisher", **settings)


def test_examples_of_other_tokens_under_the_same_ids_are_refused(store: inf.Store, model: Any) -> None:
    with pytest.raises(DataError, match="built of other tokens"):
        inf.Scorer.fit(store, preconditioner="fisher", model=model, examples=make_examples(6, seed=1))
    by = {"preconditioner": "fisher", "model": model}
    one = inf.Scorer.fit(store, examples=ROWS, **by)
    other = inf.Scorer.fit(store, examples=ROWS[::-1], **by)  # the order is the store's
    np.testing.assert_array_equal(one.matrix(store.rows()), other.matrix(store.rows()))


def test_arguments_in_the_place_of_others_are_named(model: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"spec is a list, not a RowSpec: the order is \(path, model, data, spec"):
        inf.build_store(tmp_path / "s", model, None, ROWS)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"give RowSpec\.of"):
        inf.build_store(tmp_path / "s", model, ROWS, Projection(dim=4))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="options is a dict"):
        inf.build_store(tmp_path / "s", model, ROWS, options={"shard_rows": 4})  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="the model is a str"):
        inf.build_store(tmp_path / "s", "gpt2", ROWS)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="the model is a str"):
        inf.per_example_gradients("gpt2", ROWS)  # type: ignore[arg-type]
    for part in (3, (0,), ("a", "b")):
        with pytest.raises(ConfigError, match="part must be"):
            inf.BuildOptions(part=part)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"shard_rows must be a whole number of at least 1, not 2\.5"):
        inf.BuildOptions(shard_rows=2.5)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="layers is 'all'"):
        inf.RowSpec(layers="all")  # type: ignore[arg-type]


@pytest.mark.parametrize("length", [-1, 0, 1, "9", True])
def test_a_limit_that_would_cut_the_last_tokens_is_refused(model: Any, tmp_path: Path, length: Any) -> None:
    with pytest.raises(DataError, match=r"max_length is .*at least 2"):
        inf.build_store(tmp_path / "s", model, ROWS, inf.RowSpec(dim=4), max_length=length, truncate=True)


def test_ids_that_no_file_can_hold_are_refused(model: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="half a surrogate pair"):
        inf.build_store(tmp_path / "s", model, [{**ROWS[0], "id": "a\ud800"}], inf.RowSpec(dim=4))


def test_rows_of_a_store_by_an_array_of_ids(store: inf.Store) -> None:
    assert torch.equal(store[np.array(["e3", "e1"])], store.rows([3, 1]))


def test_streamed_queries_may_be_arrays_and_lists(model: Any, store: inf.Store) -> None:
    wanted = inf.stream_influence(model, ROWS, store.rows([0, 1]))
    for queries in (store.rows([0, 1]).numpy(), store.rows([0, 1]).tolist()):
        assert torch.equal(inf.stream_influence(model, ROWS, queries), wanted)


def test_rows_of_a_table_are_mappings_and_columns_can_be_asked_for() -> None:
    table = inf.ScoreTable(["a", "b"], {"s_x": np.array([1.0, 2.0])}, {"why": ["no", "yes"]})
    assert [dict(row) for row in table][1] == {"id": "b", "s_x": 2.0, "why": "yes"}
    assert [name in table for name in ("id", "s_x", "why", "s_y", "a")] == [True, True, True, False, False]
