"""Read the rows of a dataset unchanged: from a hub id, a file, a folder or memory.

Nothing here knows what a prompt is (schemas.py does). A pruned dataset is made of the original rows, every
column included, so they are kept and not rebuilt from examples.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from influence_fast.data.text_files import COMPRESSIONS, file_suffix, has_lines, json_document, numbered_rows
from influence_fast.data.unpacked_size import check_columns, check_parquet, check_table
from influence_fast.errors import DataError, InfluenceFastError, did_you_mean, one_line, setting
from influence_fast.guards import check_no_pipe, reading

if TYPE_CHECKING:
    import pyarrow as pa

Row = dict[str, Any]

# Rows turned into Python objects at a time; few, since traces are long.
BATCH = 256
# Files in a folder that is searched for a dataset.
_MOST_FILES = 10_000
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?(:[\w.-]+)?")


class Rows(Sequence[Row]):
    """The rows of one source, in order; Arrow data stays in (memory-mapped) Arrow until a row is read.

    `name` is what messages call the source, `suffix` the file extension that keeps its format (`""` for a
    folder saved by `datasets`), `schema` the Arrow schema where the source has one.
    """

    def __init__(self, data: list[Row] | pa.Table, name: str, suffix: str, lines: Sequence[int] | None = None) -> None:
        self.name = name
        self.suffix = suffix
        self._data = data
        self._lines = lines
        self.schema: pa.Schema | None = None if isinstance(data, list) else data.schema
        names = [] if self.schema is None else list(self.schema.names)
        repeated = next((column for column in names if names.count(column) > 1), None)
        if repeated is not None:
            raise DataError(f"{name}: has the column {repeated!r} twice; rename or remove one of them")

    def __len__(self) -> int:
        return len(self._data)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if isinstance(self._data, list):
            return self._data[index]
        i = range(len(self))[index]
        return self._from_arrow(self._data.slice(i, 1), i)[0]

    def __iter__(self) -> Iterator[Row]:
        return self.read()

    def read(self, columns: Iterable[str] | None = None) -> Iterator[Row]:
        """Yield the rows in order; with `columns`, an Arrow source reads no others (the rest may be many GB)."""
        if isinstance(self._data, list):
            yield from self._data
            return
        table = self._data
        if columns is not None:
            wanted = set(columns)
            table = table.select([column for column in table.column_names if column in wanted])
        first = 0
        for batch in table.to_batches(max_chunksize=BATCH):
            yield from self._from_arrow(batch, first)
            first += len(batch)

    def _from_arrow(self, part: pa.Table | pa.RecordBatch, first: int) -> list[Row]:
        """Return rows from `first` on as Python objects; raises DataError naming a cell that Python cannot hold."""
        try:
            found: list[Row] = part.to_pylist()
            return found
        except Exception as error:
            # Python cannot hold dates beyond year 9999, text that is not UTF-8, repeated field names, and more.
            for index in range(len(part)):
                for column in part.schema.names:
                    self._check_cell(part.column(column)[index], f"{self.place(first + index)}: column {column!r}")
            raise DataError(
                f"{self.name}: a row cannot be read ({one_line(error, 120)}); write the file anew"
            ) from error

    @staticmethod
    def _check_cell(cell: Any, place: str) -> None:
        try:
            cell.as_py()
        except UnicodeDecodeError as error:
            raise DataError(f"{place} holds text that is not UTF-8 ({one_line(error, 120)}); encode it anew") from error
        except Exception as error:
            raise DataError(
                f"{place} holds a {cell.type} that Python has no value for ({one_line(error, 120)}); convert the "
                "column to text or numbers"
            ) from error

    def validate(self) -> None:
        """Raise pyarrow's error where an Arrow table's buffers contradict each other; this reads all of them."""
        if not isinstance(self._data, list):
            self._data.validate(full=True)

    def check_size(self) -> None:
        """Raise DataError where repeated values of an Arrow table take far more memory than the table itself."""
        if not isinstance(self._data, list):
            check_table(self.name, self._data)

    @property
    def columns(self) -> list[str]:
        """Return the column names; those of the first row where the format does not fix them."""
        if not isinstance(self._data, list):
            return list(self._data.column_names)
        return list(self._data[0]) if self._data else []

    def place(self, index: int) -> str:
        """Return where row `index` is, for a message: `data.jsonl, line 7` or `data.parquet, row 6`."""
        if self._lines is not None:
            return f"{self.name}, line {self._lines[index]}"
        return f"{self.name}, row {index}"


# ---- reading ---------------------------------------------------------------------------------------------


def load_rows(source: Any, *, split: str = "train") -> Rows:
    """Load the rows of a dataset, without interpreting them.

    `source`: a hub id (`openai/gsm8k:main` names the configuration after a colon), a local .jsonl (or .ndjson), .json,
    .csv, .tsv (each also with .gz, .bz2, .xz or .zst after it), .parquet or .arrow file, a folder saved by
    `save_to_disk`, a `datasets.Dataset` or `DatasetDict`, a pandas data frame, a list of dicts, or `Rows` (returned
    unchanged). `split` chooses within a hub dataset, a folder, a `DatasetDict` or a JSON object of several lists; any
    other file or list has no splits. Local files need no `datasets` package.

    Raises DataError: source not found, unreachable or malformed (with the line), unknown split, no rows.
    """
    with reading(source if isinstance(source, str | os.PathLike) else f"the {type(source).__name__} given"):
        rows = _load(source, split)
        rows.check_size()
    if len(rows) == 0:
        raise DataError(f"{rows.name}: there are no rows in it; give a source with at least one example")
    return rows


def _load(source: Any, split: str) -> Rows:
    if isinstance(source, Rows):
        return source
    if isinstance(source, str | os.PathLike):
        return _load_named(os.fspath(source), split)
    if hasattr(source, "with_format"):
        return _from_datasets(source, split, "the dataset given", ".parquet")
    if hasattr(source, "to_dict") and hasattr(source, "columns"):
        return _from_frame(source)
    if isinstance(source, Sequence):
        rows = list(source)
        for i, row in enumerate(rows):
            if not isinstance(row, dict):
                raise DataError(f"the list given, row {i}: is a {type(row).__name__}, give dicts of columns")
        return Rows(rows, "the list given", ".jsonl")
    raise DataError(
        f"cannot read examples from a {type(source).__name__}; give a path, a hub id, a datasets.Dataset, "
        "a data frame or a list of dicts"
    )


def _from_frame(frame: Any) -> Rows:
    """Return the rows of a pandas or polars data frame, without an index; NaN and NA become None."""
    name = "the data frame given"
    columns = list(frame.columns)
    odd = next((column for column in columns if not isinstance(column, str) or columns.count(column) > 1), None)
    if odd is not None:
        raise DataError(f"{name}: the column name {odd!r} is no text or comes twice; rename the columns")
    records = frame.to_dicts() if hasattr(frame, "to_dicts") else frame.to_dict("records")
    rows = [{column: _plain(value) for column, value in row.items()} for row in records]
    return Rows(rows, name, ".jsonl")


def _plain(value: Any) -> Any:
    """Return a data frame's cell in plain Python: lists for arrays, NumPy's numbers as numbers, None if missing."""
    if type(value).__name__ in ("NAType", "NaTType") or (isinstance(value, float) and value != value):
        return None
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return _plain(value.tolist()) if hasattr(value, "tolist") else value


def _load_named(source: str, split: str) -> Rows:
    path = Path(source).expanduser()
    suffix = file_suffix(path)
    check_no_pipe(path)
    if os.path.isdir(path):
        return _load_folder(path, split)
    if os.path.isfile(path):
        if suffix not in _READERS:
            raise DataError(f"{path}: unknown file type {suffix!r}; known: {_KNOWN}")
        try:
            return _READERS[suffix](path, split)
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror or error}); check the file") from error
    check_hub_id(source)
    return _load_hub(source, split)


def check_hub_id(source: str) -> None:
    """Raise DataError for a source that is not on this machine and cannot be the id of a dataset either."""
    if file_suffix(Path(source)) in _READERS or not _HUB_ID.fullmatch(source):
        raise DataError(f"{source}: no such file or folder; check the path (from {Path.cwd()})")


def _read_lines(path: Path, split: str) -> Rows:
    numbers, rows = [], []
    for number, row in numbered_rows(path):
        numbers.append(number)
        rows.append(row)
    return Rows(rows, str(path), file_suffix(path), numbers)


def _read_json(path: Path, split: str) -> Rows:
    """Read a .json file: a list of objects, an object around one, or, as is common too, one object a line."""
    if has_lines(path):
        return _read_lines(path, split)
    return Rows(json_document(path, split), str(path), file_suffix(path))


def _read_parquet(path: Path, split: str) -> Rows:
    pa = need_pyarrow(path)
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path, memory_map=True) as file:
            check_row_count(path, file.metadata.num_rows)
            check_parquet(path, file)
        return Rows(pq.read_table(path, memory_map=True), str(path), ".parquet")
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: is not a readable parquet file ({one_line(error)}); make it anew") from error


def check_row_count(path: Path, rows: int) -> None:
    """Raise DataError for a parquet file that claims more rows than its bytes can hold any text of.

    Columns of one value are packed to nothing: a file of 2 kB may have a billion nulls, which fill the memory.
    """
    size = path.stat().st_size
    if rows > max(10_000_000, 10 * size):
        raise DataError(
            f"{path}: says that it has {rows:,} rows in {size:,} bytes; check what it holds, and make it anew"
        )


def _read_arrow(path: Path, split: str) -> Rows:
    """Read an Arrow IPC file: the stream format (what `datasets` writes) or the file format (Feather 2)."""
    pa = need_pyarrow(path)
    try:
        mapped = pa.memory_map(str(path))
        try:
            reader = pa.ipc.open_file(mapped)
        except pa.ArrowInvalid:
            mapped.seek(0)
            reader = pa.ipc.open_stream(mapped)
        check_columns(str(path), reader.schema)
        table = reader.read_all()
        # pyarrow would follow an offset that leads out of the file.
        table.validate(full=True)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: is not a readable arrow file ({one_line(error)}); make it anew") from error
    return Rows(table, str(path), ".arrow")


_READERS: dict[str, Callable[[Path, str], Rows]] = {
    ".jsonl": _read_lines,
    ".json": _read_json,
    ".csv": _read_lines,
    ".tsv": _read_lines,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
}
_READERS |= {
    suffix + packed: _READERS[suffix] for suffix in (".jsonl", ".json", ".csv", ".tsv") for packed in COMPRESSIONS
}
_KNOWN = f".jsonl, .json, .csv, .tsv (also with {', '.join(COMPRESSIONS)}), .parquet, .arrow"


def _load_folder(path: Path, split: str) -> Rows:
    check_folder(path)
    saved = any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))
    if not saved:
        # load_dataset also reads a cloned dataset repository.
        return _load_hub(str(path), split)
    datasets = need_datasets(str(path))
    try:
        rows = _from_datasets(datasets.load_from_disk(str(path)), split, str(path), "")
        rows.validate()
        return rows
    except InfluenceFastError:
        raise
    except Exception as error:
        raise DataError(f"{path}: cannot be read as a saved dataset ({one_line(error)}); save it anew") from error


def check_folder(path: Path) -> None:
    """Raise DataError for a folder that is empty or no dataset's: the loaders look at every file in it."""
    files = 0
    for place, folders, names in os.walk(path):
        folders[:] = [name for name in folders if not name.startswith(".")]
        seen = [name for name in names if not name.startswith(".")]
        files += len(seen) + len(folders)
        if files > _MOST_FILES:
            raise DataError(
                f"{path}: holds more than {_MOST_FILES:,} files and folders, which no dataset does; give the folder of "
                "one, or one of its files"
            )
        for name in seen:
            check_no_pipe(os.path.join(place, name))
    if files == 0:
        raise DataError(f"{path}: the folder is empty; give a file, or a folder with a dataset in it")


def _load_hub(source: str, split: str) -> Rows:
    datasets = need_datasets(source)
    name, config = (source, None) if os.path.isdir(source) else _split_config(source)
    try:
        loaded = datasets.load_dataset(name, config, split=split)
    except Exception as error:
        if os.path.isdir(source):
            raise DataError(
                f"{source}: the folder cannot be read as a dataset ({type(error).__name__}: {one_line(error)}); "
                f"give one of its files ({_KNOWN})"
            ) from error
        raise DataError(
            f"{source}: is no local file, and could not be loaded from the hub "
            f"({type(error).__name__}: {one_line(error)}); check the id (owner/name:configuration) and the "
            "network, or give a local file"
        ) from error
    return _from_datasets(loaded, split, source, ".parquet")


def _split_config(source: str) -> tuple[str, str | None]:
    name, _, config = source.partition(":")
    return name, config or None


def _from_datasets(loaded: Any, split: str, name: str, suffix: str) -> Rows:
    """Return the rows in the Arrow table of a `datasets.Dataset`, or of one split of a `DatasetDict`."""
    if isinstance(loaded, dict):
        if split not in loaded:
            known = did_you_mean(split, loaded)
            raise DataError(f"{name}: has no split {split!r}; {known}; name one by {setting('split', '...')}")
        loaded = loaded[split]
    if not hasattr(loaded, "column_names") or not hasattr(loaded, "__len__"):
        raise DataError(f"{name}: is a streamed dataset; load it without streaming=True")
    return Rows(loaded.with_format("arrow")[:], name, suffix)


def need_datasets(source: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"{source}: reading it needs the datasets package; install it (pip install datasets) or give a "
            "local .jsonl or .parquet file"
        ) from error
    return datasets


def need_pyarrow(path: Path) -> Any:
    try:
        import pyarrow
    except ImportError as error:
        raise DataError(
            f"{path}: this format needs the pyarrow package; install it (pip install pyarrow) or use .jsonl"
        ) from error
    return pyarrow
