"""Settings that a test holds in one mapping, as the arguments that builds and fits take."""

from __future__ import annotations

import dataclasses
from typing import Any

import influence_fast as inf
from influence_fast.influence.sketch_fitting import SketchFit

_OF_SPEC = ("dtype", "loss_reduction", "precision", "max_tokens", "sketch_examples")


def spec_of(settings: dict[str, Any]) -> inf.RowSpec:
    """Take what says how rows are made out of `settings`; "projection" is in it."""
    made = {name: settings.pop(name) for name in _OF_SPEC if name in settings}
    return inf.RowSpec.of(settings.pop("projection"), **made)


def built_by(**settings: Any) -> dict[str, Any]:
    """Return `spec`, `options` and what else `build_store` and `build_shards` take."""
    spec = spec_of(settings)
    names = [f.name for f in dataclasses.fields(inf.BuildOptions)]
    options = inf.BuildOptions(**{name: settings.pop(name) for name in names if name in settings})
    return {"spec": spec, "options": options, **settings}


def fitted_by(**settings: Any) -> dict[str, Any]:
    """Return `spec`, `fit` and what else `fit_projection` takes."""
    spec = spec_of(settings)
    names = [f.name for f in dataclasses.fields(SketchFit)]
    fit = SketchFit(**{name: settings.pop(name) for name in names if name in settings})
    return {"spec": spec, "fit": fit, **settings}
