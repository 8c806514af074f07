"""Models whose templates open, drop or move reasoning: from text to a fine-tuning, answers and scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import influence_fast as inf
from benches.text_fidelity import templates, tokenizer_for
from influence_fast.evaluation.evaluate import EvalConfig
from influence_fast.gradients.rows.projection import Projection
from influence_fast.influence.queries import make_queries, own_answers
from influence_fast.store.queries import query_gradients
from influence_fast.training.fine_tuning import finetune, load_finetuned
from influence_fast.training.settings import LoraSettings, TrainConfig

FAMILIES = ("deepseek_r1_distill", "deepseekv3", "nemotron_3_nano", "qwen3_5_think")


@pytest.mark.parametrize("family", FAMILIES)
def test_reasoning_families_train_answer_and_score(tiny_model: Any, tmp_path: Path, family: str) -> None:
    tokenizer = tokenizer_for("byte-level BPE", templates()[family])
    examples = [
        inf.Example(
            f"e{i}", f"What is {i} + 1?", f"<think>\n{i} and 1\n</think>\n\n\\boxed{{{i + 1}}}", answer=f"{i + 1}"
        )
        for i in range(6)
    ]
    model = tiny_model("qwen2", vocab_size=len(tokenizer))
    tokens = inf.tokenize(examples, tokenizer).examples
    for example, row in zip(examples, tokens, strict=True):
        learnt = tokenizer.decode(row["input_ids"][row["labels"] != -100])
        assert learnt.startswith(example.completion.removeprefix("<think>\n"))  # which the prompt has opened
    result = finetune(
        model, tokenizer, tokens, tmp_path / "adapter", config=TrainConfig(max_steps=2, learning_rate=0.01),
        lora=LoraSettings(r=2), progress=False,
    )  # fmt: skip
    tuned = load_finetuned(model, result.path)
    answers = own_answers(tuned, tokenizer, examples, EvalConfig(max_new_tokens=5), progress=False)
    assert [answer["id"] for answer in answers] == [example.id for example in examples]
    said = [
        answer | {"generation": text, "token_ids": tokenizer(text)["input_ids"], "correct": i < 3, "ended": False}
        for i, (answer, text) in enumerate(zip(answers, ["and 1 is 2</think>2"] * 6, strict=True))
    ]
    queries = make_queries(examples, said, None, needed=())
    store = inf.build_store(tmp_path / "store", tuned, examples, inf.RowSpec.of(Projection(dim=4)), tokenizer=tokenizer)
    asked = query_gradients(store, tuned, inf.tokenize(queries.examples, tokenizer).examples)
    table = inf.Scorer.fit(store, preconditioner="cosine").scores(asked, queries.groups)
    assert len(table.ids) == 6
    for column in table.columns.values():
        assert torch.isfinite(torch.as_tensor(column).double()).all()
