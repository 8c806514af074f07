"""No function takes more arguments than a person can keep in mind: settings that go together are one value."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
MOST = 8
# Files whose long signatures have yet to become values.
STILL_TO_DO: set[str] = set()


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) -> list[str]:
    """Return the names of a function's parameters, without self and cls; * and ** count as one each."""
    given = function.args
    found = [*given.posonlyargs, *given.args, *given.kwonlyargs]
    found += [star for star in (given.vararg, given.kwarg) if star is not None]
    names = [argument.arg for argument in found]
    return names[1:] if names[:1] in (["self"], ["cls"]) else names


def is_kernel(function: ast.AST) -> bool:
    """Tell whether Triton compiles a function: its arguments are pointers, strides and sizes."""
    return any("jit" in ast.unparse(decorator) for decorator in getattr(function, "decorator_list", []))


def long_signatures(path: Path) -> Iterator[str]:
    """Yield the functions of a file that take more than `MOST` parameters."""
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or is_kernel(node):
            continue
        names = parameters(node)
        if len(names) > MOST:
            yield f"{path.name}:{node.lineno} {getattr(node, 'name', 'lambda')} takes {len(names)}"


def test_no_function_takes_more_than_eight_parameters() -> None:
    files = [path for folder in ("influence_fast", "kernels") for path in (ROOT / folder).rglob("*.py")]
    assert len(files) > 200
    others = [path for path in files if str(path.relative_to(ROOT)) not in STILL_TO_DO]
    assert [line for path in others for line in long_signatures(path)] == []


def test_no_file_is_still_to_do_without_need() -> None:
    done = [name for name in sorted(STILL_TO_DO) if not any(long_signatures(ROOT / name))]
    assert done == [], "take these out of STILL_TO_DO"


def test_a_long_signature_is_found(tmp_path: Path) -> None:
    path = tmp_path / "long.py"
    names = [f"a{i}" for i in range(MOST)]
    path.write_text(f"def fits({', '.join(names)}): ...\nclass C:\n def fits(self, {', '.join(names)}): ...\n")
    assert list(long_signatures(path)) == []
    path.write_text(f"def wide({', '.join(names)}, **more): ...\n@triton.jit\ndef kernel({', '.join(names)}, n): ...\n")
    assert list(long_signatures(path)) == ["long.py:1 wide takes 9"]
