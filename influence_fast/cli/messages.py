"""Errors and warnings on the command line, with settings named as its options."""

from __future__ import annotations

import dataclasses
import re
import sys
import traceback
from pathlib import Path
from typing import Any

from influence_fast.errors import one_line
from influence_fast.settings import key_of


def by_flags(text: str, args: Any, of: str = "") -> str:
    """Return a message with settings named as this verb's options; a configuration file keeps its own names.

    of: the prefix of the options for columns and format ("validation-").
    """
    if hasattr(args, "config"):
        return text

    def flag(found: re.Match[str]) -> str:
        part, name = found[1], found[2]
        option = {"r": "rank"}.get(name, name)
        known = name in _settings_of(part) and hasattr(args, option)
        value = f" {found[3]}" if found[3] else ""
        return "--" + option.replace("_", "-") + value if known else found[0]

    # no part of a path; "influence.fallback: reference" is a setting with its value, and "influence.fallback: unknown
    # value" a setting of which something is said
    text = re.sub(r"(?<![\w./\\-])(\w+)\.(\w+)(?![\w/\\]|\.\w)(?:: (\w+)(?=[,;.)]|$| does not ask))?", flag, text)
    text = re.sub(rf"^({_ARGUMENTS})(?= is | '| \d| -)", lambda m: _own(m[1], args), text)
    text = re.sub(r"\b(max_length|truncate)\b(?=, or cut|\))", lambda m: _own(m[1], args), text)
    # The mapping {"prompt": "...", "id": None} is written as prompt=...,id=.
    if hasattr(args, "columns"):
        text = re.sub(
            r"columns=\{([^{}]*)\}",
            lambda m: f"--{of}columns " + re.sub(r'"(\w+)": (?:"?([^",]+)"?|None)(?:, )?', _renamed, m[1]).rstrip(","),
            text,
        )
        text = text.replace('by split="..."', f"by --{of}split")
        text = re.sub(r'format="([\w.]+)"(?: with)?', rf"--{of}format \1", text)
        text = re.sub(r"\bturns='(\w+)'", rf"--{of}turns \1", text)
    # Options of an import's format.
    if hasattr(args, "option"):
        text = re.sub(r"\bwith (\w+)=$", r"with --option \1=...", text)
    return text


# of functions, at the beginning of a message
_ARGUMENTS = "limit|max_length|trace|format|device|dtype|fraction|count|seed|max_tokens|directions|step"


def _own(name: str, args: Any) -> str:
    return "--" + name.replace("_", "-") if hasattr(args, name) else name


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


def _renamed(found: re.Match[str]) -> str:
    column = "" if found[2] in (None, "None") else found[2]
    return f"{found[1]}={column},"


def _settings_of(part: str) -> set[str]:
    """Return the setting names of a section of the configuration; none where a file may have the section's name."""
    from influence_fast import config

    parts = {
        "gradients": config.RowSpec,
        "influence": config.InfluenceConfig,
        "training": config.TrainConfig,
        "lora": config.LoraSettings,
        "evaluation": config.EvalConfig,
        "pruning": config.PruningConfig,
    }
    if part == "data":
        return {"max_length", "truncate", "limit"}
    return {key_of(f) for f in dataclasses.fields(parts[part])} if part in parts else set()


def say_warning(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
    """Print a warning in one line to stderr, without its place in the code."""
    print(f"warning: {message}", file=sys.stderr)
