"""The page of supported models, from the outcomes of `model_zoo`: counts, and a row a type."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from benches.model_zoo import Outcome, way

_VERDICTS = ("exact", "refused", "no adapter", "unbuilt", "wrong", "crash")
_HEADINGS = {"attention": "attention only", "best": "some targets"}
_LEGEND = """\
- **exact**: the rows are those of plain autograd, one example at a time through the model as transformers gives it.
- **refused**: an error says why, and what to do.
- **no adapter**: peft itself puts no LoRA adapter on these targets.
- **unbuilt**: the bench has no tiny model of this type, or no reference to compare with.
- **called**: *packs*, several examples in one forward; *alone*, one example at a time; *own attention*, one at a time
  with the model's own attention and mask.
"""


def page(outcomes: Sequence[Outcome], environment: dict[str, Any], minutes: float) -> str:
    """Write outcomes as a Markdown page: where they come from, counts, and a row a type with why it is not exact."""
    targets = list(dict.fromkeys(outcome.targets for outcome in outcomes))
    by_kind: dict[str, dict[str, Outcome]] = {}
    for outcome in outcomes:
        by_kind.setdefault(outcome.kind, {})[outcome.targets] = outcome
    versions = environment["versions"]
    lines = [
        "# Supported models",
        "",
        "Every model type of transformers' causal-LM mapping, tiny and random, with a LoRA adapter on all linears or",
        "on attention's projections alone. Made by",
        "",
        "    python -m benches.model_zoo --table docs/supported-models.md",
        "",
        f"at commit {environment['commit']}, with transformers {versions['transformers']}, peft {versions['peft']} and "
        f"torch {versions['torch']},",
        f"on {environment['machine']['cores']} cores without a GPU in {minutes:.0f} minutes.",
        "",
        *_counts(by_kind, targets),
        "",
        _LEGEND,
        f"| type | {' | '.join(_HEADINGS.get(name, name) for name in targets)} | called | why not |",
        "|" + "---|" * (len(targets) + 3),
        *(_row(kind, row, targets) for kind, row in sorted(by_kind.items())),
    ]
    return "\n".join(lines) + "\n"


def _counts(by_kind: dict[str, dict[str, Outcome]], targets: Sequence[str]) -> list[str]:
    """A table of how many types have which verdict."""
    lines = [f"| of {len(by_kind)} types | {' | '.join(_VERDICTS)} |", "|" + "---|" * (len(_VERDICTS) + 1)]
    for name in targets:
        found = Counter(row[name].verdict for row in by_kind.values() if name in row)
        lines.append(f"| {_HEADINGS.get(name, name)} | {' | '.join(str(found[v]) for v in _VERDICTS)} |")
    return lines


def _row(kind: str, row: dict[str, Outcome], targets: Sequence[str]) -> str:
    verdicts = [_verdict(row[name]) if name in row else "" for name in targets]
    ways = sorted({way(outcome) for outcome in row.values()} - {""})
    reasons = dict.fromkeys(_reason(outcome) for outcome in row.values() if outcome.verdict != "exact")
    return f"| {kind} | {' | '.join(verdicts)} | {', '.join(ways)} | {'; '.join(reasons)} |"


def _verdict(outcome: Outcome) -> str:
    return f"{outcome.verdict} ({outcome.chosen})" if outcome.chosen else outcome.verdict


def _reason(outcome: Outcome) -> str:
    """An outcome's message without what is long or of this model alone, safe in a table."""
    message = re.sub(r"^base_model\.model\.", "", outcome.message)
    return re.sub(r"[|*_<>]", lambda mark: "\\" + mark[0], message)
