"""Pass rates: one question is asked once, by the pretrained model, and every sample of it counts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from influence_fast.data.examples import Example
from influence_fast.errors import DataError
from influence_fast.evaluation.evaluate import EvalConfig, evaluate
from influence_fast.selection import difficulty
from influence_fast.selection.difficulty import pass_rates

SAMPLED = EvalConfig(max_new_tokens=8, samples=8, temperature=1.0, answer_kind="last_number")


def test_rates_are_shares_of_the_pretrained_models_right_answers(
    tiny_model: Callable[..., Any], tiny_lora: Callable[..., Any], tiny_tokenizer: Callable[..., Any]
) -> None:
    """Random models are hardly ever right, so the golds are numbers that the plain one says."""
    tokenizer, plain, adapted = tiny_tokenizer(), tiny_model(), tiny_lora()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter *= 20  # the adapter changes every answer
    questions = [Example(f"q{i}", f"Ada has {i} apples?", "c", answer="0") for i in range(5)]
    said: dict[str, list[str]] = {q.id: ["none"] for q in questions}
    for item in evaluate(plain, tokenizer, questions, config=SAMPLED).items:
        if item.extracted:
            said[item.id].append(item.extracted)
    pool = [replace(q, answer=said[q.id][-1]) for q in questions]
    rates = pass_rates(adapted, tokenizer, pool, config=SAMPLED)
    items = evaluate(plain, tokenizer, pool, config=SAMPLED).items
    assert rates.tolist() == [sum(i.correct for i in items if i.id == q.id) / 8 for q in pool]
    assert rates.max() > 0
    fine_tuned = evaluate(adapted, tokenizer, pool, config=SAMPLED).items
    assert rates.tolist() != [sum(i.correct for i in fine_tuned if i.id == q.id) / 8 for q in pool]


def test_a_shared_question_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    class Item:
        def __init__(self, id: str, correct: bool) -> None:
            self.id, self.correct = id, correct

    class Result:
        def __init__(self) -> None:
            verdicts = [("a#0", True), ("a#0", False), ("b", True), ("b", True), ("c", False), ("d", True)]
            self.items = [Item(*verdict) for verdict in verdicts]

    def fake(model: Any, tokenizer: Any, examples: list[Example], **_: Any) -> Any:
        asked.extend(e.id for e in examples)
        return Result()

    monkeypatch.setattr(difficulty, "evaluate", fake)
    pool = [
        Example("a#0", "one?", "x", answer="1"),
        Example("b", "two?", "x", answer="2"),
        Example("a#1", "one?", "y", answer="1"),
        Example("c", "one?", "y", answer="3"),  # the same words, another gold
        Example("d", "one?", "y", answer="1", between=(("assistant", "call"), ("tool", "1"))),  # after other turns
    ]
    assert list(pass_rates(object(), None, pool, config=SAMPLED)) == [0.5, 1.0, 0.5, 0.0, 1.0]
    assert asked == ["a#0", "b", "c", "d"]


def test_questions_without_an_answer_are_named() -> None:
    with pytest.raises(DataError, match=r"pass rate from in b: add an 'answer' column"):
        pass_rates(None, None, [Example("a", "p", "c", answer="1"), Example("b", "p", "c")], config=SAMPLED)
