"""Which LoRA linears are inside routed experts, by the calls of one forward: those that see some of the tokens."""

from __future__ import annotations

import re
from collections.abc import Sequence, Set

_NUMBERED = re.compile(r"(?:.*_)?\d+$")  # a module of a list, or one of a dictionary as `expert_3`


def routed_modules(names: Sequence[str], strange: Set[int], uncalled: Set[int]) -> set[int]:
    """Return the places in `names` of linears that any number of a pack's tokens may come to.

    strange: those that saw another number of tokens than there were. uncalled: those that saw none. Experts are the
    modules of one list, in which a linear has the same place in each: all of them are routed where one is strange, and
    one that was not called is no expert unless another of its list was.
    """
    families: dict[tuple[str, str], set[int]] = {}
    for place, name in enumerate(names):
        if (family := _family(name)) is not None:
            families.setdefault(family, set()).add(place)
    routed = set(strange)
    for members in families.values():
        called = members - uncalled
        if called and (members & strange or members & uncalled):
            routed |= members
    return routed


def _family(name: str) -> tuple[str, str] | None:
    """Return a linear's name before and after the number of the innermost list that it is in."""
    parts = name.split(".")
    for place in range(len(parts) - 1, -1, -1):
        if _NUMBERED.fullmatch(parts[place]):
            return ".".join(parts[:place]), ".".join(parts[place + 1 :])
    return None
