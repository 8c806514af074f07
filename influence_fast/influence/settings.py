"""Settings of the gradients that are stored and of the scores that are made of them (`recipe`: what goes together)."""

from __future__ import annotations

from dataclasses import dataclass

from influence_fast.errors import ConfigError
from influence_fast.gradients.eigen_sketch import DEFAULT_EXAMPLES
from influence_fast.gradients.fp8 import AUTO as OWN_PRECISION
from influence_fast.gradients.fp8 import PRECISIONS
from influence_fast.gradients.projection import EXACT, Projection
from influence_fast.gradients.row_spec import RowSpec
from influence_fast.influence.damping import AUTO, DEFAULT_DAMPING, Damping
from influence_fast.influence.preconditioners import DEFAULT, FISHER_EXAMPLES, FROM_MODEL
from influence_fast.settings import one_of
from influence_fast.store.manifest import DTYPES

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


def check_rows(gradients: GradientConfig | RowSpec) -> None:
    """Raise ConfigError for settings of rows that are unknown or do not fit together."""
    if isinstance(gradients, RowSpec):
        return  # which looks at itself when it is made
    gradients.projection  # noqa: B018 -- raises where the settings do not fit together
    one_of("gradients.store_dtype", gradients.store_dtype, tuple(DTYPES))
    one_of("gradients.loss_reduction", gradients.loss_reduction, ("mean", "sum"))
    one_of("gradients.precision", gradients.precision, PRECISIONS)
    if gradients.max_tokens is not None and gradients.max_tokens < 1:
        raise ConfigError(f"gradients.max_tokens is {gradients.max_tokens}; it must be at least 1, or left out")
