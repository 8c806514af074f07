"""Runs of n words, as text and as numbers that compare fast."""

from __future__ import annotations

import functools
import re

import numpy as np

_WORD = re.compile(r"[^\W_]+")


def words(text: str) -> list[str]:
    """Return the words of `text` in folded case and without punctuation.

    In a script without spaces between words a run of characters counts as one word.
    """
    return _WORD.findall(text.casefold())


def ngram_hashes(numbers: np.ndarray, n: int) -> np.ndarray:
    """Return a hash of every n consecutive word numbers (int64 [W]): [W - n + 1] uint64, empty where W < n.

    Multilinear over 64 bits with fixed odd multipliers: two different n-grams share a hash about once in 2^60 pairs.
    """
    if len(numbers) < n:
        return np.zeros(0, dtype=np.uint64)
    factors = _factors(n)
    mixed = _mix(numbers.astype(np.uint64))
    total = np.zeros(len(numbers) - n + 1, dtype=np.uint64)
    for k in range(n):
        total += mixed[k : k + len(total)] * factors[k]
    return _mix(total)


@functools.cache
def _factors(n: int) -> np.ndarray:
    return np.random.default_rng(n).integers(0, 2**63, n, dtype=np.uint64) * np.uint64(2) + np.uint64(1)


def _mix(values: np.ndarray) -> np.ndarray:
    """Spread numbers over 64 bits one to one, by the finaliser of splitmix64."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
