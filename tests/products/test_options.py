"""The rarer choices of `inner_products` in one value, and their old keywords."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

import influence_fast as inf
import influence_fast.errors

ROWS, QUERIES = np.eye(3, dtype=np.float32), np.arange(6, dtype=np.float32).reshape(2, 3)


def test_moved_keywords_work_with_one_warning_at_the_call() -> None:
    out = np.empty((3, 2), np.float32)
    with pytest.warns(DeprecationWarning, match=r"call inner_products\(..., options=ProductOptions") as said:
        found = inf.inner_products(ROWS, QUERIES, out=out, threads=1)
    assert [warning.filename for warning in said] == [__file__]
    assert found is out
    np.testing.assert_array_equal(out, QUERIES.T)


def test_a_moved_keyword_overrides_the_same_option() -> None:
    with (
        pytest.warns(DeprecationWarning, match="ProductOptions"),
        pytest.raises(inf.errors.ConfigError, match="'cray' is not available"),
    ):
        inf.inner_products(ROWS, QUERIES, options=inf.ProductOptions(isa="torch"), isa="cray")


def test_options_give_no_warning_and_take_effect() -> None:
    out = np.empty((3, 2), np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        options = inf.ProductOptions(out=out, threads=1, precision="high", device="cpu")
        assert inf.inner_products(ROWS, QUERIES, options=options) is out
    with pytest.raises(inf.errors.DataError, match="unknown precision 'low'"):
        inf.inner_products(ROWS, QUERIES, options=inf.ProductOptions(precision="low"))


def test_misspelt_keywords_are_type_errors() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'thread'"):
        inf.inner_products(ROWS, QUERIES, thread=1)  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="unexpected keyword argument 'thread'"):
        inf.ProductOptions(thread=1)  # type: ignore[call-arg]
