"""From a tokenized pool and its queries to what scores are made of: rows in a store, query rows, Adam's moments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from influence_fast.adam import adam_moments
from influence_fast.building import build_store
from influence_fast.config import GradientConfig, InfluenceConfig
from influence_fast.gradients import per_example_gradients
from influence_fast.lora import gradient_layout
from influence_fast.projection import Projection
from influence_fast.sketch_fitting import fit_projection, resolved
from influence_fast.store import Store
from influence_fast.timing import timed


@dataclass(frozen=True)
class PoolGradients:
    """Gradients under one adapter, all in rows of one projection.

    store: the pool's. queries: [Q, k] on the host. moments: what `adam` and `less` divide by, if asked for.
    """

    store: Store
    queries: torch.Tensor
    moments: torch.Tensor | None


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
            sizes: dict[str, Any] = {"examples": gradients.sketch_examples, "damping": influence.damping}
            return fit_projection(model, pool, projection=projection, folder=folder, **sizes, **options)

    options["projection"] = resolved(gradients.projection, gradients.sketch, influence.preconditioner, model, fit)
    with timed(seconds, "training gradients"):
        store = build_store(folder, model, None, pool, dtype=gradients.store_dtype, progress=progress, **options)
    with timed(seconds, "query gradients"):
        rows = per_example_gradients(model, queries, **options).cpu()
    moments = None
    if influence.optimizer is not None:
        moments = adam_moments(influence.optimizer, gradient_layout(model), projection=options["projection"])
    return PoolGradients(store, rows, moments)
