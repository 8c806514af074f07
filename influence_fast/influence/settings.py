"""Settings of the gradients that are stored and of the scores that are made of them, and what may go together."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from influence_fast.errors import ConfigError, did_you_mean
from influence_fast.gradients.eigen_sketch import DEFAULT_EXAMPLES, check_projection
from influence_fast.gradients.fp8 import AUTO as OWN_PRECISION
from influence_fast.gradients.fp8 import PRECISIONS
from influence_fast.gradients.projection import EXACT, Projection
from influence_fast.influence.damping import DEFAULT_DAMPING, FEWEST_ROWS, check_width
from influence_fast.influence.preconditioners import (
    AUTO,
    DEFAULT,
    FISHER_EXAMPLES,
    FISHER_LABELS,
    FROM_MODEL,
    PRECONDITIONERS,
    READ_FISHER,
    SKETCHES,
    Damping,
    after_sketch,
    check_damping,
    fits_sketch,
)
from influence_fast.settings import one_of
from influence_fast.store.manifest import DTYPES, MANIFEST_NAME

QUERY_KINDS = ("own_answers", "reference")
WHOLE = EXACT  # in place of a projection's kind


@dataclass(frozen=True)
class GradientConfig:
    """How a gradient becomes a row of the store: `kind`, `dim`, `width`, `layers` and `seed` of `Projection`, or whole
    gradients for the kind `none`.

    `sketch` is how rows get to `width` numbers: `random`, or `eigen`, fitted on the gradients of `sketch_examples`
    examples (see `eigen_sketch`), or the folder of a store whose sketch is used again; `auto` is `eigen` where scores
    are to be `ekfac`'s, as they are by default, and leaves rows that are no longer than `width` as they are.
    `target` names the linears of a fully fine-tuned model whose weights' gradients are in a row (see `Projection`).
    `precision: fp8` multiplies with the frozen base weights in 8 bits (see `fp8`), for the queries' gradients too.
    """

    kind: str = "one_sided"
    # Measured on a 128-wide model: group scores agree with exact ones at 0.985 (16), 0.989 (32), 0.994 (64); wider
    # models have more modules to average over, and 16 keeps their rows short.
    dim: int = 64
    width: int | None = None
    layers: float = 1.0
    seed: int = 0
    loss_reduction: str = "mean"
    store_dtype: str = "bf16"
    precision: str = OWN_PRECISION
    max_tokens: int | None = None
    sketch: str = AUTO
    sketch_examples: int = DEFAULT_EXAMPLES
    target: str | tuple[str, ...] | None = None

    @property
    def projection(self) -> Projection | None:
        """None for whole gradients. Raises ConfigError where the settings do not fit together."""
        if self.kind == WHOLE:
            if self.width is not None or self.layers != 1:
                raise ConfigError(
                    f"gradients.kind {WHOLE!r} keeps whole gradients of all layers: leave out gradients.width and "
                    "gradients.layers, or choose a projection"
                )
            return None if self.target is None else Projection(EXACT, target=self.target)
        return Projection(
            self.kind, dim=self.dim, seed=self.seed, width=self.width, layers=self.layers, target=self.target
        )

    def fits_sketch(self, preconditioner: str) -> bool:
        """Whether a sketch is fitted for rows that are to be scored by `preconditioner`."""
        return fits_sketch(self.sketch, self.projection, preconditioner)


@dataclass(frozen=True)
class InfluenceConfig:
    """What the scores are made of.

    `queries: own_answers` uses the model's own answers to the validation questions, split into correct and
    incorrect (the paper's s_C and s_I); `reference` uses the reference solutions as the correct group alone.
    `fallback: reference` lets the reference solutions stand in for the correct group where the model got every
    question wrong; without it that is an error. `damping` is a share of the mean eigenvalue, or `auto` (picked on
    held-out rows); `optimizer`, a checkpoint folder with Adam's state, is where `adam` reads second moments. `tasks`
    names the column of the validation rows that says which task a question belongs to, for the strategy `less`.
    `checkpoints` sums the scores over the checkpoints of the fine-tuning, weighted by learning rate (TracIn, LESS), and
    shows how the ranking moved; it needs `training.save_checkpoints`. `fisher: model` fits `ekfac`, `fisher` and
    `datainf` (a fitted sketch too) on gradients of `fisher_examples` of the pool with labels drawn from the model (see
    `fisher_labels`); `data` fits them on the pool's own. `explain`: for each validation answer, so many examples that
    made it likelier and as many that made it less likely are written to `explained.html` and `explained.jsonl`.
    """

    preconditioner: str = DEFAULT
    damping: Damping = DEFAULT_DAMPING
    fisher: str = FROM_MODEL
    fisher_examples: int = FISHER_EXAMPLES
    optimizer: str | None = None
    queries: str = "own_answers"
    fallback: str | None = None
    tasks: str | None = None
    checkpoints: bool = False
    explain: int = 5


def check_influence(influence: InfluenceConfig, gradients: GradientConfig) -> None:
    """ConfigError for settings that are unknown or do not fit together, before any work is done for them."""
    gradients.projection  # noqa: B018 -- raises where the settings do not fit together
    one_of("gradients.store_dtype", gradients.store_dtype, tuple(DTYPES))
    one_of("gradients.loss_reduction", gradients.loss_reduction, ("mean", "sum"))
    one_of("gradients.precision", gradients.precision, PRECISIONS)
    one_of("influence.preconditioner", influence.preconditioner, (DEFAULT, *PRECONDITIONERS))
    one_of("influence.queries", influence.queries, QUERY_KINDS)
    one_of("influence.fisher", influence.fisher, FISHER_LABELS)
    if influence.explain < 0:
        raise ConfigError(f"influence.explain is {influence.explain}; it must be 0 (no lists) or more")
    if influence.fisher_examples < 1:
        raise ConfigError(f"influence.fisher_examples must be at least 1, not {influence.fisher_examples}")
    if influence.damping == AUTO and 0 < fitted_examples(influence, gradients) < FEWEST_ROWS:
        raise ConfigError(
            f"influence.damping: 'auto' needs at least {FEWEST_ROWS} examples to be picked on, and is given "
            f"{fitted_examples(influence, gradients)} (influence.fisher_examples, gradients.sketch_examples)"
        )
    if gradients.max_tokens is not None and gradients.max_tokens < 1:
        raise ConfigError(f"gradients.max_tokens is {gradients.max_tokens}; it must be at least 1, or left out")
    if influence.fallback is not None:
        one_of("influence.fallback", influence.fallback, ("reference",))
    try:
        check_damping(influence.damping)
    except ConfigError as error:
        raise ConfigError(f"influence.damping: {error}") from None
    if influence.optimizer is not None and influence.preconditioner not in ("adam", "less"):
        raise ConfigError("influence.optimizer is read by 'adam' and 'less' only; choose one of them, or leave it out")
    if influence.checkpoints and influence.optimizer is not None:
        raise ConfigError(
            "influence.optimizer: each of influence.checkpoints has moments of its own; leave out one of the two"
        )
    moments = influence.optimizer is not None or (
        influence.checkpoints and influence.preconditioner in ("adam", "less")
    )
    if moments and influence.damping == AUTO:
        raise ConfigError("influence.damping: 'auto' cannot be picked for an optimizer's own moments; give a number")
    if influence.preconditioner.startswith("fisher") and gradients.width is not None:
        try:
            check_width("Fisher", gradients.width)
        except ConfigError as error:
            raise ConfigError(f"influence.preconditioner: {error}") from None
    if gradients.sketch not in SKETCHES and not (Path(gradients.sketch) / MANIFEST_NAME).exists():
        raise ConfigError(
            f"gradients.sketch: {gradients.sketch!r} is no store's folder; {did_you_mean(gradients.sketch, SKETCHES)}"
        )
    if gradients.fits_sketch(influence.preconditioner):
        try:
            check_projection(gradients.projection)
            after_sketch(influence.preconditioner)
        except ConfigError as error:
            raise ConfigError(f"gradients.sketch: {error}") from None
        if gradients.sketch_examples < 1:
            raise ConfigError(f"gradients.sketch_examples must be at least 1, not {gradients.sketch_examples}")
    elif influence.preconditioner in ("ekfac", "ekfac_cosine") and gradients.width is not None:
        raise ConfigError(
            f"influence.preconditioner: {influence.preconditioner!r} needs a block for each LoRA factor, which a "
            "random sketch to gradients.width mixes: leave gradients.sketch at auto and the kind at one_sided, leave "
            "the width out, or use 'cosine', 'fisher' or 'datainf'"
        )


def fitted_examples(influence: InfluenceConfig, gradients: GradientConfig) -> int:
    """Of how many examples gradients are made beside the pool's rows, to fit a sketch or a preconditioner; 0 for none.

    As far as settings tell: a row that is shorter than its width is not sketched.
    """
    if gradients.fits_sketch(influence.preconditioner):
        return gradients.sketch_examples if gradients.sketch in SKETCHES else 0
    if influence.fisher != FROM_MODEL:
        return 0
    return influence.fisher_examples if unsketched_preconditioner(influence, gradients) in READ_FISHER else 0


def unsketched_preconditioner(influence: InfluenceConfig, gradients: GradientConfig) -> str:
    """The preconditioner that the default stands for where no sketch is fitted, as far as settings tell (see
    `preconditioners.resolve`, which has the rows' layout)."""
    if influence.preconditioner != DEFAULT:
        return influence.preconditioner
    return "ekfac_cosine" if gradients.width is None else "cosine"
