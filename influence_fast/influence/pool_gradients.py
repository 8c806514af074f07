"""From a tokenized pool and its queries to what scores are made of: rows in a store, query rows, Adam's moments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from influence_fast.data.adapter_names import plain_name
from influence_fast.data.held import Held
from influence_fast.errors import StoreError
from influence_fast.gradients.per_example import per_example_gradients
from influence_fast.gradients.projection import Projection, exact_rows
from influence_fast.gradients.targets import gradient_layout
from influence_fast.influence.adam import adam_moments
from influence_fast.influence.fisher_rows import fisher_rows, made_like
from influence_fast.influence.preconditioners import FROM_DATA
from influence_fast.influence.recipe import Recipe
from influence_fast.influence.scorer import Scorer
from influence_fast.influence.settings import GradientConfig, InfluenceConfig
from influence_fast.influence.sketch_fitting import fit_projection, resolved
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

    def scorer(self, influence: InfluenceConfig) -> Scorer:
        """Fit the scorer of these rows, for all questions about them."""
        fisher = FROM_DATA if self.fisher is None else self.fisher
        how: dict[str, Any] = {"preconditioner": influence.preconditioner, "damping": influence.damping}
        return Scorer.fit(self.store, fisher=fisher, moments=self.moments, **how)


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

    recipe = Recipe.of(gradients, influence)

    def fit(projection: Projection) -> Projection:
        with timed(seconds, "fitting the sketch"):
            how = recipe.sketch_options
            return fit_projection(model, pool, projection=projection, folder=folder, **how, **options)

    options["projection"] = resolved(gradients.projection, gradients.sketch, influence.preconditioner, model, fit)
    with timed(seconds, "training gradients"):
        store = build_store(folder, model, None, pool, dtype=gradients.store_dtype, progress=progress, **options)
    with timed(seconds, "query gradients"):
        rows = per_example_gradients(model, queries, **options).cpu()
    fisher = None
    if count := Recipe.of_store(store, influence).fisher_examples:
        with timed(seconds, "fisher gradients"):
            draws: dict[str, Any] = {"seed": gradients.seed, "max_tokens": gradients.max_tokens}
            fisher = fisher_rows(store, model, pool, count=count, **draws)
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
    options = made_like(store)
    store.identity.check(identity_of(model, **options), store.path)
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
