"""What answers are asked for by: nothing that a model brings along, and every end that it knows."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from influence_fast.data.examples import Example, render_prompt, tokenize
from influence_fast.errors import ConfigError
from influence_fast.evaluation.evaluate import EvalConfig, evaluate
from influence_fast.evaluation.generation import Answer, generate
from influence_fast.evaluation.generation_settings import Ends, find_ends, generation_settings
from influence_fast.influence.queries import make_queries, own_answers

HOSTILE = GenerationConfig(
    do_sample=True, temperature=0.7, top_p=0.8, top_k=20, repetition_penalty=1.5, min_new_tokens=9, max_length=7,
    no_repeat_ngram_size=2, suppress_tokens=[40, 41, 42], exponential_decay_length_penalty=(1, 1.5), num_beams=3,
    bos_token_id=0,
)  # fmt: skip


@contextlib.contextmanager
def own_settings(model: Any, settings: GenerationConfig) -> Iterator[None]:
    kept, model.generation_config = model.generation_config, settings
    try:
        yield
    finally:
        model.generation_config = kept


def prompts_of(examples: list[Example], tokenizer: Any) -> list[str]:
    return [render_prompt(example, tokenizer) for example in examples]


@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "peft"])
def test_greedy_is_argmax_whatever_the_model_brings(
    model: Any, tokenizer: Any, examples: list[Example], wrapped: bool
) -> None:
    from peft import LoraConfig, get_peft_model

    prompts, config = prompts_of(examples, tokenizer), EvalConfig(max_new_tokens=12)
    wanted = generate(model, tokenizer, prompts, config=config)
    with own_settings(model, HOSTILE):
        asked = get_peft_model(model, LoraConfig(target_modules=["q_proj"])) if wrapped else model
        found = generate(asked, tokenizer, prompts, config=config)
        assert model.generation_config is HOSTILE
        if wrapped:
            asked.unload()
    assert found == wanted


def test_the_models_own_settings_are_taken_where_asked_for(model: Any, tokenizer: Any, examples: list[Example]) -> None:
    own = GenerationConfig(repetition_penalty=1.8, eos_token_id=tokenizer.eos_token_id)
    prompt = prompts_of(examples[:1], tokenizer)
    ids = torch.tensor([tokenizer(prompt[0], add_special_tokens=False)["input_ids"]])
    with own_settings(model, own):
        wanted = model.generate(input_ids=ids, max_new_tokens=12, pad_token_id=tokenizer.pad_token_id)[
            0, ids.shape[1] :
        ]
        [[own_answer]] = generate(model, tokenizer, prompt, config=EvalConfig(max_new_tokens=12, generation="model"))
        [[explicit]] = generate(model, tokenizer, prompt, config=EvalConfig(max_new_tokens=12))
    assert list(own_answer.token_ids) == wanted.tolist()[: len(own_answer.token_ids)]
    assert own_answer.token_ids != explicit.token_ids
    for wrong in ({"temperature": 0.5}, {"top_p": 0.9}):
        with pytest.raises(ConfigError, match="leave temperature and top_p out"):
            EvalConfig(generation="model", **wrong)
    with pytest.raises(ConfigError, match="does not sample, so all would be equal"):
        generate(model, tokenizer, prompt, config=EvalConfig(max_new_tokens=12, generation="model", samples=2))


def test_ends_are_the_templates_the_tokenizers_and_the_models(tiny_tokenizer: Any, chatml: str) -> None:
    tokenizer = tiny_tokenizer(chat_template=chatml)
    turn, eos = tokenizer.convert_tokens_to_ids("<|im_end|>"), tokenizer.eos_token_id
    assert find_ends(None, tokenizer) == Ends(frozenset({turn, eos}))
    assert find_ends(GenerationConfig(eos_token_id=7), tokenizer) == Ends(frozenset({turn, eos, 7}))
    assert find_ends(GenerationConfig(eos_token_id=[7, 9]), tiny_tokenizer()) == Ends(frozenset({eos, 7, 9}))
    plain = tiny_tokenizer(chat_template=chatml.replace("<|im_end|>", "<|end|>"))
    assert find_ends(None, plain) == Ends(frozenset({eos}), ("<|end|>",))


class Says:
    """A model whose answers are given texts, whatever it is asked; `generate` as transformers calls it."""

    training = False

    def __init__(self, tokenizer: Any, texts: list[str]) -> None:
        self.rows = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        self.asked: list[Any] = []

    def parameters(self) -> Iterator[torch.Tensor]:
        return iter([torch.zeros(1)])

    def eval(self) -> None: ...

    def train(self, mode: bool) -> None: ...

    def generate(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **options: Any) -> torch.Tensor:
        self.asked.append(options)
        width = max(map(len, self.rows))
        rows = torch.tensor([[*row, *[0] * (width - len(row))] for row in self.rows])
        return torch.cat([input_ids, rows], dim=1)


def test_answers_end_at_the_templates_end_in_tokens_and_in_text(tiny_tokenizer: Any, chatml: str) -> None:
    tokenizer = tiny_tokenizer(chat_template=chatml)
    model: Any = Says(tokenizer, ["so 4<|im_end|>and more", "so 5<eos>", "so 6"])
    found = generate(model, tokenizer, ["p"] * 3, config=EvalConfig(max_new_tokens=30))
    ids = tokenizer(["so 4<|im_end|>", "so 5<eos>"], add_special_tokens=False)["input_ids"]
    assert found[0] == [Answer("so 4", len(ids[0]) - 1, "stop", tuple(ids[0]))]
    assert found[1] == [Answer("so 5", len(ids[1]) - 1, "stop", tuple(ids[1]))]
    assert found[2][0].reason == "length"
    assert "tokenizer" not in model.asked[0]

    plain = tiny_tokenizer(chat_template=chatml.replace("<|im_end|>", "<|end|>"))
    model = Says(plain, ["so 4<|end|>and more", "so <|en", "so 6<eos>"])
    found = generate(model, plain, ["p"] * 3, config=EvalConfig(max_new_tokens=30))
    assert [(answer.text, answer.reason) for [answer] in found] == [
        ("so 4", "stop"), ("so <|en", "length"), ("so 6", "stop"),
    ]  # fmt: skip
    assert plain.decode(found[0][0].token_ids) == "so 4<|end|>"
    assert model.asked[0]["generation_config"].stop_strings == ["<|end|>"]
    assert model.asked[0]["tokenizer"] is plain


def test_an_end_in_text_may_hold_a_special_token(tiny_tokenizer: Any, chatml: str) -> None:
    tokenizer = tiny_tokenizer(chat_template=chatml.replace("<|im_end|>", "<|im_end|>[END]"), eos="<eos>")
    assert find_ends(None, tokenizer).strings == ("<|im_end|>[END]",)
    model: Any = Says(tokenizer, ["so 4<|im_end|>[END]\nand", "so 5"])
    found = generate(model, tokenizer, ["p"] * 2, config=EvalConfig(max_new_tokens=30))
    assert [(answer.text, answer.reason) for [answer] in found] == [("so 4", "stop"), ("so 5", "length")]
    assert tokenizer.decode(found[0][0].token_ids) == "so 4<|im_end|>[END]"


def test_the_models_own_settings_mean_the_same_to_each_engine(tiny_tokenizer: Any) -> None:
    ends = find_ends(None, tiny_tokenizer())
    config = EvalConfig(generation="model")
    own = generation_settings(config, GenerationConfig(do_sample=True, temperature=0.6), ends)
    asked = own.for_transformers(0)
    assert own.for_vllm()["top_k"] == asked.top_k == 50
    assert own.for_vllm()["top_p"] == asked.top_p == 1.0
    stops = generation_settings(config, GenerationConfig(stop_strings=["Q:"]), ends)
    assert stops.ends.strings == ("Q:",)
    assert stops.for_transformers(0).stop_strings == ["Q:"]


@pytest.mark.parametrize(
    "own",
    [{"prompt_lookup_num_tokens": 3}, {"max_time": 0.5}, {"token_healing": True}, {"force_words_ids": [[3]]}],
    ids=lambda own: next(iter(own)),
)
def test_own_settings_that_cannot_be_asked_for_are_named(
    model: Any, tokenizer: Any, examples: list[Example], own: dict[str, Any]
) -> None:
    with own_settings(model, GenerationConfig(**own)), pytest.raises(ConfigError, match=next(iter(own))):
        generate(model, tokenizer, ["p", "q"], config=EvalConfig(max_new_tokens=3, generation="model"))


def test_own_settings_that_json_cannot_hold_are_recorded(
    model: Any, tokenizer: Any, examples: list[Example], tmp_path: Path
) -> None:
    config = EvalConfig(max_new_tokens=3, generation="model")
    with own_settings(model, GenerationConfig(sequence_bias={(5,): 1.0})):
        for reused in (0, 2):
            found = evaluate(model, tokenizer, examples[:2], config=config, transcripts=tmp_path / "a.jsonl")
            assert found.reused == reused


def test_vllm_is_asked_for_the_same_or_refuses(tiny_tokenizer: Any) -> None:
    ends = find_ends(None, tiny_tokenizer())
    greedy = generation_settings(EvalConfig(max_new_tokens=5), HOSTILE, ends).for_vllm()
    assert greedy | {"temperature": 0.0, "top_k": -1, "repetition_penalty": 1.0, "max_tokens": 5} == greedy
    own = GenerationConfig(do_sample=True, temperature=0.7, top_k=20, repetition_penalty=1.1, min_new_tokens=3)
    asked = generation_settings(EvalConfig(generation="model"), own, ends).for_vllm()
    wanted = {"temperature": 0.7, "top_k": 20, "top_p": 1.0, "repetition_penalty": 1.1, "min_tokens": 3}
    assert asked | wanted == asked
    with pytest.raises(ConfigError, match="vLLM has no 'no_repeat_ngram_size'"):
        generation_settings(EvalConfig(generation="model"), GenerationConfig(no_repeat_ngram_size=2), ends).for_vllm()


def test_answers_of_other_settings_of_the_model_are_asked_anew(
    model: Any, tokenizer: Any, examples: list[Example], tmp_path: Path
) -> None:
    path, config = tmp_path / "answers.jsonl", EvalConfig(max_new_tokens=6)
    evaluate(model, tokenizer, examples[:2], config=config, transcripts=path)
    record = json.loads((tmp_path / "answers.jsonl.run.json").read_text())["run"]
    assert record["generation"]["sampling"] == {"do_sample": False}
    assert tokenizer.eos_token_id in record["generation"]["ends"]["tokens"]
    with own_settings(model, GenerationConfig(repetition_penalty=1.2)):  # which nothing reads
        assert evaluate(model, tokenizer, examples[:2], config=config, transcripts=path).reused == 2
    with own_settings(model, GenerationConfig(eos_token_id=[5, 6])):
        with pytest.raises(ConfigError, match="holds the answers of another evaluation"):
            evaluate(model, tokenizer, examples[:2], config=config, transcripts=path, overwrite=False)
        assert evaluate(model, tokenizer, examples[:2], config=config, transcripts=path).reused == 0


def test_own_answers_are_asked_about_by_their_own_tokens(model: Any, tokenizer: Any, examples: list[Example]) -> None:
    answers = own_answers(model, tokenizer, examples, EvalConfig(max_new_tokens=8), progress=False)
    answers = [answer | {"correct": i % 2 == 0} for i, answer in enumerate(json.loads(json.dumps(answers)))]
    queries = make_queries(examples, answers, None)
    questions = {example.id: example for example in examples}
    generated = {answer["id"]: answer["token_ids"] for answer in answers}
    assert queries.examples
    for tokens in tokenize(queries.examples, tokenizer).examples:
        prompt = render_prompt(questions[tokens["id"]], tokenizer)
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        assert tokens["input_ids"].tolist() == ids + generated[tokens["id"]]
        assert tokens["labels"].tolist() == [-100] * len(ids) + generated[tokens["id"]]
