"""A store's rows in the forms that other libraries read: a `datasets.Dataset` and a safetensors file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from influence_fast.atomic import replacing
from influence_fast.row_codec import bf16_of_bits

if TYPE_CHECKING:
    from influence_fast.store.reader import Store


def as_dataset(store: Store) -> Any:
    """Return a `datasets.Dataset` of the columns `id`, `gradient` (float32, all of `width`) and, if known, `loss`."""
    from datasets import Dataset, Features, List, Value

    columns = {"id": Value("string"), "gradient": List(Value("float32"), length=store.width)}
    if store.losses is not None:
        columns["loss"] = Value("float32")

    values: dict[str, Any] = {"id": store.ids, "gradient": [row.numpy() for row in store]}
    if store.losses is not None:
        values["loss"] = store.losses
    return Dataset.from_dict(values, features=Features(columns))


def save_safetensors(store: Store, path: Path) -> None:
    """Write the rows as they are stored, [N, width] fp32, bf16 or int8, as the tensor `rows`.

    Beside it `scales` [N] float32 (int8 alone: number = row * scale) and `losses` [N] float32 where they are known; the
    metadata has `ids` as a JSON list. All rows pass through memory. The file appears whole or not at all.
    """
    from safetensors.torch import save_file

    raw, scales = [], []
    for _, block, scale in store.blocks():
        raw.append(np.array(block))
        if scale is not None:
            scales.append(np.array(scale))
    tensors = {"rows": _tensor(np.concatenate(raw) if raw else np.zeros((0, store.width), np.float32))}
    if scales:
        tensors["scales"] = torch.from_numpy(np.concatenate(scales))
    if store.losses is not None:
        tensors["losses"] = torch.from_numpy(np.array(store.losses))
    with replacing(path) as temporary:
        save_file(tensors, str(temporary), metadata={"ids": json.dumps(store.ids)})


def _tensor(raw: np.ndarray) -> torch.Tensor:
    """Give bf16 bits, which numpy holds as uint16, their type."""
    if raw.dtype == np.uint16:
        return bf16_of_bits(raw)
    return torch.from_numpy(raw)
