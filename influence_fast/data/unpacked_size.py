"""Bound the bytes that columns of repeated values take once each row has its own copy: a small file may hold
gigabytes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from influence_fast.errors import DataError

UNPACKED = 1 << 28  # bytes that any file may unpack to
# Beyond `UNPACKED`, a file may unpack to this many times its size.
RATIO = 100
# With the fields of nested columns; opening a file takes 0.3 ms and 25 kB for each.
MOST_COLUMNS = 2000
_BATCH = 1024  # rows at a time, at most


def check_columns(name: str, schema: Any) -> None:
    """Raise DataError for an Arrow schema of more columns, with all fields within them, than rows of text have.

    name: what the message calls the file.
    """
    count = 0
    fields = list(schema)
    while fields:
        count += len(fields)
        if count > MOST_COLUMNS:
            raise DataError(
                f"{name}: has more than {MOST_COLUMNS:,} columns and fields within them; write a file of those that "
                "are needed"
            )
        fields = [field.type.field(i) for field in fields for i in range(field.type.num_fields)]


def check_parquet(path: Path, file: Any) -> None:
    """Raise DataError where the texts of a parquet file unpack to far more than its size.

    A value that many rows share is stored once. What the metadata say bounds the size from above; only where that bound
    is too high are the rows read, so few at a time that they fit.

    Args:
        path: of the file.
        file: the open `pyarrow.parquet.ParquetFile`.
    """
    import pyarrow.parquet as pq

    check_columns(str(path), file.schema_arrow)
    size = path.stat().st_size
    limit = max(UNPACKED, RATIO * size)
    bound, largest = 0, 1
    columns: dict[str, None] = {}
    leaves: list[str] = []
    for group in map(file.metadata.row_group, range(file.metadata.num_row_groups)):
        for chunk in map(group.column, range(group.num_columns)):
            if chunk.physical_type in ("BYTE_ARRAY", "FIXED_LEN_BYTE_ARRAY") and chunk.has_dictionary_page:
                # no value is longer than all of the chunk
                bound += chunk.num_values * chunk.total_uncompressed_size
                # Values in the lists of one row.
                repeated = -(-chunk.num_values // max(1, group.num_rows))
                largest = max(largest, chunk.total_uncompressed_size * repeated)
                columns[chunk.path_in_schema.split(".")[0]] = None
                leaves.append(chunk.path_in_schema)
    if bound <= limit:
        return
    total = 0
    leaves = list(dict.fromkeys(leaves))
    # A value that is read as one of a dictionary is held once, in a row of very many values too.
    with pq.ParquetFile(path, memory_map=True, read_dictionary=leaves) as shared:
        for batch in shared.iter_batches(batch_size=max(1, min(_BATCH, limit // largest)), columns=list(columns)):
            total += sum(_unpacked(column) for column in batch.columns)
            if total > limit:
                raise _too_large(str(path), size, limit)


def check_table(name: str, table: Any) -> None:
    """Raise DataError where an Arrow table's dictionary columns unpack to far more than the table's own bytes.

    name: what the message calls it.
    """
    check_columns(name, table.schema)
    limit = max(UNPACKED, RATIO * table.nbytes)
    if sum(_unpacked(chunk) for column in table.columns for chunk in column.chunks) > limit:
        raise _too_large(name, table.nbytes, limit)


def _unpacked(array: Any) -> int:
    """Return the bytes of an Arrow array in which every row has its own value, in lists and fields too."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if not _holds_dictionary(array.type):
        return int(array.nbytes)
    kind = array.type
    if pa.types.is_struct(kind):
        return sum(_unpacked(array.field(i)) for i in range(kind.num_fields))
    if not pa.types.is_dictionary(kind):
        own = 8 * len(array)
        return own + (_unpacked(array.flatten()) if hasattr(array, "flatten") else int(array.nbytes))
    lengths = _lengths(array.dictionary)
    if lengths is None:
        return int(array.nbytes)
    return int(array.nbytes) + int(pc.sum(pc.take(lengths, array.indices)).as_py() or 0)


def _holds_dictionary(kind: Any) -> bool:
    """Return whether an Arrow type, or one within it, is of values that rows share."""
    import pyarrow as pa

    return pa.types.is_dictionary(kind) or any(_holds_dictionary(kind.field(i).type) for i in range(kind.num_fields))


def _lengths(values: Any) -> Any:
    """Return the bytes that each value of a dictionary takes, int64; None where all are of one small size."""
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = values.type
    if any(
        test(kind)
        for test in (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary)
    ):
        return pc.cast(pc.binary_length(values), pa.int64())
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return pa.array([values.slice(i, 1).flatten().nbytes for i in range(len(values))], pa.int64())
    return None


def _too_large(name: str, size: int, limit: int) -> DataError:
    return DataError(
        f"{name}: its {size:,} bytes unpack to more than {limit:,} bytes of repeated values; check what it holds, and "
        "make it anew"
    )
