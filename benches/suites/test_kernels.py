"""The products inside the gradient pass, and the random numbers they need, on this machine's torch backend.

Baselines: the same numbers by way of the exact per-example gradient, and a plain copy of what must be read anyway.
`gpu_session` times the Triton kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch

from benches.interleave import Variants
from benches.models import qwen2_model, with_lora
from benches.suites.case import Case, Scale
from influence_fast.gradients.engine import GradientEngine
from influence_fast.gradients.rows.projection import Projection
from influence_fast.kernels import segment_outer, skinny_project
from influence_fast.kernels.runtime import Cost
from influence_fast.philox import sign_matrix, sjlt_map

RANK = DIM = 16


def lengths(scale: Scale) -> list[int]:
    return [scale(32, 4) * (1 + e % 7) for e in range(16)]


def skinny(scale: Scale) -> Variants:
    x = torch.randn(scale(4096, 64), scale(1024, 64))
    a, r = torch.randn(RANK, x.shape[1]), torch.randn(x.shape[1], DIM)
    both = torch.cat([a.T, r], dim=1)
    copied = torch.empty_like(x)
    return {
        "ours, one pass": lambda: skinny_project.reference(x, both),
        "two products": lambda: (x @ a.T, x @ r),
        "a copy of x": lambda: copied.copy_(x),
    }


@dataclass(frozen=True)
class Factors:
    """Projected rows of every module of a model from its inputs x and output gradients g: two ways, and the floor."""

    ours: Callable[[], Any]
    exact: Callable[[], Any]
    cost: Cost


def factors(scale: Scale) -> Factors:
    model = with_lora(qwen2_model(64, layers=scale(4, 1), width=scale(256, 64)), rank=RANK)
    reducer = GradientEngine(model, Projection(dim=DIM), backend="torch").reducer
    linears = reducer.linears
    cu = [0, *accumulate(lengths(scale))]
    widths = {width for linear in linears for width in (linear.d_in, linear.d_out)}
    tokens = {width: torch.randn(cu[-1], width) for width in widths}
    random = [reducer.columns(number) for number in range(len(linears))]
    forward = [torch.cat([linear.a.T, r_in], 1) for linear, (r_in, _) in zip(linears, random, strict=True)]
    backward = [torch.cat([linear.b, r_out], 1) for linear, (_, r_out) in zip(linears, random, strict=True)]

    @torch.no_grad()
    def ours() -> None:
        reducer.begin(cu)
        for number, linear in enumerate(linears):
            x, g = tokens[linear.d_in], tokens[linear.d_out]
            reducer.add(number, x @ forward[number], g @ backward[number], g, None)
        reducer.finish()

    @torch.no_grad()
    def exact() -> None:
        for linear, (r_in, r_out) in zip(linears, random, strict=True):
            x, g = tokens[linear.d_in], tokens[linear.d_out]
            h, u = x @ linear.a.T, g @ linear.b
            for a, b in pairwise(cu):
                (u[a:b].T @ x[a:b]).mul_(linear.scaling) @ r_in
                r_out.T @ (g[a:b].T @ h[a:b]).mul_(linear.scaling)

    costs = [
        skinny_project.cost(cu[-1], width, RANK + DIM, itemsize=4, out_itemsize=4)
        for linear in linears
        for width in (linear.d_in, linear.d_out)
    ]
    sums = segment_outer.cost(cu[-1], len(cu) - 1, 2 * len(linears), DIM, RANK, itemsize=4, row_itemsize=4)
    flops, moved = (sum(each) for each in zip(*costs, sums, strict=True))
    return Factors(ours, exact, Cost(flops, moved))


def projected(scale: Scale) -> Variants:
    found = factors(scale)
    return {"ours": found.ours, "exact gradients, then projected": found.exact}


def signs(scale: Scale) -> Variants:
    rows, columns = scale(65_536, 256), 16
    return {
        "ours": lambda: sign_matrix(0, "m/in", rows, columns),
        "torch.randn": lambda: torch.randn(rows, columns),
    }


def buckets(scale: Scale) -> Variants:
    n, width = scale(1_000_000, 1000), 8192
    return {
        "ours": lambda: sjlt_map(0, "m/row", n, width),
        "torch.randint": lambda: (torch.randint(width, (n,)), torch.randint(2, (n,)).mul_(2).sub_(1).float()),
    }


CASES = [
    Case("[h|z] = x [A^T|R], 32 columns", ("ours, one pass", "two products", "a copy of x"), skinny, rounds=15),
    Case("projected factors, 28 modules", ("ours", "exact gradients, then projected"), projected, rounds=15),
    Case("random signs, 65,536 x 16", ("ours", "torch.randn"), signs, rounds=15),
    Case("sketch map of 1,000,000 numbers", ("ours", "torch.randint"), buckets, rounds=15),
]


def test_kernels(variant: tuple[Case, str], side_by_side: Callable[[], None]) -> None:
    side_by_side()
