"""What a run's folder holds of scores, and whether it is still what the run wrote."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from influence_fast.data.examples import Example
from influence_fast.errors import DataError, one_line, truncated_list
from influence_fast.gradients.rows.row_spec import RowSpec
from influence_fast.influence.recipe import sketch_for
from influence_fast.influence.scores import ScoreTable
from influence_fast.influence.settings import InfluenceConfig
from influence_fast.report.explain import DIRECTIONS, EXPLAINED
from influence_fast.run.inputs import Input
from influence_fast.run.workdir import RunFolder
from influence_fast.selection.strategies import BASELINE_COLUMNS
from influence_fast.settings import to_dict

SCORES = "scores.parquet"
EXPLAINED_COUNT = "explained_count"


def explained_count(folder: RunFolder) -> int | None:
    """Return how many examples the lists of single answers were asked for; None where the lists are damaged.

    It is what was recorded, or, of folders from before there was a record, the length of the longest list.
    """
    try:
        lines = (folder / f"{EXPLAINED}.jsonl").read_text(encoding="utf-8").splitlines()
        longest = max((len(one[name]) for one in map(json.loads, lines) for name in DIRECTIONS), default=0)
    except (ValueError, KeyError, TypeError):
        return None
    found: int = folder.value(EXPLAINED_COUNT, longest)
    return found if lines else None


def damaged_table(folder: RunFolder, pool: Sequence[Example]) -> str:
    """Return why the score table is not one of this pool; empty where it is."""
    path = folder / SCORES
    try:
        table = ScoreTable.load(path)
    except DataError as error:
        return str(error)
    except OSError as error:  # what pyarrow makes of some damage
        return f"{path} cannot be read ({one_line(error, 200)})"
    strangers = set(table.ids) - {example.id for example in pool}
    missing = [column for column in sorted(BASELINE_COLUMNS) if folder.has(f"baselines/{column}")]
    missing = [column for column in missing if column not in table.columns]
    if strangers or missing:
        what = (
            f"has {truncated_list(sorted(strangers))}, not in the pool"
            if strangers
            else f"has no {truncated_list(missing)}"
        )
        return f"{path} is not the run's score table ({what})"
    return ""


def made_with(gradients: RowSpec, influence: InfluenceConfig, inputs: Mapping[str, Input]) -> dict[str, Any]:
    """Return all settings that the rows of a run's gradient store depend on."""
    settings = to_dict(gradients)
    del settings["max_tokens"]  # a row does not depend on its batch
    if gradients.target is not None and gradients.kind == "kron":
        settings["kind"] = "one_sided"  # the same rows: stores of earlier versions are recorded by this name
    fitted = {}
    if sketch_for(gradients, influence.preconditioner) is not None:
        fitted = {"damping": influence.damping, "fisher": influence.fisher}
    kept = inputs.get("gradients.sketch")
    return {"gradients": settings, "fitted": fitted, "sketch": None if kept is None else dict(kept.hashes)}
