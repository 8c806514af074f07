"""The H^-1 of I(d, v) = grad l(v)^T H^-1 grad l(d), fitted on training rows and applied to the few query rows.

    none      plain gradient dot product (TracIn at one checkpoint)
    cosine    the same between unit-norm rows
    adam      diag(sqrt(v) + eps), the optimizer's second moments (`adam.py`)
    fisher    damped Fisher of each module (`fisher.py`)
    ekfac     eigenvalue-corrected Kronecker factors of each LoRA factor (`ekfac.py`)
    datainf   mean of the inverses of each row's damped outer product (`datainf.py`)
    fisher_cosine, ekfac_cosine, less    the same between unit-norm rows in the metric of H^-1 (`whitened.py`)

A preconditioner is a function from (training rows, damping) to an object with `normalize` and
`apply(queries) -> queries` (and `row_norms`, where it is a `whitened.UnitNorm`); add one by writing it and registering
its name in `PRECONDITIONERS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import torch

from influence_fast.errors import ConfigError, DataError, did_you_mean
from influence_fast.gradients.layout import LayoutEntry
from influence_fast.gradients.projection import Projection
from influence_fast.influence.adam import Adam, adam_moments, fit_adam
from influence_fast.influence.damping import AUTO, DEFAULT_DAMPING, MAX_DENSE, Damping, RowBlocks, check_damping
from influence_fast.influence.datainf import DataInf, fit_datainf
from influence_fast.influence.ekfac import Ekfac, fit_ekfac
from influence_fast.influence.fisher import Fisher, fit_fisher
from influence_fast.influence.whitened import UnitNorm

__all__ = [
    "AUTO",
    "DEFAULT",
    "DEFAULT_DAMPING",
    "FISHER_EXAMPLES",
    "FISHER_LABELS",
    "FROM_DATA",
    "FROM_MODEL",
    "MAX_DENSE",
    "PRECONDITIONERS",
    "READ_FISHER",
    "SKETCHES",
    "Adam",
    "Damping",
    "DataInf",
    "Ekfac",
    "Fisher",
    "Identity",
    "Preconditioner",
    "TrainingRows",
    "UnitNorm",
    "adam_moments",
    "after_sketch",
    "check_damping",
    "fit",
    "fit_adam",
    "fit_datainf",
    "fit_ekfac",
    "fit_fisher",
    "fits_sketch",
]


#: The best of both proofs by retraining (benches/results/proof-*.json) that the rows allow: "ekfac_cosine" where they
#: have a block for each LoRA factor or were made by a fitted sketch, "cosine" where they were sketched at random or
#: imported without blocks.
DEFAULT = "default"
SKETCHES = (AUTO, "random", "eigen")  # how rows get to their width
FROM_MODEL, FROM_DATA = "model", "data"
FISHER_LABELS = (FROM_MODEL, FROM_DATA)  # whose gradients a Fisher information is of: see `fisher_labels`
FISHER_EXAMPLES = 1024  # of so many at most; in the small worlds of the proof some hundred do (docs/results.md)
# Fitted on second moments that stand for a Fisher information; those of `adam` and `less` stand for an optimizer's
# state, which saw the data's own labels.
READ_FISHER = ("fisher", "fisher_cosine", "ekfac", "ekfac_cosine", "datainf")
_AFTER_SKETCH = {DEFAULT: "cosine", "ekfac_cosine": "cosine", "ekfac": "none"}  # see `after_sketch`


class Preconditioner(Protocol):
    """Anything with `normalize` and `apply`."""

    @property
    def normalize(self) -> bool:
        """Whether scores are taken between unit-norm rows."""
        ...

    def apply(self, queries: torch.Tensor) -> torch.Tensor:
        """[Q, k] query gradients -> [Q, k], so that the score of a training row is a plain inner product."""
        ...


@dataclass(frozen=True)
class Identity:
    """`none`: plain gradient dot product (TracIn at one checkpoint). `cosine`: the same between unit-norm rows."""

    normalize: bool = False

    def apply(self, queries: torch.Tensor) -> torch.Tensor:
        return queries


@dataclass(frozen=True)
class TrainingRows:
    """What a preconditioner is fitted on.

    row_blocks: each call is one pass over the training rows, in pieces [n, k].
    blocks: [start, end) of each module's numbers in a row, in order and without gaps.
    factors: each LoRA factor's shape and offset in a row; None where rows have no such blocks (a sketch).
    moments: [k] an optimizer's second moments in the coordinates of a row, if there are any.
    """

    row_blocks: RowBlocks
    blocks: list[tuple[int, int]]
    factors: list[LayoutEntry] | None = None
    moments: torch.Tensor | None = None


def fit(
    name: str,
    row_blocks: Callable[[], Iterable[torch.Tensor]],
    blocks: list[tuple[int, int]],
    *,
    damping: Damping = DEFAULT_DAMPING,
    factors: list[LayoutEntry] | None = None,
    moments: torch.Tensor | None = None,
) -> Preconditioner:
    """Fits the preconditioner called `name`.

    Args:
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
    name = resolve(name, factors)
    width = blocks[-1][1]

    def checked() -> Iterable[torch.Tensor]:
        for rows in row_blocks():
            if rows.ndim != 2 or rows.shape[1] != width:
                raise DataError(f"training rows of shape {tuple(rows.shape)} do not fit blocks of {width} numbers")
            yield rows

    return PRECONDITIONERS[name](TrainingRows(checked, blocks, factors, moments), damping)


def resolve(name: str, factors: list[LayoutEntry] | None) -> str:
    """The preconditioner that `name` stands for on rows with these `factors`. Raises ConfigError for an unknown one."""
    if name == DEFAULT:
        return "cosine" if factors is None else "ekfac_cosine"
    if name not in PRECONDITIONERS:
        raise ConfigError(f"unknown preconditioner {name!r}; {did_you_mean(name, (DEFAULT, *PRECONDITIONERS))}")
    return name


def after_sketch(name: str) -> str:
    """What is left of `name` to do on rows that a fitted sketch made, which have `ekfac`'s H^-1/2 in them already.

    Raises ConfigError for another preconditioner: its scores would be `ekfac`'s under a wrong name.
    """
    if name not in _AFTER_SKETCH:
        raise ConfigError(
            f"rows of a fitted sketch have the H^-1 of 'ekfac' in them, and cannot be scored by {name!r}: take 'ekfac' "
            "or 'ekfac_cosine', or rows of a random sketch"
        )
    return _AFTER_SKETCH[name]


def fits_sketch(sketch: str, projection: Projection | None, name: str) -> bool:
    """Whether rows of `projection` that are to be scored by the preconditioner `name` are made by a fitted sketch.

    sketch: one of `SKETCHES`, or the folder of a store whose sketch is used again; "auto" fits one where that has the
    preconditioner's H^-1 in it and rows have a width.
    """
    if sketch != AUTO:
        return sketch != "random"
    sketched = projection is not None and projection.width is not None and not projection.flat
    return sketched and name in _AFTER_SKETCH


PRECONDITIONERS: dict[str, Callable[[TrainingRows, Damping], Preconditioner]] = {
    "none": lambda rows, damping: Identity(),
    "cosine": lambda rows, damping: Identity(normalize=True),
    "adam": lambda rows, damping: fit_adam(rows.row_blocks, rows.blocks, damping, rows.moments),
    "fisher": lambda rows, damping: fit_fisher(rows.row_blocks, rows.blocks, damping),
    "ekfac": lambda rows, damping: fit_ekfac(rows.row_blocks, rows.factors, damping),
    "datainf": lambda rows, damping: fit_datainf(rows.row_blocks, rows.blocks, damping),
    "fisher_cosine": lambda rows, damping: UnitNorm(fit_fisher(rows.row_blocks, rows.blocks, damping)),
    "ekfac_cosine": lambda rows, damping: UnitNorm(fit_ekfac(rows.row_blocks, rows.factors, damping)),
    "less": lambda rows, damping: UnitNorm(
        fit_adam(rows.row_blocks, rows.blocks, damping, rows.moments), plain_queries=True, row_power=2
    ),
}
