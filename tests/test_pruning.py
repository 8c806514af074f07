"""Selection strategies: what is dropped, how ties fall, and what cannot be asked."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from influence_fast.data import Example
from influence_fast.errors import ConfigError, DataError
from influence_fast.pruning import STRATEGIES, select, selection_table
from influence_fast.scores import ScoreTable


def table(n: int = 20, seed: int = 0) -> ScoreTable:
    rng = np.random.default_rng(seed)
    names = ("s_correct", "s_incorrect", "loss", "tokens")
    columns = {name: rng.standard_normal(n) for name in names}
    for side in ("correct", "incorrect"):
        columns[f"rank_{side}"] = np.argsort(np.argsort(columns[f"s_{side}"])) + 1.0
        columns[f"mean_rank_{side}"] = columns[f"rank_{side}"] + rng.random(n)
    return ScoreTable([f"d{i}" for i in range(n)], columns)


@pytest.mark.parametrize("strategy", sorted(STRATEGIES))
@pytest.mark.parametrize("fraction", [0.1, 0.5])
def test_keep_and_drop_part_the_examples(strategy: str, fraction: float) -> None:
    selection = select(table(), strategy, fraction=fraction)
    assert len(selection.drop) == round(20 * fraction)
    assert sorted([*selection.keep, *selection.drop]) == list(range(20))
    assert selection.priority[selection.drop].min() >= selection.priority[selection.keep].max()


def test_each_strategy_drops_what_its_name_says() -> None:
    scores = table()

    def lowest(name: str) -> set[int]:
        return set(np.argsort(scores.columns[name])[:4])

    def highest(name: str) -> set[int]:
        return set(np.argsort(-scores.columns[name])[:4])

    assert set(select(scores, "low_benefit", count=4).drop) == lowest("s_correct")
    assert set(select(scores, "high_harm", count=4).drop) == highest("s_incorrect")
    assert set(select(scores, "perplexity_high", count=4).drop) == highest("loss")
    assert set(select(scores, "perplexity_low", count=4).drop) == lowest("loss")
    by_loss = np.argsort(scores.columns["loss"])
    assert set(select(scores, "perplexity_mid", count=4).drop) == {*by_loss[:2], *by_loss[-2:]}
    assert set(select(scores, "short", count=4).drop) == lowest("tokens")
    combined = scores.columns["rank_incorrect"] - scores.columns["rank_correct"]
    dropped = select(scores, "combined", count=4).drop
    assert combined[dropped].min() >= np.delete(combined, dropped).max()


def test_random_depends_on_the_seed_alone() -> None:
    first, again, other = (select(table(), "random", fraction=0.5, seed=s).drop for s in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_ties_fall_by_the_seed_not_by_order() -> None:
    flat = ScoreTable([f"d{i}" for i in range(100)], {"s_correct": np.zeros(100)})
    dropped = [select(flat, "low_benefit", count=50, seed=s).drop for s in range(40)]
    share = np.mean([np.isin(np.arange(100), d) for d in dropped], axis=0)
    assert share.min() > 0.1
    assert share.max() < 0.9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strategy": "combinde", "fraction": 0.1}, "did you mean 'combined'"),
        ({"strategy": "random", "fraction": 1.0}, "would leave none"),
        ({"strategy": "random", "count": 20}, "would leave none"),
        ({"strategy": "random", "fraction": -0.1}, "not between 0 and 1"),
        ({"strategy": "random"}, "either a fraction or a count"),
        ({"strategy": "random", "fraction": 0.1, "count": 2}, "either a fraction or a count"),
    ],
)
def test_impossible_selections_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        select(table(), **arguments)


def test_missing_scores_are_named() -> None:
    bare = ScoreTable(["a", "b"], {"s_correct": np.zeros(2)})
    with pytest.raises(DataError, match="'high_harm' needs the score 's_incorrect'"):
        select(bare, "high_harm", count=1)


def test_kept_examples_must_be_the_scored_ones() -> None:
    scores = table(4)
    examples = [Example(id=f"d{i}", prompt="p", completion="c") for i in range(4)]
    selection = select(scores, "low_benefit", count=2)
    kept = selection.kept_examples(scores, examples)
    assert [e.id for e in kept] == [scores.ids[i] for i in selection.keep]
    with pytest.raises(DataError, match="d3"):
        selection.kept_examples(scores, examples[:3])


@pytest.mark.parametrize("suffix", [".parquet", ".csv"])
def test_tables_survive_the_disk(tmp_path: Path, suffix: str) -> None:
    scores = table()
    scores = ScoreTable(["007", *scores.ids[1:]], scores.columns)  # an id that looks like a number stays text
    written = selection_table(scores, select(scores, "combined", fraction=0.5))
    written.save(tmp_path / f"t{suffix}")
    read = ScoreTable.load(tmp_path / f"t{suffix}")
    assert read.ids == written.ids
    assert read.columns.keys() == written.columns.keys()
    for name, column in written.columns.items():
        np.testing.assert_array_equal(read.columns[name], column)
    assert [p.name for p in tmp_path.iterdir()] == [f"t{suffix}"]
    with pytest.raises(DataError, match="no such score table"):
        ScoreTable.load(tmp_path / "absent.csv")
