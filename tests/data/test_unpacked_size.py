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
