"""SHA-256 of a store's files; a large one that has not changed since is not read again by the same process."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path

from influence_fast.errors import StoreError
from influence_fast.store.manifest import FileRecord, ShardRecord, inside

_CHUNK = 1 << 24
_MOST_KNOWN = 100_000
# A file that was changed less than this many seconds ago may be changed again without another time stamp.
_SETTLED = 2.0
_known: dict[tuple[int, int, int, int, int], str] = {}  # by what `_state` tells of a file: its SHA-256


def checksum(path: Path) -> str:
    """Return the SHA-256 of a file in hex, reading it unless this process has, and it is the same file since.

    The same is: device, inode, size and the times of its last change (`mtime` and `ctime`, in nanoseconds).
    Raises OSError.
    """
    before = _state(path)
    if before in _known:
        return _known[before]
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while chunk := handle.read(_CHUNK):
            digest.update(chunk)
    if _state(path) == before and time.time() - max(before[3:]) / 1e9 > _SETTLED:
        if len(_known) >= _MOST_KNOWN:
            _known.clear()
        _known[before] = digest.hexdigest()
    return digest.hexdigest()


def _state(path: Path) -> tuple[int, int, int, int, int]:
    found = os.stat(path)
    _check_regular(found)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _check_regular(found: os.stat_result) -> None:
    """Raise OSError for a folder, and for a pipe or device, which might be read for ever."""
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "it is no file")


def read_checked(folder: Path, entry: FileRecord, remedy: str) -> bytes:
    """Return all bytes of a small file. Raises StoreError: they cannot be read, or are not those that were written."""
    path = inside(folder, entry.name)
    try:
        _check_regular(path.stat())
        data = path.read_bytes()
    except OSError as error:
        raise StoreError(f"{path} cannot be read ({error.strerror}); {remedy}") from None
    if hashlib.sha256(data).hexdigest() != entry.sha256:
        raise StoreError(f"{path} is not what was written (its checksum differs); {remedy}")
    return data


def damage(folder: Path, record: ShardRecord) -> Iterator[str]:
    """Yield a line for each file of a shard whose bytes are not those that were written; reads them all."""
    for entry in record.files.values():
        problem = file_damage(folder, entry)
        if problem:
            yield problem


def file_damage(folder: Path, entry: FileRecord) -> str | None:
    """Return what is wrong with the bytes of a file, or None. Raises StoreError: it leads out of the folder."""
    path = inside(folder, entry.name)
    try:
        found = checksum(path)
    except OSError as error:
        return f"{path} cannot be read ({error.strerror})"
    return None if found == entry.sha256 else f"{path} is not what was written (its checksum differs)"
