"""Show traces with their steps coloured by influence: a table in a file, and a page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from influence_fast.atomic import replacing
from influence_fast.data.examples import Example
from influence_fast.influence.step_scores import HARM, StepTable
from influence_fast.report.page import templates
from influence_fast.report.text import count, decimal, signed

# Traces and single steps that a page shows, those that harm most first.
SHOWN_TRACES, SHOWN_STEPS = 150, 30
# Steps of one trace that are shown, and characters of a step or a prompt.
_MOST_STEPS, _MOST_TEXT = 200, 1500


def save_steps(
    table: StepTable, pool: Sequence[Example], output: str | Path, *, title: str | None = None
) -> list[Path]:
    """Write the scores of steps: `<output>.steps.csv` (or `.parquet`) and `<output>.steps.html`.

    Each file is written atomically. Returns both paths.
    """
    path, page = Path(f"{output}.steps{Path(output).suffix}"), Path(f"{output}.steps.html")
    table.save(path)
    with replacing(page) as temporary:
        temporary.write_bytes(steps_page(table, pool, title=title).encode("utf-8", "replace"))
    return [path, page]


def steps_page(table: StepTable, pool: Sequence[Example], *, title: str | None = None) -> str:
    """Return the page of a table of steps; `pool` has the examples that it is of, in any order."""
    environment = templates()
    environment.filters.update(signed=signed, decimal=decimal, count=count)
    harm, known = table[HARM], {example.id: example for example in pool}
    rows = table.of_examples()
    # the colours end at a size that few steps are beyond, so that one of them does not pale all others
    full = float(np.percentile(np.abs(harm), 95)) if len(harm) else 0.0
    groups = [name.removeprefix("s_") for name in table.columns if name.startswith("s_")]
    worst = sorted(rows, key=lambda name: -float(harm[rows[name]].max()))
    places = {name: place for place, name in enumerate(worst[:SHOWN_TRACES])}
    first = np.argsort(-harm, kind="stable")[:SHOWN_STEPS]

    def shown(row: int) -> dict[str, Any]:
        share = 0.0 if full == 0 else float(np.clip(harm[row] / full, -1, 1))
        return {
            "number": int(table["step"][row]) + 1,
            "text": _clipped(table.text[row].rstrip("\n")),
            "harm": float(harm[row]),
            "loss": float(table["loss"][row]),
            "scores": [(name, float(table[f"s_{name}"][row])) for name in groups],
            "colour": "neg" if share > 0 else "pos",
            "share": round(55 * abs(share)),
        }

    traces = [
        {
            "id": name,
            "label": known[name].label,
            "prompt": _clipped(known[name].prompt),
            "steps": [shown(row) for row in rows[name][:_MOST_STEPS].tolist()],
            "more": max(0, len(rows[name]) - _MOST_STEPS),
        }
        for name in worst[:SHOWN_TRACES]
    ]
    single = [{"id": table.ids[row], "place": places.get(table.ids[row])} | shown(row) for row in first.tolist()]
    page = environment.get_template("steps.html.j2")
    heading = f"{title}: step by step" if title else "Step by step"
    return page.render(
        title=heading,
        traces=traces,
        single=single,
        examples=len(rows),
        steps=len(table),
        contrast="contrast" in groups,
        incorrect="incorrect" in groups,
    )


def _clipped(text: str) -> str:
    """Return the text, cut where it is long."""
    return text if len(text) <= _MOST_TEXT else text[:_MOST_TEXT] + "…"
