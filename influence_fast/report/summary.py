"""The arithmetic behind the report: accuracy over seeds, the best setting, the traces worth reading.

Everything here takes the plain `results` dictionary described in `influence_fast.report.page` and returns plain
values; nothing draws and nothing writes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from influence_fast.errors import DataError
from influence_fast.selection.strategies import STRATEGIES, reads_influence
from influence_fast.statistics.intervals import t_quantile
from influence_fast.statistics.ranks import average_ranks, mid_ranks

Row = Mapping[str, Any]


def number(value: Any) -> float:
    """Return `value` as a float; None, booleans and anything that is not a number become NaN."""
    if value is None or isinstance(value, bool | str):
        return math.nan
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def jsonable(value: Any) -> Any:
    """Return `value` as strict JSON has it: numpy and torch values as numbers, NaN and infinities as null."""
    if isinstance(value, Mapping):
        return {str(k): jsonable(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [jsonable(v) for v in value]
    if hasattr(value, "tolist"):
        return jsonable(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    return str(value)


@dataclass(frozen=True, slots=True)
class Setting:
    """One (strategy, fraction) aggregated over its seeds.

    `mean` is the mean accuracy over the seeds with a finite accuracy (NaN if there is none), `low`/`high` its
    95 % interval, both in 0..1. `harmful_dropped`, `harmful_total`, `by_chance`, `kept`, `dropped` and `seconds`
    are means over the seeds that state them, else NaN.
    """

    strategy: str
    fraction: float
    accuracies: tuple[float, ...]
    mean: float
    low: float
    high: float
    questions: int
    further: dict[str, float]
    kept: float
    dropped: float
    harmful_dropped: float
    harmful_total: float
    by_chance: float
    seconds: float

    @property
    def seeds(self) -> int:
        return len(self.accuracies)

    @property
    def finished(self) -> int:
        """Return how many of the seeds have a finite accuracy."""
        return sum(math.isfinite(a) for a in self.accuracies)

    @property
    def kind(self) -> str:
        """Return the kind of strategy, which decides the colour: `influence`, `random`, `full` or `baseline`."""
        if self.strategy in ("random", "full"):
            return self.strategy
        # Results may be of a strategy that was registered elsewhere.
        known = self.strategy in STRATEGIES
        return "influence" if known and reads_influence(self.strategy) else "baseline"


def _mean(values: Iterable[Any]) -> float:
    finite = [v for v in map(number, values) if math.isfinite(v)]
    return float(np.mean(finite)) if finite else math.nan


def interval(cells: Sequence[Row]) -> tuple[float, float, float]:
    """Return the mean accuracy of one setting over its seeds and a 95 % interval, in 0..1.

    One seed: the cell's own interval over test questions. n seeds: mean +- t(n-1) s / sqrt(n) over the seeds, but
    on neither side narrower than the cells' own half-width / sqrt(n): that much is left by the questions even if
    the seeds happen to agree. Seeds whose accuracy is not finite are left out. A missing interval stays NaN.
    """
    cells = [c for c in cells if math.isfinite(number(c.get("accuracy")))]
    if not cells:
        return math.nan, math.nan, math.nan
    accuracy = np.array([number(c["accuracy"]) for c in cells])
    n, mean = len(cells), float(accuracy.mean())
    below = _mean(a - number(c.get("low")) for a, c in zip(accuracy, cells, strict=True)) / math.sqrt(n)
    above = _mean(number(c.get("high")) - a for a, c in zip(accuracy, cells, strict=True)) / math.sqrt(n)
    if n > 1:
        spread = t_quantile(n - 1) * float(accuracy.std(ddof=1)) / math.sqrt(n)
        below, above = float(np.fmax(spread, below)), float(np.fmax(spread, above))
    # np.clip keeps NaN, as a missing interval has to stay one.
    return mean, float(np.clip(mean - below, 0, 1)), float(np.clip(mean + above, 0, 1))


def _setting_key(row: Row) -> tuple[str, float]:
    return str(row["strategy"]), round(number(row.get("fraction") or 0.0), 6)


def aggregate(cells: Sequence[Row], intervals: Sequence[Row] = ()) -> list[Setting]:
    """Group cells by (strategy, fraction), fractions rounded to 1e-6, in order of first appearance.

    `intervals`: the results' `settings`; a setting that is not among them gets its interval from its cells.
    """
    known = {_setting_key(row): row for row in intervals}
    groups: dict[tuple[str, float], list[Row]] = {}
    for cell in cells:
        groups.setdefault(_setting_key(cell), []).append(cell)
    settings = []
    for (strategy, fraction), group in groups.items():
        mean, low, high = interval(group)
        if (strategy, fraction) in known:
            row = known[strategy, fraction]
            low, high = number(row.get("low")), number(row.get("high"))
        questions = _mean(c.get("n") for c in group)
        further = [further_measures(cell) for cell in group]
        settings.append(
            Setting(
                strategy=strategy,
                fraction=fraction,
                accuracies=tuple(number(c.get("accuracy")) for c in group),
                mean=mean,
                low=low,
                high=high,
                questions=0 if math.isnan(questions) else round(questions),
                further={name: _mean(m.get(name) for m in further) for found in further for name in found},
                **{
                    name: _mean(c.get(key) for c in group)
                    for name, key in {
                        "kept": "kept",
                        "dropped": "dropped",
                        "harmful_dropped": "harmful_dropped",
                        "harmful_total": "harmful_total",
                        "by_chance": "expected_by_chance",
                        "seconds": "seconds",
                    }.items()
                },
            )
        )
    return settings


def further_measures(row: Row) -> dict[str, float]:
    """Return what several answers a question give beside the accuracy: {"maj@8": share, "pass@4": estimate}."""
    found = {}
    if row.get("majority") is not None:
        found[f"maj@{row['samples']}" if row.get("samples") else "maj"] = number(row["majority"])
    for estimate in row.get("pass_at") or []:
        found[f"pass@{estimate['k']}"] = number(estimate["value"])
    return found


def best_setting(settings: Sequence[Setting]) -> Setting | None:
    """Return the setting of highest mean accuracy other than `full` and `random`; the first one on a tie."""
    tried = [s for s in settings if s.kind not in ("full", "random") and math.isfinite(s.mean)]
    return max(tried, key=lambda s: s.mean, default=None)


# --- traces ------------------------------------------------------------------------------------------------


def score_arrays(scores: Sequence[Row]) -> tuple[np.ndarray, np.ndarray]:
    """Return `s_correct` and `s_incorrect` as float64 arrays (N,), NaN where missing."""
    return (
        np.array([number(s.get("s_correct")) for s in scores], dtype=np.float64),
        np.array([number(s.get("s_incorrect")) for s in scores], dtype=np.float64),
    )


def ranks_of(values: np.ndarray) -> list[float | None]:
    """Return the ranks of the finite values [N], 1 = lowest, ties averaged; None for the others."""
    finite = np.isfinite(values)
    ranks = np.full(len(values), np.nan)
    ranks[finite] = average_ranks(values[finite])
    return [float(rank) if math.isfinite(rank) else None for rank in ranks]


def balance(scores: Sequence[Row]) -> np.ndarray:
    """Return rank(s_correct) - rank(s_incorrect) in -1..1 (N,): high helps, low harms; NaN where one is not finite.

    Where one of the two scores is finite for no trace at all, the order is that of the other alone.

    This is the order of the `combined` strategy. It uses ranks and not values: traces with large gradients have large
    scores of both kinds, and would lead both lists.
    """
    s_correct, s_incorrect = score_arrays(scores)
    neither = ~np.isfinite(s_correct) & ~np.isfinite(s_incorrect)
    return np.where(neither, np.nan, mid_ranks(s_correct) - mid_ranks(s_incorrect))


def extremes(scores: Sequence[Row], each: int) -> tuple[list[int], list[int]]:
    """Return indices of the `each` most helpful and most harmful traces, most extreme first, no trace twice."""
    value = balance(scores)
    order = [int(i) for i in np.argsort(value, kind="stable") if math.isfinite(value[i])]
    each = min(each, len(order) // 2)
    return order[::-1][:each], order[:each]


def check_results(results: Any) -> None:
    """Raise `DataError` naming the part, the row and the key, if a part cannot be read as the schema says."""
    if not isinstance(results, Mapping):
        raise DataError(f"results must be a dictionary, not {type(results).__name__}: pass what the pipeline returned")
    if not results.get("title"):
        raise DataError("results have no 'title': set one, it heads the report")
    needed = {
        "cells": ("strategy", "accuracy"),
        "scores": ("id", "s_correct", "s_incorrect"),
        "detection": ("method", "auc"),
        "cost": ("stage", "seconds"),
        "comparisons": ("strategy", "fraction", "against"),
        "settings": ("strategy", "fraction", "low", "high"),
    }
    for part, keys in needed.items():
        rows = results.get(part) or []
        if not isinstance(rows, Sequence) or isinstance(rows, str):
            raise DataError(f"results[{part!r}] must be a list of rows, not {type(rows).__name__}")
        for position, row in enumerate(rows):
            missing = [k for k in keys if not isinstance(row, Mapping) or k not in row]
            if missing:
                raise DataError(
                    f"results[{part!r}][{position}] has no {missing[0]!r}: every row there needs {', '.join(keys)}"
                )
    for part in ("data", "accuracy_before", "rank_agreement", "curves", "queries"):
        if results.get(part) and not isinstance(results[part], Mapping):
            raise DataError(f"results[{part!r}] must be a mapping, not {type(results[part]).__name__}")
    for part in ("warnings", "references"):
        if results.get(part) and (isinstance(results[part], str) or not isinstance(results[part], Sequence)):
            raise DataError(f"results[{part!r}] must be a list, not {type(results[part]).__name__}")
    agreement = results.get("rank_agreement")
    if agreement:
        methods, matrix = agreement.get("methods") or [], agreement.get("spearman") or []
        if len(matrix) != len(methods) or any(len(line) != len(methods) for line in matrix):
            raise DataError(
                f"results['rank_agreement']['spearman'] must be {len(methods)} x {len(methods)}, "
                "one row and one column for each of 'methods'"
            )
