"""Rounds of several variants in turn, and what is said of them: medians, quartiles, ratios taken inside a round.

A machine that is slow for a while is slow for every variant of a round, so a ratio taken inside its round holds where
two medians would not.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

Variants = Mapping[str, Callable[[], Any]]


def interleaved(variants: Variants, count: int) -> dict[str, list[float]]:
    """Seconds of each of `count` rounds of every variant, in a rotating order, after one round to warm up."""
    names = list(variants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for index in range(-1, count):  # one round to warm up
        shift = index % len(names)
        for name in names[shift:] + names[:shift]:
            spent = timed(variants[name])
            if index >= 0:
                seconds[name].append(spent)
    return seconds


def timed(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


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
