"""Merges and appends gradient stores by copying whole shards, each checked against its record on the way."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from influence_fast.errors import StoreError, truncated_list
from influence_fast.store.identity import StoreIdentity
from influence_fast.store.ids import check_unique, read_ids
from influence_fast.store.manifest import Manifest, ShardRecord, file_name, joined_fingerprint
from influence_fast.store.reader import Store, open_store
from influence_fast.store.verification import fitted_sketch
from influence_fast.store.writer import StoreWriter, load_records

__all__ = ["append_store", "merge_stores"]


def merge_stores(paths: Sequence[str | Path], out: str | Path) -> Store:
    """Make one store of several: the shards of each, in order, copied and checked.

    Stores that are pieces of one build (the same work, each with its own shards: `build_shards` into separate
    folders) become that build, in the dataset's order. Otherwise each must be finished, and the rows of the
    first come first. Going on with an interrupted merge is running it again.

    Args:
        paths: folders of the stores, in the order that their rows are to have.
        out: a new folder, or that of an interrupted merge of the same stores.

    Returns:
        The finished store.

    Raises:
        StoreError: made with another model, adapter, tokenizer, projection, dtype or layout (the message names the
            field and both sides); an id in two of them; shards missing, changed or damaged.

    Example:
        >>> inf.merge_stores(["part-0", "part-1"], "whole")  # doctest: +SKIP
    """
    folders = [Path(path) for path in paths]
    if not folders:
        raise StoreError("nothing to merge: give at least one store")
    manifests = [Manifest.load(folder) for folder in folders]
    first = manifests[0]
    for folder, manifest in zip(folders[1:], manifests[1:], strict=True):
        _check_alike(first, manifest, folder)
    plan: list[tuple[Path, ShardRecord]] = []
    if len(folders) > 1 and all(manifest.parts == first.parts for manifest in manifests):
        plan = _pieces(folders, manifests)
        merged = replace(first, row_count=None, shards=None)
    else:
        for folder, manifest in zip(folders, manifests, strict=True):
            open_store(folder)  # finished, whole
            records = load_records(folder, manifest)
            plan += [(folder, records[index]) for index in range(manifest.shard_count)]
        merged = _joined(manifests)
    check_unique((i for folder, record in plan for i in read_ids(folder, record)), "the merged store")
    writer = StoreWriter(out, merged, sketch=fitted_sketch(folders[0], first))  # all have one, as their identities say
    for index in writer.pending():
        writer.copy_shard(index, *plan[index])
    return writer.finalize()


def append_store(path: str | Path, other: str | Path) -> Store:
    """Add the rows of the finished store `other` behind those of the finished store `path`.

    Until the last step `path` stays the store it was; an interrupted append is run again. Raises StoreError as
    `merge_stores` does.
    """
    folder, source = Path(path), Path(other)
    store, addition = open_store(folder), open_store(source)
    _check_alike(store.manifest, addition.manifest, source)
    check_unique([*store.ids, *addition.ids], f"{folder} with {source}")
    writer = StoreWriter(folder, store.manifest)
    offset = store.manifest.shard_count
    records = load_records(source, addition.manifest)
    writer.extend(_joined([store.manifest, addition.manifest]))
    for index in range(addition.manifest.shard_count):
        writer.copy_shard(offset + index, source, records[index])
    return writer.finalize()


def _check_alike(first: Manifest, other: Manifest, where: Path) -> None:
    """Check that rows of both can stand in one store: same identity but for the dataset, same layout."""

    def comparable(manifest: Manifest) -> Manifest:
        identity = replace(manifest.identity, dataset_fingerprint=None)
        return replace(manifest, identity=identity, parts=(), row_count=None, shards=None)

    a, b = comparable(first), comparable(other)
    b.check_same_work(a, where)
    a.identity.check(b.identity, where)  # the other way round, for what only one side knows
    if a.identity.projection_kind == "unknown" and a.source != b.source:
        warnings.warn(
            f"{where}: its rows are of {b.source!r}, those before of {a.source!r}, and neither says by which model and "
            "projection: scores over both mean something only if these are the same",
            stacklevel=3,
        )


def _pieces(folders: list[Path], manifests: list[Manifest]) -> list[tuple[Path, ShardRecord]]:
    found: dict[int, tuple[Path, ShardRecord]] = {}
    for folder, manifest in zip(folders, manifests, strict=True):
        for index, record in load_records(folder, manifest).items():
            if index in found and found[index][1].checksum != record.checksum:
                raise StoreError(
                    f"{file_name('shard', index)} differs between {found[index][0]} and {folder}: "
                    "the same examples gave other rows; keep one of the two"
                )
            found.setdefault(index, (folder, record))
    missing = [str(i) for i in range(manifests[0].shard_count) if i not in found]
    if missing:
        raise StoreError(f"shards {truncated_list(missing)} are in none of the stores; finish them first")
    return [found[index] for index in range(manifests[0].shard_count)]


def _joined(manifests: list[Manifest]) -> Manifest:
    first = manifests[0]
    parts = tuple(part for manifest in manifests for part in manifest.parts)
    sources = dict.fromkeys(manifest.source for manifest in manifests)
    identity: StoreIdentity = replace(first.identity, dataset_fingerprint=joined_fingerprint(parts))
    return replace(first, identity=identity, parts=parts, source=" + ".join(sources), row_count=None, shards=None)
