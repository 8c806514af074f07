"""Convert settings classes from YAML and back: keys and kinds of values are checked, and errors name the key."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
import types
import typing
from numbers import Integral
from pathlib import Path
from typing import Any

from influence_fast.errors import ConfigError, did_you_mean, one_line, setting, shown
from influence_fast.guards import read_text

#: The largest seeds: PyTorch's generators take 64 bits, and NumPy's global one, which a trainer seeds too, takes 32.
MAX_SEED, MAX_TRAINING_SEED = 2**64 - 1, 2**32 - 1

#: Bounds of a YAML file. Those in use have some kB; pure-Python YAML reads about 100 kB a second.
_LARGEST = 200_000  # bytes
# Values, counting everything that aliases expand to.
_MOST_VALUES = 20_000
_DEEPEST = 50  # levels of nesting
_LONGEST_NUMBER = 400  # characters


def read_mapping(path: Path, what: str) -> dict[str, Any]:
    """Read the mapping of keys in a YAML file; `what` names the kind of file in messages ("a configuration").

    Raises ConfigError where the file is not a regular file of bounded size, not UTF-8, not YAML, repeats a key or holds
    no mapping; FileNotFoundError where there is none.
    """
    text = read_text(path, ConfigError, _LARGEST)
    try:
        raw = parse_yaml(text)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error.marked}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: {what} is a mapping of keys, not {type(raw).__name__}")
    return raw


def parse_yaml(text: str) -> Any:
    """Return the plain value of one YAML document.

    Raises ConfigError where it is not YAML, or larger than any configuration needs to be.
    """
    import yaml

    try:
        loader = _unique_keys()(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _check_size(node)
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        raise ConfigError(f"not valid YAML: {one_line(error, limit=None)}") from None
    except RecursionError:
        raise ConfigError(f"not valid YAML: nested too deeply (more than {_DEEPEST} levels)") from None
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, MemoryError) as error:
        raise ConfigError(f"not valid YAML: {type(error).__name__}: {one_line(error)}") from None


def _check_size(root: Any) -> None:
    """Bound the size that aliases expand to before any value is built, and refuse aliases of themselves."""
    sizes: dict[int, int] = {}
    open_nodes: set[int] = set()

    def size(node: Any) -> int:
        if id(node) in open_nodes:
            line = node.start_mark.line + 1
            raise ConfigError(f"not valid YAML: an alias stands for what it is a part of (line {line})")
        if len(open_nodes) > _DEEPEST:
            raise RecursionError
        if id(node) not in sizes:
            open_nodes.add(id(node))
            parts = node.value if isinstance(node.value, list) else ()
            inner = [each for part in parts for each in (part if isinstance(part, tuple) else (part,))]
            sizes[id(node)] = 1 + sum(map(size, inner))
            open_nodes.remove(id(node))
        return sizes[id(node)]

    if (count := size(root)) > _MOST_VALUES:
        many = f"{count:,}" if count < 10**15 else "far too many"
        raise ConfigError(f"it stands for {many} values, where {_MOST_VALUES:,} are the most; use fewer aliases")


def _unique_keys() -> Any:
    """Return a YAML loader class that refuses a repeated key, of which PyYAML silently keeps the last value."""
    import yaml

    class Loader(yaml.SafeLoader):
        level = 0

        def compose_node(self, parent: Any, index: Any) -> Any:
            self.level += 1
            if self.level > _DEEPEST:
                raise RecursionError
            try:
                return super().compose_node(parent, index)
            finally:
                self.level -= 1

        def construct_object(self, node: Any, deep: bool = False) -> Any:
            number = node.tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
            try:
                if number and len(node.value) > _LONGEST_NUMBER:
                    raise ValueError
                return super().construct_object(node, deep)
            except (ValueError, TypeError, KeyError, AttributeError, OverflowError):
                kind = node.tag.rpartition(":")[2]
                problem = f"{shown(node.value)} is no {kind}; put text into quotes"
                raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from None

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            seen = set()
            for key, _ in node.value:
                if key.tag == "tag:yaml.org,2002:merge":  # <<: *base
                    continue
                name = self.construct_object(key, deep=True)
                if not isinstance(name, str | int | float | None):
                    problem = f"{shown(name)} is no key"
                    raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
                if name in seen:
                    problem = f"the key {shown(name)} comes twice"
                    raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
                seen.add(name)
            return super().construct_mapping(node, deep)

    return Loader


def from_dict(kind: type[Any], raw: dict[str, Any], where: str = "") -> Any:
    """Build a settings class (a dataclass) from plain YAML values.

    A bare string stands for a class that has `from_text`. Raises ConfigError for an unknown or missing key, or a value
    of the wrong kind.
    """
    hints = typing.get_type_hints(kind)
    fields = {key_of(f): f for f in dataclasses.fields(kind)}
    for key in raw:
        if key not in fields:
            raise ConfigError(f"unknown key {shown(where + str(key))}; {did_you_mean(str(key), fields)}")
    values = {fields[key].name: _convert(hints[fields[key].name], value, f"{where}{key}") for key, value in raw.items()}
    missing = [
        name
        for name, f in fields.items()
        if name not in raw and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"missing key {where + missing[0]!r}")
    try:
        return kind(**values)
    except ConfigError as error:
        raise in_section(error, kind, where) from None


def key_of(field: dataclasses.Field[Any]) -> str:
    """Return the key of a file that a field of a settings class is read from."""
    return str(field.metadata.get("key", field.name))


def in_section(error: ConfigError, kind: type[Any], where: str) -> ConfigError:
    """Return an error of a settings class that has a `PREFIX`, with its fields named as keys of a file.

    where: what comes before the keys there ("gradients."). Errors of other classes are returned as they are.
    """
    prefix = getattr(kind, "PREFIX", None)
    if prefix is None:
        return error
    keys = {f"{prefix}{field.name}": f"{where}{key_of(field)}" for field in dataclasses.fields(kind)}
    text = error.renamed(lambda named: dataclasses.replace(named, key=keys.get(named.key, named.key)))
    return ConfigError(text, value=error.value)


def to_dict(config: Any) -> dict[str, Any]:
    """Return a settings class as plain values that YAML and JSON can hold."""
    return _plain(config)


def difference(one: dict[str, Any], other: dict[str, Any], where: str = "") -> str | None:
    """Return the first key in which two plain configurations differ, with both values; None if they agree."""
    for key in sorted(one.keys() | other.keys()):
        a, b = one.get(key), other.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found = difference(a, b, f"{where}{key}.")
            if found:
                return found
        elif a != b:
            return f"{where}{key}: {shown(a)} against {shown(b)}"
    return None


def check_seed(name: str, seed: int, most: int = MAX_SEED) -> None:
    """Raise ConfigError, naming the setting `name`, unless `seed` is a whole number from 0 to `most`."""
    if not isinstance(seed, Integral) or isinstance(seed, bool):  # NumPy's whole numbers are taken
        raise ConfigError(f"is {shown(seed)}; give a whole number of at least 0", key=name, value=seed)
    seed = int(seed)
    if seed < 0:
        raise ConfigError(f": {shown(seed)} is below 0, which random generators do not take", key=name, value=seed)
    if seed > most:
        raise ConfigError(
            f": {shown(seed)} is above {most}, the most that random generators take", key=name, value=seed
        )


def one_of(key: str, value: str, known: typing.Iterable[str]) -> None:
    """Raise ConfigError, with the nearest known value, where `value` of the setting `key` is not among `known`."""
    if value not in known:
        raise ConfigError(f": unknown value {shown(value)}", key=key, value=value, remedy=did_you_mean(value, known))


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        options = typing.get_args(hint)
        if value is None and type(None) in options:
            return None
        errors = []
        for option in options:
            if option is type(None):
                continue
            try:
                return _convert(option, value, where)
            except ConfigError as error:
                errors.append(error)
        raise errors[0]
    if dataclasses.is_dataclass(hint):
        if isinstance(value, str) and hasattr(hint, "from_text"):
            return hint.from_text(value)
        if not isinstance(value, dict):
            raise ConfigError(f"{_named(where)}: expected a mapping of keys, not {shown(value)}", value=value)
        return from_dict(typing.cast(type, hint), value, f"{where}.")
    if origin in (tuple, list):
        if not isinstance(value, list | tuple):
            value = [value]
        item = typing.get_args(hint)[0]
        return origin(_convert(item, v, f"{where}[{i}]") for i, v in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            raise ConfigError(f"{_named(where)}: expected a mapping, not {shown(value)}", value=value)
        _, item = typing.get_args(hint)
        return {str(key): _convert(item, entry, f"{where}.{key}") for key, entry in value.items()}
    if hint is float and isinstance(value, int | str) and not isinstance(value, bool):
        with contextlib.suppress(ValueError, OverflowError):
            # YAML reads 1e-4 as a string.
            value = float(value)
    if hint is float and isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{_named(where)}: expected a finite number, not {value}", value=value)
    if hint is Any or (isinstance(value, hint) and not (hint is int and isinstance(value, bool))):
        return value
    expected = getattr(hint, "__name__", hint)
    raise ConfigError(f"{_named(where)}: expected {expected}, not {shown(value)}", value=value)


def _named(where: str) -> str:
    """Return the name of a value in a file as a setting; a place in a list ("pruning.seeds[1]") follows it as text."""
    key, bracket, place = where.partition("[")
    return f"{setting(key) if re.fullmatch(r'[A-Za-z_.]+', key) else key}{bracket}{place}"


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {key_of(f): _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)
