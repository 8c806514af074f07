"""From examples to ranks: store and index, or one stream, against a plain backward for each example and a matmul."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch

from benches.interleave import Variants
from benches.models import qwen2_model, train_tokenizer, with_lora
from benches.suites.case import Case, Scale
from influence_fast.data.examples import Example, tokenize
from influence_fast.gradients.per_example import per_example_gradients
from influence_fast.gradients.rows.projection import Projection
from influence_fast.gradients.rows.row_spec import RowSpec
from influence_fast.gradients.streaming import stream_influence
from influence_fast.influence.building import build_store
from influence_fast.influence.scorer import Scorer
from influence_fast.store.building import BuildOptions


def texts(count: int, words: int, first: int) -> list[Example]:
    """Sums of random numbers, spelt out step by step, of ragged lengths."""
    generator = torch.Generator().manual_seed(first)
    found = []
    for i in range(count):
        length = int(words * (0.5 + torch.rand((), generator=generator)))
        numbers = torch.randint(10, 1000, (length,), generator=generator).tolist()
        steps = " then ".join(f"{n} + {m} = {n + m}" for n, m in pairwise(numbers))
        found.append(Example(f"example-{first + i}", "Add up " + ", ".join(map(str, numbers[:8])), steps))
    return found


def plain_rows(model: Any, examples: list[dict[str, Any]]) -> torch.Tensor:
    """Exact gradients by autograd, one example at a time."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    rows = []
    for e in examples:
        model.zero_grad(set_to_none=True)
        model(input_ids=e["input_ids"][None], labels=e["labels"][None], use_cache=False).loss.backward()
        rows.append(torch.cat([p.grad.flatten() for p in parameters]))
    return torch.stack(rows)


def build(scale: Scale) -> Variants:
    train, asked = texts(scale(48, 4), scale(24, 4), 0), texts(scale(12, 2), scale(16, 4), 10_000)
    tokenizer = train_tokenizer([e.prompt + e.completion for e in train + asked], vocab_size=scale(1024, 400))
    model = with_lora(qwen2_model(len(tokenizer), layers=scale(4, 1), width=scale(256, 64)), rank=16)
    train_tokens, asked_tokens = tokenize(train, tokenizer).examples, tokenize(asked, tokenizer).examples
    projection = Projection(dim=16)
    groups = {"correct": range(0, len(asked), 2), "incorrect": range(1, len(asked), 2)}

    def index() -> None:
        path = scale.folder / "store"
        shutil.rmtree(path, ignore_errors=True)
        store = build_store(
            path, model, train, RowSpec.of(projection), tokenizer=tokenizer, options=BuildOptions(progress=False)
        )
        queries = per_example_gradients(model, asked_tokens, projection=projection)
        Scorer.fit(store, preconditioner="cosine").scores(queries, groups)

    def stream() -> None:
        queries = per_example_gradients(model, asked_tokens)
        means = torch.stack([queries[list(members)].mean(dim=0) for members in groups.values()])
        stream_influence(model, train_tokens, means).argsort(dim=0)

    def plain() -> None:
        rows, queries = plain_rows(model, train_tokens), plain_rows(model, asked_tokens)
        scores = torch.nn.functional.normalize(rows) @ torch.nn.functional.normalize(queries).T
        for members in groups.values():
            scores[:, list(members)].mean(dim=1).argsort()
        scores.argsort(dim=0)

    return {"ours, a store": index, "ours, streamed": stream, "a backward for each example": plain}


CASES = [
    Case(
        "48 traces scored against 12 answers",
        ("ours, a store", "ours, streamed", "a backward for each example"),
        build,
        rounds=5,
    )
]


def test_end_to_end(variant: tuple[Case, str], side_by_side: Callable[[], None]) -> None:
    side_by_side()
