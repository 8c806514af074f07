r"""Find the last `\boxed{...}` of a text, where solutions in mathematics and answers of models state the result."""

from __future__ import annotations

import re

_BOXED = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s{0,20}(?=[{\s\w\\])")
_LONGEST = 40_000  # characters looked through for the end of a box
# Boxes tried, from the last; a text of unclosed boxes alone must not take quadratic time.
_TRIED = 20
# What joins boxes that state one answer: \boxed{3} and $x = \boxed{7}$.
_JOINED = re.compile(
    r"(?:[\s$]|\\[()\[\],;! ]|\\q?quad)*"
    r"(?:,|;|&|\band\b|\bor\b|\\(?:text|textrm|mbox|mathrm)\s?\{\s?,?\s?(?:and|or)\s?\})"
    r"(?:[\s$,]|\\[()\[\],;! ]|\\q?quad|and\b|or\b)*(?:[A-Za-z](?:_\{?\w\}?)?\s?=\s?)?(?:[\s$])*"
)
_GAP = 60  # characters between two boxes of one answer


def last_boxed(text: str) -> str | None:
    r"""Return the content of the last closed box, spaces around it left off; None where there is none.

    `\boxed{...}` and `\fbox{...}`, spaces before the brace allowed, nested and escaped braces counted; `\boxed 5` has
    no braces and ends at the next space.
    """
    found = _closed(text, 1)
    return found[-1][2] if found else None


def last_boxes(text: str) -> list[str]:
    r"""Return the contents of the last closed box and of those that a comma, "and" or "or" joins to it, in order.

    Example:
        >>> last_boxes(r"Not \boxed{1}. So \boxed{3} and \boxed{7}.")
        ['3', '7']
    """
    boxes = _closed(text, _TRIED)
    first = len(boxes) - 1
    while first > 0:
        gap = text[boxes[first - 1][1] : boxes[first][0]]
        if len(gap) > _GAP or _JOINED.fullmatch(gap) is None:
            break
        first -= 1
    return [content for _, _, content in boxes[max(first, 0) :]]


def _closed(text: str, most: int) -> list[tuple[int, int, str]]:
    r"""Return up to `most` closed boxes from the end: (start, end, content), those with another one inside left out."""
    starts = [(match.start(), match.end()) for match in _BOXED.finditer(text)]
    found: list[tuple[int, int, str]] = []
    for begin, start in reversed(starts[-_TRIED:]):
        box = _content(text, start)
        if box is None:
            continue
        end, content = box
        # The box holds one that was found already: \boxed{x = \boxed{5}}.
        if found and end > found[0][0]:
            continue
        found.insert(0, (begin, end, content))
        if len(found) >= most:
            break
    return found


def _content(text: str, start: int) -> tuple[int, str] | None:
    if text[start] != "{":
        bare = re.match(
            r"\\[A-Za-z]{1,20}(?:\{[^{}\s]{0,50}\}){0,2}|[^\s\\]{1,50}", text[start : start + 120]
        )  # \boxed 5
        return (start + bare.end(), bare.group().rstrip(".$")) if bare else None
    depth = 0
    for match in re.finditer(r"\\.|[{}]", text[start : start + _LONGEST], re.DOTALL):
        depth += {"{": 1, "}": -1}.get(match.group(), 0)
        if depth == 0 and match.group() == "}":
            return start + match.end(), text[start + 1 : start + match.start()].strip()
    return None
