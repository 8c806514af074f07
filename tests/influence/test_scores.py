"""What a table of scores gives by hand: its length, columns, order, and a data frame."""

from __future__ import annotations

import numpy as np
import pytest

from influence_fast.errors import DataError
from influence_fast.influence.scores import ScoreTable


def table() -> ScoreTable:
    return ScoreTable(
        ["a", "b", "c", "d"], {"s_correct": np.array([1.0, 3.0, np.nan, 3.0])}, {"why": ["x", "w", "z", "y"]}
    )


def test_columns_are_had_by_name() -> None:
    scores = table()
    assert len(scores) == 4
    assert scores["s_correct"] is scores.columns["s_correct"]
    assert list(scores["id"]) == scores.ids
    assert list(scores["why"]) == ["x", "w", "z", "y"]
    with pytest.raises(DataError, match="did you mean 's_correct'"):
        scores["s_corect"]


def test_the_largest_come_first_and_nan_last() -> None:
    assert table().sort("s_correct").ids == ["b", "d", "a", "c"]
    assert table().sort("s_correct", ascending=True).ids == ["a", "b", "d", "c"]
    assert table().sort("why", ascending=True).ids == ["b", "a", "d", "c"]
    assert table().sort("s_correct").texts["why"] == ["w", "y", "x", "z"]
    assert np.array_equal(table().sort("s_correct")["s_correct"], [3, 3, 1, np.nan], equal_nan=True)


def test_a_data_frame_has_the_ids_as_its_index() -> None:
    frame = table().to_pandas()
    assert frame.index.tolist() == ["a", "b", "c", "d"]
    assert frame.loc["b", "s_correct"] == 3
    assert list(frame.columns) == ["s_correct", "why"]


def test_a_table_of_many_rows_is_shown_in_one_short_line() -> None:
    many = ScoreTable([str(i) for i in range(2000)], {"s_correct": np.zeros(2000)})
    assert repr(many) == "ScoreTable(2,000 rows: id, s_correct)"


def test_a_table_of_no_rows_is_true() -> None:
    assert bool(ScoreTable([]))
