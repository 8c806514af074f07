"""Scores of steps: a table with a row for each step of each training example, which sum to the examples' scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from influence_fast.atomic import replacing
from influence_fast.data.steps import Spans, Splitter
from influence_fast.errors import DataError, one_line
from influence_fast.guards import check_no_pipe, reading
from influence_fast.influence.scores import check_format
from influence_fast.influence.step_influence import StepInfluence, each_step_influence
from influence_fast.progress import track
from influence_fast.statistics.ranks import average_ranks

HARM = "harm"
_INTEGERS = ("step", "start", "end", "tokens")


@dataclass(frozen=True, repr=False)
class StepTable:
    """Scores of S steps of training examples, in the order of the examples and of their steps.

    Attributes:
        ids: [S] the example that each step is of.
        text: [S] its characters.
        columns: [S] each. `step` (number in its example, from 0), `start` and `end` (characters in the completion),
            `tokens` (how many), `loss` (their mean), for each group g of queries `s_g` (influence), and `harm`: what
            speaks against the step, the contrast where there is one, else the influence on wrong less that on right
            answers. `rank_c` of these is the rank among all steps, `rank_in_trace_c` among those of the same example,
            1 = lowest.
    """

    ids: list[str]
    text: list[str]
    columns: dict[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        return f"StepTable({len(self):,} steps of {len(set(self.ids)):,} examples: {', '.join(self.columns)})"

    def __getitem__(self, name: str) -> np.ndarray:
        """Return a column, [S]; `id` and `text` as objects. Raises DataError where it is not there."""
        texts = {"id": self.ids, "text": self.text}
        if name in texts:
            return np.array(texts[name], dtype=object)
        if name not in self.columns:
            raise DataError(f"no column {name!r} of steps; there are {', '.join([*texts, *self.columns])}")
        return self.columns[name]

    def of_examples(self) -> dict[str, np.ndarray]:
        """Return the rows of each example, id -> [s] row numbers in the order of its steps."""
        rows: dict[str, list[int]] = {}
        for row, name in enumerate(self.ids):
            rows.setdefault(name, []).append(row)
        return {name: np.array(found) for name, found in rows.items()}

    def save(self, path: str | Path) -> None:
        """Write `.parquet` or `.csv`, by the ending; the file appears whole or not at all."""
        import pyarrow as pa
        import pyarrow.csv
        import pyarrow.parquet

        path = Path(path)
        check_format(path)
        columns = {name: self.columns[name].astype(np.int64 if name in _INTEGERS else float) for name in self.columns}
        table = pa.table({"id": self.ids, **columns, "text": self.text})
        write = pyarrow.parquet.write_table if path.suffix == ".parquet" else pyarrow.csv.write_csv
        with replacing(path) as temporary:
            write(table, temporary)

    @classmethod
    def load(cls, path: str | Path) -> StepTable:
        """Read what `save` wrote. Raises DataError naming the file where it is no such table."""
        import pyarrow as pa
        import pyarrow.csv
        import pyarrow.parquet

        path = Path(path)
        check_no_pipe(path)
        if not path.exists():
            raise DataError(f"{path}: no such table of steps; make one with 'influence-fast score --steps lines'")
        texts = pyarrow.csv.ConvertOptions(column_types={"id": "string", "text": "string"}, strings_can_be_null=False)
        # a step may hold line breaks
        parsing = pyarrow.csv.ParseOptions(newlines_in_values=True)
        with reading(path):
            try:
                table = (
                    pyarrow.csv.read_csv(path, convert_options=texts, parse_options=parsing)
                    if path.suffix == ".csv"
                    else pyarrow.parquet.read_table(path)
                )
            except (pa.ArrowException, OSError) as error:
                raise DataError(f"{path} is no table of steps ({one_line(error, limit=200)})") from None
            missing = [name for name in ("id", "text", *_INTEGERS) if name not in table.column_names]
            if missing:
                raise DataError(
                    f"{path} has no column {missing[0]!r}, so it is no table of steps: give the one that "
                    "'influence-fast score --steps lines' wrote"
                )
            columns = {}
            for name in table.column_names:
                if name in ("id", "text"):
                    continue
                kind = table.schema.field(name).type
                if not (pa.types.is_integer(kind) or pa.types.is_floating(kind)) or table[name].null_count:
                    raise DataError(f"{path}: column {name!r} holds {kind} or nothing in some rows, not numbers")
                columns[name] = table[name].to_numpy().astype(np.int64 if name in _INTEGERS else np.float64)
            ids, words = ([str(value) for value in table[name].to_pylist()] for name in ("id", "text"))
            return cls(ids, words, columns)


def step_scores(
    model: Any,
    examples: Sequence[Mapping[str, Any]],
    directions: Mapping[str, torch.Tensor],
    *,
    steps: str | Splitter | Spans,
    tokenizer: Any,
    lengths: np.ndarray | None = None,
    loss_reduction: str = "mean",
    progress: bool = True,
) -> StepTable:
    """Score every step of every example.

    Args:
        model: the LoRA model that the directions are of.
        examples: tokenized, with ids.
        directions: of each group of queries, [K]; `Scorer.directions` makes them.
        steps, tokenizer, loss_reduction: see `step_influence`.
        lengths: [N] what the scores of each example are divided by (`Scorer.lengths`, in the examples' order).
        progress: a bar with rate and time left on stderr.

    Returns:
        A `StepTable`, whose `s_g` sum over the steps of an example to its score in the table of examples.

    Raises:
        ConfigError, DataError, ModelError, NumericError: as `step_influence`.
    """
    names, rows = list(directions), torch.stack(list(directions.values()))
    made = each_step_influence(model, examples, rows, steps=steps, tokenizer=tokenizer, loss_reduction=loss_reduction)
    found = list(track(made, "steps", shown=progress, total=len(examples)))
    return as_table(found, names, lengths)


def as_table(found: Sequence[StepInfluence], names: Sequence[str], lengths: np.ndarray | None = None) -> StepTable:
    """Return the table of steps of influences on directions called `names`, each example's divided by its length."""
    ids = [one.id for one in found for _ in one.steps]
    steps = [step for one in found for step in one.steps]
    columns: dict[str, np.ndarray] = {
        "step": np.array([number for one in found for number in range(len(one.steps))], np.int64),
        "start": np.array([-1 if step.start is None else step.start for step in steps], np.int64),
        "end": np.array([-1 if step.end is None else step.end for step in steps], np.int64),
        "tokens": np.array([len(step.tokens) for step in steps], np.int64),
        "loss": np.array([loss for one in found for loss in one.losses], np.float64),
    }
    scores = np.zeros((len(steps), len(names)))
    row = 0
    for place, one in enumerate(found):
        length = 1.0 if lengths is None else float(lengths[place])
        part = one.influence.double().numpy()
        scores[row : row + len(part)] = part / length if length > 0 else 0.0
        row += len(part)
    columns |= {f"s_{name}": scores[:, column] for column, name in enumerate(names)}
    columns[HARM] = _harm(columns)
    starts = np.flatnonzero(columns["step"] == 0)
    ends = [*starts[1:].tolist(), len(steps)]
    for name in [*(f"s_{name}" for name in names), HARM]:
        short = name.removeprefix("s_")
        columns[f"rank_{short}"] = average_ranks(columns[name])
        inside = [average_ranks(columns[name][a:b]) for a, b in zip(starts.tolist(), ends, strict=True)]
        columns[f"rank_in_trace_{short}"] = np.concatenate(inside) if inside else np.zeros(0)
    return StepTable(ids, [step.text for step in steps], columns)


def _harm(columns: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return what speaks against each step, [S]."""
    if "s_contrast" in columns:
        return columns["s_contrast"]
    nothing = np.zeros(len(columns["step"]))
    return columns.get("s_incorrect", nothing) - columns.get("s_correct", nothing)
