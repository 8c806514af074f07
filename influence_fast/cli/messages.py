"""What the command line says of errors and warnings: settings by the names of its options."""

from __future__ import annotations

import dataclasses
import re
import sys
from typing import Any


def by_flags(text: str, args: Any, of: str = "") -> str:
    """Settings by the names that they have as options of this verb; a configuration file has their own.

    of: what the names of the options for columns and format begin with ("validation-").
    """
    if hasattr(args, "config"):
        return text

    def flag(found: re.Match[str]) -> str:
        part, name = found[1], found[2]
        option = {"r": "rank"}.get(name, name)
        known = name in _settings_of(part) and hasattr(args, option)
        return "--" + option.replace("_", "-") if known else found[0]

    text = re.sub(r"(?<![\w./\\-])(\w+)\.(\w+)(?![\w/\\]|\.\w)", flag, text)  # no part of a path
    if hasattr(args, "columns"):  # {"prompt": "...", "id": None} as prompt=...,id=
        text = re.sub(
            r"columns=\{([^{}]*)\}",
            lambda m: f"--{of}columns " + re.sub(r'"(\w+)": (?:"?([^",]+)"?|None)(?:, )?', _renamed, m[1]).rstrip(","),
            text,
        )
        text = text.replace('by split="..."', f"by --{of}split")
        text = re.sub(r'format="([\w.]+)"(?: with)?', rf"--{of}format \1", text)
        text = re.sub(r"\bturns='(\w+)'", rf"--{of}turns \1", text)
    if hasattr(args, "option"):  # of the format of an import
        text = re.sub(r"\bwith (\w+)=$", r"with --option \1=...", text)
    return text


def _renamed(found: re.Match[str]) -> str:
    column = "" if found[2] in (None, "None") else found[2]
    return f"{found[1]}={column},"


def _settings_of(part: str) -> set[str]:
    """The keys of one part of a configuration, of those whose names are no file's."""
    from influence_fast import config

    parts = {
        "gradients": config.GradientConfig,
        "influence": config.InfluenceConfig,
        "training": config.TrainConfig,
        "lora": config.LoraSettings,
        "evaluation": config.EvalConfig,
        "pruning": config.PruningConfig,
    }
    if part == "data":
        return {"max_length", "truncate", "limit"}
    return {f.name for f in dataclasses.fields(parts[part])} if part in parts else set()


def say_warning(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
    """A line for the person at the terminal, without the place in the code."""
    print(f"warning: {message}", file=sys.stderr)
