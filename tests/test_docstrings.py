"""Docstrings begin with a verb and a whole sentence, so that jump-to-definition shows what a function does."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import re
from pathlib import Path

import pytest

import influence_fast as inf

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "influence_fast"

# The verbs in use, to be added to by need: a word list makes the rule decidable.
VERBS = frozenset(
    str.split(
        "Add Allocate Answer Append Attach Bound Build Call Change Check Choose Close Cluster Collect Compare "
        "Compute Copy Count Cut Decide Decode Decorate Detect Disable Divide Draw Drop End Estimate Evaluate Fill "
        "Find Fine-tune Fit Format Generate Give Grade Group Hash Hold Import Join Judge Keep Kill Limit List "
        "Load Log Look Make Map Match Measure Merge Multiply Open Pack Pad Pair Parse Plan Plot Print Quantize "
        "Queue Raise Read Record Remove Render Replace Restore Return Round Run Save Score Select Set Silence "
        "Split Spread Start Store Sum Take Tell Tokenize Train Translate Turn Undo Update Validate Wait Warn "
        "Write Yield"
    )
)
NO_CLASS_BEGINS = ("The same", "What", "Whether", "How", "That", "Where", "Those")


def files() -> list[Path]:
    """Return the path of every Python file of the package and of the kernels."""
    return sorted([*PACKAGE.rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])


def fault(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> str | None:
    """Return how a docstring breaks the rule; None where it does not, or there is none."""
    text = ast.get_docstring(node)
    if text is None:
        return None
    paragraph = text.split("\n\n")[0]
    start = "\n".join(paragraph.split("\n")[:2])
    if not paragraph.endswith((".", ":")) or not re.search(r"[.:](\s|$)", start):
        return "is no sentence of at most two lines"
    if isinstance(node, ast.ClassDef):
        if not text[0].isupper() or re.match(rf"(?:{'|'.join(NO_CLASS_BEGINS)})\b", text):
            return "of a class begins neither with a verb nor with a noun"
    elif text.split()[0] not in VERBS:
        return f"begins with {text.split()[0]!r}, which is no verb of VERBS"
    return None


def faults(path: Path) -> list[str]:
    """Return the faults of all docstrings in a file, with their lines."""
    nodes = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return [
        f"{path.relative_to(ROOT)}:{node.lineno}: the docstring of {node.name} {why}"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, nodes) and (why := fault(node)) is not None
    ]


def test_docstrings_begin_with_a_verb() -> None:
    assert len(files()) > 100
    assert [line for path in files() for line in faults(path)] == []


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("Return the sum.", True),
        ("Return the sum of all the numbers of a row that is\nlonger than one line.\n\nMore.", True),
        ("Returns the sum.", False),
        ("The sum.", False),
        ("Whether it is so.", False),
        ("[N] float32: the sums.", False),
        ("Return the sum", False),
    ],
)
def test_rule_for_functions(text: str, right: bool) -> None:
    [node] = ast.parse(f"def f():\n    {text!r}\n").body
    assert isinstance(node, ast.FunctionDef)
    assert (fault(node) is None) is right


@pytest.mark.parametrize(
    ("text", "right"), [("A row.", True), ("Hold rows.", True), ("What is held.", False), ("`a` is a row.", False)]
)
def test_rule_for_classes(text: str, right: bool) -> None:
    [node] = ast.parse(f"class A:\n    {text!r}\n").body
    assert isinstance(node, ast.ClassDef)
    assert (fault(node) is None) is right


PUBLIC = sorted(inf._EXPORTS)


@pytest.mark.parametrize("name", PUBLIC)
def test_public_docstring_has_parts_and_example(name: str) -> None:
    exported = getattr(inf, name)
    text = inspect.getdoc(exported) or ""
    wanted = ["Example:"]
    if inspect.isfunction(exported):
        wanted += ["Returns:"] if inspect.signature(exported).return_annotation != "None" else []
        wanted += ["Args:"] if inspect.signature(exported).parameters else []
    missing = [part for part in wanted if not re.search(rf"^{part}$", text, re.MULTILINE)]
    assert not missing, f"{name} lacks {', '.join(missing)}"


def with_examples() -> list[str]:
    """Return the modules whose docstrings have examples."""
    found = [path for path in files() if ">>> " in path.read_text(encoding="utf-8")]
    return [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in found]


@pytest.mark.parametrize("module", with_examples())
def test_examples_run(module: str) -> None:
    failed, tried = doctest.testmod(importlib.import_module(module), extraglobs={"inf": inf})
    assert failed == 0
    assert tried > 0 or "doctest: +SKIP" in inspect.getsource(importlib.import_module(module))
