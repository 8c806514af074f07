"""Try chat templates in a limited process before they are used: a template is a program that comes with a model."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence

from influence_fast.errors import ModelError
from influence_fast.isolation import limited

MEMORY = 1 << 30  # bytes of address space of the process that tries a template
# Seconds of processor time; templates of models in use need a hundredth of it.
SECONDS = 4
# Characters of a text; 300 times the largest frame that trl's templates put around two turns.
CHARACTERS = 1 << 24


def check_template(
    template: str, special: Mapping[str, str], conversations: Sequence[Sequence[Mapping[str, object]]], name: str
) -> None:
    """Render `conversations` by `template` in a limited process, once in this process's lifetime for the same input.

    Args:
        template: the chat template (Jinja).
        special: the tokenizer's special tokens by their names, as templates read them.
        conversations: lists of messages `{"role", "content"}`.
        name: what messages call the tokenizer.

    Raises ModelError where the template does not end within `SECONDS`, takes more memory than `MEMORY`, or makes a
    text of more than `CHARACTERS` characters. A template that raises an error passes: it will do so again.
    """
    parts = (template, {key: str(value) for key, value in special.items()}, conversations)
    if why := _tried(json.dumps(parts)):
        raise ModelError(f"the chat template of {name} {why}; set another template (tokenizer.chat_template)")


@functools.lru_cache(maxsize=64)
def _tried(parts: str) -> str:
    """Return why the template must not be used; "" where nothing speaks against it."""
    template, special, conversations = json.loads(parts)
    work = {"task": "chat", "template": template, "special": special, "conversations": conversations}
    work["characters"] = CHARACTERS
    done = limited(work, seconds=SECONDS, memory=MEMORY)
    if done.stopped == "time":
        return f"does not end within {SECONDS} s of processor time on one short conversation"
    if done.stopped == "memory":
        return f"takes more than {MEMORY >> 30} GiB of memory for one short conversation"
    try:
        longest = max(json.loads(done.output))
    except ValueError:
        # An isolated interpreter that cannot import jinja2 tells nothing about the template.
        return ""
    return f"makes a text of {longest:,} characters of one short conversation" if longest > CHARACTERS else ""
