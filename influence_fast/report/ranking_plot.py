"""Plot how the ranking changed over a training run (see `influence.checkpoints`)."""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from influence_fast.atomic import replacing
from influence_fast.errors import ConfigError
from influence_fast.influence.checkpoints import CheckpointScores, by_checkpoint, ranking_over_training
from influence_fast.statistics.ranks import average_ranks

FORMATS = (".svg", ".png", ".pdf")


def plot_ranking_over_training(
    scores: CheckpointScores, path: str | Path, *, column: str = "s_correct", follow: int = 5
) -> Path:
    """Plot `ranking_over_training`, and the ranks of the `follow` examples at either end of the final ranking.

    Args:
        scores: the result of `checkpoint_scores`.
        path: .svg, .png or .pdf; the extension chooses the format. The file is written atomically.
        column: the score to rank by.
        follow: number of examples followed at each end.
    Returns:
        `path`.
    Raises:
        ConfigError: another extension.
    Example:
        >>> plot_ranking_over_training(scores, "ranking.svg")  # doctest: +SKIP
    """
    path = Path(path)
    if path.suffix not in FORMATS:
        raise ConfigError(f"{path}: a plot is written as {', '.join(FORMATS)}")
    rows = ranking_over_training(scores, column)
    steps = scores.steps
    ranks = np.stack([average_ranks(values) for values in by_checkpoint(scores, column)])  # [C, E], 1 = lowest
    order = np.argsort(-scores.total.columns[column], kind="stable")
    follow = min(follow, len(order) // 2)
    figure = Figure(figsize=(9.5, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for key, style, label in (
        ("with_sum", "o-", "weighted sum"),
        ("with_last", "s--", "last checkpoint"),
        ("with_previous", "^:", "checkpoint before"),
    ):
        left.plot(steps, [math.nan if row[key] is None else row[key] for row in rows], style, label=label)
    left.set(xlabel="optimizer step", ylabel="Spearman correlation", ylim=(None, 1.05))
    left.set_title(f"{column}: rank correlation with the ...", loc="left")
    for places, colour, label in ((order[:follow], "C0", "highest"), (order[len(order) - follow :], "C3", "lowest")):
        for n, place in enumerate(places):
            name = f"{label} {follow} in the end" if n == 0 else None
            right.plot(steps, ranks[:, place], "o-", color=colour, alpha=0.7, label=name)
    right.set_ylim(0, len(order) + 1)
    right.set(xlabel="optimizer step", ylabel=f"rank of {len(order)} (1 = lowest)")
    right.set_title("ranks on the way", loc="left")
    for axes in (left, right):
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=3, frameon=False)
        axes.set_xticks(steps)
        axes.spines[["top", "right"]].set_visible(False)
    with (
        replacing(path) as temporary,
        matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "influence-fast"}),
    ):
        metadata = {"Date": None} if path.suffix == ".svg" else None
        figure.savefig(temporary, format=path.suffix[1:], dpi=150, metadata=metadata)
    return path
