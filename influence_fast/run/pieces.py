"""Which finished pieces of a run depend on which settings and inputs.

A setting or an input may change until the first piece that depends on it is there, so that what an error advises can be
done in the same folder. From then on another value would stand beside results of the first one.
"""

from __future__ import annotations

from pathlib import Path

from influence_fast.errors import listing

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
_PRUNED_CELLS = "cells/*-*-seed*.json"  # all but full-seed0.json, which is selected by no score
_JUDGED = ("evaluations/*.json", "cells/*.json")
_PROVED = ("retrained/*.npz", "validate/*.npz")
_PIECES = {
    EVERYTHING: ("adapters/*", "store*/manifest.json", "own_answers.json", *_SCORED, *_JUDGED, *_PROVED),
    TARGET: ("adapters/full-*", "adapters/*-*-seed*", *_JUDGED),
    QUESTIONS: ("own_answers.json", *_SCORED, _PRUNED_CELLS, *_PROVED),
    SCORES: (*_SCORED, _PRUNED_CELLS),
    ANSWERS: ("own_answers.json", *_SCORED, *_JUDGED, "retrained/*.npz"),
    JUDGEMENTS: ("own_answers.json", "baselines/pass_rate.json", *_JUDGED, "retrained/*.npz"),
    TEST: (*_JUDGED, "retrained/*.npz"),
    PASS_RATES: ("baselines/pass_rate.json",),
    PRUNED: (_PRUNED_CELLS,),
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
    found = (path for pattern in _PIECES[kind] for path in sorted(folder.glob(pattern)))
    # a hidden name is an unfinished fine-tuning, which is found again by a digest of all that it depends on
    return list(dict.fromkeys(str(path.relative_to(folder)) for path in found if not path.name.startswith(".")))


def kind_of_setting(key: str, *, own_answers: bool, decontaminated: bool) -> str:
    """Return the kind of the pieces that depend on the setting `key` ("influence.damping").

    own_answers: the scores ask by the model's own answers, which `evaluation` settings made. decontaminated: the test
    set decides which examples are in the pool.
    """
    kind = next((k for name, k in _SETTINGS.items() if key == name or key.startswith(f"{name}.")), EVERYTHING)
    if kind == ANSWERS and not own_answers:
        return JUDGEMENTS
    return EVERYTHING if kind == TEST and decontaminated else kind


def way_out(pieces: list[str], kinds: set[str]) -> str:
    """Return the end of a message that refuses a change: what can be deleted of the run for the change to be taken.

    pieces: the finished ones that stand in the way. Empty where the fine-tuning is one of them: nothing would be left.
    """
    if EVERYTHING in kinds or TARGET in kinds:
        return ""
    names = dict.fromkeys(name.partition("/")[0] for name in pieces)
    return f", or delete what was made with the other: {listing(names, limit=len(names))}"
