"""The gradient store: writing, reading and verifying, against plain files of the same bytes."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from benches.interleave import Variants
from benches.models import heavy_tailed
from benches.suites.case import Case, Scale
from influence_fast.products.inner_products import quantize_rows
from influence_fast.store.identity import StoreIdentity
from influence_fast.store.manifest import Manifest, Part
from influence_fast.store.reader import Store, open_store
from influence_fast.store.verification import verify_store
from influence_fast.store.writer import StoreWriter

SHARD_ROWS = 1024


def write_store(path: Path, rows: torch.Tensor, dtype: str) -> Store:
    """A store of fp32 rows [N, k], kept as `dtype`, in place of what was there."""
    shutil.rmtree(path, ignore_errors=True)
    part = Part(None, len(rows), SHARD_ROWS, -(-len(rows) // SHARD_ROWS))
    manifest = Manifest(
        identity=StoreIdentity(projection_kind="unknown"),
        modules=(),
        dtype=dtype,
        width=rows.shape[1],
        parts=(part,),
        source="benches.suites",
        code_version="",
    )
    writer = StoreWriter(path, manifest)
    for index, piece in enumerate(rows.split(SHARD_ROWS)):
        first = index * SHARD_ROWS
        ids = [f"row-{i}" for i in range(first, first + len(piece))]
        writer.write_shard(index, ids, piece, first=first, last=first + len(piece))
    return writer.finalize()


def gradient_rows(scale: Scale) -> torch.Tensor:
    return heavy_tailed(scale(8192, 64), scale(4096, 32), seed=0)


def to_disk(path: Path, *arrays: np.ndarray) -> None:
    """Plain files, synced as the store's are."""
    with path.open("wb") as handle:
        for array in arrays:
            handle.write(array.data.cast("B"))
        handle.flush()
        os.fsync(handle.fileno())


def write_int8(scale: Scale) -> Variants:
    rows = gradient_rows(scale)
    return {
        "ours": lambda: write_store(scale.folder / "store", rows, "int8"),
        "quantised, plain file": lambda: to_disk(scale.folder / "plain", *(t.numpy() for t in quantize_rows(rows))),
        "fp32, plain file": lambda: to_disk(scale.folder / "wide", rows.numpy()),
    }


def write_bf16(scale: Scale) -> Variants:
    rows = gradient_rows(scale)
    return {
        "ours": lambda: write_store(scale.folder / "store", rows, "bf16"),
        "rounded, plain file": lambda: to_disk(scale.folder / "plain", rows.bfloat16().view(torch.int16).numpy()),
        "torch.save": lambda: torch.save(rows.bfloat16(), scale.folder / "rows.pt"),
    }


def read_blocks(scale: Scale) -> Variants:
    """A pass over the raw rows, as scoring makes it; each variant sums the bytes as int64."""
    rows = gradient_rows(scale)
    store = write_store(scale.folder / "store", rows, "int8")
    path, shape = scale.folder / "plain", tuple(rows.shape)
    to_disk(path, quantize_rows(rows)[0].numpy())

    def blocks() -> None:
        for _, raw, _ in store.blocks():
            np.add.reduce(raw.reshape(-1).view(np.int64))

    return {
        "ours": blocks,
        "one memory-mapped file": lambda: np.add.reduce(
            np.memmap(path, np.int8, "r", shape=shape).reshape(-1).view("i8")
        ),
        "one file read whole": lambda: np.add.reduce(np.fromfile(path, np.int64)),
    }


def read_floats(scale: Scale) -> Variants:
    rows = gradient_rows(scale)
    store = write_store(scale.folder / "store", rows, "bf16")
    path = scale.folder / "rows.pt"
    torch.save(rows.bfloat16(), path)
    return {"ours": lambda: store.rows(), "torch.load and float()": lambda: torch.load(path).float()}


def read_chosen(scale: Scale) -> Variants:
    rows = gradient_rows(scale)
    store = write_store(scale.folder / "store", rows, "bf16")
    path = scale.folder / "plain"
    to_disk(path, rows.bfloat16().view(torch.int16).numpy())
    places = torch.randperm(len(rows))[: len(rows) // 8]
    index, shape = places.numpy(), tuple(rows.shape)

    def mapped() -> torch.Tensor:
        return torch.from_numpy(np.memmap(path, np.int16, "r", shape=shape)[index]).view(torch.bfloat16).float()

    return {"ours": lambda: store.rows(places), "memory-mapped file": mapped}


def verify(scale: Scale) -> Variants:
    store = write_store(scale.folder / "store", gradient_rows(scale), "int8")
    files = [path for path in store.path.iterdir() if path.name != "manifest.json"]

    def hashes() -> None:
        for path in files:
            with path.open("rb") as handle:
                hashlib.file_digest(handle, "sha256")

    return {"ours": lambda: verify_store(store.path), "sha256 of the files": hashes}


def opening(scale: Scale) -> Variants:
    path = write_store(scale.folder / "store", gradient_rows(scale), "int8").path
    return {"ours": lambda: open_store(path), "sha256 of the files": lambda: _digests(path)}


def _digests(folder: Path) -> list[str]:
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()]


CASES = [
    Case("write, int8", ("ours", "quantised, plain file", "fp32, plain file"), write_int8, rounds=5),
    Case("write, bf16", ("ours", "rounded, plain file", "torch.save"), write_bf16, rounds=5),
    Case("a pass over int8 rows", ("ours", "one memory-mapped file", "one file read whole"), read_blocks),
    Case("all rows in fp32", ("ours", "torch.load and float()"), read_floats),
    Case("an eighth of the rows, scattered", ("ours", "memory-mapped file"), read_chosen),
    Case("verify", ("ours", "sha256 of the files"), verify, rounds=5),
    Case("open", ("ours", "sha256 of the files"), opening, rounds=5),
]


def test_store(variant: tuple[Case, str], side_by_side: Callable[[], None]) -> None:
    side_by_side()
