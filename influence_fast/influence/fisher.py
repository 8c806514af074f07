"""`fisher`: the damped Fisher of each module, of the rows that it is fitted on, inverted densely."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from influence_fast.influence.damping import (
    AUTO,
    Damping,
    RowBlocks,
    best_damping,
    check_damping,
    check_width,
    ridge,
    split_rows,
)


@dataclass(frozen=True)
class Fisher:
    """Damped empirical Fisher, block by block: (F_b + lambda_b I)^-1, F_b = mean of g_b g_b^T over training rows.

    A block is one module's factors (both sides), so correlations inside a module are seen and those between modules
    are not; TRAK (Park et al. 2023) and LoGra (Choe et al. 2024) use the same form on their projections.
    lambda_b is `damping` times the mean eigenvalue of F_b, so one number serves blocks of every scale.
    """

    blocks: list[tuple[int, int]]  # [start, end) of each block in a row
    factors: list[torch.Tensor]  # lower Cholesky factor of each damped block, fp64
    damping: float  # as it was used: with "auto", the share that was picked
    normalize: bool = False

    def apply(self, queries: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(queries)
        for (start, end), factor in zip(self.blocks, self.factors, strict=True):
            block = queries[:, start:end].to(factor)
            out[:, start:end] = torch.cholesky_solve(block.T, factor).T.to(queries)
        return out

    def whiten(self, rows: torch.Tensor) -> torch.Tensor:
        """Return L_b^-1 of every block of rows [n, k], in fp64.

        Inner products of the results are those under (F + lambda I)^-1.
        """
        out = torch.empty(rows.shape, dtype=torch.float64)
        for (start, end), factor in zip(self.blocks, self.factors, strict=True):
            out[:, start:end] = torch.linalg.solve_triangular(factor, rows[:, start:end].to(factor).T, upper=False).T
        return out


def fit_fisher(row_blocks: RowBlocks, blocks: list[tuple[int, int]], damping: Damping) -> Fisher:
    """Fit `Fisher` in one pass; `row_blocks()` yields [n, k] pieces of the training rows."""
    sums, damping = second_moments("fisher", row_blocks, blocks, damping)
    factors = []
    for total in sums:
        total.diagonal().add_(ridge(damping, float(total.diagonal().mean())))
        factors.append(torch.linalg.cholesky(total))
    return Fisher(blocks, factors, damping=damping)


def second_moments(
    name: str, row_blocks: RowBlocks, blocks: list[tuple[int, int]], damping: Damping
) -> tuple[list[torch.Tensor], float]:
    """Return F_b of every block (fp64, dense), in one pass, and the damping: as given, or picked (see `damping`)."""
    check_damping(damping)
    check_width("Fisher", max(end - start for start, end in blocks))
    fitted = [torch.zeros(end - start, end - start, dtype=torch.float64) for start, end in blocks]
    held = [total.clone() for total in fitted] if damping == AUTO else []
    counts = [0, 0]
    for parts in split_rows(name, row_blocks, damping):
        for part, (rows, sums) in enumerate(zip(parts, (fitted, held), strict=True)):
            counts[part] += len(rows)
            for total, (start, end) in zip(sums, blocks, strict=False):
                block = rows[:, start:end].cpu()
                total.addmm_(block.T, block)
    if not isinstance(damping, str):
        return [total / counts[0] for total in fitted], damping
    spectra = []
    for total, other in zip(fitted, held, strict=True):
        ridge(1.0, float(total.diagonal().mean() + other.diagonal().mean()))  # names NaN before eigh meets it
        eigenvalues, directions = torch.linalg.eigh(total / counts[0])
        spectra.append((eigenvalues, ((other @ directions) * directions).sum(dim=0) / counts[1]))
    whole = [(total + other) / sum(counts) for total, other in zip(fitted, held, strict=True)]
    return whole, best_damping(spectra)
