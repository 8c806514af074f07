"""Fits the sketch of a projection on the gradients of a sample, in one process or for many that share a folder."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from influence_fast.data.fingerprints import dataset_fingerprint, weight_hashes
from influence_fast.deprecation import OldCall, also_called_as, moved
from influence_fast.errors import ConfigError, DataError, StoreError, did_you_mean, setting
from influence_fast.gradients.fisher_labels import sample_labels
from influence_fast.gradients.per_example import iter_gradient_rows
from influence_fast.gradients.rows.eigen_sketch import DEFAULT_EXAMPLES, FILES, EigenSketch, check_projection, file_of
from influence_fast.gradients.rows.layout import layout_width
from influence_fast.gradients.rows.projection import Projection
from influence_fast.gradients.rows.row_spec import RowSpec, names_store
from influence_fast.gradients.targets import gradient_layout
from influence_fast.influence.damping import AUTO, DEFAULT_DAMPING, Damping, check_damping
from influence_fast.influence.ekfac import Ekfac, fit_ekfac
from influence_fast.influence.preconditioners import FISHER_LABELS, FROM_DATA, FROM_MODEL
from influence_fast.influence.recipe import sketch_for
from influence_fast.store.manifest import MANIFEST_NAME, Manifest
from influence_fast.store.reader import open_store
from influence_fast.store.shard_rows import GradientSource, Texts, called_with_spec, tokenized
from influence_fast.store.verification import fitted_sketch
from influence_fast.store.writer import make_folder

_SAID = {"labels": "labels (--fisher, influence.fisher)", "damping": "damping (--damping, influence.damping)"}
PICKED = "damping_picked"  # in a sketch's purpose: what "auto" came to
_PIECE = 1 << 24  # numbers of rows that are turned into fp64 at a time

Find = Callable[[], EigenSketch | None]  # what is kept already
Fit = Callable[[Callable[[], None]], EigenSketch]  # fits it anew; its argument is called after each batch
Keep = Callable[[EigenSketch], None]


@dataclass(frozen=True)
class SketchFit:
    """Say how a sketch is fitted.

    damping: share of each block's mean eigenvalue that is added to its eigenvalues, or "auto" (see `damping`).
    labels: "model" draws them from the model's predictions (see `fisher_labels`), whatever makes the `gradients`;
        "data" takes the examples' own.
    gradients: another source of rows, as in `BuildOptions`.
    share: how the processes that share a store's folder agree on who fits; by default there is this one (`alone`).

    Raises ConfigError for values that do not exist.
    """

    damping: Damping = DEFAULT_DAMPING
    labels: str = FROM_MODEL
    gradients: GradientSource | None = None
    share: Callable[[Find, Fit, Keep], EigenSketch] | None = None

    def __post_init__(self) -> None:
        check_damping(self.damping)
        if self.labels not in FISHER_LABELS:
            raise ConfigError(f"labels: unknown value {self.labels!r}; {did_you_mean(self.labels, FISHER_LABELS)}")


AS_USUAL = SketchFit()
_OF_SPEC = ("loss_reduction", "precision", "max_tokens")  # keywords before there were specs
_OF_FIT = ("damping", "labels", "gradients", "share")


def _translated(values: dict[str, Any]) -> dict[str, Any]:
    """Translate `fit_projection(model, dataset, tokenizer, projection=..., examples=..., ...)`."""
    projection = values.pop("projection")
    check_projection(projection)
    spec = RowSpec.of(
        projection.plain,
        sketch_examples=values.pop("examples", DEFAULT_EXAMPLES),
        dtype="fp32",
        **moved(values, _OF_SPEC),
    )
    return {"data": values.pop("dataset"), "spec": spec, "fit": SketchFit(**moved(values, _OF_FIT)), **values}


@also_called_as(
    OldCall(
        positional=("model", "dataset", "tokenizer"),
        keywords=("projection", "examples", "max_length", "truncate", "folder", *_OF_SPEC, *_OF_FIT),
        marks=("projection",),
        translate=_translated,
        instead="fit_projection(model, data, spec, tokenizer=..., fit=SketchFit(...))",
    )
)
def fit_projection(
    model: torch.nn.Module,
    data: Sequence[Any],
    spec: RowSpec,
    *,
    tokenizer: Any = None,
    max_length: int | None = None,
    truncate: bool = False,
    fit: SketchFit = AS_USUAL,
    folder: str | Path | None = None,
) -> Projection:
    """Return the projection of `spec` with a sketch (see `eigen_sketch`) that is fitted on some examples of `data`.

    `build_store` fits one itself where the spec asks for it; `spec.with_projection(found)` makes rows by this one.

    Args:
        model, data, tokenizer, max_length, truncate: as for `build_store`; give both the same. Tokenized examples need
            no "id" here.
        spec: of kind "one_sided" or "kron", with the `width` that rows are to have; `sketch_examples` are drawn unseen.
        fit: the damping and the labels that it is fitted with.
        folder: the store's folder. What was fitted there before for the same is taken; else the result is kept there.

    Raises:
        ConfigError: a spec that has no blocks or no width, or a width above the numbers that it chooses from.
        DataError: no example, or none with a finite gradient.
        StoreError: the store in `folder` was made by another sketch (the message names the setting and both sides), or
            by one that was lost since and comes out otherwise now; it holds something else, or the disk refuses.
    """
    projection = _plain(spec)
    _check_width(model, spec)
    sample = _sample(data, spec, Texts(tokenizer, max_length, truncate))
    purpose = _purpose(model, sample, spec, fit)

    def anew(heartbeat: Callable[[], None]) -> EigenSketch:
        return _fitted(model, sample, spec, fit, purpose, heartbeat)

    if folder is None:
        return replace(projection, sketch=anew(lambda: None))
    path = Path(folder)
    make_folder(path)
    sketch = (fit.share or alone)(lambda: kept_sketch(path, purpose), anew, lambda made: keep_sketch(path, made))
    return replace(projection, sketch=sketch)


def _plain(spec: RowSpec) -> Projection:
    """Return a spec's projection without a sketch. Raises ConfigError unless one can be fitted for it."""
    projection = spec.projection()
    check_projection(projection)
    assert projection is not None
    return projection.plain


def _check_width(model: torch.nn.Module, spec: RowSpec) -> None:
    """Raise ConfigError for a width above the numbers that a row of the model has."""
    projection = _plain(spec)
    numbers = layout_width(gradient_layout(model, replace(projection, width=None)))
    if projection.width is not None and projection.width > numbers:
        raise ConfigError(
            f"a width of {projection.width} is more than the {numbers} numbers that a row has: leave the width out"
        )


def _purpose(model: torch.nn.Module, sample: list[dict[str, Any]], spec: RowSpec, fit: SketchFit) -> dict[str, Any]:
    """Return what a sketch is fitted on and for, as its file keeps it."""
    base, adapter = weight_hashes(model)
    return {
        "projection": repr(_plain(spec)),
        "labels": fit.labels,
        "damping": fit.damping if isinstance(fit.damping, str) else float(fit.damping),
        "loss_reduction": spec.loss_reduction,
        "precision": spec.precision,
        "model": base,
        "adapter": adapter,
        "sample": f"{len(sample)} examples, {dataset_fingerprint(sample)}",
    }


def _fitted(
    model: torch.nn.Module,
    sample: list[dict[str, Any]],
    spec: RowSpec,
    fit: SketchFit,
    purpose: dict[str, Any],
    heartbeat: Callable[[], None],
) -> EigenSketch:
    """Fit a sketch on the unsketched rows of a sample; `heartbeat` is called after each batch."""
    projection = _plain(spec)
    whole = replace(projection, width=None)
    rows_of = replace(spec.with_projection(whole), dtype="fp32")
    source = iter_gradient_rows if fit.gradients is None else called_with_spec(fit.gradients)
    asked = sample
    if fit.labels == FROM_MODEL:
        asked = sample_labels(
            model,
            sample,
            seed=projection.seed,
            max_tokens=spec.max_tokens,
            precision=spec.precision,
            heartbeat=heartbeat,
        )
    rows = _finite(source(model, asked, spec=rows_of), heartbeat)
    piece = max(1, _PIECE // rows.shape[1])
    found = fit_ekfac(lambda: rows.split(piece), gradient_layout(model, whole), fit.damping)
    picked = {PICKED: found.damping} if isinstance(fit.damping, str) else {}
    return leading(found, projection, purpose | picked)


def alone(find: Find, fit: Fit, keep: Keep) -> EigenSketch:
    """Return the sketch that `find` finds, or fit and keep one: for one process (see `distributed` for more)."""
    if find() is None:
        keep(fit(lambda: None))
    return kept(find)


def kept(find: Find) -> EigenSketch:
    """Return the sketch that is there now, as another process may have been first; raise StoreError if none is."""
    sketch = find()
    if sketch is None:
        raise StoreError("the sketch was lost while it was fitted; do all processes see the same folder?")
    return sketch


def resolved(spec: RowSpec, preconditioner: str, model: Any, fit: Callable[[RowSpec], Projection]) -> RowSpec:
    """Return the spec of a run's rows with its sketch settled: fitted, taken from a store, or none.

    With "auto", rows that are no longer than the width are left as they are. Raises as `fit_projection`, and
    ConfigError for a store of another projection.

    Args:
        preconditioner: what the rows are to be scored by.
        fit: `fit_projection` with all but the spec given.
    """
    if sketch_for(spec, preconditioner) is None:
        return spec if spec.is_settled else replace(spec, sketch="random")
    if spec.is_settled:
        return spec
    projection = spec.projection()
    if isinstance(spec.sketch, str) and names_store(spec.sketch):
        found = open_store(spec.sketch).projection
        if found is None or found.sketch is None or found.plain != projection:
            raise ConfigError(f"{spec.sketch}: its rows are of {found}, not of a sketch fitted for {projection}")
        return spec.with_projection(found)
    short = replace(spec, width=None, sketch=AUTO)
    if spec.sketch == AUTO and width_of(spec, preconditioner, model) == width_of(short, preconditioner, model):
        return short
    return spec.with_projection(fit(spec))


def width_of(spec: RowSpec, preconditioner: str, model: Any) -> int:
    """Return how many numbers a row has of what `resolved` makes of the same arguments."""
    projection = spec.projection()
    if projection is None or projection.width is None:
        return layout_width(gradient_layout(model, projection))
    if spec.sketch != AUTO or sketch_for(spec, preconditioner) is None:
        return projection.width
    return min(projection.width, layout_width(gradient_layout(model, replace(projection.plain, width=None))))


def leading(fitted: Ekfac, projection: Projection, purpose: Mapping[str, Any] | None = None) -> EigenSketch:
    """Make the sketch of the `projection.width` leading coordinates of H^-1/2 under a fitted `ekfac`."""
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
    """Find the sketch in a store's folder that was fitted for `purpose`.

    None if there is none and no store either, or if the store's was lost or damaged since. Raises StoreError if the
    store was made by another one, or by none.
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
                f"{setting('gradients.sketch', 'random')}), or build a new store"
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
    """Write a fitted sketch into a store's folder, in the place of the store's own if that was lost.

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
    """Return what a sketch was asked for; one that does not say so was fitted on the data's own labels."""
    return {"labels": FROM_DATA, **{name: value for name, value in purpose.items() if name != PICKED}}


def drawn_unseen(dataset: Sequence[Any], examples: int) -> list[Any]:
    """Draw up to `examples` of the dataset, in its order; which ones depends on nothing but their numbers."""
    if len(dataset) == 0:
        raise DataError("there is no example to fit on")
    places = np.sort(np.random.default_rng(0).permutation(len(dataset))[:examples]).tolist()
    sample = [dataset[place] for place in places]
    return [{"id": str(p), **e} if isinstance(e, Mapping) else e for p, e in zip(places, sample, strict=True)]


def _sample(data: Sequence[Any], spec: RowSpec, texts: Texts) -> list[dict[str, Any]]:
    """Return the examples, tokenized, that a sketch is fitted on."""
    drawn = drawn_unseen(data, spec.sketch_examples)
    examples, set_aside = tokenized(drawn, texts)
    if not examples:
        name, reason = set_aside[0]
        raise DataError(f"a sketch cannot be fitted: none of {len(drawn)} examples has a gradient ({name}: {reason})")
    return examples


def _finite(batches: Iterable[tuple[list[int], torch.Tensor]], heartbeat: Callable[[], None]) -> torch.Tensor:
    """Return the finite ones of the gradient rows [n, K] in `batches`, in the order of their examples.

    Batches come by length, and which rows are held out for damping "auto" follows from the order.
    """
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
