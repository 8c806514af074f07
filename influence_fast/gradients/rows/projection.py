"""Random projections of gradients: which numbers a row keeps, as counter-based functions of (seed, name, row, column).

The bits are those of `influence_fast.philox`. A matrix is seeded by the projection's seed and a name: "<module>/in",
"<module>/out" and "<module>/rank" for the sides of a layer, or that of `row_name` for the sketch of a row.
"""

from __future__ import annotations

import json
import math
import numbers
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from influence_fast.data.adapter_names import plain_name
from influence_fast.errors import ConfigError, did_you_mean
from influence_fast.philox import FLAT_KINDS, MAX_WIDTH, sign_matrix

if TYPE_CHECKING:
    from influence_fast.gradients.rows.eigen_sketch import EigenSketch

SIDED_KINDS = ("one_sided", "kron")  # of the sides of each factor
KINDS = (*SIDED_KINDS, *FLAT_KINDS)
EXACT = "none"  # of a target's weights; for an adapter's factors there is None in the place of a projection
ALL_LINEAR = "all-linear"


@dataclass(frozen=True, slots=True)
class Projection:
    """Settings that turn a per-example gradient into a row of numbers; `None` in its place means the exact gradient.

    kind: "one_sided" (long side of each LoRA factor to `dim`, rank side kept), "kron" (both sides to `dim`),
        "sjlt" and "rademacher" (each factor flattened, then straight to `width` numbers).
    dim: columns of the side projections; unused by the flat kinds.
    seed: any integer; the same seed gives the same bits everywhere.
    width: length of the final row. Needed by the flat kinds; for the others, a second stage (one SJLT of the
        whole row to `width` numbers) or None for no second stage.
    layers: share of the decoder's layers, counted from the top, whose LoRA modules are in a row (rounded up to whole
        layers). The backward pass ends at the lowest of them.
    sketch: what makes rows of `width` numbers in place of the SJLT, where one was fitted (`fit_projection`).
    target: for a model without an adapter, as after full fine-tuning: the linears whose weights' gradients are in a
        row. "all-linear" (all but the output head), the end of their names ("q_proj"), a regular expression of whole
        names, or several of these. A weight has two long sides: "one_sided" becomes "kron", whose rows hold
        `R_out^T G R_in (dim, dim)`. With a target only, kind "none" is the exact gradient.

    Raises ConfigError for an unknown kind or a value out of range, or a sketch that was fitted for other ones.

        Projection(kind="kron", dim=32, target="all-linear")
    """

    kind: str = "one_sided"
    dim: int = 16
    seed: int = 0
    width: int | None = None
    layers: float = 1.0
    sketch: EigenSketch | None = None
    target: str | Sequence[str] | None = None

    def __post_init__(self) -> None:
        if self.target is not None:
            object.__setattr__(self, "target", _checked_target(self.target))
            if self.kind == "one_sided":
                object.__setattr__(self, "kind", "kron")
        if self.kind == EXACT and self.target is None:
            raise ConfigError(
                f"projection kind {EXACT!r} is of the weights that target names; for exact rows of an adapter give "
                "None in place of a projection"
            )
        if self.kind not in (*KINDS, EXACT):
            raise ConfigError(f"unknown projection kind {self.kind!r}; {did_you_mean(str(self.kind), KINDS)}")
        if self.exact and self.width is not None:
            raise ConfigError(
                f"projection kind {EXACT!r} has rows of whole gradients: leave out width, or choose 'kron'"
            )
        _check_integer("dim", self.dim, 1)
        if not isinstance(self.layers, numbers.Real) or isinstance(self.layers, bool) or not 0 < self.layers <= 1:
            raise ConfigError(f"projection layers is {self.layers!r}; it is a share, above 0 and at most 1")
        _check_integer("seed", self.seed, None)
        if self.width is not None:
            _check_integer("width", self.width, 1)
            if self.width > MAX_WIDTH:
                raise ConfigError(f"projection width {self.width} is above {MAX_WIDTH}; choose a smaller one")
        elif self.kind in FLAT_KINDS:
            raise ConfigError(f"projection kind {self.kind!r} needs width=<length of a row>, for example width=8192")
        if self.sketch is not None and self.sketch.goes_with != self.plain:
            raise ConfigError(f"a sketch that was fitted for {self.sketch.goes_with} does not go with {self.plain}")

    @property
    def plain(self) -> Projection:
        """Return this projection without a fitted sketch."""
        return self if self.sketch is None else replace(self, sketch=None)

    def __repr__(self) -> str:
        # Without a target as before there was one: what was fitted then is found by this text.
        names = [f.name for f in fields(self) if f.name != "target" or self.target is not None]
        return f"Projection({', '.join(f'{name}={getattr(self, name)!r}' for name in names)})"

    @property
    def exact(self) -> bool:
        """Return whether rows are whole gradients, of the weights that `target` names."""
        return self.kind == EXACT

    @property
    def sided(self) -> bool:
        """Return whether the sides of each factor are projected."""
        return self.kind in SIDED_KINDS

    @property
    def flat(self) -> bool:
        """Return whether whole factors are flattened before they are projected."""
        return self.kind in FLAT_KINDS


def exact_rows(projection: Projection | None) -> Projection | None:
    """Return what gives the exact gradient of what rows of `projection` are of, all layers included."""
    return None if projection is None or projection.target is None else Projection(EXACT, target=projection.target)


def row_name(module: str, factor: str) -> str:
    """Return the name that seeds the sketch of one factor's block of a row.

    `module` may have the peft wrapper's prefix or not.
    """
    return f"{plain_name(module)}/row/{factor}"


def random_matrix(
    projection: Projection,
    name: str,
    rows: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Return R (rows, dim) = signs / sqrt(dim), so that E[R R^T] = I and inner products are kept in the mean."""
    signs = sign_matrix(projection.seed, name, rows, projection.dim, dtype=dtype, device=device)
    return signs.mul_(entry_size(projection.dim, dtype))


def entry_size(dim: int, dtype: torch.dtype = torch.float32) -> float:
    """Return 1 / sqrt(dim) as a number of `dtype`, taken on the CPU: a GPU divides by plain numbers in its own way."""
    return float(torch.ones((), dtype=dtype).div_(math.sqrt(dim)))


def target_text(target: str | Sequence[str] | None) -> str | None:
    """Return a target as one text, as files hold it; `target_of` reads it."""
    return target if target is None or isinstance(target, str) else json.dumps(list(target))


def target_of(text: str | None) -> str | Sequence[str] | None:
    """Return the target that `target_text` wrote."""
    return tuple(json.loads(text)) if text is not None and text.startswith('["') else text


def _checked_target(target: object) -> str | tuple[str, ...]:
    """Return a target in its one form: a text, or several in order. Raises ConfigError for anything else."""
    names = [target] if isinstance(target, str) else list(target) if isinstance(target, Sequence) else []
    if not names or not all(isinstance(name, str) and name.strip() and '"' not in name for name in names):
        raise ConfigError(
            f"projection target is {target!r}; give {ALL_LINEAR!r}, the end of a linear's name, a regular expression, "
            "or a list of these"
        )
    for name in names:
        try:
            re.compile(name)
        except re.error as error:
            raise ConfigError(f"projection target {name!r} is no regular expression ({error}); mend it") from None
    ordered = sorted(set(names))
    return ordered[0] if len(ordered) == 1 else tuple(ordered)


def _check_integer(name: str, value: object, least: int | None) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ConfigError(f"projection {name} must be an integer, not {value!r}")
    if least is not None and value < least:
        raise ConfigError(f"projection {name} must be at least {least}, not {value}")
