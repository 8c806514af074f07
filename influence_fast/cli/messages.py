"""Errors and warnings on the command line, with settings named as its options."""

from __future__ import annotations

import sys
import traceback
from pathlib import Path
from typing import Any

from influence_fast.errors import InfluenceFastError, Setting, one_line

# Options of other names than their settings.
_OPTIONS = {"r": "rank"}
# Of an import's format, they are values of one option.
_OF_FORMATS = ("key", "model_id")


def by_flags(error: InfluenceFastError, args: Any, of: str = "") -> str:
    """Return an error's message with its settings named as options of this verb.

    Settings that are no options of it keep their names, and all do where a configuration file is run.

    Args:
        error: what was raised.
        args: the verb's parsed options.
        of: the prefix of the options for columns, format, split and turns ("validation-").
    """
    return error.render(str if hasattr(args, "config") else lambda named: as_option(named, args, of))


def as_option(named: Setting, args: Any, of: str = "") -> str:
    """Return a setting as an option of this verb; its own name if there is none."""
    name = named.key.rpartition(".")[2]
    if name in ("columns", "format", "split", "turns") and hasattr(args, "columns"):
        name = of + name
    elif name in _OF_FORMATS and hasattr(args, "option"):
        return f"--option {name}={named.value}"
    else:
        name = _OPTIONS.get(name, name)
        if not hasattr(args, name):
            return str(named)
    flag = "--" + name.replace("_", "-")
    if isinstance(named.value, dict):
        pairs = (f"{key}={'' if value is None else value}" for key, value in named.value.items())
        return f"{flag} {','.join(pairs)}"
    return flag if named.value in (None, "...") else f"{flag} {named.value}"


def unforeseen(error: BaseException) -> str:
    """Return the message for an error that no check expects: where it happened in this package, and what to do."""
    package = Path(__file__).parents[1]
    places = [
        f"{Path(frame.filename).relative_to(package.parent)}, line {frame.lineno}"
        for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename).is_relative_to(package)
    ]
    where = places[-1] if places else "an unknown place"
    return (
        f"{type(error).__name__}: {one_line(error) or 'without a message'} (at {where}); this was not foreseen: check "
        "the inputs, and please report it with the traceback that --debug shows"
    )


def say_warning(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
    """Print a warning in one line to stderr, without its place in the code."""
    print(f"warning: {message}", file=sys.stderr)
