"""Find the end of an assistant's turn: the chat template's own token or text, else the tokenizer's EOS."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class EndOfTurn:
    """The end of an assistant's turn: `text` as the template writes it, and `token`, its id.

    `token` is None where the end is several tokens (a template in plain text): generation then stops at the text.
    """

    text: str
    token: int | None
    # False for an EOS token in place of the template's own end.
    own: bool = field(default=True, compare=False)

    def within(self, tail: str, tokenizer: PreTrainedTokenizerBase) -> str:
        """Return the part of `tail`, the template's text after a completion, that belongs to the turn: up to its end.

        What follows (a line break in most templates) is never generated, so there is no loss on it. A template that
        ends no turn gets this end's text.
        """
        if self.text in tail:
            return tail[: tail.index(self.text) + len(self.text)]
        return _end_of(tail, None, tokenizer) or self.text

    def after_turn(self, text: str, tokenizer: PreTrainedTokenizerBase) -> int:
        """Return how many characters of `text`, the template's after an earlier assistant turn, belong to the turn.

        Templates may end it by another token than the last one (gpt-oss: `<|end|>`, and `<|return|>` at the end).
        """
        stripped = text.lstrip()
        blank = len(text) - len(stripped)
        if stripped.startswith(self.text):
            return blank + len(self.text)
        first = next(iter(_pieces(stripped, tokenizer)), "")
        return blank + len(first) if self.own and first in _atoms(tokenizer) else 0


def find_end(tail: str, followed: str | None, opening: str, tokenizer: PreTrainedTokenizerBase) -> EndOfTurn | None:
    """Find the end of turn in a template's text after the last completion.

    Args:
        tail: what the template writes after the last assistant turn.
        followed: what it writes there where a user's turn follows; None where that is not known. Phi-3 ends the whole
            conversation by another token than each turn, and what both texts begin with is the turn's own end. A
            template that leaves the last turn open has its end here alone.
        opening: what it writes before a conversation's first content, which ends no turn.
        tokenizer: the tokenizer of the template.

    Returns None where neither the template nor the tokenizer has an end.
    """
    text = _end_of(tail, followed, tokenizer).strip()
    if not text and followed is not None:
        first = next(iter(_pieces(followed.lstrip(), tokenizer)), "")
        text = first if first in _atoms(tokenizer) and first not in opening else ""
    if not text:
        if tokenizer.eos_token_id is None:
            return None
        return EndOfTurn(str(tokenizer.eos_token), int(tokenizer.eos_token_id), own=False)
    last = _pieces(text, tokenizer)[-1]
    token = tokenizer.convert_tokens_to_ids(last) if last in _atoms(tokenizer) else None
    return EndOfTurn(text, token if isinstance(token, int) else None)


def shared_start(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Return the number of leading items (characters, tokens) that two sequences have in common."""
    places = range(min(len(one), len(other)))
    return next((i for i in places if one[i] != other[i]), len(places))


def _end_of(tail: str, followed: str | None, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the end of turn at the start of `tail`, white space before it included; blank where there is none."""
    pieces = _pieces(tail, tokenizer)
    if followed is not None:
        shared, length = shared_start(tail, followed), 0
        for piece in pieces:
            if length + len(piece) > shared:
                break
            length += len(piece)
        if tail[:length].strip():
            return tail[:length].rstrip()
    found, atoms = "", _atoms(tokenizer)
    for piece in pieces:
        ended = bool(found.strip())
        # Text after a token belongs to the next turn, or is nothing.
        if ended and piece not in atoms:
            break
        found += piece
        if followed is None and piece in atoms:
            break
    return found.rstrip()


def _pieces(text: str, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Split a text into added tokens, line breaks and the pieces between them."""
    longest_first = sorted([*_atoms(tokenizer), "\n"], key=len, reverse=True)
    return [piece for piece in re.split("(" + "|".join(map(re.escape, longest_first)) + ")", text) if piece]


def _atoms(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """Return the tokens that are matched in a text before anything else, but for white space alone (Gemma's)."""
    added = {str(token) for token in getattr(tokenizer, "added_tokens_decoder", {}).values()}
    return {token for token in added | set(tokenizer.all_special_tokens) if token.strip()}
