"""Columns that hold a trace or a part of the prompt by their names, and that the schema in use does not read."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from influence_fast.data.cells import is_blank, is_list
from influence_fast.data.conversations import Draft
from influence_fast.errors import listing

if TYPE_CHECKING:
    from influence_fast.data.schemas import Schema

# A name counts by its end: `cot` and `long_cot` hold traces, `cot_type` and `trace_id` do not.
_TRACE = re.compile(
    r"(^|_)(thinking|thoughts?|reasoning(_content)?|cots?|chains?_of_thoughts?|rationales?|trajector(y|ies)|traces?"
    r"|chosen|generations?|responses?|attempts?|completions?|outputs?|scratchpad|explanations?|conversations?|messages"
    r"|(full|detailed|generated|model|deepseek|r1|gemini|qwen\w*|gpt\w*|teacher|student)_(solution|answer|text)s?)$",
    re.IGNORECASE,
)
_PROMPT = re.compile(r"^(system(_prompt)?|tools|history|context|input)$", re.IGNORECASE)
_QUESTIONS = ("prompt", "question", "problem", "query", "instruction", "input")
_SOLUTIONS = ("completion", "solution", "answer")


def likely_columns(columns: Iterable[str]) -> tuple[str, str]:
    """Return the columns that most likely hold prompt and completion, "..." for what cannot be told."""
    names = list(columns)
    prompt = next((name for name in _QUESTIONS if name in names), "...")
    rest = [name for name in names if name != prompt]
    trace = next((name for name in rest if _TRACE.search(name)), None)
    return prompt, trace or next((name for name in _SOLUTIONS if name in rest), "...")


class UnreadColumns:
    """Watch rows go by for columns of such names that hold something and that no example shows.

    `read` are the columns that the schema reads, `ignored` those that it passes over with reason. `suspects` must be
    among the columns of the rows that `see` is given.
    """

    def __init__(self, columns: Iterable[str], read: Iterable[str], ignored: Iterable[str | None]) -> None:
        self._known = {*read, *ignored}
        self.suspects = {name for name in columns if self._is_suspect(name)}
        self._found: dict[str, None] = {}

    def _is_suspect(self, name: Any) -> bool:
        if not isinstance(name, str) or name in self._known:
            return False
        return bool(_TRACE.search(name) or _PROMPT.search(name))

    def see(self, row: Mapping[str, Any], drafts: list[Draft]) -> None:
        """Look at one row and at what was made of it. A column whose text the examples show all the same is no loss."""
        if not drafts:
            return
        for name in row:
            if name in self._found or name in self._known:
                continue
            if not self._is_suspect(name):
                self._known.add(name)
                continue
            texts = list(_texts(row[name]))
            if texts and not all(any(text in shown for shown in _shown(drafts)) for text in texts):
                self._found[name] = None

    def say(self, logger: logging.Logger, source: str, schema: Schema, columns: Mapping[str, str | None]) -> None:
        """Log what was found, and how to read it."""
        first = schema.required[0]
        prompt = (columns.get(first) or first) if first in _QUESTIONS else "..."
        traces = [name for name in self._found if _TRACE.search(name)]
        if traces:
            logger.warning(
                '%s: not read by format "%s", though by name they hold traces: %s; to train on one of them give '
                'columns={"prompt": "%s", "completion": "%s"}, with "reasoning": "..." for one that comes before it',
                source, schema.name, listing(traces), prompt, traces[0],
            )  # fmt: skip
        rest = [name for name in self._found if name not in traces]
        if rest:
            logger.warning(
                '%s: not read by format "%s", though by name they belong to the prompt: %s; write their text into the '
                "prompt where the model is to see it%s",
                source, schema.name, listing(rest),
                ', or give columns={"system": "..."} for a system turn' if "system" in schema.columns else "",
            )  # fmt: skip


def _texts(value: Any) -> Iterator[str]:
    """The texts in a cell: itself, or those of its list of texts or messages. Numbers and flags are none."""
    if isinstance(value, str):
        if not is_blank(value):
            yield value.strip()
    elif isinstance(value, dict):
        for key, part in value.items():
            if key not in ("role", "from", "type", "name"):
                yield from _texts(part)
    elif is_list(value):
        for part in value:
            yield from _texts(part)


def _shown(drafts: list[Draft]) -> Iterator[str]:
    for draft in drafts:
        yield draft.completion
        yield draft.prompt
        for _, content in (*draft.context, *draft.between):
            yield content
