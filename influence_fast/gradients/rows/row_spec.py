"""How the rows of a store are made, as one frozen value: what is projected, how long a row is, and how it is stored."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from influence_fast.errors import ConfigError, did_you_mean, setting, shown
from influence_fast.gradients.rows.eigen_sketch import DEFAULT_EXAMPLES, EigenSketch, check_projection
from influence_fast.gradients.rows.precision import AUTO, check_precision
from influence_fast.gradients.rows.projection import EXACT, KINDS, SIDED_KINDS, Projection

SKETCHES = (AUTO, "random", "eigen")  # or the folder of a store, or a fitted sketch
ROW_DTYPES = ("fp32", "bf16", "int8")
REDUCTIONS = ("mean", "sum")


@dataclass(frozen=True)
class RowSpec:
    """Say how a gradient becomes a row of a store.

    kind: "one_sided", "kron", "sjlt" or "rademacher" (see `Projection`), or "none" for whole gradients.
    dim: columns of the side projections.
    width: numbers in a row; None keeps what the projection gives.
    sketch: how rows get to `width` numbers: "random"; "eigen", fitted on the gradients of `sketch_examples` examples
        (see `eigen_sketch`); the folder of a store, whose sketch is used again; a fitted `EigenSketch`. "auto" is
        "eigen" where scores are to be `ekfac`'s, as they are by default, and leaves rows that are no longer than
        `width` as they are.
    dtype: how numbers are stored: "fp32", "bf16" or "int8" (nearest rounding, an fp32 scale a row).
    loss_reduction: "mean" or "sum" over an example's completion tokens.
    precision: "auto", the model's own dtype, or "fp8", products with the frozen base weights in 8 bits (see `fp8`).
        Queries are made in the same precision.
    layers: share of the decoder's layers, counted from the top, whose modules are in a row.
    seed: of the random matrices.
    target: the linears of a fully fine-tuned model whose weights' gradients are in a row (see `Projection`).
    sketch_examples: how many examples a sketch is fitted on.
    max_tokens: tokens in one packed batch; by default what suits the device. It changes speed and memory, not what the
        rows are of.

    Two specs are equal where they say the same of the rows, whatever their `max_tokens`.

    Raises ConfigError for values that do not exist or do not fit together. What the rows of a finished store are made
    by is `store.spec`.

    Example:
        >>> spec = inf.RowSpec(dim=64, width=8192, dtype="int8")
        >>> spec.loss_reduction
        'mean'
    """

    # Measured on a 128-wide model: group scores agree with exact ones at 0.985 (16), 0.989 (32), 0.994 (64); wider
    # models have more modules to average over, and 16 keeps their rows short.
    kind: str = "one_sided"
    dim: int = 64
    width: int | None = None
    sketch: str | Path | EigenSketch = AUTO
    dtype: str = field(default="bf16", metadata={"key": "store_dtype"})
    loss_reduction: str = "mean"
    precision: str = AUTO
    layers: float = 1.0
    seed: int = 0
    target: str | tuple[str, ...] | None = None
    sketch_examples: int = DEFAULT_EXAMPLES
    max_tokens: int | None = field(default=None, compare=False)

    #: What messages put before the name of a field; files and the command line put their own in its place.
    PREFIX: ClassVar[str] = "RowSpec."

    def __post_init__(self) -> None:
        if isinstance(self.sketch, os.PathLike):
            object.__setattr__(self, "sketch", os.fspath(self.sketch))
        if self.target is not None and not isinstance(self.target, str) and isinstance(self.target, Sequence):
            object.__setattr__(self, "target", tuple(self.target))
        self._check_choice("kind", (*KINDS, EXACT))
        self._check_choice("dtype", ROW_DTYPES)
        self._check_choice("loss_reduction", REDUCTIONS)
        check_precision(self.precision, f"{self.PREFIX}precision")
        self._check_count("sketch_examples", self.sketch_examples)
        if self.max_tokens is not None:
            self._check_count("max_tokens", self.max_tokens, ", or left out")
        if self.kind == EXACT and (self.width is not None or self.layers != 1):
            raise ConfigError(
                f"{self._named('kind')} {EXACT!r} keeps whole gradients of all layers: leave out "
                f"{self._named('width')} "
                f"and {self._named('layers')}, or choose a projection"
            )
        projection = self.projection()
        if projection is not None and self.target is not None:  # in their one form, as stores record them
            object.__setattr__(self, "kind", projection.kind)
            object.__setattr__(self, "target", _one_form(projection.target))
        self._check_sketch(projection)

    @classmethod
    def of(cls, projection: Projection | None, **others: Any) -> RowSpec:
        """Return the spec of rows that `projection` makes, its fitted sketch included; None stands for exact rows.

        others: fields that a projection does not have, such as `dtype`.
        """
        if projection is None:
            return cls(kind=EXACT, **others)
        if projection.exact:
            return cls(kind=EXACT, target=_one_form(projection.target), **others)
        random = "random" if projection.width is not None and projection.sided else AUTO
        return cls(
            kind=projection.kind,
            dim=projection.dim,
            width=projection.width,
            sketch=projection.sketch or random,
            layers=projection.layers,
            seed=projection.seed,
            target=_one_form(projection.target),
            **others,
        )

    @property
    def is_settled(self) -> bool:
        """Return whether `projection` is what makes the rows, with no sketch left to fit or to look up."""
        if self.sketch == AUTO:
            return self.width is None or self.kind not in SIDED_KINDS
        return isinstance(self.sketch, EigenSketch) or self.sketch == "random"

    def projection(self) -> Projection | None:
        """Return what makes a row of a gradient, None for exact rows of an adapter.

        A fitted sketch is in it only where `sketch` is one; "auto", "eigen" and a folder are resolved where the store
        is built.
        """
        if self.kind == EXACT:
            return None if self.target is None else Projection(EXACT, target=self.target)
        return Projection(
            self.kind,
            dim=self.dim,
            seed=self.seed,
            width=self.width,
            layers=self.layers,
            target=self.target,
            sketch=self.sketch if isinstance(self.sketch, EigenSketch) else None,
        )

    def with_projection(self, projection: Projection | None) -> RowSpec:
        """Return this spec for rows that `projection` makes, for example one with the sketch that was fitted."""
        others = ("dtype", "loss_reduction", "precision", "sketch_examples", "max_tokens")
        return RowSpec.of(projection, **{name: getattr(self, name) for name in others})

    def _named(self, name: str) -> str:
        """Return a field's name for a message."""
        return setting(f"{self.PREFIX}{name}")

    def _check_choice(self, name: str, known: Sequence[str]) -> None:
        value = getattr(self, name)
        if value not in known:
            raise ConfigError(
                f"{self._named(name)}: unknown value {shown(value)}; {did_you_mean(str(value), known)}", value=value
            )

    def _check_count(self, name: str, value: object, otherwise: str = "") -> None:
        if not isinstance(value, int) or isinstance(value, bool):
            raise ConfigError(
                f"{self._named(name)} is {shown(value)}; it must be a whole number{otherwise}", value=value
            )
        if value < 1:
            raise ConfigError(f"{self._named(name)} is {value}; it must be at least 1{otherwise}", value=value)

    def _check_sketch(self, projection: Projection | None) -> None:
        """Raise ConfigError for a sketch that is none, or that rows of `projection` cannot be made by."""
        if self.sketch in (AUTO, "random"):
            return
        if isinstance(self.sketch, str) and names_store(self.sketch) and not os.path.isdir(self.sketch):
            raise ConfigError(
                f"{self._named('sketch')}: {shown(self.sketch)} is no store's folder; "
                f"{did_you_mean(self.sketch, SKETCHES)}"
            )
        if not isinstance(self.sketch, str | EigenSketch):
            raise ConfigError(
                f"{self._named('sketch')} is {shown(self.sketch)}; give one of {', '.join(SKETCHES)}, a store's "
                "folder or "
                "a fitted sketch"
            )
        try:
            check_projection(projection)
        except ConfigError as error:
            raise ConfigError(f"{self._named('sketch')}: {error.marked}") from None


def names_store(sketch: str | Path | EigenSketch) -> bool:
    """Tell whether a spec's `sketch` is the folder of a store whose sketch is used again."""
    return not isinstance(sketch, EigenSketch) and str(sketch) not in SKETCHES


def is_fitted(sketch: str | Path | EigenSketch) -> bool:
    """Tell whether a spec's `sketch` is there already, so that none is fitted."""
    return isinstance(sketch, EigenSketch) or names_store(sketch)


def _one_form(target: str | Sequence[str] | None) -> str | tuple[str, ...] | None:
    return target if target is None or isinstance(target, str) else tuple(target)
