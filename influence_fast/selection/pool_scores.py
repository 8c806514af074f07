"""The score table of a tokenized pool: its gradients in a store, those of the queries, and what baselines read."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from influence_fast.data.examples import Example, tokenize
from influence_fast.data.packing import IGNORED
from influence_fast.evaluation.evaluate import EvalConfig
from influence_fast.gradients.per_example import per_example_losses
from influence_fast.gradients.rows.row_spec import RowSpec
from influence_fast.influence.pool_gradients import pool_gradients
from influence_fast.influence.queries import Queries
from influence_fast.influence.scorer import TopInfluences
from influence_fast.influence.scores import ScoreTable
from influence_fast.influence.settings import InfluenceConfig
from influence_fast.influence.step_scores import StepTable, step_scores
from influence_fast.selection.difficulty import base_losses, pass_rates
from influence_fast.selection.embeddings import embedding_ranks
from influence_fast.selection.strategies import BASE_LOSS, EMBEDDING_RANK, PASS_RATE
from influence_fast.timing import timed


@dataclass(frozen=True, slots=True)
class ScoredPool:
    """A pool of training examples, what it is scored against, and the model that does.

    pool: the examples. tokens: the same tokenized, `{"id", "input_ids", "labels"}`. queries: what is asked. steps: the
    kind of steps that are scored too ("lines", "sentences", "tokens"); None: examples alone.
    """

    model: Any
    tokenizer: Any
    pool: Sequence[Example]
    tokens: Sequence[dict[str, Any]]
    queries: Queries
    steps: str | None = None


def baseline_columns(
    table: ScoreTable,
    needs: Collection[str],
    scored: ScoredPool,
    config: EvalConfig,
    *,
    transcripts: Path | None = None,
    progress: bool = True,
) -> tuple[ScoreTable, dict[str, float]]:
    """Return `table` with those of `BASELINE_COLUMNS` that are in `needs`, and the seconds of each.

    `embedding_rank` by the correct queries, `pass_rate` under `config` and `base_loss`, all of the pretrained model.
    The pool has, in any order, an example for each row of the table.
    """
    columns: dict[str, np.ndarray] = {}
    seconds: dict[str, float] = {}
    model, tokenizer, queries = scored.model, scored.tokenizer, scored.queries
    by_id = {example.id: example for example in scored.pool}
    tokens = {example["id"]: example for example in scored.tokens}
    if EMBEDDING_RANK in needs:
        with timed(seconds, "embeddings"):
            asked = tokenize([queries.examples[i] for i in queries.groups["correct"]], tokenizer).examples
            columns[EMBEDDING_RANK] = embedding_ranks(model, [tokens[name] for name in table.ids], asked)
    if PASS_RATE in needs:
        with timed(seconds, "pass rates"):
            examples = [by_id[name] for name in table.ids]
            columns[PASS_RATE] = pass_rates(
                model, tokenizer, examples, config=config, transcripts=transcripts, progress=progress
            )
    if BASE_LOSS in needs:
        with timed(seconds, "losses of the base model"):
            columns[BASE_LOSS] = base_losses(model, [tokens[name] for name in table.ids])
    return table.with_columns(columns), seconds


@dataclass(frozen=True, slots=True)
class PoolScores:
    """Scores of a pool, and what they took.

    table: the scores, `loss` and `tokens`. seconds: of each step. top: rows of the table that count most for each
    query, where they were asked for. steps: scores of the examples' steps, where they were asked for.
    """

    table: ScoreTable
    seconds: dict[str, float]
    top: TopInfluences | None
    steps: StepTable | None = None


def score_pool(
    asked: ScoredPool,
    store_path: Path,
    gradients: RowSpec,
    influence: InfluenceConfig,
    *,
    top: int = 0,
    progress: bool = True,
) -> PoolScores:
    """Write gradients of the tokenized pool into a store, and score them against gradients of the queries.

    top: examples to find for each query and direction; 0 for none. Examples without a finite gradient are set aside by
    the store and have no row in the table.
    """
    seconds: dict[str, float] = {}
    model, pool, queries = asked.model, asked.tokens, asked.queries
    tokenized = tokenize(queries.examples, asked.tokenizer).examples
    made = pool_gradients(model, pool, tokenized, store_path, gradients, influence, seconds, progress=progress)
    store = made.store
    with timed(seconds, "inner products and ranks"):
        scorer = made.scorer(influence, None if asked.steps is None else model)
        table = scorer.scores(made.queries, queries.groups, pairs=queries.pairs)
        found = scorer.top(made.queries, top) if top else None
    by_id = {example["id"]: example for example in pool}
    stored = [by_id[name] for name in table.ids]
    tokens = np.array([int((example["labels"] != IGNORED).sum()) for example in stored], dtype=np.float64)
    losses = None if store.losses is None else store.losses.astype(np.float64)
    if losses is None:  # a store of another source, or made before stores had them
        with timed(seconds, "losses"):
            losses = per_example_losses(model, stored).double().numpy()
    elif gradients.loss_reduction == "sum":
        losses /= [int((example["labels"][1:] != IGNORED).sum()) for example in stored]
    steps = None
    if asked.steps is not None:
        with timed(seconds, "steps"):
            steps = step_scores(
                model,
                stored,
                scorer.directions(made.queries, queries.groups, pairs=queries.pairs),
                steps=asked.steps,
                tokenizer=asked.tokenizer,
                lengths=scorer.lengths,
                loss_reduction=gradients.loss_reduction,
                progress=progress,
            )
    return PoolScores(table.with_columns({"loss": losses, "tokens": tokens}), seconds, found, steps)
