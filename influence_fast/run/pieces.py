"""Which finished pieces of a run depend on which settings and inputs.

A setting or an input may change until the first piece that depends on it is there, so that what an error advises can be
done in the same folder. From then on another value would stand beside results of the first one.
"""

from __future__ import annotations

from pathlib import Path

from influence_fast.errors import truncated_list
from influence_fast.selection.strategies import PASS_RATE, STRATEGIES, needed_columns

# kinds of dependence: the keys of `_PIECES`
EVERYTHING = "everything"
TARGET = "target"
QUESTIONS = "questions"
SCORES = "scores"
ANSWERS = "answers"
JUDGEMENTS = "judgements"
TEST = "test"
PASS_RATES = "pass rates"
PRUNED = "pruned"

_SCORED = ("scoring_seconds.json", "baselines/*.json")


def _cells(strategy: str) -> tuple[str, ...]:
    """Return patterns of what is made of a selection: the fine-tunings of a strategy, and what judged them."""
    return tuple(
        place.format(f"{strategy}-*-seed*") for place in ("adapters/{}", "evaluations/{}.json", "cells/{}.json")
    )


_PRUNED_CELLS = _cells("*")  # all but full-seed0, which is selected by no score
_JUDGED = ("evaluations/*.json", "cells/*.json")
_PROVED = ("retrained/*.npz", "validate/*.npz")
_PIECES = {
    EVERYTHING: ("adapters/*", "store*/manifest.json", "own_answers.json", *_SCORED, *_JUDGED, *_PROVED),
    TARGET: ("adapters/full-*", "adapters/*-*-seed*", *_JUDGED),
    QUESTIONS: ("own_answers.json", *_SCORED, *_PRUNED_CELLS, *_PROVED),
    SCORES: (*_SCORED, *_PRUNED_CELLS),
    ANSWERS: ("own_answers.json", *_SCORED, _PRUNED_CELLS[0], *_JUDGED, "retrained/*.npz"),
    JUDGEMENTS: ("own_answers.json", "baselines/pass_rate.json", *_JUDGED, "retrained/*.npz"),
    TEST: (*_JUDGED, "retrained/*.npz"),
    PASS_RATES: ("baselines/pass_rate.json",),
    PRUNED: _PRUNED_CELLS,
}
_SETTINGS = {
    "target_model": TARGET,
    "data.validation": QUESTIONS,
    "data.test": TEST,
    "gradients": SCORES,
    "influence": SCORES,
    "evaluation": ANSWERS,
    "pruning.max_similar": PRUNED,
    "pruning.pass_rate_samples": PASS_RATES,
    "pruning.pass_rate_temperature": PASS_RATES,
}


def finished(folder: Path, kind: str) -> list[str]:
    """Return the finished pieces in a run's folder that depend on a setting or input of this kind, by relative name."""
    return list(dict.fromkeys(name for pattern in _patterns(kind) for name in _matches(folder, pattern)))


def _patterns(kind: str) -> list[str]:
    """Return the patterns of `_PIECES` of a kind.

    For pass rates they include the cells of every strategy that reads pass rates.
    """
    by_pass_rate = [
        name for name in STRATEGIES if kind in (PASS_RATES, JUDGEMENTS) and PASS_RATE in needed_columns([name])
    ]
    return [*_PIECES[kind], *(pattern for name in by_pass_rate for pattern in _cells(name))]


def _beside(pattern: str) -> list[str]:
    """Return what a selection leaves beside the adapters that `pattern` finds.

    It is written again with them, but not for a strategy that is left out meanwhile.
    """
    place, _, cell = pattern.partition("/")
    if place != "adapters" or "-*-seed*" not in cell:
        return []
    return [f"pruned/{cell.removesuffix('-seed*')}", f"transcripts/{cell}"]


def _matches(folder: Path, pattern: str) -> list[str]:
    # a hidden name is an unfinished fine-tuning, which is found again by a digest of all that it depends on
    return [str(path.relative_to(folder)) for path in sorted(folder.glob(pattern)) if not path.name.startswith(".")]


def kind_of_setting(key: str, *, own_answers: bool, decontaminated: bool) -> str:
    """Return the kind of the pieces that depend on the setting `key` ("influence.damping").

    own_answers: the scores ask by the model's own answers, which `evaluation` settings made. decontaminated: the test
    set decides which examples are in the pool.
    """
    kind = next((k for name, k in _SETTINGS.items() if key == name or key.startswith(f"{name}.")), EVERYTHING)
    if kind == ANSWERS and not own_answers:
        return JUDGEMENTS
    return EVERYTHING if kind == TEST and decontaminated else kind


def way_out(folder: Path, kinds: set[str], also: tuple[str, ...] = ()) -> str:
    """Return the end of a message that refuses a change: all that has to go from the run for the change to be taken.

    kinds: what the change is of. also: names that have to go besides. Several pieces of a sort are named by the pattern
    that finds them and no others. Empty where the fine-tuning is one of them: nothing would be left.
    """
    if EVERYTHING in kinds or TARGET in kinds:
        return ""
    patterns = [pattern for kind in sorted(kinds) for pattern in _patterns(kind)]
    names, covered = dict.fromkeys(also), set(also)
    for pattern in (one for first in patterns for one in (first, *_beside(first))):
        found = _matches(folder, pattern)
        if not covered.issuperset(found):
            names[found[0] if len(found) == 1 else pattern] = None
            covered.update(found)
    return f", or delete what was made with the other: {truncated_list(names, limit=len(names))}"
