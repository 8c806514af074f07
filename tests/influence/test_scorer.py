"""One fit for any number of questions: scores, the way back to exact gradients, and what lies beside a store."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import influence_fast as inf
from influence_fast.errors import ConfigError, DataError, StoreError
from influence_fast.gradients.rows.projection import Projection
from influence_fast.influence import preconditioners
from influence_fast.influence.fisher_rows import fisher_folders
from influence_fast.influence.preconditioners import PRECONDITIONERS
from influence_fast.influence.scorer import Scorer
from influence_fast.influence.scoring import influence_matrix, influence_scores, top_influences
from influence_fast.influence.sketch_fitting import fit_projection

GROUPS = {"correct": [0, 2], "incorrect": [1]}
PROJECTIONS = {
    "exact": None,
    "one_sided": Projection(dim=4),
    "kron": Projection("kron", dim=3),
    "top layer": Projection(dim=4, layers=0.5),
    "sketched at random": Projection(dim=4, width=50),
    "sjlt": Projection("sjlt", width=60),
    "rademacher": Projection("rademacher", width=60),
}


def make_examples(count: int, seed: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(0, 90, (4 + n % 5,), generator=generator) for n in range(count)]
    return [{"id": f"{seed}-{i}", "input_ids": row, "labels": row} for i, row in enumerate(ids)]


POOL, ASKED = make_examples(14, 0), make_examples(3, 1)


@pytest.fixture(scope="module")
def model(tiny_lora: Callable[..., Any]) -> Any:
    return tiny_lora()


@pytest.fixture(scope="module")
def stores(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[inf.Store, torch.Tensor]]:
    """`stores(name)`: a store of the pool and rows of the queries, under that one of `PROJECTIONS` or "fitted"."""
    folder, made = tmp_path_factory.mktemp("stores"), {}

    def of(name: str) -> tuple[inf.Store, torch.Tensor]:
        if name not in made:
            projection = PROJECTIONS.get(name)
            if name == "fitted":
                projection = fit_projection(model, POOL, inf.RowSpec(dim=4, width=30, sketch_examples=12))
            store = inf.build_store(folder / name, model, POOL, inf.RowSpec.of(projection, dtype="fp32"))
            made[name] = store, store.query_gradients(model, ASKED)
        return made[name]

    return of


# ---- one fit -------------------------------------------------------------------------------------------------------


def test_three_questions_of_one_store_are_one_fit(stores: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    fits, lengths = [], []
    whole, norms = preconditioners.fit, preconditioners.UnitNorm.row_norms
    monkeypatch.setattr(preconditioners, "fit", lambda *a, **k: fits.append(a[0]) or whole(*a, **k))
    monkeypatch.setattr(
        preconditioners.UnitNorm, "row_norms", lambda self, rows: lengths.append(len(rows)) or norms(self, rows)
    )
    store, queries = stores("one_sided")
    scorer = Scorer.fit(store, fisher="data")
    table, top, matrix = scorer.scores(queries, GROUPS), scorer.top(queries, 3), scorer.matrix(queries)
    assert fits == ["ekfac_cosine"]
    assert sum(lengths) == len(store)
    np.testing.assert_allclose(table["s_correct"], matrix[:, [0, 2]].mean(axis=1), rtol=1e-5)
    np.testing.assert_array_equal(top.raising[1][:, 0], matrix.argmax(axis=0))


@pytest.mark.parametrize("name", sorted(PRECONDITIONERS))
def test_the_deprecated_calls_give_equal_bits(stores: Callable[..., Any], name: str) -> None:
    store, queries = stores("one_sided")
    scorer = Scorer.fit(store, preconditioner=name, fisher="data")
    with pytest.warns(DeprecationWarning, match=r"use inf.Scorer.fit\(store, ...\).scores") as said:
        table = influence_scores(store, queries, GROUPS, preconditioner=name)
    assert len(said) == 1
    assert said[0].filename == __file__
    for column, values in scorer.scores(queries, GROUPS).columns.items():
        np.testing.assert_array_equal(table[column], values)
    with pytest.warns(DeprecationWarning, match=r"Scorer.fit\(store, ...\).matrix"):
        np.testing.assert_array_equal(influence_matrix(store, queries, preconditioner=name), scorer.matrix(queries))
    with pytest.warns(DeprecationWarning, match=r"Scorer.fit\(store, ...\).top"):
        top = top_influences(store, queries, 2, preconditioner=name)
    np.testing.assert_array_equal(top.lowering[0], scorer.top(queries, 2).lowering[0])


@pytest.mark.parametrize("name", sorted(PRECONDITIONERS))
def test_self_influence_is_the_diagonal_of_the_matrix(stores: Callable[..., Any], name: str) -> None:
    store, _ = stores("one_sided")
    scorer = Scorer.fit(store, preconditioner=name, fisher="data")
    found = scorer.self_influence()
    np.testing.assert_allclose(found, np.diag(scorer.matrix(store.rows())), rtol=2e-4)
    if name.endswith("cosine"):
        np.testing.assert_allclose(found, 1, rtol=1e-5)


# ---- the way back --------------------------------------------------------------------------------------------------


def streamed(model: Any, scorer: Scorer, queries: torch.Tensor) -> np.ndarray:
    found = inf.stream_influence(model, POOL, scorer.apply(queries)).double().numpy()
    return found if scorer.lengths is None else found / scorer.lengths[:, None]


def error(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


@pytest.mark.parametrize("name", sorted(PRECONDITIONERS))
def test_streaming_what_apply_gives_makes_the_same_scores(stores: Callable[..., Any], model: Any, name: str) -> None:
    store, queries = stores("one_sided")
    scorer = Scorer.fit(store, preconditioner=name, fisher="data", model=model)
    assert error(streamed(model, scorer, queries), scorer.matrix(queries)) < 1e-4


@pytest.mark.parametrize("rows", [*PROJECTIONS, "fitted"])
def test_every_projection_has_a_way_back(stores: Callable[..., Any], model: Any, rows: str) -> None:
    store, queries = stores(rows)
    scorer = Scorer.fit(store, fisher="data", model=model)
    assert error(streamed(model, scorer, queries), scorer.matrix(queries)) < 1e-4


def test_projected_rows_need_the_model_for_the_way_back(stores: Callable[..., Any], model: Any) -> None:
    store, queries = stores("one_sided")
    with pytest.raises(ConfigError, match=r"give Scorer.fit .* the model"):
        Scorer.fit(store, preconditioner="none").apply(queries)
    exact, queries = stores("exact")
    assert torch.equal(Scorer.fit(exact, preconditioner="none").apply(queries), queries)


# ---- what it is fitted on ------------------------------------------------------------------------------------------


def test_fisher_rows_are_made_kept_and_taken_again(stores: Callable[..., Any], model: Any, tmp_path: Path) -> None:
    store, queries = stores("one_sided")
    shutil.copytree(store.path, tmp_path / "s")
    store = inf.open_store(tmp_path / "s")
    with pytest.raises(ConfigError, match=r"give the model and the tokenized examples .*fisher='data'"):
        Scorer.fit(store)
    with pytest.raises(ConfigError, match="another process built: give the model and the tokenized examples"):
        Scorer.fit(store, model=model)
    first = Scorer.fit(store, model=model, examples=POOL, fisher_examples=9)
    (folder,) = fisher_folders(store.path)
    rows = inf.open_store(folder)
    assert len(rows) == 9
    given = Scorer.fit(store, fisher=rows)
    np.testing.assert_array_equal(first.matrix(queries), given.matrix(queries))
    again = Scorer.fit(store, fisher_examples=9)  # neither the model nor the examples are needed any more
    np.testing.assert_array_equal(first.matrix(queries), again.matrix(queries))
    assert not np.allclose(first.matrix(queries), Scorer.fit(store, fisher="data").matrix(queries), rtol=1e-2)
    with pytest.raises(DataError, match="not among the examples"):
        Scorer.fit(store, model=model, examples=POOL[1:], fisher_examples=9)


def test_a_store_of_this_process_knows_what_it_was_built_of(
    tiny_lora: Callable[..., Any], tiny_tokenizer: Callable[..., Any], tmp_path: Path
) -> None:
    model, tokenizer = tiny_lora(), tiny_tokenizer()
    texts = [inf.Example(id=f"t{i}", prompt=f"{i} + 1 =", completion=f" {i + 1}") for i in range(6)]
    store = inf.build_store(tmp_path / "s", model, texts, inf.RowSpec(dim=4), tokenizer=tokenizer)
    queries = store.query_gradients(model, inf.tokenize(texts[:2], tokenizer).examples)
    scorer = inf.Scorer.fit(store, preconditioner="ekfac", model=model)
    shutil.rmtree(fisher_folders(store.path)[0])
    told = Scorer.fit(store, preconditioner="ekfac", model=model, examples=inf.tokenize(texts, tokenizer).examples)
    np.testing.assert_array_equal(scorer.matrix(queries), told.matrix(queries))


def test_what_reads_no_fisher_information_asks_for_none(stores: Callable[..., Any]) -> None:
    for name in ("one_sided", "fitted", "sjlt"):
        store, _ = stores(name)
        preconditioner = "default" if name != "one_sided" else "adam"
        assert Scorer.fit(store, preconditioner=preconditioner).recipe.reads_fisher is False


# ---- files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "damping"), [*((name, 0.3) for name in sorted(PRECONDITIONERS)), ("ekfac", "auto")])
def test_a_saved_scorer_gives_equal_bits(
    stores: Callable[..., Any], tmp_path: Path, name: str, damping: float | str
) -> None:
    store, queries = stores("one_sided")
    scorer = Scorer.fit(store, preconditioner=name, damping=damping, fisher="data")
    scorer.save(tmp_path)
    found = Scorer.load(tmp_path, preconditioner=name, damping=damping, fisher="data")
    assert found.recipe.name == name
    np.testing.assert_array_equal(found.matrix(queries), scorer.matrix(queries))
    np.testing.assert_array_equal(found.self_influence(), scorer.self_influence())


def test_a_scorer_lies_beside_its_store_and_keeps_the_way_back(
    stores: Callable[..., Any], model: Any, tmp_path: Path
) -> None:
    store, queries = stores("fitted")
    shutil.copytree(store.path, tmp_path / "s")
    store = inf.open_store(tmp_path / "s")
    scorer = Scorer.fit(store, model=model)
    assert scorer.save() == tmp_path / "s.scorer"
    for source in (store, store.path, tmp_path / "s.scorer"):
        found = Scorer.load(source)
        assert torch.equal(found.apply(queries), scorer.apply(queries))
    wanted = scorer.matrix(queries)
    (tmp_path / "s").rename(tmp_path / "elsewhere")
    with pytest.raises(StoreError, match="which is not there"):
        Scorer.load(tmp_path / "s.scorer")
    moved = Scorer.load(tmp_path / "s.scorer", store=inf.open_store(tmp_path / "elsewhere"), model=model)
    np.testing.assert_array_equal(moved.matrix(queries), wanted)


def test_a_scorer_of_something_else_is_refused(
    stores: Callable[..., Any], tiny_lora: Callable[..., Any], tmp_path: Path
) -> None:
    store, _ = stores("one_sided")
    other, _ = stores("kron")
    Scorer.fit(store, preconditioner="ekfac", fisher="data").save(tmp_path)
    with pytest.raises(StoreError, match="fitted for another store"):
        Scorer.load(tmp_path, store=other)
    with pytest.raises(StoreError, match="made with another adapter"):
        Scorer.load(tmp_path, model=tiny_lora(seed=0, r=3))
    for settings in (
        {"preconditioner": "fisher"},
        {"preconditioner": "default"},
        {"damping": 0.2},
        {"fisher": "model"},
    ):
        with pytest.raises(StoreError, match=f"was fitted with {next(iter(settings))} "):
            Scorer.load(tmp_path, **settings)
    with pytest.raises(StoreError, match="there is no scorer"):
        Scorer.load(store)
    file = tmp_path / "scorer.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    with pytest.raises(StoreError, match="checksum differs"):
        Scorer.load(tmp_path)
    file.write_bytes(content[:40])
    with pytest.raises(StoreError, match="is damaged"):
        Scorer.load(tmp_path)


def test_what_is_fitted_on_is_found_again(stores: Callable[..., Any], tmp_path: Path) -> None:
    """`datainf` goes over the rows once more for every question."""
    store, queries = stores("one_sided")
    shutil.copytree(store.path, tmp_path / "fisher")
    fisher = inf.open_store(tmp_path / "fisher")
    scorer = Scorer.fit(store, preconditioner="datainf", fisher=fisher)
    scorer.save(tmp_path / "scorer")
    found = Scorer.load(tmp_path / "scorer")
    np.testing.assert_array_equal(found.matrix(queries), scorer.matrix(queries))
    with pytest.raises(StoreError, match="was fitted with fisher 'a store'"):
        Scorer.load(tmp_path / "scorer", fisher="data")


def test_fitting_says_nothing_by_itself(stores: Callable[..., Any]) -> None:
    store, queries = stores("one_sided")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Scorer.fit(store, fisher="data").scores(queries, GROUPS)
