"""Cosines in the metric of H^-1: scores that no training row can win by its length alone.

    fisher_cosine, ekfac_cosine    cos(H^-1/2 q, H^-1/2 g) = q^T H^-1 g / (|H^-1/2 q| |H^-1/2 g|)
    less                           cos(q, H^-1 g), H = diag(sqrt(v) + eps) as in `adam`

The first is theta-relative influence (Barshan et al. 2020, RelatIF, arXiv 2003.11630), the form that TrackStar
(Chang et al. 2024, arXiv 2410.17413) takes; the second is LESS's (Xia et al. 2024, arXiv 2402.04333): training
gradients as Adam would apply them, validation gradients plain.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch


class Whitening(Protocol):
    """A preconditioner whose H^-1/2 (or a square root of H^-1 up to a rotation) is at hand."""

    def apply(self, queries: torch.Tensor) -> torch.Tensor:
        """Return H^-1 q of queries [Q, k]."""
        ...

    def whiten(self, rows: torch.Tensor) -> torch.Tensor:
        """Return rows [n, k] in fp64, whitened: inner products of two results are q^T H^-1 g."""
        ...


@dataclass(frozen=True)
class UnitNorm:
    """A preconditioner's scores divided by the lengths of both sides; `row_norms` is what each training row is divided
    by.
    """

    inner: Whitening
    plain_queries: bool = False  # the query's own length, not its whitened one
    row_power: int = 1  # the row's length after H^-1/2 (1) or after H^-1 (2)
    normalize: bool = False

    def apply(self, queries: torch.Tensor) -> torch.Tensor:
        lengths = (queries.double() if self.plain_queries else self.inner.whiten(queries)).norm(dim=1, keepdim=True)
        return _divided(self.inner.apply(queries), lengths)

    def row_norms(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the fp64 lengths [n] of training rows [n, k]."""
        return (self.inner.whiten(rows) if self.row_power == 1 else self.inner.apply(rows.double())).norm(dim=1)


def _divided(rows: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Return rows / lengths; a zero row stays zero."""
    return rows / torch.where(lengths > 0, lengths, 1.0).to(rows)
