"""Can the adapter that a run trains, or was given, be scored? Asked before hours of training."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from influence_fast.config import RunConfig
from influence_fast.gradients.engine import GradientEngine
from influence_fast.gradients.rows.projection import SIDED_KINDS
from influence_fast.influence.sketch_fitting import width_of
from influence_fast.training.fine_tuning import finetuned, quiet_libraries
from influence_fast.training.fresh_adapter import attach_lora


def check_scorable(base: Any, config: RunConfig) -> None:
    """Open `base` for per-example gradients with the run's adapter, or a fresh one as the run will train.

    Raises ModelError where that adapter cannot be scored, and ConfigError where the run's rows do not fit it.
    """
    gradients = config.gradients
    projection = gradients.projection()
    with _tuned(base, config) as model:
        width_of(gradients, config.influence.preconditioner, model)
        if projection is not None and projection.kind in SIDED_KINDS:
            projection = replace(projection.plain, width=None)  # sketches are of no importance here, and take time
        with GradientEngine(model, projection, precision=gradients.precision):
            pass


@contextlib.contextmanager
def _tuned(base: Any, config: RunConfig) -> Iterator[Any]:
    if config.model.adapter is not None:
        with finetuned(base, config.model.adapter) as model:
            yield model
        return
    asking = [(parameter, parameter.requires_grad) for parameter in base.parameters()]
    with torch.random.fork_rng(devices=[]), quiet_libraries():
        model = attach_lora(base, config.lora, 0)
    try:
        yield model
    finally:
        model.unload()  # type: ignore[operator]
        for parameter, flag in asking:
            parameter.requires_grad_(flag)
