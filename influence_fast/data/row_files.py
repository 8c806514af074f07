"""Write rows to files atomically, in the format that the extension names."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from influence_fast.atomic import replacing
from influence_fast.data.rows import BATCH, Row, Rows, need_datasets, need_pyarrow
from influence_fast.data.text_files import COMPRESSIONS, file_suffix, packed_writer, plain_suffix
from influence_fast.errors import DataError, one_line, truncated_list

if TYPE_CHECKING:
    import pyarrow as pa


def write_rows(rows: Iterable[Row], path: str | os.PathLike[str], *, schema: pa.Schema | None = None) -> int:
    """Write `rows` atomically to `path` and return their number; the extension chooses the format.

    .jsonl, .json, .csv, .tsv (each also with .gz, .bz2, .xz or .zst after it), .parquet, .arrow, or no extension for a
    folder in `save_to_disk` form. Text is UTF-8. Column types of the Arrow formats are those of `schema` (of `rows`
    when it is `Rows`), else inferred from all rows. The result is written under a temporary name and renamed.

    Raises DataError: unknown extension, an existing folder in the way, values the format cannot hold.
    """
    path = Path(path)
    suffix = file_suffix(path)
    if schema is None and isinstance(rows, Rows):
        schema = rows.schema
    plain = plain_suffix(suffix)
    if plain not in _WRITERS or (plain != suffix and plain not in _TEXT_WRITERS):
        known = f"{', '.join(filter(None, _WRITERS))}; of text also with {', '.join(COMPRESSIONS)}"
        raise DataError(f"{path}: cannot write {suffix!r} files; known: {known}")
    if path.is_dir():
        raise DataError(f"{path}: is an existing folder; remove it or give another name")
    with replacing(path) as temporary:
        return _WRITERS[plain](rows, temporary, schema, path)


@contextlib.contextmanager
def _text_file(temporary: Path, path: Path, newline: str) -> Iterator[IO[str]]:
    """Open the temporary file of `path` for text, compressed as the extension of `path` says."""
    with packed_writer(temporary, file_suffix(path)) as packed:
        file = io.TextIOWrapper(packed, encoding="utf-8", newline=newline)
        try:
            yield file
        finally:
            # Detaching flushes the text; the compressor, not this wrapper, closes the file.
            file.detach()


def _dump(row: Row, path: Path) -> str:
    try:
        return json.dumps(row, ensure_ascii=False, default=_of_numpy)
    except TypeError as error:
        raise DataError(f"{path}: JSON cannot hold a row ({error}); write .parquet instead") from error


def _of_numpy(value: Any) -> Any:
    """Return NumPy's arrays and numbers, which rows made by pandas hold, as JSON has them."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"a {type(value).__name__}")


def _write_jsonl(rows: Iterable[Row], temporary: Path, schema: pa.Schema | None, path: Path) -> int:
    count = 0
    with _text_file(temporary, path, "\n") as file:
        for row in rows:
            _write_text(file, _dump(row, path) + "\n")
            count += 1
    return count


def _write_json(rows: Iterable[Row], temporary: Path, schema: pa.Schema | None, path: Path) -> int:
    count = 0
    with _text_file(temporary, path, "\n") as file:
        for row in rows:
            _write_text(file, (",\n" if count else "[\n") + _dump(row, path))
            count += 1
        file.write("\n]\n" if count else "[]\n")
    return count


def _write_text(file: IO[str], text: str) -> None:
    """Write text as UTF-8, with each half surrogate pair as the escape by which JSON can hold it."""
    file.write(re.sub("[\ud800-\udfff]", lambda match: f"\\u{ord(match[0]):04x}", text))


def _write_csv(rows: Iterable[Row], temporary: Path, schema: pa.Schema | None, path: Path) -> int:
    rows = list(rows)
    columns = list(dict.fromkeys(column for row in rows for column in row))
    nested = [column for column in columns if any(isinstance(row.get(column), list | dict) for row in rows)]
    if nested:
        raise DataError(f"{path}: CSV cannot hold the nested columns {truncated_list(nested)}; write .jsonl instead")
    with _text_file(temporary, path, "") as file:
        writer = csv.DictWriter(file, columns, delimiter="\t" if plain_suffix(file_suffix(path)) == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)
    return len(rows)


def _tables(rows: Iterable[Row], schema: pa.Schema | None, path: Path) -> Iterator[pa.Table]:
    """Yield `rows` as Arrow tables of one schema; where none is given, all rows are read at once to infer it."""
    pa = need_pyarrow(path)
    rest = iter(rows)
    size = BATCH if schema is not None else None
    while True:
        batch = list(islice(rest, size))
        if batch or size is None:
            try:
                yield pa.Table.from_pylist(batch, schema=schema)
            except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
                raise DataError(
                    f"{path}: a column holds values of several types ({one_line(error)}); write .jsonl instead"
                ) from error
        if size is None or len(batch) < size:
            return


def _write_parquet(rows: Iterable[Row], temporary: Path, schema: pa.Schema | None, path: Path) -> int:
    need_pyarrow(path)
    import pyarrow.parquet as pq

    count = 0
    with contextlib.ExitStack() as stack:
        writer = None
        for table in _tables(rows, schema, path):
            if writer is None:
                writer = stack.enter_context(pq.ParquetWriter(temporary, table.schema))
            writer.write_table(table)
            count += len(table)
        # There are a schema and no rows.
        if writer is None:
            stack.enter_context(pq.ParquetWriter(temporary, schema))
    return count


def _write_arrow(rows: Iterable[Row], temporary: Path, schema: pa.Schema | None, path: Path) -> int:
    table = _one_table(rows, schema, path)
    pa = need_pyarrow(path)
    with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return len(table)


def _write_folder(rows: Iterable[Row], temporary: Path, schema: pa.Schema | None, path: Path) -> int:
    table = _one_table(rows, schema, path)
    need_datasets(str(path)).Dataset(table).save_to_disk(str(temporary))
    return len(table)


def _one_table(rows: Iterable[Row], schema: pa.Schema | None, path: Path) -> pa.Table:
    pa = need_pyarrow(path)
    tables = list(_tables(rows, schema, path))
    return pa.concat_tables(tables) if tables else schema.empty_table() if schema is not None else pa.table({})


_Writer = Callable[[Iterable[Row], Path, Any, Path], int]
_WRITERS: dict[str, _Writer] = {
    ".jsonl": _write_jsonl,
    ".json": _write_json,
    ".csv": _write_csv,
    ".tsv": _write_csv,
    ".parquet": _write_parquet,
    ".arrow": _write_arrow,
    "": _write_folder,
}
_TEXT_WRITERS = (".jsonl", ".json", ".csv", ".tsv")
