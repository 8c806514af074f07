r"""The last `\boxed{...}` of a text: where solutions in mathematics and answers of models state the result."""

from __future__ import annotations

import re

_BOXED = re.compile(r"\\(?:boxed|fbox)\s*(?=[{\s\w])")
_LONGEST = 40_000  # characters looked through for the end of a box
_TRIED = 20  # boxes, from the last: a text of nothing but unclosed ones must not cost its square


def last_boxed(text: str) -> str | None:
    r"""The content of the last box that is closed, spaces around it left off; None where there is none.

    `\boxed{...}` and `\fbox{...}`, spaces before the brace allowed, nested and escaped braces counted; `\boxed 5` has
    no braces and ends at the next space.
    """
    starts = [match.end() for match in _BOXED.finditer(text)]
    for start in reversed(starts[-_TRIED:]):
        if text[start] != "{":
            content = re.match(r"\S{1,50}", text[start : start + 50])  # \boxed 5
            return content.group().rstrip(".$") if content else None
        depth = 0
        for match in re.finditer(r"\\.|[{}]", text[start : start + _LONGEST], re.DOTALL):
            depth += {"{": 1, "}": -1}.get(match.group(), 0)
            if depth == 0 and match.group() == "}":
                return text[start + 1 : start + match.start()].strip()
    return None
