"""Hundreds of damaged stores: each is refused in one line, or read as the store that it was."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from trials import made_up_identity

from influence_fast.errors import InfluenceFastError
from influence_fast.gradients.rows.eigen_sketch import EigenSketch, file_of
from influence_fast.gradients.rows.layout import LayoutEntry
from influence_fast.gradients.rows.projection import Projection
from influence_fast.products.inner_products import inner_products
from influence_fast.store.manifest import Manifest, ModuleEntry, Part, digest
from influence_fast.store.merge import merge_stores
from influence_fast.store.reader import open_store
from influence_fast.store.writer import StoreWriter

WIDTH, ROWS, SHARD = 4, 8, 3
KINDS = ("rows", "scales", "losses", "ids", "shard")
SUFFIX = {"ids": "jsonl", "shard": "json"}
# What names a store's origin and decides no number: nothing else in the folder can confirm it.
LABELS = ("model_id", "dataset_fingerprint")

Corruption = Callable[[Path], None]


def name_of(kind: str, index: int) -> str:
    return f"{kind}-{index:05d}.{SUFFIX.get(kind, 'bin')}"


def fitted_projection() -> Projection:
    eye = torch.eye(2)[None]
    plain = Projection("one_sided", dim=2, seed=1, width=WIDTH)
    layout = (LayoutEntry("layer", "lora_A", (2, 2), 0),)
    sketch = EigenSketch(plain, layout, {(2, 2): (eye, eye.clone())}, torch.arange(WIDTH), torch.ones(WIDTH))
    return replace(plain, sketch=sketch)


def build(folder: Path, seed: int = 0) -> None:
    """Eight rows of int8 in three shards, with losses, one example set aside and a fitted sketch."""
    rng = np.random.default_rng(seed)
    projection = fitted_projection()
    identity = made_up_identity(projection)
    part = Part("d" * 64, ROWS, SHARD, 3)
    modules = (ModuleEntry("layer", "lora_A", (2, 2), 0),)
    manifest = Manifest(identity, modules, "int8", WIDTH, (part,), "test", "0")
    writer = StoreWriter(folder, manifest, sketch=projection.sketch)
    for index in range(3):
        first, last = index * SHARD, min(ROWS, (index + 1) * SHARD)
        aside = [("lost", "too long")] if index == 1 else []
        n = last - first - len(aside)
        ids = [f"example {i}" for i in range(first, first + n)]
        rows, losses = rng.standard_normal((n, WIDTH)), rng.uniform(0.5, 3, n)
        writer.write_shard(index, ids, rows, first=first, last=last, set_aside=aside, losses=losses)
    writer.finalize()


# ---- what may be done to a file ------------------------------------------------------------------------------------


def flipped(at: float) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[int(at * (len(data) - 1))] ^= 0x10
        path.write_bytes(data)

    return change


def as_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def as_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def as_circle(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def as_link_outside(path: Path) -> None:
    outside = path.parent.parent / f"outside-{path.name}"
    shutil.move(path, outside)
    path.symlink_to(outside)


TO_A_FILE: dict[str, Callable[[Path], Any]] = {
    "first byte": flipped(0),
    "an early byte": flipped(0.3),
    "a middle byte": flipped(0.5),
    "a late byte": flipped(0.8),
    "last byte": flipped(1),
    "cut by one": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "cut to half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "empty": lambda path: path.write_bytes(b""),
    "one byte more": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "twice": lambda path: path.write_bytes(2 * path.read_bytes()),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "missing": lambda path: path.unlink(),
    "a folder": as_folder,
    "a pipe": as_pipe,
    "a link to itself": as_circle,
    "a link outside": as_link_outside,
}

JSON_TEXTS = {
    "deep": b"[" * 200_000,
    "deep and closed": b"[" * 100_000 + b"]" * 100_000,
    "5,000 digits": b"9" * 5000,
    "a number": b"7",
    "null": b"null",
    "a list": b"[]",
    "no keys": b"{}",
    "infinity": b'{"checksum": Infinity}',
    "UTF-16": '{"checksum": "x"}'.encode("utf-16"),
    "not UTF-8": b'{"checksum": "\xff\xfe"}',
    "lone surrogate": b'{"checksum": "\\ud800", "x": "\\udfff"}',
}

WRONG: tuple[Any, ...] = (None, True, -1, 1.5, 10**30, float("nan"), "x", [], {"a": [1]})


def paths_in(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a JSON value, the outermost but for the root; of a list the first alone."""
    items = value.items() if isinstance(value, dict) else list(enumerate(value))[:1] if isinstance(value, list) else ()
    for key, below in items:
        yield (*at, key)
        yield from paths_in(below, (*at, key))


def changed_at(body: dict[str, Any], at: tuple[Any, ...], value: Any) -> dict[str, Any]:
    body = copy.deepcopy(body)
    inner: Any = body
    for key in at[:-1]:
        inner = inner[key]
    inner[at[-1]] = value
    return body


def read(path: Path) -> dict[str, Any]:
    body: dict[str, Any] = json.loads(path.read_text())
    body.pop("checksum")
    return body


def sign(path: Path, body: dict[str, Any]) -> None:
    path.write_text(json.dumps({**body, "checksum": digest(body)}))


def relist(folder: Path, index: int, body: dict[str, Any]) -> None:
    """Let the manifest list a changed record, as one who knows the format would."""
    sign(folder / name_of("shard", index), body)
    manifest = read(folder / "manifest.json")
    manifest["shards"][index] = digest(body)
    sign(folder / "manifest.json", manifest)


def with_ids(lines: bytes, index: int = 1) -> Corruption:
    """Other ids in a shard, with checksums and sizes that fit."""

    def change(folder: Path) -> None:
        (folder / name_of("ids", index)).write_bytes(lines)
        body = read(folder / name_of("shard", index))
        body["files"]["ids"].update(bytes=len(lines), sha256=hashlib.sha256(lines).hexdigest())
        relist(folder, index, body)

    return change


IDS = {
    "twice in a shard": b'"a"\n"a"\n',
    "in two shards": b'"example 0"\n"b"\n',
    "numbers": b"1\n2\n",
    "null": b'null\n"b"\n',
    "true": b'true\n"b"\n',
    "lists": b'["a"]\n["b"]\n',
    "objects": b'{"a": 1}\n{"b": 1}\n',
    "one too few": b'"a"\n',
    "one too many": b'"a"\n"b"\n"c"\n',
    "a blank line": b'"a"\n\n',
    "no JSON": b"a\nb\n",
    "not UTF-8": b'"\xff"\n"b"\n',
    "deep": b"[" * 100_000 + b'\n"b"\n',
    "5,000 digits": b"9" * 5000 + b'\n"b"\n',
    "none": b"",
}


# ---- the corpus ----------------------------------------------------------------------------------------------------


def on_file(name: str, change: Callable[[Path], Any]) -> Corruption:
    return lambda folder: change(folder / name)


def swapped(kind: str, a: int, b: int) -> Corruption:
    def change(folder: Path) -> None:
        first, second = folder / name_of(kind, a), folder / name_of(kind, b)
        kept = first.read_bytes()
        first.write_bytes(second.read_bytes())
        second.write_bytes(kept)

    return change


def shards_swapped(a: int, b: int) -> Corruption:
    def change(folder: Path) -> None:
        for kind in KINDS:
            swapped(kind, a, b)(folder)

    return change


def from_other(other: Path, names: list[str]) -> Corruption:
    def change(folder: Path) -> None:
        for name in names:
            shutil.copy(other / name, folder / name)

    return change


def manifest_with(at: tuple[Any, ...], value: Any) -> Corruption:
    def change(folder: Path) -> None:
        path = folder / "manifest.json"
        sign(path, changed_at(read(path), at, value))

    return change


def record_with(at: tuple[Any, ...], value: Any, *, listed: bool) -> Corruption:
    def change(folder: Path) -> None:
        path = folder / name_of("shard", 1)
        body = changed_at(read(path), at, value)
        if listed:
            relist(folder, 1, body)
        else:
            sign(path, body)

    return change


def file_corruptions(folder: Path, other: Path) -> Iterator[tuple[str, Corruption]]:
    """Bytes, sizes and places of files, without a word in the checksums."""
    sketch = next(folder.glob("sketch-*")).name
    for name in ("manifest.json", sketch, *(name_of(kind, 1) for kind in KINDS)):
        for how, change in TO_A_FILE.items():
            yield f"{name}: {how}", on_file(name, change)
    for kind in KINDS:
        yield f"{kind} of two shards swapped", swapped(kind, 0, 1)
        yield f"{kind} of equal shards swapped", swapped(kind, 1, 2)
        yield f"{kind} of another store", from_other(other, [name_of(kind, 0)])
        yield (
            f"{kind} 0 as a copy of 1",
            on_file(name_of(kind, 0), lambda path, kind=kind: shutil.copy(path.parent / name_of(kind, 1), path)),
        )
    yield "shards swapped", shards_swapped(1, 2)
    yield "a whole shard of another store", from_other(other, [name_of(kind, 0) for kind in KINDS])
    yield "the manifest of another store", from_other(other, ["manifest.json"])


def json_corruptions(folder: Path) -> Iterator[tuple[str, Corruption]]:
    """Texts that are no JSON of ours, and values of a wrong type or size under checksums that fit."""
    for name in ("manifest.json", name_of("shard", 1)):
        for how, text in JSON_TEXTS.items():
            yield f"{name}: {how}", on_file(name, lambda path, text=text: path.write_bytes(text))
    for how, lines in IDS.items():
        yield f"ids: {how}", with_ids(lines)
    for at in paths_in(read(folder / "manifest.json")):
        for value in WRONG:
            yield f"manifest {'.'.join(map(str, at))} = {value!r}", manifest_with(at, value)
    for at in paths_in(read(folder / name_of("shard", 1))):
        for value in WRONG:
            yield f"record {'.'.join(map(str, at))} = {value!r}", record_with(at, value, listed=True)
        yield f"record {'.'.join(map(str, at))} of its own", record_with(at, 3, listed=False)
    huge = {"shards": 3_000_000, "examples": 10**15, "shard_rows": 1}
    yield "manifest: 3,000,000 shards", manifest_with(("parts", 0, "shards"), huge["shards"])
    yield "manifest: a huge part", manifest_with(("parts", 0), {"dataset_fingerprint": None, **huge})
    yield "manifest: unfinished and huge", unfinished_and_huge
    yield "manifest: negative offset", manifest_with(("modules", 0, "offset"), -4)


def unfinished_and_huge(folder: Path) -> None:
    body = read(folder / "manifest.json")
    body.update(row_count=None, shards=None)
    body["parts"][0].update(shards=10**12, examples=10**15, shard_rows=1)
    sign(folder / "manifest.json", body)


# ---- what comes of it ----------------------------------------------------------------------------------------------

QUERIES = np.random.default_rng(7).standard_normal((3, WIDTH)).astype(np.float32)


def outcome(folder: Path, verify: bool | None) -> dict[str, Any] | None:
    """Everything that a store gives, or None where it is refused, in one line."""
    try:
        store = open_store(folder, verify=verify)
        scores = inner_products(store, QUERIES)
        projection = store.projection
        rows, losses = store.rows(), store.losses
    except InfluenceFastError as error:
        if "\n" in str(error) or len(str(error)) > 1000:
            raise AssertionError(f"not one line: {error}") from error
        return None
    identity = replace(store.identity, **dict.fromkeys(LABELS))
    return {
        "scores": np.asarray(scores).tobytes(),
        "rows": rows.numpy().tobytes(),
        "losses": None if losses is None else losses.tobytes(),
        "ids": store.ids,
        "length": len(store),
        "width": store.width,
        "identity": identity.body(),
        "modules": store.manifest.modules,
        "projection": projection,
    }


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clean") / "s"
    build(folder)
    return folder


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("other") / "s"
    build(folder, seed=1)
    return folder


def tried(corruptions: Iterator[tuple[str, Corruption]], clean: Path, room: Path, least: int) -> None:
    """Fail unless each corruption is refused or changes nothing that the store gives; names those that did not hold."""
    right = {verify: outcome(clean, verify) for verify in (None, True)}
    assert right[None] is not None
    assert right[None] == right[True]
    failed, count = [], 0
    for name, corrupt in corruptions:
        count += 1
        folder = room / str(count)
        shutil.copytree(clean, folder)
        corrupt(folder)
        for verify in (None, True):
            try:
                found = outcome(folder, verify)
            except Exception as error:
                failed.append(f"{name} (verify={verify}): {type(error).__name__}: {str(error)[:200]}")
                continue
            if found is not None and found != right[verify]:
                failed.append(f"{name} (verify={verify}): other values, and no word")
        shutil.rmtree(folder)
    assert failed == []
    assert count >= least


@pytest.mark.timeout(60)
def test_changed_cut_swapped_and_foreign_files_are_refused(clean: Path, other: Path, tmp_path: Path) -> None:
    tried(file_corruptions(clean, other), clean, tmp_path, 130)


@pytest.mark.timeout(100)
def test_json_of_wrong_types_and_sizes_is_refused_or_harmless(clean: Path, tmp_path: Path) -> None:
    tried(json_corruptions(clean), clean, tmp_path, 500)


@pytest.mark.timeout(5)
@pytest.mark.parametrize("how", list(IDS))
def test_ids_that_are_no_distinct_strings_are_refused(how: str, clean: Path, tmp_path: Path) -> None:
    folder = tmp_path / "s"
    shutil.copytree(clean, folder)
    with_ids(IDS[how])(folder)
    with pytest.raises(InfluenceFastError, match=r"ids-00001\.jsonl|more than once"):
        open_store(folder)
    with pytest.raises(InfluenceFastError):
        merge_stores([folder], tmp_path / "merged")


@pytest.mark.timeout(5)
@pytest.mark.parametrize("name", [name_of(kind, 1) for kind in KINDS])
def test_a_changed_file_is_named(name: str, clean: Path, tmp_path: Path) -> None:
    folder = tmp_path / "s"
    shutil.copytree(clean, folder)
    flipped(0.5)(folder / name)
    with pytest.raises(InfluenceFastError, match=name):
        open_store(folder).rows()
    with pytest.raises(InfluenceFastError, match=name):
        open_store(folder, verify=True)


@pytest.mark.timeout(5)
def test_a_changed_sketch_is_refused_where_it_is_used(clean: Path, tmp_path: Path) -> None:
    folder = tmp_path / "s"
    shutil.copytree(clean, folder)
    sketch = fitted_projection().sketch
    assert sketch is not None
    flipped(1)(folder / file_of(sketch.fingerprint))
    with pytest.raises(InfluenceFastError, match="sketch-"):
        _ = open_store(folder).projection
    with pytest.raises(InfluenceFastError, match="sketch-"):
        open_store(folder, verify=True)


@pytest.mark.timeout(5)
@pytest.mark.parametrize("kind", KINDS)
def test_a_pipe_in_place_of_a_file_does_not_hold_up_a_build(kind: str, clean: Path, tmp_path: Path) -> None:
    folder = tmp_path / "s"
    shutil.copytree(clean, folder)
    as_pipe(folder / name_of(kind, 1))
    writer = StoreWriter(folder, Manifest.load(folder), sketch=fitted_projection().sketch)
    writer.drop_damaged()
    assert writer.pending() == [1]
    with pytest.raises(InfluenceFastError):
        writer.finalize()
