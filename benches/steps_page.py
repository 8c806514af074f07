"""Write docs/steps.md: how well the wrong step of a trace is found, from benches/results/steps-*.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_TITLES = {
    "demo": "The demo's task: traces with exactly one wrong line",
    "mistakes_multistep_arithmetic": "BIG-Bench Mistake, multistep arithmetic",
    "mistakes_word_sorting": "BIG-Bench Mistake, word sorting",
    "mistakes_logical_deduction": "BIG-Bench Mistake, logical deduction",
}


def write_page(results: Path, page: Path) -> int:
    """Write the page from every result that is there, and return the exit status."""
    lines = [
        "# Finding the wrong step",
        "",
        "Made by `python -m benches.steps page` from `benches/results/steps-*.json`. The steps of a trace are scored,",
        "and the highest score is to be on the wrong one. *hit*: the share of traces where it is, with the 95 % Wilson",
        "interval; a tie counts by its share. *MRR*: mean reciprocal rank of the wrong step, with a 95 % bootstrap",
        "interval over traces. *wrong less right*: influence on wrong answers to held-out questions less that on right",
        "ones, the column `harm` of `score --steps`; *+ mean loss*: both standardised over all steps and added.",
        "*a token*: divided by the step's tokens. *by position*: sums by position of one backward pass, as bergson and",
        "kronfluence mean tokens, and not of the step's own losses.",
    ]
    for name, title in _TITLES.items():
        path = results / f"steps-{name}.json"
        if path.is_file():
            lines += ["", *section(title, json.loads(path.read_text(encoding="utf-8")))]
    page.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return 0


def section(title: str, found: dict[str, Any]) -> list[str]:
    """Return the lines of one task."""
    rows = found["methods"]
    environment, seconds = found["environment"], found["seconds"]
    spent = [one["steps of two directions"] / one["gradients of the same traces"] for one in seconds]
    lines = [
        f"## {title}",
        "",
        f"{rows[0]['traces']} traces over {found['settings']['seeds']} seeds; commit {environment['commit']}.",
        f"Steps of two directions took {min(spent):.1f} to {max(spent):.1f} times the gradient pass of these traces.",
        "",
        "| score | hit | by seed | MRR |",
        "|---|---|---|---|",
    ]
    for row in rows:
        (low, high), (under, over) = row["interval"], row["mrr_interval"]
        by_seed = ", ".join(f"{value:.2f}" for value in row["by_seed"])
        lines.append(
            f"| {row['method']} | {row['accuracy']:.3f} [{low:.3f}, {high:.3f}] | {by_seed} | "
            f"{row['mrr']:.3f} [{under:.3f}, {over:.3f}] |"
        )
    return lines
