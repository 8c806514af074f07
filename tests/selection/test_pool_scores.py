"""Scores of a pool: one fitted preconditioner for the table and for the lists of single answers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import influence_fast as inf
from influence_fast.influence import preconditioners
from influence_fast.influence.queries import Queries
from influence_fast.influence.settings import InfluenceConfig
from influence_fast.selection.pool_scores import ScoredPool, score_pool


def test_the_table_and_the_lists_of_answers_are_one_fit(
    tiny_lora: Callable[..., Any], tiny_tokenizer: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fits, whole = [], preconditioners.fit
    monkeypatch.setattr(preconditioners, "fit", lambda *a, **k: fits.append(a[0]) or whole(*a, **k))
    model, tokenizer = tiny_lora(), tiny_tokenizer()
    pool = [inf.Example(id=f"t{i}", prompt=f"{i} + 1 =", completion=f" {i + 1}") for i in range(6)]
    asked = [
        inf.Example(id="q", prompt="2 + 2 =", completion=" 4"),
        inf.Example(id="r", prompt="1 + 3 =", completion=" 5"),
    ]
    queries = Queries(asked, {"correct": [0], "incorrect": [1]}, [])
    scored = score_pool(
        ScoredPool(model, tokenizer, pool, inf.tokenize(pool, tokenizer).examples, queries),
        tmp_path / "s",
        inf.RowSpec(dim=4),
        InfluenceConfig(fisher="data"),
        top=2,
        progress=False,
    )
    assert fits == ["ekfac_cosine"]
    assert scored.top is not None
    best = [int(np.argmax(scored.table[f"s_{group}"])) for group in ("correct", "incorrect")]
    assert scored.top.raising[1][:, 0].tolist() == best
