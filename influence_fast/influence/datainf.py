"""`datainf`: the mean of inverses in place of the inverse of the mean (Kwon et al., ICLR 2024, arXiv 2310.00902).

    H_b^-1 = 1/n sum_i (g_i g_i^T + lambda_b I)^-1 = 1/lambda_b (I - 1/n sum_i g_i g_i^T / (lambda_b + |g_i|^2))

for the training rows g_i of block b, by Sherman-Morrison. No matrix is formed, so blocks may be of any width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from influence_fast.influence.damping import Damping, RowBlocks, check_damping, ridge, split_rows
from influence_fast.influence.fisher import second_moments


@dataclass(frozen=True)
class DataInf:
    """Goes over the training rows once more in `apply`: q k numbers of memory for q queries."""

    row_blocks: RowBlocks
    blocks: list[tuple[int, int]]  # [start, end) of each block in a row
    ridges: list[float]  # lambda of each block
    damping: float  # as it was used: with "auto", the share that was picked
    normalize: bool = False

    def apply(self, queries: torch.Tensor) -> torch.Tensor:
        wide = queries.to(torch.float64)
        total = torch.zeros_like(wide)
        count = 0
        for rows, _ in split_rows("datainf", self.row_blocks, self.damping):
            count += len(rows)
            rows = rows.to(wide.device)
            for (start, end), weight in zip(self.blocks, self.ridges, strict=True):
                block = rows[:, start:end]
                shares = wide[:, start:end] @ block.T / (weight + block.square().sum(dim=1))  # [q, n]
                total[:, start:end].addmm_(shares, block)
        out = wide - total / count
        for (start, end), weight in zip(self.blocks, self.ridges, strict=True):
            out[:, start:end] /= weight
        return out.to(queries.dtype)


def fit_datainf(row_blocks: RowBlocks, blocks: list[tuple[int, int]], damping: Damping) -> DataInf:
    """Fit `DataInf`: one pass for lambda_b = damping x mean eigenvalue of the block's empirical Fisher.

    That is the paper's choice, 0.1 x the mean square of a block's numbers, at the default damping. "auto" takes the
    share that is best for `fisher`, whose inverse this approximates (and so needs blocks that are dense enough).
    """
    check_damping(damping)
    if isinstance(damping, str):
        _, damping = second_moments("datainf", row_blocks, blocks, damping)
    squares = torch.zeros(len(blocks), dtype=torch.float64)
    count = 0
    for rows, _ in split_rows("datainf", row_blocks, damping):
        count += len(rows)
        squares += torch.stack([rows[:, start:end].square().sum() for start, end in blocks]).cpu()
    sizes = [end - start for start, end in blocks]
    means = [float(square) / (count * size) for square, size in zip(squares, sizes, strict=True)]
    return DataInf(row_blocks, blocks, [ridge(damping, mean) for mean in means], damping=damping)
