"""A store is built by a `RowSpec`, and gives it back."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import influence_fast as inf
from influence_fast.errors import ConfigError, StoreError
from influence_fast.gradients.rows.eigen_sketch import EigenSketch
from influence_fast.influence.sketch_fitting import fit_projection
from influence_fast.store.building import build_shards
from influence_fast.store.importers import import_gradients
from influence_fast.store.merge import append_store
from influence_fast.store.queries import query_gradients


@pytest.fixture(scope="module")
def model(tiny_lora: Callable[..., Any]) -> Any:
    return tiny_lora("qwen2")


def make_examples(n: int = 8, start: int = 0) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(start)
    ids = [torch.randint(5, 300, (6 + i,), generator=generator) for i in range(n)]
    return [{"id": f"e{start + i}", "input_ids": row, "labels": row.clone()} for i, row in enumerate(ids)]


@pytest.mark.parametrize(
    "spec",
    [
        inf.RowSpec(),
        inf.RowSpec("none", dtype="fp32", loss_reduction="sum"),
        inf.RowSpec("kron", dim=4, layers=0.5, seed=3, dtype="int8"),
        inf.RowSpec(dim=4, width=24, sketch="random", precision="fp8"),
        inf.RowSpec("sjlt", width=24),
    ],
    ids=lambda spec: f"{spec.kind}-{spec.width}",
)
def test_a_store_gives_back_its_spec(tmp_path: Path, model: Any, spec: inf.RowSpec) -> None:
    store = inf.build_store(tmp_path / "s", model, make_examples(), spec)
    assert store.spec == spec == inf.open_store(tmp_path / "s").spec
    again = inf.build_store(tmp_path / "again", model, make_examples(), store.spec)
    assert torch.equal(again.rows(), store.rows())


def test_rows_of_named_weights_give_back_their_spec(tmp_path: Path, tiny_model: Callable[..., Any]) -> None:
    spec = inf.RowSpec(dim=4, target=["v_proj", "q_proj"], dtype="fp32")
    assert inf.build_store(tmp_path / "s", tiny_model(), make_examples(3), spec).spec == spec


def test_a_store_of_another_tool_has_no_spec(tmp_path: Path) -> None:
    torch.save(torch.ones(3, 4), tmp_path / "all_orig.pt")
    store = import_gradients(tmp_path, tmp_path / "s", format="less")
    with pytest.raises(StoreError, match="does not record its projection"):
        store.spec  # noqa: B018


@pytest.mark.parametrize("sketch", ["auto", "eigen"])
def test_a_sketch_is_fitted_and_kept_and_used_again(tmp_path: Path, model: Any, sketch: str) -> None:
    spec = inf.RowSpec(dim=4, width=24, sketch=sketch, sketch_examples=6)
    store = inf.build_store(tmp_path / "s", model, make_examples(), spec)
    by_hand = fit_projection(model, make_examples(), spec)
    assert store.projection == by_hand
    assert isinstance(store.spec.sketch, EigenSketch)
    before = {path.name: path.read_bytes() for path in (tmp_path / "s").iterdir()}
    inf.build_store(tmp_path / "s", model, make_examples(), spec)  # finished: nothing is made anew
    assert {path.name: path.read_bytes() for path in (tmp_path / "s").iterdir()} == before
    more = inf.build_store(tmp_path / "more", model, make_examples(3, start=20), store.spec)
    lent = replace(spec, sketch=tmp_path / "s")
    assert inf.build_store(tmp_path / "lent", model, make_examples(3, start=20), lent).projection == more.projection
    assert len(append_store(tmp_path / "s", tmp_path / "more")) == 11


def test_an_interrupted_build_takes_the_sketch_that_was_fitted(
    tmp_path: Path, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, options = inf.RowSpec(dim=4, width=24, sketch_examples=6), inf.BuildOptions(shard_rows=2)
    whole = inf.build_store(tmp_path / "whole", model, make_examples(), spec, options=options)

    def stopped(model: Any, examples: Any, spec: inf.RowSpec) -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match="0 of 4 shards"):
        inf.build_store(tmp_path / "s", model, make_examples(), spec, options=replace(options, gradients=stopped))
    monkeypatch.setattr("influence_fast.influence.sketch_fitting.fit_ekfac", None)  # would be called to fit one
    assert torch.equal(
        inf.build_store(tmp_path / "s", model, make_examples(), spec, options=options).rows(), whole.rows()
    )


def test_auto_leaves_short_rows_as_they_are(tmp_path: Path, model: Any) -> None:
    store = inf.build_store(tmp_path / "s", model, make_examples(), inf.RowSpec(dim=4, width=10**6))
    assert store.spec == inf.RowSpec(dim=4)


def test_shards_want_a_sketch_that_is_there(tmp_path: Path, model: Any) -> None:
    spec = inf.RowSpec(dim=4, width=24, sketch_examples=6)
    with pytest.raises(ConfigError, match="'auto' is fitted before shards are built"):
        build_shards(tmp_path / "s", model, make_examples(), spec)
    settled = spec.with_projection(fit_projection(model, make_examples(), spec))
    build_shards(tmp_path / "s", model, make_examples(), settled).finalize()
    assert inf.open_store(tmp_path / "s").spec.sketch == settled.sketch
    with pytest.raises(ConfigError, match="build_shards"):
        inf.build_store(tmp_path / "t", model, make_examples(), options=inf.BuildOptions(part=(0, 2)))


def test_query_gradients_is_a_method_of_the_store(tmp_path: Path, model: Any) -> None:
    store = inf.build_store(tmp_path / "s", model, make_examples(), inf.RowSpec(dim=4, dtype="fp32"))
    asked = make_examples(2, start=40)
    assert torch.equal(store.query_gradients(model, asked), query_gradients(store, model, asked))


def test_a_store_that_knew_no_precision_has_a_spec(tmp_path: Path, model: Any) -> None:
    inf.build_store(tmp_path / "s", model, make_examples(), inf.RowSpec(dim=4))
    identity = json.loads((tmp_path / "s" / "manifest.json").read_text())["identity"]
    assert not {"precision", "projection_sketch", "projection_target"} & identity.keys()
