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
_BATCH = 1024  # rows at a time, at most


def check_parquet(path: Path, file: Any) -> None:
    """Raise DataError where the texts of a parquet file unpack to far more than its size.

    A value that many rows share is stored once. What the metadata say bounds the size from above; only where that bound
    is too high are the rows read, so few at a time that they fit.

    Args:
        path: of the file.
        file: the open `pyarrow.parquet.ParquetFile`.
    """
    size = path.stat().st_size
    limit = max(UNPACKED, RATIO * size)
    bound, largest = 0, 1
    columns: dict[str, None] = {}
    for group in map(file.metadata.row_group, range(file.metadata.num_row_groups)):
        for chunk in map(group.column, range(group.num_columns)):
            if chunk.physical_type in ("BYTE_ARRAY", "FIXED_LEN_BYTE_ARRAY") and chunk.has_dictionary_page:
                # no value is longer than all of the chunk
                bound += chunk.num_values * chunk.total_uncompressed_size
                # Values in the lists of one row.
                repeated = -(-chunk.num_values // max(1, group.num_rows))
                largest = max(largest, chunk.total_uncompressed_size * repeated)
                columns[chunk.path_in_schema.split(".")[0]] = None
    if bound <= limit:
        return
    total = 0
    for batch in file.iter_batches(batch_size=max(1, min(_BATCH, limit // largest)), columns=list(columns)):
        total += sum(_unpacked(column) for column in batch.columns)
        if total > limit:
            raise _too_large(str(path), size, limit)


def check_table(name: str, table: Any) -> None:
    """Raise DataError where an Arrow table's dictionary columns unpack to far more than the table's own bytes.

    name: what the message calls it.
    """
    limit = max(UNPACKED, RATIO * table.nbytes)
    if sum(_unpacked(chunk) for column in table.columns for chunk in column.chunks) > limit:
        raise _too_large(name, table.nbytes, limit)


def _unpacked(array: Any) -> int:
    """Return the bytes of an Arrow array in which every row has its own copy of its value."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if not pa.types.is_dictionary(array.type):
        return int(array.nbytes)
    values = array.dictionary
    if not (
        pa.types.is_large_string(values.type) or pa.types.is_string(values.type) or pa.types.is_binary(values.type)
    ):
        return int(array.nbytes)
    lengths = pc.cast(pc.binary_length(values), pa.int64())
    return int(array.nbytes) + int(pc.sum(pc.take(lengths, array.indices)).as_py() or 0)


def _too_large(name: str, size: int, limit: int) -> DataError:
    return DataError(
        f"{name}: its {size:,} bytes unpack to more than {limit:,} bytes of repeated values; check what it holds, and "
        "make it anew"
    )
