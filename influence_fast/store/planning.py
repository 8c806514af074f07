"""What a store that is to be built will say of itself: its identity, its layout and how it is cut into shards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

import influence_fast
from influence_fast.data.fingerprints import dataset_fingerprint, tokenizer_hash, weight_hashes
from influence_fast.gradients.rows.layout import layout_width
from influence_fast.gradients.rows.precision import AUTO
from influence_fast.gradients.rows.projection import Projection
from influence_fast.gradients.rows.row_spec import RowSpec
from influence_fast.gradients.targets import gradient_layout
from influence_fast.store.identity import StoreIdentity, projection_fields
from influence_fast.store.manifest import MANIFEST_NAME, Manifest, ModuleEntry, Part, joined_fingerprint
from influence_fast.store.shard_rows import Texts
from influence_fast.store.survey import Survey

_SHARD_ROWS = 1024
_SHARD_BYTES = 1 << 28  # in fp32, in memory, while a shard is computed


def plan(model: nn.Module, survey: Survey, spec: RowSpec, texts: Texts, shard_rows: int | None) -> Manifest:
    """Return the manifest of a store that is to be built.

    shard_rows: by default 1024, or as many as fit 256 MiB in fp32. Raises as `gradient_layout`, and ConfigError for a
    sketch that was fitted on another model.
    """
    projection = spec.projection()
    layout = gradient_layout(model, projection)
    if projection is not None and projection.sketch is not None:
        projection.sketch.check_layout(layout)
    width = layout_width(layout) if projection is None or projection.width is None else projection.width
    if shard_rows is None:
        shard_rows = max(1, min(_SHARD_ROWS, _SHARD_BYTES // (4 * width)))
    fingerprint, examples = survey.fingerprint, len(survey.sizes)
    tokenizer = texts.tokenizer if survey.texts else None
    made = identity_of(
        model, tokenizer, projection=projection, loss_reduction=spec.loss_reduction, precision=spec.precision
    )
    identity = replace(
        made,
        dataset_fingerprint=fingerprint,
        tokenization=tokenization_of(tokenizer, texts.max_length, texts.truncate),
    )
    return Manifest(
        identity=identity,
        modules=tuple(ModuleEntry(e.module, e.factor, tuple(e.shape), e.offset) for e in layout),
        dtype=spec.dtype,
        width=width,
        parts=(Part(fingerprint, examples, shard_rows, -(-examples // shard_rows)),),
        source="build_store",
        code_version=influence_fast.__version__,
    )


def with_parts_there(manifest: Manifest, folder: Path, dataset: Sequence[Any]) -> Manifest:
    """Return the manifest with the parts of a store in `folder` that was joined of stores of the dataset's pieces."""
    joined = _joined_there(folder, dataset)
    if joined is None:
        return manifest
    identity = replace(manifest.identity, dataset_fingerprint=joined_fingerprint(joined))
    return replace(manifest, identity=identity, parts=joined)


def identity_of(
    model: nn.Module,
    tokenizer: Any = None,
    *,
    projection: Projection | None,
    loss_reduction: str = "mean",
    precision: str = AUTO,
) -> StoreIdentity:
    """Return the identity of a store built with these, for `open_store(path, expect=...)`; data is left unchecked."""
    model_hash, adapter_hash = weight_hashes(model)
    return StoreIdentity(
        model_id=_model_id(model),
        model_hash=model_hash,
        adapter_hash=adapter_hash,
        tokenizer_hash=None if tokenizer is None else tokenizer_hash(tokenizer),
        loss_reduction=loss_reduction,
        precision=precision,
        **projection_fields(projection),
    )


def tokenization_of(tokenizer: Any, max_length: int | None, truncate: bool) -> str:
    """Return how a store's texts became tokens, as its identity has it; `tokenizer` None: they came as tokens."""
    how = f"max_length={max_length}, truncate={truncate}"
    if tokenizer is None:
        return f"as given, {how}"
    from influence_fast.data.tokens import tokenization_hash

    return f"text, {how}, tokens {tokenization_hash(tokenizer)[:16]}"


def _joined_there(folder: Path, dataset: Sequence[Any]) -> tuple[Part, ...] | None:
    """Return the parts of a store joined of stores of the dataset's pieces, in its order; None for any other."""
    if not (folder / MANIFEST_NAME).exists():
        return None
    parts = Manifest.load(folder).parts
    if len(parts) < 2 or sum(part.examples for part in parts) != len(dataset):
        return None
    offset = 0
    for part in parts:
        piece = range(offset, offset + part.examples)
        if dataset_fingerprint(dataset[i] for i in piece) != part.dataset_fingerprint:
            return None
        offset += part.examples
    return parts


def _model_id(model: nn.Module) -> str | None:
    config = getattr(model, "config", None)
    return getattr(config, "_name_or_path", None) or getattr(config, "model_type", None)
