"""Parity bits of sets, whose differences bound from below in how many elements two sets differ."""

from __future__ import annotations

import numpy as np

# Bits that a scan reads, at least and at most. As many as a set has elements tell sets of Jaccard similarity 0.5 and
# less from those of 0.8; an array of twice as many lets nearly no other pair through.
_FEWEST, _MOST = 256, 2048
_ONES = np.array([value.bit_count() for value in range(1 << 16)], dtype=np.uint8)


class ParityBits:
    """Bits of N sets, each the parity of the number of the set's elements that fall on it.

    An element that only one of two sets holds changes one bit, so sets differ in at least as many elements as bits.
    Sets of some 250 elements take 64 bytes each, those of 1,500 and more 512.

    Args:
        count: N.
        elements: that a set usually has.
    """

    def __init__(self, count: int, elements: int) -> None:
        scanned = min(max(1 << max(elements * 3 // 4, 1).bit_length(), _FEWEST), _MOST)
        self._bits, self._scanned = 2 * scanned, scanned // 64
        # one word of all sets behind the other, so that a scan reads memory in order
        self._words = np.zeros((self._bits // 64, count), dtype=np.uint64)

    def enter(self, place: int, elements: np.ndarray) -> None:
        """Set the bits of the set at `place` from its elements, integers [n]."""
        # elements of neighbouring numbers often come together, and the scanned half has every second of them
        odd = np.bincount(elements & (self._bits - 1), minlength=self._bits) & 1
        self._words[:, place] = np.packbits(odd.astype(np.uint8).reshape(-1, 2).T.ravel()).view(np.uint64)

    def odd(self, place: int, start: int, end: int) -> np.ndarray:
        """Return lower bounds of the number of elements in which `place` and `start` to `end` differ, [n] uint16."""
        total = np.zeros(end - start, dtype=np.uint16)
        for word in self._words[: self._scanned]:
            total += _ones(word[start:end] ^ word[place])
        return total

    def odd_of(self, place: int, others: np.ndarray) -> np.ndarray:
        """Return the tighter lower bounds, from all bits, for the sets at the places `others`, [n] uint16."""
        differing = self._words[:, others] ^ self._words[:, place, None]
        return _ones(differing).sum(axis=0, dtype=np.uint16)


def _ones(words: np.ndarray) -> np.ndarray:
    """Return how many bits of each word are set, uint8 in the shape of `words` (uint64)."""
    if hasattr(np, "bitwise_count"):  # NumPy 2
        return np.bitwise_count(words)
    return _ONES[np.ascontiguousarray(words)[..., None].view(np.uint16)].sum(axis=-1, dtype=np.uint8)
