"""Scores over the checkpoints of a training run, and how the ranking moved on the way.

    s(d) = sum_i eta_i s_i(d)        TracIn (Pruthi et al. 2020), LESS (Xia et al. 2024)

for the scores s_i under checkpoint i (of any preconditioner) and the learning rate eta_i at it.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from influence_fast.errors import ConfigError, DataError, ModelError, truncated_list, warn_once
from influence_fast.influence.scores import ScoreTable
from influence_fast.statistics.ranks import average_ranks, spearman

logger = logging.getLogger(__name__)

STATE = "trainer_state.json"
RATE = "learning_rate"  # in a log


@dataclass(frozen=True)
class CheckpointScores:
    """Scores at each checkpoint, in the order of training, and their weighted sum; all rows in one order of ids."""

    paths: list[Path]
    rates: list[float]
    tables: list[ScoreTable]
    total: ScoreTable

    @property
    def steps(self) -> list[int]:
        """Return the optimizer step of each checkpoint, from its name; places 1, 2, ... if a name has none."""
        found = [path.name.rpartition("-")[2] for path in self.paths]
        return [int(n) for n in found] if all(n.isdigit() for n in found) else list(range(1, len(found) + 1))


def learning_rates(checkpoints: str | Path | Sequence[str | Path], *, average: bool = False) -> list[float]:
    """Return the learning rate at each checkpoint of transformers' Trainer or of `finetune`.

    Rates are those of the scheduler itself, run again with the settings that each checkpoint holds and compared with
    its saved state and what was logged. Where that is not possible (a scheduler of one's own, no `training_args.bin`)
    they are the ones that were logged in `trainer_state.json`, which is said once.

    Args:
        checkpoints: folders of one run, in the order of training, or the folder whose `checkpoint-N` they are.
        average: the mean over all steps since the checkpoint before, as LESS weighs its epochs, in place of the rate
            of the checkpoint's last step. The latter is nearly nothing at the end of a schedule that decays to zero.

    Raises ModelError where a checkpoint has no such file or no rate can be known, its groups of parameters have rates
    of their own (LoRA+), or the folder has no checkpoint, ConfigError for steps out of order.

        rates = learning_rates("run", average=True)
    """
    from influence_fast.training.files import list_checkpoints
    from influence_fast.training.schedules import checkpoint_rates, group_rates

    if isinstance(checkpoints, (str, Path)):
        folder = Path(checkpoints)
        checkpoints = [folder] if (folder / STATE).exists() else list_checkpoints(folder)
        if not checkpoints:
            raise ModelError(f"{folder} has no checkpoint-N folders: name the training's folder, or list checkpoints")
    rates, previous = [], 0
    for folder in map(Path, checkpoints):
        state = _trainer_state(folder)
        if state.step <= previous:
            raise ConfigError(
                f"{folder} is of step {state.step}, after step {previous}: list checkpoints in training order"
            )
        if len(groups := group_rates(folder)) > 1:
            raise ModelError(
                f"{folder} was trained with {len(groups)} learning rates, one for each group of parameters "
                f"({truncated_list(f'{rate:g}' for rate in groups)}), and scores take one for each checkpoint: give "
                "the rates yourself, for example those of the group that matters, as "
                "checkpoint_scores([(folder, rate), ...])"
            )
        replayed = checkpoint_rates(folder, state.step, previous, state.max_steps, state.logged)
        if replayed is not None:
            rates.append(float(replayed.mean() if average else replayed[-1]))
        else:
            rates.append(_logged_rate(folder, state, previous, average))
        previous = state.step
    return rates


@dataclass(frozen=True)
class _TrainerState:
    """Of a checkpoint: optimizer steps made, those of the whole training, and (step, rate) as logged."""

    step: int
    max_steps: int
    logged: list[tuple[int, float]]


def _trainer_state(folder: Path) -> _TrainerState:
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        logged = [(int(log["step"]), float(log["learning_rate"])) for log in state["log_history"] if RATE in log]
        return _TrainerState(int(state["global_step"]), int(state.get("max_steps") or 0), logged)
    except (FileNotFoundError, NotADirectoryError):
        raise ModelError(
            f"{folder} has no {STATE}: give checkpoints of transformers' Trainer, or the learning rates themselves"
        ) from None
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError):
        raise ModelError(f"{folder / STATE} is not a Trainer's state; give the learning rates themselves") from None


def _logged_rate(folder: Path, state: _TrainerState, since: int, average: bool) -> float:
    """Return the rate by what was logged alone, with a warning."""
    until = [rate for at, rate in state.logged if at <= state.step]
    span = [rate for at, rate in state.logged if since < at <= state.step]
    if not until:
        raise ModelError(
            f"{folder / STATE} logs no learning rate up to step {state.step}, and its scheduler is not known: log more "
            "often, or give it"
        )
    warn_once(
        logger,
        f"{folder.parent}: the scheduler of its checkpoints cannot be run again (no training_args.bin, a schedule of "
        "its own, or skipped steps); learning rates are those that were logged, which are of some steps only",
    )
    return sum(span) / len(span) if average and span else until[-1]


def checkpoint_scores(
    checkpoints: Sequence[tuple[str | Path, float]], score: Callable[[Path], ScoreTable]
) -> CheckpointScores:
    """Score under every checkpoint and sum the scores, weighted by learning rate.

    Args:
        checkpoints: (adapter folder, learning rate) in the order of training; see `learning_rates`.
        score: the table of one checkpoint, for example gradients under the adapter by `load_finetuned`, then
            `influence_scores` or `stream_influence`. Every table needs the same ids; their order may differ.

    Returns:
        In `total`: `s_*` are the weighted sums, `rank_*` their ranks, `mean_rank_*` the weighted means of the
        checkpoints' own mean ranks (single queries are not in the tables, so not those of the sums); columns that
        are not scores (`loss`, `tokens`) are the last checkpoint's.

    Raises:
        ConfigError: no checkpoint, or rates that are negative, not finite or all zero.
        DataError: tables with different ids or score columns.
    """
    paths, rates = [Path(path) for path, _ in checkpoints], [float(rate) for _, rate in checkpoints]
    if not paths:
        raise ConfigError("no checkpoints to score: train with save_checkpoints set, or list them")
    wrong = [f"{path} ({rate})" for path, rate in zip(paths, rates, strict=True) if not 0 <= rate < math.inf]
    if wrong or not any(rates):
        raise ConfigError(
            f"learning rates must be at least 0, and not all 0: {truncated_list(wrong or map(str, paths))}"
        )
    tables: list[ScoreTable] = []
    for path in paths:
        table = score(path)
        tables.append(_aligned(table, tables[0], path) if tables else table)
    return CheckpointScores(paths, rates, tables, _total(tables, np.array(rates)))


def ranking_over_training(scores: CheckpointScores, column: str = "s_correct") -> list[dict[str, Any]]:
    """Compare each checkpoint's ranking by `column` with the final one, as plain values.

    One dict a checkpoint: `checkpoint` (name), `step`, `learning_rate`, and rank correlations (Spearman): `with_sum`
    to the weighted sum, `with_last` to the last checkpoint, `with_previous` to the checkpoint before (None for
    the first). Raises DataError where the tables have no such column.
    """
    values = by_checkpoint(scores, column)
    final = scores.total.columns[column]
    return [
        {
            "checkpoint": path.name,
            "step": step,
            "learning_rate": rate,
            "with_sum": spearman(here, final),
            "with_last": spearman(here, values[-1]),
            "with_previous": spearman(here, values[i - 1]) if i else None,
        }
        for i, (path, step, rate, here) in enumerate(zip(scores.paths, scores.steps, scores.rates, values, strict=True))
    ]


def by_checkpoint(scores: CheckpointScores, column: str) -> list[np.ndarray]:
    """Return a column of each checkpoint's table, [N] each; raise DataError if the tables have no such column."""
    if column not in scores.total.columns:
        raise DataError(f"no column {column!r} in these tables; they hold {', '.join(scores.total.columns)}")
    return [table.columns[column] for table in scores.tables]


def _aligned(table: ScoreTable, first: ScoreTable, path: Path) -> ScoreTable:
    """Return `table` with its rows in the order of `first`."""
    place = {name: i for i, name in enumerate(table.ids)}
    odd = sorted(place.keys() ^ set(first.ids))
    if odd or len(table.ids) != len(first.ids):
        raise DataError(
            f"{path}: its scores and those of the first checkpoint are not of the same examples: "
            f"{truncated_list(odd or table.ids)}; leave these out of both"
        )
    missing = sorted({name for name in first.columns.keys() ^ table.columns.keys() if name.startswith("s_")})
    if missing:
        raise DataError(f"{path}: its scores and those of the first checkpoint differ in column {missing[0]!r}")
    rows = np.array([place[name] for name in first.ids], dtype=np.int64)
    return ScoreTable(list(first.ids), {name: column[rows] for name, column in table.columns.items()})


def _total(tables: list[ScoreTable], rates: np.ndarray) -> ScoreTable:
    columns: dict[str, np.ndarray] = {}
    for name, last in tables[-1].columns.items():
        group = name.partition("_")[2]
        if name.startswith("s_"):
            columns[name] = _weighted(tables, name, rates)
        elif name.startswith("rank_") and f"s_{group}" in tables[-1].columns:
            columns[name] = average_ranks(_weighted(tables, f"s_{group}", rates))
        elif name.startswith("mean_rank_") and all(name in table.columns for table in tables):
            columns[name] = _weighted(tables, name, rates / rates.sum())
        else:
            columns[name] = last
    return ScoreTable(list(tables[0].ids), columns)


def _weighted(tables: list[ScoreTable], name: str, weights: np.ndarray) -> np.ndarray:
    total = np.zeros(len(tables[0].ids))
    for weight, table in zip(weights, tables, strict=True):
        total += weight * np.asarray(table.columns[name], np.float64)
    return total
