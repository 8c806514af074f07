"""Writes the README's figures from the result files, so that no number in it is typed.

python -m benches.update_readme [--demo demo-run]     # --demo: take a finished demo's outcome into the results
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benches.environment import describe

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


def demo(result: dict[str, Any]) -> list[str]:
    before = result["accuracy_before"]
    lines = [
        f"The demo: {result['data']['pool']} traces, {before['n']} test questions, one seed; accuracy with its 95 % "
        "interval over questions. Harmful: traces corrupted on purpose, which no strategy is told.",
        "",
        "| strategy | dropped | accuracy | harmful dropped | by chance |",
        "|---|---|---|---|---|",
        f"| base model | | {before['accuracy']:.3f} ({before['low']:.3f}-{before['high']:.3f}) | | |",
    ]
    for cell in result["cells"]:
        accuracy = f"{cell['accuracy']:.3f} ({cell['low']:.3f}-{cell['high']:.3f})"
        harmful = f"{cell['harmful_dropped']} of {cell['harmful_total']} | {cell['expected_by_chance']:.0f}"
        lines.append(f"| {cell['strategy']} | {100 * cell['fraction']:.0f} % | {accuracy} | {harmful} |")
    return [*lines, "", f"`make demo`: {measured(result)}", ""]


def take_demo(run: Path) -> None:
    """Keeps of a finished demo what the README shows."""
    results = json.loads((run / "results.json").read_text())
    kept = {key: results[key] for key in ("accuracy_before", "cells", "data", "queries", "detection", "cost")}
    (RESULTS / "demo-cpu.json").write_text(json.dumps(kept | describe(), indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--demo", type=Path, help="folder of a finished demo")
    args = parser.parse_args()
    if args.demo:
        take_demo(args.demo)
    lines: list[str] = []
    for name, render in (("demo-cpu", demo), ("gradients-cpu", gradients), ("inner-products-cpu", inner_products)):
        path = RESULTS / f"{name}.json"
        if path.exists():
            lines += render(json.loads(path.read_text()))
    readme = ROOT / "README.md"
    before, rest = readme.read_text().split(BEGIN)
    _, after = rest.split(END)
    readme.write_text(before + BEGIN + "\n" + "\n".join(lines) + END + after)


if __name__ == "__main__":
    main()
