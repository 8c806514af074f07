"""Per-example gradients of a small Qwen2 shape against plain peft forward+backward of the same examples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benches.bench_gradients import one_by_one, ours, padded
from benches.interleave import Variants
from benches.models import qwen2_model, with_lora
from benches.suites.case import VOCABULARY, Case, Scale, ragged_examples
from influence_fast.gradients.per_example import gradient_layout, iter_gradient_rows, per_example_gradients
from influence_fast.gradients.rows.layout import layout_width
from influence_fast.gradients.rows.projection import Projection
from influence_fast.gradients.rows.row_spec import RowSpec
from influence_fast.gradients.streaming import stream_influence
from influence_fast.influence.sketch_fitting import fit_projection

BASELINES = ("padded batches of 4", "one by one")


def baselines(model: Any, examples: list[dict[str, Any]]) -> Variants:
    """Length-sorted padded batches (the best size of `bench_gradients` here), and one example at a time."""

    def batches() -> None:
        model.zero_grad(set_to_none=True)
        padded(model, examples, 4)

    def singles() -> None:
        model.zero_grad(set_to_none=True)
        one_by_one(model, examples)

    return dict(zip(BASELINES, (batches, singles), strict=True))


def world(scale: Scale) -> tuple[Any, list[dict[str, Any]]]:
    model = with_lora(qwen2_model(VOCABULARY, layers=scale(4, 1), width=scale(256, 64)), rank=16)
    return model, ragged_examples(scale(16, 3), scale(160, 16))


def projected(projection: Projection) -> Callable[[Scale], Variants]:
    def build(scale: Scale) -> Variants:
        model, examples = world(scale)
        return {"ours": lambda: ours(model, examples, projection), **baselines(model, examples)}

    return build


def fitted(scale: Scale) -> Variants:
    """Rows of a sketch that is fitted beforehand."""
    model, examples = world(scale)
    projection = fit_projection(model, examples, RowSpec.of(Projection(dim=16, width=scale(4096, 512))))
    return {"ours": lambda: ours(model, examples, projection), **baselines(model, examples)}


def exact(scale: Scale) -> Variants:
    model, examples = world(scale)

    def run() -> None:
        for _ in iter_gradient_rows(model, examples):
            pass

    return {"ours": run, **baselines(model, examples)}


def streamed(count: int) -> Callable[[Scale], Variants]:
    """Scores against `count` queries that are known beforehand, with no row kept."""

    def build(scale: Scale) -> Variants:
        model, examples = world(scale)
        queries = torch.randn(count, layout_width(gradient_layout(model)))
        return {
            "ours": lambda: stream_influence(model, examples, queries),
            "exact rows, then a product": lambda: per_example_gradients(model, examples) @ queries.T,
            **baselines(model, examples),
        }

    return build


NAMES = ("ours", *BASELINES)
STREAMED = ("ours", "exact rows, then a product", *BASELINES)
CASES = [
    Case("one_sided, dim 16", NAMES, projected(Projection(dim=16)), rounds=5),
    Case("one_sided, dim 64", NAMES, projected(Projection(dim=64)), rounds=5),
    Case("one_sided, dim 16, sketched to 4096", NAMES, projected(Projection(dim=16, width=4096)), rounds=5),
    Case("one_sided, dim 16, fitted sketch to 4096", NAMES, fitted, rounds=5),
    Case("kron, dim 16", NAMES, projected(Projection("kron", dim=16)), rounds=5),
    Case("sjlt of width 4096", NAMES, projected(Projection("sjlt", width=4096)), rounds=5),
    Case("exact", NAMES, exact, rounds=5),
    *(Case(f"streamed scores of {n} queries", STREAMED, streamed(n), rounds=5) for n in (4, 50)),
]


def test_gradients(variant: tuple[Case, str], side_by_side: Callable[[], None]) -> None:
    side_by_side()
