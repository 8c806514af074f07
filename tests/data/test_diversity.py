"""Near-duplicates against all pairs compared one by one."""

from __future__ import annotations

import numpy as np
import pytest

from influence_fast.data.diversity import _shared_runs, near_duplicates
from influence_fast.data.ngrams import ngram_hashes, words
from influence_fast.errors import ConfigError


def by_all_pairs(texts: list[str], threshold: float, n: int) -> np.ndarray:
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
    assert np.array_equal(clusters[:, None] == clusters[None, :], by_all_pairs(texts, threshold, n))


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
