"""The public names: loaded when first used, and told to type checkers by the same list."""

from __future__ import annotations

import ast
from importlib import metadata
from pathlib import Path

import pytest

import influence_fast as inf

INIT = Path(inf.__file__)


def test_type_checkers_see_the_names_that_are_loaded() -> None:
    told = {}
    for node in ast.walk(ast.parse(INIT.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("influence_fast."):
            for alias in node.names:
                assert alias.asname == alias.name  # else a checker takes the name for a private one
                told[alias.name] = str(node.module).removeprefix("influence_fast.")
    assert told == inf._EXPORTS


@pytest.mark.parametrize("name", sorted(inf._EXPORTS))
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(inf, name).__name__ == name


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="buildstore"):
        inf.buildstore  # noqa: B018


def test_the_package_says_that_it_is_typed() -> None:
    assert (INIT.parent / "py.typed").is_file()
    assert metadata.version("influence-fast") == inf.__version__
