"""Seconds and memory of `near_duplicates` over synthetic traces, one kind of text after another.

    python -m benches.near_duplicates --kinds random templated --count 100000
    python -m benches.near_duplicates --kinds short edited --check 5000

Nothing is written. `--check` compares the clusters with those of all pairs of sets of word runs, whose common runs
are counted one by one.
"""

from __future__ import annotations

import argparse
import resource
import threading
import time
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from influence_fast.data.diversity import near_duplicates
from influence_fast.data.ngrams import words

LEAD_IN = (
    "let me think about this problem step by step first i read the question again with care and then i write down "
    "what is given and asked"
)
VOCABULARY = 20_000
SLOTS = 12


def random_texts(rng: np.random.Generator, count: int) -> Iterator[str]:
    """100 to 300 words each, drawn evenly from 20,000."""
    for _ in range(count):
        yield " ".join(f"w{v}" for v in rng.integers(0, VOCABULARY, rng.integers(100, 301)))


def templated_texts(rng: np.random.Generator, count: int) -> Iterator[str]:
    """The same 27 words, then random ones up to 100 to 300."""
    for _ in range(count):
        yield f"{LEAD_IN} " + " ".join(f"w{v}" for v in rng.integers(0, VOCABULARY, rng.integers(73, 274)))


def short_texts(rng: np.random.Generator, count: int) -> Iterator[str]:
    """The same 27 words, then 1 to 12: most of a trace is shared, and one fourth make one cluster at 0.8."""
    for _ in range(count):
        yield f"{LEAD_IN} " + " ".join(f"w{v}" for v in rng.integers(0, VOCABULARY, rng.integers(1, 13)))


def common_texts(rng: np.random.Generator, count: int) -> Iterator[str]:
    """The same 27 words, then 1 to 40 of a vocabulary of 40."""
    for _ in range(count):
        yield f"{LEAD_IN} " + " ".join(f"w{v}" for v in rng.integers(0, 40, rng.integers(1, 41)))


def filled_texts(rng: np.random.Generator, count: int) -> Iterator[str]:
    """One form of 160 words with 12 blanks, each filled with one of 50 numbers."""
    form = [f"f{v}" for v in range(160)]
    places = np.linspace(3, 156, SLOTS).astype(int)
    for _ in range(count):
        row = list(form)
        for place, number in zip(places, rng.integers(0, 50, SLOTS), strict=True):
            row[place] = str(number)
        yield " ".join(row)


def digit_texts(rng: np.random.Generator, count: int) -> Iterator[str]:
    """One form of 160 words with 12 blanks of ten values each: a tenth of all texts shares any one of them."""
    return _forms(rng, count, length=160, blanks=12, values=10, edits=0)


def edited_form_texts(rng: np.random.Generator, count: int) -> Iterator[str]:
    """The same form with 8 blanks of ten values, and one word of each text replaced by another."""
    return _forms(rng, count, length=160, blanks=8, values=10, edits=1)


def long_form_texts(rng: np.random.Generator, count: int) -> Iterator[str]:
    """One form of 600 words with 30 blanks of ten values each."""
    return _forms(rng, count, length=600, blanks=30, values=10, edits=0)


def _forms(rng: np.random.Generator, count: int, *, length: int, blanks: int, values: int, edits: int) -> Iterator[str]:
    form = [f"f{v}" for v in range(length)]
    places = np.linspace(3, length - 4, blanks).astype(int)
    for _ in range(count):
        row = list(form)
        for place, number in zip(places, rng.integers(0, values, blanks), strict=True):
            row[place] = str(number)
        for place in rng.integers(0, length, edits):
            row[place] = f"w{rng.integers(0, VOCABULARY)}"
        yield " ".join(row)


def middle_texts(rng: np.random.Generator, count: int) -> Iterator[str]:
    """The same 100 words, with two random ones at each end: all make one cluster at 0.8."""
    middle = " ".join(f"w{v}" for v in rng.integers(0, VOCABULARY, 100))
    for _ in range(count):
        a, b, c, d = (f"w{v}" for v in rng.integers(0, VOCABULARY, 4))
        yield f"{a} {b} {middle} {c} {d}"


def switched_texts(rng: np.random.Generator, count: int) -> Iterator[str]:
    """One form of 160 words with 16 blanks of two values each: chains of one change make it one cluster."""
    form = [f"f{v}" for v in range(160)]
    places = np.linspace(3, 156, 16).astype(int)
    for _ in range(count):
        row = list(form)
        for place, value in zip(places, rng.integers(0, 2, len(places)), strict=True):
            row[place] = "yes" if value else "no"
        yield " ".join(row)


def edited_texts(rng: np.random.Generator, count: int) -> Iterator[str]:
    """Templated and random texts, and copies of them with 0 to 12 words replaced, at similarities of 0.4 to 1."""
    bases = [*templated_texts(rng, count // 8), *random_texts(rng, count // 8)]
    yield from bases
    for i in range(count - len(bases)):
        row = bases[i % len(bases)].split()
        for place in rng.integers(0, len(row), rng.integers(0, 13)):
            row[place] = f"w{rng.integers(0, VOCABULARY)}"
        yield " ".join(row)


KINDS: dict[str, Callable[[np.random.Generator, int], Iterator[str]]] = {
    "random": random_texts,
    "templated": templated_texts,
    "short": short_texts,
    "common": common_texts,
    "filled": filled_texts,
    "digits": digit_texts,
    "edited-form": edited_form_texts,
    "long-form": long_form_texts,
    "middle": middle_texts,
    "switched": switched_texts,
    "edited": edited_texts,
}


def by_all_pairs(texts: Sequence[str], threshold: float, n: int = 8) -> np.ndarray:
    """[N] int64: the cluster of each text by comparing every two that share a run, without any filter."""
    sets = []
    for text in texts:
        row = words(text)
        k = min(n, len(row))
        sets.append({tuple(row[i : i + k]) for i in range(len(row) - k + 1)} if row else set())
    holders: dict[tuple[str, ...], array[int]] = defaultdict(lambda: array("q"))
    clusters = np.arange(len(texts))
    sizes = np.array([len(one) for one in sets])
    for i, mine in enumerate(sets):
        both = np.zeros(i, dtype=np.int64)
        for run in mine:
            both[np.frombuffer(holders[run], dtype=np.int64)] += 1
            holders[run].append(i)
        # the rounding that `near_duplicates` promises: 1e-9 keeps an exact ratio from being missed
        near = np.flatnonzero((both > 0) & (both >= threshold * (sizes[:i] + len(mine) - both) - 1e-9))
        for other in np.unique(clusters[near]):
            clusters[clusters == other] = clusters[i]
    return clusters


def same_partition(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two numberings put the same texts together."""
    pairs = len(np.unique(np.stack([a, b]), axis=1).T)
    return pairs == len(np.unique(a)) == len(np.unique(b))


def resident() -> float:
    """MB that the process holds in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6


class Peak:
    """The most memory held while it is entered, above what was held before, in MB; looked up every 20 ms."""

    def __enter__(self) -> Peak:
        self.before = self.most = resident()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.02):
            self.most = max(self.most, resident())

    @property
    def own(self) -> float:
        return self.most - self.before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--count", type=int, default=8000)
    parser.add_argument("--threshold", type=float, default=0.8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--check", type=int, metavar="N", help="take N texts, and compare the clusters")
    args = parser.parse_args()
    for kind in args.kinds:
        texts = list(KINDS[kind](np.random.default_rng(args.seed), args.check or args.count))
        start, cpu = time.perf_counter(), time.process_time()
        with Peak() as peak:
            clusters = near_duplicates(texts, args.threshold)
        line = f"{kind}: {len(texts):,} traces, {len(np.unique(clusters)):,} clusters at {args.threshold}"
        line += f", {time.perf_counter() - start:.1f} s ({time.process_time() - cpu:.1f} s of one core)"
        line += f", {peak.own:.0f} MB above the texts"
        if args.check:
            same = same_partition(clusters, by_all_pairs(texts, args.threshold))
            line += ", the clusters of all pairs" if same else ", NOT the clusters of all pairs"
        print(line, flush=True)


if __name__ == "__main__":
    main()
