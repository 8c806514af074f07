"""Find groups of near-duplicate texts, of which pruning keeps only the best few."""

from __future__ import annotations

import hashlib
import itertools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from influence_fast.data.ngrams import ngram_hashes, words
from influence_fast.data.similarity_join import similar_sets
from influence_fast.errors import ConfigError
from influence_fast.progress import Told

# Bytes of run hashes kept from the first pass, which save reading a text twice.
_KEPT = 256 << 20


def check_similarity(threshold: float) -> None:
    """Raise ConfigError unless `threshold` is above 0 and at most 1."""
    if not 0 < threshold <= 1:
        raise ConfigError(f"max_similar {threshold} is not above 0 and at most 1 (Jaccard similarity of 8-word runs)")


def near_duplicates(texts: Sequence[str], threshold: float, *, n: int = 8, progress: bool = True) -> np.ndarray:
    """Cluster near-duplicate texts, and return the cluster number of each: [N] int64.

    Two texts are near-duplicates where the Jaccard similarity of their sets of n-word runs is at least `threshold`;
    clusters are the connected components of that relation, so two ends of a chain may differ by more. A text of
    fewer than n words is one run; one without words has no near-duplicate. Case and punctuation do not count.

    Exact (see `similarity_join`), but for runs whose 64-bit hashes agree by chance. A first pass over the texts finds
    which runs more than one may have, and only these are kept. Memory, beside the texts and the distinct words: 1/4 to
    1/2 byte a character for those runs' bits, 8 bytes a run up to 256 MB, and some 40 bytes a run kept.

    Args:
        texts: in any order.
        threshold: above 0, at most 1.
        n: words in a run.
        progress: report progress on stderr every ten seconds; nothing is printed where it takes less.
    Returns:
        A number for each text, the same for texts of one cluster: the index of one of them.
    Raises:
        ConfigError: a threshold outside (0, 1].
    Example:
        >>> near_duplicates(["So the answer is 4.", "so the answer is 4", "It is 5."], 0.9).tolist()
        [0, 0, 2]
    """
    check_similarity(threshold)
    told = Told("near-duplicates", shown=progress)
    runs = _shared_runs(texts, n, told)
    firsts: dict[bytes, int] = {}
    clusters = np.arange(len(texts))
    for i, one in enumerate(runs):
        # Exact copies are joined at once, and only the first is compared with the rest.
        if one.size:
            clusters[i] = firsts.setdefault(one.digest, i)
    distinct = np.fromiter(firsts.values(), dtype=np.int64, count=len(firsts))
    sizes, shared = [runs[i].size for i in distinct], [runs[i].shared for i in distinct]
    del runs
    labels = similar_sets(sizes, shared, threshold, told.stage("compared", len(distinct)))
    joined = clusters.copy()
    joined[distinct] = distinct[labels]
    return joined[clusters]


@dataclass(frozen=True, slots=True)
class _Runs:
    """The distinct runs of a text: their number, a digest of them all, and the sorted hashes of those that are shared.

    `shared` has every run that another text has too, and by chance a few that none has.
    """

    size: int
    digest: bytes
    shared: np.ndarray


def _shared_runs(texts: Sequence[str], n: int, told: Told | None = None) -> list[_Runs]:
    told = told or Told("near-duplicates", shown=False)
    # A run's hash names a bit. The first text to set it leaves it in `once`, the next one in `twice`.
    # One or two bits a character are five or more a word.
    bits = max(64, 1 << sum(map(len, texts)).bit_length())
    once, twice = np.zeros(bits // 8, dtype=np.uint8), np.zeros(bits // 8, dtype=np.uint8)
    hashes = _RunHashes(texts, n)
    tell = told.stage("read", len(texts))
    for i in range(len(texts)):
        runs = hashes[i]
        byte, bit = _place(runs, bits)
        again = (once[byte] & bit) != 0
        np.bitwise_or.at(twice, byte[again], bit[again])
        np.bitwise_or.at(once, byte, bit)
        tell(i + 1)
    del once
    found = []
    tell = told.stage("read again", len(texts))
    for i in range(len(texts)):
        runs = hashes[i]
        byte, bit = _place(runs, bits)
        digest = hashlib.blake2b(runs.tobytes(), digest_size=16).digest()
        found.append(_Runs(len(runs), digest, runs[(twice[byte] & bit) != 0]))
        tell(i + 1)
    return found


def _place(runs: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Return byte and bit of each hash in a table of `bits` bits, a power of two."""
    place = runs & np.uint64(bits - 1)
    return (place >> np.uint64(3)).astype(np.int64), np.uint8(1) << (place & np.uint64(7)).astype(np.uint8)


def _distinct(hashes: np.ndarray) -> np.ndarray:
    """Return the distinct hashes, ascending; a sort is ten times as fast as `np.unique`'s table for millions."""
    ordered = np.sort(hashes)
    return ordered[np.r_[True, ordered[1:] != ordered[:-1]]] if len(ordered) else ordered


class _RunHashes:
    """The sorted distinct run hashes of each text, uint64; a text of fewer than n words is one run.

    Hashes are computed on demand. Those computed first are kept, up to `_KEPT` bytes, until they are read again:
    `hashes[i]` is for two passes.
    """

    def __init__(self, texts: Sequence[str], n: int) -> None:
        self._texts, self._n = texts, n
        self._numbers: dict[str, int] = defaultdict(itertools.count().__next__)
        self._kept: dict[int, np.ndarray] = {}
        self._room = _KEPT

    def __getitem__(self, i: int) -> np.ndarray:
        runs = self._kept.pop(i, None)
        if runs is not None:
            return runs
        found = words(self._texts[i])
        row = np.fromiter(map(self._numbers.__getitem__, found), dtype=np.int64, count=len(found))
        runs = _distinct(ngram_hashes(row, self._n if len(row) >= self._n else max(1, len(row))))
        if runs.nbytes <= self._room:
            self._room -= runs.nbytes
            self._kept[i] = runs
        return runs
