"""How hard the training examples are for the pretrained model: its own answers to them, and its loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from influence_fast.data.examples import Example
from influence_fast.data.packing import IGNORED
from influence_fast.errors import DataError, truncated_list
from influence_fast.evaluation.evaluate import EvalConfig, evaluate
from influence_fast.gradients.model.frozen import frozen
from influence_fast.gradients.pairs import log_likelihoods
from influence_fast.selection.embeddings import pretrained


def check_answers(examples: Sequence[Example]) -> None:
    """Raise DataError naming the examples that have no final answer, without which there is no pass rate."""
    without = [example.id for example in examples if example.answer is None]
    if without:
        raise DataError(
            f"no final answer to compute a pass rate from in {truncated_list(without)}: add an 'answer' column, or "
            "leave the strategies difficulty, easy and hard out"
        )


def pass_rates(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    *,
    config: EvalConfig,
    transcripts: Path | None = None,
    progress: bool = False,
) -> np.ndarray:
    """Return (E,) float64 in 0 to 1: the share of `config.samples` answers to each example's question that is right.

    A question that several examples share (several traces of one problem) is asked once. `transcripts`: a jsonl file
    for the answers. It is the pretrained model that answers, an adapter on `model` is switched off for it: the
    fine-tuned one has seen the solutions.

    Raises DataError for examples without an answer, and as `evaluate` does.
    """
    check_answers(examples)
    questions: dict[tuple[Any, ...], Example] = {}
    for example in examples:
        questions.setdefault(_question(example), example)
    asked = list(questions.values())
    with pretrained(model):
        result = evaluate(model, tokenizer, asked, config=config, transcripts=transcripts, progress=progress)
    right: dict[str, list[bool]] = {}
    for item in result.items:
        right.setdefault(item.id, []).append(item.correct)
    return np.array([np.mean(right[questions[_question(example)].id]) for example in examples], dtype=np.float64)


def base_losses(model: Any, examples: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """Compute each example's mean loss under the pretrained model, by its own forward, one example at a time.

    Args:
        model: a causal LM; an adapter on it is switched off.
        examples: `{"input_ids", "labels"}`, as `tokenize` makes them.

    Returns:
        [E] float64 nats a token.
    """
    counts = np.array([int((example["labels"][1:] != IGNORED).sum()) for example in examples])
    with frozen(model), pretrained(model):
        return -log_likelihoods(model, examples).numpy() / counts


def _question(example: Example) -> tuple[Any, ...]:
    return example.turns, example.answer
