"""Intervals of shares and means, against their equations and the normal ones."""

from __future__ import annotations

import math

import numpy as np
import pytest

from influence_fast.statistics.intervals import bootstrap_interval, wilson_interval


def test_wilson_interval_solves_its_equation() -> None:
    for correct, n in [(0, 10), (10, 10), (3, 10), (150, 300)]:
        low, high = wilson_interval(correct, n)
        assert 0 <= low <= correct / n <= high <= 1
        for bound in (low, high):  # |share - bound| = z sqrt(bound (1 - bound) / n)
            if 0 < bound < 1:
                distance = 1.959963984540054 * math.sqrt(bound * (1 - bound) / n)
                assert abs(abs(correct / n - bound) - distance) < 1e-9


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_an_interval_of_equal_answers_is_no_point(value: float) -> None:
    low, high = bootstrap_interval([value] * 12)
    assert (low, high) == wilson_interval(round(12 * value), 12)
    assert high - low > 0.2


def test_bootstrap_interval_agrees_with_the_normal_one_on_many_values() -> None:
    values = np.random.default_rng(0).random(2000)
    low, high = bootstrap_interval(list(values), draws=2000)
    half = 1.96 * values.std() / math.sqrt(len(values))
    assert abs(low - (values.mean() - half)) < 0.1 * half
    assert abs(high - (values.mean() + half)) < 0.1 * half
