"""This package by the peers' interface: a store and its scores, one streaming pass, and the exact scores.

`exact` uses whole gradients: what every method's scores are compared with.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from worker import (
    PROJECTION_DIM,
    PROJECTION_WIDTH,
    Method,
    Run,
    Scoring,
    Work,
    load_model,
    main,
)

import influence_fast as inf
from influence_fast.gradients.per_example import iter_gradient_rows
from influence_fast.gradients.rows.projection import Projection
from influence_fast.influence import preconditioners, row_access


def stored(preconditioner: str, projection: Projection) -> Callable[[Work], Scoring]:
    """`build_store` of the pool, gradients of the queries, inner products of all with all."""

    def prepare(work: Work) -> Scoring:
        model = load_model(work)

        def score(work: Work, run: Run) -> np.ndarray:
            with run.stage("gradients"):
                store = inf.build_store(
                    run.temporary / "store",
                    model,
                    work.pool,
                    inf.RowSpec.of(projection),
                    options=inf.BuildOptions(progress=False),
                )
                queries = inf.per_example_gradients(model, work.queries, projection=projection)
            run.width = store.width
            run.bytes_per_example = 2.0 * store.width  # bf16, the default
            with run.stage("fit"):
                fitted = preconditioners.fit(
                    preconditioner,
                    lambda: [store.rows()],
                    row_access.blocks_of(store),
                    factors=row_access.factors_of(store),
                )
                queries = fitted.apply(queries.float())
            with run.stage("scoring"):
                return np.asarray(inf.inner_products(store, queries, normalize=fitted.normalize))

        return score

    return prepare


def streamed(work: Work) -> Scoring:
    """`stream_influence`: exact query gradients, then one pass over the pool with no projection and no store."""
    model = load_model(work)

    def score(work: Work, run: Run) -> torch.Tensor:
        with run.stage("gradients"):
            queries = inf.per_example_gradients(model, work.queries)
            scores = inf.stream_influence(model, work.pool, queries)
        run.bytes_per_example = 0.0
        run.notes.append("one pass: scoring is inside gradients")
        return scores

    return score


def exact(work: Work) -> Scoring:
    """Whole gradients, and their norms beside the scores: cosines are the scores over both norms."""
    model = load_model(work).float()

    def score(work: Work, run: Run) -> torch.Tensor:
        with run.stage("gradients"):
            queries = inf.per_example_gradients(model, work.queries).double()
            scores = torch.empty(len(work.pool), len(work.queries), dtype=torch.float64)
            norms = torch.empty(len(work.pool), dtype=torch.float64)
            for places, rows in iter_gradient_rows(model, work.pool):
                scores[places] = rows.double() @ queries.T
                norms[places] = rows.double().norm(dim=1)
        run.arrays = {"norms": norms.numpy(), "query_norms": queries.norm(dim=1).numpy()}
        return scores

    return score


ONE_SIDED: Any = Projection(dim=PROJECTION_DIM)
SKETCHED: Any = Projection(dim=PROJECTION_DIM, width=PROJECTION_WIDTH)
METHODS = {
    **{
        name: Method(
            stored("none" if name == "dot" else name, ONE_SIDED),
            {"dot": "dot", "cosine": "cosine"}.get(name, "preconditioned"),
            f"store, one-sided projection to {PROJECTION_DIM}",
        )
        for name in ("dot", "cosine", "fisher", "ekfac", "datainf")
    },
    "dot_8192": Method(stored("none", SKETCHED), "dot", f"store, rows sketched to {PROJECTION_WIDTH}"),
    "cosine_8192": Method(stored("cosine", SKETCHED), "cosine", f"store, rows sketched to {PROJECTION_WIDTH}"),
    "stream": Method(streamed, "dot", "one pass, no projection"),
    "exact": Method(exact, "dot", "whole gradients in float32, inner products in float64"),
}

if __name__ == "__main__":
    main("ours", METHODS, packages=["influence-fast"])
