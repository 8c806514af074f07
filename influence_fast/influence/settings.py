"""Settings of the gradients that are stored and of the scores that are made of them, and what may go together."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from influence_fast.errors import ConfigError, did_you_mean
from influence_fast.gradients.eigen_sketch import check_projection
from influence_fast.gradients.projection import EXACT
from influence_fast.gradients.row_spec import SKETCHES, RowSpec, is_fitted, names_store
from influence_fast.influence.damping import DEFAULT_DAMPING, FEWEST_ROWS, check_width
from influence_fast.influence.preconditioners import (
    AUTO,
    DEFAULT,
    FISHER_EXAMPLES,
    FISHER_LABELS,
    FROM_MODEL,
    PRECONDITIONERS,
    READ_FISHER,
    Damping,
    after_sketch,
    check_damping,
    fits_sketch,
)
from influence_fast.settings import one_of
from influence_fast.store.manifest import MANIFEST_NAME

QUERY_KINDS = ("own_answers", "reference")
WHOLE = EXACT  # in place of a projection's kind


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


def check_influence(influence: InfluenceConfig, gradients: RowSpec) -> None:
    """ConfigError for settings that are unknown or do not fit together, before any work is done for them."""
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
    sketch = str(gradients.sketch)
    if names_store(gradients.sketch) and not (Path(sketch) / MANIFEST_NAME).exists():
        raise ConfigError(f"gradients.sketch: {sketch!r} is no store's folder; {did_you_mean(sketch, SKETCHES)}")
    if fits_sketch(gradients, influence.preconditioner):
        try:
            check_projection(gradients.projection())
            after_sketch(influence.preconditioner)
        except ConfigError as error:
            raise ConfigError(f"gradients.sketch: {error}") from None
    elif influence.preconditioner in ("ekfac", "ekfac_cosine") and gradients.width is not None:
        raise ConfigError(
            f"influence.preconditioner: {influence.preconditioner!r} needs a block for each LoRA factor, which a "
            "random sketch to gradients.width mixes: leave gradients.sketch at auto and the kind at one_sided, leave "
            "the width out, or use 'cosine', 'fisher' or 'datainf'"
        )


def fitted_examples(influence: InfluenceConfig, gradients: RowSpec) -> int:
    """Of how many examples gradients are made beside the pool's rows, to fit a sketch or a preconditioner; 0 for none.

    As far as settings tell: a row that is shorter than its width is not sketched.
    """
    if fits_sketch(gradients, influence.preconditioner):
        return 0 if is_fitted(gradients.sketch) else gradients.sketch_examples
    if influence.fisher != FROM_MODEL:
        return 0
    return influence.fisher_examples if unsketched_preconditioner(influence, gradients) in READ_FISHER else 0


def unsketched_preconditioner(influence: InfluenceConfig, gradients: RowSpec) -> str:
    """The preconditioner that the default stands for where no sketch is fitted, as far as settings tell (see
    `preconditioners.resolve`, which has the rows' layout)."""
    if influence.preconditioner != DEFAULT:
        return influence.preconditioner
    return "ekfac_cosine" if gradients.width is None else "cosine"
