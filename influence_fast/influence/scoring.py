"""Influence scores: every stored training row against validation gradients, averaged over groups of queries."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from influence_fast.errors import ConfigError, DataError
from influence_fast.gradients.layout import LayoutEntry, layout_width
from influence_fast.influence import preconditioners
from influence_fast.influence.rounding import warn_if_coarse
from influence_fast.influence.scores import ScoreTable
from influence_fast.influence.whitened import UnitNorm
from influence_fast.products.inner_products import inner_products
from influence_fast.statistics.ranks import average_ranks
from influence_fast.store.reader import Store


@dataclass(frozen=True, slots=True)
class TopInfluences:
    """The rows of a store that count most for each of Q queries, k of them (fewer where the store has fewer).

    raising, lowering: (influence [Q, k] fp32, rows [Q, k] int64), the strongest first. More training on a raising row
    makes the query's answer likelier, on a lowering one less likely; with weak rows among the first k the signs of the
    last can be the other way.
    """

    raising: tuple[np.ndarray, np.ndarray]
    lowering: tuple[np.ndarray, np.ndarray]


def influence_scores(
    store: Store,
    queries: torch.Tensor | np.ndarray,
    groups: Mapping[str, Sequence[int]],
    *,
    preconditioner: str = preconditioners.DEFAULT,
    damping: preconditioners.Damping = preconditioners.DEFAULT_DAMPING,
    moments: torch.Tensor | None = None,
    fisher: Store | None = None,
) -> ScoreTable:
    """Scores every row of `store` against groups of query gradients.

    I(d, v) = grad l(v)^T H^-1 grad l(d): positive where more of d lowers the loss of v.

    Args:
        store: training gradients.
        queries: [Q, k] fp32 query gradients, projected as the store's rows are.
        groups: name -> row numbers of `queries`; the paper's are "correct" and "incorrect". An empty group is left
            out of the table.
        preconditioner: see `preconditioners`; by default the best one that the rows allow.
        damping: share of a block's mean eigenvalue added to its eigenvalues, or "auto" (see `damping`). Rows of a
            fitted sketch keep the damping that it was fitted with.
        moments: [k] second moments for "adam" and "less" (see `adam.adam_moments`); by default those of the rows.
        fisher: gradients of examples whose labels were drawn from the model (see `sample_labels`), which "ekfac",
            "fisher" and "datainf" are then fitted on: its Fisher information. By default the rows of `store`: the
            empirical Fisher.

    Returns:
        For each group g: `s_g` (mean influence), `rank_g` (rank of that mean, 1 = lowest, ties averaged) and
        `mean_rank_g` (mean of the ranks of the single queries).

    Raises:
        DataError: the queries do not fit the store, or every group is empty.
        ConfigError: unknown preconditioner, or one that does not fit this width.
        StoreError: `fisher`, where it is read, is of another model, adapter or projection than `store`.
        NumericError: a NaN or infinite value in the queries, or in rows of a store.
    """
    used = _used(groups)
    return _grouped(store, used, *_prepared(store, queries, preconditioner, damping, moments, fisher))


def top_influences(
    store: Store,
    queries: torch.Tensor | np.ndarray,
    k: int = 10,
    *,
    preconditioner: str = preconditioners.DEFAULT,
    damping: preconditioners.Damping = preconditioners.DEFAULT_DAMPING,
    moments: torch.Tensor | None = None,
    fisher: Store | None = None,
) -> TopInfluences:
    """The k rows of `store` that raise, and the k that lower, each of the queries [Q, width] most.

    Arguments and errors are those of `influence_scores`; no [N, Q] matrix is held.
    """
    return _top(k, *_prepared(store, queries, preconditioner, damping, moments, fisher))


def scores_and_top(
    store: Store,
    queries: torch.Tensor | np.ndarray,
    groups: Mapping[str, Sequence[int]],
    k: int,
    *,
    preconditioner: str = preconditioners.DEFAULT,
    damping: preconditioners.Damping = preconditioners.DEFAULT_DAMPING,
    moments: torch.Tensor | None = None,
    fisher: Store | None = None,
) -> tuple[ScoreTable, TopInfluences | None]:
    """`influence_scores` and, unless k is 0, `top_influences`, of one fitted preconditioner."""
    used = _used(groups)
    prepared = _prepared(store, queries, preconditioner, damping, moments, fisher)
    return _grouped(store, used, *prepared), _top(k, *prepared) if k else None


def _used(groups: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
    if not isinstance(groups, Mapping):
        raise DataError('groups are named, as {"correct": [0, 1]}, not a ' + type(groups).__name__)
    used = {name: list(members) for name, members in groups.items() if len(members)}
    if not used:
        raise DataError("there is no query to score against: every group is empty")
    return used


def _top(k: int, rows: Any, queries: torch.Tensor, options: dict[str, Any]) -> TopInfluences:
    count = len(queries)
    found = inner_products(rows, torch.cat([queries, -queries]), **options, topk=k)
    assert found.topk is not None
    values, places = (np.asarray(part) for part in found.topk)
    return TopInfluences((values[:count], places[:count]), (-values[count:], places[count:]))


def _grouped(
    store: Store, used: dict[str, list[int]], rows: Any, queries: torch.Tensor, options: dict[str, Any]
) -> ScoreTable:
    result = inner_products(rows, queries, **options, groups=list(used.values()), ranks=True)
    means, ranks = np.asarray(result.group_means, np.float64), np.asarray(result.mean_ranks, np.float64)
    columns = {}
    for g, name in enumerate(used):
        columns[f"s_{name}"] = means[:, g]
        columns[f"rank_{name}"] = average_ranks(means[:, g])
        columns[f"mean_rank_{name}"] = ranks[:, g]
    return ScoreTable(list(store.ids), columns)


def influence_matrix(
    store: Store,
    queries: torch.Tensor | np.ndarray,
    *,
    preconditioner: str = preconditioners.DEFAULT,
    damping: preconditioners.Damping = preconditioners.DEFAULT_DAMPING,
    moments: torch.Tensor | None = None,
    fisher: Store | None = None,
) -> np.ndarray:
    """[N, Q] fp32: I(d, v) of every row of `store` (in the order of `store.ids`) on every query.

    For many queries take `influence_scores`, which never holds the matrix. Arguments and errors are its own.
    """
    rows, queries, options = _prepared(store, queries, preconditioner, damping, moments, fisher)
    return np.asarray(inner_products(rows, queries, **options), np.float32)


def _prepared(
    store: Store,
    queries: torch.Tensor | np.ndarray,
    preconditioner: str,
    damping: preconditioners.Damping,
    moments: torch.Tensor | None,
    fisher: Store | None,
) -> tuple[Any, torch.Tensor, dict[str, Any]]:
    """What `inner_products` is called with: rows, preconditioned queries [Q, k], options."""
    if not isinstance(store, Store):
        raise ConfigError(f"the store must be an open one (inf.open_store), not a {type(store).__name__}")
    queries = torch.as_tensor(queries)
    if queries.ndim != 2 or queries.shape[1] != store.width:
        raise DataError(
            f"queries of shape {tuple(queries.shape)} do not fit rows of {store.width} numbers: "
            "project them as the store was"
        )
    if store.identity.projection_sketch is not None:
        preconditioner = preconditioners.after_sketch(preconditioner)
    source = store
    if fisher is not None and not isinstance(fisher, Store):
        raise ConfigError(f"fisher must be a store (of `build_store`), not a {type(fisher).__name__}")
    if fisher is not None and reads_fisher(store, preconditioner):
        data = {"dataset_fingerprint": None, "tokenization": None, "tokenizer_hash": None}
        fisher.identity.check(replace(store.identity, **data), fisher.path)
        source = fisher
    fitted = preconditioners.fit(
        preconditioner,
        lambda: _row_blocks(source),
        blocks_of(store),
        damping=damping,
        factors=factors_of(store),
        moments=moments,
    )
    if not isinstance(fitted, preconditioners.Identity):
        warn_if_coarse(store, queries, factors_of(store), preconditioner)
    rows = _Divided(store, fitted) if isinstance(fitted, UnitNorm) else store
    # H^-1 q spreads over decades where the rows are small: 8 bits of it would be too few
    precision = "fast" if isinstance(fitted, preconditioners.Identity) else "high"
    return rows, fitted.apply(queries.float()), {"normalize": fitted.normalize, "precision": precision}


def reads_fisher(store: Store, preconditioner: str) -> bool:
    """Whether the preconditioner of that name is fitted on rows like the store's; a fitted sketch has that in it."""
    sketched = store.identity.projection_sketch is not None
    return not sketched and preconditioners.resolve(preconditioner, factors_of(store)) in preconditioners.READ_FISHER


class _Divided:
    """A store whose rows are divided by their lengths in a preconditioner's metric; a zero row scores 0."""

    def __init__(self, store: Store, fitted: UnitNorm) -> None:
        self.store, self.ids = store, store.ids
        lengths = torch.cat([fitted.row_norms(rows) for rows in _row_blocks(store)]).cpu().numpy()
        self.scales = np.divide(1, lengths, out=np.zeros_like(lengths), where=lengths > 0).astype(np.float32)

    def __len__(self) -> int:
        return len(self.store)

    def blocks(self) -> Iterator[tuple[int, Any, np.ndarray]]:
        for start, rows, scales in self.store.blocks():
            mine = self.scales[start : start + len(rows)]
            yield start, rows, mine if scales is None else mine * scales


def blocks_of(store: Store) -> list[tuple[int, int]]:
    """[start, end) of each module in the store's rows; one block where the whole row was sketched."""
    factors = factors_of(store)
    return [(0, store.width)] if factors is None else module_blocks(factors)


def factors_of(store: Store) -> list[LayoutEntry] | None:
    """Each LoRA factor's shape and offset in the store's rows; None where the whole row was sketched or is unknown."""
    if not store.manifest.modules or store.identity.projection_width is not None:
        return None
    return [LayoutEntry(m.module, m.factor, (m.shape[0], m.shape[1]), m.offset) for m in store.manifest.modules]


def module_blocks(layout: list[LayoutEntry]) -> list[tuple[int, int]]:
    """[start, end) of each module's factors in a row of `layout`."""
    starts = [entry.offset for i, entry in enumerate(layout) if i == 0 or entry.module != layout[i - 1].module]
    ends = [*starts[1:], layout_width(layout)]
    return list(zip(starts, ends, strict=True))


def _row_blocks(store: Store, size: int = 1024) -> Iterable[torch.Tensor]:
    for start in range(0, len(store), size):
        yield store.rows(slice(start, start + size))
