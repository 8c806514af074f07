"""Embeddings that grow or shrink with an adapter: as many rows as it was trained with."""

from __future__ import annotations

import logging
import re
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from influence_fast.data.adapter_names import plain_name
from influence_fast.errors import ModelError, truncated_list, warn_once
from influence_fast.guards import reading
from influence_fast.training.adapter_bases import name_of
from influence_fast.training.adapter_files import WRAPPERS, Shapes, adapter_folder, lora_config, stored_shapes
from influence_fast.training.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS

logger = logging.getLogger(__name__)


#: Embeddings that a resized base had of its own; further rows are no weights to compare an adapter's with.
OWN_ROWS: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()


def fit_vocabulary(model: nn.Module, adapter: str, source: str) -> None:
    """Set the number of `model`'s embeddings, in place, to as many as the adapter stores, if it stores any.

    New rows are the mean of the old ones until the adapter brings its own, and again when it is taken off. That is
    said once. Nothing is done for the folder of a whole fine-tuned model.

    Raises ModelError where the adapter's embeddings contradict each other, or only one of two matrices is stored.
    """
    folder = Path(adapter).expanduser()
    if (folder / "config.json").exists() and not (folder / ADAPTER_CONFIG).exists():
        return
    with reading(f"the adapter {adapter}", ModelError):
        local = adapter_folder(adapter)
        config = lora_config(local, adapter)
        fit_to_adapter(model, stored_shapes(local, adapter), config, adapter, source or "this model")


@contextmanager
def kept_embeddings(model: nn.Module, adapter: str) -> Iterator[None]:
    """Restore the embeddings of `model` at the end, which an adapter that stores its own writes over.

    They are copied only where the adapter stores some. A resized vocabulary keeps its new size.
    """
    if Path(adapter).expanduser().is_dir() and not (Path(adapter).expanduser() / ADAPTER_WEIGHTS).is_file():
        yield
        return
    if stored := stored_embeddings(model, stored_shapes(adapter_folder(adapter), adapter)):
        fit_vocabulary(model, adapter, name_of(model))  # now, as it makes other matrices
    matrices = dict(embedding_matrices(model))
    before = {name: matrices[name].detach().clone() for name in stored}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, values in before.items():
                matrices[name].copy_(values)


def embedding_matrices(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the input embeddings and the output head of a model without an adapter, by their modules' names."""
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]  # type: ignore[operator]
    for name, module in model.named_modules():
        if any(module is end for end in ends):
            yield name, module.weight  # type: ignore[misc]


def stored_embeddings(model: nn.Module, shapes: Shapes) -> dict[str, set[int]]:
    """Return the rows of every embedding matrix that the adapter stores, by module; several if its tensors disagree."""
    found: dict[str, set[int]] = {}
    for name, _ in embedding_matrices(model):
        whole = re.compile(rf"{re.escape(name)}{WRAPPERS}\.weight")
        if rows := {shape[0] for key, shape in shapes.items() if whole.fullmatch(plain_name(key))}:
            found[name] = rows
    return found


def fit_to_adapter(model: Any, shapes: Shapes, config: Any, adapter: str, source: str) -> None:
    matrices = dict(embedding_matrices(model))
    stored = stored_embeddings(model, shapes)
    size = model.get_input_embeddings().weight.shape[0]
    sizes = sorted(set().union(*stored.values()))
    if len(sizes) > 1:
        raise ModelError(
            f"the adapter {adapter} stores embeddings of {truncated_list(map(str, sizes))} tokens in one; save it "
            "again from the model it was trained in"
        )
    if sizes and sizes[0] != size:
        tied = len({id(weight) for weight in matrices.values()}) == 1
        if missing := [name for name in matrices if name not in stored and not tied]:
            raise ModelError(
                f"the adapter {adapter} stores {sizes[0]} embeddings where {source} has {size}, and none for "
                f"{missing[0]}; save it again with save_pretrained(..., save_embedding_layers=True)"
            )
        _resize(model, sizes[0])
        warn_once(
            logger,
            f"the adapter {adapter} was trained with {sizes[0]} embeddings: those of {source} ({size}) are resized; "
            "without the adapter the added ones are the mean of the others",
        )
    rows = sizes[0] if sizes else size
    if beyond := [index for index in _trained_tokens(config) if not 0 <= index < rows]:
        raise ModelError(
            f"the adapter {adapter} trains token {beyond[0]} (trainable_token_indices), and {source} has embeddings "
            f"for {rows}; save it again with save_pretrained(..., save_embedding_layers=True)"
        )


def _trained_tokens(config: Any) -> list[int]:
    indices = getattr(config, "trainable_token_indices", None) or []
    return sorted(index for one in indices.values() for index in one) if isinstance(indices, dict) else sorted(indices)


def _resize(model: Any, rows: int) -> None:
    """Set the rows of input and output embeddings; what is added is the mean of what there was.

    transformers would draw the added rows at random, and a base that comes out otherwise each time has another hash.
    """
    from transformers.utils import logging as transformers_logging

    size = model.get_input_embeddings().weight.shape[0]
    OWN_ROWS[model] = min(size, rows, OWN_ROWS.get(model, size))
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        model.resize_token_embeddings(rows, mean_resizing=False)
    finally:
        transformers_logging.set_verbosity(verbosity)
    with torch.no_grad():
        for _, weight in embedding_matrices(model):
            if rows > size:
                weight[size:] = weight[:size].double().mean(dim=0).to(weight.dtype)
