"""Sums of outer products over the tokens that are routed to an expert, for each expert and example.

Routed tokens lie in the order of the experts and, within one, of the pack, so the tokens of one expert and example lie
together: `edges` [E X + 1] say where those of expert e and example i, pair e X + i, begin.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import torch

from influence_fast.gradients.rows.row_sketch import segment_sums
from influence_fast.gradients.step.reduction import Reducer, pack_segments
from influence_fast.transfer import to_device

if TYPE_CHECKING:
    from influence_fast.kernels.segments import Segments

# Numbers of outer products at once: 64 MiB in fp32.
_CHUNK = 1 << 24


@dataclass(eq=False)
class Pairs:
    """The pairs of E experts and X examples that routed tokens belong to."""

    experts: int
    examples: int
    edges: list[int]  # [E X + 1]
    device: torch.device
    _segments: Segments | None = None

    @classmethod
    def of(cls, counts: list[int], tokens: torch.Tensor, cu_seqlens: list[int]) -> Pairs:
        """Split routed tokens into pairs of an expert and an example.

        counts: [E] tokens of each expert. tokens: [S] int64, each one's place in the pack, ascending within an expert.
        cu_seqlens: [X + 1] the pack's bounds.
        """
        device, examples = tokens.device, len(cu_seqlens) - 1
        bounds = to_device(torch.tensor(cu_seqlens), device)
        expert = torch.arange(len(counts), device=device).repeat_interleave(
            to_device(torch.tensor(counts), device), output_size=len(tokens)
        )
        pair = expert * examples + torch.searchsorted(bounds, tokens, right=True) - 1
        places = torch.arange(len(counts) * examples + 1, device=device)
        return cls(len(counts), examples, torch.searchsorted(pair, places).tolist(), device)

    @property
    def segments(self) -> Segments:
        """Return the pairs that have tokens, for the kernels."""
        if self._segments is None:
            filled = [end for start, end in pairwise(self.edges) if end > start]
            self._segments = pack_segments([0, *filled], self.device)
        return self._segments

    def of_example(self, example: int) -> list[tuple[int, slice]]:
        """Return the experts that an example has tokens with, and where these are."""
        starts = self.edges[example :: self.examples][: self.experts]
        ends = self.edges[example + 1 :: self.examples]
        return [(e, slice(i, j)) for e, (i, j) in enumerate(zip(starts, ends, strict=True)) if j > i]


def add_routed(
    reducer: Reducer,
    number: int,
    pairs: Pairs,
    a_side: tuple[torch.Tensor, torch.Tensor],
    b_side: tuple[torch.Tensor, torch.Tensor],
) -> None:
    """Add the gradients of module `number`'s factors [r E, d_in] and [d_out, r E] to the rows of `reducer`.

    a_side: u [S, r] and z [S, p] or x [S, d_in], for dA_e = s sum_t u_t z_t^T. b_side: y [S, p] or g [S, d_out] and
    h [S, r], for dB_e = s sum_t y_t h_t^T; z and y where the reducer is `projected`, else x and g.
    """
    scaling, experts = reducer.linears[number].scaling, pairs.experts
    if reducer.projected:
        grad_a = _pair_sums(reducer, *a_side, pairs).mul_(scaling)  # [E, X, r, p]
        grad_b = _pair_sums(reducer, *b_side, pairs).mul_(scaling)  # [E, X, p, r]
        reducer.add_factors(number, 0, [grad_a.transpose(0, 1).flatten(1, 2), grad_b.permute(1, 2, 3, 0).flatten(2)])
        return
    (u, x), (g, h) = (tuple(side.to(reducer.dtype) for side in sides) for sides in (a_side, b_side))
    for example in range(pairs.examples):  # whose factors' gradients alone are in memory
        grad_a = u.new_zeros(experts, u.shape[1], x.shape[1])
        grad_b = u.new_zeros(g.shape[1], h.shape[1], experts)
        for expert, rows in pairs.of_example(example):
            torch.mm(u[rows].T, x[rows], out=grad_a[expert])
            grad_b[:, :, expert] = g[rows].T @ h[rows]
        grad_a, grad_b = grad_a.flatten(0, 1).mul_(scaling), grad_b.flatten(1).mul_(scaling)
        reducer.add_factors(number, example, [grad_a[None], grad_b[None]])


def _pair_sums(reducer: Reducer, left: torch.Tensor, right: torch.Tensor, pairs: Pairs) -> torch.Tensor:
    """Return the sums of left_t right_t^T over each pair's tokens, [E, X, a, b]: left [S, a], right [S, b]."""
    a, b, count = left.shape[1], right.shape[1], pairs.experts * pairs.examples
    sums = torch.zeros(count, a * b, dtype=reducer.dtype, device=left.device)
    if len(left) == 0:
        pass
    elif reducer.backend.launches_kernels:
        filled = [place for place, (start, end) in enumerate(pairwise(pairs.edges)) if end > start]
        found = sums.new_empty(len(filled), a * b)
        reducer.launch_outer(left.contiguous(), right.contiguous(), pairs.segments, found)
        sums[filled] = found
    else:
        left, right = left.to(reducer.dtype), right.to(reducer.dtype)
        first, most = 0, max(1, _CHUNK // (a * b))
        while first < count:
            last = first + 1
            while last < count and pairs.edges[last + 1] - pairs.edges[first] <= most:
                last += 1
            rows = slice(pairs.edges[first], pairs.edges[last])
            products = (left[rows, :, None] * right[rows, None, :]).flatten(1)
            edges = torch.tensor(pairs.edges[first : last + 1]) - pairs.edges[first]
            sums[first:last] = segment_sums(products, edges)
            first = last
    return sums.view(pairs.experts, pairs.examples, a, b)
