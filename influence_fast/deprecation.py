"""Calls of the version before: they work for one release, with one line that names the new call."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class OldCall:
    """Describe how a function was called before.

    positional: names of the arguments that had a place. keywords: those that had none. marks: keywords that only the
    old call has: one of them is given in every such call. translate: values by their old names to values by new names.
    instead: the new call, for the warning.
    """

    positional: tuple[str, ...]
    keywords: tuple[str, ...]
    marks: tuple[str, ...]
    translate: Callable[[dict[str, Any]], dict[str, Any]]
    instead: str

    def values(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments of an old call by name. Raises TypeError as Python does for a wrong call."""
        if len(args) > len(self.positional):
            raise TypeError(f"{name}() takes {len(self.positional)} positional arguments but {len(args)} were given")
        values = dict(zip(self.positional, args, strict=False))
        for key, value in kwargs.items():
            if key not in (*self.positional, *self.keywords):
                raise TypeError(f"{name}() got an unexpected keyword argument {key!r}")
            if key in values:
                raise TypeError(f"{name}() got multiple values for argument {key!r}")
            values[key] = value
        return values


def also_called_as(old: OldCall) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorate a function so that it takes an old call too; type checkers see the new one alone."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        name = function.__name__

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> R:
            if not any(mark in kwargs for mark in old.marks):
                return function(*args, **kwargs)
            values = old.translate(old.values(name, args, kwargs))
            warnings.warn(
                f"{name}: this way of calling it goes away; call {old.instead}", DeprecationWarning, stacklevel=2
            )
            return function(**values)  # type: ignore[call-arg]

        return call  # type: ignore[return-value]

    return decorate


def moved(values: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Take the values of some names out of `values` and return them, those that are there."""
    return {name: values.pop(name) for name in names if name in values}
