"""Errors that a user can mend. Each message is one line: what is wrong, by name, and what to do.

The command line prints the message and exits with code 2; `--debug` shows the traceback.
"""

from __future__ import annotations

import difflib
import functools
import logging
import reprlib
from collections.abc import Iterable
from typing import Any

# Characters of a message; names from a file may be of any length.
_LONGEST = 3000


class InfluenceFastError(Exception):
    """Base of every error this package raises on purpose. Its text is one printable line, whatever files put there."""

    def __str__(self) -> str:
        text = super().__str__()
        if len(text) > _LONGEST:
            text = f"{text[: _LONGEST // 2]} [...] {text[-_LONGEST // 2 :]}"
        return text if text.isprintable() else _printable(" ".join(text.split()))


class ConfigError(InfluenceFastError):
    """A configuration key, value or strategy that does not exist or does not fit."""


class DataError(InfluenceFastError):
    """A dataset, row or example that cannot be used as asked."""


class ModelError(InfluenceFastError):
    """A model, adapter or tokenizer that does not fit the work."""


class StoreError(InfluenceFastError):
    """A gradient store that is damaged, unfinished or belongs to something else."""


class NumericError(InfluenceFastError):
    """A NaN or infinite value where a finite one is needed; the message names the examples."""


def _printable(text: str) -> str:
    """Return `text` with control characters and marks that change the writing direction replaced by escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80
_SHORT.maxlevel = 3


def shown(value: Any) -> str:
    """Return the `repr` of a value from a file, cut to the length of a message without computing all of it."""
    try:
        return _SHORT.repr(value)
    except ValueError:
        # Python writes no integer of more than 4,300 digits.
        return f"a {type(value).__name__} of thousands of digits"


@functools.cache
def warn_once(logger: logging.Logger, message: str) -> None:
    """Log a warning the first time it is given: an engine opens for every call."""
    logger.warning(message)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return the end of an error message: the nearest known name, if one is near, and all known names."""
    names = sorted(str(name) for name in known)
    near = difflib.get_close_matches(str(word)[:100], names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{hint}known: {', '.join(names)}"


def one_line(error: BaseException, limit: int | None = 300) -> str:
    """Return another library's error message on one line, cut to its first `limit` characters, to be quoted in ours."""
    return " ".join(str(error).split())[:limit]


def truncated_list(items: Iterable[str], limit: int = 5) -> str:
    """Return the first `limit` names of a list in one line: "a, b, c and 7 more"."""
    names = list(items)
    head = ", ".join(names[:limit])
    rest = len(names) - limit
    return f"{head} and {rest} more" if rest > 0 else head
