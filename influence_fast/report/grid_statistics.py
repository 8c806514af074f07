"""Statistics of a grid of runs: two-level intervals, paired tests against the baselines, Holm's correction.

Each setting's answers form a table [S, N], seeds by test questions; `statistics.two_level` says how it is resampled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from influence_fast.errors import DataError, truncated_list
from influence_fast.statistics.paired_tests import compare, holm
from influence_fast.statistics.two_level import DRAWS, two_level_interval

BASELINES = ("random", "full")


@dataclass(frozen=True, slots=True)
class Answers:
    """One setting's answers: `correct` [S, N] float64 in 0..1, rows as in `seeds`, columns as in `questions`."""

    seeds: tuple[int, ...]
    questions: tuple[str, ...]
    correct: np.ndarray

    def of(self, seeds: Sequence[int]) -> np.ndarray:
        """Return the rows of the given seeds, [len(seeds), N]."""
        return self.correct[[self.seeds.index(seed) for seed in seeds]]


def grid_statistics(
    cells: Sequence[Mapping[str, Any]],
    correct: Sequence[Mapping[str, float]],
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> dict[str, list[dict[str, Any]]]:
    """Compute means, intervals and paired tests of a grid, as the report's `settings` and `comparisons`.

    Args:
        cells: one run each: "strategy", "fraction", "seed"; "low" and "high" are used where a setting has one seed.
        correct: for each cell, question id -> share of its answers that were right (0..1).
        draws: bootstrap draws and sign flips.
        seed: of the resampling; the same seed gives the same numbers.

    Returns:
        "settings": {"strategy", "fraction", "accuracy", "low", "high", "seeds", "questions"}, one a setting; 95 %.
        "comparisons": each strategy against `random` at its fraction and against `full`, where these were run:
        {"strategy", "fraction", "against", "difference", "low", "high", "effect", "effect_low", "effect_high", "p",
        "p_adjusted", "seeds", "questions"}. `effect` is Cohen's h (Cohen 1988): 2 asin sqrt(a) - 2 asin sqrt(b).
        Runs are paired by seed and question. `p` is that of `sign_flip_test` on the questions' differences averaged
        over the seeds; with several seeds it is at least the two-level bootstrap's, so that neither lucky questions
        nor lucky seeds alone make a small one. `p_adjusted` is Holm's over all comparisons of the grid.

    Raises DataError where two cells were asked different questions, or a cell comes twice.
    """
    answers = _collect(cells, correct)
    own = {(str(c["strategy"]), float(c["fraction"]), int(c["seed"])): c for c in cells}
    settings = []
    for (strategy, fraction), a in answers.items():
        if len(a.seeds) == 1 and own[strategy, fraction, a.seeds[0]].get("low") is not None:
            cell = own[strategy, fraction, a.seeds[0]]
            low, high = float(cell["low"]), float(cell["high"])
        else:
            low, high = two_level_interval(a.correct, draws=draws, seed=seed)
        settings.append(
            {
                "strategy": strategy,
                "fraction": fraction,
                "accuracy": float(a.correct.mean()),
                "low": low,
                "high": high,
                "seeds": len(a.seeds),
                "questions": len(a.questions),
            }
        )
    comparisons = []
    for (strategy, fraction), a in answers.items():
        if strategy in BASELINES:
            continue
        for against, at in (("random", fraction), ("full", 0.0)):
            b = answers.get((against, at))
            seeds = [s for s in a.seeds if b is not None and s in b.seeds]
            if b is None or not seeds:
                continue
            found = compare(a.of(seeds), b.of(seeds), draws=draws, seed=seed)
            comparisons.append({"strategy": strategy, "fraction": fraction, "against": against} | found)
    adjusted = holm(np.array([c["p"] for c in comparisons], np.float64))
    for comparison, p in zip(comparisons, adjusted, strict=True):
        comparison["p_adjusted"] = float(p)
    return {"settings": settings, "comparisons": comparisons}


def _collect(
    cells: Sequence[Mapping[str, Any]], correct: Sequence[Mapping[str, float]]
) -> dict[tuple[str, float], Answers]:
    rows: dict[tuple[str, float], dict[int, Mapping[str, float]]] = {}
    questions: tuple[str, ...] = tuple(correct[0]) if correct else ()
    for cell, answers in zip(cells, correct, strict=True):
        odd = sorted(set(answers) ^ set(questions))
        if odd or not questions:
            raise DataError(
                f"{cell['strategy']} at {cell['fraction']}, seed {cell['seed']}: other questions than the first run "
                f"({truncated_list(odd) or 'none at all'}): evaluate all runs of a grid on the same test questions"
            )
        seeds = rows.setdefault((str(cell["strategy"]), float(cell["fraction"])), {})
        if int(cell["seed"]) in seeds:
            raise DataError(f"{cell['strategy']} at {cell['fraction']}: seed {cell['seed']} comes twice")
        seeds[int(cell["seed"])] = answers
    return {
        key: Answers(
            tuple(seeds),
            questions,
            np.array([[a[q] for q in questions] for a in seeds.values()], np.float64),
        )
        for key, seeds in rows.items()
    }
