"""From a tokenized pool and its queries to what scores are made of: rows in a store, query rows, Adam's moments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from influence_fast.gradients.per_example import per_example_gradients
from influence_fast.gradients.rows.projection import Projection, exact_rows
from influence_fast.gradients.rows.row_spec import RowSpec
from influence_fast.gradients.targets import gradient_layout
from influence_fast.influence.adam import adam_moments
from influence_fast.influence.fisher_rows import fisher_rows
from influence_fast.influence.preconditioners import FROM_DATA
from influence_fast.influence.recipe import Recipe
from influence_fast.influence.scorer import Scorer
from influence_fast.influence.settings import InfluenceConfig
from influence_fast.influence.sketch_fitting import SketchFit, fit_projection, resolved
from influence_fast.store.building import BuildOptions, build_rows
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

    def scorer(self, influence: InfluenceConfig, model: Any = None) -> Scorer:
        """Fit the scorer of these rows, for all questions about them; its `directions` need the model."""
        fisher = FROM_DATA if self.fisher is None else self.fisher
        how: dict[str, Any] = {"preconditioner": influence.preconditioner, "damping": influence.damping}
        return Scorer.fit(self.store, fisher=fisher, moments=self.moments, model=model, **how)


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
    """Build the pool's store in `folder`, or open what is there of it, with the sketch that the settings ask for.

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
    if count := Recipe.of_store(store, influence).fisher_examples:
        with timed(seconds, "fisher gradients"):
            draws: dict[str, Any] = {"seed": spec.seed, "max_tokens": spec.max_tokens}
            fisher = fisher_rows(store, model, pool, count=count, **draws)
    moments = None
    if influence.optimizer is not None:
        layout = gradient_layout(model, exact_rows(projection))
        moments = adam_moments(influence.optimizer, layout, projection=projection)
    return PoolGradients(store, rows, fisher, moments)
