"""Split a tokenized completion into steps: lines, sentences, tokens, or spans of one's own.

Every token that is learnt belongs to exactly one step, the one that its last character lies in, so that sums over
steps are sums over the example. Blank lines and the end of the turn belong to the step before them.
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from influence_fast.data.packing import IGNORED, example_name
from influence_fast.errors import ConfigError, DataError, did_you_mean, setting

LINES, SENTENCES, TOKENS = "lines", "sentences", "tokens"
KINDS = (LINES, SENTENCES, TOKENS)
Splitter = Callable[[str], Sequence[tuple[int, int]]]
Spans = Sequence[Sequence[tuple[int, int]]]  # of each example, (start, end) places in its tokens

_LINE = re.compile(r"[^\n]*\n(?:[ \t]*\n)*|[^\n]+\Z")
_SENTENCE = re.compile(r".*?(?:[.!?][\"')\]]*(?:\s+|\Z)|\n\s*|\Z)", re.DOTALL)
_UNFINISHED = "\ufffd"  # a character of which more bytes follow


@dataclass(frozen=True, slots=True)
class Step:
    """One step of a completion.

    Attributes:
        tokens: places in `input_ids` of the learnt tokens that belong to it, in order.
        start, end: its characters in the completion's text; None where no text was needed.
        text: those characters; empty where no text was needed.
    """

    tokens: tuple[int, ...]
    start: int | None = None
    end: int | None = None
    text: str = ""


def learnt_places(example: Mapping[str, Any]) -> list[int]:
    """Return the places of the tokens whose loss counts; the first token of a text is predicted from nothing."""
    labels = example["labels"]
    return [place for place in range(1, len(labels)) if int(labels[place]) != IGNORED]


def split_steps(example: Mapping[str, Any], steps: str | Splitter, tokenizer: Any = None) -> list[Step]:
    """Split the learnt tokens of an example into steps.

    Args:
        example: `{"input_ids", "labels"}`, 1-D.
        steps: "lines", "sentences", "tokens", or a function from the completion's text to the (start, end) characters
            of its steps, in order and without overlap; what lies between two of them belongs to the first.
        tokenizer: the model's own; "tokens" needs none.

    Returns:
        The steps that have a token, in order.

    Raises:
        ConfigError: an unknown kind of steps, or no tokenizer for one that reads the text.
        DataError: spans that overlap or lie outside the text.

    Example:
        >>> split_steps({"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, "tokens")
        [Step(tokens=(1,), start=None, end=None, text=''), Step(tokens=(2,), start=None, end=None, text='')]
    """
    if isinstance(steps, str) and steps not in KINDS:
        raise ConfigError(f": unknown value {steps!r}", key="steps", value=steps, remedy=did_you_mean(steps, KINDS))
    places = learnt_places(example)
    if steps == TOKENS and tokenizer is None:
        return [Step((place,)) for place in places]
    if tokenizer is None:
        raise ConfigError(
            f"{setting('steps')}: {steps if isinstance(steps, str) else 'a function'} reads texts, and "
            "tokens have none: give the tokenizer"
        )
    pieces = token_texts([int(example["input_ids"][place]) for place in places], tokenizer)
    ends = [end for _, end in pieces.bounds]
    if steps == TOKENS:
        spans = list(pieces.bounds)
        return [Step((p,), a, b, pieces.text[a:b]) for p, (a, b) in zip(places, spans, strict=True)]
    split = _BY_KIND[steps] if isinstance(steps, str) else steps
    # The end of the turn is no line of its own.
    special = set(getattr(tokenizer, "all_special_ids", ()))
    ids = [int(example["input_ids"][place]) for place in places]
    written = max((end for name, end in zip(ids, ends, strict=True) if name not in special), default=len(pieces.text))
    spans = _checked(list(split(pieces.text[:written])), written)
    found: list[Step] = []
    for number, (start, _) in enumerate(spans):
        end = spans[number + 1][0] if number + 1 < len(spans) else len(pieces.text)
        first = 0 if number == 0 else start
        # a token without characters of its own, as of a letter whose bytes are several tokens, ends where it starts
        inside = [p for p, last in zip(places, ends, strict=True) if first < last <= end or (last == 0 == first)]
        if inside:
            found.append(Step(tuple(inside), first, end, pieces.text[first:end]))
    return found


def split_all(
    examples: Sequence[Mapping[str, Any]], steps: str | Splitter | Spans, tokenizer: Any = None
) -> list[list[Step]]:
    """Split every example into steps, by one rule or by spans of its own.

    Args:
        examples: `{"input_ids", "labels"}`, 1-D.
        steps: as for `split_steps`, or for each example the (start, end) places of its steps in `input_ids`, in order
            and without overlap; what is learnt between two of them belongs to the first.
        tokenizer: the model's own; spans of tokens need none, and have texts where it is given.

    Raises DataError for spans that do not fit the examples, and what `split_steps` raises.
    """
    if isinstance(steps, str) or callable(steps):
        return [split_steps(example, steps, tokenizer) for example in examples]
    if len(steps) != len(examples):
        raise DataError(
            f"there are spans of {len(steps)} examples, and {len(examples)} examples: give one list for each"
        )
    return [
        _by_places(example, spans, tokenizer, example_name(example, number))
        for number, (example, spans) in enumerate(zip(examples, steps, strict=True))
    ]


def _by_places(example: Mapping[str, Any], spans: Sequence[tuple[int, int]], tokenizer: Any, name: str) -> list[Step]:
    """Split the learnt tokens of an example by spans of places in its tokens."""
    try:
        starts = [start for start, _ in _checked(list(spans), len(example["input_ids"]))]
    except (TypeError, ValueError):
        raise DataError(f"the steps of {name} are no (start, end) places of its tokens: {spans!r:.80}") from None
    except DataError:
        raise DataError(
            f"the spans of {name} overlap or leave its {len(example['input_ids'])} tokens: {list(spans)[:5]}"
        ) from None
    members: list[list[int]] = [[] for _ in starts]
    for place in learnt_places(example):
        members[max(bisect.bisect_right(starts, place) - 1, 0)].append(place)
    if tokenizer is None:
        return [Step(tuple(places)) for places in members if places]
    learnt = [place for places in members for place in places]
    pieces = token_texts([int(example["input_ids"][place]) for place in learnt], tokenizer)
    bounds = dict(zip(learnt, pieces.bounds, strict=True))
    found = []
    for places in filter(None, members):
        start, end = bounds[places[0]][0], bounds[places[-1]][1]
        found.append(Step(tuple(places), start, end, pieces.text[start:end]))
    return found


@dataclass(frozen=True, slots=True)
class TokenTexts:
    """The text of tokens, and where each one's characters are in it: (start, end)."""

    text: str
    bounds: tuple[tuple[int, int], ...]


def token_texts(ids: Sequence[int], tokenizer: Any) -> TokenTexts:
    """Decode tokens one after another, so that each has its characters.

    Tokens that only together make a character share it. Decoding looks back as far as the last characters alone, since
    some tokenizers write a token otherwise at the beginning of a text.
    """

    def decode(some: Sequence[int]) -> str:
        return str(tokenizer.decode(list(some), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    text, bounds = "", list[tuple[int, int]]()
    start = read = 0
    before = ""
    for place in range(len(ids)):
        now = decode(ids[start : place + 1])
        if now.endswith(_UNFINISHED) and place + 1 < len(ids):
            continue
        piece = now[len(before) :] if now.startswith(before) else now
        bounds += [(len(text), len(text) + len(piece))] * (place + 1 - read)
        text += piece
        start, read = read, place + 1
        before = decode(ids[start:read])
    return TokenTexts(text, tuple(bounds))


def _checked(spans: list[tuple[int, int]], length: int) -> list[tuple[int, int]]:
    """Return the spans that are not empty. Raises DataError for spans out of order or outside the text."""
    kept = [(int(start), int(end)) for start, end in spans if end > start]
    last = 0
    for start, end in kept:
        if start < last or end > length:
            raise DataError(f"the steps' spans overlap or leave the text of {length} characters: {kept[:5]}")
        last = end
    return kept or [(0, length)]


def _by_pattern(pattern: re.Pattern[str]) -> Splitter:
    def split(text: str) -> list[tuple[int, int]]:
        spans = [found.span() for found in pattern.finditer(text) if found.end() > found.start()]
        # what has nothing to read joins the step before it, or at the beginning the one after it
        joined: list[tuple[int, int]] = []
        for start, end in spans:
            blank = not text[start:end].strip()
            if joined and (blank or not text[joined[-1][0] : joined[-1][1]].strip()):
                joined[-1] = (joined[-1][0], end)
            else:
                joined.append((start, end))
        return joined

    return split


_BY_KIND: dict[str, Splitter] = {LINES: _by_pattern(_LINE), SENTENCES: _by_pattern(_SENTENCE)}
