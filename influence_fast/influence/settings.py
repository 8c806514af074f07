"""Settings of the scores that are made of gradients; `recipe` says what goes together."""

from __future__ import annotations

from dataclasses import dataclass

from influence_fast.gradients.rows.projection import EXACT
from influence_fast.influence.damping import DEFAULT_DAMPING, Damping
from influence_fast.influence.preconditioners import DEFAULT, FISHER_EXAMPLES, FROM_MODEL

OWN, REFERENCE, CONTRAST = "own_answers", "reference", "contrast"
QUERY_KINDS = (OWN, REFERENCE, CONTRAST)
WHOLE = EXACT  # in place of a projection's kind


@dataclass(frozen=True)
class InfluenceConfig:
    """Settings of the scores.

    `queries: own_answers` uses the model's own answers to the validation questions, split into correct and
    incorrect (the paper's s_C and s_I); `reference` uses the reference solutions as the correct group alone;
    `contrast` scores as `own_answers` does, and also by right against wrong answers to the same question (`contrast`).
    `samples` above 1 is how many answers each validation question gets, at `temperature`, so that there are both kinds;
    `verdicts` names the column of the validation rows that says whether a row's completion is right: then these are the
    answers, and the model is asked for none.
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
    queries: str = OWN
    samples: int = 1
    temperature: float = 0.7
    verdicts: str | None = None
    fallback: str | None = None
    tasks: str | None = None
    checkpoints: bool = False
    explain: int = 5
