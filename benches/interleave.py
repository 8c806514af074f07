"""Rounds of several variants in turn, and what is said of them: medians, quartiles, ratios taken inside a round.

A machine that is slow for a while is slow for every variant of a round, so a ratio taken inside its round holds where
two medians would not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from benches.bench_inner_products import rounds

__all__ = ["Spread", "Variants", "interleaved", "ratios", "spread", "summary"]

Variants = Mapping[str, Callable[[], Any]]


def interleaved(variants: Variants, count: int) -> dict[str, list[float]]:
    """Seconds of each of `count` rounds of every variant, in a rotating order, after one round to warm up."""
    return rounds(dict(variants), count)


class Spread(NamedTuple):
    """Median and quartiles."""

    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """Raises ValueError where there is no value."""
    if not len(values):
        raise ValueError("no round was timed, so there is no median")
    low, median, high = np.quantile(np.asarray(values, np.float64), (0.25, 0.5, 0.75))
    return Spread(float(median), float(low), float(high))


def ratios(others: Sequence[float], ours: Sequence[float]) -> Spread:
    """Time of the other over time of ours, inside each round: above 1 ours is the faster."""
    return spread([other / own for other, own in zip(others, ours, strict=True)])


def summary(seconds: Mapping[str, Sequence[float]]) -> list[dict[str, Any]]:
    """One entry a variant, the first one being ours: name, seconds (median, low, high), ratio (the same)."""
    ours = next(iter(seconds.values()))
    return [
        {"name": name, "seconds": spread(times)._asdict(), "ratio": ratios(times, ours)._asdict()}
        for name, times in seconds.items()
    ]
