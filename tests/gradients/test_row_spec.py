"""`RowSpec`: one frozen value that says how rows are made, checked when it is made."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import influence_fast as inf
from influence_fast.errors import ConfigError
from influence_fast.gradients.rows.eigen_sketch import EigenSketch
from influence_fast.gradients.rows.layout import LayoutEntry
from influence_fast.gradients.rows.projection import Projection
from influence_fast.gradients.rows.row_spec import ROW_DTYPES
from influence_fast.settings import from_dict, to_dict
from influence_fast.store.manifest import DTYPES


def a_sketch(projection: Projection) -> EigenSketch:
    layout = (LayoutEntry("layer", "A", (2, 3), 0),)
    bases = {(2, 3): (torch.eye(2)[None], torch.eye(3)[None])}
    return EigenSketch(projection, layout, bases, torch.arange(4), torch.ones(4))


def test_its_defaults_are_those_of_a_configuration() -> None:
    spec = inf.RowSpec()
    assert spec.projection() == Projection("one_sided", dim=64)
    assert (spec.dtype, spec.loss_reduction, spec.precision, spec.sketch) == ("bf16", "mean", "auto", "auto")


def test_it_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        inf.RowSpec().dim = 4  # type: ignore[misc]


def test_exact_rows_have_no_projection() -> None:
    assert inf.RowSpec("none").projection() is None
    assert inf.RowSpec("none", target="all-linear").projection() == Projection("none", target="all-linear")


@pytest.mark.parametrize(
    "projection",
    [
        None,
        Projection("one_sided", dim=8),
        Projection("kron", dim=4, width=32, layers=0.5, seed=3),
        Projection("sjlt", width=32),
        Projection("kron", dim=4, target=["q_proj", "v_proj"]),
        Projection("none", target="all-linear"),
    ],
)
def test_a_projection_goes_there_and_back(projection: Projection | None) -> None:
    spec = inf.RowSpec.of(projection, dtype="int8")
    assert spec.projection() == projection
    assert spec.dtype == "int8"
    assert hash(spec) == hash(inf.RowSpec.of(projection, dtype="int8"))


def test_a_fitted_sketch_is_in_the_projection() -> None:
    plain = Projection("one_sided", dim=3, width=4)
    spec = inf.RowSpec(dim=3, width=4, sketch=a_sketch(plain))
    projection = spec.projection()
    assert projection is not None
    assert projection.sketch == a_sketch(plain)
    assert inf.RowSpec.of(projection) == spec
    with pytest.raises(ConfigError, match="was fitted for"):
        inf.RowSpec(dim=3, width=5, sketch=a_sketch(plain))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "one-sided"}, "RowSpec.kind: unknown value 'one-sided'; did you mean 'one_sided'?"),
        ({"dtype": "int7"}, "RowSpec.dtype: unknown value 'int7'; did you mean 'int8'?"),
        ({"loss_reduction": "total"}, "RowSpec.loss_reduction: unknown value 'total'"),
        ({"precision": "fp4"}, "RowSpec.precision: unknown value 'fp4'; did you mean 'fp8'?"),
        ({"sketch": "eigne"}, "RowSpec.sketch: 'eigne' is no store's folder; did you mean 'eigen'?"),
        ({"sketch": 3}, "RowSpec.sketch is 3"),
        ({"sketch": "eigen"}, "RowSpec.sketch: a fitted sketch needs the width"),
        ({"sketch": "eigen", "kind": "sjlt", "width": 8}, "RowSpec.sketch: projection kind 'sjlt' is a random sketch"),
        ({"kind": "none", "width": 8}, "leave out RowSpec.width and RowSpec.layers"),
        ({"kind": "sjlt"}, "needs width="),
        ({"dim": 0}, "projection dim must be at least 1"),
        ({"dim": 1.5}, "projection dim must be an integer"),
        ({"layers": 0}, "projection layers is 0"),
        ({"max_tokens": 0}, "RowSpec.max_tokens is 0; it must be at least 1, or left out"),
        ({"sketch_examples": True}, "RowSpec.sketch_examples is True; it must be a whole number"),
    ],
)
def test_a_wrong_value_is_refused_at_once(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        inf.RowSpec(**values)


def test_a_folder_of_a_store_is_a_text(tmp_path: Path) -> None:
    assert inf.RowSpec(width=8, sketch=tmp_path).sketch == str(tmp_path)


def test_files_call_the_dtype_store_dtype() -> None:
    spec = inf.RowSpec(dtype="int8", target=("v_proj", "q_proj"))
    assert from_dict(inf.RowSpec, to_dict(spec)) == spec
    assert to_dict(spec)["store_dtype"] == "int8"
    with pytest.raises(ConfigError, match=r"^gradients\.store_dtype: unknown value 'int7'"):
        from_dict(inf.RowSpec, {"store_dtype": "int7"}, "gradients.")
    with pytest.raises(ConfigError, match=r"unknown key 'gradients\.dtype'"):
        from_dict(inf.RowSpec, {"dtype": "int8"}, "gradients.")


def test_specs_of_the_same_rows_are_equal() -> None:
    assert inf.RowSpec(max_tokens=64) == inf.RowSpec()
    assert inf.RowSpec(target=["v_proj", "q_proj"]) == inf.RowSpec("kron", target=("q_proj", "v_proj"))
    assert inf.RowSpec(dim=16) != inf.RowSpec()


def test_its_dtypes_are_those_of_stores() -> None:
    assert set(ROW_DTYPES) == set(DTYPES)
