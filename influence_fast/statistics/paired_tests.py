"""Tests of paired differences, and the correction of their p-values for many comparisons."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from influence_fast.errors import DataError
from influence_fast.statistics.two_level import DRAWS, DRAWS_AT_A_TIME, two_level_means


def sign_flip_test(differences: np.ndarray, *, draws: int = DRAWS, seed: int = 0) -> float:
    """Return the two-sided p of paired `differences` [N].

    The null hypothesis is that each is as likely with either sign.

    The sign-flip (paired permutation) test of Fisher (1935); for the right-or-wrong answers of one seed it is McNemar's
    exact test. All 2^n flips of the n differences that are not zero where these are at most `draws`, else `draws`
    random ones and p = (1 + as extreme) / (1 + draws), which is never zero (Phipson and Smyth 2010).
    """
    d = np.asarray(differences, np.float64)
    d = d[d != 0]
    if len(d) == 0:
        return 1.0
    threshold = abs(d.sum()) - tolerance(d)
    if 2 ** len(d) <= draws:
        signs = 1.0 - 2.0 * ((np.arange(2 ** len(d))[:, None] >> np.arange(len(d))) & 1)
        return float(np.mean(np.abs(signs @ d) >= threshold))
    rng = np.random.default_rng(seed)
    beyond = 0.0
    for start in range(0, draws, DRAWS_AT_A_TIME):
        signs = 1.0 - 2.0 * rng.integers(0, 2, (min(DRAWS_AT_A_TIME, draws - start), len(d)), dtype=np.int8)
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


def tolerance(values: np.ndarray) -> float:
    """Return a bound above the rounding of sums that are equal on paper, and far below one answer."""
    return 1e-12 * (1.0 + float(np.abs(values).sum()))


def compare(first: np.ndarray, second: np.ndarray, *, draws: int = DRAWS, seed: int = 0) -> dict[str, Any]:
    """Compare `first` with `second`, both [S, N] over the same seeds and questions.

    Returns the keys that `report.grid_statistics` documents for its comparisons.
    """
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
        beyond = np.count_nonzero(np.abs(shifts - difference) >= abs(difference) - tolerance(tables))
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


def _arcsine(share: Any) -> Any:
    return 2 * np.arcsin(np.sqrt(np.clip(share, 0.0, 1.0)))
