"""How time grows: with rows N and queries Q of a score, tokens T, model width d, rank r and projection dim p of a
gradient. One thing grows at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch

from benches.bench_gradients import one_by_one, ours
from benches.interleave import Variants
from benches.models import heavy_tailed, qwen2_model, with_lora
from benches.suites.case import VOCABULARY, Case, Scale, example
from influence_fast.gradients.rows.projection import Projection
from influence_fast.products.inner_products import ProductOptions, inner_products, quantize_rows

WIDTH = 2048


def score(rows: int = 10_000, queries: int = 64) -> Callable[[Scale], Variants]:
    def build(scale: Scale) -> Variants:
        stored = heavy_tailed(scale(rows, rows // 100), scale(WIDTH, 64), seed=0)
        asked = heavy_tailed(queries, stored.shape[1], seed=1)
        raw, scales = quantize_rows(stored)
        half, half_asked = stored.bfloat16(), asked.bfloat16().T
        return {
            "ours, int8": lambda: inner_products(
                raw, asked, row_scales=scales, options=ProductOptions(threads=scale.threads)
            ),
            "torch bf16 matmul": lambda: half @ half_asked,
        }

    return build


def gradient(tokens: int = 512, width: int = 256, rank: int = 16, dim: int = 16) -> Callable[[Scale], Variants]:
    """One example of `tokens` tokens through two layers."""

    def build(scale: Scale) -> Variants:
        model = with_lora(qwen2_model(VOCABULARY, layers=scale(2, 1), width=scale(width, 128)), rank=rank)
        examples = [example(scale(tokens, 16), torch.Generator().manual_seed(0))]
        projection = Projection(dim=dim)

        def plain() -> None:
            model.zero_grad(set_to_none=True)
            one_by_one(model, examples)

        return {"ours": lambda: ours(model, examples, projection), "plain forward+backward": plain}

    return build


SCORE, GRADIENT = ("ours, int8", "torch bf16 matmul"), ("ours", "plain forward+backward")
CASES = [
    *[Case(f"N = {n:,} rows", SCORE, score(rows=n), axis="N", at=n) for n in (5_000, 10_000, 20_000, 40_000)],
    *[Case(f"Q = {q:,} queries", SCORE, score(queries=q), axis="Q", at=q) for q in (2, 16, 128, 1024)],
    *[Case(f"T = {t:,} tokens", GRADIENT, gradient(tokens=t), 5, "T", t) for t in (256, 512, 1024, 2048)],
    *[Case(f"d = {d:,} wide", GRADIENT, gradient(width=d), 5, "d", d) for d in (128, 256, 512, 1024)],
    *[Case(f"r = {r}, LoRA's rank", GRADIENT, gradient(rank=r), 5, "r", r) for r in (4, 16, 64)],
    *[Case(f"p = {p}, the projection's dim", GRADIENT, gradient(dim=p), 5, "p", p) for p in (4, 16, 64, 128)],
]


def test_scaling(variant: tuple[Case, str], side_by_side: Callable[[], None]) -> None:
    side_by_side()
