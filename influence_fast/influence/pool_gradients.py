"""From a tokenized pool and its queries to what scores are made of: rows in a store, query rows, Adam's moments."""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from influence_fast.atomic import beside
from influence_fast.data.adapter_names import plain_name
from influence_fast.data.fingerprints import dataset_fingerprint
from influence_fast.data.held import Held
from influence_fast.data.packing import teaches
from influence_fast.errors import StoreError
from influence_fast.gradients.fisher_labels import sample_labels
from influence_fast.gradients.fp8 import AUTO
from influence_fast.gradients.per_example import per_example_gradients
from influence_fast.gradients.projection import Projection, exact_rows
from influence_fast.gradients.targets import gradient_layout
from influence_fast.influence.adam import adam_moments
from influence_fast.influence.preconditioners import FROM_MODEL
from influence_fast.influence.scoring import reads_fisher
from influence_fast.influence.settings import GradientConfig, InfluenceConfig
from influence_fast.influence.sketch_fitting import drawn_unseen, fit_projection, resolved
from influence_fast.store.building import build_store, identity_of
from influence_fast.store.reader import Store
from influence_fast.timing import timed


@dataclass(frozen=True)
class PoolGradients:
    """Gradients under one adapter, all in rows of one projection.

    store: the pool's. queries: [Q, k] on the host. fisher: those that the preconditioner is to be fitted on; None: the
    pool's. moments: what `adam` and `less` divide by, if asked for.
    """

    store: Store
    queries: torch.Tensor
    fisher: Store | None
    moments: torch.Tensor | None

    def scored_by(self, influence: InfluenceConfig) -> dict[str, Any]:
        """What `influence_scores` and `influence_matrix` take beside the store and the queries."""
        return {
            "preconditioner": influence.preconditioner,
            "damping": influence.damping,
            "moments": self.moments,
            "fisher": self.fisher,
        }


def pool_gradients(
    model: Any,
    pool: Sequence[dict[str, Any]],
    queries: Sequence[dict[str, Any]],
    folder: Path,
    gradients: GradientConfig,
    influence: InfluenceConfig,
    seconds: dict[str, float],
    *,
    progress: bool = True,
) -> PoolGradients:
    """Fits a sketch where the settings ask for one, builds the pool's store in `folder`, or opens what is there of it.

    pool, queries: `{"id", "input_ids", "labels"}`. seconds: what each step took is added to it, by name. Raises as
    `fit_projection` and `build_store`.
    """
    options: dict[str, Any] = {
        "loss_reduction": gradients.loss_reduction,
        "precision": gradients.precision,
        "max_tokens": gradients.max_tokens,
    }

    def fit(projection: Projection) -> Projection:
        with timed(seconds, "fitting the sketch"):
            how = sketch_options(gradients, influence)
            return fit_projection(model, pool, projection=projection, folder=folder, **how, **options)

    options["projection"] = resolved(gradients.projection, gradients.sketch, influence.preconditioner, model, fit)
    with timed(seconds, "training gradients"):
        store = build_store(folder, model, None, pool, dtype=gradients.store_dtype, progress=progress, **options)
    with timed(seconds, "query gradients"):
        rows = per_example_gradients(model, queries, **options).cpu()
    fisher = None
    if influence.fisher == FROM_MODEL and reads_fisher(store, influence.preconditioner):
        with timed(seconds, "fisher gradients"):
            fisher = _fisher_store(model, pool, folder, gradients.seed, influence, options)
    moments = None
    if influence.optimizer is not None:
        projection = options["projection"]
        layout = gradient_layout(model, exact_rows(projection))
        moments = adam_moments(influence.optimizer, layout, projection=projection)
    return PoolGradients(store, rows, fisher, moments)


def query_gradients(store: Store, model: Any, queries: Held, *, max_tokens: int | None = None) -> torch.Tensor:
    """Return gradients of tokenized examples, [Q, k] fp32 on the host, made as the store's rows were.

    `queries` as the examples of `per_example_gradients`.

    Projection (a fitted sketch included), loss reduction and precision are the store's. Raises StoreError where the
    model or its adapter is not the store's: their gradients would have the same width, and mean something else.
    """
    made = store.identity
    options: dict[str, Any] = {
        "projection": store.projection,
        "loss_reduction": made.loss_reduction or "mean",
        "precision": made.precision or AUTO,
    }
    made.check(identity_of(model, **options), store.path)
    _check_layout(store, model, options["projection"])
    return per_example_gradients(model, queries, max_tokens=max_tokens, **options).cpu()


def _check_layout(store: Store, model: Any, projection: Projection | None) -> None:
    """Raise StoreError where the model's rows have other factors, or in another order, than the store's."""
    ours, theirs = (
        [(plain_name(e.module), e.factor, tuple(e.shape), e.offset) for e in entries]
        for entries in (gradient_layout(model, projection), store.manifest.modules)
    )
    if not theirs or ours == theirs or any(factor == "gradient" for _, factor, _, _ in theirs):  # imported
        return
    place = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    a, b = (f"{e[place][1]} of {e[place][0]}" if place < len(e) else "nothing" for e in (ours, theirs))
    raise StoreError(
        f"{store.path}: the model's rows have {a} where the store's have {b} (factor {place}): load the adapters by "
        "the names and in the order that the store was built with, or build it again"
    )


def sketch_options(gradients: GradientConfig, influence: InfluenceConfig) -> dict[str, Any]:
    """How `fit_projection` is to fit a sketch."""
    return {"examples": gradients.sketch_examples, "damping": influence.damping, "labels": influence.fisher}


def fisher_folders(store: str | Path) -> list[Path]:
    """Where rows lie that the preconditioner of a store was fitted on: a folder for each set of draws."""
    first = beside(store, ".fisher-")
    return sorted(first.parent.glob(f"{glob.escape(first.name)}*"))


def _fisher_store(
    model: Any,
    pool: Sequence[dict[str, Any]],
    store: Path,
    seed: int,
    influence: InfluenceConfig,
    options: dict[str, Any],
) -> Store:
    """Gradients of some of the pool with labels drawn from the model, beside `store`.

    The folder is named by the draws and by how rows are made of them: a rounding on another machine can draw another
    label, and several processes may score one store at a time, each by settings of its own.
    """
    limits = {name: options[name] for name in ("max_tokens", "precision")}
    live = [example for example in pool if teaches(example["labels"])]
    drawn = sample_labels(model, drawn_unseen(live, influence.fisher_examples), seed=seed, **limits)
    made = {name: value for name, value in options.items() if name != "max_tokens"}
    identity = identity_of(model, **made)
    digest = hashlib.sha256(
        f"{identity}{identity.projection_target or ''} {dataset_fingerprint(drawn)}".encode()
    ).hexdigest()[:12]
    folder = beside(store, f".fisher-{digest}")
    try:
        return build_store(folder, model, None, drawn, dtype="fp32", progress=False, **options)
    except StoreError as error:
        raise StoreError(f"{error} ({folder} is made of what is at hand: it may be deleted)") from error
