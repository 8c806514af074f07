"""Conversations: lists of messages in the forms that datasets have them, and the turns that an example takes of them.

A message is `{"role", "content"}`, or ShareGPT's `{"from", "value"}`. An assistant's message may have its reasoning
in a field of its own (`reasoning`, `reasoning_content` or `thinking`) and a `weight`: 0 for no loss on it, or 1.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from influence_fast.data.cells import Cells, Turn, is_blank, is_null

TURN_CHOICES = ("last", "all")

REASONING_FIELDS = ("reasoning", "reasoning_content", "thinking")

_CALLS = ("tool_calls", "function_call")

# ShareGPT's names of speakers; a "function_call" turn is a call, and refused as one.
_SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}


@dataclass(frozen=True, slots=True)
class Message:
    """One message. `content` is whole, the reasoning included; `learns` is False where its `weight` is 0."""

    role: str
    content: str
    reasoning: str | None = None
    weight: int | None = None

    @property
    def learns(self) -> bool:
        """Whether the loss may see this message."""
        return self.role == "assistant" and self.weight != 0

    @property
    def turn(self) -> Turn:
        """The message as (role, content)."""
        return self.role, self.content


@dataclass(frozen=True)
class Draft:
    """What a schema takes from a row; ids, labels and row numbers are the same for all schemas.

    `cut`: turns after the completion were left out. `passed_over`: an earlier assistant turn has weight 1, and only
    the last turn is trained on.
    """

    prompt: str
    completion: str
    answer: str | None
    trace: int | None = None
    context: tuple[Turn, ...] = ()
    between: tuple[Turn, ...] = ()
    learnt: tuple[int, ...] = ()
    reasoning: str | None = None
    cut: bool = False
    passed_over: bool = False


def with_reasoning(reasoning: str, content: str) -> str:
    """Return the text of a turn whose reasoning comes apart from its content."""
    return f"<think>\n{reasoning}\n</think>\n\n{content}"


def without_tags(reasoning: str) -> str:
    """Return reasoning that comes apart from its content without the tags that it may have all the same."""
    found = re.fullmatch(r"\s*<think>\n?((?:(?!</?think>).)*?)\n?</think>\s*", reasoning, re.DOTALL)
    return found[1] if found else reasoning


def messages(cells: Cells, name: str) -> list[Message]:
    """Return the messages of a column, in either form. Raises DataError naming the message and the remedy."""
    column = cells.column(name)
    return [
        _message(cells, message, f"message {i} of column {column!r}") for i, message in enumerate(cells.sequence(name))
    ]


def _message(cells: Cells, message: Any, what: str) -> Message:
    speaker = message.get("from") if isinstance(message, dict) else None
    role = message.get("role") if isinstance(message, dict) else None
    if not isinstance(role, str) and not isinstance(speaker, str):
        raise cells.error(f'{what} is not of the form {{"role": ..., "content": ...}}; rewrite it so')
    called = next((key for key in _CALLS if message.get(key) or speaker == key), None)
    if called is not None:
        raise cells.error(
            f"{what} has {called!r}, which is not supported; write the call as text in 'content', or remove the row"
        )
    if not isinstance(role, str):
        assert isinstance(speaker, str)
        role = _SPEAKERS.get(speaker)
        if role is None:
            raise cells.error(f"{what} is from {speaker!r}; known: {', '.join(_SPEAKERS)}; rename the speaker")
        content = message.get("value")
    else:
        role = _SPEAKERS[role] if role in ("human", "gpt") else role
        content = message.get("content")
    weight = _weight(cells, message.get("weight"), role, what, lenient=isinstance(speaker, str))
    reasoning = _reasoning(cells, message, role, what)
    reasoning = None if reasoning is None else without_tags(reasoning)
    text = _content(cells, content, what, may_be_null=reasoning is not None)
    if reasoning is None:
        return Message(role, text, weight=weight)
    if text.lstrip().startswith("<think>"):
        if reasoning.strip() in text:
            return Message(role, text, weight=weight)
        raise cells.error(f"{what} has reasoning in a field of its own and another in its content; remove one of them")
    return Message(role, with_reasoning(reasoning, text), reasoning, weight)


def _content(cells: Cells, content: Any, what: str, may_be_null: bool) -> str:
    if is_null(content) and may_be_null:
        return ""
    if isinstance(content, list) and all(_is_text_part(part) for part in content):
        content = "".join(part["text"] for part in content)
    return cells.as_text(content, f"the content of {what}")


def _is_text_part(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _reasoning(cells: Cells, message: dict[str, Any], role: str, what: str) -> str | None:
    given = {key: message[key] for key in REASONING_FIELDS if not is_blank(message.get(key))}
    if not given:
        return None
    key, value = next(iter(given.items()))
    text = cells.as_text(value, f"{key!r} of {what}")
    if role != "assistant":
        raise cells.error(f"{what} is a {role!r} turn with {key!r}; only an 'assistant' turn has reasoning, remove it")
    other = next((name for name, reasoning in given.items() if reasoning != text), None)
    if other is not None:
        raise cells.error(f"{what} has {key!r} and {other!r} with different texts; leave one of the two")
    return text


def _weight(cells: Cells, value: Any, role: str, what: str, lenient: bool) -> int | None:
    """0 or 1, or None where there is none.

    ShareGPT data gives every turn a weight, that of a person's turns being 0 (`lenient`): no loss is what they get.
    """
    if is_null(value):
        return None
    if isinstance(value, bool) or value not in (0, 1):
        raise cells.error(f"{what} has the weight {value!r}; write 0 (no loss on it) or 1, or leave it out")
    if role != "assistant" and not (lenient and value == 0):
        raise cells.error(
            f"{what} is a {role!r} turn with a weight; only 'assistant' turns can be trained on, remove the weight"
        )
    return int(value)


def conversation(cells: Cells, found: list[Message], answer: str | None, turns: str) -> Draft:
    """Return the draft whose completion is the last assistant message that has not weight 0.

    The last user turn before the completion is the prompt, what is before it the context, what is after it `between`.
    `turns`: "last", or "all" for the loss on all earlier assistant messages that have not weight 0, too.

    Raises DataError: no assistant message to train on, no user turn before it.
    """
    last = next((i for i in reversed(range(len(found))) if found[i].learns), None)
    if last is None:
        silent = any(message.role == "assistant" for message in found)
        why = "every 'assistant' message has weight 0" if silent else "no 'assistant' message to train on; add one"
        raise cells.error(f"{why}{'; give one weight 1' if silent else ''} or remove the row")
    before = found[:last]
    asked = next((i for i in reversed(range(last)) if before[i].role == "user"), None)
    if asked is None:
        told = f"a {before[-1].role!r} turn" if before else "nothing"
        raise cells.error(f"{told} comes before the completion where a 'user' turn is needed; mend the row")
    return Draft(
        prompt=before[asked].content,
        completion=found[last].content,
        answer=answer,
        context=tuple(message.turn for message in before[:asked]),
        between=tuple(message.turn for message in before[asked + 1 :]),
        learnt=tuple(i for i, message in enumerate(before) if message.learns) if turns == "all" else (),
        reasoning=found[last].reasoning,
        cut=last + 1 < len(found),
        passed_over=turns == "last" and any(message.weight == 1 and message.learns for message in before),
    )
