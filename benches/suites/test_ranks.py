"""What selection needs of the scores: ranks, group means, the best rows; against a product and a sort in PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import torch

from benches.interleave import Variants
from benches.models import heavy_tailed
from benches.suites.case import Case, Scale
from influence_fast.products.inner_products import ProductOptions, inner_products, quantize_rows

QUERIES = 128
GROUPS = [list(range(0, QUERIES, 2)), list(range(1, QUERIES, 2))]


def build(what: str) -> Callable[[Scale], Variants]:
    def variants(scale: Scale) -> Variants:
        rows = heavy_tailed(scale(20_000, 256), scale(1024, 64), seed=0)
        queries = heavy_tailed(QUERIES, rows.shape[1], seed=1)
        half, half_queries = rows.bfloat16(), queries.bfloat16().T
        raw, scales = quantize_rows(rows)
        members = [torch.tensor(group) for group in GROUPS]

        def ours(**asked: object) -> Callable[[], object]:
            return lambda: inner_products(
                raw, queries, row_scales=scales, options=ProductOptions(threads=scale.threads), **asked
            )  # type: ignore[call-overload]

        def means() -> list[torch.Tensor]:
            scores = (half @ half_queries).float()
            return [scores[:, group].mean(dim=1) for group in members]

        def argsort() -> torch.Tensor:
            return torch.argsort(half @ half_queries, dim=0)

        def all_ranks() -> list[torch.Tensor]:
            order = argsort()
            places = torch.arange(1.0, len(rows) + 1)[:, None].expand_as(order)
            ranks = torch.empty(order.shape).scatter_(0, order, places)
            return [ranks[:, group].mean(dim=1) for group in members]

        return {
            "group means": {"ours": ours(groups=GROUPS), "bf16 matmul, means": means},
            "mean ranks": {
                "ours": ours(groups=GROUPS, ranks=True),
                "bf16 matmul, argsort": argsort,
                "bf16 matmul, argsort, ranks, means": all_ranks,
            },
            "top 100": {
                "ours": ours(topk=100),
                "bf16 matmul, torch.topk": lambda: torch.topk(half @ half_queries, 100, dim=0),
            },
        }[what]

    return variants


CASES = [
    Case("group means of 128 queries", ("ours", "bf16 matmul, means"), build("group means")),
    Case(
        "mean ranks of 128 queries",
        ("ours", "bf16 matmul, argsort", "bf16 matmul, argsort, ranks, means"),
        build("mean ranks"),
        rounds=5,
    ),
    Case("top 100 of 128 queries", ("ours", "bf16 matmul, torch.topk"), build("top 100")),
]


def test_ranks(variant: tuple[Case, str], side_by_side: Callable[[], None]) -> None:
    side_by_side()
