"""The linear datamodeling score: how well the sum of a subset's influences predicts a model trained on that subset.

For subsets S of the training set, each retrained with several seeds (Park et al. 2023, TRAK, section 4),

    predicted(S, v) = sum over d in S of I(d, v)        actual(S, v) = - mean over seeds of l(v; model trained on S)
    LDS = mean over v of Spearman over S of (predicted, actual)

Intervals are 95 % bootstrap intervals over subsets and seeds, drawn anew together: all methods see the same draws, so
that the difference of two methods has an interval of its own. A draw of R seeds often holds one of them twice, and so
has noisier outcomes and a lower score than the R seeds themselves; the draws are therefore moved to the estimate
before their percentiles are taken (Efron and Tibshirani 1993, chapter 10, on the bootstrap's bias).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations_with_replacement

import numpy as np

from influence_fast.errors import ConfigError, DataError, setting
from influence_fast.statistics.ranks import pairwise_signs, weighted_spearman


@dataclass(frozen=True)
class Estimate:
    """A value with the ends of its 95 % bootstrap interval, and the bootstrap draws [B] it comes from."""

    value: float
    low: float
    high: float
    draws: np.ndarray

    def minus(self, other: Estimate) -> Estimate:
        """Return the difference of two estimates; its interval is paired where both came from one call."""
        return _estimate(self.value - other.value, self.draws - other.draws)


def draw_subsets(n: int, size: int, count: int, seed: int) -> np.ndarray:
    """Draw `count` uniform subsets of `size` of n examples as [count, n] bool; the first do not depend on `count`.

    Raises ConfigError for a size that leaves nothing to choose.
    """
    if not 0 < size < n:
        raise ConfigError(f"subsets of {size} of {n} examples leave nothing to choose; the size must lie between")
    masks = np.zeros((count, n), dtype=bool)
    for i in range(count):
        masks[i, np.random.default_rng([seed, i]).permutation(n)[:size]] = True
    return masks


def linear_datamodeling_scores(
    scores: Mapping[str, np.ndarray],
    subsets: np.ndarray,
    losses: np.ndarray,
    *,
    draws: int = 1000,
    seed: int = 0,
) -> dict[str, Estimate]:
    """Compute the LDS of every method, with intervals from the same bootstrap draws.

    Args:
        scores: method -> [N, Q] influence of every training example on every query, positive = lowers its loss.
        subsets: [S, N] bool, the training sets.
        losses: [S, R, Q] loss of every query after training on each subset with each of R seeds.

    A query whose predictions or outcomes are all equal counts as 0. Raises DataError where shapes do not fit.
    """
    count, seeds, queries = losses.shape
    if count < 3 or subsets.shape[0] != count:
        raise DataError(f"{subsets.shape[0]} subsets and the losses of {count}: at least 3, and of one number")
    if not np.isfinite(losses).all():
        raise DataError(f"a retrained model's loss is NaN or infinite: lower {setting('training.learning_rate')}")
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(count, np.full(count, 1 / count), size=draws)  # [B, S] times each subset was drawn
    seed_draws = np.sort(rng.integers(0, seeds, (draws, seeds)), axis=1)
    order = [np.flatnonzero((seed_draws == which).all(axis=1)) for which in _multisets(seeds)]
    everything = np.ones((1, count))
    signs = [pairwise_signs(-losses[:, which].mean(axis=1)) for which in _multisets(seeds)]
    whole = pairwise_signs(-losses.mean(axis=1))
    result = {}
    for name, matrix in scores.items():
        if matrix.shape != (subsets.shape[1], queries):
            raise DataError(f"scores of {name} have shape {matrix.shape}, not ({subsets.shape[1]}, {queries})")
        predicted = pairwise_signs(subsets.astype(np.float64) @ np.asarray(matrix, np.float64))
        drawn = np.empty(draws)
        for members, actual in zip(order, signs, strict=True):
            if len(members):
                drawn[members] = weighted_spearman(predicted, actual, counts[members])
        found = _estimate(float(weighted_spearman(predicted, whole, everything)[0]), drawn)
        # A correlation lies within -1 and 1.
        result[name] = Estimate(found.value, max(-1.0, found.low), min(1.0, found.high), drawn)
    return result


def seed_agreement(losses: np.ndarray) -> float:
    """Return how far two seeds' losses agree: their Spearman correlation over subsets, mean over queries and pairs.

    losses: [S, R, Q], over S subsets, R seeds and Q queries. Where retraining with another seed moves the outcomes
    about as much as another subset does, no method can have a high LDS: the square root of the reliability of the mean
    over seeds (Spearman-Brown) bounds it. NaN for one seed.
    """
    seeds = losses.shape[1]
    if seeds < 2:
        return float("nan")
    signs = [pairwise_signs(losses[:, r]) for r in range(seeds)]
    everything = np.ones((1, losses.shape[0]))
    pairs = [(a, b) for a in range(seeds) for b in range(a)]
    return float(np.mean([weighted_spearman(signs[a], signs[b], everything)[0] for a, b in pairs]))


def ceiling(losses: np.ndarray) -> float:
    """Return the highest LDS to be expected: the square root of the reliability of the seeds' mean.

    The reliability is R a / (1 + (R - 1) a) for R seeds with the agreement a of `seed_agreement`. 0 where seeds do not
    agree (a <= 0; the formula has a pole at -1 / (R - 1)), NaN for one seed.
    """
    seeds, agreement = losses.shape[1], seed_agreement(losses)
    if agreement <= 0:
        return 0.0
    return float(np.sqrt(seeds * agreement / (1 + (seeds - 1) * agreement)))


def _multisets(seeds: int) -> list[list[int]]:
    return [list(which) for which in combinations_with_replacement(range(seeds), seeds)]


def _estimate(value: float, draws: np.ndarray) -> Estimate:
    low, high = value + np.percentile(draws - draws.mean(), [2.5, 97.5])
    return Estimate(value, float(low), float(high), draws)
