"""Odd values and texts that the corpora of hostile files put where something else is expected."""

from __future__ import annotations

import random
from typing import Any

DIGITS = "9" * 5000
DEEP = 100_000


class Raw(str):
    """Text that goes into a JSON file as it is."""


#: What a key of a JSON or YAML file may hold in place of its value.
ODD: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 1.5, -0.0, 2**31, 2**63, 10**30, -(10**18), 1e308, 5e-324),
    *(float("nan"), float("inf"), "", " ", "x", "nan", "1e5", "-1", "all-linear", "../../x", "a\nb", "a\x00b"),
    *(
        "\u202e\x1b[31m",
        "\ud800",
        "é" * 300,
        "x" * 20_000,
        [],
        [None],
        [1, "a"],
        [[]],
        [[1, 2]],
        [0.5],
        ["x"],
        ["x", "x"],
    ),
    *(
        {},
        {"a": 1},
        {"": None},
        {"a": {"b": [1]}},
        [{}],
        [{"a": 1}],
        {"path": 5},
        Raw(DIGITS),
        Raw("1e999"),
        Raw("-" + DIGITS),
    ),
    *(Raw("[" * 900 + "]" * 900), Raw("[" * DEEP), Raw("[" * DEEP + "]" * DEEP), Raw('{"a":' * 900 + "1" + "}" * 900)),
)

PATTERNS = (
    "(a+)+$",
    r"(.*)*x",
    r"(.*.*)*\.(.*.*)*$",
    "[",
    "(?P<a",
    "*",
    "(?:(?:a|b|_|\\.|\\w)+)+!",
    "(" * 200,
    "a{1,99999}{1,99999}",
)


def dumped(value: Any) -> str:
    """JSON text of `value`, `Raw` within it as it is."""
    import json

    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(str(key))}: {dumped(part)}" for key, part in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(dumped, value)) + "]"
    return json.dumps(value)


def noise(rng: random.Random, size: int) -> bytes:
    return bytes(rng.randrange(256) for _ in range(size))


def damaged(rng: random.Random, body: bytes) -> bytes:
    """`body` cut, with bytes changed, put in or taken out."""
    kind = rng.randrange(5)
    at = rng.randrange(max(1, len(body)))
    if kind == 0:
        return body[:at]
    if kind == 1:
        return body[:at] + noise(rng, rng.choice([1, 4, 40])) + body[at:]
    if kind == 2:
        return body[:at] + body[at + rng.choice([1, 8, 64]) :]
    changed = bytearray(body)
    for _ in range(rng.choice([1, 3, 30])):
        changed[rng.randrange(len(body))] = rng.randrange(256)
    return bytes(changed)
