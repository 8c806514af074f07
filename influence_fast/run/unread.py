"""Settings of a run that differ from their defaults and that nothing reads, as the others are."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from influence_fast.config import RunConfig, Source
from influence_fast.data.rows import Rows
from influence_fast.data.schemas import choose_schema, has_turns
from influence_fast.data.text_files import file_suffix
from influence_fast.gradients.projection import FLAT_KINDS
from influence_fast.gradients.row_spec import RowSpec, is_fitted
from influence_fast.influence.damping import AUTO
from influence_fast.influence.preconditioners import FROM_MODEL, fits_sketch
from influence_fast.influence.settings import (
    WHOLE,
    InfluenceConfig,
    fitted_examples,
    unsketched_preconditioner,
)
from influence_fast.selection.strategies import PASS_RATE, needed_columns, reads_tasks

Unread = tuple[str, Any, Any, str]  # key, value, default, why


def unread_settings(config: RunConfig) -> list[str]:
    """One line for each: its key, its value, and what would have to be otherwise."""
    return _lines([*_unread(config.gradients, config.influence), *_beside(config)])


def unread_influence(gradients: RowSpec, influence: InfluenceConfig) -> list[str]:
    """The same of these two alone."""
    return _lines(_unread(gradients, influence))


def _lines(found: Iterable[Unread]) -> list[str]:
    return [
        f"{key} is {value!r}, which nothing reads here: {why}" for key, value, default, why in found if value != default
    ]


def _of(settings: Any, part: str, name: str, why: str) -> Unread:
    return f"{part}.{name}", getattr(settings, name), type(settings).__dataclass_fields__[name].default, why


def _unread(gradients: RowSpec, influence: InfluenceConfig) -> Iterator[Unread]:
    """All of the two parts that is not read, whether it was changed or not."""

    def of(part: str, name: str, why: str) -> Unread:
        return _of(gradients if part == "gradients" else influence, part, name, why)

    fitted = fits_sketch(gradients, influence.preconditioner)
    used_again = is_fitted(gradients.sketch)
    if gradients.kind == WHOLE:
        yield of("gradients", "dim", f"whole gradients (kind: {WHOLE}) are not projected")
    elif gradients.kind in FLAT_KINDS:
        yield of("gradients", "dim", f"{gradients.kind} goes from whole factors straight to gradients.width")
    if gradients.width is None:
        yield of("gradients", "sketch", "there is no gradients.width to sketch rows to")
    if not fitted or used_again:
        yield of("gradients", "sketch_examples", "no sketch is fitted")
    if _inverts_nothing(gradients, influence):
        yield of("influence", "damping", "nothing is inverted")
    if not fitted_examples(dataclasses.replace(influence, fisher=FROM_MODEL), gradients):
        yield of("influence", "fisher", "nothing is fitted on a Fisher information")
    # by auto a row that is no longer than its width is not sketched, and something else is fitted
    if (fitted and gradients.sketch != AUTO) or not fitted_examples(influence, gradients):
        yield of("influence", "fisher_examples", "no preconditioner is fitted on labels that the model draws")
    if influence.checkpoints:
        yield of("influence", "explain", "scores that are summed over checkpoints are not explained")
    if influence.queries == "reference":
        yield of("influence", "fallback", "influence.queries: reference asks for no answers of the model")


def _inverts_nothing(gradients: RowSpec, influence: InfluenceConfig) -> bool:
    """Whether scores are of rows as they are, and no sketch is fitted either."""
    if fits_sketch(gradients, influence.preconditioner):
        return is_fitted(gradients.sketch)  # what is used again was fitted with a damping of its own
    return unsketched_preconditioner(influence, gradients) in ("none", "cosine")


def _beside(config: RunConfig) -> Iterator[Unread]:
    """What the other parts of a run do not read."""
    asks_the_pool = PASS_RATE in needed_columns(config.pruning.strategies)
    if not asks_the_pool:
        for name in ("pass_rate_samples", "pass_rate_temperature"):
            yield _of(config.pruning, "pruning", name, "no strategy reads pass rates (difficulty, easy, hard)")
    for name in ("pool", "validation", "test"):
        source = getattr(config.data, name)
        if source is not None:
            yield from _of_source(source, f"data.{name}")
    if not any(map(reads_tasks, config.pruning.strategies)):
        why = "no strategy reads the scores of tasks (less), which are only shown"
        yield _of(config.influence, "influence", "tasks", why)
    yield _of(config.training, "training", "seed", "every fine-tuning has one of pruning.seeds")
    if config.data.max_length is None:
        yield _of(config.data, "data", "truncate", "there is no data.max_length to cut at")
    if config.evaluation.temperature == 0 and not asks_the_pool:
        yield _of(config.evaluation, "evaluation", "top_p", "evaluation.temperature 0 takes the likeliest token")
    if config.training.max_steps > 0:
        yield _of(config.training, "training", "epochs", "training.max_steps decides")


def _of_source(source: Source, part: str) -> Iterator[Unread]:
    path = Path(source.path).expanduser()
    if not os.path.isfile(path):
        return
    if ".json" not in path.suffixes:  # an object of several lists has
        yield _of(source, part, "split", "a single file has no splits")
    turns = _of(source, part, "turns", "the file's rows are no conversations")
    if turns[1] != turns[2] and (found := _format(source, path)) is not None and not has_turns(found):
        yield turns
    trace = _of(source, part, "trace", "the file's rows have no traces to choose from")
    if trace[1] != trace[2] and _format(source, path) not in ("openr1", None):
        yield trace


def _format(source: Source, path: Path) -> str | None:
    """The schema that a local file's rows have, by what costs no reading of the whole; None where that tells nothing,
    or the run itself will say what is wrong with it."""
    try:
        if path.suffix.lower() == ".parquet":
            import pyarrow.parquet as pq

            row: Any = dict.fromkeys(pq.read_schema(path).names)
        elif file_suffix(path) == ".jsonl":
            with path.open(encoding="utf-8-sig") as lines:
                row = json.loads(next(filter(str.strip, lines)))
            if not isinstance(row, dict):
                return None
        else:
            return source.format if source.format != "auto" else None
        return choose_schema(Rows([row], str(path), path.suffix), source.format, source.columns or {}).name
    except Exception:  # reading it says so
        return None
