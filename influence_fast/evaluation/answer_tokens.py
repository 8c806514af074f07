r"""Split the text of an answer, LaTeX or plain, into tokens: numbers, commands, letters, words and symbols."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

DEPTH = 40  # nested brackets, fractions and powers; answers have a handful
TOKENS = 1200
_TEXT_COMMANDS = frozenset(
    str.split("text textrm textbf textit mbox textnormal mathrm mathbf mathit operatorname mathsf")
)
OPENING, CLOSING = {"(": ")", "[": "]", "{": "}", r"\{": r"\}"}, {")", "]", "}", r"\}"}


class Unparsed(Exception):
    """Raised for text that the grammar does not know."""


@dataclass(frozen=True, slots=True)
class Token:
    """A piece of an answer; `kind` is number, command, run (letters), word (letters in a `\\text`) or symbol."""

    kind: str
    text: str
    spaced: bool = False  # a space stands before it


_TOKEN = re.compile(
    r"(?P<space>\s+)|(?P<number>\d+\.(?=\s*\\(?:overline|bar)\b)|\d+(?:\.\d+)?|\.\d+)"
    r"|(?P<command>\\[A-Za-z]+|\\.)|(?P<run>[A-Za-z]+)|(?P<symbol>.)",
    re.DOTALL | re.ASCII,
)


def tokens_of(text: str) -> list[Token]:
    r"""Split a cleaned answer into tokens; the letters in a `\text{...}` become words. Raises Unparsed if too many."""
    found: list[Token] = []
    spaced, inside, depth, brackets, pending = False, 0, 0, 0, ""
    for match in _TOKEN.finditer(text):
        kind, piece = str(match.lastgroup), match.group()
        if kind == "space":
            spaced = True
            continue
        if kind == "command" and piece[1:] in _TEXT_COMMANDS:
            pending = piece[1:]
            spaced = spaced or pending.startswith(("text", "mbox"))
            continue
        depth += {"{": 1, "}": -1}.get(piece, 0)
        if pending and piece == "{":
            inside, pending = depth, ""
            continue
        if inside and piece == "}" and depth == inside - 1:
            inside, spaced = 0, True
            continue
        pending = ""
        if kind == "run" and inside:
            kind = "word"
        found.append(Token(kind, piece, spaced))
        spaced = False
        brackets += (piece in OPENING) - (piece in CLOSING)
        if len(found) > TOKENS or brackets > DEPTH:
            raise Unparsed("too long")
    return found


def split(tokens: Sequence[Token], at: frozenset[str]) -> list[tuple[list[Token], str]]:
    """Split tokens where one of `at` stands outside all brackets: (part, the separator before it)."""
    parts: list[tuple[list[Token], str]] = [([], "")]
    depth = 0
    for token in tokens:
        if token.text in OPENING:
            depth += 1
        elif token.text in CLOSING:
            depth -= 1
        if depth == 0 and token.text.lower() in at:
            parts.append(([], token.text.lower()))
        else:
            parts[-1][0].append(token)
    return parts
