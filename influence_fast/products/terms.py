"""Queries rounded to the dtype of the rows, as matrix units multiply them: q = sum_t factor[t] terms[t]."""

from __future__ import annotations

import torch
from torch import Tensor

from influence_fast.products import pytorch

GRANULE = 16  # bytes of one asynchronous copy, and what cuBLAS wants of addresses and strides


class Terms:
    """One or two terms of the rows' dtype for each query, on the queries' device.

    values: [Q, k] fp32. rows: "bfloat16" or "int8". high: a second term holds what the first rounded away.
    multiple: the number of queries is padded with zeros up to a multiple of this.

    terms: [terms, Q (padded), k (padded to whole granules, never none)]. factor, cosine: [terms, Q] fp32, what a
    product with a term is multiplied by for inner products and for cosines.
    """

    def __init__(self, values: Tensor, rows: str, high: bool, multiple: int = 1) -> None:
        rounded = pytorch.Queries(values, rows, high)
        self.count, self.width = rounded.count, values.shape[1]
        device = values.device
        first, second, step = _split(rounded.values, rows)
        terms = [first, second] if high else [first]
        exact = sum((term.double() * step**t for t, term in enumerate(terms)), torch.zeros((), device=device))
        norm = torch.linalg.vector_norm(exact, dim=1)  # [Q]
        steps = torch.tensor([step**t for t in range(len(terms))], dtype=torch.float64, device=device)
        self.factor = (steps[:, None] * rounded.factor.double()).float().contiguous()
        self.cosine = (steps[:, None] * torch.where(norm == 0, 0.0, 1.0 / norm)).float().contiguous()
        padded = -(-self.count // multiple) * multiple
        columns = max(1, -(-self.width * first.element_size() // GRANULE)) * GRANULE // first.element_size()
        self.terms = torch.zeros((len(terms), padded, columns), dtype=first.dtype, device=device)
        for t, term in enumerate(terms):
            self.terms[t, : self.count, : self.width] = term

    def factors(self, normalize: bool) -> Tensor:
        """Return what products are multiplied by, [terms, Q]."""
        return self.cosine if normalize else self.factor


def _split(values: Tensor, rows: str) -> tuple[Tensor, Tensor, float]:
    """Rounded queries (of `pytorch.Queries`) as first + step * second, both of the rows' dtype."""
    if rows == "int8":
        first = values.round()
        return first.to(torch.int8), ((values - first) * 254.0).round().to(torch.int8), 1.0 / 254.0
    first = values.bfloat16()
    return first, (values - first.float()).bfloat16(), 1.0
