"""The grid's statistics against scipy, closed forms, and the nominal error rate."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy import stats

from influence_fast.errors import DataError
from influence_fast.report.grid_statistics import grid_statistics
from influence_fast.statistics.paired_tests import compare, holm, sign_flip_test
from influence_fast.statistics.two_level import two_level_interval, two_level_means


def test_right_or_wrong_sign_flips_are_mcnemars_exact_test() -> None:
    rng = np.random.default_rng(0)
    for n in (9, 12):
        d = rng.integers(-1, 2, n).astype(float)
        wins, losses = int((d > 0).sum()), int((d < 0).sum())
        assert sign_flip_test(d) == pytest.approx(stats.binomtest(wins, wins + losses).pvalue, rel=1e-12)
    d = np.r_[np.ones(60), -np.ones(35), np.zeros(400)]
    # random flips: within four standard errors of the exact value
    exact = stats.binomtest(60, 95).pvalue
    assert abs(sign_flip_test(d, draws=40_000) - exact) < 4 * np.sqrt(exact / 40_000)


def test_sign_flips_of_shares_against_scipy() -> None:
    d = np.random.default_rng(1).choice([-2 / 3, -1 / 3, 0, 1 / 3, 2 / 3, 1], 13)
    reference = stats.permutation_test(
        (d,), np.sum, permutation_type="samples", n_resamples=np.inf, alternative="two-sided"
    )
    assert sign_flip_test(d) == pytest.approx(reference.pvalue, rel=1e-12)
    assert sign_flip_test(np.zeros(5)) == 1.0


def test_one_seed_bootstrap_has_the_standard_error_of_a_mean() -> None:
    x = np.random.default_rng(2).integers(0, 2, (1, 400)).astype(float)
    means = two_level_means(x[None], draws=20_000)[0]
    assert means.mean() == pytest.approx(x.mean(), abs=1e-3)
    assert means.std() == pytest.approx(x.std() / 20, rel=0.03)
    low, high = two_level_interval(x)
    reference = stats.bootstrap((x[0],), np.mean, method="percentile", rng=np.random.default_rng(0)).confidence_interval
    assert (low, high) == pytest.approx((reference.low, reference.high), abs=0.005)


def test_seeds_count_with_their_unbiased_variance() -> None:
    """Questions that all agree leave the seeds alone: variance s^2 / S, with s^2 over S - 1."""
    accuracy = np.array([0.4, 0.5, 0.75])
    means = two_level_means(np.repeat(accuracy[:, None], 50, axis=1)[None], draws=40_000)[0]
    assert means.var() == pytest.approx(accuracy.var(ddof=1) / 3, rel=0.03)


def test_questions_are_drawn_once_for_all_seeds() -> None:
    """Seeds that answer alike are no more questions: the interval does not shrink."""
    x = np.random.default_rng(3).integers(0, 2, (1, 200)).astype(float)
    once, thrice = two_level_means(x[None])[0], two_level_means(np.repeat(x, 3, axis=0)[None])[0]
    assert thrice.std() == pytest.approx(once.std(), rel=0.05)


def test_holm_against_brute_force() -> None:
    p = np.random.default_rng(4).uniform(0, 0.2, 7)
    order = np.argsort(p)
    expected = [min(1.0, max((7 - j) * p[order[j]] for j in range(i + 1))) for i in range(7)]
    np.testing.assert_allclose(holm(p)[order], expected, rtol=1e-12)
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03]), [0.03, 0.06, 0.06])
    assert len(holm([])) == 0


def test_false_alarms_stay_at_their_rate_where_only_seeds_differ() -> None:
    """No strategy effect, but training runs that differ by some points each: questions alone would cry wolf."""
    rng = np.random.default_rng(5)
    alarms = alone = 0
    for trial in range(60):
        shares = 0.5 + rng.normal(0, 0.08, (2, 6, 1))
        x = (rng.random((2, 6, 300)) < shares).astype(float)
        alarms += compare(x[0], x[1], draws=400, seed=trial)["p"] < 0.05
        alone += sign_flip_test((x[0] - x[1]).mean(axis=0), draws=400, seed=trial) < 0.05
    assert alarms <= 10  # 5 % of 60 is 3; six seeds are few
    assert alone > 2 * alarms


def test_a_plain_difference_is_found_with_its_effect_size() -> None:
    rng = np.random.default_rng(6)
    hard = rng.random(500)
    first = (rng.random((3, 500)) < 0.3 + 0.6 * hard).astype(float)
    second = (rng.random((3, 500)) < 0.15 + 0.6 * hard).astype(float)
    found = compare(first, second)
    a, b = first.mean(), second.mean()
    assert found["difference"] == pytest.approx(a - b)
    assert 0 < found["low"] < found["difference"] < found["high"]
    assert found["effect"] == pytest.approx(2 * np.arcsin(np.sqrt(a)) - 2 * np.arcsin(np.sqrt(b)))
    assert found["effect_low"] < found["effect"] < found["effect_high"]
    assert found["p"] < 0.001
    assert compare(first, second) == found  # deterministic
    mirrored = compare(second, first)
    assert (mirrored["difference"], mirrored["low"], mirrored["p"]) == pytest.approx(
        (-found["difference"], -found["high"], found["p"])
    )


def grid(seeds: int) -> tuple[list[dict[str, Any]], list[dict[str, float]]]:
    rng = np.random.default_rng(7)
    cells, correct = [], []
    for seed in range(seeds):
        for strategy, fraction, share in (
            ("full", 0.0, 0.5),
            ("random", 0.1, 0.5),
            ("random", 0.5, 0.4),
            ("combined", 0.1, 0.8),
            ("combined", 0.5, 0.6),
        ):
            answers = (rng.random(120) < share).astype(float)
            cells.append({"strategy": strategy, "fraction": fraction, "seed": seed, "low": 0.1, "high": 0.9})
            correct.append({f"q{i}": float(a) for i, a in enumerate(answers)})
    return cells, correct


def test_the_grid_is_paired_and_corrected_as_one_family() -> None:
    cells, correct = grid(3)
    # the order of a cell's questions must not matter
    correct = [dict(reversed(c.items())) if i % 2 else c for i, c in enumerate(correct)]
    found = grid_statistics(cells, correct)
    assert [(s["strategy"], s["fraction"], s["seeds"]) for s in found["settings"]] == [
        ("full", 0.0, 3), ("random", 0.1, 3), ("random", 0.5, 3), ("combined", 0.1, 3), ("combined", 0.5, 3),
    ]  # fmt: skip
    mean = np.mean([list(c.values()) for cell, c in zip(cells, correct, strict=True) if cell["strategy"] == "full"])
    assert found["settings"][0]["accuracy"] == pytest.approx(mean)
    assert all(s["low"] < s["accuracy"] < s["high"] for s in found["settings"])
    assert [(c["strategy"], c["fraction"], c["against"]) for c in found["comparisons"]] == [
        ("combined", 0.1, "random"), ("combined", 0.1, "full"), ("combined", 0.5, "random"), ("combined", 0.5, "full"),
    ]  # fmt: skip
    np.testing.assert_allclose(
        [c["p_adjusted"] for c in found["comparisons"]], holm([c["p"] for c in found["comparisons"]])
    )


def test_one_seed_keeps_the_interval_of_its_questions() -> None:
    found = grid_statistics(*grid(1))
    assert [(s["low"], s["high"]) for s in found["settings"]] == [(0.1, 0.9)] * 5
    assert all(c["seeds"] == 1 for c in found["comparisons"])
    assert grid_statistics([], []) == {"settings": [], "comparisons": []}


def test_answers_that_are_all_right_have_an_interval_of_some_width() -> None:
    low, high = two_level_interval(np.ones((3, 50)))
    assert high == 1
    assert low == pytest.approx(stats.binomtest(50, 50).proportion_ci(method="wilson").low)


def test_what_cannot_be_paired_is_named() -> None:
    cells, correct = grid(1)
    with pytest.raises(DataError, match=r"combined at 0\.5, seed 0: other questions .*q7"):
        grid_statistics(cells, [*correct[:-1], {k: v for k, v in correct[-1].items() if k != "q7"}])
    with pytest.raises(DataError, match="seed 0 comes twice"):
        grid_statistics([*cells, cells[0]], [*correct, correct[0]])
    with pytest.raises(DataError, match="cannot be paired"):
        compare(np.ones((2, 3)), np.ones((2, 4)))
