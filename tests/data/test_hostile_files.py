"""Files that hang, fill memory or hold what Python has no value for: refused by name and place."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from influence_fast.data import rows, spooling, text_files
from influence_fast.data.examples import load_examples, load_rows
from influence_fast.errors import ConfigError, DataError

GOOD = {"prompt": "a", "completion": "b"}


@pytest.mark.parametrize("limit", [1.5, "3", True, 0, float("nan")])
def test_a_limit_that_is_no_count_is_refused(limit: Any) -> None:
    with pytest.raises(ConfigError, match="whole number of at least 1"):
        load_examples([GOOD], limit=limit)


@pytest.mark.parametrize("columns", [5, {"prompt": 5}, {5: "prompt"}, ["prompt"]])
def test_columns_that_are_no_names_are_refused(columns: Any) -> None:
    with pytest.raises(ConfigError, match="columns is"):
        load_examples([GOOD], columns=columns)


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_a_column_that_comes_twice_is_refused(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_text("prompt,completion,prompt\na,b,c\n".replace(",", "," if suffix == ".csv" else "\t"))
    with pytest.raises(DataError, match=r"'prompt' twice"):
        load_rows(path)


def test_a_parquet_column_that_comes_twice_is_refused(tmp_path: Path) -> None:
    values = pa.array(["a"])
    table = pa.Table.from_arrays([values, values, values], ["prompt", "completion", "prompt"])
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(DataError, match=r"'prompt' twice"):
        load_rows(tmp_path / "a.arrow")


def test_text_that_is_no_utf8_names_row_and_column(tmp_path: Path) -> None:
    offsets = pa.array([0, 1, 2, 4], pa.int32()).buffers()[1]
    bad = pa.Array.from_buffers(pa.string(), 3, [None, offsets, pa.py_buffer(b"ab\xff\xfe")])
    pq.write_table(pa.table({"prompt": ["x"] * 3, "completion": bad}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet, row 2: column 'completion' holds text that is not UTF-8"):
        load_examples(tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"row 2: column 'completion'"):
        load_rows(tmp_path / "a.parquet")[2]


def test_a_date_beyond_python_names_row_and_column(tmp_path: Path) -> None:
    table = pa.table({"prompt": ["x"], "completion": ["y"], "id": pa.array([2**40], pa.timestamp("s"))})
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(DataError, match=r"row 0: column 'id' holds a timestamp"):
        load_examples(tmp_path / "a.arrow")


def test_offsets_that_lead_out_of_an_arrow_file_are_not_followed(tmp_path: Path) -> None:
    table = pa.table({"prompt": ["text"] * 3, "completion": ["text"] * 3})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    body = sink.getvalue().to_pybytes()
    (tmp_path / "a.arrow").write_bytes(body.replace((12).to_bytes(4, "little"), (2**31 - 1).to_bytes(4, "little")))
    with pytest.raises(DataError, match="not a readable arrow file"):
        load_rows(tmp_path / "a.arrow")


def test_a_packed_file_unpacks_to_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_files, "_UNPACKED", 10_000)
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"prompt": "' + b"a" * 1_000_000 + b'", "completion": "b"}'))
    with pytest.raises(DataError, match="unpacks to more than 100 times its size"):
        load_rows(path)
    monkeypatch.undo()
    assert len(load_rows(path)[0]["prompt"]) == 1_000_000


def test_a_parquet_file_of_rows_without_bytes_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"prompt": pa.nulls(20_000_000, pa.string())}), path)
    with pytest.raises(DataError, match=r"20,000,000 rows in \d"):
        load_rows(path)


def test_a_folder_of_too_many_files_is_no_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "_MOST_FILES", 20)
    for number in range(30):
        (tmp_path / f"{number}.log").touch()
    with pytest.raises(DataError, match="holds more than 20 files"):
        load_rows(tmp_path)


def test_what_a_killed_tokenization_left_is_swept(tmp_path: Path, tiny_tokenizer: Any) -> None:
    folder = tmp_path / "tokens"
    folder.mkdir()
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    for name in (".tokens.arrow.123-abcd.tmp", ".rows.arrow.123-abcd.tmp"):
        (folder / name).write_bytes(b"half")
    spooling.spool(folder, spooling.TokenSource(str(tmp_path / "a.jsonl")), tiny_tokenizer())
    assert sorted(path.name for path in folder.iterdir()) == ["tokens.arrow", "tokens.json"]
