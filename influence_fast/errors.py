"""Errors that a user can mend. Each message is one line: what is wrong, by name, and what to do.

The command line prints the message and exits with code 2; `--debug` shows the traceback.
"""

from __future__ import annotations

import difflib
import functools
import logging
from collections.abc import Iterable


class InfluenceFastError(Exception):
    """Base of every error this package raises on purpose."""


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


@functools.cache
def say_once(logger: logging.Logger, message: str) -> None:
    """A warning, the first time: an engine opens for every call."""
    logger.warning(message)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The tail of an error message: the nearest known name, and all of them."""
    names = sorted(known)
    near = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{hint}known: {', '.join(names)}"


def one_line(error: BaseException, limit: int | None = 300) -> str:
    """Another library's message as a part of one of ours: on one line, its first `limit` characters."""
    return " ".join(str(error).split())[:limit]


def listing(items: Iterable[str], limit: int = 5) -> str:
    """`a, b, c and 7 more`: names the first few of many ids in one line."""
    names = list(items)
    head = ", ".join(names[:limit])
    rest = len(names) - limit
    return f"{head} and {rest} more" if rest > 0 else head
