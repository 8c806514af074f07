"""Which examples to drop: a strategy's order over a table of scores, and what must go whatever the strategy says."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np

from influence_fast.data.fingerprints import text_fingerprint
from influence_fast.data.schemas import Example
from influence_fast.deprecation import OldCall, also_called_as
from influence_fast.errors import ConfigError, DataError, setting, shown, truncated_list
from influence_fast.influence.scores import FINGERPRINT, ScoreTable
from influence_fast.selection.strategies import STRATEGIES, check_columns, find
from influence_fast.settings import check_seed

__all__ = [
    "STRATEGIES", "Clusters", "Selection", "aligned_examples", "save_selection", "select", "selection_table",
    "with_fingerprints",
]  # fmt: skip


@dataclass(frozen=True)
class Selection:
    """The outcome: `keep` and `drop` are row numbers in the table's order, ascending.

    `why` says of each example "kept" or "dropped: " and the reason. `forced` of the dropped had to go whatever the
    strategy: they may be more than were asked for.
    """

    strategy: str
    keep: np.ndarray  # [N - n] int64
    drop: np.ndarray  # [n] int64
    priority: np.ndarray  # [N] float64, what the strategy gave each example
    why: tuple[str, ...]  # N
    forced: int = 0

    def kept_examples(self, table: ScoreTable, examples: Sequence[Example]) -> list[Example]:
        """Return the examples to keep, in their own order. Raises DataError where they are not those of the table."""
        aligned_examples(table, examples)
        kept = {table.ids[i] for i in self.keep}
        return [example for example in examples if example.id in kept]


@dataclass(frozen=True)
class Clusters:
    """A cluster number for each example (see `diversity.near_duplicates`), of each of which `keep` stay at most."""

    numbers: Sequence[int] | np.ndarray
    keep: int = 1


def _with_clusters(values: dict[str, Any]) -> dict[str, Any]:
    """Translate `select(..., clusters=numbers, keep_similar=2)`."""
    keep, numbers = values.pop("keep_similar"), values.pop("clusters", None)
    return values | {"clusters": None if numbers is None else Clusters(numbers, keep)}


@also_called_as(
    OldCall(
        positional=("table", "strategy"),
        keywords=("fraction", "count", "seed", "groups", "clusters", "keep_similar", "exclude"),
        marks=("keep_similar",),
        translate=_with_clusters,
        instead="select(..., clusters=Clusters(numbers, keep=...)), from influence_fast.selection.pruning",
    )
)
def select(
    table: ScoreTable,
    strategy: str,
    *,
    fraction: float | None = None,
    count: int | None = None,
    seed: int = 0,
    groups: Sequence[str] | None = None,
    clusters: Sequence[int] | np.ndarray | Clusters | None = None,
    exclude: Mapping[str, str] | None = None,
) -> Selection:
    """Drop `fraction` of the examples (rounded to the nearest whole one), or exactly `count` of them.

    Args:
        table: scores of N examples.
        strategy: a name in `STRATEGIES`.
        fraction: share to drop, 0 to 1.
        count: number to drop, instead of a fraction.
        seed: breaks ties, and makes the choice of `random`.
        groups: a name for each example (its task, say): the fraction is dropped inside each group, of which at least
            one example stays.
        clusters: a cluster number for each example (see `diversity.near_duplicates`): of each cluster only the example
            that the strategy would drop last stays, or `keep` of them where the numbers are given as `Clusters`.
        exclude: id -> reason of examples that must go (see `decontamination`).

    Examples that must go (excluded ones and near-duplicates) are dropped first and count towards the size, so
    strategies are compared at one size; where there are more of them than that, all of them go.

    Returns:
        What is kept and dropped, and why.

    Raises:
        ConfigError: an unknown strategy or an impossible size.
        DataError: the table lacks the scores that the strategy reads, or nothing would be left.

    Example:
        >>> table = inf.ScoreTable(["a", "b", "c"], {"s_correct": np.array([0.2, -0.1, 0.3])})
        >>> selection = inf.select(table, "low_benefit", count=1)
        >>> [table.ids[i] for i in selection.keep]
        ['a', 'c']
    """
    chosen = find(strategy)
    total = len(table.ids)
    count = _count(total, fraction, count, grouped=groups is not None)
    check_columns(table, strategy)
    check_seed("seed", seed)
    if exclude is not None and not isinstance(exclude, Mapping):
        raise DataError(f"exclude is {shown(exclude)}; give reasons by id")
    rng = np.random.default_rng(int(seed))
    if strategy == "full" and count:
        raise ConfigError("the strategy 'full' drops nothing: name another one, or a fraction of 0")
    priority = np.asarray(chosen.drop_first(table, rng), dtype=np.float64)
    unknown = np.flatnonzero(np.isnan(priority))
    if len(unknown):
        raise DataError(
            f"strategy {strategy!r} has no number for {truncated_list(table.ids[i] for i in unknown)} "
            f"(NaN in {', '.join(chosen.needs)}): score the data again"
        )
    # lexsort's last key is the first to count: by priority, then by the shuffle
    order = np.lexsort((rng.permutation(total), -priority))
    forced = _forced(table, order, clusters, exclude or {})
    if groups is None:
        dropped = _first_dropped(order, count, forced, strategy)
    else:
        dropped = {}
        names = _of_each(groups, total, "groups")
        for name in dict.fromkeys(names.tolist()):
            members = order[names[order] == name]
            wanted = min(_rounded(fraction or 0.0, len(members)), len(members) - 1)
            dropped |= _first_dropped(members, wanted, forced, strategy, f" in {str(name)!r}")
    if len(dropped) == total:
        raise DataError("nothing would be left: every example is excluded or in a group that is")
    drop = np.array(sorted(dropped), dtype=np.int64)
    why = tuple(dropped.get(i, "kept") for i in range(total))
    return Selection(strategy, np.setdiff1d(np.arange(total), drop), drop, priority, why, len(forced))


def _forced(
    table: ScoreTable,
    order: np.ndarray,
    clusters: Sequence[int] | np.ndarray | Clusters | None,
    exclude: Mapping[str, str],
) -> dict[int, str]:
    """Return row -> reason of the examples that must go; `order` begins with what the strategy drops first."""
    forced = {i: exclude[name] for i, name in enumerate(table.ids) if name in exclude}
    if clusters is None:
        return forced
    asked = clusters if isinstance(clusters, Clusters) else Clusters(clusters)
    numbers = _of_each(asked.numbers, len(table.ids), "clusters")
    if not np.issubdtype(numbers.dtype, np.integer):
        raise DataError(f"clusters are {numbers.dtype}; give a cluster's whole number for each row of the table")
    return forced | _near_duplicates(table, order, numbers, asked.keep, forced)


def _first_dropped(
    ordered: np.ndarray, wanted: int, forced: Mapping[int, str], strategy: str, inside: str = ""
) -> dict[int, str]:
    """Return row -> why it is dropped, of `wanted` rows or all that are forced: these first, then in order."""
    rows = ordered.tolist()
    first = [i for i in rows if i in forced]
    gone = (first + [i for i in rows if i not in forced])[: max(wanted, len(first))]
    place = {i: rank for rank, i in enumerate(rows, 1)}
    return {i: f"dropped: {forced.get(i) or f'{strategy} rank {place[i]} of {len(rows)}{inside}'}" for i in gone}


def selection_table(table: ScoreTable, selection: Selection) -> ScoreTable:
    """Return `table` with what became of each example: `kept` (1 or 0), the strategy's `drop_priority`, and `why`."""
    kept = np.zeros(len(table.ids))
    kept[selection.keep] = 1
    return table.with_columns({"kept": kept, "drop_priority": selection.priority}, texts={"why": list(selection.why)})


def save_selection(table: ScoreTable, selection: Selection, output: str | Path) -> None:
    """Write the `selection_table` beside the pruned data `output`, as `<output>.table.parquet` and `.table.csv`."""
    result = selection_table(table, selection)
    for suffix in (".parquet", ".csv"):
        result.save(f"{output}.table{suffix}")


def aligned_examples(table: ScoreTable, examples: Sequence[Example]) -> list[Example]:
    """Return the example of each row of `table`.

    Raises DataError naming the ids that `examples` do not have, and those of other text than what was scored, where the
    table has fingerprints: rows without ids are named by their places, which say nothing of what stands there.
    """
    known = {example.id: example for example in examples}
    missing = [name for name in table.ids if name not in known]
    if missing:
        raise DataError(
            f"the score table has ids that the data does not: {truncated_list(missing)}; give the data that was "
            "scored, read with the same options"
        )
    aligned = [known[name] for name in table.ids]
    scored = table.texts.get(FINGERPRINT, [])  # a row without one is of a table made by hand
    changed = [e.id for e, found in zip(aligned, scored, strict=False) if found and found != text_fingerprint(e)]
    if changed:
        raise DataError(
            f"the data is not what was scored: {len(changed)} of {len(aligned)} examples have other text under the "
            f"same id or place ({truncated_list(changed)}); give the data that was scored, read with the same options, "
            "or score this data"
        )
    return aligned


def with_fingerprints(table: ScoreTable, examples: Sequence[Example]) -> ScoreTable:
    """Return `table` with the fingerprint of each row's example, which may come in any order and be more."""
    known = {example.id: example for example in examples}
    return table.with_columns({}, texts={FINGERPRINT: [text_fingerprint(known[name]) for name in table.ids]})


def _count(total: int, fraction: float | None, count: int | None, *, grouped: bool) -> int:
    if (fraction is None) == (count is None):
        raise ConfigError("give either a fraction or a count of examples to drop")
    if fraction is not None:
        if not isinstance(fraction, Real) or not 0 <= fraction <= 1:
            raise ConfigError(f"{setting('fraction')} {shown(fraction)} is not between 0 and 1")
        count = _rounded(fraction, total)
    elif grouped:
        raise ConfigError("a count cannot be shared out over groups: give a fraction")
    assert count is not None
    if not isinstance(count, Integral):
        raise ConfigError(f"{setting('count')} is {shown(count)}; give a whole number of examples to drop")
    if not 0 <= count < total:
        size = "count" if fraction is None else "fraction"
        raise ConfigError(f"dropping {count} of {total} examples would leave none: choose a smaller {size}")
    return count


def _rounded(fraction: float, total: int) -> int:
    return math.floor(fraction * total + 0.5)


def _of_each(values: Sequence[object] | np.ndarray, total: int, what: str) -> np.ndarray:
    array = np.asarray(values)
    if array.shape != (total,):
        count = f"{len(array)} entries" if array.ndim == 1 else f"the shape {array.shape}"
        raise DataError(f"{what} has {count} for {total} examples; give one for each row of the table")
    return array


def _near_duplicates(
    table: ScoreTable, order: np.ndarray, clusters: np.ndarray, keep: int, excluded: Mapping[int, str]
) -> dict[int, str]:
    """Return row -> reason of all but the best `keep` of each cluster; `order` begins with what is dropped first."""
    if keep < 1:
        raise ConfigError(f"Clusters.keep is {keep}; at least one of a cluster of near-duplicates stays")
    stay: dict[int, list[int]] = {}
    gone = {}
    for i in order[::-1].tolist():
        if i in excluded:
            continue
        best = stay.setdefault(int(clusters[i]), [])
        if len(best) < keep:
            best.append(i)
        else:
            gone[i] = f"near-duplicate of {table.ids[best[0]]}"
    return gone
