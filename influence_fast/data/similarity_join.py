"""Clusters of similar sets without comparing all pairs: prefix, position and bitmap filters before an exact count.

Elements are ordered by how many sets hold them, the rarest first. Two sets of Jaccard similarity t or more must then
meet early in that order, so a set is looked up by its first elements alone (Bayardo et al., "Scaling Up All Pairs
Similarity Search", WWW 2007), and where they first meet bounds how much they can share (Xiao et al., "Efficient
Similarity Joins for Near Duplicate Detection", WWW 2008). The bits of each set, combined by exclusive or, bound it
again (Sandes et al., "Bitmap Filter", Knowledge-Based Systems 2020). What is left is counted.

Where the first elements are common, as in copies of one form with other numbers in its blanks, their lists are longer
than all sets together. Such a set is compared with the bits of every earlier one instead, some 5 ns each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from influence_fast.data.parity_bits import ParityBits

# Keeps an exact ratio from being missed: sets are similar where both >= t * union - _SLACK.
_SLACK = 1e-9
# Entries of the index that are compared whatever the number of sets.
_AT_ONCE = 1 << 10
# Entries filtered first; where most sets are of one cluster, a match is among them.
_FEW = 64
# An entry of the index takes as long as the bits of this many consecutive sets.
_LIST_COST = 16
# Candidates are counted in batches that double, for the same reason.
_FIRST_BATCH, _LARGEST_BATCH = 32, 1024


class Clusters:
    """Disjoint clusters of the numbers 0 to N - 1; `label[i]` is the cluster of i, [N] int64."""

    def __init__(self, count: int) -> None:
        self.label = np.arange(count)
        self._members: dict[int, list[int]] = {}

    def join(self, i: int, j: int) -> None:
        """Merge the clusters of i and j; the members of the smaller one are renumbered."""
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
    """Return the elements that two sets or more hold, numbered from the rarest, for each set.

    The sets come end to end, each ascending, int32, with where each starts, [N + 1] int64.
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
    """Return the sets to be compared, each with the other sets that look the same to every third set.

    Sets of one size and the same shared elements share the same number with every other set, so one represents all.
    Among themselves all are similar, and joined here, or none is: those are listed, to be joined as soon as another set
    is similar to one of them. A set without shared elements is similar to none and left out.
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
    """One pass over the sets by size: each is looked up among those before it, and then entered into the index."""

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
        # For each set, those to be joined with it as soon as any other is.
        self.waiting = nodes
        chosen = np.fromiter(nodes, dtype=np.int64, count=len(nodes))
        self.order = chosen[np.argsort(sizes[chosen], kind="stable")]
        lengths = np.diff(starts)
        # Elements that no other set holds are rarer than all others.
        self.alone = sizes - lengths
        # J >= t asks for at least t |A| common elements, and for 2t / (1 + t) |A| with a set that is no smaller
        self.looked_up = np.clip(self._early(threshold), 0, lengths)
        self.entered = np.clip(self._early(2 * threshold / (1 + threshold)), 0, lengths)
        self.bits = ParityBits(len(self.order), int(np.median(lengths[self.order])))
        # The place of each set in the order.
        self.place = np.full(len(sizes), -1, dtype=np.int64)
        self.place[self.order] = np.arange(len(self.order))
        self.ordered_sizes = sizes[self.order]
        # Of the elements that one of two similar sets has and the other has not, (1 - t) / (1 + t) of each set's size
        # are granted; whole numbers, rounded so that a pair is granted one too many at most and never one too few.
        self.granted = np.floor(self._differing(self.ordered_sizes) - self.alone[self.order]).astype(np.int32)
        # The last set that each set was compared with.
        self.compared_by = np.full(len(sizes), -1, dtype=np.int64)
        self.is_mine = np.zeros(int(tokens.max()) + 1, dtype=bool)
        self._open_index()

    def _early(self, share: float) -> np.ndarray:
        """Return how many shared elements of each set precede the last place where it can first meet a similar set."""
        return self.sizes - np.ceil(share * self.sizes - 1e-6).astype(np.int64) + 1 - self.alone

    def _differing(self, sizes: np.ndarray) -> np.ndarray:
        """Return what a set of each size adds to the number of elements in which it may differ from a similar one."""
        return sizes * (1 - self.threshold) / (1 + self.threshold) + 1e-6

    def _open_index(self) -> None:
        """Allocate every element's list of the sets that enter it, one list after the other."""
        counts = np.zeros(len(self.is_mine), dtype=np.int64)
        for i in self.order.tolist():
            counts[self._first(i, self.entered)] += 1
        self.begin = np.cumsum(counts) - counts
        self.filled = np.zeros_like(counts)
        self.held_by = np.empty(int(counts.sum()), dtype=np.int32)
        # Number of elements of that set from this one on.
        self.room = np.empty(len(self.held_by), dtype=np.int32)

    def _first(self, i: int, count: np.ndarray) -> np.ndarray:
        return self.tokens[self.starts[i] : self.starts[i] + count[i]]

    def run(self, tell: Callable[[int], None]) -> None:
        skipped = len(self.sizes) - len(self.order)
        for done, i in enumerate(self.order.tolist()):
            mine = self.tokens[self.starts[i] : self.starts[i + 1]]
            self.bits.enter(done, mine)
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
        """Join set i with the similar sets that share one of its first elements, `wanted`."""
        count = self.filled[wanted]
        total = int(count.sum())
        place = int(self.place[i])
        smallest = int(np.searchsorted(self.ordered_sizes[:place], self.threshold * self.sizes[i] - 1e-6))
        if total > max(_AT_ONCE, (place - smallest) // _LIST_COST):
            # A match is likely among the newest sets of the longest list. That of the last element may be empty: sets
            # are entered by fewer elements than they are looked up by.
            longest = int(count.argmax())
            newest = self.begin[wanted[longest]] + count[longest]
            self._compare(i, np.arange(newest - min(_FEW, count[longest]), newest), int(self.sizes[i]))
            self._scan(i, smallest, place)
            return
        inner = np.arange(total) - np.repeat(np.cumsum(count) - count, count)
        entries = np.repeat(self.begin[wanted], count) + inner
        rooms = np.repeat(self.sizes[i] - self.alone[i] - np.arange(len(wanted)), count)
        self._compare(i, entries[:_FEW], rooms[:_FEW])
        if total > _FEW:
            self._compare(i, entries[_FEW:], rooms[_FEW:])

    def _compare(self, i: int, entries: np.ndarray, room: np.ndarray | int) -> None:
        """Join set i with the similar sets among entries of the index; `room` counts its elements from there on."""
        label, size = self.clusters.label, int(self.sizes[i])
        others = self.held_by[entries]
        new = np.flatnonzero((label[others] != label[i]) & (self.compared_by[others] != i))
        if not len(new):
            return
        others, room = others[new], np.minimum(self.room[entries[new]], room if isinstance(room, int) else room[new])
        sizes = self.sizes[others]
        needed = self.threshold * (size + sizes) / (1 + self.threshold) - 1e-6
        new = (room >= needed) & (sizes >= self.threshold * size - 1e-6)
        self._count(i, others[new])

    def _scan(self, i: int, smallest: int, place: int) -> None:
        """Join set i with the similar sets among places `smallest` to `place` of the order."""
        label = self.clusters.label
        # Most of the earlier sets may be of this one's cluster already; only the others are compared.
        apart = smallest + np.flatnonzero(label[self.order[smallest:place]] != label[i])
        if _FEW * len(apart) < place - smallest:
            odd = self.bits.odd_of(place, apart)
        else:
            odd = self.bits.odd(place, smallest, place)[apart - smallest]
        others = self.order[apart[odd <= self.granted[apart] + (self.granted[place] + 1)]]
        self._count(i, others[self.compared_by[others] != i])

    def _count(self, i: int, others: np.ndarray) -> None:
        """Join set i with the similar sets among `others`, which are in other clusters, by counting common elements."""
        label, size, place = self.clusters.label, int(self.sizes[i]), int(self.place[i])
        if not len(others):
            return
        places = self.place[others]
        odd = self.bits.odd_of(place, places)
        others = np.unique(others[odd <= self.granted[places] + (self.granted[place] + 1)])
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
        """Return how many elements each of `others` shares with the set whose elements are marked in `is_mine`."""
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
