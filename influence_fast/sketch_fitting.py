"""Fits an `eigen_sketch` on the gradients of a sample, in one process or for many that share a store's folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from influence_fast.damping import Damping, check_damping
from influence_fast.eigen_sketch import DEFAULT_EXAMPLES, EigenSketch, check_projection, kept_sketch
from influence_fast.ekfac import Ekfac, fit_ekfac
from influence_fast.errors import ConfigError, DataError
from influence_fast.fingerprints import adapter_hash, dataset_fingerprint
from influence_fast.gradients import iter_gradient_rows
from influence_fast.lora import gradient_layout, layout_width
from influence_fast.projection import Projection
from influence_fast.shard_rows import GradientSource, tokenized

_PIECE = 1 << 24  # numbers of rows that are turned into fp64 at a time

Find = Callable[[], EigenSketch | None]  # what is kept already
Fit = Callable[[Callable[[], None]], EigenSketch]  # fits it anew; its argument is called after each batch
Keep = Callable[[EigenSketch], None]


def fit_eigen_sketch(
    model: torch.nn.Module,
    dataset: Sequence[Any],
    tokenizer: Any = None,
    *,
    projection: Projection,
    examples: int = DEFAULT_EXAMPLES,
    damping: Damping = 0.1,
    loss_reduction: str = "mean",
    precision: str = "auto",
    max_tokens: int | None = None,
    max_length: int | None = None,
    truncate: bool = False,
    folder: str | Path | None = None,
    gradients: GradientSource | None = None,
    share: Callable[[Find, Fit, Keep], EigenSketch] | None = None,
) -> EigenSketch:
    """Fits the sketch of `projection` on the gradients of some examples of `dataset`, drawn without looking at them.

    Args:
        model, dataset, tokenizer, loss_reduction, precision, max_tokens, max_length, truncate, gradients: as for
            `build_store`; give both the same. Tokenized examples need no "id" here.
        projection: kind "one_sided" or "kron", with the `width` that rows are to have.
        examples: how many are drawn. Measured on 160: 64 of them gave 0.98 of the ranks that all gave.
        damping: share of each block's mean eigenvalue that is added to its eigenvalues, or "auto" (see `damping`).
        folder: the store's folder. What was fitted there before for the same is taken; else the result is kept there.
        share: how the processes that share `folder` agree on who fits; by default there is this one (`alone`).

    Raises:
        ConfigError: a projection that has no blocks or no width, or a width above the numbers that it chooses from.
        DataError: no example, or none with a finite gradient.
        StoreError: `folder` has a finished sketch of something else and a store built on it, or cannot be written.
    """
    check_projection(projection)
    check_damping(damping)
    if examples < 1:
        raise ConfigError(f"a sketch is fitted on at least one example, not {examples}")
    whole = replace(projection, width=None)
    layout = gradient_layout(model, whole)
    if projection.width is not None and projection.width > layout_width(layout):
        raise ConfigError(
            f"a width of {projection.width} is more than the {layout_width(layout)} numbers that a row has: leave the "
            "width out"
        )
    sample = _sample(dataset, examples)
    purpose = _purpose(model, sample, [projection, damping, loss_reduction, precision, max_length, truncate])

    def fit(beat: Callable[[], None]) -> EigenSketch:
        options: dict[str, Any] = {"projection": whole, "loss_reduction": loss_reduction, "max_tokens": max_tokens}
        if gradients is None:
            options["precision"] = precision
        source: GradientSource = iter_gradient_rows if gradients is None else gradients
        rows = _finite(source(model, _tokens(sample, tokenizer, max_length, truncate), **options), beat)
        piece = max(1, _PIECE // rows.shape[1])
        return leading(fit_ekfac(lambda: rows.split(piece), layout, damping), projection, purpose)

    if folder is None:
        return fit(lambda: None)
    path = Path(folder)
    return (share or alone)(lambda: kept_sketch(path, purpose), fit, lambda sketch: sketch.save(path))


def alone(find: Find, fit: Fit, keep: Keep) -> EigenSketch:
    """The sketch that `find` finds, or that is fitted and kept: for one process. See `distributed` for more of them."""
    sketch = find()
    if sketch is None:
        sketch = fit(lambda: None)
        keep(sketch)
    return sketch


def leading(fitted: Ekfac, projection: Projection, purpose: str = "") -> EigenSketch:
    """The sketch of the `projection.width` leading coordinates of H^-1/2 under a fitted `ekfac`."""
    bases = {}
    for shape in dict.fromkeys(entry.shape for entry in fitted.factors):
        pairs = [pair for entry, pair in zip(fitted.factors, fitted.bases, strict=True) if entry.shape == shape]
        bases[shape] = (torch.stack([a for a, _ in pairs]).float(), torch.stack([b for _, b in pairs]).float())
    damped = torch.cat([values.flatten() for values in fitted.eigenvalues])
    energy = 1 - torch.cat(
        [(r / values).flatten() for r, values in zip(fitted.ridges, fitted.eigenvalues, strict=True)]
    )
    order = torch.argsort(energy, descending=True, stable=True)[: projection.width]
    chosen = order.sort().values
    share = float(energy[chosen].sum() / energy.sum().clamp(min=torch.finfo(energy.dtype).tiny))
    scale = damped[chosen].rsqrt().float()
    return EigenSketch(projection, tuple(fitted.factors), bases, chosen, scale, share, purpose)


def _sample(dataset: Sequence[Any], examples: int) -> list[Any]:
    """Up to `examples` of the dataset in its order; which ones depends on nothing but their numbers."""
    if len(dataset) == 0:
        raise DataError("there is no example to fit a sketch on")
    places = np.sort(np.random.default_rng(0).permutation(len(dataset))[:examples]).tolist()
    sample = [dataset[place] for place in places]
    return [{"id": str(p), **e} if isinstance(e, Mapping) else e for p, e in zip(places, sample, strict=True)]


def _purpose(model: Any, sample: list[Any], settings: list[Any]) -> str:
    plain = [asdict(value) if isinstance(value, Projection) else value for value in settings]
    parts = [plain, len(sample), adapter_hash(model), dataset_fingerprint(iter(sample))]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _tokens(sample: list[Any], tokenizer: Any, max_length: int | None, truncate: bool) -> list[dict[str, Any]]:
    ids = [example["id"] if isinstance(example, Mapping) else example.id for example in sample]
    examples, set_aside = tokenized(sample, ids, tokenizer, max_length, truncate)
    if not examples:
        name, reason = set_aside[0]
        raise DataError(f"a sketch cannot be fitted: none of {len(sample)} examples has a gradient ({name}: {reason})")
    return examples


def _finite(batches: Iterable[tuple[list[int], torch.Tensor]], beat: Callable[[], None]) -> torch.Tensor:
    """The finite ones of the gradient rows [n, K] in `batches`."""
    parts = []
    for _, batch in batches:
        parts.append(batch[batch.isfinite().all(dim=1)].to("cpu", torch.float32))
        beat()
    rows = torch.cat(parts)
    if not len(rows):
        raise DataError(
            "no example that a sketch is to be fitted on has a finite gradient: look at the adapter's weights, or run "
            "the model in float32"
        )
    return rows
