"""The H^-1 of I(d, v) = grad l(v)^T H^-1 grad l(d), fitted on training rows and applied to the few query rows.

    none      plain gradient dot product (TracIn at one checkpoint)
    cosine    the same between unit-norm rows
    adam      diag(sqrt(v) + eps), the optimizer's second moments (`adam.py`)
    fisher    damped Fisher of each module (`fisher.py`)
    ekfac     Shampoo's eigenbasis of each LoRA factor with EK-FAC's corrected eigenvalues (`ekfac.py`)
    datainf   mean of the inverses of each row's damped outer product (`datainf.py`)
    fisher_cosine, ekfac_cosine, less    the same between unit-norm rows in the metric of H^-1 (`whitened.py`)

A preconditioner registers as selection strategies do: one small class with a `fit` method and one `@register` line,
whose attributes say what rows it needs, what it is fitted on, and what is left of it after a fitted sketch. `recipe.py`
draws its rules from these alone. What `fit` returns has `normalize` and `apply(queries) -> queries` (and `row_norms`,
where it is a `whitened.UnitNorm`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import torch

from influence_fast.errors import ConfigError, DataError, did_you_mean
from influence_fast.gradients.rows.layout import LayoutEntry
from influence_fast.influence.adam import Adam, adam_moments, fit_adam
from influence_fast.influence.damping import AUTO, DEFAULT_DAMPING, MAX_DENSE, Damping, RowBlocks, check_damping
from influence_fast.influence.datainf import DataInf, fit_datainf
from influence_fast.influence.ekfac import Ekfac, fit_ekfac
from influence_fast.influence.fisher import Fisher, fit_fisher
from influence_fast.influence.whitened import UnitNorm

__all__ = [
    "AUTO",
    "CANDIDATES",
    "DEFAULT",
    "DEFAULT_DAMPING",
    "DENSE",
    "FACTORS",
    "FISHER",
    "FISHER_EXAMPLES",
    "FISHER_LABELS",
    "FROM_DATA",
    "FROM_MODEL",
    "MAX_DENSE",
    "MOMENTS",
    "PRECONDITIONERS",
    "Adam",
    "Damping",
    "DataInf",
    "Ekfac",
    "Fisher",
    "Identity",
    "Kind",
    "Preconditioner",
    "TrainingRows",
    "UnitNorm",
    "adam_moments",
    "check_damping",
    "find",
    "fit",
    "fit_adam",
    "fit_datainf",
    "fit_ekfac",
    "fit_fisher",
    "register",
]


#: The best of both proofs by retraining (benches/results/proof-*.json) that the rows allow: "ekfac_cosine" where they
#: have a block for each LoRA factor or were made by a fitted sketch, "cosine" where they were sketched at random or
#: imported without blocks.
DEFAULT = "default"
FROM_MODEL, FROM_DATA = "model", "data"
FISHER_LABELS = (FROM_MODEL, FROM_DATA)  # whose gradients a Fisher information is of: see `fisher_labels`
FISHER_EXAMPLES = 1024  # of so many at most; in the small worlds of the proof some hundred do (docs/results.md)

FACTORS, DENSE = "factors", "dense"  # what rows are needed: see `Kind.needs`
FISHER, MOMENTS = "fisher", "moments"  # what a preconditioner is fitted on: see `Kind.fit_on`


class Preconditioner(Protocol):
    """Anything with `normalize` and `apply`."""

    @property
    def normalize(self) -> bool:
        """Return whether scores are taken between unit-norm rows."""
        ...

    def apply(self, queries: torch.Tensor) -> torch.Tensor:
        """Map query gradients [Q, k] so that the score of a training row is a plain inner product."""
        ...


@dataclass(frozen=True)
class Identity:
    """Plain gradient dot product, `none` (TracIn at one checkpoint), and `cosine`, the same between unit-norm rows."""

    normalize: bool = False

    def apply(self, queries: torch.Tensor) -> torch.Tensor:
        return queries


@dataclass(frozen=True)
class TrainingRows:
    """Rows that a preconditioner is fitted on, and their layout.

    row_blocks: each call is one pass over the training rows, in pieces [n, k].
    blocks: [start, end) of each module's numbers in a row, in order and without gaps.
    factors: each LoRA factor's shape and offset in a row; None where rows have no such blocks (a sketch).
    moments: [k] an optimizer's second moments in the coordinates of a row, if there are any.
    """

    row_blocks: RowBlocks
    blocks: list[tuple[int, int]]
    factors: list[LayoutEntry] | None = None
    moments: torch.Tensor | None = None


class Kind(Protocol):
    """A preconditioner as `register` takes it: how it is fitted, and what goes together with it.

    needs: of the rows it is fitted on: FACTORS, a block for each LoRA factor, which a random sketch mixes; DENSE, no
        block of more than `MAX_DENSE` numbers.
    fit_on: FISHER, second moments that stand for a Fisher information, so that labels may be drawn from the model for
        it; MOMENTS, those of an optimizer's state, which saw the data's own labels (or of the rows in its place); None,
        it is not fitted at all.
    after_sketch: the preconditioner that is left to apply to rows of a fitted sketch, which have `ekfac`'s H^-1/2 in
        them already; None where they cannot be scored by this one: the scores would be `ekfac`'s under a wrong name.
    """

    needs: tuple[str, ...]
    fit_on: str | None
    after_sketch: str | None

    def fit(self, rows: TrainingRows, damping: Damping) -> Preconditioner:
        """Fit it on training rows."""
        ...


PRECONDITIONERS: dict[str, Kind] = {}


def register(name: str) -> Callable[[type], type]:
    """Add a preconditioner class under `name`, for scores, the command line and configurations alike."""

    def add(kind: type) -> type:
        PRECONDITIONERS[name] = kind()
        return kind

    return add


def find(name: str) -> Kind:
    """Return the preconditioner called `name`. Raises ConfigError with the nearest name for an unknown one."""
    if name not in PRECONDITIONERS:
        raise ConfigError(f"unknown preconditioner {name!r}; {did_you_mean(name, (DEFAULT, *PRECONDITIONERS))}")
    return PRECONDITIONERS[name]


@register("none")
class Dot:
    """Plain gradient dot product (TracIn at one checkpoint)."""

    needs: tuple[str, ...] = ()
    fit_on: str | None = None
    after_sketch: str | None = None

    def fit(self, rows: TrainingRows, damping: Damping) -> Preconditioner:
        return Identity()


@register("cosine")
class Cosine:
    """Inner products of unit-norm rows."""

    needs: tuple[str, ...] = ()
    fit_on: str | None = None
    after_sketch: str | None = None

    def fit(self, rows: TrainingRows, damping: Damping) -> Preconditioner:
        return Identity(normalize=True)


@register("adam")
class OptimizerDiagonal:
    """Adam's own diagonal, from an optimizer's state or from the rows."""

    needs: tuple[str, ...] = ()
    fit_on: str | None = MOMENTS
    after_sketch: str | None = None

    def fit(self, rows: TrainingRows, damping: Damping) -> Preconditioner:
        return fit_adam(rows.row_blocks, rows.blocks, damping, rows.moments)


@register("less")
class Less(OptimizerDiagonal):
    """LESS's cosine of a plain query with what Adam makes of a training gradient."""

    def fit(self, rows: TrainingRows, damping: Damping) -> Preconditioner:
        inner = fit_adam(rows.row_blocks, rows.blocks, damping, rows.moments)
        return UnitNorm(inner, plain_queries=True, row_power=2)


@register("fisher")
class DenseFisher:
    """Damped Fisher of each module, inverted densely."""

    needs: tuple[str, ...] = (DENSE,)
    fit_on: str | None = FISHER
    after_sketch: str | None = None

    def fit(self, rows: TrainingRows, damping: Damping) -> Preconditioner:
        return fit_fisher(rows.row_blocks, rows.blocks, damping)


@register("fisher_cosine")
class DenseFisherCosine(DenseFisher):
    """The preconditioner `fisher` between rows of unit norm in its metric."""

    def fit(self, rows: TrainingRows, damping: Damping) -> Preconditioner:
        return UnitNorm(fit_fisher(rows.row_blocks, rows.blocks, damping))


@register("ekfac")
class CorrectedEigenbasis:
    """Shampoo's eigenbasis of each LoRA factor with EK-FAC's corrected eigenvalues (see `ekfac.py`)."""

    needs: tuple[str, ...] = (FACTORS,)
    fit_on: str | None = FISHER
    after_sketch: str | None = "none"

    def fit(self, rows: TrainingRows, damping: Damping) -> Preconditioner:
        return fit_ekfac(rows.row_blocks, rows.factors, damping)


@register("ekfac_cosine")
class CorrectedEigenbasisCosine(CorrectedEigenbasis):
    """The preconditioner `ekfac` between rows of unit norm in its metric."""

    after_sketch: str | None = "cosine"

    def fit(self, rows: TrainingRows, damping: Damping) -> Preconditioner:
        return UnitNorm(fit_ekfac(rows.row_blocks, rows.factors, damping))


@register("datainf")
class MeanOfInverses:
    """Mean of the inverses of each row's damped outer product."""

    needs: tuple[str, ...] = ()
    fit_on: str | None = FISHER
    after_sketch: str | None = None

    def fit(self, rows: TrainingRows, damping: Damping) -> Preconditioner:
        return fit_datainf(rows.row_blocks, rows.blocks, damping)


#: What `DEFAULT` stands for: the first of these whose needs the rows meet.
CANDIDATES = ("ekfac_cosine", "cosine")


def fit(
    name: str,
    row_blocks: Callable[[], Iterable[torch.Tensor]],
    blocks: list[tuple[int, int]],
    *,
    damping: Damping = DEFAULT_DAMPING,
    factors: list[LayoutEntry] | None = None,
    moments: torch.Tensor | None = None,
) -> Preconditioner:
    """Fit the preconditioner called `name`.

    Args:
        name: as it is registered (`Recipe` resolves "default").
        row_blocks, blocks, factors, moments: see `TrainingRows`. "ekfac" needs `factors`; "adam" uses `moments`, or
            else those of the rows.
        damping: share of the mean eigenvalue of each block that is added to its eigenvalues, or "auto" (see
            `damping.py`). Not used by "none" and "cosine".

    Raises:
        ConfigError: an unknown name (the nearest one is given), a damping that is not above 0, or rows that do not
            fit the preconditioner.
        DataError: the rows and the blocks are of different widths.
        NumericError: the rows hold NaN or infinite numbers.
    """
    kind = find(name)
    width = blocks[-1][1]

    def checked() -> Iterable[torch.Tensor]:
        for rows in row_blocks():
            if rows.ndim != 2 or rows.shape[1] != width:
                raise DataError(f"training rows of shape {tuple(rows.shape)} do not fit blocks of {width} numbers")
            yield rows

    return kind.fit(TrainingRows(checked, blocks, factors, moments), damping)
