"""What stands for nothing: NaN, pandas' NA, empty cells; and numbers that pandas made floats of."""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset

from influence_fast.data.cells import is_null
from influence_fast.data.examples import Example, kept_rows, load_examples, load_rows, save_examples
from influence_fast.errors import DataError
from influence_fast.run.results import known_harmful

pandas = pytest.importorskip("pandas")

NOTHING = [None, float("nan"), np.nan, np.float32("nan"), pandas.NA, pandas.NaT, np.datetime64("NaT"), Decimal("nan")]
ROW = {"id": "a", "prompt": "p", "completion": "c"}


@pytest.mark.parametrize("value", NOTHING, ids=[type(v).__name__ for v in NOTHING])
def test_every_kind_of_nothing_is_none(value: Any) -> None:
    assert load_examples([ROW | {"answer": value, "label": value}]) == [Example("a", "p", "c")]
    with pytest.raises(DataError, match="row 0: column 'completion' is null"):
        load_examples([ROW | {"completion": value}])
    with pytest.raises(DataError, match="row 0: the id in column 'id' is"):
        load_examples([ROW | {"id": value}])


@pytest.mark.parametrize("value", ["nan", "", 0, 0.0, False, [], {}, float("inf")])
def test_something_is_not_null(value: Any) -> None:
    assert not is_null(value)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (5.0, "5"), (0.5, "0.5"), (-3.0, "-3"), (7, "7"), (np.float64(5), "5"), (np.int64(5), "5"),
        (np.float32(0.5), "0.5"), (1e20, "100000000000000000000"), ("5.0", "5.0"), ("nan", "nan"),
        (True, "True"), (np.bool_(True), "True"), (float("inf"), "inf"),
    ],
)  # fmt: skip
def test_answers_that_are_numbers_become_text(value: Any, text: str) -> None:
    assert load_examples([ROW | {"answer": value}])[0].answer == text


@pytest.mark.parametrize("value", [["1"], ["1", "2"], [], {"a": "1"}, np.array(["1"]), ("1",)])
@pytest.mark.parametrize("column", ["answer", "label"])
def test_a_nested_answer_is_one_line_with_the_remedy(value: Any, column: str) -> None:
    row = ROW | {column: value}
    with pytest.raises(DataError, match=rf"the list given, row 0: column '{column}' is a (list of|dict)") as error:
        load_examples([row])
    assert "\n" not in str(error.value)
    assert f'columns={{"{column}": None}}' in str(error.value)
    assert load_examples([row], columns={column: None}) == [Example("a", "p", "c")]


def test_a_list_as_answer_names_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(ROW) + "\n" + json.dumps(ROW | {"id": "b", "answer": ["1", "2"]}) + "\n")
    with pytest.raises(DataError, match=r"x.jsonl, line 2: column 'answer' is a list of 2, not text or a number"):
        load_examples(path)


def frame() -> Any:
    return pandas.DataFrame(
        {
            "id": [1, 2, 3],
            "prompt": ["p", "q", "r"],
            "completion": ["c", "d", "e"],
            "answer": [5, None, 2.5],  # floats, with NaN
            "label": ["wrong", np.nan, pandas.NA],
        }
    )


EXPECTED = [
    Example("1", "p", "c", "5", row=0, label="wrong"),
    Example("2", "q", "d", row=1),
    Example("3", "r", "e", "2.5", row=2),
]


@pytest.mark.parametrize("kind", ["frame", "records", "json lines", "parquet", "csv", "dataset"])
def test_what_pandas_holds_is_read_alike_from_everywhere(kind: str, tmp_path: Path) -> None:
    path, expected = tmp_path / f"x.{kind}", EXPECTED
    source: Any = path
    if kind == "frame":
        source = frame()
    elif kind == "records":
        source = frame().to_dict("records")
    elif kind == "json lines":  # Python's json writes NaN as such
        path = source = tmp_path / "x.jsonl"
        rows = frame().astype({"label": object}).where(frame()["label"].notna(), np.nan, axis=0).to_dict("records")
        rows = [row | {"id": i + 1, "prompt": "pqr"[i], "completion": "cde"[i]} for i, row in enumerate(rows)]
        rows[2]["answer"] = 2.5
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert "NaN" in path.read_text()
    elif kind == "parquet":
        frame().to_parquet(path)
    elif kind == "csv":
        frame().to_csv(path, index=False)
        expected = [Example("1", "p", "c", "5.0", row=0, label="wrong"), *EXPECTED[1:]]  # text is as it stands
    else:
        source = Dataset.from_pandas(frame())
    assert load_examples(source) == expected


def test_data_frames_with_lists_and_pruned_rows(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]
    source = pandas.DataFrame({"messages": [np.array(turns, object), turns], "score": [np.nan, 1.0]})
    examples = load_examples(source)
    assert [e.completion for e in examples] == ["2", "2"]
    rows = load_rows(source)
    assert save_examples(examples[:1], tmp_path / f"x{rows.suffix}", rows) == 1
    assert list(load_rows(tmp_path / "x.jsonl")) == [{"messages": turns, "score": None}]


def test_frames_that_give_their_rows_themselves_are_read() -> None:
    class Frame:  # as polars has it
        columns = ("prompt", "completion", "answer")

        def to_dict(self) -> Any:
            raise AssertionError

        def to_dicts(self) -> list[dict[str, Any]]:
            return [{"prompt": "p", "completion": "c", "answer": float("nan")}]

    assert load_examples(Frame()) == [Example("0", "p", "c")]


def test_column_names_that_a_frame_cannot_give_are_refused() -> None:
    with pytest.raises(DataError, match="the data frame given: the column name 0 is no text"):
        load_examples(pandas.DataFrame([["p", "c"]]))


def test_a_label_written_as_nan_in_csv_is_none(tmp_path: Path) -> None:
    for suffix, mark in ((".csv", ","), (".tsv", "\t")):
        path = tmp_path / f"x{suffix}"
        lines = (["prompt", "completion", "answer", "label"], ["p", "c", "nan", "NaN"], ["p", "c", "", "noise"])
        path.write_text("".join(mark.join(line) + "\n" for line in lines))
        assert [(e.answer, e.label) for e in load_examples(path)] == [("nan", None), (None, "noise")]


@pytest.mark.parametrize("null", ["NA", "N/A", "None", "null", "NULL", "<NA>", "NaT", " nan "])
def test_nulls_written_to_csv_are_no_labels(null: str, tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text(f"prompt,completion,answer,label\np,c,{null},{null}\n")
    assert [(e.answer, e.label) for e in load_examples(path)] == [(null, None)]
    assert load_examples([ROW | {"label": "none"}])[0].label == "none"


@pytest.mark.parametrize("label", [True, False, np.bool_(True), 1, 0.0, 1.5, "True", "false", "1.0", "0"])
def test_truths_and_numbers_are_no_labels(label: Any, caplog: pytest.LogCaptureFixture) -> None:
    rows = [ROW | {"label": label}, ROW | {"id": "b", "label": "wrong"}, ROW | {"id": "c", "label": label}]
    assert [e.label for e in load_examples(rows)] == [None, "wrong", None]
    (record,) = caplog.records
    assert "2 labels are truths or numbers" in record.getMessage()
    assert "are not read: row 0, row 2; write 'clean'" in record.getMessage()


def test_ids_that_pandas_made_floats_are_whole(tmp_path: Path) -> None:
    rows = pandas.DataFrame({"id": [1, 2, None], "prompt": "p", "completion": "c"})[:2]
    rows.to_parquet(tmp_path / "x.parquet")
    rows.to_json(tmp_path / "x.jsonl", orient="records", lines=True)
    for source in (rows, rows.to_dict("records"), tmp_path / "x.parquet", tmp_path / "x.jsonl"):
        assert [e.id for e in load_examples(source)] == ["1", "2"]


def test_nan_is_no_harmful_label() -> None:
    pool = load_examples([ROW | {"id": str(i), "label": label} for i, label in enumerate(["wrong", np.nan, "clean"])])
    harmful = known_harmful(pool, ["0", "1", "2"])
    assert harmful is not None
    assert harmful.tolist() == [True, False, False]
    assert known_harmful(pool[1:], ["1", "2"]) is None


def test_pruning_keeps_what_a_row_has_of_nan() -> None:
    rows = [ROW | {"id": str(i), "answer": np.nan} for i in range(2)]
    source = load_rows(rows)
    [kept] = kept_rows(source, load_examples(source)[1:])
    assert kept is rows[1]
