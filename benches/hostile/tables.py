"""Hostile score tables, results and optimizer states: what pruning, the report and the preconditioners read."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benches.hostile.case import Case
from benches.hostile.configs import no_files
from benches.hostile.data import _arrays, good_row
from benches.hostile.importers import tensors
from benches.hostile.values import DEEP, DIGITS, ODD, damaged, dumped, noise
from influence_fast.data.examples import Example, load_rows, save_examples
from influence_fast.influence.scores import ScoreTable
from influence_fast.report.page import load_results, write_report
from influence_fast.selection.pruning import select
from influence_fast.training.optimizer_states import named_adam

_RESULTS: dict[str, Any] = {
    "title": "t",
    "summary": "s",
    "created": "2024-01-01T00:00:00",
    "config": {"a": 1},
    "versions": {"a": "1"},
    "environment": {"a": "b"},
    "data": {"pool": 5, "labels": {"x": 1}, "set_aside": [{"id": "a", "why": "b"}]},
    "accuracy_before": {"name": "a", "accuracy": 0.5, "low": 0.4, "high": 0.6, "n": 9},
    "cells": [
        {
            "strategy": "combined",
            "fraction": 0.1,
            "seed": 0,
            "accuracy": 0.5,
            "low": 0.4,
            "high": 0.6,
            "n": 9,
            "samples": 2,
            "majority": 0.5,
            "pass_at": [{"k": 1, "value": 0.5}],
        }
    ],
    "settings": [{"strategy": "combined", "fraction": 0.1, "low": 0.1, "high": 0.2}],
    "comparisons": [
        {
            "strategy": "combined",
            "fraction": 0.1,
            "against": "random",
            "difference": 0.1,
            "low": 0,
            "high": 1,
            "p": 0.5,
            "p_adjusted": 0.5,
        }
    ],
    "detection": [{"method": "m", "auc": 0.5, "low": 0.4, "high": 0.6, "precision_at": {"10%": 0.5}}],
    "scores": [{"id": str(i), "s_correct": i, "s_incorrect": -i, "dropped_by": ["combined"]} for i in range(4)],
    "rank_agreement": {"methods": ["a"], "spearman": [[1.0]]},
    "curves": {"a": [[0, 1.0], [1, 0.5]]},
    "cost": [{"stage": "s", "seconds": 1.0}],
    "queries": {"correct": 1, "incorrect": 1},
    "references": ["correct"],
    "explained": "explained.html",
    "warnings": ["w"],
}
_STATE = {"exp_avg": torch.ones(2), "exp_avg_sq": torch.ones(2), "step": torch.tensor(3.0)}


def _table(path: Path) -> Callable[[], Any]:
    def call() -> None:
        table = ScoreTable.load(path)
        select(table, "low_benefit", fraction=0.5)

    return call


def _report(path: Path) -> Callable[[], Any]:
    return lambda: write_report(load_results(path), path.parent / "report.html")


def _written(name: str, body: bytes, read: Callable[[Path], Callable[[], Any]]) -> Case:
    def make(folder: Path) -> Callable[[], Any]:
        path = folder / name.split("/")[-1]
        path.write_bytes(body)
        return read(path)

    return Case(name, make)


def cases(rng: random.Random, shared: Path) -> Iterator[Case]:
    """Yield every case of the room."""
    yield from _tables(rng, shared)
    yield from _results(rng)
    yield from _states()
    yield from _pruned(rng)
    for name, read in (("s.csv", _table), ("s.parquet", _table), ("results.json", _report)):
        yield from (Case(f"{name}: {case.name}", case.make) for case in no_files(name, read))


def _tables(rng: random.Random, shared: Path) -> Iterator[Case]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    good = pa.table({"id": ["a", "b"], "s_correct": [0.1, 0.2], "s_incorrect": [1.0, 2.0]})
    pq.write_table(good, shared / "s.parquet")
    body, text = (shared / "s.parquet").read_bytes(), b"id,s_correct,s_incorrect\na,0.1,1\nb,0.2,2\n"
    for number in range(20):
        yield _written(f"table/damaged {number}/s.parquet", damaged(rng, body), _table)
        yield _written(f"table/damaged {number}/s.csv", damaged(rng, text), _table)
    for name, content in {
        "empty": b"",
        "noise": noise(rng, 500),
        "header": b"id,s_correct\n",
        "twice": b"id,s_correct,s_correct\na,1,2\n",
        "ids": b"id,s_correct\na,1\na,2\n",
        "words": b"id,s_correct\na,x\n",
        "digits": b"id,s_correct\na," + DIGITS.encode() + b"\n",
        "dates": b"id,s_correct\na,2024-01-01\n",
        "blank": b"id,s_correct\n,1\n",
        "nan": b"id,s_correct\na,nan\n",
        "two ids": b"id,id,s_correct\na,b,1\n",
        "utf": b"id,s_correct\n\xff,1\n",
        "wide": b"id" + b",x" * 9999 + b"\n",
        "open": b'id,s_correct\n"a,1\n',
    }.items():
        yield _written(f"table/{name}/s.csv", content, _table)
        yield _written(f"table/{name}/s.parquet", content, _table)
    for name, array in _arrays().items():
        if name in ("timestamp", "union", "half", "fixed", "repeated fields", "duration"):
            continue
        for place in ("id", "s_correct", "further"):
            columns = {"id": pa.array(["a"]), "s_correct": pa.array([1.0]), place: array}

            def make(folder: Path, columns: Any = columns) -> Callable[[], Any]:
                pq.write_table(pa.table(columns), folder / "s.parquet")
                return _table(folder / "s.parquet")

            yield Case(f"table/{name}/{place}", make)
    for how in (
        {"fraction": "x"},
        {"fraction": 5},
        {"count": 1.5},
        {"fraction": 0.5, "groups": 5},
        {"fraction": 0.5, "clusters": 5},
        {"fraction": 0.5, "groups": ["a"]},
        {"fraction": float("nan")},
        {"fraction": 0.5, "clusters": ["x", "y"]},
        {"fraction": 0.5, "seed": -1},
        {"fraction": 0.5, "exclude": 5},
    ):
        yield Case(
            f"select/{how}",
            lambda folder, how=how: (
                lambda: select(ScoreTable(["a", "b"], {"s_correct": np.ones(2)}), "low_benefit", **how)
            ),
        )


def _results(rng: random.Random) -> Iterator[Case]:
    for key in _RESULTS:
        for number in rng.sample(range(len(ODD)), 6):
            body = dumped(_RESULTS | {key: ODD[number]}).encode("utf-8", "surrogatepass")
            yield _written(f"results/{key}/{number}/results.json", body, _report)
    for key, part in _RESULTS.items():
        row = part[0] if isinstance(part, list) and part else part
        for name in row if isinstance(row, dict) else ():
            for number in rng.sample(range(len(ODD)), 3):
                changed = row | {name: ODD[number]}
                whole = _RESULTS | {key: [changed, *part[1:]] if isinstance(part, list) else changed}
                yield _written(
                    f"results/{key}.{name}/{number}/results.json",
                    dumped(whole).encode("utf-8", "surrogatepass"),
                    _report,
                )
    for number, value in enumerate(ODD):
        yield _written(f"results/whole {number}/results.json", dumped(value).encode("utf-8", "surrogatepass"), _report)
    for name, body in {
        "empty": b"",
        "deep": b"[" * DEEP,
        "noise": noise(rng, 300),
        "utf16": json.dumps(_RESULTS).encode("utf-16"),
    }.items():
        yield _written(f"results/{name}/results.json", body, _report)


def _states() -> Iterator[Case]:
    def make_state(loaded: Any, names: str = '["a"]') -> Callable[[Path], Callable[[], Any]]:
        def make(folder: Path) -> Callable[[], Any]:
            torch.save(loaded, folder / "optimizer.pt")
            (folder / "names.json").write_text(names)
            return lambda: {name: state.unbiased for name, state in named_adam(folder, folder / "names.json").items()}

        return make

    group = {"params": [0], "betas": (0.9, 0.999)}
    for name, value in tensors().items():
        if name not in ("expanded", "huge meta"):
            yield Case(f"state/{name}", make_state(value))
            yield Case(
                f"state/moment {name}",
                make_state({"state": {0: _STATE | {"exp_avg_sq": value}}, "param_groups": [group]}),
            )
            yield Case(
                f"state/step {name}", make_state({"state": {0: _STATE | {"step": value}}, "param_groups": [group]})
            )
    for number, value in enumerate(ODD[:40]):
        yield Case(f"state/group {number}", make_state({"state": {0: _STATE}, "param_groups": value}))
        yield Case(
            f"state/betas {number}", make_state({"state": {0: _STATE}, "param_groups": [group | {"betas": value}]})
        )
        yield Case(f"state/states {number}", make_state({"state": value, "param_groups": [group]}))
    for number, value in enumerate(ODD):
        if number != 25:
            text = dumped(value).encode("utf-8", "replace").decode()
            yield Case(f"state/names {number}", make_state({"state": {0: _STATE}, "param_groups": [group]}, text))


def _pruned(rng: random.Random) -> Iterator[Case]:
    for column in good_row("openr1"):
        for number in rng.sample(range(len(ODD)), 6):
            rows = [good_row("openr1", 0), good_row("openr1", 1) | {column: ODD[number]}]
            body = "".join(dumped(row) + "\n" for row in rows).encode("utf-8", "surrogatepass")
            for suffix in (".jsonl", ".csv", ".parquet", ".arrow"):

                def make(folder: Path, body: bytes = body, suffix: str = suffix) -> Callable[[], Any]:
                    (folder / "a.jsonl").write_bytes(body)
                    kept = [Example(id=f"r{i}", prompt="p", completion="c", row=i, trace=0) for i in range(2)]
                    return lambda: save_examples(kept, folder / f"kept{suffix}", load_rows(folder / "a.jsonl"))

                yield Case(f"pruned/{column}/{number}{suffix}", make)
