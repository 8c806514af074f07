"""A preconditioner that is fitted once, and answers any number of questions about the rows of one store."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from influence_fast.data.held import Held
from influence_fast.errors import ConfigError, DataError, shown
from influence_fast.gradients.rows.layout import LayoutEntry
from influence_fast.gradients.rows.projection import exact_rows
from influence_fast.gradients.targets import gradient_layout
from influence_fast.influence import preconditioners
from influence_fast.influence.contrast import Pair, contrasts, unit_queries
from influence_fast.influence.fisher_rows import fisher_store, made_like
from influence_fast.influence.lifting import exact_coordinates
from influence_fast.influence.preconditioners import (
    DEFAULT,
    DEFAULT_DAMPING,
    FISHER_EXAMPLES,
    FISHER_LABELS,
    FROM_MODEL,
    Damping,
    check_damping,
)
from influence_fast.influence.recipe import Recipe
from influence_fast.influence.rounding import warn_if_coarse
from influence_fast.influence.row_access import DividedRows, blocks_of, factors_of, row_blocks
from influence_fast.influence.scorer_arguments import check_open, check_queries, used_groups
from influence_fast.influence.scorer_files import Parts, load_parts, save_parts
from influence_fast.influence.scores import ScoreTable
from influence_fast.influence.settings import InfluenceConfig
from influence_fast.influence.whitened import UnitNorm
from influence_fast.products.inner_products import inner_products
from influence_fast.products.options import ProductOptions
from influence_fast.settings import one_of
from influence_fast.statistics.ranks import average_ranks
from influence_fast.store.planning import identity_of
from influence_fast.store.reader import Store

GIVEN = "a store"  # whose gradients a Fisher information is of, beside `FISHER_LABELS`


@dataclass(frozen=True, slots=True)
class TopInfluences:
    """The rows of a store that count most for each of Q queries, k of them (fewer where the store has fewer).

    raising, lowering: (influence [Q, k] fp32, rows [Q, k] int64), the strongest first. More training on a raising row
    makes the query's answer likelier, on a lowering one less likely; with weak rows among the first k the signs of the
    last can be the other way.
    """

    raising: tuple[np.ndarray, np.ndarray]
    lowering: tuple[np.ndarray, np.ndarray]


class Scorer:
    """Score the rows of a store, I(d, v) = grad l(v)^T H^-1 grad l(d), by an H^-1 that is fitted once.

    A score is positive where more of the training example d lowers the loss of the query v. `Scorer.fit` makes one,
    `save` and `Scorer.load` keep it beside the store.

    store: the rows that are scored. recipe: what goes together (see `Recipe`). fitted: the preconditioner.

    Example:
        >>> scorer = inf.Scorer.fit(store, preconditioner="ekfac_cosine", model=model)  # doctest: +SKIP
        >>> scores = scorer.scores(queries, {"correct": [0, 1], "incorrect": [2]})  # doctest: +SKIP
        >>> top = scorer.top(queries, k=5)  # doctest: +SKIP
    """

    def __init__(self, store: Store, recipe: Recipe, parts: Parts) -> None:
        self.store = store
        self.recipe = recipe
        self.fitted = parts.fitted
        self._parts = parts
        if parts.lengths is not None:
            self.__dict__["lengths"] = parts.lengths

    def __repr__(self) -> str:
        return f"Scorer({str(self.store.path)!r}, rows={len(self.store)}, preconditioner={self.recipe.name!r})"

    @classmethod
    def fit(
        cls,
        store: Store,
        *,
        preconditioner: str = DEFAULT,
        damping: Damping = DEFAULT_DAMPING,
        fisher: str | Store = FROM_MODEL,
        fisher_examples: int = FISHER_EXAMPLES,
        model: Any = None,
        examples: Held | None = None,
        moments: torch.Tensor | None = None,
    ) -> Scorer:
        """Fit a preconditioner for the rows of a store.

        Args:
            store: training gradients.
            preconditioner: see `preconditioners`; "default" is the best one that the rows allow. What its name calls
                EK-FAC is Shampoo's eigenbasis with EK-FAC's corrected eigenvalues.
            damping: share of a block's mean eigenvalue added to its eigenvalues, or "auto" (see `damping`). Rows of a
                fitted sketch keep the damping that it was fitted with.
            fisher: what "ekfac", "fisher" and "datainf" are fitted on: "model", gradients of labels that the model
                draws (see `sample_labels`); "data", the rows of the store, the empirical Fisher; or a store of such
                gradients. What reads no Fisher information ignores it.
            fisher_examples: for "model", of how many examples at most.
            model: what the store was built with. "model" draws labels from it; `apply` takes the shapes of its layers.
            examples: the tokenized examples that the store was built of, which "model" draws labels for. A store that
                this process built knows them. The rows are kept beside the store, and taken again from there.
            moments: [k] second moments for "adam" and "less" (see `adam_moments`); by default those of the rows.

        Raises:
            ConfigError: an unknown preconditioner, one that does not fit these rows, or "model" without what it needs.
            StoreError: the model is not the store's, or `fisher` is of another model, adapter or projection.
            DataError: the examples are not the store's.
            NumericError: a NaN or infinite value in the rows.
        """
        check_open(store)
        labels = fisher if isinstance(fisher, str) else GIVEN
        one_of("fisher", labels, (*FISHER_LABELS, GIVEN))
        check_damping(damping)
        if not isinstance(fisher_examples, int) or isinstance(fisher_examples, bool) or fisher_examples < 1:
            raise ConfigError(f"fisher_examples is {shown(fisher_examples)}; it must be a whole number of at least 1")
        recipe = Recipe.of_store(store, InfluenceConfig(preconditioner, damping, labels, fisher_examples))
        if moments is not None and not recipe.reads_moments:
            raise ConfigError(f"moments are read by 'adam' and 'less', not by {recipe.name!r}; leave them out")
        applied = recipe.applied
        layout = None if model is None else _layout_of(store, model)
        source = store
        if recipe.reads_fisher:
            source = fisher_store(store, fisher, fisher_examples, model, examples)
        fitted = preconditioners.fit(
            applied,
            lambda: row_blocks(source),
            blocks_of(store),
            damping=damping,
            factors=factors_of(store),
            moments=moments,
        )
        return cls(store, recipe, Parts(fitted, source, layout))

    def scores(
        self,
        queries: torch.Tensor | np.ndarray,
        groups: Mapping[str, Sequence[int]],
        *,
        pairs: Sequence[Pair] = (),
    ) -> ScoreTable:
        """Score every row against groups of query gradients; the [N, Q] matrix is never held.

        Args:
            queries: [Q, k] fp32 query gradients, projected as the store's rows are.
            groups: name -> row numbers of `queries`; the paper's are "correct" and "incorrect". An empty group is left
                out of the table.
            pairs: right and wrong answers to the same questions (see `contrast`), for the columns `s_contrast`,
                `rank_contrast` and `mean_rank_contrast`: high where an example teaches the wrong answers.

        Returns:
            For each group g: `s_g` (mean influence), `rank_g` (rank of that mean, 1 = lowest, ties averaged) and
            `mean_rank_g` (mean of the ranks of the single queries).

        Raises:
            DataError: the queries do not fit the store, or every group is empty.
            NumericError: a NaN or infinite value in the queries, or in rows of the store.
        """
        used = used_groups(groups)
        result = self._products(queries, groups=list(used.values()), ranks=True)
        means, ranks = np.asarray(result.group_means, np.float64), np.asarray(result.mean_ranks, np.float64)
        columns = {}
        for g, name in enumerate(used):
            columns[f"s_{name}"] = means[:, g]
            columns[f"rank_{name}"] = average_ranks(means[:, g])
            columns[f"mean_rank_{name}"] = ranks[:, g]
        if pairs:
            columns |= self._contrast(queries, pairs)
        return ScoreTable(list(self.store.ids), columns)

    def _contrast(self, queries: torch.Tensor | np.ndarray, pairs: Sequence[Pair]) -> dict[str, np.ndarray]:
        """Return the three columns of contrast scores."""
        queries = check_queries(self.store, queries).float()
        each = self._contrasts(queries, self._preconditioned(queries), pairs)
        mean = each.mean(dim=0, keepdim=True)
        found = self._multiplied(
            torch.cat([mean, each]).float(), groups=[[0], list(range(1, len(each) + 1))], ranks=True
        )
        scores = np.asarray(found.group_means, np.float64)[:, 0]
        if self.fitted.normalize:
            # the products have divided by the length of the mean contrast too
            scores = scores * float(mean.norm())
        ranks = np.asarray(found.mean_ranks, np.float64)[:, 1]
        return {"s_contrast": scores, "rank_contrast": average_ranks(scores), "mean_rank_contrast": ranks}

    def _contrasts(self, queries: torch.Tensor, made: torch.Tensor, pairs: Sequence[Pair]) -> torch.Tensor:
        """Return the contrast of each pair, [P, k] fp64, of queries and what the preconditioner makes of them."""
        divided = self.fitted.normalize or isinstance(self.fitted, UnitNorm)
        return contrasts(made if divided else unit_queries(queries, made), pairs)

    def top(self, queries: torch.Tensor | np.ndarray, k: int = 10) -> TopInfluences:
        """Return the k rows that raise, and the k that lower, each of the queries [Q, width] most.

        Raises as `scores`.
        """
        if k is None:
            raise DataError("k is None; pass a whole number of at least 1")
        found = self._products(queries, both_signs=True, topk=k)
        values, places = (np.asarray(part) for part in found.topk)
        count = len(values) // 2
        return TopInfluences((values[:count], places[:count]), (-values[count:], places[count:]))

    def matrix(self, queries: torch.Tensor | np.ndarray) -> np.ndarray:
        """Return I(d, v) of every row (in the order of `store.ids`) on every query, [N, Q] fp32.

        For many queries take `scores`, which never holds the matrix. Raises as `scores`.
        """
        return np.asarray(self._products(queries), np.float32)

    def self_influence(self) -> np.ndarray:
        """Return the influence of every row on itself, [N] fp64: the diagonal of `matrix(store.rows())`.

        Between unit-norm rows (`cosine`, `ekfac_cosine`, `fisher_cosine`) it is 1 for every row but a zero one: take
        `none`, `ekfac` or `fisher` to see which examples weigh most.
        """
        parts = []
        for rows in row_blocks(self.store):
            wide = rows.double()
            parts.append((self._preconditioned(wide) * wide).sum(dim=1))
        found: np.ndarray = torch.cat([torch.zeros(0, dtype=torch.float64), *parts]).cpu().numpy()
        return found if self.lengths is None else _divided(found, self.lengths)

    def apply(self, queries: torch.Tensor | np.ndarray) -> torch.Tensor:
        """Return H^-1 q of queries [Q, k] in the coordinates of exact gradients, [Q, K]: for `stream_influence`.

        `stream_influence(model, examples, scorer.apply(q))` gives the scores of examples that need not be in the store;
        row `gradient_layout(model)` says what the K numbers are. Projections, sketches at random and fitted ones are
        undone by their transposed maps, for which the fit needs the model (`Scorer.fit(..., model=model)`) wherever
        rows are projected. Rows that were imported keep their own coordinates.

            none                        q
            adam                        q / (sqrt(v) + eps)
            fisher, ekfac, datainf      H^-1 q
            cosine                      q / |q|; left to do: divide by |g|, the length of the example's row
            fisher_cosine, ekfac_cosine H^-1 q / |H^-1/2 q|; left: divide by |H^-1/2 g|
            less                        H^-1 q / |q|; left: divide by |H^-1 g|

        What is left is a division by a length of each example's own row, which gives a direction its score; `lengths`
        has those of the store's rows, in order. It moves no sign, and no ranking of queries for one example. On rows of
        a fitted sketch, `ekfac` and `ekfac_cosine` are S^T z and S^T z / |z| of the query's row z = S g.

        Raises ConfigError where the way back is not known, StoreError where the store does not say how it was
        projected, DataError where the queries do not fit it.
        """
        return self._exact(self._preconditioned(check_queries(self.store, queries).float()))

    def directions(
        self,
        queries: torch.Tensor | np.ndarray,
        groups: Mapping[str, Sequence[int]],
        *,
        pairs: Sequence[Pair] = (),
    ) -> dict[str, torch.Tensor]:
        """Return for each group g the direction whose product with an example's exact gradient is its `s_g`, [K] fp32.

        It is the mean of `apply` over the group's queries, and for `pairs` the mean contrast under the name "contrast".
        As there, a division by the length of the example's own row is left (see `lengths`). Raises as `scores` and
        `apply`.
        """
        used = used_groups(groups)
        wide = check_queries(self.store, queries).float()
        made = self._preconditioned(wide)
        means = {name: made[list(members)].mean(dim=0) for name, members in used.items()}
        if pairs:
            means["contrast"] = self._contrasts(wide, made, pairs).mean(dim=0).to(made)
        return dict(zip(means, self._exact(torch.stack(list(means.values()))), strict=True))

    def _exact(self, made: torch.Tensor) -> torch.Tensor:
        """Return preconditioned rows [Q, k] in the coordinates of exact gradients, [Q, K]."""
        if self.store.identity.projection_kind in (None, "unknown"):
            return made
        projection = self.store.projection
        if projection is None or projection.exact:
            return made
        if self._parts.layout is None:
            raise ConfigError(
                "the way from projected rows back to whole gradients needs the shapes of the model's layers: give "
                "Scorer.fit (or Scorer.load) the model"
            )
        return exact_coordinates(made, projection, self._parts.layout).to(made.dtype)

    @functools.cached_property
    def lengths(self) -> np.ndarray | None:
        """Return what the scores of each row are divided by, [N] fp64; None if they are not divided.

        A row of zeros has the length 0, and scores 0.
        """
        if isinstance(self.fitted, UnitNorm):
            norms = [self.fitted.row_norms(rows) for rows in row_blocks(self.store)]
        elif self.fitted.normalize:
            norms = [rows.double().norm(dim=1) for rows in row_blocks(self.store)]
        else:
            return None
        lengths: np.ndarray = torch.cat([torch.zeros(0, dtype=torch.float64), *norms]).cpu().numpy()
        return lengths

    def save(self, folder: str | Path | None = None) -> Path:
        """Write the scorer to a folder, by default beside the store (`<store>.scorer`), and return the folder.

        The rows of the store are not copied. Raises StoreError: the disk refuses.
        """
        lengths = self.__dict__.get("lengths")
        return save_parts(self.store, self.recipe, self._parts.with_lengths(lengths), folder)

    @classmethod
    def load(
        cls,
        source: Store | str | Path,
        *,
        model: Any = None,
        preconditioner: str | None = None,
        damping: Damping | None = None,
        fisher: str | None = None,
        store: Store | None = None,
    ) -> Scorer:
        """Read what `save` wrote.

        Args:
            source: the store, its folder, or the folder that was given to `save`.
            model: where given, has to be the store's, and `apply` takes the shapes of its layers.
            preconditioner, damping, fisher: where given, have to be those that it was fitted with.
            store: where given, has to be the store that it was fitted for, which may have been moved since.

        Raises StoreError: there is none, it is damaged, or it was fitted for another store, model or other settings.
        """
        wanted = {"preconditioner": preconditioner, "damping": damping, "fisher": fisher}
        found, recipe, parts = load_parts(source, store, wanted)
        if model is not None:
            parts = parts.with_layout(_layout_of(found, model))
        return cls(found, recipe, parts)

    def _preconditioned(self, queries: torch.Tensor) -> torch.Tensor:
        """Return queries [Q, k] whose product with a row is its score before the row's own division."""
        made = self.fitted.apply(queries)
        if not self.fitted.normalize:
            return made
        lengths = made.norm(dim=1, keepdim=True)
        return made / torch.where(lengths > 0, lengths, 1.0)

    def _products(self, queries: torch.Tensor | np.ndarray, *, both_signs: bool = False, **asked: Any) -> Any:
        """Multiply the rows with what the preconditioner makes of the queries, and with -1 times that if asked."""
        queries = check_queries(self.store, queries)
        if not isinstance(self.fitted, preconditioners.Identity):
            warn_if_coarse(self.store, queries, factors_of(self.store), self.recipe.name)
        made = self.fitted.apply(queries.float())
        return self._multiplied(torch.cat([made, -made]) if both_signs else made, **asked)

    def _multiplied(self, made: torch.Tensor, **asked: Any) -> Any:
        """Multiply the rows with preconditioned queries [Q, k]."""
        rows: Any = self._divided if isinstance(self.fitted, UnitNorm) else self.store
        # H^-1 q spreads over decades where the rows are small: 8 bits of it would be too few
        precision = "fast" if isinstance(self.fitted, preconditioners.Identity) else "high"
        return inner_products(
            rows, made, normalize=self.fitted.normalize, options=ProductOptions(precision=precision), **asked
        )

    @functools.cached_property
    def _divided(self) -> DividedRows:
        assert self.lengths is not None
        return DividedRows(self.store, _divided(np.ones(len(self.store)), self.lengths).astype(np.float32))


def _layout_of(store: Store, model: Any) -> list[LayoutEntry] | None:
    """Return the layout of the model's exact rows, None for imported ones; raise StoreError if it is another's."""
    if store.identity.projection_kind in (None, "unknown"):
        return None
    options = made_like(store)
    store.identity.check(identity_of(model, **options), store.path)
    return gradient_layout(model, exact_rows(options["projection"]))


def _divided(values: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return values / lengths [N]; 0 for a row without length."""
    return np.divide(values, lengths, out=np.zeros_like(lengths), where=lengths > 0)
