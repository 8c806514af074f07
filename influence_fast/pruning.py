"""Which examples to drop: selection strategies over a table of scores.

A strategy is one small class with a `drop_first` method and one `@register` line. `drop_first` gives each example a
number; examples with the highest numbers are dropped. Ties are broken by a seeded shuffle, never by the data's order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from influence_fast.errors import ConfigError, DataError, did_you_mean, listing
from influence_fast.schemas import Example
from influence_fast.scores import ScoreTable


class Strategy(Protocol):
    """What `register` takes."""

    needs: tuple[str, ...]  # columns of the table it reads

    def drop_first(self, table: ScoreTable, rng: np.random.Generator) -> np.ndarray:
        """[N] float64, higher = dropped sooner."""
        ...


STRATEGIES: dict[str, Strategy] = {}


def register(name: str) -> Callable[[type], type]:
    """Adds a strategy class under `name`, for `select`, the command line and configurations alike."""

    def add(kind: type) -> type:
        STRATEGIES[name] = kind()
        return kind

    return add


@dataclass(frozen=True)
class Selection:
    """The outcome: `keep` and `drop` are row numbers in the table's order, ascending."""

    strategy: str
    keep: np.ndarray  # [N - n] int64
    drop: np.ndarray  # [n] int64
    priority: np.ndarray  # [N] float64, what the strategy gave each example

    def kept_examples(self, table: ScoreTable, examples: Sequence[Example]) -> list[Example]:
        """The examples to keep, in their own order. Raises DataError where ids and table do not match."""
        kept = {table.ids[i] for i in self.keep}
        known = {example.id for example in examples}
        missing = [name for name in table.ids if name not in known]
        if missing:
            raise DataError(
                f"the score table has ids that the data does not: {listing(missing)}; give the data that was scored, "
                "read with the same options"
            )
        return [example for example in examples if example.id in kept]


def select(
    table: ScoreTable,
    strategy: str,
    *,
    fraction: float | None = None,
    count: int | None = None,
    seed: int = 0,
) -> Selection:
    """Drops `fraction` of the examples (rounded to the nearest whole one), or exactly `count` of them.

    Raises ConfigError for an unknown strategy or an impossible size, DataError where the table lacks the scores
    that the strategy reads.
    """
    if strategy not in STRATEGIES:
        raise ConfigError(f"unknown strategy {strategy!r}; {did_you_mean(strategy, STRATEGIES)}")
    if (fraction is None) == (count is None):
        raise ConfigError("give either a fraction or a count of examples to drop")
    total = len(table.ids)
    if fraction is not None:
        if not 0 <= fraction <= 1:
            raise ConfigError(f"fraction {fraction} is not between 0 and 1")
        count = math.floor(fraction * total + 0.5)
    assert count is not None
    if not 0 <= count < total:
        raise ConfigError(f"dropping {count} of {total} examples would leave none: choose a smaller fraction")
    chosen = STRATEGIES[strategy]
    missing = [name for name in chosen.needs if name not in table.columns]
    if missing:
        raise DataError(
            f"strategy {strategy!r} needs the score {missing[0]!r}, which this table does not have "
            f"(it has {', '.join(table.columns)})"
        )
    rng = np.random.default_rng(seed)
    priority = np.asarray(chosen.drop_first(table, rng), dtype=np.float64)
    # lexsort's last key is the first to count: by priority, then by the shuffle
    order = np.lexsort((rng.permutation(total), -priority))
    return Selection(strategy, np.sort(order[count:]), np.sort(order[:count]), priority)


def selection_table(table: ScoreTable, selection: Selection) -> ScoreTable:
    """`table` with what became of each example: `kept` (1 or 0) and the strategy's `drop_priority`."""
    kept = np.zeros(len(table.ids))
    kept[selection.keep] = 1
    return table.with_columns({"kept": kept, "drop_priority": selection.priority})


@register("full")
class Full:
    """The baseline that drops nothing; it is run once, at fraction 0."""

    needs: tuple[str, ...] = ()

    def drop_first(self, table: ScoreTable, rng: np.random.Generator) -> np.ndarray:
        return np.zeros(len(table.ids))


@register("random")
class Random:
    """A uniformly random choice."""

    needs: tuple[str, ...] = ()

    def drop_first(self, table: ScoreTable, rng: np.random.Generator) -> np.ndarray:
        return rng.random(len(table.ids))


@register("low_benefit")
class LowBenefit:
    """Lowest mean influence on correct answers first."""

    needs: tuple[str, ...] = ("s_correct",)

    def drop_first(self, table: ScoreTable, rng: np.random.Generator) -> np.ndarray:
        return -table.columns["s_correct"]


@register("high_harm")
class HighHarm:
    """Highest mean influence on incorrect answers first."""

    needs: tuple[str, ...] = ("s_incorrect",)

    def drop_first(self, table: ScoreTable, rng: np.random.Generator) -> np.ndarray:
        return table.columns["s_incorrect"]


@register("combined")
class Combined:
    """Low benefit and high harm together, by the ranks of the two means (the paper's best)."""

    needs: tuple[str, ...] = ("rank_correct", "rank_incorrect")

    def drop_first(self, table: ScoreTable, rng: np.random.Generator) -> np.ndarray:
        return table.columns["rank_incorrect"] - table.columns["rank_correct"]


@register("combined_mean_rank")
class CombinedMeanRank:
    """As `combined`, by the means of the per-query ranks: no single query can dominate."""

    needs: tuple[str, ...] = ("mean_rank_correct", "mean_rank_incorrect")

    def drop_first(self, table: ScoreTable, rng: np.random.Generator) -> np.ndarray:
        return table.columns["mean_rank_incorrect"] - table.columns["mean_rank_correct"]


@register("perplexity_high")
class PerplexityHigh:
    """Drops what the fine-tuned model finds hardest to predict."""

    needs: tuple[str, ...] = ("loss",)

    def drop_first(self, table: ScoreTable, rng: np.random.Generator) -> np.ndarray:
        return table.columns["loss"]


@register("perplexity_low")
class PerplexityLow:
    """Drops what the fine-tuned model predicts best."""

    needs: tuple[str, ...] = ("loss",)

    def drop_first(self, table: ScoreTable, rng: np.random.Generator) -> np.ndarray:
        return -table.columns["loss"]


@register("perplexity_mid")
class PerplexityMid:
    """Keeps the middle: drops the losses furthest from the median rank."""

    needs: tuple[str, ...] = ("loss",)

    def drop_first(self, table: ScoreTable, rng: np.random.Generator) -> np.ndarray:
        ranks = np.argsort(np.argsort(table.columns["loss"], kind="stable"), kind="stable")
        return np.abs(ranks - (len(ranks) - 1) / 2)


@register("short")
class Short:
    """Drops the shortest completions first (the `length` baseline)."""

    needs: tuple[str, ...] = ("tokens",)

    def drop_first(self, table: ScoreTable, rng: np.random.Generator) -> np.ndarray:
        return -table.columns["tokens"]
