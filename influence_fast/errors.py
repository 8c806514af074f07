"""Errors that a user can mend. Each message is one line: what is wrong, by name, and what to do.

The command line prints the message and exits with code 2; `--debug` shows the traceback.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import logging
import re
import reprlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

# Characters of a message; names from a file may be of any length.
_LONGEST = 3000


# What encloses a setting inside a message, and stands before its value. No key, and no JSON text, has these.
_OPEN, _VALUE, _CLOSE = "\x02", "\x1f", "\x03"
_KEY = re.compile(r"[\w.]+")
_SETTING = re.compile(f"{_OPEN}([\\w.]+){_VALUE}([^{_OPEN}{_VALUE}{_CLOSE}]*){_CLOSE}")


@dataclass(frozen=True, slots=True)
class Setting:
    """A setting that a message names, so that a front end can write it in its own way.

    Attributes:
        key: as a configuration file has it ("influence.fallback"), or the name of a function's argument ("limit").
        value: what the message says to set it to; None if it only names the setting.
    """

    key: str
    value: Any = None

    def __str__(self) -> str:
        """Return it as a configuration file writes it, or an argument as a call does."""
        if self.value is None:
            return self.key
        return f"{self.key}: {self.value}" if "." in self.key else f"{self.key}={_as_code(self.value)}"


def setting(key: str, value: Any = None) -> str:
    """Return a setting as text to be put into an error's message, where it stays a `Setting`.

    Args:
        key: as a configuration file has it ("influence.fallback"), or the name of a function's argument ("limit").
        value: what the message says to set it to: anything that JSON has.

    Example:
        >>> from influence_fast.errors import ConfigError, setting
        >>> error = ConfigError(f"no answer is right: set {setting('influence.fallback', 'reference')}")
        >>> str(error)
        'no answer is right: set influence.fallback: reference'
        >>> error.render(lambda s: f"--{s.key.split('.')[-1]} {s.value}")
        'no answer is right: set --fallback reference'
    """
    if not _KEY.fullmatch(key):
        # An option, or a place in a file: there is nothing to translate.
        return str(Setting(key, value))
    return f"{_OPEN}{key}{_VALUE}{'' if value is None else json.dumps(value)}{_CLOSE}"


class InfluenceFastError(Exception):
    """Base of every error this package raises on purpose. Its text is one printable line, whatever files put there.

    Args:
        message: what is wrong; `setting(...)` in it stays data.
        key: the setting that is wrong, which the text then begins with.
        value: what it is set to, for programs; the message says it in words.
        remedy: what to do, which the text then ends with.

    Attributes:
        parts: the text as strings and `Setting`s. key, value: of the setting that is wrong; by default the first one
            that the message names, and None. marked: the text to put into the message of another error.
    """

    def __init__(self, message: object = "", *, key: str | None = None, value: Any = None, remedy: str = "") -> None:
        text = str(message)
        if key is not None:
            text = f"{setting(key)}{'' if text.startswith(':') else ' '}{text}"
        self.marked = f"{text}; {remedy}" if remedy else text
        self.parts = _parted(self.marked)
        named = [part.key for part in self.parts if isinstance(part, Setting)]
        self.key = key if key is not None else next(iter(named), None)
        self.value = value
        super().__init__("".join(map(str, self.parts)))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.marked,), {**self.__dict__}

    def __str__(self) -> str:
        return self.render(str)

    def render(self, write: Callable[[Setting], str]) -> str:
        """Return the text with each setting as `write` writes it, in one printable line."""
        text = "".join(part if isinstance(part, str) else write(part) for part in self.parts)
        if len(text) > _LONGEST:
            text = f"{text[: _LONGEST // 2]} [...] {text[-_LONGEST // 2 :]}"
        return text if text.isprintable() else _printable(" ".join(text.split()))

    def renamed(self, rename: Callable[[Setting], Setting]) -> str:
        """Return the text, for the message of another error, with other settings in the place of its own."""
        return "".join(
            part if isinstance(part, str) else setting(*dataclasses.astuple(rename(part))) for part in self.parts
        )


def _parted(text: str) -> list[str | Setting]:
    """Split a text into strings and the settings between them."""
    parts: list[str | Setting] = []
    end = 0
    for found in _SETTING.finditer(text):
        try:
            value = json.loads(found[2]) if found[2] else None
        except ValueError:
            # Not of `setting`: a text that came with these characters in it.
            continue
        parts += [text[end : found.start()], Setting(found[1], value)]
        end = found.end()
    return [part for part in [*parts, text[end:]] if part != ""]


def _as_code(value: Any) -> str:
    """Return a value as Python writes it, texts between double quotes."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(name)}: {_as_code(each)}" for name, each in value.items()) + "}"
    return "None" if value is None else json.dumps(value)


def plain(text: str) -> str:
    """Return a text in which `setting(...)` may stand as people read it."""
    return "".join(map(str, _parted(text)))


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
