"""The order of the package's rooms: no file imports one of a later room, no two files import each other."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "influence_fast"
KERNELS = PACKAGE.parent / "kernels"  # installed as influence_fast.kernels
ORDER = (
    *("errors", "deprecation", "isolation", "atomic", "progress", "timing", "guards", "settings"),
    *("_native", "_build_info", "limited_worker", "philox", "row_codec", "transfer", "statistics", "kernels"),
    *("data", "gradients", "check", "products", "doctor", "store", "training", "evaluation", "influence", "selection"),
    *("config", "distributed", "report", "run", "validation", "cli", "__main__"),
)
# Inside gradients: what a row is, what a model is, one packed step, and then what users call.
GRADIENTS = ("rows", "model", "step")
LONGEST = 400
# Files that are still to be split; a file leaves the list for good.
STILL_LONG: set[str] = set()
# Pairs of files that still import each other.
STILL_CIRCULAR: set[str] = set()


def files() -> dict[str, Path]:
    """Every file of the package and its kernels, by the name that it is imported by."""
    found = {}
    for folder, prefix in ((PACKAGE, "influence_fast"), (KERNELS, "influence_fast.kernels")):
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join([prefix, *parts]).removesuffix(".__init__")] = path
    return {name: path for name, path in found.items() if not name.startswith("influence_fast.kernels.kernels")}


def imports_of(tree: ast.AST, names: set[str], *, typing_too: bool = True) -> Iterator[str]:
    """The names that a file imports, inside functions too; `typing_too`: also those for type checkers alone."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test) and not typing_too:
            for other in node.orelse:
                yield from imports_of(other, names, typing_too=typing_too)
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            assert node.level == 0, "imports go through the package's whole name"
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                if submodule in names or node.module in names:
                    yield submodule if submodule in names else node.module
        yield from imports_of(node, names, typing_too=typing_too)


def room(name: str) -> str:
    return name.split(".")[1]


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """The strongly connected components of more than one file (Tarjan 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in graph[node]:
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            members = [stack.pop()]
            while members[-1] != node:
                members.append(stack.pop())
            if len(members) > 1:
                found.append(sorted(members))

    for node in graph:
        if node not in index:
            visit(node)
    return found


@pytest.fixture(scope="module")
def trees() -> dict[str, ast.Module]:
    return {name: ast.parse(path.read_text()) for name, path in files().items()}


def test_no_room_imports_a_later_one(trees: dict[str, ast.Module]) -> None:
    modules = {name: tree for name, tree in trees.items() if name != "influence_fast"}
    upwards = [
        f"{name}: {other}"
        for name, tree in modules.items()
        for other in imports_of(tree, set(modules))
        if ORDER.index(room(other)) > ORDER.index(room(name))
    ]
    assert len(modules) > 200
    assert upwards == []


def test_sub_rooms_of_gradients_import_earlier_ones(trees: dict[str, ast.Module]) -> None:
    def place(name: str) -> int:
        folder = name.split(".")[2]
        return GRADIENTS.index(folder) if folder in GRADIENTS else len(GRADIENTS)

    modules = {name: tree for name, tree in trees.items() if name.startswith("influence_fast.gradients.")}
    upwards = [
        f"{name}: {other}"
        for name, tree in modules.items()
        for other in imports_of(tree, set(modules), typing_too=False)
        if place(other) > place(name)
    ]
    assert {place(name) for name in modules} == {0, 1, 2, 3}
    assert upwards == []


def test_kernels_import_ground_rooms_and_kernels_alone(trees: dict[str, ast.Module]) -> None:
    found = {
        room(other)
        for name, tree in trees.items()
        if name.startswith("influence_fast.kernels.")
        for other in imports_of(tree, set(trees))
    }
    assert found <= {"errors", "philox", "row_codec", "transfer", "kernels"}


def test_no_files_import_each_other(trees: dict[str, ast.Module]) -> None:
    """Imports inside functions count; those that are for type checkers alone do not run."""
    graph = {name: set(imports_of(tree, set(trees), typing_too=False)) - {name} for name, tree in trees.items()}
    assert [circle for circle in circles(graph) if not set(circle) <= STILL_CIRCULAR] == []


def test_circles_of_imports_are_found() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": set(), "e": {"d"}}
    assert circles(graph) == [["a", "b", "c"]]
    tree = ast.parse(
        "if TYPE_CHECKING:\n    import x.a\ndef f():\n    from x import b, other\n    from x.c import thing"
    )
    names = {"x.a", "x.b", "x.c"}
    assert list(imports_of(tree, names, typing_too=False)) == ["x.b", "x.c"]
    assert list(imports_of(tree, names)) == ["x.a", "x.b", "x.c"]


def test_no_file_is_longer_than_400_lines() -> None:
    long = {name for name, path in files().items() if len(path.read_text().splitlines()) > LONGEST}
    assert long <= STILL_LONG


NAMES = {"math_verify": "math-verify", "yaml": "pyyaml"}  # of modules that are not called what installs them
OPTIONAL = {"bitsandbytes", "triton", "vllm"}  # asked for where they are used, and done without
# of transformers, jinja2, math-verify and datasets
WITHIN = {"tokenizers", "huggingface_hub", "markupsafe", "sympy", "pandas"}


def test_what_is_imported_is_declared() -> None:
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["project"]
    declared = {re.split(r"[<>=!~;\[ ]", line, maxsplit=1)[0] for line in project["dependencies"]}
    found = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                found.add(str(node.module).split(".")[0])
    others = found - sys.stdlib_module_names - OPTIONAL - WITHIN - {"influence_fast"}
    assert {NAMES.get(name, name) for name in others} - declared == set()
