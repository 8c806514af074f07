"""Scores of stored rows against queries, by dtype of the rows and number of queries, against PyTorch's products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benches.interleave import Variants
from benches.models import heavy_tailed
from benches.suites.case import Case, Scale
from influence_fast.products.inner_products import ProductOptions, inner_products, quantize_rows

BASELINES = {
    "int8": ("torch._int_mm", "torch bf16 matmul"),
    "bf16": ("torch bf16 matmul",),
    "fp32": ("torch fp32 matmul",),
}


def product(dtype: str, count: int) -> Callable[[Scale], Variants]:
    """PyTorch gets operands in the right type and layout already; ours converts the queries inside the call."""

    def build(scale: Scale) -> Variants:
        rows = heavy_tailed(scale(8192, 128), scale(4096, 64), seed=0)
        queries = heavy_tailed(count, rows.shape[1], seed=1)
        out = torch.empty(len(rows), count)
        half, half_queries = rows.bfloat16(), queries.bfloat16().T
        if dtype == "fp32":
            columns = queries.T.contiguous()
            return {
                "ours": lambda: inner_products(rows, queries, options=ProductOptions(out=out, threads=scale.threads)),
                "torch fp32 matmul": lambda: rows @ columns,
            }
        found: dict[str, Callable[[], Any]] = {}
        if dtype == "bf16":
            found["ours"] = lambda: inner_products(
                half, queries, options=ProductOptions(out=out, threads=scale.threads)
            )
        else:
            raw, scales = quantize_rows(rows)
            other = quantize_rows(queries)[0].T.contiguous()
            found["ours"] = lambda: inner_products(
                raw, queries, row_scales=scales, options=ProductOptions(out=out, threads=scale.threads)
            )
            found["torch._int_mm"] = lambda: torch._int_mm(raw, other)
        found["torch bf16 matmul"] = lambda: half @ half_queries
        return found

    return build


def quantise(scale: Scale) -> Variants:
    rows = heavy_tailed(scale(8192, 128), scale(4096, 64), seed=0)

    def plain() -> torch.Tensor:
        scales = rows.abs().amax(dim=1, keepdim=True) / 127
        return (rows / scales).round_().to(torch.int8)

    return {"ours": lambda: quantize_rows(rows, threads=scale.threads), "torch": plain}


CASES = [
    Case(f"{dtype} rows, {count} queries", ("ours", *BASELINES[dtype]), product(dtype, count))
    for count in (2, 32, 512)
    for dtype in BASELINES
]
CASES.append(Case("rows to int8", ("ours", "torch"), quantise))


def test_inner_products(variant: tuple[Case, str], side_by_side: Callable[[], None]) -> None:
    side_by_side()
