"""Judge gradient rows by central differences of the plain loss, and by how these change with the step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from influence_fast.check.differences import differences, plain_losses
from influence_fast.check.engine_numbers import EngineNumbers
from influence_fast.check.verdicts import UNJUDGED, Check

# Standard deviations of what the losses are rounded by that count as agreement.
NOISES = 4.0
# An error that changes by less than this part of itself from one step to a shorter one is the rows' own.
_SAME = 0.3


@dataclass(frozen=True, slots=True)
class _Scale:
    """The steps by which an adapter of one dtype is moved, and the relative errors that count as none.

    step: along rows. Measured on SmolLM2-135M in fp32, r = 8: an error of 1.4e-5 of the row's norm at 0.01 and of
    1.8e-4 at 0.03. bf16 losses are rounded by some 1e-3, from which only a large step stands out; fp64 leaves room for
    one so short that no curvature counts, but for models that compute norms in fp32. random: along a random direction,
    of the adapter's norm: such a direction meets little curvature, and its derivative is smaller than a row's by the
    root of the number of parameters. others: multiples of a step to try where it does not do.
    """

    step: float
    random: float
    row_error: float
    random_error: float
    others: tuple[float, ...]


_SCALES = {
    torch.float64: _Scale(1e-6, 1e-6, 2e-5, 1e-3, (0.1, 100.0, 1000.0)),
    torch.float32: _Scale(1e-2, 0.03, 5e-4, 1e-2, (1 / 3, 0.1, 1 / 30, 0.01, 3.0)),
}
_SCALE_16 = _Scale(0.1, 0.03, 0.1, 0.2, (1 / 3, 3.0, 0.1))


@dataclass(frozen=True, slots=True)
class _Tried:
    """The signed errors of every direction and example at one step, and what the losses' rounding may explain."""

    step: float
    floor: float
    errors: tuple[float, ...]
    roundings: tuple[float, ...]

    def ratio(self, place: int) -> float:
        """Return an error as a multiple of its bound; infinite for NaN."""
        error = abs(self.errors[place])
        return error / max(self.floor, self.roundings[place]) if math.isfinite(error) else math.inf

    @property
    def worst(self) -> int:
        """Return the index of the error that is the largest multiple of its bound."""
        return max(range(len(self.errors)), key=self.ratio)

    @property
    def value(self) -> float:
        return abs(self.errors[self.worst])

    @property
    def bound(self) -> float:
        return max(self.floor, self.roundings[self.worst])

    @property
    def most(self) -> float:
        """Return the largest relative error that a row may have according to these measurements."""
        return max(abs(error) + rounding for error, rounding in zip(self.errors, self.roundings, strict=True))

    @property
    def agrees(self) -> bool:
        return self.ratio(self.worst) <= 1


@dataclass(frozen=True, eq=False)
class RowJudge:
    """Judge rows by central differences of the plain losses.

    Attributes:
        model: frozen and in evaluation mode.
        examples: that the rows are of.
        numbers: what the engine gave.
        parameters: that the rows are gradients of, in their order.
        noise: the standard deviation of a loss's rounding.
        seed: of the directions.
    """

    model: Any
    examples: Sequence[Mapping[str, Any]]
    numbers: EngineNumbers
    parameters: Sequence[nn.Parameter]
    noise: float
    seed: int

    def along_rows(self, count: int, step: float | None = None) -> Check:
        """Judge rows along sums of the rows, each example's part of each parameter with a random sign of its own.

        step: the only step to try; by default the dtype's own, and others where that one cannot tell.
        """
        rows, norms, scale = self.numbers.rows, self._norms, self._scale
        if not bool(torch.isfinite(norms).all()):
            return Check("rows", UNJUDGED, None, None, "rows are not finite; look at the adapter's weights")
        if float(norms.max()) == 0:
            return Check("rows", UNJUDGED, None, None, "every row is zero, as of an adapter whose factors are all zero")
        sizes = [parameter.numel() for parameter in self.parameters]
        generator = torch.Generator().manual_seed(self.seed)
        directions = []
        for _ in range(count):
            signs = torch.randint(0, 2, (len(rows), len(sizes)), generator=generator).mul_(2).sub_(1)
            weights = (signs / norms.clamp_min(1e-30)[:, None]).to(rows.device, rows.dtype)
            parts = [weights[:, i] @ part for i, part in enumerate(rows.split(sizes, dim=1))]
            directions.append(_unit(torch.cat(parts)))
        note = f"rows with central differences along {count} sums of them"
        return self._judge("rows", directions, scale.step if step is None else step, step is None, note)

    def along_random(self, count: int) -> Check:
        """Judge rows along random directions, which show a part that the rows lack.

        An error along one, times the root of the number of parameters, is about that of the whole row.
        """
        generator = torch.Generator().manual_seed((self.seed + 1) % 2**64)
        rows = self.numbers.rows
        held = self._without_gradient()
        directions = [
            _unit(torch.randn(rows.shape[1], generator=generator).masked_fill_(held, 0).to(rows.device, rows.dtype))
            for _ in range(count)
        ]
        size = math.sqrt(sum(float(p.detach().double().square().sum()) for p in self.parameters))
        note = f"rows with central differences along {count} random directions"
        return self._judge("random", directions, self._scale.random * (size or 1.0), True, note)

    def _without_gradient(self) -> torch.Tensor:
        """Return [k] bool: numbers that the loss depends on but autograd gives no gradient (an embedding's padding)."""
        found = torch.zeros(self.numbers.rows.shape[1], dtype=torch.bool)
        for entry in self.numbers.layout:
            if not entry.factor.startswith("lora_embedding_A"):
                continue
            layer: Any = self.model.get_submodule(entry.module)
            padding = getattr(layer.get_base_layer(), "padding_idx", None)
            if padding is not None:
                found[entry.columns].view(entry.shape)[:, padding] = True
        return found

    @property
    def _scale(self) -> _Scale:
        return _SCALES.get(self.numbers.tolerance.dtype, _SCALE_16)

    @property
    def _norms(self) -> torch.Tensor:
        return self.numbers.rows.double().norm(dim=1).cpu()

    def _judge(self, name: str, directions: Sequence[torch.Tensor], start: float, others: bool, note: str) -> Check:
        """Judge at one step and, where it is too long for the curvature or too short for the rounding, at others.

        Wrong rows are wrong by the same amount at every step. Another step clears them only if it excludes the error
        that was found first, or any that counts.
        """
        scale = self._scale
        floor, factor = scale.row_error, 1.0
        if name == "random":
            floor, factor = scale.random_error, math.sqrt(self.numbers.rows.shape[1])
        tried = [self._at(directions, start, floor, factor)]
        first = tried[0]
        if not others or (first.agrees and first.bound <= 2 * floor):
            return _check(name, first, note)
        multiples = [m for m in scale.others if m > 1] if first.agrees else scale.others
        for multiple in multiples:
            before = tried[-1]
            tried.append(self._at(directions, start * multiple, floor, factor))
            found, place = tried[-1], tried[-1].worst
            if first.agrees:
                continue
            same = abs(found.errors[place] - before.errors[place]) <= _SAME * found.value
            cleared = found.agrees and found.most <= max(floor, first.value / 2)
            if cleared or (same and not found.agrees and found.bound <= first.value / 2):
                return _check(name, found, note)
        if first.agrees:
            return _check(name, min((one for one in tried if one.agrees), key=lambda one: one.bound), note)
        nearest = min(tried, key=lambda one: one.ratio(one.worst))
        return Check(name, UNJUDGED, nearest.value, nearest.bound, f"{note}; they change with the step ({start:.1g})")

    def _at(self, directions: Sequence[torch.Tensor], step: float, floor: float, factor: float) -> _Tried:
        """Measure the errors at one step, multiplied by `factor`, and the part that rounding may explain."""
        norms = self._norms
        least = 1e-6 * float(norms.max())
        errors, roundings = [], []
        for direction in directions:
            moved = differences(
                lambda: plain_losses(self.model, self.examples), self.numbers.rows, direction, self.parameters, step
            )
            for difference, norm in zip(moved, norms.tolist(), strict=True):
                # Where all rows are zero, the derivative itself is the error.
                size = max(norm, least) or 1.0
                errors.append(factor * difference.error(size))
                noise = math.sqrt(2) * self.noise / (difference.distance * size) if difference.distance else math.inf
                roundings.append(NOISES * factor * noise)
        return _Tried(step, floor, tuple(errors), tuple(roundings))


def _check(name: str, tried: _Tried, note: str) -> Check:
    return Check.of(name, tried.value, tried.bound, f"{note}, step {tried.step:.1g}")


def _unit(direction: torch.Tensor) -> torch.Tensor:
    return direction / direction.norm()
