"""`ekfac`: Shampoo's eigenbasis of each LoRA factor's block, with EK-FAC's corrected eigenvalues.

The two sides come from second moments of whole per-example gradients, E[G G^T] and E[G^T G], as Shampoo's do (Gupta et
al. 2018, arXiv 1802.09568), where K-FAC takes those of a layer's inputs and of its output gradients. In the basis that
their eigenvectors span, the eigenvalues are those that EK-FAC puts there: the mean squares of the rotated gradients
(George et al. 2018, arXiv 1806.03884). Peers' EK-FAC has K-FAC's basis, so its scores are near these and not equal.

A block of a row is a matrix G (m, n): (r, p) and (p, r) for projected rows, (r, d_in) and (d_out, r) for exact ones.

    A = E[G G^T] = U_A D_A U_A^T (m, m)      B = E[G^T G] = U_B D_B U_B^T (n, n)      means over training rows
    S = E[(U_A^T G U_B)^2] (m, n)            lambda = damping x mean of S
    H^-1 Q = U_A [ (U_A^T Q U_B) / (S + lambda) ] U_B^T

The rows themselves give the factors, so H is the empirical Fisher seen in a Kronecker eigenbasis: exact along its
diagonal there, with two small eigenproblems where `fisher` needs one of m n numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from influence_fast.errors import ConfigError
from influence_fast.gradients.rows.layout import LayoutEntry
from influence_fast.influence.damping import (
    Damping,
    RowBlocks,
    best_damping,
    check_damping,
    check_width,
    ridge,
    split_rows,
)


@dataclass(frozen=True)
class Ekfac:
    """Shampoo's eigenbases of every factor block and EK-FAC's damped, corrected eigenvalues in them, fp64."""

    factors: list[LayoutEntry]
    bases: list[tuple[torch.Tensor, torch.Tensor]]  # U_A [m, m], U_B [n, n]
    eigenvalues: list[torch.Tensor]  # S + lambda, [m, n]
    ridges: list[float]  # lambda
    damping: float  # as it was used: with "auto", the share that was picked
    normalize: bool = False

    def apply(self, queries: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(queries)
        for entry, (left, right), eigenvalues in zip(self.factors, self.bases, self.eigenvalues, strict=True):
            rotated = left.T @ block_of(queries, entry).to(left) @ right
            solved = left @ (rotated / eigenvalues) @ right.T
            block_of(out, entry).copy_(solved)
        return out

    def whiten(self, rows: torch.Tensor) -> torch.Tensor:
        """Turn every block of rows [n, k] into the eigenbasis, over the root of its eigenvalues, in fp64."""
        out = torch.empty(rows.shape, dtype=torch.float64)
        for entry, (left, right), eigenvalues in zip(self.factors, self.bases, self.eigenvalues, strict=True):
            block_of(out, entry).copy_(left.T @ block_of(rows, entry).to(left) @ right / eigenvalues.sqrt())
        return out


def fit_ekfac(row_blocks: RowBlocks, factors: list[LayoutEntry] | None, damping: Damping) -> Ekfac:
    """Fit `Ekfac` in two passes over the rows (four for "auto"): Shampoo's factors, then EK-FAC's eigenvalues.

    factors: shape and offset of every factor's block in a row, as `gradient_layout` lists them. Raises ConfigError
    where they are unknown (a row that was sketched has no such blocks) or a side is too wide.
    """
    check_damping(damping)
    if factors is None:
        raise ConfigError(
            "preconditioner 'ekfac' needs rows with a block for each LoRA factor; these were sketched or imported "
            "without one: build the store without a width, or use 'fisher' or 'datainf'"
        )
    check_width("Kronecker", max(max(entry.shape) for entry in factors))
    bases = _bases(row_blocks, factors, damping)
    fitted = [torch.zeros(entry.shape, dtype=torch.float64) for entry in factors]
    held = [torch.zeros(entry.shape, dtype=torch.float64) for entry in factors]
    counts = [0, 0]
    for parts in split_rows("ekfac", row_blocks, damping):
        for part, (rows, sums) in enumerate(zip(parts, (fitted, held), strict=True)):
            counts[part] += len(rows)
            for entry, (left, right), total in zip(factors, bases, sums, strict=True):
                total += (left.T @ block_of(rows.cpu(), entry) @ right).square().sum(dim=0)
    if isinstance(damping, str):
        pairs = zip(fitted, held, strict=True)
        damping = best_damping([(total / counts[0], other / counts[1]) for total, other in pairs])
        return fit_ekfac(row_blocks, factors, damping)
    eigenvalues = [total / counts[0] for total in fitted]
    ridges = [ridge(damping, float(values.mean())) for values in eigenvalues]
    damped = [values + added for values, added in zip(eigenvalues, ridges, strict=True)]
    return Ekfac(factors, bases, damped, ridges, damping=damping)


def block_of(rows: torch.Tensor, entry: LayoutEntry) -> torch.Tensor:
    """Return one factor's block of rows [N, k] as matrices [N, m, n], a view."""
    return rows[:, entry.columns].unflatten(1, entry.shape)


def _bases(
    row_blocks: RowBlocks, factors: list[LayoutEntry], damping: Damping
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Compute U_A and U_B of every block in one pass."""
    sums = [tuple(torch.zeros(n, n, dtype=torch.float64) for n in entry.shape) for entry in factors]
    for rows, _ in split_rows("ekfac", row_blocks, damping):
        for entry, (left, right) in zip(factors, sums, strict=True):
            block = block_of(rows.cpu(), entry)  # [N, m, n]
            columns = block.transpose(0, 1).flatten(1)  # [m, N n]
            left.addmm_(columns, columns.T)
            lines = block.flatten(0, 1)  # [N m, n]
            right.addmm_(lines.T, lines)
    bases = []
    for left, right in sums:
        ridge(1.0, float(left.diagonal().mean()))  # names NaN before eigh meets it
        bases.append((torch.linalg.eigh(left)[1], torch.linalg.eigh(right)[1]))
    return bases
