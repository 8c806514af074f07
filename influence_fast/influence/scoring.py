"""The calls that fit a preconditioner anew for every question; `Scorer` fits it once for all of them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from influence_fast.influence.fisher_rows import check_fisher
from influence_fast.influence.preconditioners import DEFAULT, DEFAULT_DAMPING, FROM_DATA, Damping
from influence_fast.influence.scorer import Scorer, TopInfluences
from influence_fast.influence.scorer_arguments import check_open, check_queries, used_groups
from influence_fast.influence.scores import ScoreTable
from influence_fast.store.reader import Store


def influence_scores(
    store: Store,
    queries: torch.Tensor | np.ndarray,
    groups: Mapping[str, Sequence[int]],
    *,
    preconditioner: str = DEFAULT,
    damping: Damping = DEFAULT_DAMPING,
    moments: torch.Tensor | None = None,
    fisher: Store | None = None,
) -> ScoreTable:
    """Score as `Scorer.fit(store, ...).scores(queries, groups)` does (deprecated; `fisher` None is "data")."""
    _say("influence_scores", "scores(queries, groups)")
    used = used_groups(groups)
    return _fitted(store, queries, preconditioner, damping, moments, fisher).scores(queries, used)


def top_influences(
    store: Store,
    queries: torch.Tensor | np.ndarray,
    k: int = 10,
    *,
    preconditioner: str = DEFAULT,
    damping: Damping = DEFAULT_DAMPING,
    moments: torch.Tensor | None = None,
    fisher: Store | None = None,
) -> TopInfluences:
    """Find as `Scorer.fit(store, ...).top(queries, k)` does (deprecated; `fisher` None is "data")."""
    _say("top_influences", "top(queries, k)")
    return _fitted(store, queries, preconditioner, damping, moments, fisher).top(queries, k)


def influence_matrix(
    store: Store,
    queries: torch.Tensor | np.ndarray,
    *,
    preconditioner: str = DEFAULT,
    damping: Damping = DEFAULT_DAMPING,
    moments: torch.Tensor | None = None,
    fisher: Store | None = None,
) -> np.ndarray:
    """Compute as `Scorer.fit(store, ...).matrix(queries)` does (deprecated; `fisher` None is "data")."""
    _say("influence_matrix", "matrix(queries)")
    return _fitted(store, queries, preconditioner, damping, moments, fisher).matrix(queries)


def _say(name: str, method: str) -> None:
    warnings.warn(
        f"{name} is deprecated, and fits anew at every call: use inf.Scorer.fit(store, ...).{method}; what it fits on "
        'by default is fisher="data" there',
        DeprecationWarning,
        stacklevel=3,
    )


def _fitted(
    store: Store,
    queries: torch.Tensor | np.ndarray,
    preconditioner: str,
    damping: Damping,
    moments: torch.Tensor | None,
    fisher: Store | None,
) -> Scorer:
    check_open(store)
    check_queries(store, queries)
    if fisher is not None and not isinstance(fisher, Store):
        check_fisher(store, fisher)
    source = FROM_DATA if fisher is None else fisher
    return Scorer.fit(store, preconditioner=preconditioner, damping=damping, moments=moments, fisher=source)
