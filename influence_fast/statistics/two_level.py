"""Bootstrap means of answers by two levels, seeds and questions, which are drawn anew each by itself.

The answers form a table x [S, N]: seeds (training runs) by test questions, in 0..1. Every seed answers the same
questions, so seeds and questions are crossed, and a bootstrap draw resamples both, each by itself, and takes one draw
of questions for all seeds (the pigeonhole bootstrap; Owen, Annals of Applied Statistics 2007):

    mean* = sum_s sum_i u_s v_i x_si / (S N)        u, v: how often each seed and each question was drawn

Resampling S seeds gives only (S - 1) / S of their variance, half of it for two seeds; the seeds' means are therefore
first moved away from the grand mean by sqrt(S / (S - 1)) (Rao and Wu, JASA 1988). With one seed the interval is over
questions alone: it says nothing about other training runs.
"""

from __future__ import annotations

import numpy as np

from influence_fast.statistics.intervals import wilson_interval

DRAWS = 10_000
# 5 MB of weights for 1,319 questions.
DRAWS_AT_A_TIME = 512


def two_level_interval(correct: np.ndarray, *, draws: int = DRAWS, seed: int = 0) -> tuple[float, float]:
    """Return the 95 % percentile interval of the mean of `correct` [S, N].

    It is over seeds and questions; over questions alone if S is 1.

    Answers that are all the same leave a bootstrap nothing to vary: then Wilson's interval over the questions.
    """
    if np.ptp(correct) == 0:
        n = correct.shape[1]
        return wilson_interval(round(float(correct.flat[0]) * n), n)
    low, high = np.quantile(two_level_means(correct[None], draws=draws, seed=seed)[0], [0.025, 0.975])
    return float(np.clip(low, 0, 1)), float(np.clip(high, 0, 1))


def two_level_means(tables: np.ndarray, *, draws: int = DRAWS, seed: int = 0) -> np.ndarray:
    """Return bootstrapped means [K, draws] of K tables [K, S, N].

    A draw is the same for all tables, so that they stay paired.
    """
    k, seeds, questions = tables.shape
    by_seed = tables.mean(axis=2, keepdims=True)
    if seeds > 1:
        tables = tables + (np.sqrt(seeds / (seeds - 1)) - 1) * (by_seed - by_seed.mean(axis=1, keepdims=True))
    rng = np.random.default_rng(seed)
    means = np.empty((k, draws))
    for start in range(0, draws, DRAWS_AT_A_TIME):
        size = min(DRAWS_AT_A_TIME, draws - start)
        u, v = _counts(rng, size, seeds), _counts(rng, size, questions)
        # tables @ v first: [K, S, size], then one weighted sum over the seeds
        means[:, start : start + size] = np.einsum("ksb,bs->kb", tables @ v.T, u) / (seeds * questions)
    return means


def _counts(rng: np.random.Generator, draws: int, size: int) -> np.ndarray:
    """Return how often each of `size` things is drawn in `size` draws with replacement, [draws, size] float64."""
    picked = rng.integers(0, size, (draws, size)) + size * np.arange(draws)[:, None]
    return np.bincount(picked.ravel(), minlength=draws * size).reshape(draws, size).astype(np.float64)
