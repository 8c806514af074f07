"""A chat template is a program that came with a model: tried in a limited process before it renders anything here."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from influence_fast.errors import ModelError

MEMORY = 1 << 30  # bytes of address space of the process that tries a template
SECONDS = 10  # of processor time, which templates of models in use need a thousandth of
CHARACTERS = 1 << 24  # of a text: three hundred times the largest frame that trl's templates put around two turns

_WORKER = Path(__file__).with_name("template_worker.py")


def check_template(
    template: str, special: Mapping[str, str], conversations: Sequence[Sequence[Mapping[str, object]]], name: str
) -> None:
    """Render `conversations` by `template` in a limited process, once in this process's life for the same ones.

    Args:
        template: the chat template (Jinja).
        special: the tokenizer's special tokens by their names, as templates read them.
        conversations: lists of messages `{"role", "content"}`.
        name: what messages call the tokenizer.

    Raises ModelError where the template does not end within `SECONDS`, takes more memory than `MEMORY`, or makes a
    text of more than `CHARACTERS` characters. A template that raises an error passes: it will do so again.
    """
    work = {
        "template": template,
        "special": {key: str(value) for key, value in special.items()},
        "conversations": conversations,
        "memory": MEMORY,
        "seconds": SECONDS,
        "characters": CHARACTERS,
    }
    if why := _tried(json.dumps(work)):
        raise ModelError(f"the chat template of {name} {why}; set another template (tokenizer.chat_template)")


@functools.lru_cache(maxsize=64)
def _tried(work: str) -> str:
    """Why the template is not to be used; empty where nothing speaks against it."""
    command = [sys.executable, "-I", str(_WORKER)]
    try:
        done = subprocess.run(command, input=work.encode(), capture_output=True, timeout=6 * SECONDS, cwd="/")
    except subprocess.TimeoutExpired:
        return f"does not end (tried for {6 * SECONDS} s on one short conversation)"
    if done.returncode < 0:
        return f"does not end within {SECONDS} s of processor time on one short conversation"
    if b"MemoryError" in done.stderr:
        return f"takes more than {MEMORY >> 30} GiB of memory for one short conversation"
    try:
        longest = max(json.loads(done.stdout))
    except ValueError:  # an interpreter that cannot import jinja2 in isolation: nothing is known of the template
        return ""
    return f"makes a text of {longest:,} characters of one short conversation" if longest > CHARACTERS else ""
