"""A small file of one value that many rows share is refused by name before it fills the memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from influence_fast.data import unpacked_size
from influence_fast.data.rows import load_rows
from influence_fast.data.spooling import mapped_rows
from influence_fast.errors import DataError

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
ROWS = 64
LONG = "x " * 30_000


@pytest.fixture(autouse=True)
def _limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpacked_size, "UNPACKED", 1 << 21)


def repeated(kind: str, text: str = LONG, rows: int = ROWS) -> Any:
    if kind == "dictionary":
        column = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), pa.array([text]))
    elif kind == "list":
        column = pa.array([[text, text]] * rows)
    else:
        column = pa.array([text] * rows)
    return pa.table({"prompt": ["q"] * rows, "completion": column})


@pytest.mark.parametrize("kind", ["dictionary", "list", "plain"])
def test_a_shared_value_in_parquet_is_refused_by_file(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "small.parquet"
    pq.write_table(repeated(kind), path, compression="zstd")
    assert path.stat().st_size < 10_000
    with pytest.raises(DataError, match=r"small\.parquet: its [\d,]+ bytes unpack to more than"):
        load_rows(path)
    with pytest.raises(DataError, match=r"small\.parquet: its [\d,]+ bytes unpack to more than"):
        mapped_rows(path, "train", tmp_path)


def test_a_shared_value_in_an_arrow_table_is_refused(tmp_path: Path) -> None:
    table = repeated("dictionary", rows=200)  # more than a hundred times its bytes
    with pa.OSFile(str(tmp_path / "small.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(DataError, match=r"small\.arrow: its [\d,]+ bytes unpack to more than"):
        load_rows(tmp_path / "small.arrow")


@pytest.mark.parametrize("kind", ["dictionary", "list", "plain"])
def test_values_that_fit_are_read(kind: str, tmp_path: Path) -> None:
    pq.write_table(repeated(kind, LONG[:9000]), tmp_path / "fits.parquet")
    assert len(load_rows(tmp_path / "fits.parquet")) == ROWS


def written(table: Any, path: Path) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(table, path, compression="zstd")
        return path
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return path


def shared(count: int, text: str) -> Any:
    return pa.DictionaryArray.from_arrays(pa.array([0] * count, pa.int32()), pa.array([text]))


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
@pytest.mark.parametrize("kind", ["list", "struct", "list in struct"])
def test_a_cell_of_many_shared_values_is_refused(kind: str, name: str, tmp_path: Path) -> None:
    column = shared(3000, LONG)
    if kind != "struct":
        column = pa.ListArray.from_arrays(pa.array([0, 3000], pa.int32()), column)
    if kind != "list":
        column = pa.StructArray.from_arrays([column], ["part"])
    rows = len(column)
    path = written(pa.table({"prompt": ["q"] * rows, "completion": ["a"] * rows, "x": column}), tmp_path / name)
    with pytest.raises(DataError, match=r"a\.\w+: its [\d,]+ bytes unpack to more than"):
        load_rows(path)


def test_a_parquet_cell_of_many_equal_texts_is_refused(tmp_path: Path) -> None:
    column = pa.array([["x" * 3000] * 2000])
    path = written(pa.table({"prompt": ["q"], "completion": ["a"], "x": column}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="unpack to more than"):
        load_rows(path)


def test_lists_of_shared_values_that_fit_are_read(tmp_path: Path) -> None:
    column = pa.ListArray.from_arrays(pa.array([0, 3], pa.int32()), shared(3, "text"))
    path = written(pa.table({"prompt": ["q"], "completion": ["a"], "x": column}), tmp_path / "a.parquet")
    assert load_rows(path)[0]["x"] == ["text"] * 3


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
@pytest.mark.parametrize("nested", [False, True], ids=["columns", "fields"])
def test_too_many_columns_are_refused_from_the_schema(
    nested: bool, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = {f"c{i}": "x" for i in range(unpacked_size.MOST_COLUMNS + 1)}
    row = {"prompt": "q", "completion": "a"} | ({"x": many} if nested else many)
    path = written(pa.Table.from_pylist([row]), tmp_path / name)
    monkeypatch.setattr(pq, "read_table", None)
    with pytest.raises(DataError, match=r"a\.\w+: has more than 2,000 columns"):
        load_rows(path)
    if name == "a.parquet":
        with pytest.raises(DataError, match="has more than 2,000 columns"):
            mapped_rows(path, "train", tmp_path)
