"""Fitting each H^-1 on training rows and applying it to queries, against the plain dense forms in fp64."""

from __future__ import annotations

from collections.abc import Callable

import torch

from benches.interleave import Variants
from benches.models import heavy_tailed
from benches.suites.case import Case, Scale
from influence_fast.gradients.rows.layout import LayoutEntry
from influence_fast.influence import preconditioners

QUERIES, SIDE, DAMPING = 32, 16, 0.1

Rows = tuple[torch.Tensor, torch.Tensor, list[LayoutEntry]]


def world(quick: bool) -> Rows:
    """Training rows, queries and the layout of 12 modules of two 16 x 16 factors each."""
    modules = 2 if quick else 12
    layout = [
        LayoutEntry(f"m{i // 2}", ("lora_A", "lora_B")[i % 2], (SIDE, SIDE), i * SIDE * SIDE)
        for i in range(2 * modules)
    ]
    width = len(layout) * SIDE * SIDE
    return heavy_tailed(50 if quick else 1500, width, seed=0), heavy_tailed(QUERIES, width, seed=1), layout


def blocks_of(layout: list[LayoutEntry], factors: int) -> list[tuple[int, int]]:
    size = factors * SIDE * SIDE
    return [(start, start + size) for start in range(0, len(layout) * SIDE * SIDE, size)]


def ours(name: str, rows: torch.Tensor, queries: torch.Tensor, layout: list[LayoutEntry]) -> torch.Tensor:
    fitted = preconditioners.fit(name, lambda: rows.split(512), blocks_of(layout, 2), damping=DAMPING, factors=layout)
    return fitted.apply(queries)


def dense(rows: torch.Tensor, queries: torch.Tensor, blocks: list[tuple[int, int]]) -> torch.Tensor:
    """(F_b + lambda I)^-1 of each block as a matrix inverse."""
    out = torch.empty_like(queries)
    for start, end in blocks:
        block = rows[:, start:end].double()
        fisher = block.T @ block / len(rows)
        fisher.diagonal().add_(DAMPING * fisher.diagonal().mean())
        out[:, start:end] = (queries[:, start:end].double() @ torch.linalg.inv(fisher)).float()
    return out


def moments(rows: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
    root = rows.double().square().mean(dim=0).sqrt()
    return (queries / (root + DAMPING * root.mean())).float()


def build(name: str) -> Callable[[Scale], Variants]:
    def variants(scale: Scale) -> Variants:
        rows, queries, layout = world(scale.quick)
        mine = {"ours": lambda: ours(name, rows, queries, layout)}
        if name == "adam":
            return mine | {"torch, mean of squares": lambda: moments(rows, queries)}
        if name == "ekfac":
            return mine | {"dense inverse of each factor": lambda: dense(rows, queries, blocks_of(layout, 1))}
        return mine | {"dense inverse of each module": lambda: dense(rows, queries, blocks_of(layout, 2))}

    return variants


CASES = [
    Case("fisher", ("ours", "dense inverse of each module"), build("fisher"), rounds=5),
    Case("datainf", ("ours", "dense inverse of each module"), build("datainf"), rounds=5),
    Case("ekfac", ("ours", "dense inverse of each factor"), build("ekfac"), rounds=5),
    Case("adam", ("ours", "torch, mean of squares"), build("adam"), rounds=5),
]


def test_preconditioners(variant: tuple[Case, str], side_by_side: Callable[[], None]) -> None:
    side_by_side()
