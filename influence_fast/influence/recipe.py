"""Which preconditioner, sketch and Fisher information go together: the only place that knows these rules.

A recipe is made of how rows are made and of what scores are asked for. It says which registered preconditioner a name
stands for, what is fitted on what and on how many examples, and which settings stay unused and why.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from influence_fast.errors import ConfigError, did_you_mean, setting
from influence_fast.gradients.rows.eigen_sketch import check_projection
from influence_fast.gradients.rows.layout import LayoutEntry, layout_width
from influence_fast.gradients.rows.projection import FLAT_KINDS, SIDED_KINDS
from influence_fast.gradients.rows.row_spec import SKETCHES, RowSpec, is_fitted, names_store
from influence_fast.influence import preconditioners
from influence_fast.influence.damping import FEWEST_ROWS, check_width
from influence_fast.influence.preconditioners import (
    AUTO,
    CANDIDATES,
    DEFAULT,
    DENSE,
    FACTORS,
    FISHER,
    FISHER_LABELS,
    FROM_MODEL,
    MOMENTS,
    PRECONDITIONERS,
    Kind,
    check_damping,
)
from influence_fast.influence.settings import CONTRAST, QUERY_KINDS, REFERENCE, WHOLE, InfluenceConfig
from influence_fast.settings import one_of
from influence_fast.store.manifest import MANIFEST_NAME
from influence_fast.store.reader import Store

FITTED, KEPT = "fitted", "kept"  # a sketch that is to be fitted for the rows, or one that was


class Unused(NamedTuple):
    """A setting that nothing reads, changed or not, and the sentence that says why."""

    key: str
    value: Any
    default: Any
    why: str

    @property
    def changed(self) -> bool:
        """Return whether somebody set it, and should hear that it does nothing."""
        return bool(self.value != self.default)

    @property
    def said(self) -> str:
        """Return what follows the setting's name in the sentence."""
        return f"is {self.value!r}, which nothing reads here: {self.why}"

    def __str__(self) -> str:
        return f"{self.key} {self.said}"


def unused_field(settings: Any, part: str, name: str, why: str) -> Unused:
    """Return one field of a settings class as unused."""
    return Unused(f"{part}.{name}", getattr(settings, name), type(settings).__dataclass_fields__[name].default, why)


@dataclass(frozen=True)
class Recipe:
    """The settings that go together for these rows and scores; `of` and `of_store` make one.

    rows: how rows are made; None for those of a store, which is finished. influence: what the scores are made of.
    sketch: whether rows are made by a fitted sketch: FITTED for them, KEPT from before, or None. blocks: whether a row
    that is stored has a block for each LoRA factor. certain: False where a row may turn out to be no longer than its
    width and so be left as it is, without a sketch.

        Recipe.of(inf.RowSpec(width=8192), InfluenceConfig("ekfac_cosine")).fitted_examples  # 256
    """

    rows: RowSpec | None
    influence: InfluenceConfig
    sketch: str | None
    blocks: bool
    certain: bool = True

    @classmethod
    def of(cls, rows: RowSpec, influence: InfluenceConfig, layout: Sequence[LayoutEntry] | None = None) -> Recipe:
        """Return the recipe for rows that are to be made.

        layout: of these rows before a sketch, where a model is at hand (`gradient_layout`). Without it, "auto" counts
        as a fitted sketch wherever it may be one, and `certain` is False.

        Nothing is checked yet: see `check`.
        """
        sketch = sketch_for(rows, influence.preconditioner)
        if sketch == FITTED and rows.sketch == AUTO:
            if layout is None:
                return cls(rows, influence, sketch, blocks=False, certain=False)
            if rows.width is not None and layout_width(layout) <= rows.width:
                return cls(rows, influence, None, blocks=True)
        return cls(rows, influence, sketch, blocks=rows.width is None)

    @classmethod
    def of_store(cls, store: Store, influence: InfluenceConfig) -> Recipe:
        """Return the recipe for the rows of a finished store."""
        sketched = store.identity.projection_sketch is not None
        blocks = bool(store.manifest.modules) and store.identity.projection_width is None
        return cls(None, influence, KEPT if sketched else None, blocks)

    @property
    def name(self) -> str:
        """Return the registered name that the preconditioner asked for stands for, "default" resolved."""
        name = self.influence.preconditioner
        if name != DEFAULT:
            return name
        met = self.blocks or self.sketch is not None
        return next(name for name in CANDIDATES if met or FACTORS not in PRECONDITIONERS[name].needs)

    @property
    def kind(self) -> Kind:
        """Return the preconditioner that is asked for; raise ConfigError for an unknown name."""
        return preconditioners.find(self.name)

    @property
    def applied(self) -> str:
        """Return the registered name of what is left to fit and apply to the rows that are stored.

        Raises ConfigError for an unknown name, and for one that rows of a fitted sketch cannot be scored by.
        """
        if self.sketch is None:
            preconditioners.find(self.name)
            return self.name
        left = self.kind.after_sketch
        if left is None:
            raise ConfigError(
                f"rows of a fitted sketch have the H^-1 of 'ekfac' in them, and cannot be scored by {self.name!r}: "
                "take 'ekfac' or 'ekfac_cosine', or rows of a random sketch"
            )
        return left

    @property
    def fits_sketch(self) -> bool:
        """Return whether a sketch is fitted for the rows."""
        return self.sketch == FITTED

    @property
    def reads_fisher(self) -> bool:
        """Return whether the preconditioner of the stored rows is fitted on rows that stand for a Fisher information.

        A fitted sketch has that in it.
        """
        return self.sketch is None and self.kind.fit_on == FISHER

    @property
    def reads_labels(self) -> bool:
        """Return whether anything is fitted on a Fisher information, so that it matters whose labels it is of."""
        return self.fits_sketch or self.reads_fisher

    @property
    def reads_moments(self) -> bool:
        """Return whether the preconditioner reads an optimizer's second moments, or the rows' in their place."""
        return self.kind.fit_on == MOMENTS

    @property
    def inverts(self) -> bool:
        """Return whether a damped inverse is made here; a sketch that is used again was fitted with a damping of its
        own.
        """
        return self.fits_sketch if self.sketch is not None else self.kind.fit_on is not None

    @property
    def fisher_examples(self) -> int:
        """Return how many examples' rows are kept beside the store, with labels that the model draws."""
        wanted = self.reads_fisher and self.influence.fisher == FROM_MODEL
        return self.influence.fisher_examples if wanted else 0

    @property
    def fitted_examples(self) -> int:
        """Return of how many examples gradients are made beside the pool's, to fit a sketch or a preconditioner.

        As far as settings tell: a row that is no longer than its width is not sketched.
        """
        return self.rows.sketch_examples if self.fits_sketch and self.rows is not None else self.fisher_examples

    def check(self) -> None:
        """Raise ConfigError for settings that are unknown or do not fit together, before any work is done for them."""
        self._check_values()
        self._check_moments()
        self._check_sketch()

    def _check_values(self) -> None:
        influence = self.influence
        one_of("influence.preconditioner", influence.preconditioner, (DEFAULT, *PRECONDITIONERS))
        one_of("influence.queries", influence.queries, QUERY_KINDS)
        one_of("influence.fisher", influence.fisher, FISHER_LABELS)
        _check_answers(influence)
        if influence.explain < 0:
            raise ConfigError(f"{setting('influence.explain')} is {influence.explain}; it must be 0 (no lists) or more")
        if influence.fisher_examples < 1:
            raise ConfigError(
                f"{setting('influence.fisher_examples')} must be at least 1, not {influence.fisher_examples}"
            )
        if influence.damping == AUTO and 0 < self.fitted_examples < FEWEST_ROWS:
            raise ConfigError(
                f"{setting('influence.damping')}: 'auto' needs at least {FEWEST_ROWS} examples to be picked on, and "
                "is given "
                f"{self.fitted_examples} ({setting('influence.fisher_examples')}, "
                f"{setting('gradients.sketch_examples')})"
            )
        if influence.fallback is not None:
            one_of("influence.fallback", influence.fallback, ("reference",))
        try:
            check_damping(influence.damping)
        except ConfigError as error:
            raise ConfigError(f"{setting('influence.damping')}: {error.marked}") from None

    def _check_moments(self) -> None:
        influence = self.influence
        if influence.optimizer is not None and not self.reads_moments:
            readers = " and ".join(repr(name) for name, kind in PRECONDITIONERS.items() if kind.fit_on == MOMENTS)
            raise ConfigError(
                f"{setting('influence.optimizer')} is read by {readers} only; choose one of them, or leave it out"
            )
        if influence.checkpoints and influence.optimizer is not None:
            raise ConfigError(
                f"{setting('influence.optimizer')}: each of {setting('influence.checkpoints')} has moments of its "
                "own; leave out one of the two"
            )
        given = influence.optimizer is not None or (influence.checkpoints and self.reads_moments)
        if given and influence.damping == AUTO:
            raise ConfigError(
                f"{setting('influence.damping')}: 'auto' cannot be picked for an optimizer's own moments; give a number"
            )

    def _check_sketch(self) -> None:
        rows = self.rows
        assert rows is not None
        needs = self.kind.needs
        if DENSE in needs and rows.width is not None:
            try:
                check_width("Fisher", rows.width)
            except ConfigError as error:
                raise ConfigError(f"{setting('influence.preconditioner')}: {error.marked}") from None
        if names_store(rows.sketch) and not (Path(str(rows.sketch)) / MANIFEST_NAME).exists():
            known = did_you_mean(str(rows.sketch), SKETCHES)
            raise ConfigError(f"{setting('gradients.sketch')}: {str(rows.sketch)!r} is no store's folder; {known}")
        if self.sketch is not None:
            try:
                check_projection(rows.projection())
                _ = self.applied
            except ConfigError as error:
                raise ConfigError(f"{setting('gradients.sketch')}: {error.marked}") from None
        elif FACTORS in needs and not self.blocks:
            raise ConfigError(
                f"{setting('influence.preconditioner')}: {self.name!r} needs a block for each LoRA factor, which a "
                "random sketch to "
                f"{setting('gradients.width')} mixes: leave {setting('gradients.sketch')} at auto and the kind at "
                "one_sided, leave the width out, "
                "or use 'cosine', 'fisher' or 'datainf'"
            )

    def unused(self) -> list[Unused]:
        """Return the settings of the rows and of the scores that nothing reads, whether they were changed or not."""
        return [*self._unused_of_rows(), *self._unused_of_scores()]

    def _unused_of_rows(self) -> Iterator[Unused]:
        rows = self.rows
        if rows is None:
            return
        if rows.kind == WHOLE:
            yield unused_field(rows, "gradients", "dim", f"whole gradients (kind: {WHOLE}) are not projected")
        elif rows.kind in FLAT_KINDS:
            why = f"{rows.kind} goes from whole factors straight to gradients.width"
            yield unused_field(rows, "gradients", "dim", why)
        if rows.width is None:
            yield unused_field(rows, "gradients", "sketch", "there is no gradients.width to sketch rows to")
        if not self.fits_sketch:
            yield unused_field(rows, "gradients", "sketch_examples", "no sketch is fitted")

    def _unused_of_scores(self) -> Iterator[Unused]:
        influence = self.influence

        def of(name: str, why: str) -> Unused:
            return unused_field(influence, "influence", name, why)

        if not self.inverts:
            yield of("damping", "nothing is inverted")
        if not self.reads_labels:
            yield of("fisher", "nothing is fitted on a Fisher information")
        # by auto a row that is no longer than its width is not sketched, and something else is fitted
        maybe = not self.certain and influence.fisher == FROM_MODEL
        if not maybe and not self.fisher_examples:
            yield of("fisher_examples", "no preconditioner is fitted on labels that the model draws")
        if influence.checkpoints:
            yield of("explain", "scores that are summed over checkpoints are not explained")
        if influence.queries == REFERENCE:
            yield of("fallback", "influence.queries: reference asks for no answers of the model")
        elif influence.verdicts is not None:
            yield of("fallback", "the validation rows hold the answers")
        if influence.samples == 1:
            yield of("temperature", "with influence.samples: 1 the questions are answered as the test's are")


def _check_answers(influence: InfluenceConfig) -> None:
    """Raise ConfigError for settings of the validation answers that do not go together."""
    if influence.samples < 1:
        raise ConfigError(f"is {influence.samples}; it must be at least 1", key="influence.samples")
    if influence.samples > 1 and (influence.queries == REFERENCE or influence.verdicts is not None):
        asked = "influence.verdicts" if influence.verdicts is not None else "influence.queries"
        raise ConfigError(f": with this {setting(asked)} the model is asked for no answers", key="influence.samples")
    if influence.samples > 1 and not 0 < influence.temperature < math.inf:
        raise ConfigError(
            f"is {influence.temperature}, and all {influence.samples} answers to a question would be equal; set one "
            "above 0",
            key="influence.temperature",
        )
    if influence.verdicts is not None and influence.queries != CONTRAST:
        raise ConfigError(f"is read by {setting('influence.queries', CONTRAST)} alone", key="influence.verdicts")


def sketch_for(rows: RowSpec, preconditioner: str) -> str | None:
    """Return whether rows that are to be scored by `preconditioner` are made by a fitted sketch: FITTED for them, KEPT
    from before, or None.

    With `sketch` "auto" they are where a sketch has the preconditioner's H^-1 in it and rows have a width.
    """
    if is_fitted(rows.sketch):
        return KEPT
    if rows.sketch != AUTO:
        return FITTED if rows.sketch == "eigen" else None
    kind = PRECONDITIONERS.get(CANDIDATES[0] if preconditioner == DEFAULT else preconditioner)
    sketched = rows.width is not None and rows.kind in SIDED_KINDS
    return FITTED if sketched and kind is not None and kind.after_sketch is not None else None
