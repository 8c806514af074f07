"""The ids of a store's rows: strings, each of one row."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from influence_fast.errors import StoreError, one_line, truncated_list
from influence_fast.store.checksums import read_checked
from influence_fast.store.identity import short
from influence_fast.store.manifest import REBUILD, ShardRecord


def read_ids(folder: Path, record: ShardRecord) -> list[str]:
    """Return the ids of one shard's rows, checked against its record. Raises StoreError: they are not as written."""
    entry = record.files["ids"]
    path = folder / entry.name
    lines = read_checked(folder, entry, REBUILD).splitlines()
    if len(lines) != record.rows:
        raise StoreError(f"{path} has {len(lines)} ids for {record.rows} rows; {REBUILD}")
    try:
        ids = [json.loads(line) for line in lines]
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{path} holds a line that is no id ({one_line(error)}); {REBUILD}") from None
    wrong = next((place for place, name in enumerate(ids) if not isinstance(name, str)), None)
    if wrong is not None:
        raise StoreError(f"{path}, line {wrong + 1}: the id is {short(ids[wrong])}, which is no string; {REBUILD}")
    return ids


def check_unique(ids: Iterable[str], where: str) -> None:
    """Raise StoreError naming the ids that come more than once."""
    double = [name for name, count in Counter(ids).items() if count > 1]
    if double:
        raise StoreError(
            f"{where}: an id must name one example, but these come more than once: {truncated_list(double)}"
        )


class UniqueIds:
    """Do as `check_unique` for ids that are too many to keep: 8 bytes each, and another look where hashes agree."""

    def __init__(self) -> None:
        self._hashes = array("Q")

    def add(self, ids: Iterable[str]) -> None:
        self._hashes.extend(_id_hash(name) for name in ids)

    def check(self, again: Callable[[], Iterable[str]], where: str) -> None:
        """Raise as `check_unique`; `again()` are the ids once more, asked for only when some may be repeated."""
        ordered = np.sort(np.array(self._hashes, np.uint64))
        repeated = set(ordered[1:][ordered[1:] == ordered[:-1]].tolist())
        if repeated:
            check_unique((name for name in again() if _id_hash(name) in repeated), where)


def _id_hash(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")
