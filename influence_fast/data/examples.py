"""Read examples from a dataset and write them to one; `rendering` turns them into text and `tokens` into token ids."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from numbers import Integral
from typing import Any

from influence_fast.data.conversations import with_reasoning
from influence_fast.data.packing import IGNORED
from influence_fast.data.pruned_rows import kept_rows
from influence_fast.data.rendering import render_prompt
from influence_fast.data.row_files import write_rows
from influence_fast.data.rows import Row, Rows, load_rows
from influence_fast.data.schemas import Example, check_trace, check_turns, read_examples
from influence_fast.data.tokens import TokenizedSet, check_completions, tokenize
from influence_fast.errors import ConfigError, DataError, setting, shown, truncated_list
from influence_fast.guards import reading

__all__ = [
    "IGNORED",
    "Example",
    "Rows",
    "TokenizedSet",
    "kept_rows",
    "load_examples",
    "load_rows",
    "render_prompt",
    "save_examples",
    "tokenize",
    "write_rows",
]

logger = logging.getLogger(__name__)


def load_examples(
    source: Any,
    *,
    split: str = "train",
    format: str = "auto",
    trace: str | int = "first_correct",
    limit: int | None = None,
    columns: Mapping[str, str | None] | None = None,
    turns: str = "last",
) -> list[Example]:
    """Load training or validation examples from a dataset, in the order of its rows.

    Ids are the row's own (`id`, `uuid` or `unique_id`, the first there is), else the row index; a trace's is `<row
    id>#<trace index>`. Rows without a trace that fits `trace` are left out with a warning that names them, and so are
    null and blank traces. Columns that look like traces and are not read are named in a warning.

    Args:
        source: a hub id, file, folder, dataset, data frame or list of rows (see `load_rows`).
        split: of a hub dataset, a saved folder, a `DatasetDict` or a JSON object of several lists.
        format: a schema's name (schemas.py has the table), or `"auto"` to detect it from the columns.
        trace: which of a row's `generations` are used in OpenR1 data: `"first"`, `"first_correct"`, `"all"`,
            `"all_correct"` or an index. Other schemas have one completion a row.
        limit: the number of examples at most.
        columns: the source's name for a schema's column, `{"prompt": "my_col"}`; `{"id": None}` numbers the rows
            instead of reading ids, and any other None does without an optional column.
        turns: of a conversation of several assistant turns the loss is on the `"last"`, or with `"all"` on all of them;
            one whose `weight` is 0 gets none.
    Returns:
        The examples as plain text, before any chat template.
    Raises:
        DataError: naming file, row and remedy: unreadable source, missing or mistyped column, repeated ids, empty
            completions.
        ConfigError: an unknown format, trace, turns or rename.
    Example:
        >>> rows = [{"prompt": "What is 12 + 7?", "completion": "12 + 7 = 19."}]
        >>> inf.load_examples(rows)[0].completion
        '12 + 7 = 19.'
    """
    check_trace(trace)
    check_turns(turns)
    check_limit(limit)
    check_columns(columns)
    rows = load_rows(source, split=split)
    examples: list[Example] = []
    without: list[int] = []
    seen = 0
    for index, found in enumerate(read_examples(rows, format, trace, columns or {}, turns)):
        seen += 1
        examples += found
        if not found:
            without.append(index)
        # Stop before the next row is converted, since it may be broken.
        if limit is not None and len(examples) >= limit:
            break
    if limit is not None:
        del examples[limit:]
    places = truncated_list(rows.place(i).removeprefix(f"{rows.name}, ") for i in without)
    if not examples:
        raise DataError(
            f"{rows.name}: no row has a trace for trace={trace!r}; choose another, such as trace='first', or fill in "
            f"the traces of {places}"
        )
    if without:
        logger.warning(
            "%s: %d of %d rows have no trace for trace=%r and are left out: %s",
            rows.name, len(without), seen, trace, places,
        )  # fmt: skip
    _check_ids(examples, rows)
    check_completions(examples, lambda e: f"{e.id} ({rows.place(e.row)})")
    return examples


def check_limit(limit: int | None) -> None:
    """Raise ConfigError unless `limit` is None or a whole number of at least 1."""
    if limit is None:
        return
    if not isinstance(limit, Integral) or isinstance(limit, bool) or limit < 1:
        raise ConfigError(f"{setting('limit')} is {shown(limit)}; it must be a whole number of at least 1, or left out")


def check_columns(columns: object) -> None:
    """Raise ConfigError unless `columns` is None, or maps names to names of columns (None: left out)."""
    if columns is None:
        return
    if not isinstance(columns, Mapping) or not all(
        isinstance(name, str | None) for pair in columns.items() for name in pair
    ):
        raise ConfigError(f"columns is {shown(columns)}; give names by names, such as {{'prompt': 'question'}}")


def _check_ids(examples: list[Example], rows: Rows) -> None:
    counts = Counter(example.id for example in examples)
    if len(counts) < len(examples):
        repeated = [f"{name} ({n} times)" for name, n in counts.items() if n > 1]
        raise DataError(
            f"{rows.name}: ids must be unique, repeated are {truncated_list(repeated)}; remove the copies, name "
            f"another column with {setting('columns', {'id': '...'})}, or use row numbers with "
            + setting("columns", {"id": None})
        )


def save_examples(
    examples: Sequence[Example],
    path: str | os.PathLike[str],
    source_rows: Rows | None = None,
    columns: Mapping[str, str | None] | None = None,
) -> int:
    """Write `examples` to `path` and return the number of rows; the extension chooses the format (`write_rows`).

    With `source_rows` (from `load_rows`) the file has the source's own rows and columns, of which only those of
    `examples` are kept, traces within a row included; `columns` are the renames given to `load_examples`.
    `source_rows.suffix` is the extension that keeps the source's format.

    Without it the columns are `id`, `prompt` and `completion`, and `answer` and `label` where any example has one;
    prompt and completion are messages where any example has other turns than the prompt, or reasoning held apart. Read
    again with `turns="all"`, the loss is on the same turns: earlier assistant turns have a `weight`.
    """
    if source_rows is not None:
        with reading(f"{source_rows.name}, on writing its rows to {os.fspath(path)}"):
            return write_rows(kept_rows(source_rows, examples, columns), path, schema=source_rows.schema)
    optional = [name for name in ("answer", "label") if any(getattr(e, name) is not None for e in examples)]
    chat = any(e.context or e.between or e.reasoning is not None for e in examples)
    return write_rows([_as_row(example, optional, chat) for example in examples], path)


def _as_row(example: Example, optional: list[str], chat: bool) -> Row:
    values = asdict(example)
    row: Row = {name: values[name] for name in ("id", "prompt", "completion", *optional)}
    if chat:
        row["prompt"] = [
            {"role": role, "content": content} | ({"weight": int(i in example.learnt)} if role == "assistant" else {})
            for i, (role, content) in enumerate(example.turns)
        ]
        row["completion"] = [_last_message(example)]
    return row


def _last_message(example: Example) -> Row:
    """Return the completion as a message, with its reasoning in a field of its own where the example holds it apart."""
    message = {"role": "assistant", "content": example.completion}
    if example.reasoning is None:
        return message
    opening = with_reasoning(example.reasoning, "")
    return message | {"reasoning": example.reasoning, "content": example.completion.removeprefix(opening)}
