"""Explain each answer by the training examples that made it likelier and those that made it less likely.

A score table says what an example does to all answers of a group; this says what stands behind a single one.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from influence_fast.atomic import replacing
from influence_fast.data.examples import Example
from influence_fast.influence.queries import Queries
from influence_fast.influence.scorer import TopInfluences
from influence_fast.report.context import clipped
from influence_fast.report.page import templates
from influence_fast.report.text import percent, signed

# Name of a run's .html and .jsonl file.
EXPLAINED = "explained"
# Answers of each group that are shown on a page.
SHOWN_ANSWERS = 100
# Examples listed as named most often over all answers.
_MOST_NAMED = 10
# Characters shown of an example; a page has many of them.
_MOST_TEXT = 4000
# Characters of an example's prompt where it is only named.
_STARTS = 100
DIRECTIONS = ("raising", "lowering")


def explanations(top: TopInfluences, ids: Sequence[str], queries: Queries) -> list[dict[str, Any]]:
    """Return the examples that made each answer likelier and those that made it less likely, query by query.

    Each has the query's `id`, the `groups` it belongs to, `prompt`, `answer`, `reference` (whether that is the
    reference solution, not an answer of the model), and `raising` and `lowering`: lists of an example's `id` and
    `influence`, the strongest first.

    ids: of the rows that `top` counts. Examples whose influence has the other sign, or is 0, are not in a list.
    """
    groups: list[list[str]] = [[] for _ in queries.examples]
    for name, members in queries.groups.items():
        for place in members:
            groups[place].append(name)
    return [
        {
            "id": example.id,
            "groups": groups[q],
            "prompt": example.prompt,
            "answer": example.completion,
            "reference": q in queries.references,
            "raising": _named(top.raising[0][q], top.raising[1][q], ids, 1),
            "lowering": _named(top.lowering[0][q], top.lowering[1][q], ids, -1),
        }
        for q, example in enumerate(queries.examples)
        if groups[q]
    ]


def _named(values: np.ndarray, rows: np.ndarray, ids: Sequence[str], sign: int) -> list[dict[str, Any]]:
    return [
        {"id": ids[row], "influence": float(value)} for value, row in zip(values, rows, strict=True) if sign * value > 0
    ]


def save_explanations(
    found: Sequence[Mapping[str, Any]],
    pool: Mapping[str, Example],
    path: str | Path,
    *,
    title: str | None = None,
) -> list[Path]:
    """Write `path`.jsonl, a line for each answer, and the page `path`.html with all texts; return both paths.

    Each file is written atomically. pool: the training examples by id. title: heads the page, before "answer by
    answer".
    """
    lines, page = Path(f"{path}.jsonl"), Path(f"{path}.html")
    with replacing(lines) as temporary:
        temporary.write_text("".join(json.dumps(one) + "\n" for one in found), encoding="utf-8")
    with replacing(page) as temporary:
        temporary.write_bytes(_page(found, pool, title).encode("utf-8", "replace"))
    return [lines, page]


def _page(found: Sequence[Mapping[str, Any]], pool: Mapping[str, Example], title: str | None) -> str:
    environment = templates()
    environment.filters.update(signed=signed, percent=percent)
    # Named examples, numbered in the order in which they are named.
    places: dict[str, int] = {}

    def named(name: str) -> dict[str, Any]:
        label = pool[name].label
        place = places.setdefault(name, len(places))
        return {"id": name, "place": place, "label": label, "prompt": _start(pool[name].prompt)}

    groups = []
    for name in _by_interest(found):
        members = [one for one in found if name in one["groups"]]
        shown = [
            {
                "id": one["id"],
                "texts": _texts(
                    ("prompt", one["prompt"]), ("reference solution" if one["reference"] else "answer", one["answer"])
                ),
                **{d: [named(each["id"]) | each for each in one[d]] for d in DIRECTIONS},
            }
            for one in members[:SHOWN_ANSWERS]
        ]
        often = [named(each["id"]) | each for each in _often(members)]
        found_in = {"labels": _labels(members, pool), "often": often}
        references = all(one["reference"] for one in members)
        heading = _heading(name, references)
        groups.append(
            {"heading": heading, "references": references, "count": len(members), "answers": shown, **found_in}
        )
    examples = [
        named(name) | {"texts": _texts(("prompt", pool[name].prompt), ("completion", pool[name].completion))}
        for name in list(places)
    ]
    page = environment.get_template("answers.html.j2")
    heading = f"{title}: answer by answer" if title else "Answer by answer"
    return page.render(title=heading, groups=groups, examples=examples)


def _heading(group: str, references: bool) -> str:
    """Return a group's heading: "Incorrect answers", or of which task the reference solutions are."""
    if not references:
        return f"{group[:1].upper()}{group[1:]} answers"
    return "Reference solutions" if group == "correct" else f"{group} reference solutions"


def _by_interest(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the names of the groups, that of the wrong answers first, whose cause is looked for."""
    names = dict.fromkeys(name for one in found for name in one["groups"])
    return sorted(names, key=lambda name: name != "incorrect")


def _often(members: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the examples that are named for several answers, and for how many in either list, the most named first."""
    counts = {d: Counter(each["id"] for one in members for each in one[d]) for d in DIRECTIONS}
    both = sorted((counts["raising"] + counts["lowering"]).items(), key=lambda item: (-item[1], item[0]))
    return [{"id": name, **{d: counts[d][name] for d in DIRECTIONS}} for name, times in both[:_MOST_NAMED] if times > 1]


def _labels(members: Sequence[Mapping[str, Any]], pool: Mapping[str, Example]) -> list[dict[str, Any]]:
    """Return each label's share of either list's examples and of the pool; [] where no example has a label."""
    named = {d: Counter(pool[each["id"]].label for one in members for each in one[d]) for d in DIRECTIONS}
    whole = Counter(example.label for example in pool.values())
    if not set(whole) - {None}:
        return []
    return [
        {
            "label": label or "none",
            "pool": count / len(pool),
            **{d: named[d][label] / max(1, named[d].total()) for d in DIRECTIONS},
        }
        for label, count in whole.most_common()
    ]


def _texts(*texts: tuple[str, str]) -> list[tuple[str, str, str, int]]:
    """Return named texts in the form that the template macro `folding` takes."""
    return [(name, *clipped(text, _MOST_TEXT)) for name, text in texts]


def _start(text: str) -> str:
    """Return the first words of a text on one line."""
    line = " ".join(text.split())
    return line if len(line) <= _STARTS + 1 else line[:_STARTS] + "…"
