"""Statistics of a grid of runs: two-level intervals, paired tests against the baselines, Holm's correction.

The answers of one setting form a table x [S, N]: seeds (training runs) by test questions, in 0..1. Every seed answers
the same questions, so seeds and questions are crossed, and a bootstrap draw resamples both, each by itself, and takes
one draw of questions for all seeds (the pigeonhole bootstrap; Owen, Annals of Applied Statistics 2007):

    mean* = sum_s sum_i u_s v_i x_si / (S N)        u, v: how often each seed and each question was drawn

Resampling S seeds gives only (S - 1) / S of their variance, half of it for two seeds; the seeds' means are therefore
first moved away from the grand mean by sqrt(S / (S - 1)) (Rao and Wu, JASA 1988). With one seed the interval is over
questions alone: it says nothing about other training runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from influence_fast.errors import DataError, listing
from influence_fast.evaluation.intervals import wilson_interval

DRAWS = 10_000
BASELINES = ("random", "full")
_CHUNK = 512  # draws at a time: 5 MB of weights for 1,319 questions


@dataclass(frozen=True, slots=True)
class Answers:
    """The answers of one setting: `correct` [S, N] float64 in 0..1, rows as in `seeds`, columns as in `questions`."""

    seeds: tuple[int, ...]
    questions: tuple[str, ...]
    correct: np.ndarray

    def of(self, seeds: Sequence[int]) -> np.ndarray:
        """Return the rows of the given seeds, [len(seeds), N]."""
        return self.correct[[self.seeds.index(seed) for seed in seeds]]


def grid_statistics(
    cells: Sequence[Mapping[str, Any]],
    correct: Sequence[Mapping[str, float]],
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> dict[str, list[dict[str, Any]]]:
    """Compute means, intervals and paired tests of a grid, as the report's `settings` and `comparisons`.

    Args:
        cells: one run each: "strategy", "fraction", "seed"; "low" and "high" are used where a setting has one seed.
        correct: for each cell, question id -> share of its answers that were right (0..1).
        draws: bootstrap draws and sign flips.
        seed: of the resampling; the same seed gives the same numbers.

    Returns:
        "settings": {"strategy", "fraction", "accuracy", "low", "high", "seeds", "questions"}, one a setting; 95 %.
        "comparisons": each strategy against `random` at its fraction and against `full`, where these were run:
        {"strategy", "fraction", "against", "difference", "low", "high", "effect", "effect_low", "effect_high", "p",
        "p_adjusted", "seeds", "questions"}. `effect` is Cohen's h (Cohen 1988): 2 asin sqrt(a) - 2 asin sqrt(b).
        Runs are paired by seed and question. `p` is that of `sign_flip_test` on the questions' differences averaged
        over the seeds; with several seeds it is at least the two-level bootstrap's, so that neither lucky questions
        nor lucky seeds alone make a small one. `p_adjusted` is Holm's over all comparisons of the grid.

    Raises DataError where two cells were asked different questions, or a cell comes twice.
    """
    answers = _collect(cells, correct)
    own = {(str(c["strategy"]), float(c["fraction"]), int(c["seed"])): c for c in cells}
    settings = []
    for (strategy, fraction), a in answers.items():
        if len(a.seeds) == 1 and own[strategy, fraction, a.seeds[0]].get("low") is not None:
            cell = own[strategy, fraction, a.seeds[0]]
            low, high = float(cell["low"]), float(cell["high"])
        else:
            low, high = two_level_interval(a.correct, draws=draws, seed=seed)
        settings.append(
            {
                "strategy": strategy,
                "fraction": fraction,
                "accuracy": float(a.correct.mean()),
                "low": low,
                "high": high,
                "seeds": len(a.seeds),
                "questions": len(a.questions),
            }
        )
    comparisons = []
    for (strategy, fraction), a in answers.items():
        if strategy in BASELINES:
            continue
        for against, at in (("random", fraction), ("full", 0.0)):
            b = answers.get((against, at))
            seeds = [s for s in a.seeds if b is not None and s in b.seeds]
            if b is None or not seeds:
                continue
            found = compare(a.of(seeds), b.of(seeds), draws=draws, seed=seed)
            comparisons.append({"strategy": strategy, "fraction": fraction, "against": against} | found)
    adjusted = holm(np.array([c["p"] for c in comparisons], np.float64))
    for comparison, p in zip(comparisons, adjusted, strict=True):
        comparison["p_adjusted"] = float(p)
    return {"settings": settings, "comparisons": comparisons}


def compare(first: np.ndarray, second: np.ndarray, *, draws: int = DRAWS, seed: int = 0) -> dict[str, Any]:
    """Compare `first` with `second`, both [S, N], over the same seeds and questions; `grid_statistics` has the keys."""
    if first.shape != second.shape or first.ndim != 2 or first.size == 0:
        raise DataError(f"answers of shapes {first.shape} and {second.shape} cannot be paired: both must be [S, N]")
    tables = np.stack([first, second]).astype(np.float64)  # [2, S, N]
    means = two_level_means(tables, draws=draws, seed=seed)  # [2, draws]
    difference = float(tables[0].mean() - tables[1].mean())
    shifts = means[0] - means[1]
    effects = _arcsine(means[0]) - _arcsine(means[1])
    low, high = np.quantile(shifts, [0.025, 0.975])
    effect_low, effect_high = np.quantile(effects, [0.025, 0.975])
    p = sign_flip_test((tables[0] - tables[1]).mean(axis=0), draws=draws, seed=seed)
    if len(first) > 1:
        # the bootstrap's distribution, moved to the null hypothesis (Efron and Tibshirani 1993, 16.4)
        beyond = np.count_nonzero(np.abs(shifts - difference) >= abs(difference) - _tolerance(tables))
        p = max(p, float(1 + beyond) / (1 + draws))
    return {
        "difference": difference,
        "low": float(low),
        "high": float(high),
        "effect": float(_arcsine(tables[0].mean()) - _arcsine(tables[1].mean())),
        "effect_low": float(effect_low),
        "effect_high": float(effect_high),
        "p": p,
        "seeds": first.shape[0],
        "questions": first.shape[1],
    }


def two_level_interval(correct: np.ndarray, *, draws: int = DRAWS, seed: int = 0) -> tuple[float, float]:
    """Return the 95 % percentile interval of the mean of `correct` [S, N] over seeds (where S > 1) and questions.

    Where all answers are the same, a bootstrap has nothing to vary, and Wilson's interval over the questions is
    returned.
    """
    if np.ptp(correct) == 0:
        n = correct.shape[1]
        return wilson_interval(round(float(correct.flat[0]) * n), n)
    low, high = np.quantile(two_level_means(correct[None], draws=draws, seed=seed)[0], [0.025, 0.975])
    return float(np.clip(low, 0, 1)), float(np.clip(high, 0, 1))


def two_level_means(tables: np.ndarray, *, draws: int = DRAWS, seed: int = 0) -> np.ndarray:
    """Return bootstrapped means [K, draws] of K tables [K, S, N], which share their draws and so stay paired."""
    k, seeds, questions = tables.shape
    by_seed = tables.mean(axis=2, keepdims=True)
    if seeds > 1:
        tables = tables + (np.sqrt(seeds / (seeds - 1)) - 1) * (by_seed - by_seed.mean(axis=1, keepdims=True))
    rng = np.random.default_rng(seed)
    means = np.empty((k, draws))
    for start in range(0, draws, _CHUNK):
        size = min(_CHUNK, draws - start)
        u, v = _counts(rng, size, seeds), _counts(rng, size, questions)
        # tables @ v first: [K, S, size], then one weighted sum over the seeds
        means[:, start : start + size] = np.einsum("ksb,bs->kb", tables @ v.T, u) / (seeds * questions)
    return means


def sign_flip_test(differences: np.ndarray, *, draws: int = DRAWS, seed: int = 0) -> float:
    """Return the two-sided p of paired `differences` [N] under the null hypothesis that either sign is as likely.

    The sign-flip (paired permutation) test of Fisher (1935); for the right-or-wrong answers of one seed it is McNemar's
    exact test. All 2^n flips of the n differences that are not zero where these are at most `draws`, else `draws`
    random ones and p = (1 + as extreme) / (1 + draws), which is never zero (Phipson and Smyth 2010).
    """
    d = np.asarray(differences, np.float64)
    d = d[d != 0]
    if len(d) == 0:
        return 1.0
    threshold = abs(d.sum()) - _tolerance(d)
    if 2 ** len(d) <= draws:
        signs = 1.0 - 2.0 * ((np.arange(2 ** len(d))[:, None] >> np.arange(len(d))) & 1)
        return float(np.mean(np.abs(signs @ d) >= threshold))
    rng = np.random.default_rng(seed)
    beyond = 0.0
    for start in range(0, draws, _CHUNK):
        signs = 1.0 - 2.0 * rng.integers(0, 2, (min(_CHUNK, draws - start), len(d)), dtype=np.int8)
        beyond += float(np.count_nonzero(np.abs(signs @ d) >= threshold))
    return (1 + beyond) / (1 + draws)


def holm(p: Sequence[float] | np.ndarray) -> np.ndarray:
    """Return p-values [m] adjusted so that the chance of one false claim among all m is kept (Holm 1979)."""
    values = np.asarray(p, np.float64)
    order = np.argsort(values, kind="stable")
    steps = values[order] * np.arange(len(values), 0, -1)
    adjusted = np.empty_like(values)
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return adjusted


def _collect(
    cells: Sequence[Mapping[str, Any]], correct: Sequence[Mapping[str, float]]
) -> dict[tuple[str, float], Answers]:
    rows: dict[tuple[str, float], dict[int, Mapping[str, float]]] = {}
    questions: tuple[str, ...] = tuple(correct[0]) if correct else ()
    for cell, answers in zip(cells, correct, strict=True):
        odd = sorted(set(answers) ^ set(questions))
        if odd or not questions:
            raise DataError(
                f"{cell['strategy']} at {cell['fraction']}, seed {cell['seed']}: other questions than the first run "
                f"({listing(odd) or 'none at all'}): evaluate all runs of a grid on the same test questions"
            )
        seeds = rows.setdefault((str(cell["strategy"]), float(cell["fraction"])), {})
        if int(cell["seed"]) in seeds:
            raise DataError(f"{cell['strategy']} at {cell['fraction']}: seed {cell['seed']} comes twice")
        seeds[int(cell["seed"])] = answers
    return {
        key: Answers(
            tuple(seeds),
            questions,
            np.array([[a[q] for q in questions] for a in seeds.values()], np.float64),
        )
        for key, seeds in rows.items()
    }


def _counts(rng: np.random.Generator, draws: int, size: int) -> np.ndarray:
    """Return how often each of `size` things is drawn in `size` draws with replacement, [draws, size] float64."""
    picked = rng.integers(0, size, (draws, size)) + size * np.arange(draws)[:, None]
    return np.bincount(picked.ravel(), minlength=draws * size).reshape(draws, size).astype(np.float64)


def _arcsine(share: Any) -> Any:
    return 2 * np.arcsin(np.sqrt(np.clip(share, 0.0, 1.0)))


def _tolerance(values: np.ndarray) -> float:
    """Return a bound above the rounding by which sums that are equal on paper differ, and far below one answer."""
    return 1e-12 * (1.0 + float(np.abs(values).sum()))
