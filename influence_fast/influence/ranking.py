"""Ranks, and what is measured by them: AUC and Spearman's correlation."""

from __future__ import annotations

import numpy as np


def average_ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1 (lowest); equal values share the mean of their ranks."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return ((last - counts + 1 + last) / 2)[inverse]


def auc(scores: np.ndarray, positive: np.ndarray) -> float:
    """Probability that a random positive example scores above a random negative one (ties count half)."""
    n_positive = int(positive.sum())
    n_negative = len(positive) - n_positive
    if n_positive == 0 or n_negative == 0:
        return float("nan")
    return float(
        (average_ranks(scores)[positive].sum() - n_positive * (n_positive + 1) / 2) / (n_positive * n_negative)
    )


def bootstrap_auc(
    scores: np.ndarray, positive: np.ndarray, rng: np.random.Generator, samples: int = 500
) -> tuple[float, float]:
    """95 % percentile bootstrap interval of `auc` over examples."""
    values = []
    for _ in range(samples):
        drawn = rng.integers(0, len(scores), len(scores))
        values.append(auc(scores[drawn], positive[drawn]))
    low, high = np.nanpercentile(values, [2.5, 97.5])
    return float(low), float(high)


def spearman(one: np.ndarray, other: np.ndarray) -> float:
    """Rank correlation; NaN where one side is constant."""
    a, b = average_ranks(one), average_ranks(other)
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan")
    return float(np.corrcoef(a, b)[0, 1])
