"""Settings of a run that differ from their defaults and that nothing reads, as the others are."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from influence_fast.config import RunConfig, Source
from influence_fast.data.rows import Rows
from influence_fast.data.schemas import choose_schema, has_turns
from influence_fast.data.text_files import file_suffix
from influence_fast.influence.recipe import Recipe, Unused, unused_field
from influence_fast.selection.strategies import PASS_RATE, needed_columns, reads_tasks


def unread_settings(config: RunConfig) -> list[str]:
    """Return one line for each: its key, its value, and what would have to be otherwise."""
    found = [*Recipe.of(config.gradients, config.influence).unused(), *_beside(config)]
    return [str(setting) for setting in found if setting.changed]


def _beside(config: RunConfig) -> Iterator[Unused]:
    """Yield the settings that the other parts of a run do not read."""
    asks_the_pool = PASS_RATE in needed_columns(config.pruning.strategies)
    if not asks_the_pool:
        for name in ("pass_rate_samples", "pass_rate_temperature"):
            yield unused_field(config.pruning, "pruning", name, "no strategy reads pass rates (difficulty, easy, hard)")
    for name in ("pool", "validation", "test"):
        source = getattr(config.data, name)
        if source is not None:
            yield from _of_source(source, f"data.{name}")
    if not any(map(reads_tasks, config.pruning.strategies)):
        why = "no strategy reads the scores of tasks (less), which are only shown"
        yield unused_field(config.influence, "influence", "tasks", why)
    yield unused_field(config.training, "training", "seed", "every fine-tuning has one of pruning.seeds")
    if config.data.max_length is None:
        yield unused_field(config.data, "data", "truncate", "there is no data.max_length to cut at")
    if config.evaluation.temperature == 0 and not asks_the_pool:
        why = "evaluation.temperature 0 takes the likeliest token"
        yield unused_field(config.evaluation, "evaluation", "top_p", why)
    if config.training.max_steps > 0:
        yield unused_field(config.training, "training", "epochs", "training.max_steps decides")


def _of_source(source: Source, part: str) -> Iterator[Unused]:
    path = Path(source.path).expanduser()
    if not os.path.isfile(path):
        return
    if ".json" not in path.suffixes:  # an object of several lists has
        yield unused_field(source, part, "split", "a single file has no splits")
    turns = unused_field(source, part, "turns", "the file's rows are no conversations")
    if turns.changed and (found := _format(source, path)) is not None and not has_turns(found):
        yield turns
    trace = unused_field(source, part, "trace", "the file's rows have no traces to choose from")
    if trace.changed and _format(source, path) not in ("openr1", None):
        yield trace


def _format(source: Source, path: Path) -> str | None:
    """Return the schema of a local file's rows, by what needs no reading of the whole.

    None if that tells nothing, or if the run itself will say what is wrong with the file.
    """
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
