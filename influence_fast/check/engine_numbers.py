"""The engine's losses and rows of a few examples, in packs and alone, and how it calls the model."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from influence_fast.data.packing import pack_examples
from influence_fast.gradients.engine import GradientEngine
from influence_fast.gradients.model.layer_outputs import rounded_layers
from influence_fast.gradients.model.tolerance import Tolerance
from influence_fast.gradients.per_example import packs_for
from influence_fast.gradients.rows.layout import LayoutEntry, layout_of
from influence_fast.gradients.step.opened import free_bytes

# Share of the free memory that a copy of the model in fp32 may take: its gradients and activations need the rest.
_ROOM = 0.5
# Share of the largest row's norm below which a row's error is taken relative to that norm.
_LEAST = 1e-6


@dataclass(frozen=True, eq=False)
class EngineNumbers:
    """Results of the engine for E examples.

    Attributes:
        losses: [E], mean losses, taken in packs.
        rows: [E, k] exact gradients, taken in packs.
        apart: the largest relative difference of a row taken alone; None where packs hold one example anyway.
        noise: the relative change of rows when every layer's output is rounded once more; None in fp32 and fp64.
        layout: of the rows.
        how: in words, how the model is called, and why.
        tolerance: of the model's dtype.
    """

    losses: list[float]
    rows: torch.Tensor
    apart: float | None
    noise: float | None
    layout: list[LayoutEntry]
    how: str
    tolerance: Tolerance


def engine_numbers(model: Any, examples: Sequence[Mapping[str, Any]], backend: str | None) -> EngineNumbers:
    """Run the engine on examples without any comparison but that on opening; raises as `per_example_gradients` does."""
    with GradientEngine(model, None, backend=backend, cuda_graphs=False) as engine:
        packs = packs_for(engine, examples, None)
        rows, losses = _rows(engine, packs, len(examples))
        weight = engine.linears[0].weight
        tolerance = Tolerance.of(weight.dtype, weight.device)
        apart = None
        if any(len(pack.indices) > 1 for pack in packs):
            alone = [engine.run(pack_examples([example], 1)[0])[0][0] for example in examples]
            apart = relative(torch.stack(alone), rows)
        noise = None
        if tolerance.dtype not in (torch.float32, torch.float64):
            with rounded_layers(engine.opened.decoder, tolerance.unit):
                noise = relative(_rows(engine, packs, len(examples))[0], rows)
        layout = layout_of(engine.linears)
        return EngineNumbers(losses.tolist(), rows, apart, noise, layout, _how(engine), tolerance)


def relative(rows: torch.Tensor, wanted: torch.Tensor) -> float:
    """Return the largest relative error of a row [E, k]; a zero row whose reference is zero has none."""
    errors = (rows - wanted).double().norm(dim=1)
    norms = wanted.double().norm(dim=1)
    norms = norms.clamp_min(_LEAST * float(norms.max()))
    return float(torch.where(errors == 0, errors, errors / norms).max())


def rows_in_float32(model: Any, examples: Sequence[Mapping[str, Any]], backend: str | None) -> torch.Tensor | None:
    """Return the rows of a copy of the model in fp32; None where the copy does not fit or cannot be made."""
    parameters = list(model.parameters())
    if any(not p.is_floating_point() or hasattr(p, "full_tensor") for p in parameters):
        # Quantised models and models spread over processes are not copied.
        return None
    needed, free = 4 * sum(p.numel() for p in parameters), _free(parameters[0].device)
    if free is None or needed > _ROOM * free:
        return None
    try:
        wide = copy.deepcopy(model).float()
    except (RuntimeError, TypeError, ValueError, AttributeError):
        return None
    return engine_numbers(wide, examples, backend).rows


def _rows(engine: GradientEngine, packs: Sequence[Any], count: int) -> tuple[torch.Tensor, torch.Tensor]:
    rows = torch.empty(count, engine.width, dtype=engine.reducer.dtype, device=engine.device)
    losses = torch.empty(count, dtype=torch.float64)
    for pack in packs:
        found, own = engine.run(pack)
        rows[pack.indices] = found.to(rows.dtype)
        losses[pack.indices] = own.double().cpu()
    return rows, losses


def _how(engine: GradientEngine) -> str:
    mode = engine.opened.mode
    if mode.packs_pay:
        return "several examples in a pack"
    why = mode.why or "its attention could not be replaced, and a mask over a pack costs more than it saves"
    own = " with the model's own attention" if mode.own_attention else ""
    return f"one example at a time{own}: {why}"


def _free(device: torch.device) -> int | None:
    if device.type != "cpu":
        return free_bytes(device)
    with contextlib.suppress(ValueError, OSError, AttributeError):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None
