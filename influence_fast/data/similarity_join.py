"""Clusters of similar sets without comparing all pairs: prefix, position and bitmap filters before an exact count.

Elements are ordered by how many sets hold them, the rarest first. Two sets of Jaccard similarity t or more must then
meet early in that order, so a set is looked up by its first elements alone (Bayardo et al., "Scaling Up All Pairs
Similarity Search", WWW 2007), and where they first meet bounds how much they can share (Xiao et al., "Efficient
Similarity Joins for Near Duplicate Detection", WWW 2008). The bits of each set, combined by exclusive or, bound it
again (Sandes et al., "Bitmap Filter", Knowledge-Based Systems 2020). What is left is counted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

_SLACK = 1e-9  # keeps an exact ratio from being missed: similar is both >= t * union - _SLACK
_BITS = 256
_AT_ONCE = 1 << 13  # entries of the index that are filtered together: a match often makes the rest superfluous
_FEW = 64  # entries that are filtered first: where most sets are of one cluster, a match is among them
# Candidates are counted in batches that double, for the same reason.
_FIRST_BATCH, _LARGEST_BATCH = 32, 1024
_ONES = np.array([value.bit_count() for value in range(1 << 16)], dtype=np.uint8)


class Clusters:
    """Disjoint clusters of the numbers 0 to N - 1; `label[i]` is the cluster of i, [N] int64."""

    def __init__(self, count: int) -> None:
        self.label = np.arange(count)
        self._members: dict[int, list[int]] = {}

    def join(self, i: int, j: int) -> None:
        """Make one cluster of those of i and j; the members of the smaller one are renumbered."""
        a, b = int(self.label[i]), int(self.label[j])
        if a == b:
            return
        mine, theirs = self._members.pop(a, [a]), self._members.pop(b, [b])
        if len(mine) < len(theirs):
            a, mine, theirs = b, theirs, mine
        self.label[theirs] = a
        mine.extend(theirs)
        self._members[a] = mine


def similar_sets(
    sizes: Sequence[int],
    shared: Sequence[np.ndarray],
    threshold: float,
    tell: Callable[[int], None] = lambda done: None,
) -> np.ndarray:
    """Return the clusters of N distinct sets, [N] int64: connected components of Jaccard similarity >= `threshold`.

    Args:
        sizes: elements in each set.
        shared: the distinct elements of each set that any other set holds too, [<= size] uint64; elements that no
            other set holds may be among them or left out.
        tell: called with the number of sets that are done, up to N.
    """
    clusters = Clusters(len(sizes))
    tokens, starts = _by_rarity(shared)
    nodes = _alike(sizes, tokens, starts, threshold, clusters)
    if nodes:
        _Join(np.asarray(sizes, dtype=np.int64), tokens, starts, nodes, threshold, clusters).run(tell)
    return clusters.label


def _by_rarity(shared: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The elements of each set that two sets hold or more, as places in the order of rarity.

    Returns the sets behind each other, each ascending, int32, and where each starts, [N + 1] int64.
    """
    every = np.concatenate([*shared, np.zeros(0, dtype=np.uint64)])
    every.sort()
    first = np.flatnonzero(np.r_[True, every[1:] != every[:-1]]) if len(every) else np.zeros(0, dtype=np.int64)
    counts = np.diff(np.r_[first, len(every)])
    values = every[first[counts > 1]]
    del every, first
    counts = counts[counts > 1]
    rank = np.empty(len(values), dtype=np.int32)
    rank[np.argsort(counts, kind="stable")] = np.arange(len(values), dtype=np.int32)
    tokens = np.empty(int(counts.sum()), dtype=np.int32)
    starts = np.zeros(len(shared) + 1, dtype=np.int64)
    for i, mine in enumerate(shared):
        place = np.searchsorted(values, mine)
        held = place < len(values)
        held[held] = values[place[held]] == mine[held]
        starts[i + 1] = starts[i] + np.count_nonzero(held)
        tokens[starts[i] : starts[i + 1]] = np.sort(rank[place[held]])
    return tokens, starts


def _alike(
    sizes: Sequence[int], tokens: np.ndarray, starts: np.ndarray, threshold: float, clusters: Clusters
) -> dict[int, list[int]]:
    """The sets that have to be compared, each with those that any other set sees as it sees this one.

    Sets of one size and the same shared elements share the same number with every other set, so one stands for all.
    Among themselves all are similar, and joined here, or none is: those are listed, to be joined as soon as another
    set is similar to one of them. A set without shared elements is similar to none and left out.
    """
    seen: dict[tuple[int, bytes], int] = {}
    nodes: dict[int, list[int]] = {}
    for i, size in enumerate(sizes):
        mine = tokens[starts[i] : starts[i + 1]]
        if not len(mine):
            continue
        first = seen.setdefault((size, mine.tobytes()), i)
        if first == i:
            nodes[i] = []
        elif len(mine) >= threshold * (2 * size - len(mine)) - _SLACK:
            clusters.join(first, i)
        else:
            nodes[first].append(i)
    return nodes


class _Join:
    """One pass over the sets, by size: each is looked up among those before it, and then entered into the index."""

    def __init__(
        self,
        sizes: np.ndarray,
        tokens: np.ndarray,
        starts: np.ndarray,
        nodes: dict[int, list[int]],
        threshold: float,
        clusters: Clusters,
    ) -> None:
        self.threshold, self.clusters = threshold, clusters
        self.tokens, self.starts, self.sizes = tokens, starts, sizes
        self.waiting = nodes  # by set: those that are joined with it when anything is
        chosen = np.fromiter(nodes, dtype=np.int64, count=len(nodes))
        self.order = chosen[np.argsort(sizes[chosen], kind="stable")]
        lengths = np.diff(starts)
        self.alone = sizes - lengths  # elements that no other set holds: rarer than all others
        # J >= t asks for at least t |A| common elements, and for 2t / (1 + t) |A| with a set that is no smaller
        self.looked_up = np.clip(self._early(threshold), 0, lengths)
        self.entered = np.clip(self._early(2 * threshold / (1 + threshold)), 0, lengths)
        self.bits = np.zeros((len(sizes), _BITS // 16), dtype=np.uint16)
        self.compared_by = np.full(len(sizes), -1, dtype=np.int64)  # the last set that each was compared with
        self.is_mine = np.zeros(int(tokens.max()) + 1, dtype=bool)
        self._open_index()

    def _early(self, share: float) -> np.ndarray:
        """How many shared elements of each set precede the last place where it can first meet a similar set."""
        return self.sizes - np.ceil(share * self.sizes - 1e-6).astype(np.int64) + 1 - self.alone

    def _open_index(self) -> None:
        """Room for every element's list of the sets that enter it, one list behind the other."""
        counts = np.zeros(len(self.is_mine), dtype=np.int64)
        for i in self.order.tolist():
            counts[self._first(i, self.entered)] += 1
        self.begin = np.cumsum(counts) - counts
        self.filled = np.zeros_like(counts)
        self.settled = np.zeros_like(counts)  # leading entries of an element's list that are all of one cluster
        self.tidied = np.zeros_like(counts)  # length of the list when it was last put in order
        self.held_by = np.empty(int(counts.sum()), dtype=np.int32)
        self.room = np.empty(len(self.held_by), dtype=np.int32)  # elements of that set from this one on

    def _first(self, i: int, count: np.ndarray) -> np.ndarray:
        return self.tokens[self.starts[i] : self.starts[i] + count[i]]

    def run(self, tell: Callable[[int], None]) -> None:
        skipped = len(self.sizes) - len(self.order)
        for done, i in enumerate(self.order.tolist()):
            mine = self.tokens[self.starts[i] : self.starts[i + 1]]
            odd = np.bincount(mine & (_BITS - 1), minlength=_BITS) & 1
            self.bits[i] = np.packbits(odd.astype(np.uint8)).view(np.uint16)
            wanted = self._first(i, self.looked_up)
            if len(wanted) and self.filled[wanted].any():
                self.is_mine[mine] = True
                self._look_up(i, wanted)
                self.is_mine[mine] = False
            entered = self._first(i, self.entered)
            at = self.begin[entered] + self.filled[entered]
            self.held_by[at] = i
            self.room[at] = self.sizes[i] - self.alone[i] - np.arange(len(entered))
            self.filled[entered] += 1
            tell(skipped + done + 1)

    def _look_up(self, i: int, wanted: np.ndarray) -> None:
        """Join set i with the similar ones that share one of the elements `wanted`, which are its first."""
        room = self.sizes[i] - self.alone[i] - np.arange(len(wanted))
        total = int(self.filled[wanted].sum())
        if total <= _AT_ONCE:  # most sets: all lists together
            count = self.filled[wanted]
            inner = np.arange(total) - np.repeat(np.cumsum(count) - count, count)
            entries, rooms = np.repeat(self.begin[wanted], count) + inner, np.repeat(room, count)
            self._compare(i, entries[:_FEW], rooms[:_FEW])
            if total > _FEW:
                self._compare(i, entries[_FEW:], rooms[_FEW:])
            return
        step = _FEW
        for element, left in zip(wanted.tolist(), room.tolist(), strict=True):
            self._tidy(element)
            begin, end = int(self.begin[element]), int(self.begin[element] + self.filled[element])
            settled = begin + int(self.settled[element])
            while begin < end:
                label = self.clusters.label
                if begin < settled and label[self.held_by[begin]] == label[i]:
                    begin = settled
                stop = min(begin + step, end if begin >= settled else settled)
                self._compare(i, np.arange(begin, stop), left)
                begin, step = stop, min(8 * step, _AT_ONCE)

    def _tidy(self, element: int) -> None:
        """Put the largest cluster in an element's list first, each time that the list has grown by a quarter."""
        begin, filled = int(self.begin[element]), int(self.filled[element])
        if filled < 1.25 * self.tidied[element] + 64:
            return
        self.tidied[element] = filled
        entries = slice(begin, begin + filled)
        labels = self.clusters.label[self.held_by[entries]]
        _, place, counts = np.unique(labels, return_inverse=True, return_counts=True)
        order = np.argsort(place != np.argmax(counts), kind="stable")
        self.held_by[entries] = self.held_by[entries][order]
        self.room[entries] = self.room[entries][order]
        self.settled[element] = counts.max()

    def _compare(self, i: int, entries: np.ndarray, room: np.ndarray | int) -> None:
        """Join set i with those similar to it among entries of the index; `room` are its elements from there on."""
        label, size = self.clusters.label, int(self.sizes[i])
        others = self.held_by[entries]
        new = np.flatnonzero((label[others] != label[i]) & (self.compared_by[others] != i))
        if not len(new):
            return
        others, room = others[new], np.minimum(self.room[entries[new]], room if isinstance(room, int) else room[new])
        sizes = self.sizes[others]
        needed = self.threshold * (size + sizes) / (1 + self.threshold) - 1e-6
        new = np.flatnonzero((room >= needed) & (sizes >= self.threshold * size - 1e-6))
        if not len(new):
            return
        others, most = others[new], (size + sizes - 2 * needed)[new]  # elements that one has and the other has not
        odd = _ONES[self.bits[others] ^ self.bits[i]].sum(axis=1, dtype=np.int64)
        others = np.unique(others[odd + self.alone[others] + self.alone[i] <= most])
        self.compared_by[others] = i
        batch = _FIRST_BATCH
        while len(others):
            now, others = others[:batch], others[batch:]
            both = self._common(now)
            near = both >= self.threshold * (size + self.sizes[now] - both) - _SLACK
            for j in now[near].tolist():
                self._join(i, j)
            others = others[label[others] != label[i]]
            batch = min(2 * batch, _LARGEST_BATCH)

    def _common(self, others: np.ndarray) -> np.ndarray:
        """How many elements each of `others` has in common with the set whose elements are marked as mine."""
        begin, end = self.starts[others], self.starts[others + 1]
        count = end - begin
        first = np.cumsum(count) - count
        places = np.arange(int(count.sum())) + np.repeat(begin - first, count)
        return np.add.reduceat(self.is_mine[self.tokens[places]].astype(np.int64), first)

    def _join(self, i: int, j: int) -> None:
        for one in (i, j):
            for other in self.waiting[one]:
                self.clusters.join(one, other)
            self.waiting[one] = []
        self.clusters.join(i, j)
