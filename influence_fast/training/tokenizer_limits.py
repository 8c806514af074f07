"""The regular expressions of a tokenizer.json, tried in a limited process before they split any text here."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from influence_fast.errors import ModelError, one_line
from influence_fast.isolation import limited

SECONDS = 1  # of processor time; the patterns of models in use need a hundredth
MEMORY = 1 << 30  # bytes of address space
_PARTS = ("normalizer", "pre_tokenizer", "decoder")
# Runs that a pattern may count in many ways, each ended by what it does not expect. An exponential pattern needs some
# thirty steps to show itself; above that the library's own limit of retries may end the match, with a panic.
_RUNS = (26, 32, 400)
_UNITS = ("a", "A", "0", " ", "\n", ".", "\u00e9", "ab ", "a1", "x = 1, ")


def check_tokenizer_file(path: Path) -> None:
    """Split and join texts by the patterns of a tokenizer.json, in a limited process.

    Raises ModelError where that does not end within `SECONDS`, takes more memory than `MEMORY`, or breaks down. A file
    without patterns is not tried, nor is one that is no JSON: loading it says what is wrong.
    """
    try:
        body = path.read_text(encoding="utf-8")
        if '"pattern"' not in body:
            return
        whole = json.loads(body)
        parts = {name: whole.get(name) for name in _PARTS}
    except (OSError, ValueError, AttributeError, RecursionError):
        return
    if why := _tried(json.dumps(parts)):
        raise ModelError(f"{path}: splitting short texts by its patterns {why}; use another tokenizer, or mend them")


@functools.lru_cache(maxsize=64)
def _tried(parts: str) -> str:
    """Return why the patterns are not to be used; empty if nothing speaks against them."""
    texts = list(_texts(json.loads(parts)))
    work = {"task": "tokens", "parts": json.loads(parts), "texts": texts}
    done = limited(work, seconds=SECONDS, memory=MEMORY)
    if done.stopped == "time":
        return f"does not end within {SECONDS} s of processor time"
    if done.stopped == "memory" or b"memory allocation" in done.errors:
        return f"takes more than {MEMORY >> 30} GiB of memory"
    try:
        said = json.loads(done.output)
    except ValueError:  # the interpreter cannot start in isolation: nothing is known of them
        return ""
    return f"breaks down ({one_line(said, 120)})" if said else ""


def _texts(parts: Any) -> Iterator[str]:
    """Yield runs of usual characters, and of those that the patterns name."""
    units, named = dict.fromkeys(_UNITS), ""
    for pattern in _patterns(parts):
        plain = re.sub(r"\\.|[\[\](){}|*+?^$]", "", pattern)[:200]
        units.update(dict.fromkeys(plain[:20]))
        units.update(dict.fromkeys(re.findall(r"\w+", plain)[:10]))
        named += plain
    yield "".join(units)
    # what must follow a run is there, but not behind it: without it a search gives up before it tries
    for end in ("", "!", f"\x00 {named}"):
        for run in _RUNS:
            for unit in units:
                yield unit * max(1, run // len(unit)) + end


def _patterns(part: Any) -> Iterator[str]:
    """Yield the texts of the patterns anywhere inside a part of the file."""
    if isinstance(part, dict):
        pattern = part.get("pattern")
        if isinstance(pattern, dict):
            yield from (text for text in pattern.values() if isinstance(text, str))
        for value in part.values():
            yield from _patterns(value)
    elif isinstance(part, list):
        for value in part:
            yield from _patterns(value)
