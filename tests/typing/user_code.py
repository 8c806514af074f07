"""A user's file with planted errors: a type checker must find each of them, and nothing else (see `make lint`).

mypy reports an `ignore` that hides no error, so that the file fails where the public API goes untyped again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import influence_fast as inf
from influence_fast.gradients.projection import Projection


def right(model: Any, tokenizer: Any) -> list[float]:
    """Use the API as it is meant."""
    examples = inf.load_examples(Path("train.jsonl"))
    store = inf.build_store("store", model, tokenizer, examples, projection=Projection("one_sided", dim=64))
    queries: torch.Tensor = inf.per_example_gradients(model, [], projection=store.projection)
    table: inf.ScoreTable = inf.Scorer.fit(store, damping=0.1, model=model).scores(queries, {"correct": [0]})
    return [float(row) for row in table["s_correct"]]


def wrong(model: Any, tokenizer: Any, store: inf.Store, queries: torch.Tensor) -> None:
    """Make eight mistakes."""
    inf.buildstore("store")  # type: ignore[attr-defined]
    inf.build_store("store", model, tokenizer, [], projecton=None, projection=None)  # type: ignore[call-arg]
    inf.build_store("store", model, tokenizer, [])  # type: ignore[call-arg]
    inf.Scorer.fit(store, dampening=0.1)  # type: ignore[call-arg]
    inf.Scorer.fit("store")  # type: ignore[arg-type]
    inf.Scorer.fit(store).scores(queries, ["correct"])  # type: ignore[arg-type]
    store.projektion  # type: ignore[attr-defined]  # noqa: B018
    rows: str = inf.per_example_gradients(model, [])  # type: ignore[assignment]
    print(rows)
