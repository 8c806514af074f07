"""Selection strategies: what each reads from a table of scores, and which examples it drops first.

A strategy is one small class with a `drop_first` method and one `@register` line. `drop_first` gives each example a
number; examples with the highest numbers are dropped. Ties are broken by `pruning.select`'s seeded shuffle, never by
the data's order.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Protocol

import numpy as np

from influence_fast.errors import ConfigError, DataError, did_you_mean
from influence_fast.influence.scores import ScoreTable

EMBEDDING_RANK = "embedding_rank"
PASS_RATE = "pass_rate"
BASE_LOSS = "base_loss"
_INFLUENCE = re.compile(r"(?:s|rank|mean_rank)_(.+)")  # columns of influence scores, by the group that they are of
BASELINE_COLUMNS = (EMBEDDING_RANK, PASS_RATE, BASE_LOSS)  # computed only where a strategy reads them


class Strategy(Protocol):
    """A class that `register` takes."""

    needs: tuple[str, ...]  # columns of the table it reads; `tasks = True` beside it: every task's score too

    def drop_first(self, table: ScoreTable, rng: np.random.Generator) -> np.ndarray:
        """Return [N] float64, higher = dropped sooner."""
        ...


STRATEGIES: dict[str, Strategy] = {}


def register(name: str) -> Callable[[type], type]:
    """Add a strategy class under `name`, for `select`, the command line and configurations alike."""

    def add(kind: type) -> type:
        STRATEGIES[name] = kind()
        return kind

    return add


def find(name: str) -> Strategy:
    """Return the strategy called `name`; raise ConfigError with the nearest name for an unknown one."""
    if name not in STRATEGIES:
        raise ConfigError(f"unknown strategy {name!r}; {did_you_mean(name, STRATEGIES)}")
    return STRATEGIES[name]


def needed_columns(names: Iterable[str]) -> set[str]:
    """Return all columns that the strategies called `names` read. Raises ConfigError for an unknown name."""
    return {column for name in names for column in find(name).needs}


def reads_influence(name: str) -> bool:
    """Return whether the strategy called `name` reads influence scores. Raises ConfigError for an unknown name."""
    return any(_INFLUENCE.fullmatch(column) for column in find(name).needs)


def reads_tasks(name: str) -> bool:
    """Return whether the strategy reads the scores of single tasks. Raises ConfigError for an unknown name."""
    groups = {found[1] for column in find(name).needs if (found := _INFLUENCE.fullmatch(column))}
    return bool(groups - {"correct", "incorrect", "contrast"}) or getattr(find(name), "tasks", False)


def check_columns(table: ScoreTable, name: str) -> None:
    """Raise DataError where `table` lacks a column that the strategy called `name` reads, saying how to compute it."""
    for column in find(name).needs:
        if column not in table.columns:
            raise DataError(
                f"strategy {name!r} needs the score {column!r}, which this table does not have "
                f"(it has {', '.join(table.columns)}): {_remedy(name, column)}"
            )


def _remedy(name: str, column: str) -> str:
    if column in BASELINE_COLUMNS:
        return f"'influence-fast score --strategies {name}' computes it, as does a run with {name!r} in its strategies"
    if column.endswith("_contrast"):
        return "it is made of right and wrong answers to the same questions, so score with queries: contrast"
    if column.endswith("_incorrect"):
        return "it is made of the model's own wrong answers, so score with queries: own_answers"
    if column.endswith("_correct"):
        return "score against a group named 'correct', as 'influence-fast score' does"
    return "'influence-fast score' computes it"


def _standardised(values: np.ndarray) -> np.ndarray:
    """Return values with mean 0 and standard deviation 1 (over the finite ones); zeros where all are equal."""
    finite = values[np.isfinite(values)]
    spread = float(finite.std()) if len(finite) else 0.0
    return np.zeros(len(values)) if spread == 0 else (values - finite.mean()) / spread


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


@register("contrast")
class Contrast:
    """Highest influence on wrong answers less that on right answers to the same questions first."""

    needs: tuple[str, ...] = ("s_contrast",)

    def drop_first(self, table: ScoreTable, rng: np.random.Generator) -> np.ndarray:
        return table.columns["s_contrast"]


@register("contrast_loss")
class ContrastLoss:
    """The contrast and the pretrained model's loss, each standardised, added: no weight is fitted on anything."""

    needs: tuple[str, ...] = ("s_contrast", BASE_LOSS)

    def drop_first(self, table: ScoreTable, rng: np.random.Generator) -> np.ndarray:
        return _standardised(table.columns["s_contrast"]) + _standardised(table.columns[BASE_LOSS])


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


@register("long")
class Long:
    """Drops the longest completions first."""

    needs: tuple[str, ...] = ("tokens",)

    def drop_first(self, table: ScoreTable, rng: np.random.Generator) -> np.ndarray:
        return table.columns["tokens"]


@register("less")
class Less:
    """Drops the lowest first by LESS's score: the highest of the mean influences on each task.

    Xia et al., "LESS: Selecting Influential Data for Targeted Instruction Tuning" (ICML 2024), section 4.2. Tasks
    are the table's groups other than `incorrect`: a column `s_<task>` each, beside `s_correct`, which is the mean
    over all tasks and so never above the highest of them. Without tasks it is `low_benefit`. LESS's influence is
    the cosine with what Adam makes of a training gradient: score with the preconditioner `less`.
    """

    needs: tuple[str, ...] = ("s_correct",)
    tasks = True  # and every task's column, whatever their names are

    def drop_first(self, table: ScoreTable, rng: np.random.Generator) -> np.ndarray:
        tasks = [
            c
            for name, c in table.columns.items()
            if name.startswith("s_") and name not in ("s_incorrect", "s_contrast")
        ]
        return -np.max(tasks, axis=0)


@register("embedding")
class Embedding:
    """RDS+: the later the queries take an example by turns, the sooner it is dropped (see `embeddings`)."""

    needs: tuple[str, ...] = (EMBEDDING_RANK,)

    def drop_first(self, table: ScoreTable, rng: np.random.Generator) -> np.ndarray:
        return table.columns[EMBEDDING_RANK]


@register("difficulty")
class Difficulty:
    """Keeps the middle: drops the pass rates furthest from one half, so always and never solved ones go first.

    As the dynamic sampling of DAPO (Yu et al. 2025), which leaves out questions of accuracy 0 and 1.
    """

    needs: tuple[str, ...] = (PASS_RATE,)

    def drop_first(self, table: ScoreTable, rng: np.random.Generator) -> np.ndarray:
        return np.abs(table.columns[PASS_RATE] - 0.5)


@register("easy")
class Easy:
    """Drops what the model already solves most often (the difficulty filter of LIMO and s1)."""

    needs: tuple[str, ...] = (PASS_RATE,)

    def drop_first(self, table: ScoreTable, rng: np.random.Generator) -> np.ndarray:
        return table.columns[PASS_RATE]


@register("hard")
class Hard:
    """Drops what the model solves least often."""

    needs: tuple[str, ...] = (PASS_RATE,)

    def drop_first(self, table: ScoreTable, rng: np.random.Generator) -> np.ndarray:
        return -table.columns[PASS_RATE]
