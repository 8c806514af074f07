"""Read conversations: lists of messages in the forms that datasets use, and the turns that an example takes from them.

A message is `{"role", "content"}`, or ShareGPT's `{"from", "value"}`. An assistant's message may have its reasoning
in a field of its own (`reasoning`, `reasoning_content` or `thinking`) and a `weight`: 0 for no loss on it, or 1.
`train`, `trainable`, `training` and `loss` say the same with False and True.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from influence_fast.data.cells import Cells, Turn, is_blank, is_list, is_null, texts, truth
from influence_fast.data.column_names import is_metadata_name, is_trace_name

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
    "function": "function",
    "developer": "developer",
    "ipython": "ipython",
}

_TRAINED = ("train", "trainable", "training", "loss")
# Datasets disagree on whether 1 means loss or none.
_MASKS = ("mask", "masked", "loss_mask", "train_mask")
_READ = ("role", "from", "content", "value", "weight", *REASONING_FIELDS, *_CALLS, *_TRAINED, *_MASKS)

# Characters; shorter reasoning may begin an answer by chance.
_COPIED = 32


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a conversation.

    `content` is complete, the reasoning included; `weight` is 0 where there is no loss on it. `unread` are the names of
    its other fields that hold text.
    """

    role: str
    content: str
    reasoning: str | None = None
    weight: int | None = None
    unread: tuple[str, ...] = ()

    @property
    def learns(self) -> bool:
        """Return whether there may be a loss on this message."""
        return self.role == "assistant" and self.weight != 0

    @property
    def turn(self) -> Turn:
        """Return the message as (role, content)."""
        return self.role, self.content


@dataclass(frozen=True)
class Draft:
    """The parts of an example that depend on the schema; ids, labels and row numbers are read alike for all schemas.

    `cut`: turns after the completion were left out. `passed_over`: an earlier assistant turn has weight 1, and only
    the last turn is trained on. `unread`: fields of messages that hold text and are not read.
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
    unread: tuple[str, ...] = ()


def with_reasoning(reasoning: str, content: str) -> str:
    """Return the text of a turn whose reasoning is held apart from its content."""
    return f"<think>\n{reasoning}\n</think>\n\n{content}"


def joined(cells: Cells, reasoning: str, text: str, what: str) -> tuple[str, str | None]:
    """Return (text of a turn with its reasoning, reasoning); the reasoning is None where `text` already had it.

    Raises DataError where `text` holds another reasoning; `what` names it in the message.
    """
    head, closed, _ = text.partition("</think>")
    opened = text.lstrip().startswith("<think>")
    if opened or (closed and "<think>" not in head):
        if reasoning.strip() in head:
            return text, None
        raise cells.error(f"{what} has reasoning in a field of its own and another in its content; remove one of them")
    start = re.sub(r"^\s*(<\|?\w+\|?>\s*)?", "", text)
    if len(reasoning.strip()) >= _COPIED and start.startswith(reasoning.strip()):
        return text, None
    return with_reasoning(reasoning, text), reasoning


def without_tags(reasoning: str) -> str:
    """Return reasoning that is held apart from its content without the <think> tags that it may have nevertheless."""
    found = re.fullmatch(r"\s*<think>\n?((?:(?!</?think>).)*?)\n?</think>\s*", reasoning, re.DOTALL)
    return found[1] if found else reasoning


def messages(cells: Cells, name: str) -> list[Message]:
    """Return the messages of a column, in either form. Raises DataError naming the message and the remedy."""
    column = cells.column(name)
    return [
        _message(cells, message, f"message {i} of column {column!r}") for i, message in enumerate(cells.sequence(name))
    ]


def _message(cells: Cells, message: Any, what: str) -> Message:
    role = message.get("role") if isinstance(message, dict) else None
    lenient = not isinstance(role, str)
    if lenient:
        role = message.get("from") if isinstance(message, dict) else None
    if not isinstance(role, str):
        raise cells.error(f'{what} is not of the form {{"role": ..., "content": ...}}; rewrite it so')
    _refuse_calls(cells, message, role, what)
    role = _known_role(cells, role, what, lenient)
    weight = _weight(cells, message, role, what, lenient)
    reasoning = _reasoning(cells, message, role, what)
    text = _content(cells, message, what, may_be_null=reasoning is not None)
    unread = tuple(_unread(message, text))
    if reasoning is None:
        return Message(role, text, weight=weight, unread=unread)
    text, reasoning = joined(cells, without_tags(reasoning), text, what)
    return Message(role, text, reasoning, weight, unread)


def _refuse_calls(cells: Cells, message: dict[str, Any], role: str, what: str) -> None:
    called = next((key for key in _CALLS if not _is_empty(message.get(key)) or role.lower() == key), None)
    if called is not None:
        raise cells.error(
            f"{what} has {called!r}, which is not supported; write the call as text in 'content', or remove the row"
        )


def _is_empty(value: Any) -> bool:
    return is_blank(value) or (isinstance(value, dict) and not value) or (is_list(value) and len(value) == 0)


def _known_role(cells: Cells, role: str, what: str, is_speaker: bool) -> str:
    found = _SPEAKERS.get(role.strip().lower())
    if found is None:
        known = f"known: {', '.join(_SPEAKERS)}"
        if is_speaker:
            raise cells.error(f"{what} is from {role!r}; {known}; rename the speaker")
        raise cells.error(f"{what} has the role {role!r}; {known}; rename the role")
    return found


def _content(cells: Cells, message: dict[str, Any], what: str, may_be_null: bool) -> str:
    given = {key: message[key] for key in ("content", "value") if not is_null(message.get(key))}
    if not given:
        if may_be_null:
            return ""
        state = "is null" if "content" in message or "value" in message else "is missing"
        raise cells.error(f"the content of {what} {state}; fill it in or remove the row")
    found = [_text(cells, value, what) for value in given.values()]
    if found[-1] != found[0]:
        raise cells.error(f"{what} has 'content' and 'value' with different texts; leave one of the two")
    return found[0]


def _text(cells: Cells, content: Any, what: str) -> str:
    if is_list(content) and all(_is_text_part(part) for part in content):
        content = "".join(part["text"] for part in content)
    return cells.as_text(content, f"the content of {what}")


def _unread(message: dict[str, Any], shown: str, within: str = "") -> Iterator[str]:
    """Yield names of fields that hold text missing from `shown`: a trace by its name, or text of several words."""
    for key, value in message.items():
        if (not within and key in _READ) or (is_metadata_name(key) and not is_trace_name(key)):
            continue
        if isinstance(value, dict):
            yield from _unread(value, shown, f"{within}{key}.")
        elif any(text not in shown and (is_trace_name(key) or len(text.split()) > 1) for text in texts(value)):
            yield f"{within}{key}"


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


def _weight(cells: Cells, message: dict[str, Any], role: str, what: str, lenient: bool) -> int | None:
    """Return a message's loss weight, 0 or 1; None where it has none.

    ShareGPT data gives every turn a weight, that of a person's turns being 0 (`lenient`): no loss is what they get.
    """
    mask = next((key for key in _MASKS if not is_null(message.get(key))), None)
    if mask is not None:
        raise cells.error(
            f"{what} has {mask!r}, of which 1 may mean loss or none; write 'weight' instead: 0 (no loss) or 1"
        )
    value = message.get("weight")
    if not is_null(value) and (isinstance(value, bool) or value not in (0, 1)):
        raise cells.error(f"{what} has the weight {value!r}; write 0 (no loss on it) or 1, or leave it out")
    found = {} if value is None or is_null(value) else {"weight": int(value)}
    for key in _TRAINED:
        if not is_null(message.get(key)):
            trained = truth(message[key])
            if trained is None:
                raise cells.error(f"{what} has {key!r} {message[key]!r}; write false (no loss on it) or true")
            found[key] = int(trained)
    if not found:
        return None
    if len(set(found.values())) > 1:
        raise cells.error(f"{what} has {' and '.join(map(repr, found))} that contradict each other; leave one of them")
    key, weight = next(iter(found.items()))
    # A flag on every turn says of a person's that it gets no loss, which is so anyway.
    if role != "assistant" and not (weight == 0 and (lenient or key != "weight")):
        name = "weight" if key == "weight" else key
        raise cells.error(
            f"{what} is a {role!r} turn with a {name}; only 'assistant' turns can be trained on, remove the {name}"
        )
    return weight


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
        unread=tuple(dict.fromkeys(name for message in found for name in message.unread)),
    )
