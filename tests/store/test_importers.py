"""Gradients of other tools, in files laid out as those tools write them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.lib.format import open_memmap
from safetensors.torch import save_file

from influence_fast.cli import main
from influence_fast.errors import ConfigError, StoreError
from influence_fast.gradients.rows.projection import Projection
from influence_fast.store.identity import projection_fields
from influence_fast.store.importers import import_gradients
from influence_fast.store.manifest import ModuleEntry
from influence_fast.store.merge import merge_stores
from influence_fast.store.reader import StoreIdentity, open_store
from influence_fast.store.verification import verify_store

ROWS, WIDTH = 37, 24


def make_rows(n: int = ROWS, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, WIDTH, generator=torch.Generator().manual_seed(seed)).to(dtype)


# ---- writers of the foreign formats, after their sources ------------------------------------------------------------


def write_less(folder: Path, rows: torch.Tensor, step: int = 16, merged: bool = True) -> None:
    """collect_grads: a piece every `step` rows, named by the count so far; then the merged files."""
    folder.mkdir(parents=True)
    for start in range(0, len(rows), step):
        piece = rows[start : start + step].clone()
        torch.save(piece, folder / f"grads-{start + len(piece)}.pt")
    if merged:
        torch.save(torch.nn.functional.normalize(rows.float(), dim=1), folder / "all_orig.pt")
        torch.save(rows.clone(), folder / "all_unormalized.pt")


def write_trak(
    folder: Path, rows: torch.Tensor, model_ids: tuple[int, ...] = (0,), done: np.ndarray | None = None
) -> None:
    """MmapSaver: npy files called .mmap, one folder a checkpoint."""
    folder.mkdir(parents=True)
    metadata = {"JL dimension": rows.shape[1], "JL matrix type": "rademacher", "train set size": len(rows)}
    (folder / "metadata.json").write_text(json.dumps(metadata))
    (folder / "scores").mkdir()
    for model_id in model_ids:
        (folder / str(model_id)).mkdir()
        for scale, kind in ((1, "grads"), (2, "features")):
            array = open_memmap(
                folder / str(model_id) / f"{kind}.mmap", mode="w+", shape=tuple(rows.shape), dtype=rows.numpy().dtype
            )
            array[:] = scale * rows.numpy() + model_id
            array.flush()
        flags = open_memmap(
            folder / str(model_id) / "_is_featurized.mmap", mode="w+", shape=(len(rows), 1), dtype=np.int32
        )
        flags[:, 0] = 1 if done is None else done
        flags.flush()


SIZES = {"layers.0.q_proj": 6, "layers.0.up_proj": 10, "layers.1.q_proj": 8}


def write_bergson(folder: Path, rows: torch.Tensor, *, old: bool = False, **changes: Any) -> None:
    """create_index: flat memory map and info.json; before base_dtype, a structured dtype (bf16 as 2-byte voids)."""
    folder.mkdir(parents=True)
    data = rows.view(torch.int16).numpy() if rows.dtype == torch.bfloat16 else rows.numpy()
    data.tofile(folder / "gradients.bin")
    info: dict[str, Any] = {"num_grads": len(rows), "grad_sizes": SIZES}
    if old:
        code = "<V2" if rows.dtype == torch.bfloat16 else data.dtype.str
        info["dtype"] = {
            "names": list(SIZES),
            "formats": [f"({size},){code}" for size in SIZES.values()],
            "itemsize": data.dtype.itemsize * rows.shape[1],
        }
    else:
        name = "bfloat16" if rows.dtype == torch.bfloat16 else data.dtype.name
        info |= {"attribute_tokens": False, "num_items": len(rows), "base_dtype": name}
    (folder / "info.json").write_text(json.dumps(info | changes))


# ---- what comes out ------------------------------------------------------------------------------------------------

Write = Callable[[Path, torch.Tensor], None]
FORMATS: dict[str, tuple[str, Write]] = {
    "less": ("less", write_less),
    "less-pieces": ("less", lambda path, rows: write_less(path, rows, merged=False)),
    "trak": ("trak", write_trak),
    "bergson": ("bergson", write_bergson),
    "bergson-old": ("bergson", lambda path, rows: write_bergson(path, rows, old=True)),
    "npy": ("npy", lambda path, rows: np.save(path.with_suffix(".npy"), rows.numpy())),
    "safetensors": ("safetensors", lambda path, rows: save_file({"g": rows}, path.with_suffix(".safetensors"))),
}
SUFFIX = {"npy": ".npy", "safetensors": ".safetensors"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("format", list(FORMATS))
def test_rows_arrive_exactly_with_their_ids(tmp_path: Path, format: str, dtype: torch.dtype) -> None:
    if dtype == torch.bfloat16 and format in ("trak", "npy"):
        pytest.skip("numpy files hold no bf16")
    rows = make_rows(dtype=dtype)
    name, write = FORMATS[format]
    source = (tmp_path / "source").with_suffix(SUFFIX.get(format, ""))
    write(tmp_path / "source", rows)
    store = import_gradients(source, tmp_path / "out")
    assert torch.equal(store.rows(), rows.float())
    assert store.ids == [str(i) for i in range(ROWS)]
    assert store.identity.projection_kind == "unknown"
    assert verify_store(tmp_path / "out") == []
    ids = [f"doc {i}" for i in range(ROWS)]
    named = import_gradients(source, tmp_path / "named", format=name, ids=ids, dtype="bf16")
    assert named.ids == ids
    assert torch.equal(named.rows(), rows.float().bfloat16().float())


@pytest.mark.parametrize("format", list(FORMATS))
def test_one_row_and_many_shards(tmp_path: Path, format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("influence_fast.store.importers._MAX_SHARD_ROWS", 5)
    _, write = FORMATS[format]
    for n in (1, ROWS):
        source = (tmp_path / f"source{n}").with_suffix(SUFFIX.get(format, ""))
        write(tmp_path / f"source{n}", make_rows(n))
        store = import_gradients(source, tmp_path / f"out{n}")
        assert torch.equal(store.rows(), make_rows(n))
        assert store.manifest.shard_count == -(-n // 5)


def test_what_is_known_of_the_source_is_kept_and_checked(tmp_path: Path) -> None:
    np.save(tmp_path / "g.npy", make_rows().numpy())
    known = StoreIdentity(model_hash="a" * 64, **projection_fields(Projection(dim=4, seed=7)))
    store = import_gradients(tmp_path / "g.npy", tmp_path / "out", identity=known)
    assert store.projection == Projection(dim=4, seed=7)
    with pytest.raises(StoreError, match="another model"):
        open_store(tmp_path / "out", expect={"model_hash": "b" * 64})
    plain = import_gradients(tmp_path / "g.npy", tmp_path / "plain")
    with pytest.raises(StoreError, match="does not record its projection"):
        _ = plain.projection


def test_a_changed_source_is_not_taken_for_the_imported_one(tmp_path: Path) -> None:
    known = StoreIdentity(dataset_fingerprint="a" * 64)
    np.save(tmp_path / "g.npy", make_rows().numpy())
    import_gradients(tmp_path / "g.npy", tmp_path / "out", identity=known)
    np.save(tmp_path / "g.npy", make_rows(seed=1).numpy())
    with pytest.raises(StoreError, match=r"dataset_fingerprint is .* in the store and .* here"):
        import_gradients(tmp_path / "g.npy", tmp_path / "out", identity=known)


def test_rows_that_are_not_finite_are_set_aside(tmp_path: Path) -> None:
    rows = make_rows()
    rows[4, 1], rows[30, 0] = torch.nan, torch.inf
    np.save(tmp_path / "g.npy", rows.numpy())
    store = import_gradients(tmp_path / "g.npy", tmp_path / "out")
    kept = [i for i in range(ROWS) if i not in (4, 30)]
    assert store.set_aside == [(i, "the gradient is NaN or infinite") for i in ("4", "30")]
    assert store.ids == [str(i) for i in kept]
    assert torch.equal(store.rows(), rows[kept])


def test_an_interrupted_import_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("influence_fast.store.importers._MAX_SHARD_ROWS", 5)
    np.save(tmp_path / "g.npy", make_rows().numpy())
    whole = import_gradients(tmp_path / "g.npy", tmp_path / "out")
    (tmp_path / "out" / "shard-00003.json").unlink()
    again = import_gradients(tmp_path / "g.npy", tmp_path / "out")
    assert torch.equal(again.rows(), whole.rows())
    with pytest.raises(StoreError, match="already holds a store"):
        import_gradients(tmp_path / "g.npy", tmp_path / "out", resume=False)
    np.save(tmp_path / "g.npy", make_rows(seed=1).numpy())  # same name, same shape, other numbers
    with pytest.raises(StoreError, match="another dataset"):
        import_gradients(tmp_path / "g.npy", tmp_path / "out")


# ---- LESS ----------------------------------------------------------------------------------------------------------


def test_less_files_are_chosen_in_the_order_of_what_they_keep(tmp_path: Path) -> None:
    rows = make_rows()
    write_less(tmp_path / "dim24", rows)
    unit = torch.nn.functional.normalize(rows, dim=1)
    assert torch.equal(import_gradients(tmp_path / "dim24", tmp_path / "a").rows(), rows)
    chosen = import_gradients(tmp_path / "dim24", tmp_path / "b", file="all_orig.pt")
    assert torch.equal(chosen.rows(), unit)
    assert "unit norm" in chosen.manifest.source
    assert torch.equal(import_gradients(tmp_path / "dim24" / "all_orig.pt", tmp_path / "c").rows(), unit)
    with pytest.raises(ConfigError, match=r"file='grads-16.pt' beside the file .*all_orig.pt"):
        import_gradients(tmp_path / "dim24" / "all_orig.pt", tmp_path / "d", file="grads-16.pt")
    for path in [*(tmp_path / "dim24").glob("grads-*"), tmp_path / "dim24" / "all_unormalized.pt"]:
        path.unlink()
    assert torch.equal(import_gradients(tmp_path / "dim24", tmp_path / "d").rows(), unit)
    with pytest.raises(StoreError, match="give one of its folders: dim24"):
        import_gradients(tmp_path, tmp_path / "e")


def test_less_pieces_are_ordered_by_number_and_must_be_all_there(tmp_path: Path) -> None:
    rows = make_rows(210)
    write_less(tmp_path / "g", rows, step=7, merged=False)  # grads-7 comes before grads-14 and grads-105
    assert torch.equal(import_gradients(tmp_path / "g", tmp_path / "out").rows(), rows)
    (tmp_path / "g" / "grads-14.pt").unlink()
    with pytest.raises(StoreError, match=r"grads-21.pt should end at row 21, it ends at 14"):
        import_gradients(tmp_path / "g", tmp_path / "out2")


def test_less_files_of_the_old_torch_format_are_read(tmp_path: Path) -> None:
    torch.save(make_rows(), tmp_path / "grads.pt", _use_new_zipfile_serialization=False)
    assert torch.equal(import_gradients(tmp_path / "grads.pt", tmp_path / "out").rows(), make_rows())


class Unsafe:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("pwned"),))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (Unsafe(), "cannot be read as a tensor"),
        ({"a": torch.zeros(2, 2)}, "holds a dict"),
        (torch.zeros(3), r"floats \[rows, width\]"),
        (torch.zeros(3, 2, dtype=torch.int64), "floats"),
    ],
)
def test_less_files_that_are_no_matrix_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: Any, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(value, tmp_path / "x.pt")
    with pytest.raises(StoreError, match=message):
        import_gradients(tmp_path / "x.pt", tmp_path / "out")
    assert not (tmp_path / "pwned").exists()


# ---- TRAK ----------------------------------------------------------------------------------------------------------


def test_trak_checkpoints_and_kinds_are_chosen_by_name(tmp_path: Path) -> None:
    rows = make_rows()
    write_trak(tmp_path / "t", rows, model_ids=(0, 3))
    with pytest.raises(StoreError, match=r"checkpoints 0, 3; choose one with model_id="):
        import_gradients(tmp_path / "t", tmp_path / "a")
    chosen = import_gradients(tmp_path / "t", tmp_path / "b", model_id=3, kind="features")
    assert torch.equal(chosen.rows(), 2 * rows + 3)
    with pytest.raises(StoreError, match=r"has no checkpoint 1, but 0, 3"):
        import_gradients(tmp_path / "t", tmp_path / "c", model_id=1)
    with pytest.raises(ConfigError, match="unknown kind 'scores'"):
        import_gradients(tmp_path / "t", tmp_path / "d", model_id=0, kind="scores")


@pytest.mark.parametrize("flat", [False, True])
def test_trak_rows_that_were_not_featurized_are_set_aside(tmp_path: Path, flat: bool) -> None:
    done = np.ones(ROWS, dtype=np.int32)
    done[[2, 36]] = 0
    write_trak(tmp_path / "t", make_rows(), done=done)
    if flat:
        np.save(tmp_path / "f.npy", done)
        (tmp_path / "f.npy").replace(tmp_path / "t" / "0" / "_is_featurized.mmap")
    store = import_gradients(tmp_path / "t", tmp_path / "out")
    assert store.set_aside == [(i, "TRAK did not featurize it") for i in ("2", "36")]
    assert torch.equal(store.rows(), make_rows()[done.astype(bool)])


def test_trak_files_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    write_trak(tmp_path / "t", make_rows())
    (tmp_path / "t" / "metadata.json").write_text(json.dumps({"JL dimension": WIDTH, "train set size": 36}))
    with pytest.raises(StoreError, match=r"train set size 36; they do not belong"):
        import_gradients(tmp_path / "t", tmp_path / "out")
    path = tmp_path / "t" / "0" / "grads.mmap"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(StoreError, match=r"grads.mmap cannot be read as a numpy file"):
        import_gradients(tmp_path / "t", tmp_path / "out")


# ---- bergson -------------------------------------------------------------------------------------------------------


def test_bergson_modules_keep_their_places(tmp_path: Path) -> None:
    write_bergson(tmp_path / "b", make_rows())
    store = import_gradients(tmp_path / "b", tmp_path / "out")
    assert store.manifest.modules == (
        ModuleEntry("layers.0.q_proj", "gradient", (1, 6), 0),
        ModuleEntry("layers.0.up_proj", "gradient", (1, 10), 6),
        ModuleEntry("layers.1.q_proj", "gradient", (1, 8), 16),
    )


def test_bergson_shards_are_joined_in_order(tmp_path: Path) -> None:
    rows = make_rows()
    for k, (start, stop) in enumerate(((0, 10), (10, 11), (11, ROWS))):
        write_bergson(tmp_path / "b" / f"shard-{k:05d}", rows[start:stop].clone())
    assert torch.equal(import_gradients(tmp_path / "b", tmp_path / "out").rows(), rows)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attribute_tokens": True}, "a row a token"),
        ({"num_grads": ROWS + 1}, "build it again"),
        ({"base_dtype": "float128x"}, "unknown dtype"),
        ({"grad_sizes": {}}, "build it again"),
        ({"grad_sizes": None}, "not bergson's"),
    ],
)
def test_bergson_indices_that_cannot_be_used_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    write_bergson(tmp_path / "b", make_rows(), **changes)
    with pytest.raises(StoreError, match=message):
        import_gradients(tmp_path / "b", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---- plain files ---------------------------------------------------------------------------------------------------


def test_safetensors_tensors_are_chosen_by_name(tmp_path: Path) -> None:
    path = tmp_path / "g.safetensors"
    save_file({"a": make_rows(), "b": make_rows(seed=1), "c": torch.zeros(3)}, path)
    with pytest.raises(StoreError, match=r"3 tensors \(a, b, c\); choose one with key="):
        import_gradients(path, tmp_path / "x")
    assert torch.equal(import_gradients(path, tmp_path / "out", key="b").rows(), make_rows(seed=1))
    with pytest.raises(StoreError, match="no tensor 'd'"):
        import_gradients(path, tmp_path / "x", key="d")
    with pytest.raises(StoreError, match="floats"):
        import_gradients(path, tmp_path / "x", key="c")


@pytest.mark.parametrize("name", ["x.npy", "x.safetensors", "x.pt"])
def test_damaged_files_are_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x93NUMPY but not quite")
    with pytest.raises(StoreError, match=f"{name} cannot be read"):
        import_gradients(tmp_path / name, tmp_path / "out")


def test_pickled_numpy_arrays_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.array([Unsafe()], dtype=object), allow_pickle=True)
    with pytest.raises(StoreError, match="cannot be read"):
        import_gradients(tmp_path / "x.npy", tmp_path / "out")


def test_the_command_passes_ids_and_options_of_the_format(tmp_path: Path) -> None:
    source, ids = tmp_path / "g.safetensors", tmp_path / "ids.txt"
    save_file({"a": make_rows(), "b": make_rows(seed=1)}, source)
    ids.write_text("".join(f"example {i}\n" for i in range(ROWS)), encoding="utf-8-sig")  # as Windows editors save it
    command = ["import", str(source), "--output", str(tmp_path / "s"), "--option", "key=b", "--ids", str(ids)]
    assert main(command) == 0
    store = open_store(tmp_path / "s")
    assert torch.equal(store.rows(), make_rows(seed=1))
    assert store.ids == [f"example {i}" for i in range(ROWS)]
    write_trak(tmp_path / "t", make_rows(), model_ids=(0, 3))
    command = ["import", str(tmp_path / "t"), "--output", str(tmp_path / "u"), "--option", "model_id=3"]
    assert main([*command, "--option", "kind=features"]) == 0
    assert torch.equal(open_store(tmp_path / "u").rows(), 2 * make_rows() + 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "holds 2 tensors (a, b); choose one with --option key=..."),
        (["--option", "keys=a"], "--option keys: no format has it; did you mean 'key'?"),
        (["--option", "resume=no"], "--option resume: no format has it"),
        (["--option", "key=a", "--option", "key=b"], "--option key is given twice"),
        (["--option", "kind=grads"], "format 'safetensors' has no option 'kind'; known: key"),
        (["--format", "bergson", "--option", "key=a"], "format 'bergson' has no option 'key'; it has none"),
        (["--format", "trak"], "g.safetensors is a file, and TRAK's save_dir is a folder"),
        (["--option", "key=a", "--ids", "ids.txt"], "37 rows; give as many ids"),
        (["--option", "key=a", "--ids", "g.safetensors"], "--ids g.safetensors: not UTF-8 text"),
    ],
)
def test_the_command_names_its_own_options(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    save_file({"a": make_rows(), "b": make_rows(seed=1)}, "g.safetensors")
    Path("ids.txt").write_text("one\n")
    assert main(["import", "g.safetensors", "--output", "s", *options]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_bad_requests_are_named(tmp_path: Path) -> None:
    np.save(tmp_path / "g.npy", make_rows().numpy())
    source, out = tmp_path / "g.npy", tmp_path / "out"
    with pytest.raises(StoreError, match="37 rows; give as many ids"):
        import_gradients(source, out, ids=["a"])
    with pytest.raises(StoreError, match="more than once: a"):
        import_gradients(source, out, ids=["a"] * ROWS)
    with pytest.raises(ConfigError, match="unknown gradient format 'bergsen'; did you mean 'bergson'"):
        import_gradients(source, out, format="bergsen")
    with pytest.raises(ConfigError, match="format 'npy' has no option 'key'"):
        import_gradients(source, out, key="a")
    with pytest.raises(StoreError, match="does not exist"):
        import_gradients(tmp_path / "nothing", out)
    (tmp_path / "folder").mkdir()
    with pytest.raises(StoreError, match="no known gradients found"):
        import_gradients(tmp_path / "folder", out)
    assert not out.exists()


def test_rows_of_unknown_makes_are_joined_with_a_warning(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", make_rows().numpy())
    write_trak(tmp_path / "t", make_rows())
    import_gradients(tmp_path / "a.npy", tmp_path / "a", ids=[f"a{i}" for i in range(len(make_rows()))])
    import_gradients(tmp_path / "t", tmp_path / "b", ids=[f"b{i}" for i in range(len(make_rows()))])
    with pytest.warns(UserWarning, match="neither says by which model and projection"):
        merge_stores([tmp_path / "a", tmp_path / "b"], tmp_path / "both")


def test_a_tensor_that_requires_a_gradient_is_imported(tmp_path: Path) -> None:
    rows = torch.arange(12.0).reshape(3, 4)
    torch.save(rows.clone().requires_grad_(), tmp_path / "all_orig.pt")
    store = import_gradients(tmp_path / "all_orig.pt", tmp_path / "store")
    (block,) = [values for _, values, _ in store.blocks()]
    assert torch.equal(torch.as_tensor(block), rows)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["sparse", "csr", "meta", "nested", "expanded"])
def test_tensors_that_are_no_dense_matrix_are_refused(kind: str, tmp_path: Path) -> None:
    rows = torch.ones(3, 4)
    tensor = {
        "sparse": rows.to_sparse,
        "csr": rows.to_sparse_csr,
        "meta": lambda: rows.to("meta"),
        "nested": lambda: torch.nested.nested_tensor([rows[0], rows[1, :2]]),
        "expanded": lambda: torch.zeros(1, 1).expand(100_000, 100_000),
    }[kind]()
    torch.save(tensor, tmp_path / "all_orig.pt")
    with pytest.raises(StoreError, match=r"all_orig\.pt (holds a|says that it is)"):
        import_gradients(tmp_path / "all_orig.pt", tmp_path / "store")


@pytest.mark.parametrize("stated", ["O", "int32", "f4,f4", "datetime64", 5])
def test_bergson_kinds_that_are_no_floats_are_refused(stated: object, tmp_path: Path) -> None:
    import json

    (tmp_path / "info.json").write_text(json.dumps({"num_grads": 3, "grad_sizes": {"a": 4}, "base_dtype": stated}))
    (tmp_path / "gradients.bin").write_bytes(bytes(48))
    with pytest.raises(StoreError, match="unknown dtype"):
        import_gradients(tmp_path, tmp_path / "store")
