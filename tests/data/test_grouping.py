"""Groups of examples read from a column of their rows."""

from __future__ import annotations

import pytest

from influence_fast.data.examples import load_rows
from influence_fast.data.grouping import row_groups
from influence_fast.errors import DataError


def test_a_columns_values_name_the_groups() -> None:
    rows = load_rows([{"task": "algebra", "n": 1}, {"task": "geometry", "n": None}])
    assert row_groups(rows, "task") == ["algebra", "geometry"]
    assert row_groups(load_rows([{"level": 3}, {"level": 0}]), "level") == ["3", "0"]
    with pytest.raises(DataError, match="no column 'taks' to group by; did you mean 'task'"):
        row_groups(rows, "taks")
    with pytest.raises(DataError, match="row 1: column 'n' is empty"):
        row_groups(rows, "n")
    with pytest.raises(DataError, match="row 1: column 'n' is empty"):
        row_groups(load_rows([{"n": 1}, {"n": float("nan")}]), "n")
