"""Find columns that by name or length hold a trace or a part of the prompt, and that the schema in use does not
read.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from statistics import median
from typing import TYPE_CHECKING, Any

from influence_fast.data.cells import texts
from influence_fast.data.column_names import is_prompt_name, is_reasoning_name, is_trace_name, words
from influence_fast.data.conversations import Draft
from influence_fast.data.rows import Rows
from influence_fast.errors import truncated_list

if TYPE_CHECKING:
    from influence_fast.data.schemas import Schema

Columns = Mapping[str, str | None]

_QUESTIONS = ("prompt", "question", "problem", "query", "instruction", "input")
_SOLUTIONS = ("completion", "solution", "answer")
# Columns that are trained on, as schemas call them.
_TAKEN = ("completion", "solution", "output", "response", "generated_solution", "answer")

_SAMPLE = 32  # rows whose unread columns are measured
_TEMPLATE = 200
_WORDS = 3  # text of fewer words is a name, a date or a source


def likely_columns(columns: Iterable[str]) -> tuple[str, str, str | None]:
    """Return the columns that most likely hold prompt, completion and reasoning.

    "..." stands for a prompt or completion that cannot be told, None for no reasoning apart.
    """
    names = list(columns)
    plain = {name: " ".join(words(name)) for name in names}
    prompt = next((name for question in _QUESTIONS for name in names if plain[name] == question), "...")
    rest = [name for name in names if name != prompt]
    reasoning = next((name for name in rest if is_reasoning_name(name)), None)
    completion = next((name for name in rest if is_trace_name(name) and not is_reasoning_name(name)), None)
    if completion is None:
        solved = [name for solution in _SOLUTIONS for name in rest if plain[name] == solution]
        # A column called `answer` is read as the answer whatever the completion is.
        completion = next((name for name in solved if reasoning is None or name != "answer"), None)
    if completion is None:
        return prompt, reasoning or "...", None
    return prompt, completion, reasoning


class UnreadColumns:
    """Watch for columns that seem to hold a trace or a part of the prompt and that no example shows.

    Columns count by their names, and columns of any name where their text in the first rows is longer than what is
    trained on. `read` are the columns that the schema reads, `ignored` those that it passes over with reason.
    `suspects` must be among the columns of the rows that `see` is given.
    """

    def __init__(self, rows: Rows, read: Iterable[str], ignored: Iterable[str | None]) -> None:
        self._rows = rows
        self._passed = {*read, *ignored}
        self._known = set(self._passed)
        self.suspects = {name for name in rows.columns if self._is_suspect(name)}
        self._found: dict[str, None] = {}
        self._first: list[tuple[Mapping[str, Any], list[Draft]]] = []

    def _is_suspect(self, name: Any) -> bool:
        if not isinstance(name, str) or name in self._known:
            return False
        return is_trace_name(name) or is_prompt_name(name)

    def see(self, row: Mapping[str, Any], drafts: list[Draft]) -> None:
        """Record one row and its drafts. A column whose text the drafts show all the same is not reported."""
        if len(self._first) < _SAMPLE:
            self._first.append((row, drafts))
        if not drafts:
            return
        for name in row:
            if name in self._found or name in self._known:
                continue
            if not self._is_suspect(name):
                self._known.add(name)
                continue
            held = list(texts(row[name]))
            if held and not all(any(text in shown for shown in _shown(drafts)) for text in held):
                self._found[name] = None

    def say(self, logger: logging.Logger, schemas: Iterable[Schema], schema: Schema, columns: Columns) -> None:
        """Log what was found, and how to read it; `schemas` are all that there are."""
        source = self._rows.name
        traces = [name for name in self._found if is_trace_name(name)]
        if traces:
            logger.warning(
                '%s: not read by format "%s", though by name they hold traces: %s; %s',
                source, schema.name, truncated_list(traces), self._remedy(traces, schemas, schema, columns),
            )  # fmt: skip
        rest = [name for name in self._found if name not in traces]
        if rest:
            logger.warning(
                '%s: not read by format "%s", though by name they belong to the prompt: %s; write their text into the '
                "prompt where the model is to see it%s",
                source, schema.name, truncated_list(rest),
                ', or give columns={"system": "..."} for a system turn' if "system" in schema.columns else "",
            )  # fmt: skip
        long = [name for name in self._longer() if name not in self._found]
        if long:
            logger.warning(
                '%s: not read by format "%s", though they hold longer texts than those that are trained on: %s; %s',
                source, schema.name, truncated_list(long), self._remedy(long, schemas, schema, columns),
            )  # fmt: skip

    def _longer(self) -> list[str]:
        """Return the unread columns of the first rows whose median text is longer than the median completion."""
        taken = [len(draft.completion) for _, drafts in self._first for draft in drafts]
        lengths: dict[str, list[int]] = {}
        whole: Iterable[Mapping[str, Any]] = (row for row, _ in self._first)
        # Rows of an Arrow source were read without these columns.
        if self._rows.schema is not None:
            whole = islice(self._rows.read(), len(self._first))
        for row, (_, drafts) in zip(whole, self._first, strict=False):
            for name in row if drafts else ():
                held = " ".join(texts(row[name])) if name not in self._passed else ""
                if len(held.split()) >= _WORDS or not held.isascii():
                    lengths.setdefault(name, []).append(_length_of_the_rest(held, drafts))
        return [name for name, found in lengths.items() if median(found) > median(taken)]

    def _remedy(self, names: list[str], schemas: Iterable[Schema], schema: Schema, columns: Columns) -> str:
        present = set(self._rows.columns)
        other = next(
            (each for each in schemas if present.issuperset(each.required) and set(each.required) & set(names)), None
        )
        if other is not None and not set(columns) - {"id", "label", "answer"}:
            return f'to train on them instead give format="{other.name}"'
        if schema.name in ("sharegpt", "messages") and is_reasoning_name(names[0]):
            return "to train on them write their text into the field 'reasoning' of the assistant's message"
        first = schema.required[0]
        prompt = (columns.get(first) or first) if first in _QUESTIONS else "..."
        taken = next((name for name in schema.required if name in _TAKEN), None)
        if taken is not None and is_reasoning_name(names[0]):
            return (
                f'to train on one of them before the completion give columns={{"prompt": "{prompt}", '
                f'"completion": "{columns.get(taken) or taken}", "reasoning": "{names[0]}"}}'
            )
        return (
            f'to train on one of them give columns={{"prompt": "{prompt}", "completion": "{names[0]}"}}, with '
            '"reasoning": "..." for one that comes before it'
        )


def _length_of_the_rest(text: str, drafts: list[Draft]) -> int:
    """Return the number of characters of `text` that the examples do not show; 0 where they show all of it.

    A text that holds a completion is a rendered conversation, of which `_TEMPLATE` characters may be the template's.
    """
    shown = {part.strip() for part in _shown(drafts)}
    if any(text in part for part in shown):
        return 0
    is_rendered = any(draft.completion.strip() in text for draft in drafts)
    return len(text) - sum(len(part) for part in shown if part in text) - (_TEMPLATE if is_rendered else 0)


def _shown(drafts: list[Draft]) -> Iterator[str]:
    for draft in drafts:
        yield draft.completion
        yield draft.prompt
        for _, content in (*draft.context, *draft.between):
            yield content
