"""The arithmetic behind the report: accuracy over seeds, the sentence at the top, the traces worth reading.

Everything here takes the plain `results` dictionary described in `influence_fast.report.page` and returns plain
values; nothing draws and nothing writes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from influence_fast.errors import DataError
from influence_fast.selection.strategies import STRATEGIES, reads_influence

Row = Mapping[str, Any]

# Two-sided 97.5 % quantiles of Student's t for 1..9 degrees of freedom, where the expansion below is too coarse.
_T975 = (12.706205, 4.302653, 3.182446, 2.776445, 2.570582, 2.446912, 2.364624, 2.306004, 2.262157)
_Z975 = 1.959964


def number(value: Any) -> float:
    """`value` as a float; None, booleans and anything that is not a number become NaN."""
    if value is None or isinstance(value, bool | str):
        return math.nan
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def t_quantile(degrees: int) -> float:
    """97.5 % quantile of Student's t; above nine degrees by the Cornish-Fisher expansion (error < 5e-5)."""
    if degrees < 1:
        return math.nan
    if degrees <= len(_T975):
        return _T975[degrees - 1]
    z, n = _Z975, float(degrees)
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    fourth = (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160
    return z + first / n + second / n**2 + third / n**3 + fourth / n**4


@dataclass(frozen=True, slots=True)
class Setting:
    """One (strategy, fraction) with its seeds put together.

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
        """How many of the seeds have a finite accuracy."""
        return sum(math.isfinite(a) for a in self.accuracies)

    @property
    def kind(self) -> str:
        """`influence`, `random`, `full` or `baseline`: decides the colour."""
        if self.strategy in ("random", "full"):
            return self.strategy
        known = self.strategy in STRATEGIES  # results may be of a strategy that was registered elsewhere
        return "influence" if known and reads_influence(self.strategy) else "baseline"


def _mean(values: Iterable[Any]) -> float:
    finite = [v for v in map(number, values) if math.isfinite(v)]
    return float(np.mean(finite)) if finite else math.nan


def interval(cells: Sequence[Row]) -> tuple[float, float, float]:
    """Mean accuracy of one setting over its seeds, and a 95 % interval, in 0..1.

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
    """Cells grouped by (strategy, fraction), fractions rounded to 1e-6, in order of first appearance.

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
    """What several answers a question give beside the accuracy: {"maj@8": share, "pass@4": estimate}."""
    found = {}
    if row.get("majority") is not None:
        found[f"maj@{row['samples']}" if row.get("samples") else "maj"] = number(row["majority"])
    for estimate in row.get("pass_at") or []:
        found[f"pass@{estimate['k']}"] = number(estimate["value"])
    return found


# --- words -------------------------------------------------------------------------------------------------

NBSP = "\u00a0"


def percent(value: Any, digits: int = 1) -> str:
    """0.612 -> `61.2 %` (no-break space); `n/a` when not finite."""
    x = number(value)
    return f"{100 * x:.{digits}f}{NBSP}%".replace("-", "−") if math.isfinite(x) else "n/a"


def fraction_name(value: Any) -> str:
    """0.1 -> `10 %`, with no digits that carry nothing."""
    x = number(value)
    return f"{round(100 * x, 4):g}{NBSP}%" if math.isfinite(x) else "n/a"


def between(low: Any, high: Any, digits: int = 1) -> str:
    """`58.0 to 64.3 %`, or `n/a` unless both ends are finite."""
    a, b = number(low), number(high)
    if not (math.isfinite(a) and math.isfinite(b)):
        return "n/a"
    return f"{100 * a:.{digits}f} to {100 * b:.{digits}f}{NBSP}%".replace("-", "−")


def count(value: Any) -> str:
    """Thousands separated; one decimal only where a mean of counts is not whole; `n/a` when not finite."""
    x = number(value)
    if not math.isfinite(x):
        return "n/a"
    return f"{x:,.0f}" if abs(x - round(x)) < 1e-9 else f"{x:,.1f}"


def verdict(low: float, high: float, other_low: float, other_high: float) -> str:
    """How one interval stands to another: `above`, `below`, `within noise of`, or `not comparable with`."""
    if not all(map(math.isfinite, (low, high, other_low, other_high))):
        return "not comparable with"
    if low > other_high:
        return "above"
    return "below" if high < other_low else "within noise of"


@dataclass(frozen=True, slots=True)
class Headline:
    """What was asked and what was found, and the few figures worth a large type."""

    asked: str
    found: str
    tiles: list[tuple[str, str, str]] = field(default_factory=list)  # (name, figure, note)


def best_setting(settings: Sequence[Setting]) -> Setting | None:
    """Highest mean accuracy among the strategies other than `full` and `random`; the first one on a tie."""
    tried = [s for s in settings if s.kind not in ("full", "random") and math.isfinite(s.mean)]
    return max(tried, key=lambda s: s.mean, default=None)


def _against(best: Setting, other: Setting, name: str, comparisons: Sequence[Row]) -> str:
    """`above random at 10 % (54.0 %, 50.1 to 57.9 %)`, by a paired comparison where the results hold one."""
    figures = f"{percent(other.mean)}, {between(other.low, other.high)}"
    for c in comparisons:
        same = c.get("strategy") == best.strategy and c.get("against") == other.strategy
        if same and abs(number(c.get("fraction")) - best.fraction) < 1e-6:
            word = verdict(number(c.get("low")), number(c.get("high")), 0.0, 0.0)
            return f"{word} {name} ({figures}; paired difference)"
    return f"{verdict(best.low, best.high, other.low, other.high)} {name} ({figures})"


def headline(results: Row, settings: Sequence[Setting]) -> Headline:
    """Two plain sentences and up to five figures, from the numbers alone.

    A difference is named only where the two 95 % intervals are apart (or, where `comparisons` holds the pair, where
    the interval of the paired difference leaves out zero); otherwise the sentence says `within noise of`.
    """
    pool = number((results.get("data") or {}).get("pool"))
    traces = f"the {count(pool)} training traces" if math.isfinite(pool) else "the training traces"
    base = results.get("accuracy_before") or {}
    comparisons = results.get("comparisons") or []
    full = next((s for s in settings if s.kind == "full"), None)
    best = best_setting(settings)
    tiles: list[tuple[str, str, str]] = []
    if base:
        tiles.append(
            (str(base.get("name", "before")), percent(base.get("accuracy")), between(base.get("low"), base.get("high")))
        )
    if full is not None:
        tiles.append(("all data", percent(full.mean), between(full.low, full.high)))

    if best is None:
        return Headline(
            f"Which of {traces} help the model's reasoning, and which harm it?",
            _found_without_cells(results, full),
            tiles,
        )

    asked = (
        f"Does dropping some of {traces} by their scores give a more accurate model than dropping as many at random, "
        "or none?"
    )
    random = next((s for s in settings if s.kind == "random" and s.fraction == best.fraction), None)
    tried = sum(s.kind not in ("full", "random") for s in settings)
    found = f"The best of {tried} settings" if tried > 1 else "The setting tried"
    found += f", {best.strategy} at {fraction_name(best.fraction)}, reached {percent(best.mean)} accuracy"
    if math.isfinite(best.low) and math.isfinite(best.high):
        found += f" (95{NBSP}% interval {between(best.low, best.high)})"
    against = []
    if random is not None:
        against.append(_against(best, random, f"random at {fraction_name(best.fraction)}", comparisons))
        tiles.append(
            (
                f"random, {fraction_name(random.fraction)} dropped",
                percent(random.mean),
                between(random.low, random.high),
            )
        )
    if full is not None:
        against.append(_against(best, full, "all data", comparisons))
    if against:
        found += ": " + " and ".join(against)
    tiles.append(
        (f"{best.strategy}, {fraction_name(best.fraction)} dropped", percent(best.mean), between(best.low, best.high))
    )
    if math.isfinite(best.harmful_dropped) and math.isfinite(best.harmful_total):
        chance = f"; chance: {count(best.by_chance)}" if math.isfinite(best.by_chance) else ""
        tiles.append(
            (
                f"harmful traces dropped by {best.strategy}, {fraction_name(best.fraction)}",
                count(best.harmful_dropped),
                f"of {count(best.harmful_total)}{chance}",
            )
        )
    return Headline(asked, found + ".", tiles)


def _found_without_cells(results: Row, full: Setting | None) -> str:
    detection = [d for d in results.get("detection") or [] if math.isfinite(number(d.get("auc")))]
    if detection:
        top = max(detection, key=lambda d: number(d["auc"]))
        low, high = number(top.get("low")), number(top.get("high"))
        span = f" (95{NBSP}% interval {low:.3f} to {high:.3f})" if math.isfinite(low) and math.isfinite(high) else ""
        # Below 0.5 the score ranks the harmful traces last: say what is seen, without a direction that is not there.
        sure = math.isfinite(low) and math.isfinite(high) and (low > 0.5 or high < 0.5)
        ending = "where 0.5 is chance" if sure else "which is within noise of chance (0.5)"
        auc = f"an AUC of {number(top['auc']):.3f}{span}, {ending}"
        return f"Ranking by {top['method']} finds the known harmful traces with {auc}."
    scores = len(results.get("scores") or [])
    if scores:
        return (
            f"{scores:,} traces were scored; nothing was pruned and evaluated in this run, so no accuracy is claimed."
        )
    if full is not None and math.isfinite(full.mean):
        return (
            f"Fine-tuned on all data the model reached {percent(full.mean)} accuracy ({between(full.low, full.high)})."
        )
    return "This run holds no accuracies and no scores, so there is nothing to claim."


# --- traces ------------------------------------------------------------------------------------------------


def score_arrays(scores: Sequence[Row]) -> tuple[np.ndarray, np.ndarray]:
    """`s_correct` and `s_incorrect` as float64 arrays (N,), NaN where missing."""
    return (
        np.array([number(s.get("s_correct")) for s in scores], dtype=np.float64),
        np.array([number(s.get("s_incorrect")) for s in scores], dtype=np.float64),
    )


def _ranks(values: np.ndarray) -> np.ndarray:
    """Mid-ranks in 0..1 of the finite values (ties share their mean); NaN elsewhere, all zeros if nothing is finite."""
    if not np.isfinite(values).any():
        return np.zeros(len(values))
    ranks = np.full(len(values), np.nan)
    finite = np.isfinite(values)
    _, inverse, sizes = np.unique(values[finite], return_inverse=True, return_counts=True)
    ends = np.cumsum(sizes)
    ranks[finite] = ((ends - sizes + ends) / 2 / ends[-1])[inverse]
    return ranks


def balance(scores: Sequence[Row]) -> np.ndarray:
    """rank(s_correct) - rank(s_incorrect) in -1..1 (N,): high helps, low harms; NaN where a score is not finite.

    Where one of the two scores is finite for no trace at all, the order is the other's alone.

    The order of the `combined` strategy. By rank and not by value: traces with large gradients have large scores
    of both kinds, and would lead both lists.
    """
    s_correct, s_incorrect = score_arrays(scores)
    neither = ~np.isfinite(s_correct) & ~np.isfinite(s_incorrect)
    return np.where(neither, np.nan, _ranks(s_correct) - _ranks(s_incorrect))


def extremes(scores: Sequence[Row], each: int) -> tuple[list[int], list[int]]:
    """Indices of the `each` most helpful and most harmful traces, most extreme first, never the same trace twice."""
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
    agreement = results.get("rank_agreement")
    if agreement:
        methods, matrix = agreement.get("methods") or [], agreement.get("spearman") or []
        if len(matrix) != len(methods) or any(len(line) != len(methods) for line in matrix):
            raise DataError(
                f"results['rank_agreement']['spearman'] must be {len(methods)} x {len(methods)}, "
                "one row and one column for each of 'methods'"
            )
