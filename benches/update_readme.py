"""Writes the README's figures from the result files, so that no number in it is typed.

python -m benches.update_readme
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benches" / "results"
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"


def measured(result: dict[str, Any]) -> str:
    """Where a result comes from, in a few words."""
    machine, versions = result["machine"], result["versions"]
    where = machine["gpu"] or f"{machine['cpu']}, {machine['cores']} cores"
    return f"{where}, torch {versions['torch']}, commit {result['commit']}, {result['measured'][:10]}"


def gradients(result: dict[str, Any]) -> list[str]:
    lines = [
        f"Per-example projected gradients ({result['projection']}) of {result['examples']} real worked solutions, "
        f"{result['model']}, time over plain peft forward+backward of the same examples "
        "(median of rounds, range in brackets):",
        "",
        "| against | ratio |",
        "|---|---|",
    ]
    lines += [
        f"| {name} | **{r['median']:.2f}** ({r['min']:.2f}-{r['max']:.2f}) |" for name, r in result["ratio"].items()
    ]
    return [*lines, "", f"`python -m benches.bench_gradients`: {measured(result)}", ""]


def inner_products(result: dict[str, Any]) -> list[str]:
    lines = [
        f"Inner products of {result['rows']:,} stored int8 rows of {result['width']:,} numbers, speed over what one "
        "would write in PyTorch:",
        "",
        "| case | against | times as fast |",
        "|---|---|---|",
    ]
    names = {"many": "512 queries", "many ranks": "512 queries, ranks and group means", "few": "2 queries"}
    for case, name in names.items():
        for other, found in result[case].items():
            r = found["ratio"]
            if not other.startswith("ours"):
                lines.append(f"| {name} | {other} | **{r['median']:.2f}** ({r['min']:.2f}-{r['max']:.2f}) |")
    return [*lines, "", f"`python -m benches.bench_inner_products`: {measured(result)}", ""]


def main() -> None:
    lines: list[str] = []
    for name, render in (("gradients-cpu", gradients), ("inner-products-cpu", inner_products)):
        path = RESULTS / f"{name}.json"
        if path.exists():
            lines += render(json.loads(path.read_text()))
    readme = ROOT / "README.md"
    before, rest = readme.read_text().split(BEGIN)
    _, after = rest.split(END)
    readme.write_text(before + BEGIN + "\n" + "\n".join(lines) + END + after)


if __name__ == "__main__":
    main()
