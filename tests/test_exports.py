"""The public names: loaded when first used, and told to type checkers by the same list."""

from __future__ import annotations

import ast
import re
import warnings
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
    assert told == inf._EXPORTS | inf._MOVED | inf._REPLACED


@pytest.mark.parametrize("name", sorted(inf._EXPORTS))
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(inf, name).__name__ == name


@pytest.mark.parametrize("name", sorted(inf._MOVED))
def test_a_moved_name_warns_once_with_its_submodule(name: str) -> None:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = getattr(inf, name)
    assert [(w.category, str(w.message)) for w in said if "influence_fast" in str(w.message)] == [
        (
            DeprecationWarning,
            f"influence_fast.{name} is deprecated: write 'from influence_fast.{inf._MOVED[name]} import {name}'",
        )
    ]
    assert found.__name__ == name


def test_few_names_stay_at_the_top() -> None:
    assert len(inf._EXPORTS) <= 28
    assert not inf._EXPORTS.keys() & (inf._MOVED.keys() | inf._REPLACED.keys())
    assert dir(inf) == sorted([*inf._EXPORTS, "__version__"])


def test_the_package_itself_uses_no_deprecated_name() -> None:
    old = rf"\binf\.({'|'.join([*inf._MOVED, *inf._REPLACED])})\b"
    root = INIT.parents[1]
    files = [path for part in ("influence_fast", "tests", "benches") for path in (root / part).rglob("*.py")]
    used = {str(p.relative_to(root)) for p in files if p != Path(__file__) and re.search(old, p.read_text())}
    assert used == set()


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="buildstore"):
        inf.buildstore  # noqa: B018


def test_the_package_says_that_it_is_typed() -> None:
    assert (INIT.parent / "py.typed").is_file()
    assert metadata.version("influence-fast") == inf.__version__
