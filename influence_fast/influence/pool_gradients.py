"""From a tokenized pool and its queries to what scores are made of: rows in a store, query rows, Adam's moments."""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from influence_fast.atomic import beside
from influence_fast.data.fingerprints import dataset_fingerprint
from influence_fast.data.packing import teaches
from influence_fast.errors import StoreError
from influence_fast.gradients.fisher_labels import sample_labels
from influence_fast.gradients.per_example import per_example_gradients
from influence_fast.gradients.projection import Projection, exact_rows
from influence_fast.gradients.row_spec import RowSpec
from influence_fast.gradients.targets import gradient_layout
from influence_fast.influence.adam import adam_moments
from influence_fast.influence.preconditioners import FROM_MODEL
from influence_fast.influence.scoring import reads_fisher
from influence_fast.influence.settings import InfluenceConfig
from influence_fast.influence.sketch_fitting import SketchFit, drawn_unseen, fit_projection, resolved
from influence_fast.store.building import BuildOptions, build_rows
from influence_fast.store.planning import identity_of
from influence_fast.store.reader import Store
from influence_fast.store.shard_rows import Texts
from influence_fast.store.survey import held
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
    gradients: RowSpec,
    influence: InfluenceConfig,
    seconds: dict[str, float],
    *,
    progress: bool = True,
) -> PoolGradients:
    """Fits a sketch where the settings ask for one, builds the pool's store in `folder`, or opens what is there of it.

    pool, queries: `{"id", "input_ids", "labels"}`. seconds: what each step took is added to it, by name. Raises as
    `fit_projection` and `build_store`.
    """

    def fit(spec: RowSpec) -> Projection:
        with timed(seconds, "fitting the sketch"):
            return fit_projection(model, pool, spec, fit=SketchFit(influence.damping, influence.fisher), folder=folder)

    spec = resolved(gradients, influence.preconditioner, model, fit)
    with timed(seconds, "training gradients"):
        store = build_rows(folder, model, held(pool), spec, Texts(), BuildOptions(progress=progress))
    projection = spec.projection()
    with timed(seconds, "query gradients"):
        rows = per_example_gradients(
            model,
            queries,
            projection=projection,
            loss_reduction=spec.loss_reduction,
            max_tokens=spec.max_tokens,
            precision=spec.precision,
        ).cpu()
    fisher = None
    if influence.fisher == FROM_MODEL and reads_fisher(store, influence.preconditioner):
        with timed(seconds, "fisher gradients"):
            fisher = _fisher_store(model, pool, folder, replace(spec, dtype="fp32"), influence)
    moments = None
    if influence.optimizer is not None:
        layout = gradient_layout(model, exact_rows(projection))
        moments = adam_moments(influence.optimizer, layout, projection=projection)
    return PoolGradients(store, rows, fisher, moments)


def fisher_folders(store: str | Path) -> list[Path]:
    """Where rows lie that the preconditioner of a store was fitted on: a folder for each set of draws."""
    first = beside(store, ".fisher-")
    return sorted(first.parent.glob(f"{glob.escape(first.name)}*"))


def _fisher_store(
    model: Any,
    pool: Sequence[dict[str, Any]],
    store: Path,
    spec: RowSpec,
    influence: InfluenceConfig,
) -> Store:
    """Gradients of some of the pool with labels drawn from the model, beside `store`.

    The folder is named by the draws and by how rows are made of them: a rounding on another machine can draw another
    label, and several processes may score one store at a time, each by settings of its own.
    """
    live = [example for example in pool if teaches(example["labels"])]
    drawn = sample_labels(
        model,
        drawn_unseen(live, influence.fisher_examples),
        seed=spec.seed,
        max_tokens=spec.max_tokens,
        precision=spec.precision,
    )
    identity = identity_of(
        model, projection=spec.projection(), loss_reduction=spec.loss_reduction, precision=spec.precision
    )
    digest = hashlib.sha256(
        f"{identity}{identity.projection_target or ''} {dataset_fingerprint(drawn)}".encode()
    ).hexdigest()[:12]
    folder = beside(store, f".fisher-{digest}")
    try:
        return build_rows(folder, model, held(drawn), spec, Texts(), BuildOptions(progress=False))
    except StoreError as error:
        raise StoreError(f"{error} ({folder} is made of what is at hand: it may be deleted)") from error
