"""The H^-1 of I(d, v) = grad l(v)^T H^-1 grad l(d), fitted on training rows and applied to the few query rows.

A preconditioner is a function from (training row blocks, layout) to an object with `apply(queries) -> queries`;
add one by writing it and registering its name in `PRECONDITIONERS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import torch

from influence_fast.errors import ConfigError, NumericError, did_you_mean

# Above this width a dense k x k Fisher no longer fits beside the work (8192^2 fp64 is 512 MiB).
MAX_DENSE = 8192


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
class Fisher:
    """Damped empirical Fisher, block by block: (F_b + lambda_b I)^-1, F_b = mean of g_b g_b^T over training rows.

    A block is one module's factors (both sides), so correlations inside a module are seen and those between modules
    are not; TRAK (Park et al. 2023) and LoGra (Choe et al. 2024) use the same form on their projections.
    lambda_b is `damping` times the mean eigenvalue of F_b, so one number serves blocks of every scale.
    """

    blocks: list[tuple[int, int]]  # [start, end) of each block in a row
    factors: list[torch.Tensor]  # lower Cholesky factor of each damped block, fp64
    normalize: bool = False

    def apply(self, queries: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(queries)
        for (start, end), factor in zip(self.blocks, self.factors, strict=True):
            block = queries[:, start:end].to(torch.float64)
            out[:, start:end] = torch.cholesky_solve(block.T, factor).T.to(queries.dtype)
        return out


def fit_fisher(
    row_blocks: Callable[[], Iterable[torch.Tensor]], blocks: list[tuple[int, int]], damping: float
) -> Fisher:
    """Fits `Fisher` in one pass; `row_blocks()` yields [n, k] pieces of the training rows."""
    if damping <= 0:
        raise ConfigError(f"damping must be above 0, not {damping}: it is a share of the mean eigenvalue")
    widest = max(end - start for start, end in blocks)
    if widest > MAX_DENSE:
        raise ConfigError(
            f"a Fisher block of {widest} numbers is too wide for a dense factorisation (limit {MAX_DENSE}): "
            "use a smaller projection dim or width, or preconditioner 'cosine'"
        )
    sums = [torch.zeros(end - start, end - start, dtype=torch.float64) for start, end in blocks]
    count = 0
    for rows in row_blocks():
        count += rows.shape[0]
        for total, (start, end) in zip(sums, blocks, strict=True):
            block = rows[:, start:end].to(torch.float64)
            total.addmm_(block.T, block)
    if count == 0:
        raise ConfigError("preconditioner 'fisher' needs at least one training row to be fitted on")
    factors = []
    for total, (start, end) in zip(sums, blocks, strict=True):
        total /= count
        mean_eigenvalue = float(total.diagonal().mean())
        if not mean_eigenvalue < float("inf"):
            raise NumericError("the training rows hold NaN or infinite numbers; rebuild the store")
        # an all-zero block has no scale of its own; any positive damping leaves its (zero) scores zero
        ridge = damping * mean_eigenvalue or 1.0
        total.diagonal().add_(ridge)
        factors.append(torch.linalg.cholesky(total))
        assert end > start
    return Fisher(blocks, factors)


def fit(
    name: str,
    row_blocks: Callable[[], Iterable[torch.Tensor]],
    blocks: list[tuple[int, int]],
    *,
    damping: float = 0.1,
) -> Preconditioner:
    """Fits the preconditioner called `name`; ConfigError names the nearest one if there is none."""
    if name not in PRECONDITIONERS:
        raise ConfigError(f"unknown preconditioner {name!r}; {did_you_mean(name, PRECONDITIONERS)}")
    return PRECONDITIONERS[name](row_blocks, blocks, damping)


PRECONDITIONERS: dict[
    str, Callable[[Callable[[], Iterable[torch.Tensor]], list[tuple[int, int]], float], Preconditioner]
] = {
    "none": lambda row_blocks, blocks, damping: Identity(),
    "cosine": lambda row_blocks, blocks, damping: Identity(normalize=True),
    "fisher": fit_fisher,
}
