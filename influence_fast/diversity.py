"""Near-duplicate texts: groups of which pruning lets only the best few stay."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from influence_fast.errors import ConfigError
from influence_fast.ngrams import ngram_hashes, words


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
    looked up. Memory: some 30 bytes a word and an index of those of the rare runs that two texts have.

    Raises ConfigError for a threshold outside (0, 1].
    """
    check_similarity(threshold)
    sets = _shingles(texts, n)
    parent = list(range(len(sets)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    firsts: dict[bytes, int] = {}
    for i, one in enumerate(sets):  # exact copies are joined at once, and only the first is compared with the rest
        if len(one):
            parent[i] = firsts.setdefault(one.tobytes(), i)
    distinct = sorted(firsts.values(), key=lambda i: len(sets[i]))
    index: dict[int, list[int]] = {}
    for i, prefix in zip(distinct, _rarest_first([sets[i] for i in distinct], threshold), strict=True):
        candidates = {j for value in prefix for j in index.get(value, ())}
        for j in candidates:
            # rounding up can only ask for more: 1e-9 keeps an exact ratio from being missed
            if len(sets[j]) < threshold * len(sets[i]) - 1e-9 or root(i) == root(j):
                continue
            both = len(np.intersect1d(sets[i], sets[j], assume_unique=True))
            if both >= threshold * (len(sets[i]) + len(sets[j]) - both) - 1e-9:
                parent[root(i)] = root(j)
        for value in prefix:
            index.setdefault(value, []).append(i)
    return np.array([root(i) for i in range(len(sets))], dtype=np.int64)


def _shingles(texts: Sequence[str], n: int) -> list[np.ndarray]:
    """The sorted distinct run hashes of each text."""
    numbers: dict[str, int] = {}
    sets = []
    for text in texts:
        row = np.array([numbers.setdefault(word, len(numbers)) for word in words(text)], dtype=np.int64)
        sets.append(np.unique(ngram_hashes(row, n if len(row) >= n else max(1, len(row)))))
    return sets


def _rarest_first(sets: Sequence[np.ndarray], threshold: float) -> list[list[int]]:
    """The prefix of each set in the order of how many sets hold an element, rarest first, without what is its alone."""
    values, counts = np.unique(np.concatenate(sets or [np.zeros(0, dtype=np.uint64)]), return_counts=True)
    prefixes = []
    for one in sets:
        size = len(one) - math.ceil(threshold * len(one) - 1e-9) + 1
        held_by = counts[np.searchsorted(values, one)]
        prefix = np.argsort(held_by, kind="stable")[:size]  # ties by value: `one` is sorted
        prefixes.append(one[prefix[held_by[prefix] > 1]].tolist())
    return prefixes
