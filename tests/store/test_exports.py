"""A store as what other libraries hold: by id, as an array, a `datasets.Dataset` and a safetensors file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from test_store import make_rows, write

from influence_fast.errors import StoreError
from influence_fast.store.importers import import_gradients
from influence_fast.store.reader import Store


def stored(path: Path, dtype: str = "fp32", losses: bool = True) -> Store:
    rows = make_rows(7)
    return write(
        path, rows, shard_rows=3, dtype=dtype, losses=np.arange(7, dtype=np.float32) if losses else None
    ).finalize()


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
def test_a_row_is_had_by_its_id_and_by_its_place(tmp_path: Path, dtype: str) -> None:
    store = stored(tmp_path / "s", dtype)
    rows = store.rows()
    assert torch.equal(store["example 5"], rows[5])
    assert torch.equal(store[5], rows[5])
    assert torch.equal(store[-1], rows[6])
    assert torch.equal(store[1:4], rows[1:4])
    assert torch.equal(store[["example 6", "example 0"]], rows[[6, 0]])
    assert torch.equal(store[[6, 0]], rows[[6, 0]])
    assert torch.equal(store[np.arange(7) % 2 == 0], rows[::2])
    assert "example 5" in store
    assert "example 7" not in store
    with pytest.raises(StoreError, match="example 7"):
        store["example 7"]
    with pytest.raises(StoreError, match="no row 7"):
        store[7]


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
def test_iteration_and_arrays_give_every_row_in_order(tmp_path: Path, dtype: str) -> None:
    store = stored(tmp_path / "s", dtype)
    assert torch.equal(torch.stack(list(store)), store.rows())
    assert np.array_equal(np.asarray(store), store.rows().numpy())
    assert np.asarray(store, dtype=np.float64).dtype == np.float64
    with pytest.raises(ValueError, match="copy"):
        np.asarray(store, copy=False)


@pytest.mark.parametrize("losses", [True, False])
def test_a_dataset_has_ids_rows_and_known_losses(tmp_path: Path, losses: bool) -> None:
    store = stored(tmp_path / "s", "int8", losses)
    dataset = store.to_dataset()
    assert dataset["id"][:] == store.ids
    assert np.array_equal(np.array(dataset["gradient"][:], np.float32), store.rows().numpy())
    assert ("loss" in dataset.column_names) == losses
    assert not losses or dataset["loss"][:] == list(range(7))


def test_a_store_of_no_rows_is_an_empty_dataset(tmp_path: Path) -> None:
    store = write(tmp_path / "s", make_rows(0)).finalize()
    assert len(store.to_dataset()) == 0


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
def test_a_safetensors_file_holds_the_rows_as_they_are_stored(tmp_path: Path, dtype: str) -> None:
    store = stored(tmp_path / "s", dtype)
    store.to_safetensors(tmp_path / "rows.safetensors")
    with safe_open(tmp_path / "rows.safetensors", "pt") as file:
        assert json.loads(file.metadata()["ids"]) == store.ids
        rows, kinds = file.get_tensor("rows"), {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}
        assert rows.dtype == kinds[dtype]
        scales = file.get_tensor("scales")[:, None] if dtype == "int8" else 1
        assert torch.equal(rows.float() * scales, store.rows())
        assert file.get_tensor("losses").tolist() == list(range(7))


def test_what_is_written_as_safetensors_can_be_imported(tmp_path: Path) -> None:
    store = stored(tmp_path / "s")
    store.to_safetensors(tmp_path / "rows.safetensors")
    again = import_gradients(tmp_path / "rows.safetensors", tmp_path / "again", ids=store.ids, key="rows", dtype="fp32")
    assert torch.equal(again.rows(), store.rows())
