"""Fits the sketch of a projection on the gradients of a sample, in one process or for many that share a folder."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from influence_fast.data.fingerprints import dataset_fingerprint, weight_hashes
from influence_fast.errors import ConfigError, DataError, StoreError, did_you_mean
from influence_fast.gradients.eigen_sketch import DEFAULT_EXAMPLES, FILES, EigenSketch, check_projection, file_of
from influence_fast.gradients.fisher_labels import sample_labels
from influence_fast.gradients.layout import layout_width
from influence_fast.gradients.per_example import iter_gradient_rows
from influence_fast.gradients.projection import Projection
from influence_fast.gradients.targets import gradient_layout
from influence_fast.influence.damping import AUTO, DEFAULT_DAMPING, Damping, check_damping
from influence_fast.influence.ekfac import Ekfac, fit_ekfac
from influence_fast.influence.preconditioners import FISHER_LABELS, FROM_DATA, FROM_MODEL, SKETCHES, fits_sketch
from influence_fast.store.manifest import MANIFEST_NAME, Manifest
from influence_fast.store.reader import fitted_sketch, open_store
from influence_fast.store.shard_rows import GradientSource, tokenized
from influence_fast.store.writer import make_folder

_SAID = {"labels": "labels (--fisher, influence.fisher)", "damping": "damping (--damping, influence.damping)"}
PICKED = "damping_picked"  # in a sketch's purpose: what "auto" came to
_PIECE = 1 << 24  # numbers of rows that are turned into fp64 at a time

Find = Callable[[], EigenSketch | None]  # what is kept already
Fit = Callable[[Callable[[], None]], EigenSketch]  # fits it anew; its argument is called after each batch
Keep = Callable[[EigenSketch], None]


def fit_projection(
    model: torch.nn.Module,
    dataset: Sequence[Any],
    tokenizer: Any = None,
    *,
    projection: Projection,
    examples: int = DEFAULT_EXAMPLES,
    damping: Damping = DEFAULT_DAMPING,
    labels: str = FROM_MODEL,
    loss_reduction: str = "mean",
    precision: str = "auto",
    max_tokens: int | None = None,
    max_length: int | None = None,
    truncate: bool = False,
    folder: str | Path | None = None,
    gradients: GradientSource | None = None,
    share: Callable[[Find, Fit, Keep], EigenSketch] | None = None,
) -> Projection:
    """`projection` with a sketch (see `eigen_sketch`) that is fitted on some examples of `dataset`, drawn unseen.

    Args:
        model, dataset, tokenizer, loss_reduction, precision, max_tokens, max_length, truncate, gradients: as for
            `build_store`; give both the same. Tokenized examples need no "id" here.
        projection: kind "one_sided" or "kron", with the `width` that rows are to have.
        examples: how many are drawn.
        damping: share of each block's mean eigenvalue that is added to its eigenvalues, or "auto" (see `damping`).
        labels: "model" draws them from the model's predictions (see `fisher_labels`), whatever makes the `gradients`;
            "data" takes the examples' own.
        folder: the store's folder. What was fitted there before for the same is taken; else the result is kept there.
        share: how the processes that share `folder` agree on who fits; by default there is this one (`alone`).

    Raises:
        ConfigError: a projection that has no blocks or no width, or a width above the numbers that it chooses from.
        DataError: no example, or none with a finite gradient.
        StoreError: the store in `folder` was made by another sketch (the message names the setting and both sides), or
            by one that was lost since and comes out otherwise now; it holds something else, or the disk refuses.
    """
    check_projection(projection)
    projection = projection.plain
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
    if labels not in FISHER_LABELS:
        raise ConfigError(f"labels: unknown value {labels!r}; {did_you_mean(labels, FISHER_LABELS)}")
    sample = _tokens(drawn_unseen(dataset, examples), tokenizer, max_length, truncate)
    base, adapter = weight_hashes(model)
    purpose: dict[str, Any] = {
        "projection": repr(projection),
        "labels": labels,
        "damping": damping if isinstance(damping, str) else float(damping),
        "loss_reduction": loss_reduction,
        "precision": precision,
        "model": base,
        "adapter": adapter,
        "sample": f"{len(sample)} examples, {dataset_fingerprint(sample)}",
    }

    def fit(heartbeat: Callable[[], None]) -> EigenSketch:
        options: dict[str, Any] = {"projection": whole, "loss_reduction": loss_reduction, "max_tokens": max_tokens}
        if gradients is None:
            options["precision"] = precision
        source: GradientSource = iter_gradient_rows if gradients is None else gradients
        asked = sample
        if labels == FROM_MODEL:
            asked = sample_labels(
                model, sample, seed=projection.seed, max_tokens=max_tokens, precision=precision, heartbeat=heartbeat
            )
        rows = _finite(source(model, asked, **options), heartbeat)
        piece = max(1, _PIECE // rows.shape[1])
        fitted = fit_ekfac(lambda: rows.split(piece), layout, damping)
        picked = {PICKED: fitted.damping} if isinstance(damping, str) else {}
        return leading(fitted, projection, purpose | picked)

    if folder is None:
        return replace(projection, sketch=fit(lambda: None))
    path = Path(folder)
    make_folder(path)
    sketch = (share or alone)(lambda: kept_sketch(path, purpose), fit, lambda made: keep_sketch(path, made))
    return replace(projection, sketch=sketch)


def alone(find: Find, fit: Fit, keep: Keep) -> EigenSketch:
    """The sketch that `find` finds, or that is fitted and kept: for one process. See `distributed` for more of them."""
    if find() is None:
        keep(fit(lambda: None))
    return kept(find)


def kept(find: Find) -> EigenSketch:
    """What is there now: another process may have been first. Raises StoreError: nothing is."""
    sketch = find()
    if sketch is None:
        raise StoreError("the sketch was lost while it was fitted; do all processes see the same folder?")
    return sketch


def resolved(
    projection: Projection | None, sketch: str, preconditioner: str, model: Any, fit: Callable[[Projection], Projection]
) -> Projection | None:
    """The projection of a run's rows, with its sketch.

    Args:
        sketch: "auto", "random", "eigen", or the folder of a store whose sketch is used again.
        preconditioner: what the rows are to be scored by.
        fit: `fit_projection` with all but the projection given.

    With "auto", rows that are no longer than the width are left as they are. Raises as `fit_projection`, and
    ConfigError for a store of another projection.
    """
    if projection is None or not fits_sketch(sketch, projection, preconditioner):
        return projection
    if sketch not in SKETCHES:
        found = open_store(sketch).projection
        if found is None or found.sketch is None or found.plain != projection:
            raise ConfigError(f"{sketch}: its rows are of {found}, not of a sketch fitted for {projection}")
        return found
    short = replace(projection, width=None)
    if sketch == AUTO and width_of(projection, sketch, preconditioner, model) == width_of(short, sketch, "", model):
        return short
    return fit(projection)


def width_of(projection: Projection | None, sketch: str, preconditioner: str, model: Any) -> int:
    """Numbers in a row of what `resolved` makes of the same arguments."""
    if projection is None or projection.width is None:
        return layout_width(gradient_layout(model, projection))
    if sketch != AUTO or not fits_sketch(sketch, projection, preconditioner):
        return projection.width
    return min(projection.width, layout_width(gradient_layout(model, replace(projection.plain, width=None))))


def leading(fitted: Ekfac, projection: Projection, purpose: Mapping[str, Any] | None = None) -> EigenSketch:
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
    return EigenSketch(projection, tuple(fitted.factors), bases, chosen, scale, share, purpose or {})


def kept_sketch(folder: Path, purpose: Mapping[str, Any]) -> EigenSketch | None:
    """The sketch in a store's folder that was fitted for `purpose`; None where there is none and no store either, or
    where the store's was lost or damaged since.

    Raises StoreError where the store was made by another one, or by none.
    """
    if (folder / MANIFEST_NAME).exists():
        manifest = Manifest.load(folder)
        try:
            found = fitted_sketch(folder, manifest)
        except StoreError:
            return None  # `keep_sketch` takes no other in its place
        if found is None:
            raise StoreError(
                f"{folder}: its rows were made by a random sketch or none: ask for that (--sketch and "
                "gradients.sketch: random), or build a new store"
            )
        for name, wanted in purpose.items():
            mine = _labelled(found.purpose).get(name)
            if mine != wanted:
                raise StoreError(
                    f"{folder}: its sketch was fitted with another setting of {_SAID.get(name, name)}: {mine} "
                    f"there and {wanted} here; use that one, or build a new store"
                )
        return found
    for path in sorted(folder.glob(FILES)):  # of a build that was stopped before its manifest
        try:
            found = EigenSketch.load(path)
        except StoreError:
            continue
        if _labelled(found.purpose) == purpose:
            return found
    return None


def keep_sketch(folder: Path, made: EigenSketch) -> None:
    """Writes a sketch that was fitted into a store's folder, in the place of the store's own where that was lost.

    Raises StoreError: the lost one was another, or the disk refuses.
    """
    if (folder / MANIFEST_NAME).exists():
        manifest = Manifest.load(folder)
        named = manifest.identity.projection_sketch
        if named is not None and named != made.fingerprint:
            try:
                fitted_sketch(folder, manifest)
            except StoreError:
                raise StoreError(
                    f"{folder / file_of(named)} is missing or damaged, and fitted again it comes out otherwise: "
                    "restore it, build again with the data, settings, hardware and number of threads that it was "
                    "fitted with, or build a new store"
                ) from None
    made.save(folder)


def _labelled(purpose: Mapping[str, Any]) -> dict[str, Any]:
    """What a sketch was asked for; one that does not say so was fitted on the data's own labels, as all then were."""
    return {"labels": FROM_DATA, **{name: value for name, value in purpose.items() if name != PICKED}}


def drawn_unseen(dataset: Sequence[Any], examples: int) -> list[Any]:
    """Up to `examples` of the dataset in its order; which ones depends on nothing but their numbers."""
    if len(dataset) == 0:
        raise DataError("there is no example to fit on")
    places = np.sort(np.random.default_rng(0).permutation(len(dataset))[:examples]).tolist()
    sample = [dataset[place] for place in places]
    return [{"id": str(p), **e} if isinstance(e, Mapping) else e for p, e in zip(places, sample, strict=True)]


def _tokens(sample: list[Any], tokenizer: Any, max_length: int | None, truncate: bool) -> list[dict[str, Any]]:
    examples, set_aside = tokenized(sample, tokenizer, max_length, truncate)
    if not examples:
        name, reason = set_aside[0]
        raise DataError(f"a sketch cannot be fitted: none of {len(sample)} examples has a gradient ({name}: {reason})")
    return examples


def _finite(batches: Iterable[tuple[list[int], torch.Tensor]], heartbeat: Callable[[], None]) -> torch.Tensor:
    """The finite ones of the gradient rows [n, K] in `batches`, in the order of their examples: which of them are held
    out for damping "auto" follows from it, and batches come by length."""
    parts, places = [], []
    for indices, batch in batches:
        finite = batch.isfinite().all(dim=1)
        parts.append(batch[finite].to("cpu", torch.float32))
        places += [index for index, kept in zip(indices, finite.tolist(), strict=True) if kept]
        heartbeat()
    rows = torch.cat(parts)[torch.tensor(places, dtype=torch.int64).argsort()]
    if not len(rows):
        raise DataError(
            "no example that a sketch is to be fitted on has a finite gradient: look at the adapter's weights, or run "
            "the model in float32"
        )
    return rows
