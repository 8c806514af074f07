"""Ranks and what is measured by them, against scipy."""

from __future__ import annotations

import numpy as np
from scipy import stats

from influence_fast.statistics.ranks import auc, average_ranks, bootstrap_auc, spearman


def test_ranks_auc_and_spearman_are_scipys() -> None:
    rng = np.random.default_rng(0)
    for n in (2, 3, 50):
        values = rng.integers(0, max(2, n // 3), n).astype(float)  # many ties
        other = rng.standard_normal(n)
        np.testing.assert_allclose(average_ranks(values), stats.rankdata(values))
        if np.ptp(values):
            np.testing.assert_allclose(spearman(values, other), stats.spearmanr(values, other).statistic)
        positive = np.arange(n) % 2 == 0
        u = stats.mannwhitneyu(values[positive], values[~positive]).statistic
        np.testing.assert_allclose(auc(values, positive), u / (positive.sum() * (~positive).sum()))
    assert np.isnan(auc(np.ones(3), np.ones(3, bool)))
    assert np.isnan(spearman(np.ones(3), np.arange(3.0)))


def test_the_bootstrap_interval_covers_its_truth() -> None:
    """Normal scores one apart have AUC 0.760; a 95 % interval misses it about once in twenty."""
    covered = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        positive = rng.random(200) < 0.3
        low, high = bootstrap_auc(rng.standard_normal(200) + positive, positive, rng, samples=200)
        covered += low < stats.norm.cdf(1 / 2**0.5) < high
    assert covered >= 33
