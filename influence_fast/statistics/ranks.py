"""Ranks, and what is measured by them: AUC and Spearman's correlation."""

from __future__ import annotations

import numpy as np

# Numbers of one chunk of bootstrap ranks.
_CHUNK = 1 << 25


def average_ranks(values: np.ndarray) -> np.ndarray:
    """Return ranks from 1 (lowest) [n]; equal values share the mean of their ranks."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return ((last - counts + 1 + last) / 2)[inverse]


def auc(scores: np.ndarray, positive: np.ndarray) -> float:
    """Return the probability that a random positive example scores above a random negative one (ties count half)."""
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
    """Return the 95 % percentile bootstrap interval of `auc` over examples."""
    values = []
    for _ in range(samples):
        drawn = rng.integers(0, len(scores), len(scores))
        values.append(auc(scores[drawn], positive[drawn]))
    low, high = np.nanpercentile(values, [2.5, 97.5])
    return float(low), float(high)


def spearman(one: np.ndarray, other: np.ndarray) -> float:
    """Return the rank correlation of two arrays [n]; NaN where one side is constant."""
    a, b = average_ranks(one), average_ranks(other)
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan")
    return float(np.corrcoef(a, b)[0, 1])


def mid_ranks(values: np.ndarray) -> np.ndarray:
    """Return mid-ranks in 0..1 of the finite values [n]; NaN elsewhere, all zeros if nothing is finite.

    Ties share their mean.
    """
    if not np.isfinite(values).any():
        return np.zeros(len(values))
    ranks = np.full(len(values), np.nan)
    finite = np.isfinite(values)
    ranks[finite] = (average_ranks(values[finite]) - 0.5) / finite.sum()
    return ranks


def pairwise_signs(values: np.ndarray) -> np.ndarray:
    """Return the signs of value i - value j, [Q, S, S], of values [S, Q]; weighted sums over j give centred ranks."""
    columns = values.T
    return np.sign(columns[:, :, None] - columns[:, None, :]).astype(np.float32)


def weighted_spearman(one: np.ndarray, other: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return the mean over queries of Spearman's correlation when item i counts counts[b, i] times, [B].

    one, other: `pairwise_signs` of two tables, [Q, S, S]. counts: [B, S].
    """
    queries, size, _ = one.shape
    step = max(1, _CHUNK // (queries * size))
    out = []
    for start in range(0, len(counts), step):
        weights = counts[start : start + step].astype(np.float32)
        a, b = one @ weights.T, other @ weights.T  # [Q, S, B] centred ranks, doubled
        w = weights.T[None]
        covariance = (w * a * b).sum(axis=1)
        spread = np.sqrt((w * a * a).sum(axis=1) * (w * b * b).sum(axis=1))
        out.append(np.divide(covariance, spread, out=np.zeros_like(spread), where=spread > 0).mean(axis=0))
    return np.concatenate(out).astype(np.float64)
