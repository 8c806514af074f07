"""Near-duplicate texts: groups of which pruning lets only the best few stay."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from influence_fast.data.ngrams import ngram_hashes, words
from influence_fast.errors import ConfigError


def check_similarity(threshold: float) -> None:
    """ConfigError unless `threshold` is a similarity that can be asked for."""
    if not 0 < threshold <= 1:
        raise ConfigError(f"max_similar {threshold} is not above 0 and at most 1 (Jaccard similarity of 8-word runs)")


def near_duplicates(texts: Sequence[str], threshold: float, *, n: int = 8) -> np.ndarray:
    """[N] int64: a cluster number for each text; near-duplicates share one.

    Two texts are near-duplicates where the Jaccard similarity of their sets of n-word runs is at least `threshold`;
    clusters are the connected components of that relation, so two ends of a chain may differ by more. A text of
    fewer than n words is one run; one without words has no near-duplicate. Case and punctuation do not count.

    Exact, by prefix filtering (Bayardo et al., "Scaling Up All Pairs Similarity Search", WWW 2007; Xiao et al. 2008):
    two sets of similarity t must meet within the rarest |A| - ceil(t |A|) + 1 elements of each, so only those are
    looked up. A first pass over the texts finds which runs more than one may have, and only these are kept. Memory,
    beside the texts and the distinct words: 1/4 to 1/2 byte a character, and some 30 bytes a run kept.

    Raises ConfigError for a threshold outside (0, 1].
    """
    check_similarity(threshold)
    texts_runs = _shared_runs(texts, n)
    parent = list(range(len(texts)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    firsts: dict[bytes, int] = {}
    for i, one in enumerate(texts_runs):
        if one.size:  # exact copies are joined at once, and only the first is compared with the rest
            parent[i] = firsts.setdefault(one.digest, i)
    distinct = sorted(firsts.values(), key=lambda i: texts_runs[i].size)
    index: dict[int, list[int]] = {}
    for i, prefix in zip(distinct, _rarest_first([texts_runs[i] for i in distinct], threshold), strict=True):
        mine = texts_runs[i]
        candidates = {j for value in prefix for j in index.get(value, ())}
        for j in candidates:
            other = texts_runs[j]
            # rounding up can only ask for more: 1e-9 keeps an exact ratio from being missed
            if other.size < threshold * mine.size - 1e-9 or root(i) == root(j):
                continue
            both = len(np.intersect1d(mine.shared, other.shared, assume_unique=True))
            if both >= threshold * (mine.size + other.size - both) - 1e-9:
                parent[root(i)] = root(j)
        for value in prefix:
            index.setdefault(value, []).append(i)
    return np.array([root(i) for i in range(len(texts))], dtype=np.int64)


@dataclass(frozen=True, slots=True)
class _Runs:
    """The distinct runs of a text: how many, a digest of them all, and the sorted hashes of those that are shared.

    `shared` are all that another text has too, and by chance a few that none has.
    """

    size: int
    digest: bytes
    shared: np.ndarray


def _shared_runs(texts: Sequence[str], n: int) -> list[_Runs]:
    # A run's hash names a bit. The first text to set it leaves it in `once`, the next one in `twice`.
    bits = max(64, 1 << sum(map(len, texts)).bit_length())  # one or two a character, five or more a word
    once, twice = np.zeros(bits // 8, dtype=np.uint8), np.zeros(bits // 8, dtype=np.uint8)
    for runs in _shingles(texts, n):
        byte, bit = _place(runs, bits)
        again = (once[byte] & bit) != 0
        np.bitwise_or.at(twice, byte[again], bit[again])
        np.bitwise_or.at(once, byte, bit)
    del once
    found = []
    for runs in _shingles(texts, n):
        byte, bit = _place(runs, bits)
        digest = hashlib.blake2b(runs.tobytes(), digest_size=16).digest()
        found.append(_Runs(len(runs), digest, runs[(twice[byte] & bit) != 0]))
    return found


def _place(runs: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Byte and bit of each hash in a table of so many bits, a power of two."""
    place = runs & np.uint64(bits - 1)
    return (place >> np.uint64(3)).astype(np.int64), np.uint8(1) << (place & np.uint64(7)).astype(np.uint8)


def _shingles(texts: Sequence[str], n: int) -> Iterator[np.ndarray]:
    """The sorted distinct run hashes of each text."""
    numbers: dict[str, int] = {}
    for text in texts:
        row = np.array([numbers.setdefault(word, len(numbers)) for word in words(text)], dtype=np.int64)
        yield np.unique(ngram_hashes(row, n if len(row) >= n else max(1, len(row))))


def _rarest_first(texts_runs: Sequence[_Runs], threshold: float) -> list[list[int]]:
    """The prefix of each set in the order of how many sets hold an element, rarest first, without what is its alone."""
    every = np.concatenate([one.shared for one in texts_runs] or [np.zeros(0, dtype=np.uint64)])
    values, counts = np.unique(every, return_counts=True)
    prefixes = []
    for one in texts_runs:
        size = one.size - math.ceil(threshold * one.size - 1e-9) + 1
        size -= one.size - len(one.shared)  # what is not shared is rarest
        held_by = counts[np.searchsorted(values, one.shared)]
        prefix = np.argsort(held_by, kind="stable")[: max(0, size)]  # ties by value: `shared` is sorted
        prefixes.append(one.shared[prefix[held_by[prefix] > 1]].tolist())
    return prefixes
