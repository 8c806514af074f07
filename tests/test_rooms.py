"""The order of the package's rooms: none imports one that comes later (CONTRIBUTING.md)."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "influence_fast"
ORDER = (
    *("errors", "deprecation", "isolation", "atomic", "progress", "timing", "guards", "settings", "_native", "kernels"),
    *("data", "gradients", "check", "products", "doctor", "store", "training", "evaluation", "influence", "selection"),
    *("config", "distributed", "report", "run", "proof", "cli", "__main__"),
)


def imported(path: Path) -> set[str]:
    """The rooms of this package that a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "influence_fast":
            found |= {alias.name for alias in node.names} - {"__version__"}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("influence_fast."):
            found.add(str(node.module).split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("influence_fast.")}
    return found


def test_no_room_imports_a_later_one() -> None:
    upwards = []
    files = [path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py"]
    for path in files:
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if room in ("kernels", "_build_info"):  # installed into the package, from a folder of its own
            continue
        upwards += [
            f"{path.relative_to(PACKAGE)}: {other}"
            for other in imported(path)
            if ORDER.index(other) > ORDER.index(room)
        ]
    assert len(files) > 100
    assert upwards == []


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
