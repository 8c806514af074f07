"""Text files as they are found: compressed, of other encodings and separators, wrapped in an object."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest

from influence_fast.data import text_files
from influence_fast.data.examples import load_examples, load_rows, save_examples, write_rows
from influence_fast.data.spooling import StreamedRows, Tokens, TokenSource, mapped_rows, spool
from influence_fast.errors import DataError

ROWS = [{"id": f"é{i}", "prompt": f"p\t{i}", "completion": f'c "{i}",\n你'} for i in range(5)]
TEXT = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


def packed(data: bytes, suffix: str) -> bytes:
    if suffix == ".zst":
        sink = pyarrow.BufferOutputStream()
        with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
            stream.write(data)
        return sink.getvalue().to_pybytes()
    pack: Callable[[bytes], bytes] = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}[suffix]
    return pack(data)


PACKED = [".gz", ".bz2", ".xz", ".zst"]


@pytest.mark.parametrize("suffix", PACKED)
def test_compressed_files_are_read_with_line_numbers(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"x.jsonl{suffix}"
    data = TEXT.encode()
    path.write_bytes(packed(data[:100], suffix) + packed(data[100:], suffix))  # members one after the other
    rows = load_rows(path)
    assert list(rows) == ROWS
    assert rows.suffix == f".jsonl{suffix}"
    assert rows.place(3) == f"{path}, line 4"
    path.write_bytes(packed(data[:-9], suffix))
    with pytest.raises(DataError, match=rf"x.jsonl\{suffix}, line 5: is not valid JSON"):
        load_rows(path)


@pytest.mark.parametrize("suffix", PACKED)
@pytest.mark.parametrize("damage", ["cut", "junk"])
def test_damaged_archives_are_named(suffix: str, damage: str, tmp_path: Path) -> None:
    path = tmp_path / f"x.jsonl{suffix}"
    path.write_bytes(packed(TEXT.encode() * 50, suffix)[:-20] if damage == "cut" else b"this is no archive")
    for read in (load_rows, lambda source: list(StreamedRows(source))):
        with pytest.raises(DataError, match=rf"x.jsonl\{suffix}: cannot be read .*check the file") as error:
            read(path)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", [".json", ".csv", ".tsv", ".jsonl"])
@pytest.mark.parametrize("suffix", ["", *PACKED])
def test_written_files_are_read_again_as_they_were(kind: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"x{kind}{suffix}"
    assert write_rows(ROWS, path) == len(ROWS)
    assert list(load_rows(path)) == ROWS
    first = path.read_bytes()
    write_rows(ROWS, path)
    assert path.read_bytes() == first
    source = load_rows(path)
    pruned = tmp_path / f"pruned{source.suffix}"
    save_examples(load_examples(source)[1:3], pruned, source)
    assert pruned.name == f"pruned{kind}{suffix}"
    assert list(load_rows(pruned)) == ROWS[1:3]
    assert not list(tmp_path.glob(".*"))


def test_a_failed_compressed_write_leaves_nothing(tmp_path: Path) -> None:
    def rows() -> Any:
        yield ROWS[0]
        raise RuntimeError("stopped")

    for suffix in PACKED:
        with pytest.raises(RuntimeError, match="stopped"):
            write_rows(rows(), tmp_path / f"x.jsonl{suffix}")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["x.gz", "x.parquet.gz", "x.txt.zst", "x.xlsx"])
def test_unknown_kinds_of_files_list_the_known(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(DataError, match=r"unknown file type .*; known: .jsonl, .json, .csv, .tsv \(also with .gz"):
        load_rows(tmp_path / name)
    with pytest.raises(DataError, match="cannot write"):
        write_rows(ROWS, tmp_path / "y" / name)
    with pytest.raises(DataError, match="no such file"):
        load_rows(tmp_path / "absent.jsonl.zst")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv", ".tsv"])
def test_encodings_are_found(encoding: str, kind: str, tmp_path: Path) -> None:
    plain, path = tmp_path / f"plain{kind}", tmp_path / f"x{kind}"
    write_rows(ROWS, plain)
    path.write_bytes(plain.read_bytes().decode().encode(encoding))
    assert list(load_rows(path)) == ROWS
    if kind == ".jsonl":
        assert list(mapped_rows(path, "train", tmp_path)) == ROWS
        assert load_rows(path).place(4) == f"{path}, line 5"


def test_broken_encodings_are_named(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(TEXT.encode("utf-16")[:-3])
    with pytest.raises(DataError, match=r"x.jsonl, line \d: is not valid"):
        load_rows(path)
    path.write_bytes(TEXT.encode() + b'{"prompt": "\xff"}\n')
    with pytest.raises(DataError, match=r"x.jsonl, line 6: is not valid UTF-8"):
        load_rows(path)


@pytest.mark.parametrize("suffix", PACKED)
@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv"])
def test_compressed_files_without_their_suffix_are_read(suffix: str, kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"x{kind}"
    write_rows(ROWS, tmp_path / f"y{kind}{suffix}")
    path.write_bytes((tmp_path / f"y{kind}{suffix}").read_bytes())
    assert list(load_rows(path)) == ROWS
    assert list(mapped_rows(path, "train", tmp_path)) == ROWS


@pytest.mark.parametrize("name", ["x.ndjson", "x.NDJSON", "x.ndjson.gz", "x.jsonlines"])
def test_other_names_of_json_lines_are_known(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    write_rows(ROWS, path)
    rows = load_rows(path)
    assert list(rows) == list(mapped_rows(path, "train", tmp_path)) == ROWS
    assert rows.suffix in (".jsonl", ".jsonl.gz")
    assert rows.place(1) == f"{path}, line 2"


@pytest.mark.parametrize(("suffix", "mark"), [(".csv", ","), (".tsv", "\t"), (".csv.gz", ",")])
def test_a_column_that_a_header_has_twice_is_refused(suffix: str, mark: str, tmp_path: Path) -> None:
    path = tmp_path / f"x{suffix}"
    data = f"prompt{mark}completion{mark}completion\np{mark}a{mark}b\n".encode()
    path.write_bytes(packed(data, ".gz") if suffix.endswith(".gz") else data)
    for read in (load_rows, lambda source: list(StreamedRows(source))):
        with pytest.raises(DataError, match=r"the header has the column 'completion' twice; rename or remove"):
            read(path)


def test_a_column_that_a_table_has_twice_is_refused(tmp_path: Path) -> None:
    table = pyarrow.table([["p"], ["a"], ["b"]], names=["prompt", "completion", "completion"])
    with pyarrow.OSFile(str(tmp_path / "x.arrow"), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(DataError, match=r"x.arrow: has the column 'completion' twice"):
        load_rows(tmp_path / "x.arrow")


# ---- JSON ------------------------------------------------------------------------------------------------

CHAT = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}


@pytest.mark.parametrize(
    ("content", "split", "expected"),
    [
        ({"data": ROWS}, "train", ROWS),
        ({"version": "1", "data": ROWS, "notes": [1, 2]}, "train", ROWS),
        ({"rows": ROWS, "features": [{"name": "id"}]}, "train", ROWS),
        ({"anything": ROWS}, "train", ROWS),
        ({"train": ROWS[:3], "test": ROWS[3:]}, "train", ROWS[:3]),
        ({"train": ROWS[:3], "test": ROWS[3:]}, "test", ROWS[3:]),
        ({"data": [{"from": "a", "value": "b"}]}, "train", [{"from": "a", "value": "b"}]),
        (ROWS[0], "train", ROWS[:1]),
        (CHAT, "train", [CHAT]),  # messages are a cell of a row, and no rows
        ({"conversations": [{"from": "human", "value": "q"}]}, "train", [{"conversations": [
            {"from": "human", "value": "q"}]}]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("indent", [None, 2])
def test_json_objects_around_rows_are_opened(
    content: Any, split: str, expected: list[Any], indent: int | None, tmp_path: Path
) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps(content, indent=indent))
    assert list(load_rows(path, split=split)) == expected
    assert list(mapped_rows(path, split, tmp_path)) == expected


def test_a_key_that_an_object_has_twice_is_refused(tmp_path: Path) -> None:
    good, bad = '{"prompt": "p", "completion": "a"}', '{"prompt": "p", "completion": "a", "completion": "b"}'
    nested = '{"messages": [{"role": "user", "content": "a", "content": "b"}]}'
    path = tmp_path / "x.jsonl"
    for line, key in ((bad, "completion"), (nested, "content")):
        path.write_text(f"{good}\n{line}\n")
        with pytest.raises(DataError, match=rf"x.jsonl, line 2: has the key '{key}' twice; leave one"):
            load_rows(path)
    path = tmp_path / "x.json"
    path.write_text(f"[{good}, {bad}]")
    with pytest.raises(DataError, match=r"x.json: has the key 'completion' twice; leave one"):
        load_rows(path)


def test_json_lists_that_no_name_tells_apart_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"easy": ROWS, "hard": ROWS}))
    with pytest.raises(DataError, match=r"x.json: holds several lists of rows \(easy, hard\); name one as the split"):
        load_rows(path)
    assert list(load_rows(path, split="hard")) == ROWS
    path.write_text('{"data": [')
    with pytest.raises(DataError, match=r"x.json: is not valid JSON"):
        load_rows(path)


# ---- rows that are never held ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.csv", "x.tsv", "x.jsonl.gz", "x.csv.zst"])
def test_streamed_rows_are_those_in_memory(name: str, tmp_path: Path, tiny_tokenizer: Callable[..., Any]) -> None:
    path = tmp_path / name
    write_rows(ROWS, path)
    if name == "x.json":
        path.write_text(TEXT)
    held, streamed = load_rows(path), mapped_rows(path, "train", tmp_path)
    assert isinstance(streamed, StreamedRows)
    assert list(streamed) == list(held) == ROWS
    assert (len(streamed), streamed.columns, streamed.suffix) == (len(held), held.columns, held.suffix)
    assert [streamed.place(i) for i in range(5)] == [held.place(i) for i in range(5)]
    assert streamed[1:3] == held[1:3]
    spool(tmp_path / "t", TokenSource(path), tiny_tokenizer())
    assert [e["id"] for e in Tokens(tmp_path / "t")] == [row["id"] for row in ROWS]


def test_streamed_rows_name_line_and_emptiness(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(ROWS[0]) + "\n\n{broken\n")
    with pytest.raises(DataError, match=r"x.jsonl, line 3: is not valid JSON"):
        list(mapped_rows(path, "train", tmp_path))
    path.write_text("\n")
    with pytest.raises(DataError, match=r"x.jsonl: there are no rows in it"):
        mapped_rows(path, "train", tmp_path)


def test_streamed_tokens_agree_on_nan_and_turns(tmp_path: Path, tiny_tokenizer: Callable[..., Any]) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"id": "a", "prompt": "p", "completion": "c", "answer": NaN, "label": NaN}\n')
    tokenizer = tiny_tokenizer()
    spool(tmp_path / "t", TokenSource(path), tokenizer)
    assert len(Tokens(tmp_path / "t")) == 1


@pytest.mark.parametrize("suffix", PACKED)
@pytest.mark.parametrize("blank", [b"\n", b" ", "\n".encode("utf-16-le")], ids=["lines", "spaces", "utf-16"])
def test_packed_blanks_without_end_are_refused_early(
    suffix: str, blank: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_files, "_BLANK", 1 << 18)
    for kind in (".jsonl", ".json", ".csv"):
        path = tmp_path / f"x{kind}{suffix}"
        path.write_bytes(packed(blank * (1 << 20), suffix))
        with pytest.raises(DataError, match=r"white space at a stretch; .* leave out blank lines"):
            load_rows(path)


def test_blank_lines_between_packed_rows_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(gzip.compress(TEXT.replace("\n", "\n" * 100_000).encode()))
    assert list(load_rows(path)) == ROWS
