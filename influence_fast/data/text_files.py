"""Text files of rows: JSON lines, JSON, CSV and TSV, compressed or not, in UTF-8 or another Unicode encoding."""

from __future__ import annotations

import bz2
import contextlib
import csv
import gzip
import io
import json
import lzma
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from influence_fast.errors import DataError, one_line

COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")

# First bytes of compressed files, which may have lost the end of their name.
_MAGIC = {b"\x1f\x8b\x08": ".gz", b"\xfd7zXZ\x00": ".xz", b"\x28\xb5\x2f\xfd": ".zst"}
_MAGIC |= {b"BZh%d1AY&SY" % level: ".bz2" for level in range(1, 10)}
_JSON_LINES = (".jsonl", ".ndjson", ".jsonlines")
_LINES = (".jsonl", ".csv", ".tsv")
_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_PIECE = 1 << 17  # bytes unpacked at a time
_UNPACKED = 1 << 28  # bytes that any packed file may hold
# Beyond `_UNPACKED`, a file may unpack to this many times its size.
_RATIO = 100
# Bytes of white space alone at a stretch; no file of rows has so many between two of them.
_BLANK = 1 << 22
# Keys of an object around the list of rows, in order of preference.
_ROW_KEYS = ("data", "rows", "examples")


def file_suffix(path: Path) -> str:
    """Return the extension that tells the format, in lower case: ".csv", or ".jsonl.gz" of a compressed file.

    That of .ndjson and .jsonlines is ".jsonl".
    """
    suffix = path.suffix.lower()
    if suffix in COMPRESSIONS:
        return file_suffix(Path(path.stem)) + suffix
    return ".jsonl" if suffix in _JSON_LINES else suffix


def plain_suffix(suffix: str) -> str:
    """Return an extension without that of a compression: ".jsonl" for ".jsonl.gz"."""
    return next((suffix.removesuffix(end) for end in COMPRESSIONS if suffix.endswith(end)), suffix)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[tuple[IO[bytes], str]]:
    """Open a text file for reading as (unpacked bytes, encoding).

    The encoding is that of the byte order mark or of the zero bytes that UTF-16 and UTF-32 have beside ASCII, else
    UTF-8. Raises DataError for a file that cannot be read or unpacked, at any time while it is open.
    """
    try:
        with _unpacked(path) as file:
            yield file, json.detect_encoding(file.peek(4)[:4])  # type: ignore[attr-defined]
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        why = (error.strerror if isinstance(error, OSError) else None) or one_line(error)
        raise DataError(f"{path}: cannot be read ({why}); check the file") from error


def _unpacked(path: Path) -> IO[bytes]:
    suffix = path.suffix.lower()
    if suffix not in COMPRESSIONS:
        with path.open("rb") as raw:
            start = raw.read(max(map(len, _MAGIC)))
        suffix = next((packed for magic, packed in _MAGIC.items() if start.startswith(magic)), suffix)
    if suffix == ".zst":
        packed = _zstandard(path).input_stream(str(path), compression="zstd")
        return io.BufferedReader(_Unpacking(packed, path), _PIECE)
    opener: Any = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}.get(suffix)
    if opener is None:
        return path.open("rb")
    return io.BufferedReader(_Unpacking(opener(path, "rb"), path), _PIECE)


class _Unpacking(io.RawIOBase):
    """The unpacked bytes of a compressed file, limited to what a file of its size may plausibly hold.

    Text of traces is packed to a third or a tenth; a few MB of zeros packed by thousands would fill the memory.
    """

    def __init__(self, file: Any, path: Path) -> None:
        self._file = file
        self._path = path
        self._blank = 0  # bytes, of UTF-16 too, since the last that are no white space
        self._left = max(_UNPACKED, _RATIO * path.stat().st_size)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        piece = self._file.read(len(buffer))
        self._left -= len(piece)
        self._blank = 0 if piece.strip(b" \t\r\n\0") else self._blank + len(piece)
        if self._blank > _BLANK:
            raise DataError(
                f"{self._path}: unpacks to more than {_BLANK:,} bytes of white space at a stretch; check what it "
                "holds, and leave out blank lines"
            )
        if self._left < 0:
            raise DataError(
                f"{self._path}: unpacks to more than {_RATIO} times its size; check what it holds, or unpack it"
            )
        buffer[: len(piece)] = piece
        return len(piece)

    def close(self) -> None:
        self._file.close()
        super().close()


def _zstandard(path: Path) -> Any:
    """Return pyarrow where it is installed with Zstandard. Raises DataError elsewhere."""
    try:
        import pyarrow
    except ImportError:
        pyarrow = None
    if pyarrow is None or not pyarrow.Codec.is_available("zstd"):
        raise DataError(f"{path}: a .zst file needs the pyarrow package with Zstandard; install it, or use .gz")
    return pyarrow


@contextlib.contextmanager
def packed_writer(path: Path, suffix: str) -> Iterator[IO[bytes]]:
    """Open `path` for writing bytes, compressed as `suffix` says. Equal bytes make equal files."""
    with contextlib.ExitStack() as stack:
        if suffix.endswith(".zst"):
            yield stack.enter_context(_zstandard(path).output_stream(str(path), compression="zstd"))
            return
        raw = stack.enter_context(path.open("wb"))
        if suffix.endswith(".gz"):
            yield stack.enter_context(gzip.GzipFile("", "wb", fileobj=raw, mtime=0))  # type: ignore[arg-type]
        elif suffix.endswith(".bz2"):
            yield stack.enter_context(bz2.BZ2File(raw, "wb"))
        elif suffix.endswith(".xz"):
            yield stack.enter_context(lzma.LZMAFile(raw, "wb"))
        else:
            yield raw


def has_lines(path: Path) -> bool:
    """Return whether `numbered_rows` can read the file: it has one row after the other and nothing around them."""
    suffix = plain_suffix(file_suffix(path))
    return suffix in _LINES or (suffix == ".json" and _is_json_lines(path))


def numbered_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (number of the line that ends it, row) for each row of a file that `has_lines`, without holding any.

    Raises DataError naming file and line: not valid JSON or CSV, wrong encoding, fields that do not fit the header.
    """
    suffix = plain_suffix(file_suffix(path))
    return _csv_rows(path, _DELIMITERS[suffix]) if suffix in _DELIMITERS else _json_rows(path)


def _text_lines(file: IO[bytes], encoding: str) -> Iterable[bytes | str]:
    """Return lines that end at line feeds only, UTF-8 still as bytes, so that a decoding error has its line."""
    if encoding.startswith("utf-8"):
        return file
    return io.TextIOWrapper(file, encoding, newline="\n")


def _json_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with opened(path) as (file, encoding):
        number = 0
        try:
            for number, raw in enumerate(_text_lines(file, encoding), start=1):
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8") if isinstance(raw, bytes) else raw
                if not line.strip():
                    continue
                yield number, _object(path, number, line)
        except UnicodeDecodeError as error:
            at = number if encoding.startswith("utf-8") else number + 1
            raise DataError(
                f"{path}, line {at}: is not valid {encoding.upper()} ({error}); save it as UTF-8"
            ) from error


class _RepeatedKeyError(Exception):
    """An error for a JSON object that repeats a key, of which a parser keeps the last value."""


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise _RepeatedKeyError(f"has the key {next(name for name in names if names.count(name) > 1)!r} twice")
    return found


def _object(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line, object_pairs_hook=_without_repeats)
    except _RepeatedKeyError as error:
        raise DataError(f"{path}, line {number}: {error}; leave one of them") from error
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{path}, line {number}: is not valid JSON ({_why(error)}); each line must be one object"
        ) from error
    if not isinstance(row, dict):
        raise DataError(f"{path}, line {number}: is a {type(row).__name__}; each line must be one JSON object")
    return row


def _why(error: Exception) -> str:
    return "nested too deeply" if isinstance(error, RecursionError) else one_line(error)


def _csv_rows(path: Path, delimiter: str) -> Iterator[tuple[int, dict[str, Any]]]:
    # The default limit of 128 KiB is shorter than a long trace.
    csv.field_size_limit(sys.maxsize)
    with opened(path) as (file, encoding):
        text = io.TextIOWrapper(file, "utf-8-sig" if encoding == "utf-8" else encoding, newline="")
        reader = csv.DictReader(text, delimiter=delimiter)
        try:
            _check_header(path, reader.fieldnames or ())
            for row in reader:
                if None in row or None in row.values():
                    raise DataError(
                        f"{path}, line {reader.line_num}: does not have the header's "
                        f"{len(reader.fieldnames or [])} fields; quote fields that hold commas, tabs or line breaks"
                    )
                yield reader.line_num, row
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataError(
                f"{path}, line {reader.line_num + 1}: is not valid CSV ({error}); save it as UTF-8"
            ) from error


def _check_header(path: Path, names: Sequence[str]) -> None:
    if len(set(names)) < len(names):
        twice = next(name for i, name in enumerate(names) if name in names[:i])
        raise DataError(f"{path}: the header has the column {twice!r} twice; rename or remove one of them")


def _is_json_lines(path: Path) -> bool:
    """Return whether a .json file holds one object a line, as files of that name often do.

    Its first line must be an object, and more lines must follow.
    """
    with opened(path) as (file, encoding):
        try:
            lines = (line for line in io.TextIOWrapper(file, encoding, newline="\n") if line.strip())
            first, second = next(lines, ""), next(lines, None)
            return second is not None and isinstance(json.loads(first), dict)
        except (ValueError, RecursionError):
            # Errors of the encoding are ValueErrors too.
            return False


def json_document(path: Path, split: str) -> list[dict[str, Any]]:
    """Read a .json file that is one list of objects, or one object around such a list.

    Of several lists the object holds, the one called `split` is taken, else "data", "rows" or "examples". An object
    without one is a single row.

    Raises DataError: not valid JSON, entries that are no objects, several lists that none of the names tells apart.
    """
    with opened(path) as (file, encoding):
        raw = file.read()
    try:
        found = json.loads(raw.decode(encoding), object_pairs_hook=_without_repeats) if raw.strip() else []
    except _RepeatedKeyError as error:
        raise DataError(f"{path}: {error}; leave one of them") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: is not valid JSON ({_why(error)}); it must be one list of objects") from error
    rows = _rows_within(path, found, split) if isinstance(found, dict) else found
    if not isinstance(rows, list):
        raise DataError(f"{path}: is a {type(rows).__name__}; it must be one list of objects")
    for i, row in enumerate(rows):
        if not isinstance(row, dict):
            raise DataError(f"{path}, row {i}: is a {type(row).__name__}; each must be a JSON object")
    return rows


def _rows_within(path: Path, found: dict[str, Any], split: str) -> list[Any]:
    lists = [key for key, value in found.items() if _is_rows(value)]
    named = [key for key in (split, *_ROW_KEYS) if _is_objects(found.get(key))]
    if named or len(lists) == 1:
        rows: list[Any] = found[named[0] if named else lists[0]]
        return rows
    if lists:
        raise DataError(f"{path}: holds several lists of rows ({', '.join(lists)}); name one as the split")
    return [found]


def _is_rows(value: Any) -> bool:
    """Return whether a value is a list of rows, and not of messages, which is a cell of a row."""
    return _is_objects(value) and not any(
        "role" in item or "from" in item or item.get("type") == "text" for item in value
    )


def _is_objects(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)
