"""Evaluation: endings and limits are seen, estimates and votes are right, an interrupted run goes on."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from influence_fast.data.examples import Example, render_prompt
from influence_fast.errors import ConfigError, DataError, ModelError
from influence_fast.evaluation import evaluate as evaluation
from influence_fast.evaluation.evaluate import (
    EvalConfig,
    evaluate,
    majority_correct,
    pass_at_k,
)
from influence_fast.evaluation.transcripts import EvalItem, Journal, record_of
from influence_fast.statistics.intervals import wilson_interval


class Parrot(torch.nn.Module):
    """Stands in for a model: answers each prompt with a fixed text, padding after its end as `generate` does."""

    def __init__(self, tokenizer: Any, answers: dict[str, list[str]]) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.tokenizer = tokenizer
        self.answers = answers
        self.calls: list[tuple[torch.Tensor, torch.Tensor, GenerationConfig]] = []

    def generate(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, generation_config: GenerationConfig
    ) -> torch.Tensor:
        self.calls.append((input_ids, attention_mask, generation_config))
        rows = []
        for ids, mask in zip(input_ids, attention_mask, strict=True):
            prompt = self.tokenizer.decode(ids[mask.bool()])
            for text in self.answers[prompt]:
                rows.append((ids, self.tokenizer(text, add_special_tokens=False)["input_ids"]))
        width = min(generation_config.max_new_tokens, max(len(new) for _, new in rows))
        pad = self.tokenizer.pad_token_id
        return torch.stack([torch.cat([ids, torch.tensor((new + [pad] * width)[:width])]) for ids, new in rows])


def parrot(tokenizer: Any, examples: list[Example], *texts: list[str]) -> Parrot:
    prompts = [render_prompt(example, tokenizer) for example in examples]
    return Parrot(tokenizer, dict(zip(prompts, texts, strict=True)))


def test_grades_endings_and_transcripts(tokenizer: Any, examples: list[Example], tmp_path: Path) -> None:
    four = examples[:4]
    texts = [
        [f"{four[0].completion}</s>"],
        ["The answer is 999.</s>"],
        ["The postman brings</s>"],
        ["How many books " * 40],
    ]
    model = parrot(tokenizer, four, *texts)
    path = tmp_path / "deep" / "transcripts.jsonl"
    config = EvalConfig(max_new_tokens=60, batch_size=3)
    result = evaluate(model, tokenizer, four, config=config, transcripts=path)
    assert [item.id for item in result.items] == [example.id for example in four]
    assert [item.correct for item in result.items] == [True, False, False, False]
    assert [item.finish_reason for item in result.items] == ["stop", "stop", "stop", "length"]
    assert [item.extracted for item in result.items] == [four[0].answer, "999", None, None]
    assert result.items[0].generation == four[0].completion
    assert result.items[3].tokens == 60
    assert (result.accuracy, result.truncated, result.majority) == (0.25, 1, None)
    assert result.interval == wilson_interval(1, 4)
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [line["generation"] for line in lines] == [item.generation for item in result.items]
    assert {p.name for p in path.parent.iterdir()} == {path.name, f"{path.name}.run.json"}
    widths = [len(ids[0]) for ids, _, _ in model.calls]
    assert widths == sorted(widths, reverse=True)  # longest first
    for ids, mask, _ in model.calls:
        assert bool((mask[:, -1] == 1).all())  # padded on the left
        assert bool((ids[mask == 0] == tokenizer.pad_token_id).all())


def test_several_samples_give_pass_at_1_and_a_vote(tokenizer: Any, examples: list[Example]) -> None:
    two = examples[:2]
    right = [f"The answer is {example.answer}.</s>" for example in two]
    model = parrot(
        tokenizer, two, [right[0], "Dina</s>", "Dina</s>", right[0]], [right[1], *["The answer is 99.</s>"] * 3]
    )
    config = EvalConfig(max_new_tokens=60, temperature=0.7, top_p=0.9, samples=4, batch_size=4, pass_at=(1, 2, 4))
    result = evaluate(model, tokenizer, two, config=config)
    assert result.accuracy == (0.5 + 0.25) / 2
    # of 4 answers 2 and 1 are right: of the 6 pairs 5 and 3 hold a right one
    assert [(found.k, found.value) for found in result.pass_at] == [(1, 0.375), (2, pytest.approx(8 / 12)), (4, 1.0)]
    assert result.pass_at[0].interval == (0.25, 0.5)
    assert result.pass_at[1].interval == pytest.approx((3 / 6, 5 / 6))
    assert result.majority == 0.5
    assert [item.sample for item in result.items] == [0, 1, 2, 3] * 2
    assert result.interval == (0.25, 0.5)  # two questions: the resampled means reach both ends
    sent = model.calls[0][2]
    assert (sent.do_sample, sent.temperature, sent.top_p, sent.num_return_sequences) == (True, 0.7, 0.9, 4)
    assert sent.top_k == 0
    assert len(model.calls) == 2  # batch_size counts answers


def test_sampling_follows_its_seed(model: Any, tokenizer: Any, examples: list[Example]) -> None:
    def run(seed: int) -> list[str]:
        config = EvalConfig(max_new_tokens=8, temperature=1.5, samples=2, seed=seed)
        return [item.generation for item in evaluate(model, tokenizer, examples, config=config).items]

    assert run(0) == run(0)
    assert run(0) != run(1)


@pytest.mark.parametrize(("n", "c", "k"), [(n, c, k) for n in (1, 3, 6) for c in range(n + 1) for k in range(1, n + 1)])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer(n: int, c: int, k: int) -> None:
    subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(any(s) for s in subsets) / len(subsets), abs=1e-15)


def test_pass_at_k_of_many_samples_is_exact_and_bounded() -> None:
    assert pass_at_k(10_000, 1, 100) == pytest.approx(0.01, rel=1e-12)  # one right answer: k of n draws meet it
    for bad in [(4, 5, 1), (4, 2, 5), (4, 2, 0), (4, -1, 1)]:
        with pytest.raises(ValueError, match="need 0 <= c"):
            pass_at_k(*bad)


def test_choices_are_graded_by_their_letter(tokenizer: Any) -> None:
    three = [Example(f"q{i}", f"How many {word} are there?", "C", "C") for i, word in enumerate(("a", "an", "the"))]
    texts = [["The answer is (C).</s>"], ["Answer: B</s>"], ["C or so, who knows</s>"]]
    config = EvalConfig(max_new_tokens=60, answer_kind="choice")
    result = evaluate(parrot(tokenizer, three, *texts), tokenizer, three, config=config)
    assert [(item.extracted, item.correct) for item in result.items] == [("C", True), ("B", False), (None, False)]
    with pytest.raises(DataError, match=r"letter from A to J.*q9 \('12'\)"):
        evaluate(parrot(tokenizer, []), tokenizer, [Example("q9", "p", "c", "12")], config=config)


SAMPLED = EvalConfig(max_new_tokens=8, temperature=1.5, samples=2, batch_size=4, seed=5)


def interrupted(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Grading stops the run, as Ctrl-C would, after so many answers."""
    graded = itertools.count(1)
    real = evaluation.grade

    def stopping(*args: Any, **options: Any) -> Any:
        if next(graded) > after:
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr(evaluation, "grade", stopping)


def test_an_interrupted_evaluation_goes_on_and_comes_out_the_same(
    model: Any, tokenizer: Any, examples: list[Example], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = evaluate(model, tokenizer, examples, config=SAMPLED)
    path = tmp_path / "t.jsonl"
    with monkeypatch.context() as patch:
        interrupted(patch, after=5)
        with pytest.raises(KeyboardInterrupt):
            evaluate(model, tokenizer, examples, config=SAMPLED, transcripts=path)
    assert not path.exists()
    journal = tmp_path / "t.jsonl.partial"
    with journal.open("ab") as file:
        file.write('{"question": 6, "items": [{"id": "ü'.encode()[:-1])  # as a kill in the middle of a write leaves it
    again = evaluate(model, tokenizer, examples, config=SAMPLED, transcripts=path)
    assert again.reused == 4  # two questions were finished, the third was not
    assert again == whole
    assert not journal.exists()
    third = evaluate(model, tokenizer, examples, config=SAMPLED, transcripts=path)
    assert third.reused == 14
    assert third == whole


def test_answers_of_another_run_are_not_reused(
    model: Any, tokenizer: Any, examples: list[Example], tmp_path: Path
) -> None:
    import dataclasses

    path = tmp_path / "t.jsonl"
    evaluate(model, tokenizer, examples, config=SAMPLED, transcripts=path)

    def reused(model: Any = model, examples: list[Example] = examples, **changes: Any) -> int:
        config = dataclasses.replace(SAMPLED, **changes)
        return evaluate(model, tokenizer, examples, config=config, transcripts=path).reused

    assert reused(pass_at=(1, 2)) == 14  # read off the same answers
    assert reused(seed=6) == 0
    assert reused(seed=6) == 14  # what was written last
    assert reused() == 0
    changed = [dataclasses.replace(examples[0], answer="77"), *examples[1:]]
    assert reused(examples=changed) == 0
    assert reused() == 0
    weight = next(model.parameters())
    with torch.no_grad():
        weight[0, 0] += 1e-9
    try:
        assert reused() == 0
    finally:
        with torch.no_grad():
            weight[0, 0] -= 1e-9
    path.write_text("".join(path.read_text(encoding="utf-8").splitlines(keepends=True)[:-1]), encoding="utf-8")
    assert reused() == 0  # a line is gone: the record does not fit


def item(extracted: str | None, correct: bool) -> EvalItem:
    return EvalItem("a", "p", "g", "1", extracted, correct, "stop")


def test_majority_takes_the_most_frequent_answer_whatever_its_looks() -> None:
    assert majority_correct([item("2", False), item(r"\frac12", True), item(r"\frac{1}{2}", True)])
    assert not majority_correct([item("2", False), item("1", True)])  # a tie: the earlier
    assert not majority_correct([item(None, False), item(None, False)])
    assert majority_correct([item(None, False), item(None, False), item("1", True)])


def test_bad_input_is_named(model: Any, tokenizer: Any, examples: list[Example]) -> None:
    with pytest.raises(DataError, match="no examples"):
        evaluate(model, tokenizer, [], config=EvalConfig())
    with pytest.raises(DataError, match="nameless"):
        evaluate(model, tokenizer, [Example("nameless", "p", "c")], config=EvalConfig(max_new_tokens=4))
    with pytest.raises(ModelError, match=r"max_new_tokens.*context of 128"):
        evaluate(model, tokenizer, examples, config=EvalConfig(max_new_tokens=126))
    with pytest.raises(ConfigError, match="temperature"):
        EvalConfig(samples=4)
    with pytest.raises(ConfigError, match="max_new_tokens"):
        EvalConfig(max_new_tokens=0)
    with pytest.raises(ConfigError, match="top_p"):
        EvalConfig(top_p=0.0)
    with pytest.raises(ConfigError, match="pass@8 cannot be estimated from 4 samples"):
        EvalConfig(samples=4, temperature=1.0, pass_at=(1, 8))
    with pytest.raises(ConfigError, match="answer_kind: unknown value 'choise'; did you mean 'choice'"):
        EvalConfig(answer_kind="choise")
    with pytest.raises(ConfigError, match="engine: unknown value 'vlm'; did you mean 'vllm'"):
        EvalConfig(engine="vlm")


def test_damaged_transcripts_are_kept_aside_and_said(tmp_path: Path) -> None:
    path = tmp_path / "file.jsonl"
    run: dict[str, Any] = {"config": {"samples": 1}, "weights": "a" * 64}
    items = [EvalItem(f"q{i}", "p", "g", "a", None, False, "stop") for i in range(3)]
    Journal(path, run).finish(items)
    path.write_text(path.read_text()[:-30])
    damaged = path.read_bytes()
    with pytest.warns(UserWarning, match=r"file.jsonl is damaged: 2 of its 3 lines can be read; it is kept as file"):
        assert Journal(path, run).found == {}
    assert (tmp_path / "file.jsonl.damaged").read_bytes() == damaged


def test_answers_of_another_evaluation_are_kept_unless_they_may_go(tmp_path: Path) -> None:
    path = tmp_path / "file.jsonl"
    run: dict[str, Any] = {"config": {"samples": 1, "max_new_tokens": 5}, "weights": "a" * 64}
    item = EvalItem("q", "p", "g", "a", None, False, "stop")
    Journal(path, run).finish([item])
    assert Journal(path, run, overwrite=False).found == {0: [item]}
    longer = run | {"config": {"samples": 1, "max_new_tokens": 9}}
    with pytest.raises(ConfigError, match=r"another evaluation \(config.max_new_tokens: 5 against 9\)"):
        Journal(path, longer, overwrite=False)
    with pytest.raises(ConfigError, match=r"another evaluation \(other weights\)"):
        Journal(path, run | {"weights": "b" * 64}, overwrite=False)
    assert Journal(path, longer).found == {}
    other = tmp_path / "stopped.jsonl"
    stopped = Journal(other, run)
    stopped.add(0, [item])
    stopped.close()
    with pytest.raises(ConfigError, match="max_new_tokens: 5 against 9"):
        Journal(other, longer, overwrite=False)
    assert Journal(other, run, overwrite=False).found == {0: [item]}
    record_of(path).unlink()
    with pytest.raises(ConfigError, match="without a record"):
        Journal(path, run, overwrite=False)


@pytest.mark.parametrize("content", ["[1, 2]\n", '{"id": 1}\n', "text\n"])
def test_transcripts_replace_nothing_else(tmp_path: Path, content: str) -> None:
    path = tmp_path / "file.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match="holds no transcripts"):
        Journal(path, {"config": {"samples": 1}})
    assert path.read_text() == content
