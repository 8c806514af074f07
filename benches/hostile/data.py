"""Hostile data: every file type, every layout of columns, odd values in each, damaged bytes, and what is no file."""

from __future__ import annotations

import bz2
import datetime
import decimal
import gzip
import json
import lzma
import os
import random
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from benches.hostile.case import Case
from benches.hostile.values import DEEP, DIGITS, ODD, damaged, dumped, noise
from influence_fast.data.examples import load_examples, load_rows, save_examples
from influence_fast.data.schemas import SCHEMAS
from influence_fast.data.spooling import mapped_rows

_PACKERS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
_MESSAGES = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
_CELLS: dict[str, Any] = {
    "messages": _MESSAGES,
    "conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}],
    "generations": ["a \\boxed{4}", "b"],
    "correctness_math_verify": [True, False],
    "is_reasoning_complete": [True, True],
    "answer": "so it is #### 4",
    "response": "The answer is: 4",
}


def good_row(layout: str, index: int = 0) -> dict[str, Any]:
    """A row that the layout reads."""
    schema = SCHEMAS[layout]
    row = {name: _CELLS.get(name, f"text {index}") for name in (*schema.required, *schema.optional)}
    return {"id": f"r{index}"} | row


def read(path: Path, **how: Any) -> Callable[[], Any]:
    """Load the examples, read the rows as a stream, and write the rows again as pruning does."""

    def call() -> None:
        examples = load_examples(path, **how)
        scratch = path.parent.parent / "scratch"
        scratch.mkdir(exist_ok=True)
        for _ in mapped_rows(str(path), "train", scratch).read():
            pass
        rows = load_rows(path)
        save_examples(examples[:1], scratch / f"kept{rows.suffix}", rows)

    return call


def _in(folder: Path) -> Path:
    (folder / "in").mkdir()
    return folder / "in"


def _bytes(name: str, body: bytes, **how: Any) -> Case:
    def make(folder: Path) -> Callable[[], Any]:
        path = _in(folder) / name.split("/")[-1]
        path.write_bytes(body)
        return read(path, **how)

    return Case(name if not how else f"{name} {how}", make)


def cases(rng: random.Random, shared: Path) -> Iterator[Case]:
    """Yield every case of the room."""
    yield from _odd_cells(rng)
    yield from _texts(rng)
    yield from _damaged_files(rng, shared)
    yield from _columns()
    yield from _no_files()
    for name, value in (
        ("limit", 1.5),
        ("limit", "3"),
        ("limit", True),
        ("limit", float("nan")),
        ("format", 5),
        ("columns", 5),
        ("columns", {"prompt": 5}),
        ("trace", 1.5),
        ("turns", None),
        ("split", 5),
    ):
        yield _bytes(f"options/{name}={value!r}/a.jsonl", _lines([good_row("prompt_completion")]), **{name: value})


def _lines(rows: list[Mapping[str, Any]]) -> bytes:
    return "".join(dumped(dict(row)) + "\n" for row in rows).encode("utf-8", "surrogatepass")


def _odd_cells(rng: random.Random) -> Iterator[Case]:
    for layout in SCHEMAS:
        for column in good_row(layout):
            for number in rng.sample(range(len(ODD)), 4):
                rows = [good_row(layout, 0), good_row(layout, 1) | {column: ODD[number]}]
                if number % 2:
                    yield _bytes(f"odd/{layout}/{column}/{number}.jsonl", _lines(rows))
                else:
                    yield _bytes(f"odd/{layout}/{column}/{number}.json", dumped(rows).encode("utf-8", "surrogatepass"))
    for number, value in enumerate(ODD):
        yield _bytes(f"odd/whole/{number}.json", dumped(value).encode("utf-8", "surrogatepass"))
        yield _bytes(f"odd/line/{number}.jsonl", dumped(value).encode("utf-8", "surrogatepass"))
        rows = [{"prompt": "a", "completion": "b", dumped(value)[:40]: value}]
        yield _bytes(f"odd/further/{number}.jsonl", _lines(rows))


def _texts(rng: random.Random) -> Iterator[Case]:
    head = b"prompt,completion\n"
    texts = {
        "empty": b"",
        "blank": b" \n\n\t",
        "bom": b"\xef\xbb\xbf",
        "nul": b"\0" * 100,
        "utf16": '{"prompt":"a"}'.encode("utf-16"),
        "latin": b'{"prompt": "\xe9", "completion": "b"}\n',
        "cut": b'{"prompt": "a", "compl',
        "deep": b"[" * DEEP,
        "deeper": b'{"prompt":' * DEEP,
        "digits": b'{"prompt": ' + DIGITS.encode() + b', "completion": "b"}',
        "twice": b'{"prompt": "a", "prompt": "b", "completion": "c"}',
        "nan": b'{"prompt": NaN, "completion": Infinity}',
        "surrogate": b'{"prompt": "\\ud800", "completion": "b"}',
        "key": b'{"\\ud800": "a", "prompt": "a", "completion": "b"}',
        "noise": noise(rng, 3000),
        "html": b"<html><body>404</body></html>",
        "pointer": b"version https://git-lfs.github.com/spec/v1\n",
        "one": b'{"prompt": "a", "completion": "b"}',
        "crlf": b'{"prompt": "a",\r\n"completion": "b"}\r\n',
        "quote": b'"',
    }
    for suffix in (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".txt", ""):
        for name, body in texts.items():
            yield _bytes(f"text/{name}{suffix}", body)
    for suffix in (".jsonl.gz", ".json.bz2", ".csv.xz", ".jsonl.zst", ".tsv.gz"):
        for name in ("empty", "noise", "one", "deep"):
            yield _bytes(f"unpacked/{name}{suffix}", texts[name])
    for name, body in {
        "repeated": b"prompt,completion,prompt\na,b,c\n",
        "blanks": b"prompt,completion,,\na,b,,\n",
        "header": head,
        "open": head + b'"a,b\nc,d\n',
        "many": head + b"a,b,c\n",
        "few": head + b"a\n",
        "nul": head + b"a\0,b\n",
        "wide": b",".join(b"c%d" % i for i in range(20_000)) + b"\n",
        "long": head + b"a," + b"x" * 2_000_000 + b"\n",
        "ids": b"id,prompt,completion\n,a,b\n",
        "same": b"id,prompt,completion\n1,a,b\n1,a,b\n",
        "digits": b"id,prompt,completion\n" + DIGITS.encode() + b",a,b\n",
        "commas": b"," * 50_000 + b"\n",
        "quotes": head + b'"' * 50_001 + b"\n",
        "returns": b"prompt,completion\ra,b\r",
        "name": b'"a\nb",prompt,completion\nx,y,z\n',
    }.items():
        yield _bytes(f"csv/{name}.csv", body)
        yield _bytes(f"csv/{name}.tsv", body.replace(b",", b"\t"))
    bomb = b'{"prompt": "' + b"a" * (1 << 20)
    for suffix, pack in _PACKERS.items():

        def make(folder: Path, suffix: str = suffix, pack: Any = pack) -> Callable[[], Any]:
            path = _in(folder) / f"bomb.jsonl{suffix}"
            with path.open("wb") as file:
                piece = pack(bomb)
                for _ in range(3000):
                    file.write(piece)
            return read(path)

        yield Case(f"bomb{suffix}", make)


def _damaged_files(rng: random.Random, shared: Path) -> Iterator[Case]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [good_row("openr1", i) for i in range(20)]
    table = pa.Table.from_pylist(rows)
    pq.write_table(table, shared / "a.parquet")
    with pa.OSFile(str(shared / "a.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    bodies = {".parquet": (shared / "a.parquet").read_bytes(), ".arrow": (shared / "a.arrow").read_bytes()}
    bodies |= {
        ".jsonl": _lines(rows),
        ".json": json.dumps(rows).encode(),
        ".csv": b"prompt,completion\n" + b"a b c,d e f\n" * 30,
    }
    bodies |= {f".jsonl{suffix}": pack(_lines(rows)) for suffix, pack in _PACKERS.items()}
    for suffix, body in bodies.items():
        for number in range(12):
            yield _bytes(f"damaged/{number}{suffix}", damaged(rng, body))


def _arrays() -> dict[str, Any]:
    import pyarrow as pa

    bad = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"\xff\xfe")])
    far = 2**62
    return {
        "invalid utf8": bad,
        "list of invalid": pa.ListArray.from_arrays([0, 1], bad),
        "dictionary of invalid": pa.DictionaryArray.from_arrays(pa.array([0], pa.int8()), bad),
        "timestamp": pa.array([far], pa.timestamp("s")),
        "nanoseconds": pa.array([far], pa.timestamp("ns")),
        "zone": pa.array([0], pa.timestamp("s", tz="Nowhere/Else")),
        "date32": pa.array([2**30], pa.int32()).view(pa.date32()),
        "date64": pa.array([far], pa.int64()).view(pa.date64()),
        "duration": pa.array([far], pa.duration("s")),
        "time": pa.array([-5], pa.int64()).view(pa.time64("us")),
        "decimal": pa.array([decimal.Decimal("1e30")], pa.decimal256(76, 0)),
        "binary": pa.array([b"\xff"]),
        "null": pa.array([None]),
        "half": pa.array([1.5], pa.float16()),
        "map": pa.array([[("a", 1), ("a", 2)]], pa.map_(pa.string(), pa.int64())),
        "struct": pa.array([{"a": 1}]),
        "repeated fields": pa.StructArray.from_arrays([pa.array([1]), pa.array([2])], ["a", "a"]),
        "bad field": pa.StructArray.from_arrays([bad], ["a"]),
        "fixed": pa.array([[1, 2]], pa.list_(pa.int64(), 2)),
        "union": pa.UnionArray.from_sparse(pa.array([0], pa.int8()), [pa.array([1]), pa.array(["a"])]),
        "date": pa.array([datetime.date(1, 1, 1)]),
        "large": pa.array(["a"], pa.large_string()),
        "view": pa.array(["a"], pa.string_view()),
        "bool": pa.array([True]),
        "list": pa.array([["a", None]]),
    }


def _columns() -> Iterator[Case]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    good = pa.array(["text"])

    def written(table: Any, suffix: str) -> Callable[[Path], Callable[[], Any]]:
        def make(folder: Path) -> Callable[[], Any]:
            path = _in(folder) / f"a{suffix}"
            if suffix == ".parquet":
                pq.write_table(table, path)
            else:
                with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
                    writer.write_table(table)
            return read(path)

        return make

    for name, array in _arrays().items():
        for place in ("id", "prompt", "further"):
            table = pa.table({"prompt": good, "completion": good} | {place: array})
            yield Case(f"column/{name}/{place}.arrow", written(table, ".arrow"))
            if name not in ("timestamp", "union", "half", "fixed", "repeated fields", "duration"):
                yield Case(f"column/{name}/{place}.parquet", written(table, ".parquet"))
    sink = pa.BufferOutputStream()
    table = pa.table({"prompt": pa.array(["text"] * 3), "completion": pa.array(["text"] * 3)})
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    for number, offset in enumerate((2**31 - 1, 2**28, -5, 99)):
        body = sink.getvalue().to_pybytes().replace(struct.pack("<i", 12), struct.pack("<i", offset))
        yield _bytes(f"column/offset {number}/a.arrow", body)
    twice = pa.Table.from_arrays([good, good, good], ["prompt", "completion", "prompt"])
    for suffix in (".parquet", ".arrow"):
        yield Case(f"column/twice{suffix}", written(twice, suffix))
        yield Case(f"column/none{suffix}", written(pa.table({}), suffix))
        yield Case(f"column/empty{suffix}", written(twice.slice(0, 0), suffix))
    yield Case("column/many.parquet", written(pa.table({"prompt": pa.nulls(200_000_000, pa.string())}), ".parquet"))


def _no_files() -> Iterator[Case]:
    def many(folder: Path) -> Callable[[], Any]:
        inside = _in(folder)
        for number in range(15_000):
            (inside / f"{number}.log").touch()
        return read(inside)

    def nested(folder: Path) -> Callable[[], Any]:
        inside = _in(folder)
        for _ in range(60):
            inside = inside / "d"
            inside.mkdir()
        (inside / "a.jsonl").write_bytes(_lines([good_row("gsm8k")]))
        return read(folder / "in")

    def pipe(folder: Path) -> Callable[[], Any]:
        os.mkfifo(_in(folder) / "a.jsonl")
        return read(folder / "in" / "a.jsonl")

    def pipe_within(folder: Path) -> Callable[[], Any]:
        os.mkfifo(_in(folder) / "a.jsonl")
        return read(folder / "in")

    def linked(target: str) -> Callable[[Path], Callable[[], Any]]:
        def make(folder: Path) -> Callable[[], Any]:
            (_in(folder) / "a.jsonl").symlink_to(target)
            return read(folder / "in" / "a.jsonl")

        return make

    def saved(name: str, body: str) -> Callable[[Path], Callable[[], Any]]:
        def make(folder: Path) -> Callable[[], Any]:
            (_in(folder) / name).write_text(body)
            return read(folder / "in")

        return make

    yield Case("folder/root", lambda folder: read(Path("/")))
    yield Case("folder/usr", lambda folder: read(Path("/usr")))
    yield Case("folder/proc", lambda folder: read(Path("/proc")))
    yield Case("folder/dev", lambda folder: read(Path("/dev")))
    yield Case("folder/empty", lambda folder: read(_in(folder)))
    yield Case("folder/many", many)
    yield Case("folder/nested", nested)
    yield Case("folder/pipe", pipe_within)
    yield Case("file/pipe", pipe)
    for target in (
        "/dev/zero",
        "/dev/full",
        "/dev/null",
        "/dev/stdin",
        "a.jsonl",
        "/nowhere",
        "/etc",
        "/proc/self/mem",
        "/proc/kmsg",
    ):
        yield Case(f"file/link to {target}", linked(target))
    for name in ("state.json", "dataset_dict.json", "dataset_info.json", "README.md", "a.json", "a.csv", "script.py"):
        for number, body in enumerate(
            (
                "",
                "{}",
                "[" * DEEP,
                '{"splits": ["../../x"]}',
                '{"_data_files": 5}',
                "\0",
                "[1]",
                DIGITS,
                '{"_data_files": [{"filename": "/dev/zero"}]}',
            )
        ):
            yield Case(f"folder/{name}/{number}", saved(name, body))
