"""Writes gradient stores: shards that are whole or absent, whatever interrupts the writing.

Order of a shard: each file to a temporary name, fsync, rename; fsync of the folder; then the record, written the
same way. So a record proves that its shard's bytes are on disk, and several processes can write different shards of
one store without a lock. The manifest is created once and rewritten once, by `finalize`.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from safetensors import SafetensorError

from influence_fast.atomic import replacing
from influence_fast.errors import NumericError, StoreError, truncated_list
from influence_fast.gradients.rows.eigen_sketch import FILES, EigenSketch, file_of
from influence_fast.products.inner_products import quantize_rows
from influence_fast.row_codec import bf16_bits
from influence_fast.store.checksums import damage
from influence_fast.store.ids import UniqueIds, read_ids
from influence_fast.store.manifest import (
    DTYPES,
    LOSS_DTYPE,
    MANIFEST_NAME,
    SCALE_DTYPE,
    FileRecord,
    ForeignShardError,
    Manifest,
    ShardRecord,
    check_dtype,
    file_name,
    inside,
)
from influence_fast.store.reader import Store, open_store

_COPY_CHUNK = 1 << 24
_OUT_OF_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class StoreWriter:
    """Writes the shards of one store, in any order, from any number of processes (each its own shards).

    Creates `path` with `manifest` (unfinished), or goes on with what is there when it is the same work. `sketch` is the
    fitted one that the manifest names, if any; its file is written before the manifest is.

    Raises:
        StoreError: `path` holds something else, or a store and `resume` is False, or one of other work (the message
            names the field and both sides), or the disk is full (finished shards stay).
    """

    def __init__(
        self, path: str | Path, manifest: Manifest, *, resume: bool = True, sketch: EigenSketch | None = None
    ) -> None:
        check_dtype(manifest.dtype)
        self.path = Path(path)
        self._create(manifest, resume, sketch)
        found = Manifest.load(self.path)
        found.check_same_work(manifest, self.path)
        if sketch is not None and not (self.path / file_of(sketch.fingerprint)).exists():
            sketch.save(self.path)  # lost since
        self.manifest = found
        self._fingerprints = found.fingerprints()

    def extend(self, manifest: Manifest) -> None:
        """Take a longer manifest, whose first shards are this store's; the one on disk changes at `finalize`."""
        self.manifest = manifest
        self._fingerprints = manifest.fingerprints()

    def is_done(self, index: int) -> bool:
        """Return whether shard `index` is recorded and its files have the recorded sizes.

        Raises StoreError for a shard of another store: it is not ours to overwrite.
        """
        try:
            record = ShardRecord.load(self.path, index, self.manifest, self._fingerprints[index])
            return all(inside(self.path, f.name).stat().st_size == f.bytes for f in record.files.values())
        except ForeignShardError:
            raise
        except (StoreError, OSError):
            return False

    def drop_damaged(self) -> list[str]:
        """Drop finished shards whose bytes are not those that were written, which are pending then.

        Reads every byte of what is finished. Returns what was wrong, a line a file. No other process may be at work on
        the folder. Raises StoreError where the record of such a shard cannot be removed.
        """
        problems = []
        for index in range(self.manifest.shard_count):
            if not self.is_done(index):
                continue
            record = ShardRecord.load(self.path, index, self.manifest, self._fingerprints[index])
            found = list(damage(self.path, record))
            if found:
                path = self.path / file_name("shard", index)
                try:
                    path.unlink()
                except OSError as error:
                    raise StoreError(f"{found[0]}, and {path} cannot be removed ({error.strerror})") from error
            problems += found
        return problems

    def pending(self) -> list[int]:
        """Return the shards that are still to be written."""
        return [index for index in range(self.manifest.shard_count) if not self.is_done(index)]

    def write_shard(
        self,
        index: int,
        ids: Sequence[str],
        rows: torch.Tensor | np.ndarray,
        *,
        first: int,
        last: int,
        set_aside: Sequence[tuple[str, str]] = (),
        losses: torch.Tensor | np.ndarray | None = None,
        tokens: str | None = None,
    ) -> None:
        """Store `rows` (len(ids), width), any float dtype, as shard `index`, and their examples' losses if given.

        `first` and `last` are the range of examples it covers; those without a row are in `set_aside`. `tokens` is the
        hash of the tokens that the rows were made from, where it is known.

        Raises:
            NumericError: a row is NaN or infinite in fp32.
            StoreError: shapes do not fit, or the disk refuses.
        """
        values = torch.as_tensor(rows).detach().to("cpu", torch.float32).contiguous()
        if values.shape != (len(ids), self.manifest.width):
            raise StoreError(
                f"{self.path}: shard {index} has {len(ids)} ids and width {self.manifest.width}, "
                f"its rows are {tuple(values.shape)}"
            )
        bad = (~torch.isfinite(values).all(dim=1)).nonzero().flatten().tolist()
        if bad:
            raise NumericError(
                f"NaN or infinite rows cannot be stored: {truncated_list(ids[i] for i in bad)}; set them aside"
            )
        lines = b"".join(json.dumps(i).encode() + b"\n" for i in ids)
        payload: dict[str, memoryview] = {"ids": memoryview(lines)}
        payload |= _encoded(values, self.manifest.dtype)
        if losses is not None:
            numbers = torch.as_tensor(losses).detach().to("cpu", torch.float32)
            if numbers.shape != (len(ids),):
                raise StoreError(f"{self.path}: shard {index} has {len(ids)} ids and {tuple(numbers.shape)} losses")
            payload["losses"] = _bytes_of(numbers.numpy(), LOSS_DTYPE)
        files = {}
        for kind, data in payload.items():
            name = file_name(kind, index)
            size = memoryview(data).nbytes
            files[kind] = FileRecord(name, size, self._publish(name, [data], size))
        left = tuple(set_aside)
        self._record(ShardRecord(index, self._fingerprints[index], first, last, len(ids), files, left, tokens))
        (self.path / _partial_name(index)).unlink(missing_ok=True)

    def keep_partial(self, index: int, rows: torch.Tensor, losses: torch.Tensor, done: Collection[int]) -> None:
        """Keep the rows and losses at the places `done` of a shard that is not finished, for `partial` to find.

        rows: [E, width] fp32 and losses: [E] fp32, for the shard's E examples that have a gradient. Raises StoreError:
        the disk refuses.
        """
        from safetensors.torch import save_file

        places = torch.tensor(sorted(done), dtype=torch.int64)
        values = {"rows": rows[places].contiguous(), "losses": losses[places].contiguous(), "places": places}
        path = self.path / _partial_name(index)
        try:
            with replacing(path) as temporary:
                save_file(values, temporary, {"fingerprint": self._fingerprints[index], "examples": str(len(rows))})
        except (OSError, SafetensorError) as error:
            raise StoreError(f"{path} cannot be written ({error}); the finished shards are kept") from error

    def partial(self, index: int, examples: int) -> tuple[torch.Tensor, torch.Tensor, list[int]] | None:
        """Return what `keep_partial` left; None where there is nothing, or nothing that can be used.

        It is rows [n, width], losses [n], and their n places among the shard's `examples`.
        """
        from safetensors import safe_open

        path = inside(self.path, _partial_name(index))
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                if file.metadata() != {"fingerprint": self._fingerprints[index], "examples": str(examples)}:
                    return None
                rows, losses, places = (file.get_tensor(name) for name in ("rows", "losses", "places"))
        except (OSError, SafetensorError):
            return None
        inside_shard = places.numel() == 0 or (int(places.min()) >= 0 and int(places.max()) < examples)
        if rows.shape != (len(places), self.manifest.width) or losses.shape != places.shape or not inside_shard:
            return None
        return rows, losses, places.tolist()

    def copy_shard(self, index: int, source: Path, record: ShardRecord) -> None:
        """Copy a shard of the store in `source` to shard `index`, checked against its record on the way."""
        target = replace(record.moved(index), fingerprint=self._fingerprints[index])
        for kind, entry in record.files.items():
            path = inside(source, entry.name)
            found = self._publish(target.files[kind].name, _chunks(path), entry.bytes)
            if found != entry.sha256:
                (self.path / target.files[kind].name).unlink()
                raise StoreError(f"{path} is not what was written (its checksum differs); build that shard again")
        self._record(target)

    def finalize(self) -> Store:
        """Close the store once every shard is recorded, and opens it. Any number of processes may call it.

        Raises StoreError: shards are missing, or an id is in two shards.
        """
        records = load_records(self.path, self.manifest)
        missing = [str(i) for i in range(self.manifest.shard_count) if i not in records]
        if missing:
            raise StoreError(
                f"{self.path}: shards {truncated_list(missing)} are not written yet; run the same build again"
            )
        ordered = [records[i] for i in range(self.manifest.shard_count)]
        seen = UniqueIds()
        for record in ordered:
            seen.add(read_ids(self.path, record))
        seen.check(lambda: (i for record in ordered for i in read_ids(self.path, record)), str(self.path))
        done = replace(
            self.manifest,
            row_count=sum(record.rows for record in ordered),
            shards=tuple(record.checksum for record in ordered),
        )
        if self.manifest != done:
            data = done.to_json()
            self._publish(MANIFEST_NAME, [data], len(data))
            self.manifest = done
        kinds = ("rows", "scales", "losses", "ids", "shard", "sketch")
        self._remove(*(f".{kind}-*.tmp" for kind in kinds), ".partial-*", "..partial-*")
        named = self.manifest.identity.projection_sketch
        for path in self.path.glob(FILES):
            if named is None or path.name != file_of(named):
                path.unlink(missing_ok=True)  # fitted for a build that came to nothing
        return open_store(self.path)

    def sweep(self) -> None:
        """Remove what killed processes left in a finished store; no other process may be closing it meanwhile."""
        self._remove(".*.tmp", ".partial-*", "..partial-*")

    def _remove(self, *patterns: str) -> None:
        for pattern in patterns:
            for path in self.path.glob(pattern):
                path.unlink(missing_ok=True)

    def _create(self, manifest: Manifest, resume: bool, sketch: EigenSketch | None) -> None:
        if (self.path / MANIFEST_NAME).exists():
            if not resume:
                raise StoreError(f"{self.path} already holds a store; give another folder, or resume=True to go on")
            return
        make_folder(self.path)
        if sketch is not None:
            sketch.save(self.path)
        data = manifest.to_json()
        self._publish(MANIFEST_NAME, [data], len(data), keep_existing=True)

    def _record(self, record: ShardRecord) -> None:
        data = record.to_json()
        self._publish(file_name("shard", record.index), [data], len(data))

    def _publish(
        self, name: str, chunks: Iterable[bytes | memoryview], size: int, *, keep_existing: bool = False
    ) -> str:
        """Write a file whole or not at all; returns its SHA-256."""
        # Not `inside`: renaming over a link replaces the link, so nothing outside the folder can be written.
        path = self.path / name
        temporary = self.path / f".{name}.{os.getpid()}-{secrets.token_hex(4)}.tmp"
        found = hashlib.sha256()
        try:
            with temporary.open("wb") as handle:
                for chunk in chunks:
                    found.update(chunk)
                    _write(handle, chunk)
                handle.flush()
                os.fsync(handle.fileno())
            _move(temporary, path, keep_existing)
            _sync_folder(self.path)
        except OSError as error:
            # Another process on the same folder may have finished the store, and swept this temporary file away.
            if not (isinstance(error, FileNotFoundError) and path.exists()):
                raise StoreError(self._failure(name, size, error)) from error
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
        return found.hexdigest()

    def _failure(self, name: str, size: int, error: OSError) -> str:
        done = len(list(self.path.glob("shard-*.json")))
        what = "the disk is full" if error.errno in _OUT_OF_SPACE else (error.strerror or str(error))
        return (
            f"{what} while writing {self.path / name} ({size / 2**20:.1f} MiB): the {done} finished shards are kept; "
            "mend that and run the same build again to go on"
        )


def make_folder(path: Path) -> None:
    """Return the folder of a store that is there or is to be, made where it is missing.

    Raises StoreError: it holds something else, or cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        _sync_folder(path.parent)
        strangers = [p.name for p in sorted(path.iterdir()) if not p.name.startswith(".") and not p.match(FILES)]
    except OSError as error:
        raise StoreError(f"{path} cannot be a store's folder ({error.strerror}); give another one") from None
    if strangers and not (path / MANIFEST_NAME).exists():
        raise StoreError(f"{path} is not empty and not a store ({truncated_list(strangers)}); give another folder")


def load_records(folder: Path, manifest: Manifest) -> dict[int, ShardRecord]:
    """Return the records that are there, by shard. Raises StoreError for a damaged or foreign one."""
    return {
        index: ShardRecord.load(folder, index, manifest, fingerprint)
        for index, fingerprint in enumerate(manifest.fingerprints())
        if (folder / file_name("shard", index)).exists()
    }


def _partial_name(index: int) -> str:
    return f".partial-{index:05d}.safetensors"


def _encoded(values: torch.Tensor, dtype: str) -> dict[str, memoryview]:
    """Return fp32 rows [n, width] as the bytes of "rows" and, for int8, of "scales" [n]."""
    if dtype == "fp32":
        return {"rows": _bytes_of(values.numpy(), DTYPES[dtype])}
    if dtype == "bf16":
        return {"rows": _bytes_of(bf16_bits(values), DTYPES[dtype])}
    if len(values) == 0:
        return {"rows": memoryview(b""), "scales": memoryview(b"")}
    quantized, scales = quantize_rows(values.numpy())
    return {"rows": _bytes_of(quantized, DTYPES[dtype]), "scales": _bytes_of(scales, SCALE_DTYPE)}


def _bytes_of(array: np.ndarray, dtype: np.dtype) -> memoryview:
    return np.ascontiguousarray(array, dtype=dtype).reshape(-1).view(np.uint8).data


def _write(handle: BinaryIO, data: bytes | memoryview) -> None:
    handle.write(data)


def _move(temporary: Path, path: Path, keep_existing: bool) -> None:
    if not keep_existing:
        os.replace(temporary, path)
        return
    try:
        os.link(temporary, path)  # unlike a rename, fails where another process was first
    except FileExistsError:
        return
    except OSError:  # a file system without hard links
        os.replace(temporary, path)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as handle:
        while chunk := handle.read(_COPY_CHUNK):
            yield chunk
