"""The store on disk: what is read is what was written, and nothing damaged, foreign or unfinished passes as whole."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest
import torch
from trials import made_up_identity, stored_bytes

from influence_fast.errors import ConfigError, NumericError, StoreError
from influence_fast.gradients.rows.projection import Projection
from influence_fast.products.inner_products import inner_products
from influence_fast.store import checksums
from influence_fast.store import writer as store_writer
from influence_fast.store.manifest import Manifest, ModuleEntry, Part, digest, row_bytes
from influence_fast.store.merge import append_store, merge_stores
from influence_fast.store.reader import Store, open_store
from influence_fast.store.verification import verify_store
from influence_fast.store.writer import StoreWriter

WIDTH = 37
# bf16 keeps 8 bits of the mantissa and rounds to nearest: half a unit in the last place. int8: half a step of the row.
RELATIVE_BF16 = 2.0**-8

IDENTITY = made_up_identity(Projection(dim=4, seed=3))


def make_rows(n: int, seed: int = 0, width: int = WIDTH) -> np.ndarray:
    """Rows whose sizes span six orders of magnitude."""
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((n, width)) * 10.0 ** rng.uniform(-3, 3, (n, 1))).astype(np.float32)


def make_manifest(n: int, shard_rows: int, dtype: str = "fp32", width: int = WIDTH, **identity: Any) -> Manifest:
    who = replace(IDENTITY, **identity)
    part = Part(who.dataset_fingerprint, n, shard_rows, -(-n // shard_rows))
    modules = (ModuleEntry("layer", "lora_A", (1, width), 0),)
    return Manifest(who, modules, dtype, width, (part,), "test", "0")


def write(
    path: Path,
    rows: np.ndarray,
    *,
    shard_rows: int = 4,
    dtype: str = "fp32",
    ids: Sequence[str] | None = None,
    only: Sequence[int] | None = None,
    losses: np.ndarray | None = None,
    **identity: Any,
) -> StoreWriter:
    n = len(rows)
    names = [f"example {i}" for i in range(n)] if ids is None else list(ids)
    writer = StoreWriter(path, make_manifest(n, shard_rows, dtype, rows.shape[1], **identity))
    for index in writer.pending():
        if only is None or index in only:
            first, last = index * shard_rows, min(n, (index + 1) * shard_rows)
            mine = None if losses is None else losses[first:last]
            writer.write_shard(index, names[first:last], rows[first:last], first=first, last=last, losses=mine)
    return writer


def make(path: Path, n: int = 10, **options: Any) -> Store:
    return write(path, make_rows(n), **options).finalize()


# ---- what comes back -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize(("n", "shard_rows"), [(1, 1), (1, 8), (7, 7), (7, 2), (23, 5)])
def test_rows_come_back_within_the_rounding_of_the_dtype(tmp_path: Path, dtype: str, n: int, shard_rows: int) -> None:
    rows = make_rows(n)
    store = write(tmp_path / "s", rows, shard_rows=shard_rows, dtype=dtype).finalize()
    back = store.rows().double().numpy()
    error = np.abs(back - rows)
    if dtype == "fp32":
        assert np.array_equal(back, rows)
    elif dtype == "bf16":
        assert (error <= RELATIVE_BF16 * np.abs(rows)).all()
    else:
        step = np.abs(rows).max(axis=1, keepdims=True) / 127
        assert (error <= step * (0.5 + 1e-4)).all()
        assert (np.abs(back).max(axis=1) >= 0.99 * np.abs(rows).max(axis=1)).all()
    assert store.ids == [f"example {i}" for i in range(n)]
    assert verify_store(tmp_path / "s") == []
    parts = [p.stat().st_size for kind in ("rows", "scales") for p in (tmp_path / "s").glob(f"*{kind}*")]
    assert sum(parts) == n * row_bytes(WIDTH, dtype)


def test_int8_keeps_rows_of_zeros_and_of_subnormal_numbers_finite(tmp_path: Path) -> None:
    rows = make_rows(3)
    rows[0] = 0
    rows[1] = 1e-44
    back = write(tmp_path / "s", rows, dtype="int8").finalize().rows()
    assert torch.equal(back[0], torch.zeros(WIDTH))
    assert back[1].abs().max() <= 2e-44


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
def test_chosen_rows_are_those_of_the_whole_matrix(tmp_path: Path, dtype: str) -> None:
    store = make(tmp_path / "s", 23, shard_rows=5, dtype=dtype)
    whole = store.rows()
    mask = np.arange(23) % 3 == 1
    for index in (
        slice(3, 17),
        slice(None, None, -2),
        [22, 0, 7, 7, -1],
        np.array([4, 19]),
        torch.tensor([9]),
        mask,
        torch.from_numpy(mask),
    ):
        chosen = index.tolist() if isinstance(index, torch.Tensor) else index
        expected = torch.from_numpy(
            whole.numpy()[np.asarray(chosen) if not isinstance(chosen, slice) else chosen].copy()
        )
        assert torch.equal(store.rows(index), expected)
    assert torch.equal(store.rows(6), whole[6:7])
    assert store.rows([]).shape == (0, WIDTH)


@pytest.mark.parametrize("index", [[23], [-24], [0.5], np.zeros((2, 2), dtype=int), np.ones(3, dtype=bool)])
def test_a_row_that_is_not_there_is_an_error(tmp_path: Path, index: Any) -> None:
    with pytest.raises(StoreError):
        make(tmp_path / "s", 23).rows(index)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("max_rows", [1, 3, 100])
def test_blocks_cover_every_row_once_as_it_lies_on_disk(tmp_path: Path, dtype: str, max_rows: int) -> None:
    store = make(tmp_path / "s", 13, shard_rows=5, dtype=dtype)
    seen = torch.full((13, WIDTH), torch.nan)
    for start, raw, scales in store.blocks(max_rows):
        assert raw.dtype == {"fp32": np.float32, "bf16": np.uint16, "int8": np.int8}[dtype]
        assert raw.flags.c_contiguous
        assert not raw.flags.writeable
        assert 1 <= len(raw) <= max_rows
        # the definition of bf16: the upper half of an fp32
        values = (raw.astype(np.uint32) << 16).view(np.float32) if dtype == "bf16" else raw.astype(np.float32)
        if dtype == "int8":
            assert scales is not None
            values = values * scales[:, None]
        else:
            assert scales is None
        assert torch.isnan(seen[start : start + len(raw)]).all()
        seen[start : start + len(raw)] = torch.from_numpy(values)
    assert torch.equal(seen, store.rows())


def test_more_shards_than_a_process_keeps_mapped(tmp_path: Path) -> None:
    rows = make_rows(150, width=3)
    store = write(tmp_path / "s", rows, shard_rows=1).finalize()
    order = np.random.default_rng(0).permutation(150)
    assert np.array_equal(store.rows(order).numpy(), rows[order])


def test_a_store_of_no_rows(tmp_path: Path) -> None:
    store = write(tmp_path / "empty", make_rows(0)).finalize()
    assert (len(store), store.ids, store.rows().shape, list(store.blocks())) == (0, [], (0, WIDTH), [])
    assert verify_store(tmp_path / "empty") == []


def test_shards_of_which_all_was_set_aside(tmp_path: Path) -> None:
    rows = make_rows(4)
    writer = StoreWriter(tmp_path / "s", make_manifest(8, 2, "int8"))
    writer.write_shard(0, [], rows[:0], first=0, last=2, set_aside=[("a", "nan"), ("b", "nan")])
    writer.write_shard(1, ["c", "d"], rows[:2], first=2, last=4)
    writer.write_shard(2, [], rows[:0], first=4, last=6, set_aside=[("e", "nan"), ("f", "nan")])
    writer.write_shard(3, ["g"], rows[2:3], first=6, last=8, set_aside=[("h", "too long")])
    store = writer.finalize()
    assert store.ids == ["c", "d", "g"]
    assert [name for name, _ in store.set_aside] == ["a", "b", "e", "f", "h"]
    assert np.linalg.norm(store.rows().numpy() - rows[:3]) <= 0.01 * np.linalg.norm(rows[:3])
    assert [start for start, _, _ in store.blocks()] == [0, 2]
    assert store.verify() is None


def test_any_string_is_an_id_and_names_its_row(tmp_path: Path) -> None:
    ids = ["", "a\nb", "\u2028\u2029", '"', "é", "\ud800", "../x", "a,b"]
    store = write(tmp_path / "s", make_rows(8), ids=ids).finalize()
    assert store.ids == ids
    assert store.positions(["é", "a\nb"]) == [4, 1]
    with pytest.raises(StoreError, match="no row for nobody"):
        store.positions(["nobody"])


def test_the_manifest_says_what_it_was_made_with(tmp_path: Path) -> None:
    store = make(tmp_path / "s")
    assert store.identity == IDENTITY
    assert store.projection == Projection(dim=4, seed=3)
    assert store.manifest.modules == (ModuleEntry("layer", "lora_A", (1, WIDTH), 0),)
    assert store.manifest.row_count == len(store) == 10


# ---- opened against something else -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expect", "message"),
    [
        ({"model_hash": "e" * 64}, "another model: model_hash is aaaaaaaaaaaa in the store and eeeeeeeeeeee here"),
        ({"model_id": "gpt"}, "model_id is 'tiny' in the store and 'gpt' here"),
        ({"adapter_hash": "e" * 64}, "another adapter"),
        ({"tokenizer_hash": "e" * 64}, "another tokenizer"),
        ({"dataset_fingerprint": "e" * 64}, "another dataset"),
        ({"loss_reduction": "sum"}, "loss_reduction is 'mean' in the store and 'sum' here"),
        ({"projection_seed": 4}, "projection_seed is 3 in the store and 4 here"),
        ({"projection": Projection(dim=4, seed=3, width=8)}, "projection_width is not recorded in the store and 8"),
        ({"projection": None}, "projection_kind is 'one_sided' in the store and 'none' here"),
        ({"model": "x"}, "unknown field 'model'"),
    ],
)
def test_another_identity_is_named_with_both_sides(tmp_path: Path, expect: dict[str, Any], message: str) -> None:
    make(tmp_path / "s")
    with pytest.raises(StoreError, match=message):
        open_store(tmp_path / "s", expect=expect)


def test_the_same_weights_under_another_name_are_the_same_model(tmp_path: Path) -> None:
    make(tmp_path / "s")
    moved = replace(IDENTITY, model_id="/elsewhere/tiny")
    assert len(open_store(tmp_path / "s", expect=moved)) == 10


def test_what_an_imported_store_does_not_know_is_not_taken_for_equal(tmp_path: Path) -> None:
    make(tmp_path / "s", model_hash=None)
    with pytest.raises(StoreError, match="model_hash is not recorded in the store"):
        open_store(tmp_path / "s", expect={"model_hash": "a" * 64})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"dtype": "bf16"}, "dtype is 'fp32' in the store and 'bf16' here"),
        ({"shard_rows": 5}, "shard_rows is 4 in the store and 5 here"),
        ({"model_hash": "e" * 64}, "another model"),
        ({"dataset_fingerprint": "e" * 64}, "another dataset"),
    ],
)
def test_other_work_is_not_written_into_a_store(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    make(tmp_path / "s")
    before = stored_bytes(tmp_path / "s")
    with pytest.raises(StoreError, match=message):
        make(tmp_path / "s", **changed)
    assert stored_bytes(tmp_path / "s") == before


def test_a_folder_with_other_things_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(StoreError, match=r"not a store \(notes.txt\)"):
        make(tmp_path)
    with pytest.raises(StoreError, match="not a gradient store"):
        open_store(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be a store's folder"):
        make(tmp_path / "file")


def test_without_resume_an_existing_store_is_an_error(tmp_path: Path) -> None:
    make(tmp_path / "s")
    with pytest.raises(StoreError, match="already holds a store"):
        StoreWriter(tmp_path / "s", make_manifest(10, 4), resume=False)


# ---- damage ----------------------------------------------------------------------------------------------------


def flip(path: Path, at: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def change_json(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """A change with a checksum that fits, as someone who knows the format would make it."""
    body = json.loads(path.read_text())
    body.pop("checksum")
    change(body)
    path.write_text(json.dumps({**body, "checksum": digest(body)}))


LOSSES = np.linspace(0.5, 3, 10, dtype=np.float32)


def test_losses_lie_beside_the_rows(tmp_path: Path) -> None:
    store = make(tmp_path / "s", losses=LOSSES)
    assert store.losses is not None
    assert store.losses.dtype == np.float32
    np.testing.assert_array_equal(store.losses, LOSSES)
    assert verify_store(tmp_path / "s") == []
    assert make(tmp_path / "without").losses is None
    assert make(tmp_path / "empty", n=0, losses=LOSSES[:0]).losses.shape == (0,)  # type: ignore[union-attr]
    writer = write(tmp_path / "wrong", make_rows(4), only=[])
    with pytest.raises(StoreError, match=r"4 ids and \(3,\) losses"):
        writer.write_shard(0, list("abcd"), make_rows(4), first=0, last=4, losses=LOSSES[:3])


def test_one_shard_without_losses_leaves_the_store_without(tmp_path: Path) -> None:
    write(tmp_path / "s", make_rows(10), only=[0], losses=LOSSES)
    assert write(tmp_path / "s", make_rows(10)).finalize().losses is None


def test_merged_stores_keep_their_losses(tmp_path: Path) -> None:
    make(tmp_path / "a", n=6, losses=LOSSES)
    make(tmp_path / "b", n=5, losses=LOSSES[4:9], ids=list("vwxyz"))
    merged = merge_stores([tmp_path / "a", tmp_path / "b"], tmp_path / "m")
    np.testing.assert_array_equal(merged.losses, np.concatenate([LOSSES[:6], LOSSES[4:9]]))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["rows-00001.bin", "scales-00001.bin", "losses-00001.bin", "ids-00001.jsonl"])
def test_truncated_files_are_named(tmp_path: Path, name: str) -> None:
    make(tmp_path / "s", dtype="int8", losses=LOSSES)
    path = tmp_path / "s" / name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(StoreError, match=f"{name} is truncated"):
        open_store(tmp_path / "s")
    assert [name in line for line in verify_store(tmp_path / "s")] == [True]


@pytest.mark.parametrize("name", ["rows-00001.bin", "scales-00001.bin", "ids-00001.jsonl", "shard-00001.json"])
def test_missing_files_are_named(tmp_path: Path, name: str) -> None:
    make(tmp_path / "s", dtype="int8")
    (tmp_path / "s" / name).unlink()
    with pytest.raises(StoreError, match=f"{name} is missing"):
        open_store(tmp_path / "s")
    assert [name in line for line in verify_store(tmp_path / "s")] == [True]


@pytest.mark.parametrize("at", [0, 77, -1])
def test_one_flipped_bit_in_the_rows_is_found(tmp_path: Path, at: int) -> None:
    store = make(tmp_path / "s", dtype="int8")
    flip(tmp_path / "s" / "rows-00001.bin", at)
    with pytest.raises(StoreError, match=r"rows-00001.bin is not what was written"):
        store.verify()


@pytest.mark.parametrize("name", ["scales-00000.bin", "losses-00001.bin", "ids-00002.jsonl"])
def test_one_flipped_bit_elsewhere_is_found(tmp_path: Path, name: str) -> None:
    make(tmp_path / "s", dtype="int8", losses=LOSSES)
    flip(tmp_path / "s" / name, 2)
    assert [name in line for line in verify_store(tmp_path / "s")] == [True]


@pytest.mark.parametrize("name", ["shard-00001.json", "manifest.json"])
def test_every_flipped_bit_of_a_record_or_manifest_is_found_or_harmless(tmp_path: Path, name: str) -> None:
    """An error that names the file, or (white space) the very same contents."""
    make(tmp_path / "s")
    path = tmp_path / "s" / name
    data = path.read_bytes()
    rng = np.random.default_rng(0)
    found = 0
    for at in rng.choice(len(data), 100, replace=False).tolist():
        flipped = bytearray(data)
        flipped[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(flipped)
        try:
            problems = verify_store(tmp_path / "s")
        except StoreError as error:
            problems = [str(error)]
        if problems:
            assert name in problems[0]
            found += 1
        else:
            assert json.loads(flipped) == json.loads(data), f"byte {at}"
    assert found > 80


@pytest.mark.parametrize("name", ["scales-00000.bin", "losses-00001.bin", "ids-00002.jsonl"])
def test_changed_scales_losses_and_ids_are_refused_at_open(tmp_path: Path, name: str) -> None:
    make(tmp_path / "s", dtype="int8", losses=LOSSES)
    flip(tmp_path / "s" / name, 2)
    for verify in (None, True, False):
        with pytest.raises(StoreError, match=f"{name} is not what was written"):
            open_store(tmp_path / "s", verify=verify)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
def test_changed_rows_are_refused_when_first_read_and_at_open_if_asked(tmp_path: Path, dtype: str) -> None:
    whole = make(tmp_path / "s", dtype=dtype).rows()
    flip(tmp_path / "s" / "rows-00001.bin", 40)
    store = open_store(tmp_path / "s")
    assert torch.equal(store.rows([0, 9]), whole[[0, 9]])  # of the other shards
    for read in (lambda: store.rows(5), lambda: list(store.blocks()), lambda: inner_products(store, whole[:2])):
        with pytest.raises(StoreError, match=r"rows-00001.bin is not what was written"):
            read()
    with pytest.raises(StoreError, match=r"rows-00001.bin is not what was written"):
        open_store(tmp_path / "s", verify=True)
    assert not torch.equal(open_store(tmp_path / "s", verify=False).rows(), whole)


def test_rows_are_hashed_once_a_process_until_they_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "s")
    monkeypatch.setattr(checksums, "_SETTLED", 0.0)
    monkeypatch.setattr(checksums, "_known", {})
    opened: list[str] = []
    real = Path.open

    def counted(path: Path, *arguments: Any, **more: Any) -> Any:
        opened.append(path.name)
        return real(path, *arguments, **more)

    monkeypatch.setattr(Path, "open", counted)
    rows = [f"rows-{i:05d}.bin" for i in range(3)]
    for _ in range(2):
        store = open_store(tmp_path / "s")
        assert [name for name in opened if name in rows] == []
        store.rows()
        list(store.blocks())
        assert sorted(name for name in opened if name in rows) == rows
        opened.clear()
        rows = []  # known now
    flip(tmp_path / "s" / "rows-00002.bin")
    with pytest.raises(StoreError, match=r"rows-00002.bin"):
        open_store(tmp_path / "s").rows()


def test_a_shard_of_another_store_is_foreign(tmp_path: Path) -> None:
    make(tmp_path / "a")
    make(tmp_path / "b", model_hash="e" * 64)
    for kind in ("rows-00001.bin", "ids-00001.jsonl", "shard-00001.json"):
        shutil.copy(tmp_path / "b" / kind, tmp_path / "a" / kind)
    with pytest.raises(StoreError, match=r"shard-00001.json is foreign"):
        open_store(tmp_path / "a")
    assert ["shard-00001.json is foreign" in line for line in verify_store(tmp_path / "a")] == [True]


def test_a_shard_of_the_same_store_in_another_place_is_foreign(tmp_path: Path) -> None:
    make(tmp_path / "s", 8)
    for kind in ("rows-{}.bin", "ids-{}.jsonl", "shard-{}.json"):
        shutil.copy(tmp_path / "s" / kind.format("00000"), tmp_path / "s" / kind.format("00001"))
    assert verify_store(tmp_path / "s")
    with pytest.raises(StoreError, match=r"shard-00001.json"):
        open_store(tmp_path / "s")


def test_a_whole_shard_of_other_rows_is_foreign_even_with_the_same_identity(tmp_path: Path) -> None:
    make(tmp_path / "a", 8)
    write(tmp_path / "b", make_rows(8, seed=1)).finalize()
    for kind in ("rows-00001.bin", "ids-00001.jsonl", "shard-00001.json"):
        shutil.copy(tmp_path / "b" / kind, tmp_path / "a" / kind)
    with pytest.raises(StoreError, match=r"shard-00001.json is foreign"):
        open_store(tmp_path / "a")


def test_a_foreign_record_is_not_overwritten_when_going_on(tmp_path: Path) -> None:
    write(tmp_path / "a", make_rows(10), only=[0])
    make(tmp_path / "b", model_hash="e" * 64)
    shutil.copy(tmp_path / "b" / "shard-00001.json", tmp_path / "a" / "shard-00001.json")
    with pytest.raises(StoreError, match=r"shard-00001.json is foreign"):
        write(tmp_path / "a", make_rows(10))


@pytest.mark.parametrize("name", ["../outside.bin", "/etc/hostname", "sub/rows-00001.bin", "rows-00000.bin"])
def test_a_record_cannot_point_out_of_the_folder(tmp_path: Path, name: str) -> None:
    make(tmp_path / "s")
    (tmp_path / "outside.bin").write_bytes((tmp_path / "s" / "rows-00001.bin").read_bytes())
    change_json(tmp_path / "s" / "shard-00001.json", lambda body: body["files"]["rows"].update(name=name))
    with pytest.raises(StoreError, match=r"shard-00001.json: it points to"):
        open_store(tmp_path / "s")


def test_a_link_cannot_lead_out_of_the_folder(tmp_path: Path) -> None:
    make(tmp_path / "s")
    path = tmp_path / "s" / "rows-00001.bin"
    shutil.move(path, tmp_path / "outside.bin")
    path.symlink_to(tmp_path / "outside.bin")
    with pytest.raises(StoreError, match="leads out of the store's folder"):
        open_store(tmp_path / "s")
    assert verify_store(tmp_path / "s")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(format_version=2), "format version 2"),
        (lambda m: m.pop("dtype"), "damaged"),
        (lambda m: m.update(dtype="fp64"), "unknown dtype 'fp64'"),
        (lambda m: m.update(width=-1), "damaged"),
        (lambda m: m.update(row_count=9), "says 9 rows, the shards hold 10"),
        (lambda m: m.update(shards=m["shards"][:1]), "damaged"),
        (lambda m: m["identity"].update(model_hash="e" * 64), "foreign"),
        (lambda m: m["identity"].update(colour="red"), "damaged"),
    ],
)
def test_a_changed_manifest_is_an_error(tmp_path: Path, change: Any, message: str) -> None:
    make(tmp_path / "s")
    change_json(tmp_path / "s" / "manifest.json", change)
    with pytest.raises(StoreError, match=message):
        open_store(tmp_path / "s")


def test_a_manifest_that_is_no_json_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_bytes(b"\xff{")
    with pytest.raises(StoreError, match="cannot be read"):
        open_store(tmp_path)


def test_what_is_said_of_a_broken_manifest_mends_it(tmp_path: Path) -> None:
    whole = make(tmp_path / "s")
    (tmp_path / "s" / "manifest.json").write_text("{")
    with pytest.raises(
        StoreError, match=r"manifest\.json .*; restore it, or delete the folder .*/s and build"
    ) as error:
        make(tmp_path / "s")
    assert "\n" not in str(error.value)
    shutil.rmtree(tmp_path / "s")
    assert make(tmp_path / "s").ids == whole.ids


# ---- interruption ------------------------------------------------------------------------------------------------


def test_an_unfinished_store_says_so_and_is_finished_by_the_same_work(tmp_path: Path) -> None:
    whole = make(tmp_path / "whole")
    write(tmp_path / "s", make_rows(10), only=[0, 2])
    with pytest.raises(StoreError, match="not finished: 2 of 3 shards"):
        open_store(tmp_path / "s")
    with pytest.raises(StoreError, match="shards 1 are not written yet"):
        StoreWriter(tmp_path / "s", make_manifest(10, 4)).finalize()
    writer = StoreWriter(tmp_path / "s", make_manifest(10, 4))
    assert writer.pending() == [1]
    store = write(tmp_path / "s", make_rows(10)).finalize()
    assert stored_bytes(tmp_path / "s") == stored_bytes(tmp_path / "whole")
    assert torch.equal(store.rows(), whole.rows())


def test_a_shard_deleted_after_damage_is_written_again(tmp_path: Path) -> None:
    make(tmp_path / "s")
    before = stored_bytes(tmp_path / "s")
    (tmp_path / "s" / "rows-00001.bin").unlink()
    (tmp_path / "s" / "shard-00002.json").unlink()
    make(tmp_path / "s")
    assert stored_bytes(tmp_path / "s") == before


@pytest.mark.parametrize("name", ["rows-00001", "ids-00001", "shard-00001", "manifest"])
def test_a_full_disk_keeps_the_finished_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    make(tmp_path / "whole")
    real = store_writer._write

    def full(handle: BinaryIO, data: bytes | memoryview) -> None:
        if f".{name}" in handle.name:
            half = memoryview(data)[: len(data) // 2]
            real(handle, half)
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle, data)

    with monkeypatch.context() as patch:
        patch.setattr(store_writer, "_write", full)
        with pytest.raises(StoreError, match=rf"the disk is full while writing .*{name}.* are kept"):
            make(tmp_path / "s")
    assert not list((tmp_path / "s").glob(".*.tmp"))
    make(tmp_path / "s")
    assert stored_bytes(tmp_path / "s") == stored_bytes(tmp_path / "whole")


def test_a_real_limit_of_the_file_system_is_reported(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(StoreError, match=r"the disk is full while writing .*rows-00000.bin"):
            write(tmp_path / "s", make_rows(64), shard_rows=64)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_two_processes_may_do_the_same_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one finishes the store, and sweeps up, while this one is in the middle of its last shard."""
    make(tmp_path / "whole")
    writer = write(tmp_path / "s", make_rows(10), only=[0, 1])
    real = store_writer._write

    def overtaken(handle: BinaryIO, data: bytes | memoryview) -> None:
        real(handle, data)
        monkeypatch.setattr(store_writer, "_write", real)
        make(tmp_path / "s")

    monkeypatch.setattr(store_writer, "_write", overtaken)
    writer.write_shard(2, ["example 8", "example 9"], make_rows(10)[8:], first=8, last=10)
    writer.finalize()
    assert stored_bytes(tmp_path / "s") == stored_bytes(tmp_path / "whole")


def test_ctrl_c_in_a_shard_leaves_no_trace_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(handle: BinaryIO, data: bytes | memoryview) -> None:
        raise KeyboardInterrupt

    writer = write(tmp_path / "s", make_rows(10), only=[0])
    before = sorted(p.name for p in (tmp_path / "s").iterdir())
    monkeypatch.setattr(store_writer, "_write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        writer.write_shard(1, ["x"], make_rows(1), first=4, last=8)
    assert sorted(p.name for p in (tmp_path / "s").iterdir()) == before


def test_rows_that_cannot_be_stored_are_refused(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path / "s", make_manifest(4, 4))
    rows = make_rows(4)
    rows[2, 5] = np.inf
    with pytest.raises(NumericError, match="c"):
        writer.write_shard(0, list("abcd"), rows, first=0, last=4)
    with pytest.raises(StoreError, match="width 37"):
        writer.write_shard(0, list("abcd"), make_rows(4, width=36), first=0, last=4)
    with pytest.raises(StoreError, match="3 ids"):
        writer.write_shard(0, list("abc"), make_rows(4), first=0, last=4)
    with pytest.raises(ConfigError, match="unknown store dtype 'fp16'"):
        StoreWriter(tmp_path / "t", make_manifest(4, 4, "fp16"))


def test_an_id_in_two_shards_is_named(tmp_path: Path) -> None:
    ids = ["a", "b", "c", "d", "a"]
    with pytest.raises(StoreError, match="more than once: a"):
        write(tmp_path / "s", make_rows(5), ids=ids, shard_rows=2).finalize()


# ---- merging and appending -----------------------------------------------------------------------------------------


def test_pieces_of_one_build_merge_into_it_bit_for_bit(tmp_path: Path) -> None:
    make(tmp_path / "whole", 23)
    for rank in range(3):
        write(tmp_path / f"{rank}", make_rows(23), only=range(rank, 6, 3))
    merged = merge_stores([tmp_path / "2", tmp_path / "0", tmp_path / "1"], tmp_path / "merged")
    assert stored_bytes(tmp_path / "merged") == stored_bytes(tmp_path / "whole")
    assert merged.ids == [f"example {i}" for i in range(23)]


def test_missing_and_differing_pieces_are_named(tmp_path: Path) -> None:
    write(tmp_path / "0", make_rows(10), only=[0])
    write(tmp_path / "1", make_rows(10), only=[1])
    with pytest.raises(StoreError, match="shards 2 are in none"):
        merge_stores([tmp_path / "0", tmp_path / "1"], tmp_path / "out")
    write(tmp_path / "2", make_rows(10, seed=1), only=[1, 2])
    with pytest.raises(StoreError, match=r"shard-00001.json differs"):
        merge_stores([tmp_path / "0", tmp_path / "1", tmp_path / "2"], tmp_path / "out")


@pytest.mark.parametrize("dtype", ["fp32", "int8"])
def test_stores_of_different_data_are_joined_in_order(tmp_path: Path, dtype: str) -> None:
    parts = []
    for k, n in enumerate((5, 1, 8)):
        ids = [f"{k}/{i}" for i in range(n)]
        fingerprint = str(k) * 64
        path = tmp_path / f"{k}"
        parts.append(
            write(path, make_rows(n, seed=k), ids=ids, dtype=dtype, dataset_fingerprint=fingerprint).finalize()
        )
    merged = merge_stores([tmp_path / "0", tmp_path / "1", tmp_path / "2"], tmp_path / "merged")
    assert merged.ids == [i for part in parts for i in part.ids]
    assert torch.equal(merged.rows(), torch.cat([part.rows() for part in parts]))
    assert merged.identity.dataset_fingerprint not in {part.identity.dataset_fingerprint for part in parts}
    assert verify_store(tmp_path / "merged") == []

    appended = append_store(tmp_path / "0", tmp_path / "1")
    appended = append_store(tmp_path / "0", tmp_path / "2")
    assert appended.ids == merged.ids
    assert torch.equal(appended.rows(), merged.rows())
    assert verify_store(tmp_path / "0") == []
    assert stored_bytes(tmp_path / "0") == stored_bytes(tmp_path / "merged")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model_hash": "e" * 64}, "another model"),
        ({"adapter_hash": None}, "another adapter"),
        ({"projection_seed": 9}, "another projection"),
        ({"dtype": "bf16"}, "dtype"),
        ({"ids": ["example 9", "b"]}, "more than once: example 9"),
    ],
)
def test_stores_that_do_not_fit_together_stay_apart(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    make(tmp_path / "a")
    write(tmp_path / "b", make_rows(2), **{"ids": ["a", "b"], "dataset_fingerprint": "e" * 64, **changed}).finalize()
    before = stored_bytes(tmp_path / "a")
    with pytest.raises(StoreError, match=message):
        merge_stores([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    with pytest.raises(StoreError, match=message):
        append_store(tmp_path / "a", tmp_path / "b")
    assert stored_bytes(tmp_path / "a") == before


def test_damage_is_found_while_merging(tmp_path: Path) -> None:
    make(tmp_path / "a")
    write(tmp_path / "b", make_rows(2), ids=["a", "b"], dataset_fingerprint="e" * 64).finalize()
    flip(tmp_path / "b" / "rows-00000.bin")
    with pytest.raises(StoreError, match=r"b/rows-00000.bin is not what was written"):
        merge_stores([tmp_path / "a", tmp_path / "b"], tmp_path / "out")


def test_an_interrupted_append_leaves_the_store_and_can_be_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "a")
    write(tmp_path / "b", make_rows(6), ids=list("uvwxyz"), dataset_fingerprint="e" * 64).finalize()
    with monkeypatch.context() as patch:
        patch.setattr(StoreWriter, "finalize", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            append_store(tmp_path / "a", tmp_path / "b")
    assert len(open_store(tmp_path / "a")) == 10
    assert ["not in the manifest" in line for line in verify_store(tmp_path / "a")] == [True, True]
    assert len(append_store(tmp_path / "a", tmp_path / "b")) == 16
    assert verify_store(tmp_path / "a") == []
