"""Record what the scores along a training are made with, beside them, so that others are not taken for them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from influence_fast.atomic import replacing
from influence_fast.data.fingerprints import dataset_fingerprint
from influence_fast.errors import ConfigError
from influence_fast.gradients.rows.row_spec import RowSpec

RECORD = "made-with.json"


def record_of(
    queries: Sequence[Mapping[str, Any]], groups: Mapping[str, list[int]], spec: RowSpec, *, applied: bool
) -> dict[str, Any]:
    """Return what decides scores beside the training: the validation examples, their groups and how rows are made.

    applied: whether something is done to the group gradients, of which no more is known.
    """
    made = {field.name: str(getattr(spec, field.name)) for field in fields(spec) if field.compare}
    return {
        "validation": dataset_fingerprint({"id": "", **query} for query in queries),
        "groups": dict(groups),
        "rows": made,
        "applied": applied,
    }


def keep_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Write a record beside the scores in `folder`."""
    with replacing(folder / RECORD) as temporary:
        temporary.write_text(json.dumps(record), encoding="utf-8")


def check_record(folder: Path, record: Mapping[str, Any], remedy: str) -> None:
    """Raise ConfigError where scores in `folder` were made with something else; those without a record pass."""
    path = folder / RECORD
    try:
        there = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return
    except ValueError:
        there = {}
    names = {
        "validation": "validation examples",
        "groups": "groups",
        "rows": "settings of rows (spec)",
        "applied": "group gradients (apply)",
    }
    for key, name in names.items():
        if not isinstance(there, dict) or there.get(key) != record[key]:
            raise ConfigError(f"{folder} holds scores that were made with other {name}: {remedy}")
