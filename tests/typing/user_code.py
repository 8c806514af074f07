"""A user's file with planted errors: a type checker must find each of them, and nothing else (see `make lint`).

mypy reports an `ignore` that hides no error, so that the file fails where the public API goes untyped again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import influence_fast as inf
from influence_fast.influence.sketch_fitting import SketchFit, fit_projection


def right(model: Any, tokenizer: Any) -> list[float]:
    """Use the API as it is meant."""
    examples = inf.load_examples(Path("train.jsonl"))
    spec = inf.RowSpec(dim=64, width=8192, sketch="auto", dtype="int8", loss_reduction="mean", layers=1.0, seed=0)
    store = inf.build_store("store", model, examples, spec, tokenizer=tokenizer)
    queries: torch.Tensor = store.query_gradients(model, [])
    table: inf.ScoreTable = inf.Scorer.fit(store, damping=0.1, model=model).scores(queries, {"correct": [0]})
    return [float(row) for row in table["s_correct"]]


def wrong(model: Any, tokenizer: Any, store: inf.Store, queries: torch.Tensor) -> None:
    """Make a dozen mistakes."""
    inf.buildstore("store")  # type: ignore[attr-defined]
    inf.build_store("store", model, [], store.spec, tokeniser=tokenizer)  # type: ignore[call-arg]
    inf.build_store("store", model, [], {"dim": 64})  # type: ignore[arg-type]
    inf.RowSpec(widht=8192)  # type: ignore[call-arg]
    inf.RowSpec(dim="64")  # type: ignore[arg-type]
    inf.RowSpec().dim = 64  # type: ignore[misc]
    fit_projection(model, [], store.spec, fit=SketchFit(dampening=0.1))  # type: ignore[call-arg]
    inf.Scorer.fit(store, dampening=0.1)  # type: ignore[call-arg]
    inf.Scorer.fit("store")  # type: ignore[arg-type]
    inf.Scorer.fit(store).scores(queries, ["correct"])  # type: ignore[arg-type]
    store.projektion  # type: ignore[attr-defined]  # noqa: B018
    rows: str = inf.per_example_gradients(model, [])  # type: ignore[assignment]
    print(rows)
