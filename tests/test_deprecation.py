"""Calls of the version before work once more, with one line that names the new call."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import influence_fast as inf
from influence_fast.distributed.builds import build_distributed
from influence_fast.distributed.processes import World
from influence_fast.errors import ConfigError
from influence_fast.gradients.per_example import iter_gradient_rows
from influence_fast.gradients.rows.projection import Projection
from influence_fast.influence.sketch_fitting import SketchFit, fit_projection
from influence_fast.store import shard_rows
from influence_fast.store.building import build_shards


@pytest.fixture(scope="module")
def model(tiny_lora: Callable[..., Any]) -> Any:
    return tiny_lora("qwen2")


def make_examples(n: int = 6) -> list[dict[str, Any]]:
    return [{"id": f"e{i}", "input_ids": torch.arange(5, 12 + i), "labels": torch.arange(5, 12 + i)} for i in range(n)]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


PROJECTION = Projection(dim=4, width=24)
SPEC = inf.RowSpec(dim=4, width=24, sketch="random", dtype="int8", loss_reduction="sum")
OLD: dict[str, Any] = {"projection": PROJECTION, "dtype": "int8", "loss_reduction": "sum", "shard_rows": 2}


def test_an_old_build_gives_the_same_bytes_and_warns_once(tmp_path: Path, model: Any) -> None:
    inf.build_store(tmp_path / "new", model, make_examples(), SPEC, options=inf.BuildOptions(shard_rows=2))
    with pytest.warns(DeprecationWarning, match=r"^build_store: .*; call build_store\(path, model, data, spec") as said:
        inf.build_store(tmp_path / "old", model, None, make_examples(), progress=False, **OLD)  # type: ignore[call-arg]
    assert len(said) == 1
    assert said[0].filename == __file__
    with pytest.warns(DeprecationWarning, match=r"DistributedOptions"):
        build_distributed(  # type: ignore[call-arg]
            tmp_path / "many", model, None, dataset=make_examples(), world=World(), metrics=False, **OLD
        )
    with pytest.warns(DeprecationWarning, match="build_shards"):
        writer = build_shards(tmp_path / "part", model, None, make_examples(), part=(0, 1), **OLD)  # type: ignore[call-arg]
    writer.finalize()
    assert files(tmp_path / "old") == files(tmp_path / "many") == files(tmp_path / "part") == files(tmp_path / "new")


def test_old_fits_rows_and_streams_are_the_same(model: Any) -> None:
    examples = make_examples()
    new = fit_projection(
        model, examples, inf.RowSpec(dim=4, width=24, sketch_examples=4), fit=SketchFit(damping=0.3, labels="data")
    )
    with pytest.warns(DeprecationWarning, match="SketchFit"):
        old = fit_projection(  # type: ignore[call-arg]
            model, examples, projection=PROJECTION, examples=4, damping=0.3, labels="data"
        )
    assert old == new
    with pytest.warns(DeprecationWarning, match="RowSpec"):
        rows = list(iter_gradient_rows(model, examples, projection=PROJECTION, loss_reduction="sum"))  # type: ignore[call-arg]
    for (_, one), (_, other) in zip(rows, iter_gradient_rows(model, examples, SPEC), strict=True):
        assert torch.equal(one, other)
    queries = inf.per_example_gradients(model, examples[:2], loss_reduction="sum")
    with pytest.warns(DeprecationWarning, match="RowSpec"):
        scores = inf.stream_influence(model, examples, queries, loss_reduction="sum")  # type: ignore[call-arg]
    assert torch.equal(
        scores, inf.stream_influence(model, examples, queries, inf.RowSpec("none", loss_reduction="sum"))
    )


def test_a_new_call_says_nothing(tmp_path: Path, model: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)
        store = inf.build_store(tmp_path / "s", model, make_examples(), SPEC)
    assert len(store) == 6


def test_a_misspelt_keyword_is_a_type_error(tmp_path: Path, model: Any) -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'tokeniser'"):
        inf.build_store(tmp_path / "s", model, [], SPEC, tokeniser=None)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="unexpected keyword argument 'shard_row'"):
        inf.build_store(tmp_path / "s", model, None, [], projection=None, shard_row=3)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="multiple values for argument 'model'"):
        inf.build_store(tmp_path / "s", model, None, [], projection=None, model=model)  # type: ignore[call-arg, misc]
    with pytest.raises(TypeError, match="takes 4 positional arguments but 5"):
        inf.build_store(tmp_path / "s", model, None, [], 1, projection=None)  # type: ignore[call-arg, misc, arg-type]
    with pytest.raises(TypeError, match="dataset"):
        inf.build_store(tmp_path / "s", model, None, projection=None)  # type: ignore[call-arg]


def test_the_signature_is_that_of_the_new_call() -> None:
    names = list(inspect.signature(inf.build_store).parameters)
    assert names == ["path", "model", "data", "spec", "tokenizer", "max_length", "truncate", "options"]


def test_a_source_of_loose_keywords_is_adapted(tmp_path: Path, model: Any) -> None:
    seen = []

    def old(model: Any, examples: Any, *, projection: Any, loss_reduction: str, max_tokens: int | None) -> Any:
        seen.append((projection, loss_reduction, max_tokens))
        return iter_gradient_rows(model, examples, inf.RowSpec.of(projection, loss_reduction=loss_reduction))

    def new(model: Any, examples: Any, spec: inf.RowSpec) -> Any:
        return iter_gradient_rows(model, examples, spec)

    assert shard_rows.called_with_spec(new) is new
    with pytest.warns(DeprecationWarning, match="a parameter `spec`"):
        store = inf.build_store(tmp_path / "old", model, make_examples(), SPEC, options=inf.BuildOptions(gradients=old))
    assert seen == [(PROJECTION, "sum", None)]
    other = inf.build_store(tmp_path / "new", model, make_examples(), SPEC, options=inf.BuildOptions(gradients=new))
    assert torch.equal(store.rows(), other.rows())


def test_streams_are_of_exact_rows_alone(model: Any) -> None:
    with pytest.raises(ConfigError, match="not of rows of kind 'one_sided'"):
        inf.stream_influence(model, make_examples(), torch.zeros(1, 3), SPEC)
