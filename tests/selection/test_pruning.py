"""Selection strategies: what is dropped, how ties fall, and what cannot be asked."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from influence_fast.cli import main
from influence_fast.data.examples import Example, load_examples
from influence_fast.data.fingerprints import text_fingerprint
from influence_fast.errors import ConfigError, DataError
from influence_fast.influence.scores import ScoreTable
from influence_fast.selection.pruning import (
    STRATEGIES,
    Clusters,
    save_selection,
    select,
    selection_table,
    with_fingerprints,
)
from influence_fast.selection.strategies import needed_columns


def table(n: int = 20, seed: int = 0) -> ScoreTable:
    rng = np.random.default_rng(seed)
    names = ("s_correct", "s_incorrect", "s_contrast", "loss", "base_loss", "tokens")
    columns = {name: rng.standard_normal(n) for name in names}
    columns["s_algebra"], columns["s_number theory"] = rng.standard_normal((2, n))
    columns["embedding_rank"] = rng.permutation(n) + 1.0
    columns["pass_rate"] = rng.integers(0, 5, n) / 4
    for side in ("correct", "incorrect"):
        columns[f"rank_{side}"] = np.argsort(np.argsort(columns[f"s_{side}"])) + 1.0
        columns[f"mean_rank_{side}"] = columns[f"rank_{side}"] + rng.random(n)
    return ScoreTable([f"d{i}" for i in range(n)], columns)


@pytest.mark.parametrize("strategy", sorted(STRATEGIES.keys() - {"full"}))
@pytest.mark.parametrize("fraction", [0.1, 0.5])
def test_keep_and_drop_part_the_examples(strategy: str, fraction: float) -> None:
    selection = select(table(), strategy, fraction=fraction)
    assert len(selection.drop) == round(20 * fraction)
    assert sorted([*selection.keep, *selection.drop]) == list(range(20))
    assert selection.priority[selection.drop].min() >= selection.priority[selection.keep].max()


def test_full_drops_nothing() -> None:
    assert len(select(table(), "full", fraction=0.0).drop) == 0
    with pytest.raises(ConfigError, match="'full' drops nothing"):
        select(table(), "full", fraction=0.5)


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
    assert set(select(scores, "long", count=4).drop) == highest("tokens")
    assert set(select(scores, "embedding", count=4).drop) == highest("embedding_rank")
    combined = scores.columns["rank_incorrect"] - scores.columns["rank_correct"]
    dropped = select(scores, "combined", count=4).drop
    assert combined[dropped].min() >= np.delete(combined, dropped).max()


@pytest.mark.parametrize(("strategy", "stays"), [("easy", {0.0, 0.25}), ("hard", {0.75, 1.0}), ("difficulty", {0.5})])
def test_difficulty_filters_keep_their_part_of_the_pass_rates(strategy: str, stays: set[float]) -> None:
    scores = table(40)
    rates = scores.columns["pass_rate"]
    selection = select(scores, strategy, count=int((~np.isin(rates, list(stays))).sum()))
    assert set(rates[selection.keep]) == stays


def test_less_takes_the_best_of_the_tasks() -> None:
    scores = table()
    tasks = [scores.columns[f"s_{name}"] for name in ("algebra", "number theory", "correct")]
    selection = select(scores, "less", count=7)
    assert set(selection.drop) == set(np.argsort(np.max(tasks, axis=0))[:7])
    bare = ScoreTable(scores.ids, {name: scores.columns[name] for name in ("s_correct", "s_incorrect")})
    assert np.array_equal(select(bare, "less", count=7).drop, select(bare, "low_benefit", count=7).drop)


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
        ({"strategy": "random", "count": 2, "groups": ["a"] * 20}, "cannot be shared out over groups"),
        ({"strategy": "random", "count": 2, "clusters": Clusters([0] * 20, keep=0)}, "at least one of a cluster"),
    ],
)
def test_impossible_selections_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        select(table(), **arguments)


def test_missing_scores_are_named() -> None:
    bare = ScoreTable(["a", "b"], {"s_correct": np.zeros(2)})
    with pytest.raises(DataError, match="'high_harm' needs the score 's_incorrect'"):
        select(bare, "high_harm", count=1)
    with pytest.raises(DataError, match=r"'pass_rate'.*it has s_correct\).*'influence-fast score --strategies easy'"):
        select(bare, "easy", count=1)
    with pytest.raises(DataError, match="clusters has 3 entries for 2 examples"):
        select(bare, "low_benefit", count=1, clusters=[1, 2, 3])
    hole = ScoreTable(["a", "b"], {"s_correct": np.array([0.0, np.nan])})
    with pytest.raises(DataError, match=r"'low_benefit' has no number for b \(NaN in s_correct\)"):
        select(hole, "low_benefit", count=1)


def test_columns_that_strategies_need() -> None:
    assert needed_columns(["random", "combined", "easy"]) == {"rank_correct", "rank_incorrect", "pass_rate"}
    with pytest.raises(ConfigError, match="did you mean 'embedding'"):
        needed_columns(["embeding"])


# ---- what must go ------------------------------------------------------------------------------------------


def line(n: int) -> ScoreTable:
    """d0 is dropped first by `low_benefit`, then d1, ..."""
    return ScoreTable([f"d{i}" for i in range(n)], {"s_correct": np.arange(n, dtype=np.float64)})


def test_of_near_duplicates_the_best_stay() -> None:
    clusters = [0, 1, 0, 2, 0, 3, 1, 4]  # d0 d2 d4 and d1 d6 are alike
    selection = select(line(8), "low_benefit", count=4, clusters=clusters)
    assert selection.drop.tolist() == [0, 1, 2, 3]  # three of them near-duplicates, then the lowest score
    assert selection.why[2] == selection.why[0] == "dropped: near-duplicate of d4"
    assert selection.why[1] == "dropped: near-duplicate of d6"
    assert selection.why[3] == "dropped: low_benefit rank 4 of 8"
    assert selection.why[7] == "kept"
    # more of them than are to go: all go
    assert select(line(8), "low_benefit", count=1, clusters=clusters).drop.tolist() == [0, 1, 2]
    assert select(line(8), "low_benefit", count=1, clusters=Clusters(clusters, keep=2)).drop.tolist() == [0]


def test_keep_similar_still_works_and_says_what_replaces_it() -> None:
    clusters = [0, 1, 0, 2, 0, 3, 1, 4]
    with pytest.warns(DeprecationWarning, match=r"Clusters\(numbers, keep=...\)") as said:
        old = select(line(8), "low_benefit", count=1, clusters=clusters, keep_similar=2)  # type: ignore[call-arg]
    assert len(said) == 1
    assert said[0].filename == __file__
    assert old.drop.tolist() == [0]


@pytest.mark.parametrize("strategy", ["random", "combined", "embedding", "easy"])
def test_no_two_of_a_cluster_stay_whatever_the_strategy(strategy: str) -> None:
    clusters = np.random.default_rng(3).integers(0, 12, 40)
    selection = select(table(40), strategy, fraction=0.1, clusters=clusters)
    assert len(set(clusters[selection.keep])) == len(selection.keep) == len(set(clusters))


def test_excluded_examples_go_first_and_are_nobodys_best() -> None:
    selection = select(line(6), "low_benefit", count=2, exclude={"d5": "shares 8 words with test/17", "gone": "x"})
    assert (selection.forced, len(selection.drop)) == (1, 2)
    assert selection.drop.tolist() == [0, 5]
    assert selection.why[5] == "dropped: shares 8 words with test/17"
    both = select(line(6), "low_benefit", count=0, clusters=[0, 1, 2, 3, 4, 4], exclude={"d5": "x"})
    assert both.keep.tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(DataError, match="nothing would be left"):
        select(line(2), "low_benefit", count=0, exclude={"d0": "x", "d1": "x"})


def test_the_fraction_is_dropped_inside_each_group() -> None:
    groups = ["a"] * 10 + ["b"] * 4 + ["c"]
    selection = select(line(15), "low_benefit", fraction=0.5, groups=groups)
    assert selection.drop.tolist() == [0, 1, 2, 3, 4, 10, 11]  # the only one of c stays
    assert selection.why[11] == "dropped: low_benefit rank 2 of 4 in 'b'"
    assert np.array_equal(
        select(line(15), "low_benefit", fraction=0.5, groups=["all"] * 15).drop,
        select(line(15), "low_benefit", fraction=0.5).drop,
    )


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
        assert read.columns[name].dtype == np.float64
    assert read.texts == written.texts
    assert read.texts["why"].count("kept") == 10
    assert [p.name for p in tmp_path.iterdir()] == [f"t{suffix}"]
    with pytest.raises(DataError, match="no such score table"):
        ScoreTable.load(tmp_path / "absent.csv")


def test_the_selection_is_written_in_both_formats(tmp_path: Path) -> None:
    selection = select(table(), "combined", fraction=0.25)
    save_selection(table(), selection, tmp_path / "kept.jsonl")
    for suffix in ("csv", "parquet"):
        read = ScoreTable.load(tmp_path / f"kept.jsonl.table.{suffix}")
        assert read.texts["why"] == list(selection.why)
        assert np.flatnonzero(read.columns["kept"]).tolist() == selection.keep.tolist()


def test_a_table_of_other_things_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("id,when\na,2024-01-01\n")
    with pytest.raises(DataError, match="column 'when' holds date32"):
        ScoreTable.load(tmp_path / "t.csv")
    with pytest.raises(DataError, match="'why' has 1 rows for 2 examples"):
        ScoreTable(["a", "b"], texts={"why": ["x"]})


# ---- the data that was scored ------------------------------------------------------------------------------


def scored_file(folder: Path, rows: list[dict[str, str]], suffix: str) -> tuple[Path, Path]:
    """Data of these rows, and a table of them as `score` writes it."""
    data, scores = folder / "data.jsonl", folder / f"scores{suffix}"
    data.write_text("\n".join(map(json.dumps, rows)) + "\n")
    examples = load_examples(data)
    columns = {"s_correct": np.arange(len(rows), dtype=float)}
    with_fingerprints(ScoreTable([e.id for e in examples], columns), examples).save(scores)
    return data, scores


def prune(data: Path, scores: Path) -> int:
    command = ["prune", "--data", str(data), "--scores", str(scores), "--strategy", "low_benefit", "--count", "2"]
    return main([*command, "--output", str(data.with_name("kept.jsonl")), "--quiet"])


@pytest.mark.parametrize("suffix", [".parquet", ".csv"])
@pytest.mark.parametrize("ids", [False, True], ids=["places", "ids"])
@pytest.mark.parametrize("change", ["none", "reversed", "prompt", "completion"])
def test_data_of_other_text_than_was_scored_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], suffix: str, ids: bool, change: str
) -> None:
    rows = [{"prompt": f"p{i}", "completion": f"c{i}"} | ({"id": f"x{i}"} if ids else {}) for i in range(6)]
    data, scores = scored_file(tmp_path, rows, suffix)
    if change == "reversed":
        rows = rows[::-1]
    elif change != "none":
        rows[3] = rows[3] | {change: "other"}
    data.write_text("\n".join(map(json.dumps, rows)) + "\n")
    if change == "none" or (change == "reversed" and ids):
        assert prune(data, scores) == 0
        kept = [json.loads(line)["completion"] for line in (tmp_path / "kept.jsonl").read_text().splitlines()]
        assert sorted(kept) == ["c2", "c3", "c4", "c5"]
        assert "warning" not in capsys.readouterr().out
        return
    assert prune(data, scores) == 2
    error = capsys.readouterr().err
    assert f"{6 if change == 'reversed' else 1} of 6 examples have other text" in error
    if change != "reversed":
        assert f"({load_examples(data)[3].id})" in error
    assert not (tmp_path / "kept.jsonl").exists()


def test_a_table_without_fingerprints_prunes_with_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, scores = scored_file(tmp_path, [{"prompt": f"p{i}", "completion": "c"} for i in range(4)], ".csv")
    loaded = ScoreTable.load(scores)
    ScoreTable(loaded.ids, loaded.columns).save(scores)
    assert prune(data, scores) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    assert "scores.csv does not say which texts it is of" in line


def test_fingerprints_tell_turns_apart() -> None:
    examples = [
        Example("a", "p", "c"),
        Example("a", "pc", ""),
        Example("a", "p", "c", context=(("system", "s"),)),
        Example("a", "p", "c", context=(("user", "s"),)),
        Example("a", "p", "c", between=(("assistant", "s"),)),
    ]
    assert len({text_fingerprint(example) for example in examples}) == len(examples)
    assert text_fingerprint(examples[0]) == text_fingerprint(Example("b", "p", "c", row=4))
