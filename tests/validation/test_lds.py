"""The linear datamodeling score against scipy, and on a world whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import spearmanr

from influence_fast.errors import ConfigError, DataError
from influence_fast.validation.lds import ceiling, draw_subsets, linear_datamodeling_scores, seed_agreement


def world(noise: float, *, n: int = 60, queries: int = 5, subsets: int = 40, seeds: int = 2, seed: int = 0):
    rng = np.random.default_rng(seed)
    truth = rng.standard_normal((n, queries))
    masks = draw_subsets(n, n // 2, subsets, seed)
    losses = -(masks @ truth)[:, None] + noise * rng.standard_normal((subsets, seeds, queries))
    return truth, masks, losses


def test_agrees_with_scipy_on_every_query() -> None:
    truth, masks, losses = world(3.0)
    found = linear_datamodeling_scores({"m": truth}, masks, losses, draws=50)["m"]
    wanted = np.mean([spearmanr(masks @ truth[:, q], -losses.mean(axis=1)[:, q]).statistic for q in range(5)])
    assert found.value == pytest.approx(wanted, abs=1e-6)
    assert found.low < found.value < found.high


def test_ties_share_their_ranks_as_in_scipy() -> None:
    truth, masks, losses = world(1.0)
    coarse = np.round(truth)
    found = linear_datamodeling_scores({"m": coarse}, masks, losses, draws=5)["m"].value
    wanted = np.mean([spearmanr(masks @ coarse[:, q], -losses.mean(axis=1)[:, q]).statistic for q in range(5)])
    assert found == pytest.approx(wanted, abs=1e-6)


def test_bootstrap_draws_are_those_of_resampled_subsets() -> None:
    truth, masks, losses = world(3.0, seeds=1, subsets=12)
    found = linear_datamodeling_scores({"m": truth}, masks, losses, draws=7, seed=3)["m"]
    counts = np.random.default_rng(3).multinomial(12, np.full(12, 1 / 12), size=7)
    for drawn, count in zip(found.draws, counts, strict=True):
        rows = np.repeat(np.arange(12), count)
        values = [spearmanr((masks @ truth)[rows, q], -losses[rows, 0, q]).statistic for q in range(5)]
        assert drawn == pytest.approx(np.mean(values), abs=1e-5)


def test_truth_scores_one_without_noise_and_nothing_when_shuffled() -> None:
    truth, masks, losses = world(0.0, subsets=64)
    shuffled = np.random.default_rng(1).permutation(truth)
    found = linear_datamodeling_scores({"truth": truth, "shuffled": shuffled}, masks, losses, draws=200)
    assert found["truth"].value == pytest.approx(1.0)
    assert abs(found["shuffled"].value) < 0.3
    difference = found["truth"].minus(found["shuffled"])
    assert difference.low > 0
    assert difference.value == pytest.approx(found["truth"].value - found["shuffled"].value)


def test_intervals_cover_the_value_of_many_subsets() -> None:
    covered = 0
    for trial in range(20):
        truth, masks, losses = world(6.0, subsets=400, seeds=1, seed=trial)
        many = linear_datamodeling_scores({"m": truth}, masks, losses, draws=5)["m"].value
        few = linear_datamodeling_scores({"m": truth}, masks[:40], losses[:40], draws=300)["m"]
        covered += few.low <= many <= few.high
    assert covered >= 15


def test_seed_agreement_falls_with_noise_and_bounds_the_score() -> None:
    calm, rough = world(0.5)[2], world(20.0)[2]
    assert seed_agreement(calm) > 0.9 > seed_agreement(rough)
    assert ceiling(calm) > ceiling(rough)
    assert np.isnan(seed_agreement(calm[:, :1]))


@pytest.mark.parametrize(
    "losses", [[[[1], [3]], [[2], [2]], [[3], [1]]], [[[1], [2]], [[2], [1]], [[3], [1]]]], ids=["opposite", "weaker"]
)
def test_seeds_that_disagree_leave_nothing_to_predict(losses: list[list[list[int]]]) -> None:
    found = np.array(losses, dtype=np.float64)
    assert seed_agreement(found) < 0
    assert ceiling(found) == 0.0
    assert np.isnan(ceiling(found[:, :1]))


def test_subsets_are_uniform_of_their_size_and_stable_in_their_number() -> None:
    masks = draw_subsets(50, 20, 500, 7)
    assert (masks.sum(axis=1) == 20).all()
    assert np.array_equal(masks[:10], draw_subsets(50, 20, 10, 7))
    assert abs(masks.mean(axis=0) - 0.4).max() < 0.12


@pytest.mark.parametrize("size", [0, 50])
def test_subsets_without_a_choice_are_refused(size: int) -> None:
    with pytest.raises(ConfigError, match="leave nothing to choose"):
        draw_subsets(50, size, 3, 0)


def test_shapes_that_do_not_fit_and_broken_trainings_are_named() -> None:
    truth, masks, losses = world(1.0)
    with pytest.raises(DataError, match="scores of m have shape"):
        linear_datamodeling_scores({"m": truth[:-1]}, masks, losses)
    losses[3, 0, 1] = np.nan
    with pytest.raises(DataError, match="NaN or infinite"):
        linear_datamodeling_scores({"m": truth}, masks, losses)
