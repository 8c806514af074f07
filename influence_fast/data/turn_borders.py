"""Find the text between the prompt of a generation and a completion.

The prompt is what a template writes for a generation, the head what it writes before the content of an assistant's
turn. Mostly the head is the prompt, or goes on after it; where a prompt opens reasoning, or says more than a whole
conversation does, the two part.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from influence_fast.data.turn_ends import shared_start

_MARK = re.compile(r"(<[^<>\s]{1,60}>|\[/?[A-Za-z_]{2,30}\]|◁/?\w{1,30}▷|\n)")
_PLAIN_TAG = re.compile(r"<\w+>|\[\w+\]|◁\w+▷")


class Border(NamedTuple):
    """The text between prompt and completion, and the completion less what the prompt has opened already.

    `lead` stands before `completion`. `notice` is a warning for the user.
    """

    lead: str
    completion: str
    notice: str = ""


def find_border(prompt: str, head: str, completion: str, template: str) -> Border | None:
    """Find the text between a prompt and a completion.

    Args:
        prompt: the text of a generation's prompt, or the end of it from one place on.
        head: the text before an assistant's content, from the same place on.
        completion: the content.
        template: the template's source, which tells by what it closes a mark.

    Returns None where the two texts part in a way that says nothing of where the completion belongs.
    """
    if head.startswith(prompt):
        return Border(head[len(prompt) :], completion)
    if prompt.startswith(head):
        return _opened(prompt[len(head) :], "", completion, template)
    pieces, others = _pieces(prompt), _pieces(head)
    # The prompt may say more than the head, and end as the head begins.
    for i in range(len(pieces)):
        ending = "".join(pieces[i:])
        if ending.strip() and head.startswith(ending):
            return Border(head[len(ending) :], completion)
    shared = shared_start(pieces, others)
    return _opened("".join(pieces[shared:]), "".join(others[shared:]), completion, template)


def _opened(opened: str, lead: str, completion: str, template: str) -> Border | None:
    """Return the border where the prompt has `opened` in the place of the head's `lead`."""
    said = opened.strip()
    if not said:
        return Border(lead, completion)
    content = completion.lstrip()
    # The beginning of the completion is in the prompt already.
    if content.startswith(said):
        begun = opened.lstrip()
        return Border("", content.removeprefix(begun if content.startswith(begun) else said))
    marks = [piece for piece in _pieces(said) if _MARK.fullmatch(piece) and piece.strip()]
    closings = _closings(marks[0]) if marks and said.startswith(marks[0]) else []
    if len(marks) == 1 and marks[0] == said:
        return _after_mark(opened, lead, completion, [c for c in closings if c in template])
    closed = len(marks) == 2 and said.endswith(marks[1]) and marks[1] in closings
    if lead and not closed:
        return None
    return Border(lead, completion, _beside(said, completion))


def _after_mark(opened: str, lead: str, completion: str, known: list[str]) -> Border | None:
    """Return the border where the prompt ends with a single mark that the head lacks.

    `known`: the closings of that mark which the template contains.
    """
    mark = opened.strip()
    if not known and _PLAIN_TAG.fullmatch(mark):
        known = [f"{mark[0]}/{mark[1:]}"]
    # The mark is a header, or the end of something.
    if not known:
        return None if lead else Border("", completion, _beside(mark, completion))
    if any(closing in completion for closing in known):
        return Border("", completion)
    notice = f"open {mark}, and completions without it follow {known[0]}: mark what is reasoning as {mark}...{known[0]}"
    return Border(known[0] + lead if lead else f"\n{known[0]}\n\n", completion, notice)


def _beside(said: str, completion: str) -> str:
    opening = _pieces(completion.lstrip())[:1]
    if opening and _PLAIN_TAG.fullmatch(opening[0]):
        return f"end with {said!r}, where a conversation has not, and completions begin with {opening[0]} after it"
    return ""


def _closings(mark: str) -> list[str]:
    """Return what may close a mark: </think>, [/THINK], <|END_THINKING|>, <|/think|>."""
    found = [f"{mark[0]}/{mark[1:]}", mark.replace("<|", "<|/")]
    pairs = (("START", "END"), ("start", "end"), ("BEGIN", "END"), ("begin", "end"))
    found += [mark.replace(one, other) for one, other in pairs if one in mark]
    return [closing for closing in found if closing != mark]


def _pieces(text: str) -> list[str]:
    """Split a text into marks, line breaks and the pieces between them."""
    return [piece for piece in _MARK.split(text) if piece]
