"""Tokenized examples on disk, written in one pass over rows that are never all in memory, and read as a sequence.

A folder holds `tokens.arrow` (id, input_ids as int32, the places where what is learnt begins and ends) and
`tokens.json`, written last: what the tokens were made of, and which examples were left out.
"""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, overload

import torch

from influence_fast.atomic import replacing
from influence_fast.data.examples import IGNORED, check_columns, check_limit, load_rows, tokenize
from influence_fast.data.fingerprints import tokenizer_hash
from influence_fast.data.rows import (
    BATCH,
    Row,
    Rows,
    check_folder,
    check_row_count,
    need_datasets,
    need_pyarrow,
)
from influence_fast.data.schemas import Example, check_trace, check_turns, read_examples
from influence_fast.data.text_files import file_suffix, has_lines, numbered_rows
from influence_fast.data.tokens import tokenization_hash
from influence_fast.data.unpacked_size import check_parquet
from influence_fast.errors import DataError, one_line, setting

# Examples in one record batch; reading one example maps its whole batch.
_ROWS = 64


@dataclass(frozen=True)
class TokenSource:
    """A dataset and the settings by which it is read and tokenized, as `load_examples` and `tokenize` take them."""

    source: Any
    split: str = "train"
    format: str = "auto"
    trace: str | int = "first_correct"
    limit: int | None = None
    columns: Mapping[str, str | None] = field(default_factory=dict)
    max_length: int | None = None
    truncate: bool = False
    turns: str = "last"


class StreamedRows(Rows):
    """The rows of a text file of one row after the other, read anew for every pass and never held in memory.

    They are those of `load_rows`, with the same line numbers; `place` knows only the rows that the last pass has read.
    """

    def __init__(self, path: Path) -> None:
        super().__init__([], str(path), file_suffix(path))
        self._path = path
        self._numbers = array("q")

    def __len__(self) -> int:
        return sum(1 for _ in numbered_rows(self._path))

    def __getitem__(self, index: Any) -> Any:
        """Return one row or a slice, at the price of a pass over the file."""
        return list(self.read())[index]

    def read(self, columns: Iterable[str] | None = None) -> Iterator[Row]:
        """Yield the rows in order with all their columns."""
        numbers = self._numbers = array("q")
        for number, row in numbered_rows(self._path):
            numbers.append(number)
            yield row

    @property
    def columns(self) -> list[str]:
        """Return the column names of the first row."""
        return list(next(numbered_rows(self._path), (0, {}))[1])

    def place(self, index: int) -> str:
        """Return where row `index` is, for a message."""
        return f"{self.name}, line {self._numbers[index]}"


class Tokens(Sequence[dict[str, Any]]):
    """The tokenized examples in a folder, memory-mapped: `{"id", "input_ids" [n], "labels" [n]}`, int64 tensors.

    too_long: (id, tokens) of the examples that were left out. without: the rows that have no trace of the requested
    kind. Raises DataError where the folder is not complete.
    """

    def __init__(self, folder: Path) -> None:
        pa = need_pyarrow(folder)
        try:
            about = json.loads((folder / "tokens.json").read_bytes())
            self._reader = pa.ipc.open_file(pa.memory_map(str(folder / "tokens.arrow")))
        except (OSError, ValueError) as error:
            raise DataError(f"{folder} holds no tokens ({error}); delete it and make them again") from error
        self.too_long: list[tuple[str, int]] = [(name, n) for name, n in about["too_long"]]
        self.without: list[str] = about["without"]
        self._count = int(about["count"])
        self._held: tuple[int, Any] = (-1, None)

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> list[dict[str, Any]]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        number, row = divmod(range(self._count)[index], _ROWS)
        if self._held[0] != number:
            self._held = (number, self._reader.get_batch(number))
        batch = self._held[1]
        ids = torch.tensor(batch.column("input_ids")[row].values.to_numpy(), dtype=torch.int64)
        labels = ids.clone()
        borders = [0, *batch.column("borders")[row].as_py(), len(ids)]
        for start, end in zip(borders[::2], borders[1::2], strict=False):
            labels[start:end] = IGNORED
        return {"id": batch.column("id")[row].as_py(), "input_ids": ids, "labels": labels}


def is_spooled(folder: Path, source: TokenSource, tokenizer: Any) -> bool:
    """Return whether `folder` holds the tokens of exactly these rows, settings and tokenizer.

    It is False for a stream, whose rows cannot be identified.
    """
    try:
        about = json.loads((folder / "tokens.json").read_bytes())
    except (OSError, ValueError):
        return False
    made_of = _made_of(source, tokenizer)
    return made_of["source"] is not None and bool(about.get("made_of") == made_of)


def spool(folder: Path, source: TokenSource, tokenizer: Any, heartbeat: Callable[[], None] = lambda: None) -> None:
    """Tokenize `source` into `folder`; the callback `heartbeat` is called after every chunk of rows.

    Raises DataError as `load_examples` and `tokenize` do, naming the row, and where no example is left; `folder` then
    keeps the tokens it had.
    """
    pa = need_pyarrow(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # Left over from a killed process; only one process at a time works in this folder.
    for path in folder.glob(".*.arrow.*.tmp"):
        path.unlink(missing_ok=True)
    made_of = _made_of(source, tokenizer)
    schema = pa.schema([("id", pa.string()), ("input_ids", pa.list_(pa.int32())), ("borders", pa.list_(pa.int32()))])
    too_long: list[tuple[str, int]] = []
    count = 0
    without: list[str] = []
    examples = _examples(mapped_rows(source.source, source.split, folder), source, without)
    held: list[dict[str, Any]] = []
    with (
        replacing(folder / "tokens.arrow") as temporary,
        pa.OSFile(str(temporary), "wb") as sink,
        pa.ipc.new_file(sink, schema) as writer,
    ):
        while chunk := list(islice(examples, BATCH)):
            found = tokenize(chunk, tokenizer, max_length=source.max_length, truncate=source.truncate)
            too_long += found.too_long
            held += found.examples
            while len(held) >= _ROWS:
                writer.write_batch(_batch(pa, held[:_ROWS], schema))
                del held[:_ROWS]
                count += _ROWS
            heartbeat()
        if held:
            writer.write_batch(_batch(pa, held, schema))
            count += len(held)
        if count == 0:
            raise DataError(
                f"{source.source}: no example is left; raise {setting('max_length')}, or cut the examples "
                f"({setting('truncate')})"
            )
        # the two files are renamed one after the other: without the old record new tokens never pass for the old ones
        (folder / "tokens.json").unlink(missing_ok=True)
    with replacing(folder / "tokens.json") as temporary:
        about = {"made_of": made_of, "count": count, "too_long": too_long, "without": without}
        temporary.write_text(json.dumps(about) + "\n")


def mapped_rows(source: Any, split: str, folder: Path) -> Rows:
    """Return the rows of `load_rows` without holding them in memory.

    Text files are read row by row in every pass; parquet and streamed datasets are first written to Arrow files in
    `folder`, batch by batch. Raises DataError as `load_rows` does.
    """
    streamed = not hasattr(source, "__len__") and hasattr(source, "__iter__") and not isinstance(source, Path)
    if streamed:
        return load_rows(_arrow_of(source, folder / "rows.arrow"))
    if not isinstance(source, str | Path) or not os.path.isfile(Path(source).expanduser()):
        return load_rows(source, split=split)
    path = Path(source).expanduser()
    pa = need_pyarrow(path)
    if path.suffix.lower() == ".parquet":
        from pyarrow.parquet import ParquetFile

        try:
            with (
                ParquetFile(path) as file,
                replacing(folder / "rows.arrow") as temporary,
                pa.OSFile(str(temporary), "wb") as sink,
                pa.ipc.new_file(sink, file.schema_arrow) as writer,
            ):
                check_row_count(path, file.metadata.num_rows)
                check_parquet(path, file)
                for batch in file.iter_batches(batch_size=BATCH):
                    writer.write_batch(batch)
        except (pa.ArrowException, OSError) as error:
            # Errors of the disk have a number, and those of the file have none.
            if getattr(error, "errno", None):
                raise
            # This raises an error that says what is wrong with the file.
            return load_rows(path)
        rows = load_rows(folder / "rows.arrow")
        rows.name, rows.suffix = str(path), ".parquet"
        return rows
    if has_lines(path):
        rows = StreamedRows(path)
        # For an empty file `load_rows` raises the error that says so.
        return rows if rows.columns else load_rows(path)
    return load_rows(path, split=split)


def _arrow_of(rows: Iterable[Mapping[str, Any]], path: Path) -> Path:
    """Write the rows of a streamed dataset, of unknown number, to an Arrow file, and return its path."""
    need_datasets(str(path))
    pa = need_pyarrow(path)
    from datasets.arrow_writer import ArrowWriter

    features = getattr(rows, "features", None)
    with (
        replacing(path) as temporary,
        ArrowWriter(path=str(temporary), features=features, writer_batch_size=BATCH) as w,
    ):
        try:
            for row in rows:
                w.write(dict(row))
            w.finalize()
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise DataError(
                f"the stream given: a column holds values of several types ({one_line(error)}); convert them to one"
            ) from error
    return path


def _examples(rows: Rows, source: TokenSource, without: list[str]) -> Iterator[Example]:
    check_trace(source.trace)
    check_turns(source.turns)
    check_limit(source.limit)
    check_columns(source.columns)

    def every() -> Iterator[Example]:
        read = read_examples(rows, source.format, source.trace, source.columns, source.turns)
        for index, found in enumerate(read):
            if not found:
                without.append(rows.place(index))
            yield from found

    return islice(every(), source.limit)


def _batch(pa: Any, examples: list[dict[str, Any]], schema: Any) -> Any:
    # from not learnt to learnt, back, and so on
    changes = [torch.diff(example["labels"] != IGNORED, prepend=torch.tensor([False])) for example in examples]
    borders = [change.nonzero().flatten().to(torch.int32).numpy() for change in changes]
    columns = [
        pa.array([example["id"] for example in examples]),
        pa.array([example["input_ids"].to(torch.int32).numpy() for example in examples], type=schema.field(1).type),
        pa.array(borders, type=schema.field(2).type),
    ]
    return pa.record_batch(columns, schema=schema)


def _made_of(source: TokenSource, tokenizer: Any) -> dict[str, Any]:
    """Return what identifies the tokens: the sources' sizes and times of change or fingerprint, settings, tokenizer."""
    where = source.source
    if isinstance(where, str | Path):
        path = Path(where).expanduser()
        if path.is_dir():
            check_folder(path)
        files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path] * path.is_file()
        state: Any = [str(where), [[str(p), p.stat().st_size, p.stat().st_mtime_ns] for p in files]]
    else:
        known = getattr(where, "_fingerprint", None)
        state = None if known is None else [type(where).__name__, str(known)]
    names = ("split", "format", "trace", "turns", "limit", "max_length", "truncate")
    settings = {name: getattr(source, name) for name in names}
    columns = dict(source.columns)
    return {
        "source": state,
        **settings,
        "columns": columns,
        "tokenization": tokenization_hash(tokenizer),
        "tokenizer": tokenizer_hash(tokenizer),
    }
