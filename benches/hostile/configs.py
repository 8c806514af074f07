"""Hostile configurations: every key with odd values, and texts that are no YAML or far too much of it."""

from __future__ import annotations

import dataclasses
import os
import random
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benches.hostile.case import Case
from benches.hostile.values import DEEP, DIGITS, ODD, dumped, noise
from influence_fast.config import RunConfig, load_config
from influence_fast.run.unread import unread_settings
from influence_fast.settings import to_dict

BASE: dict[str, Any] = {
    "output": "out",
    "model": {"path": "m"},
    "data": {"pool": {"path": "p.jsonl"}, "holdout_validation": 1, "holdout_test": 1},
}


def laughs(levels: int = 40, width: int = 10) -> str:
    """YAML whose aliases stand for `width ** levels` values."""
    lines = ["l0: &l0 [x, x]"]
    lines += [f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * width)}]" for i in range(1, levels)]
    return "\n".join([*lines, f"title: *l{levels - 1}"]) + "\n"


def merges(levels: int = 40) -> str:
    """YAML whose merged mappings double at each level."""
    lines = ["m0: &m0 {a: 1}"]
    lines += [f"m{i}: &m{i} {{<<: [*m{i - 1}, *m{i - 1}], k{i}: 1}}" for i in range(1, levels)]
    return "\n".join(lines) + "\n"


#: Texts that no YAML file of ours may be.
TEXTS: dict[str, bytes] = {
    name: text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
    for name, text in {
        "empty": "",
        "blank": "\n \n",
        "comment": "# nothing",
        "list": "- a\n- b",
        "scalar": "5",
        "null": "~",
        "tabs": "a:\n\tb: 1",
        "two": "a: 1\n---\nb: 2",
        "laughs": laughs(),
        "laughs in place": laughs(9).replace("title: *l8", "output: *l8"),
        "merges": merges(),
        "recursive": "title: &a [*a]\noutput: *a",
        "recursive key": "&a {? *a : 1}",
        "recursive map": "output: &a {b: *a}",
        "self merge": "output: &a {<<: *a}",
        "unknown alias": "a: *b",
        "anchor twice": "a: &a 1\nb: &a 2\noutput: *a",
        "deep flow": "a: " + "[" * DEEP,
        "deep flow closed": "output: " + "[" * 3000 + "]" * 3000,
        "deep map": "output: " + "{a: " * 3000,
        "deep block": "\n".join(" " * i + "a:" for i in range(1500)),
        "deep dashes": "output: \n" + "- " * 3000 + "a",
        "date": "title: 2024-13-45",
        "date 2": "output: 2024-02-30",
        "time": "seed: 2024-01-01 99:99:99",
        "digits": f"seed: {DIGITS}",
        "hex": "seed: 0x" + "f" * 100_000,
        "sixty": "seed: " + ":".join(["1"] * 30_000),
        "binary int": "seed: 0b" + "1" * 100_000,
        "float": "seed: 1e999",
        "octal": "seed: 0o9",
        "python": "output: !!python/object/apply:os.system ['exit 3']",
        "python name": "output: !!python/name:os.system",
        "tag": "output: !x y",
        "binary": "output: !!binary '@@'",
        "set": "output: !!set {a, b}",
        "omap": "output: !!omap [a: 1]",
        "pairs": "output: !!pairs [a: 1]",
        "int": "seed: !!int x",
        "float tag": "seed: !!float x",
        "bool": "seed: !!bool x",
        "null tag": "!!null x",
        "timestamp": "seed: !!timestamp x",
        "str": "seed: !!str 5",
        "map": "!!map [a]",
        "seq": "output: !!seq {a: 1}",
        "list key": "? [a]\n: 1",
        "map key": "? {a: 1}\n: 1",
        "twice": "output: a\noutput: b",
        "null key": "~: 1",
        "number key": "5: 1",
        "date key": "2024-01-01: 1",
        "nan key": ".nan: 1\n.nan: 2",
        "big": "a: b\n" * 3_000_000,
        "long": "title: " + "x" * 5_000_000,
        "many": "seeds: [" + "1, " * 400_000 + "]",
        "directive": "%YAML 9.9\n---\na: 1",
        "directive 2": "%TAG ! !\n%TAG ! !\n---\na",
        "quote": "output: 'a",
        "double": 'output: "\\xZZ"',
        "surrogate": 'output: "\\ud800"',
        "control": "output: \x01",
        "utf16": "output: a".encode("utf-16"),
        "latin": b"output: \xe9",
        "nul": b"\0" * 500,
        "noise": noise(random.Random(1), 2000),
        "bom": b"\xef\xbb\xbfoutput: a",
        "colon": ":" * 100_000,
        "ampersands": "&" * 100_000,
        "questions": "? " * 5000,
        "brackets": "]" * 5000,
        "block scalar": "output: |99\n a",
        "folded": "output: >\n" + " a\n" * 90_000,
        "json": '{"output": 5, "model": [], "data": {}}',
    }.items()
}


def keys(kind: type[Any] = RunConfig) -> Iterator[tuple[str, ...]]:
    """Every key of the configuration and of its parts."""
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        yield (field.name,)
        options = (hints[field.name], *typing.get_args(hints[field.name]))
        for option in options:
            # A file gives what may be text as text: a fitted sketch, which Python may pass in its place, has no keys.
            if dataclasses.is_dataclass(option) and str not in options:
                yield from ((field.name, *rest) for rest in keys(typing.cast(type, option)))


def with_key(settings: dict[str, Any], key: tuple[str, ...], value: Any) -> dict[str, Any]:
    """A copy of `settings` with a nested key at `value`."""
    part = settings.get(key[0])
    inner = part if isinstance(part, dict) else ({"path": "x"} if len(key) > 1 else {})
    return settings | {key[0]: value if len(key) == 1 else with_key(inner, key[1:], value)}


def _read(path: Path) -> Callable[[], Any]:
    def call() -> None:
        config = load_config(path)
        unread_settings(config)
        to_dict(config)

    return call


def _file(name: str, body: bytes) -> Case:
    def make(folder: Path) -> Callable[[], Any]:
        (folder / "c.yaml").write_bytes(body)
        return _read(folder / "c.yaml")

    return Case(name, make)


def cases(rng: random.Random, shared: Path) -> Iterator[Case]:
    """Yield every case of the room."""
    for name, body in TEXTS.items():
        yield _file(f"text/{name}", body)
        if name not in ("big", "long"):
            yield _file(f"text after a whole one/{name}", dumped(BASE).encode()[:-1] + b', "title":\n ' + body)
    for key in keys():
        for number in rng.sample(range(len(ODD)), 7):
            body = dumped(with_key(BASE, key, ODD[number])).encode("utf-8", "surrogatepass")
            yield _file(f"key/{'.'.join(key)}/{number}", body)
    for number, value in enumerate(ODD):
        yield _file(
            f"key/unknown/{number}", dumped(BASE | {dumped(value)[:300]: value}).encode("utf-8", "surrogatepass")
        )
        yield _file(f"whole/{number}", dumped(value).encode("utf-8", "surrogatepass"))
    yield from no_files("c.yaml", _read)


def no_files(name: str, read: Callable[[Path], Callable[[], Any]]) -> Iterator[Case]:
    """Pipes, devices, folders and links in the place of the file `name`."""

    def pipe(folder: Path) -> Callable[[], Any]:
        os.mkfifo(folder / name)
        return read(folder / name)

    def inside(folder: Path) -> Callable[[], Any]:
        (folder / name).mkdir()
        return read(folder / name)

    def linked(target: str) -> Callable[[Path], Callable[[], Any]]:
        def make(folder: Path) -> Callable[[], Any]:
            (folder / name).symlink_to(target)
            return read(folder / name)

        return make

    yield Case("file/pipe", pipe)
    yield Case("file/folder", inside)
    yield Case("file/missing", lambda folder: read(folder / name))
    yield Case("file/within a file", lambda folder: read(Path("/etc/passwd") / name))
    yield Case("file/long name", lambda folder: read(folder / ("x" * 300) / name))
    for target in ("/dev/zero", "/dev/null", "/dev/stdin", "/dev/full", name, "/nowhere", "/proc/self/mem"):
        yield Case(f"file/link to {target}", linked(target))
