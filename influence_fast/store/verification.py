"""What is wrong with the files of a store, and the fitted sketch that its manifest names."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from pathlib import Path

from influence_fast.errors import StoreError, one_line
from influence_fast.gradients.rows.eigen_sketch import MEND, EigenSketch, file_of
from influence_fast.store.checksums import damage
from influence_fast.store.ids import UniqueIds, read_ids
from influence_fast.store.manifest import REBUILD, Manifest, ShardRecord, file_name, inside


def verify_store(path: str | Path) -> list[str]:
    """Read every byte of a finished store and return what is wrong, a line a file (an empty list: all is well).

    Raises StoreError when there is no readable manifest to check against.
    """
    folder = Path(path)
    manifest = Manifest.load(folder)
    if not manifest.complete:
        return [f"{folder} is not finished; run the same build again to finish it"]
    problems = []
    try:
        fitted_sketch(folder, manifest)
    except StoreError as error:
        problems.append(str(error))
    rows, seen = 0, UniqueIds()
    for index, fingerprint in enumerate(manifest.fingerprints()):
        try:
            record = ShardRecord.load(folder, index, manifest, fingerprint)
            wrong = wrong_files(folder, manifest, record)
            if not wrong:
                wrong = [f"{problem}; {REBUILD}" for problem in damage(folder, record)]
            if not wrong:
                seen.add(read_ids(folder, record))
            problems += wrong
            rows += record.rows
        except StoreError as error:
            problems.append(str(error))
    if not problems and rows != manifest.row_count:
        problems.append(f"{folder}: the manifest says {manifest.row_count} rows, the shards hold {rows}")
    if not problems:
        problems += _repeated(folder, manifest, seen)
    known = {file_name("shard", index) for index in range(manifest.shard_count)}
    problems += [
        f"{extra} is not in the manifest (an append that did not finish?); append again, or delete it"
        for extra in sorted(folder.glob("shard-*.json"))
        if extra.name not in known
    ]
    return problems


def fitted_sketch(folder: Path, manifest: Manifest) -> EigenSketch | None:
    """Return the fitted sketch that the manifest of the store in `folder` names, if any.

    Raises StoreError: its file is missing, damaged or another's.
    """
    fingerprint = manifest.identity.projection_sketch
    if fingerprint is None:
        return None
    path = inside(folder, file_of(fingerprint))
    if path.exists() and not path.is_file():  # reading a pipe would wait for ever
        raise StoreError(f"{path} is no file; {MEND}")
    try:
        sketch = EigenSketch.load(path)
    except (RuntimeError, TypeError, ValueError, LookupError, AttributeError) as error:
        raise StoreError(f"{path} is damaged ({one_line(error)}); {MEND}") from None
    if sketch.fingerprint != fingerprint:
        raise StoreError(f"{path} is not the one that the rows were made by; {MEND}")
    return sketch


def wrong_files(folder: Path, manifest: Manifest, record: ShardRecord) -> list[str]:
    """Return what is wrong with a shard's record and the sizes of its files, a line each, reading none of them."""
    return [*_listed(folder, manifest, record), *_sizes(folder, record)]


def _repeated(folder: Path, manifest: Manifest, seen: UniqueIds) -> list[str]:
    """Return what is wrong where an id names two rows of a store whose files are otherwise as written."""

    def again() -> Iterator[str]:
        for index, fingerprint in enumerate(manifest.fingerprints()):
            yield from read_ids(folder, ShardRecord.load(folder, index, manifest, fingerprint))

    try:
        seen.check(again, str(folder))
    except StoreError as error:
        return [str(error)]
    return []


def _listed(folder: Path, manifest: Manifest, record: ShardRecord) -> Iterator[str]:
    name = file_name("shard", record.index)
    if manifest.shards is not None and manifest.shards[record.index] != record.checksum:
        yield f"{folder / name} is foreign: it is not the record that the manifest lists; {REBUILD}"


def _sizes(folder: Path, record: ShardRecord) -> Iterator[str]:
    for entry in record.files.values():
        path = inside(folder, entry.name)
        try:
            found = path.stat()
            size = found.st_size if stat.S_ISREG(found.st_mode) else -1
        except OSError:
            yield f"{path} is missing; {REBUILD}"
            continue
        if size != entry.bytes:
            how = "truncated" if size < entry.bytes else "too long"
            yield f"{path} is {how}: {size} bytes instead of {entry.bytes}; {REBUILD}"
