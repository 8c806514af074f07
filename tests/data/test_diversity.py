"""Near-duplicates against all pairs compared one by one."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from benches.near_duplicates import KINDS, by_all_pairs, same_partition
from influence_fast.data import diversity, similarity_join
from influence_fast.data.diversity import _shared_runs, near_duplicates
from influence_fast.data.ngrams import ngram_hashes, words
from influence_fast.data.parity_bits import ParityBits
from influence_fast.data.similarity_join import similar_sets
from influence_fast.errors import ConfigError
from influence_fast.progress import Told


def connected(texts: list[str], threshold: float, n: int) -> np.ndarray:
    """Which texts are connected: Jaccard of word n-gram sets, then the transitive closure."""
    sets = []
    for text in texts:
        row = text.lower().split()
        k = min(n, len(row))
        sets.append({tuple(row[i : i + k]) for i in range(len(row) - k + 1)})
    near = np.array([[len(a & b) >= threshold * len(a | b) for b in sets] for a in sets])
    for _ in texts:
        near = (near.astype(int) @ near.astype(int)) > 0
    return near


def variants(rng: np.random.Generator) -> list[str]:
    """Random texts, and copies of them with a few words changed, added or cut."""
    texts = []
    for _ in range(12):
        base = rng.integers(0, 30, rng.integers(3, 60)).tolist()
        for _ in range(rng.integers(1, 5)):
            row = list(base)
            for _ in range(rng.integers(0, 4)):
                row[rng.integers(0, len(row))] = int(rng.integers(0, 30))
            cut = int(rng.integers(0, 4))
            texts.append(" ".join(f"w{v}" for v in row[cut:] or row))
    return [texts[i] for i in rng.permutation(len(texts))]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(("threshold", "n"), [(0.3, 2), (0.5, 3), (0.8, 3), (1.0, 8)])
def test_clusters_are_those_of_all_pairs(seed: int, threshold: float, n: int) -> None:
    texts = variants(np.random.default_rng(seed))
    clusters = near_duplicates(texts, threshold, n=n)
    assert np.array_equal(clusters[:, None] == clusters[None, :], connected(texts, threshold, n))


@pytest.mark.parametrize("threshold", [0.4, 0.8])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "long-form"])
def test_templates_and_edits_give_the_clusters_of_all_pairs(kind: str, threshold: float) -> None:
    texts = list(KINDS[kind](np.random.default_rng(1), 120))
    assert same_partition(near_duplicates(texts, threshold), by_all_pairs(texts, threshold))


def planted(rng: np.random.Generator, size: int, both: int) -> list[list[int]]:
    """Two sets of `size` numbers of which `both` are common."""
    numbers = rng.choice(10**9, 2 * size - both, replace=False)
    return [numbers[:size].tolist(), numbers[size - both :].tolist()]


@pytest.mark.parametrize("threshold", [0.25, 1 / 3, 0.5, 0.8, 0.9, 1.0])
def test_pairs_just_at_and_just_below_the_threshold_are_told_apart(threshold: float) -> None:
    rng = np.random.default_rng(2)
    sets: list[list[int]] = []
    near = []
    for size in (1, 2, 3, 9, 45, 180, 900):
        least = next(both for both in range(1, size + 1) if both >= threshold * (2 * size - both) - 1e-9)
        for both in (least, least - 1):
            sets += planted(rng, size, both)
            near.append(both == least and both < size)
    sets = [one if one not in sets[:i] else [-i - 1] for i, one in enumerate(sets)]  # equal ones are not for the join
    labels = similar_sets([len(one) for one in sets], [_hashes(one) for one in sets], threshold)
    assert (labels[::2] == labels[1::2]).tolist() == near


def _hashes(numbers: list[int]) -> np.ndarray:
    return np.unique(np.array(numbers, dtype=np.int64).astype(np.uint64))


def test_sets_alike_but_not_similar_join_when_another_joins_one_of_them() -> None:
    """Three sets share 8 of 11 elements and are similar to none of them at 0.6, but to the 8 alone."""
    common = list(range(8))
    sets = [common, *([*common, *range(a, a + 3)] for a in (100, 200, 300)), [500, 501]]
    shared = [_hashes(common)] * 4 + [_hashes([500])]
    sizes = [len(one) for one in sets]
    assert len(set(similar_sets(sizes[1:], shared[1:], 0.6).tolist())) == 4
    labels = similar_sets(sizes, shared, 0.6)
    assert (labels == labels[0]).tolist() == [True] * 4 + [False]


@pytest.mark.parametrize("kind", ["short", "filled", "digits", "edited-form", "switched"])
def test_a_common_lead_in_costs_few_comparisons(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the half million pairs of 1,000 traces, few get past the filters."""
    compared = 0
    count = similarity_join._Join._common

    def counted(self: similarity_join._Join, others: np.ndarray) -> np.ndarray:
        nonlocal compared
        compared += len(others)
        return count(self, others)

    monkeypatch.setattr(similarity_join._Join, "_common", counted)
    near_duplicates(list(KINDS[kind](np.random.default_rng(0), 1000)), 0.8)
    assert compared < 15_000


def test_a_common_middle_leaves_few_sets_to_look_at(monkeypatch: pytest.MonkeyPatch) -> None:
    rng, count = np.random.default_rng(0), 1500
    middle = " ".join(f"m{i}" for i in range(100))
    ends = [[" ".join(f"w{v}" for v in rng.integers(0, 400, 2)) for _ in range(2)] for _ in range(count)]
    looked_at = 0
    plain = similarity_join._Join._count

    def counted(self: similarity_join._Join, i: int, others: np.ndarray) -> None:
        nonlocal looked_at
        looked_at += len(others)
        plain(self, i, others)

    monkeypatch.setattr(similarity_join._Join, "_count", counted)
    found = near_duplicates([f"{first} {middle} {last}" for first, last in ends], 0.8, progress=False)
    assert len(set(found.tolist())) == 1
    assert looked_at < 200 * count


def test_clusters_do_not_depend_on_how_much_is_done_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [text for kind in ("short", "switched", "edited") for text in KINDS[kind](np.random.default_rng(3), 60)]
    whole = near_duplicates(texts, 0.7)
    monkeypatch.setattr(similarity_join, "_AT_ONCE", 5)
    monkeypatch.setattr(similarity_join, "_FEW", 2)
    monkeypatch.setattr(similarity_join, "_FIRST_BATCH", 1)
    monkeypatch.setattr(diversity, "_KEPT", 1000)
    assert same_partition(near_duplicates(texts, 0.7), whole)


@pytest.mark.parametrize("words", [512, 40])
@pytest.mark.parametrize("threshold", [0.3, 0.8, 1.0])
def test_reading_the_bits_of_all_sets_finds_the_same_clusters(
    threshold: float, words: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    scans = 0
    scan = similarity_join._Join._scan

    def counted(self: similarity_join._Join, i: int, smallest: int, place: int) -> None:
        nonlocal scans
        scans += 1
        scan(self, i, smallest, place)

    monkeypatch.setattr(similarity_join._Join, "_scan", counted)
    for name, value in (("_AT_ONCE", 0), ("_FEW", 1), ("_LIST_COST", 1 << 40)):
        monkeypatch.setattr(similarity_join, name, value)
    for kind in ("digits", "switched", "edited", "edited-form"):
        texts = [text[: 9 * words] for text in KINDS[kind](np.random.default_rng(5), 90)]
        assert same_partition(near_duplicates(texts, threshold, n=3), by_all_pairs(texts, threshold, n=3))
    assert scans > 20


def test_bits_bound_how_many_elements_two_sets_differ_in(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    sets = [np.unique(rng.integers(0, 2000, rng.integers(1, 900))) for _ in range(40)]
    differing = np.array([len(np.setxor1d(sets[7], one)) for one in sets])
    bits = ParityBits(len(sets), 400)
    for place, one in enumerate(sets):
        bits.enter(place, one)
    whole = bits.odd_of(7, np.arange(len(sets)))
    assert (bits.odd(7, 0, len(sets)) <= whole).all()
    assert (whole <= differing).all()
    assert whole[7] == 0
    monkeypatch.delattr(np, "bitwise_count", raising=False)  # as NumPy 1 has it
    assert np.array_equal(bits.odd_of(7, np.arange(len(sets))), whole)


def test_long_work_tells_how_far_it_is_and_short_work_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    now = 0.0
    tell: Callable[[int], None] = Told("near-duplicates", clock=lambda: now).stage("compared", 40_000)
    for done, now in ((1, 0.0), (2, 9.0), (1000, 11.0), (1001, 12.0), (40_000, 75.0)):  # noqa: B007 -- the clock's
        tell(done)
    assert capsys.readouterr().err == (
        "near-duplicates: 1,000 of 40,000 compared, 0:00:11\nnear-duplicates: 40,000 of 40,000 compared, 0:01:15\n"
    )
    near_duplicates(["a b c", "a b d"], 0.5)
    assert capsys.readouterr().err == ""


def test_case_and_punctuation_do_not_count_and_empty_texts_stay_apart() -> None:
    clusters = near_duplicates(["The answer: 4.", "the ANSWER 4", "the answer 5", "...", "!!", ""], 0.9)
    assert clusters[0] == clusters[1]
    assert len(set(clusters.tolist())) == 5
    assert len(near_duplicates([], 0.9)) == 0


@pytest.mark.parametrize("threshold", [0.0, -1.0, 1.5])
def test_impossible_thresholds_are_refused(threshold: float) -> None:
    with pytest.raises(ConfigError, match="max_similar"):
        near_duplicates(["a"], threshold)


def test_hashes_tell_runs_apart() -> None:
    rng = np.random.default_rng(0)
    numbers = rng.integers(-1, 4, 5000)
    hashes = ngram_hashes(numbers, 5)
    runs = [tuple(numbers[i : i + 5]) for i in range(4996)]
    assert len(hashes) == 4996
    assert len(set(zip(runs, hashes.tolist(), strict=True))) == len(set(runs)) == len(set(hashes.tolist()))
    assert len(ngram_hashes(numbers[:4], 5)) == 0
    assert words("Ünïted_states: 3.5, $\\frac{1}{2}$") == ["ünïted", "states", "3", "5", "frac", "1", "2"]


def test_of_the_runs_all_that_are_shared_are_kept_and_few_others() -> None:
    """What the memory depends on: a long pool's runs are nearly all of one text alone."""
    rng = np.random.default_rng(0)
    both = [f"w{v}" for v in rng.integers(0, 500, 200)]
    texts = [" ".join([*both, *(f"w{v}" for v in rng.integers(0, 500, 1000))]) for _ in range(20)]
    alone = 0
    for text, found in zip(texts, _shared_runs(texts, 8), strict=True):
        numbers = np.array([int(word[1:]) for word in text.split()])
        assert found.size == len({tuple(numbers[i : i + 8]) for i in range(len(numbers) - 7)})
        assert len(found.shared) >= 193  # of 200 words that all texts begin with
        alone += len(found.shared) - 193
    assert alone < 0.3 * 20 * 1000
