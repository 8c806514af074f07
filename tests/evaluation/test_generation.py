"""Generation: batching changes nothing, and vLLM is asked as it documents."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import sys
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import Qwen2ForCausalLM

from influence_fast.data.examples import Example, render_prompt
from influence_fast.errors import ConfigError, ModelError
from influence_fast.evaluation import generation
from influence_fast.evaluation.evaluate import EvalConfig, evaluate
from influence_fast.evaluation.generation import Answer, ModelFiles, choose_engine, generate


def test_batched_greedy_answers_are_those_of_one_prompt_at_a_time(
    model: Any, tokenizer: Any, examples: list[Example]
) -> None:
    prompts = [render_prompt(example, tokenizer) for example in examples]
    assert len({len(tokenizer(p)["input_ids"]) for p in prompts}) > 2  # ragged
    for size in (3, 7):
        found = generate(model, tokenizer, prompts, config=EvalConfig(max_new_tokens=12, batch_size=size))
        for prompt, ((text, n_tokens, reason, token_ids),) in zip(prompts, found, strict=True):
            ids = torch.tensor([tokenizer(prompt, add_special_tokens=False)["input_ids"]])
            new: list[int] = []
            for _ in range(12):  # greedy by hand, no cache
                token = int(model(ids).logits[0, -1].argmax())
                if token == tokenizer.eos_token_id:
                    break
                new.append(token)
                ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
            assert (n_tokens, reason) == (len(new), "length" if len(new) == 12 else "stop")
            assert text == tokenizer.decode(new, skip_special_tokens=True)
            assert list(token_ids) == new + [tokenizer.eos_token_id] * (reason == "stop")


@dataclass
class Completion:
    """vLLM's CompletionOutput, as far as it is read: the ending token is among `token_ids`."""

    token_ids: list[int]
    finish_reason: str


class FakeVllm:
    """A module of vLLM's documented names that records how they are called."""

    def __init__(self, tokenizer: Any, texts: list[str]) -> None:
        self.calls: dict[str, Any] = {}
        outer = self

        class LLM:
            def __init__(self, **options: Any) -> None:
                outer.calls["llm"] = options

            def generate(self, prompts: Any, sampling_params: Any, **options: Any) -> list[Any]:
                outer.calls["generate"] = (prompts, sampling_params, options)
                outputs = []
                for params in sampling_params:
                    made = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
                    ended = [Completion([*ids, tokenizer.eos_token_id], "stop") for ids in made[:-1]]
                    cut = Completion(made[-1][: params["max_tokens"]], "length")
                    outputs.append(types.SimpleNamespace(outputs=[*ended, cut]))
                return outputs

        def request(name: str, number: int, path: str) -> tuple[str, int, str]:
            return name, number, path

        self.modules = {name: types.ModuleType(name) for name in ("vllm", "vllm.lora", "vllm.lora.request")}
        self.modules["vllm"].__dict__.update(LLM=LLM, SamplingParams=dict)
        self.modules["vllm.lora.request"].__dict__["LoRARequest"] = request
        for name, module in self.modules.items():
            module.__spec__ = importlib.machinery.ModuleSpec(name, None)

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name, module in self.modules.items():
            monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture
def files(model: Qwen2ForCausalLM, tmp_path: Path) -> ModelFiles:
    model.config.save_pretrained(tmp_path / "base")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"r": 12, "rank_pattern": {"q_proj": 20}}))
    return ModelFiles(str(tmp_path / "base"), str(adapter), "bfloat16")


def test_vllm_is_asked_as_it_documents(
    tokenizer: Any, examples: list[Example], files: ModelFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeVllm(tokenizer, [examples[0].completion, "How many books " * 20])
    fake.install(monkeypatch)
    prompts = [render_prompt(example, tokenizer) for example in examples[:3]]
    config = EvalConfig(max_new_tokens=40, temperature=0.6, top_p=0.95, samples=2, seed=3, engine="vllm")
    found = generate(files, tokenizer, prompts, config=config)
    assert fake.calls["llm"] == {
        "model": files.path, "dtype": "bfloat16", "seed": 3, "trust_remote_code": False,
        "enable_lora": True, "max_lora_rank": 32, "generation_config": "vllm",
    }  # fmt: skip
    asked, params, options = fake.calls["generate"]
    assert [row["prompt_token_ids"] for row in asked] == [
        tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts
    ]
    assert options == {"use_tqdm": False, "lora_request": ("adapter", 1, files.adapter)}
    wanted = {"n": 2, "temperature": 0.6, "top_p": 0.95, "top_k": -1, "max_tokens": 40, "detokenize": False}
    wanted |= {"repetition_penalty": 1.0, "min_tokens": 0, "min_p": 0.0, "presence_penalty": 0.0}
    for one in params:
        assert wanted.items() <= one.items()
        assert one["stop_token_ids"] == [tokenizer.eos_token_id]
    seeds = [one["seed"] for one in params]
    assert seeds == [3 * 1_000_003, 3 * 1_000_003 + 2, 3 * 1_000_003 + 4]  # a request's samples take seed, seed + 1
    tokens = tokenizer(examples[0].completion, add_special_tokens=False)["input_ids"]
    for samples in found:
        assert samples[0] == Answer(examples[0].completion, len(tokens), "stop", (*tokens, tokenizer.eos_token_id))
        assert samples[1][1:3] == (40, "length")


@pytest.mark.parametrize("name", ["model.embed_tokens", "lm_head", "model.embed_tokens.base_layer"])
def test_vllm_is_given_no_adapter_of_another_vocabulary(
    tokenizer: Any, model: Any, files: ModelFiles, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    fake = FakeVllm(tokenizer, ["a"])
    fake.install(monkeypatch)
    config = EvalConfig(max_new_tokens=4, engine="vllm")
    path = Path(files.adapter or "") / "adapter_model.safetensors"
    rows = model.config.vocab_size
    factors = {"base_model.model.model.embed_tokens.lora_embedding_A": torch.zeros(2, 7)}
    factors["base_model.model.lm_head.lora_B.weight"] = torch.zeros(9, 2)
    save_file(factors | {f"base_model.model.{name}.weight": torch.zeros(rows, 2)}, path)
    generate(files, tokenizer, ["a"], config=config)
    fake.calls.clear()
    save_file(factors | {f"base_model.model.{name}.weight": torch.zeros(rows + 3, 2)}, path)
    with pytest.raises(ModelError, match=rf"stores {rows + 3} embeddings .* base {rows}; vLLM resizes no") as error:
        generate(files, tokenizer, ["a"], config=config)
    assert "\n" not in str(error.value)
    assert not fake.calls
    path.write_bytes(b"x")
    with pytest.raises(ModelError, match="is damaged"):
        generate(files, tokenizer, ["a"], config=config)


def test_an_evaluation_by_vllm_is_graded_like_any_other(
    tokenizer: Any, examples: list[Example], files: ModelFiles, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    FakeVllm(tokenizer, [examples[0].completion, "How many"]).install(monkeypatch)
    config = EvalConfig(max_new_tokens=40, temperature=1.0, samples=2, engine="vllm")
    bare = ModelFiles(files.path)
    result = evaluate(bare, tokenizer, examples[:1], config=config, transcripts=tmp_path / "t.jsonl")
    assert [item.correct for item in result.items] == [True, False]
    assert (result.engine, result.truncated) == ("vllm", 1)
    assert len((tmp_path / "t.jsonl").read_text().splitlines()) == 2


def test_the_engine_is_never_another_than_asked_for(
    model: Any, tokenizer: Any, files: ModelFiles, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if importlib.util.find_spec("vllm") is not None:
        pytest.skip("vLLM is installed, and this is about its absence")
    assert choose_engine("auto") == choose_engine("transformers") == "transformers"
    with pytest.raises(ConfigError, match="'vllm', which is not installed"):
        choose_engine("vllm")
    with pytest.raises(ConfigError, match="not installed"):
        generate(files, tokenizer, ["a"], config=EvalConfig(max_new_tokens=4))
    with pytest.raises(ConfigError, match="give ModelFiles, not a module"):
        generate(model, tokenizer, ["a"], config=EvalConfig(max_new_tokens=4, engine="vllm"))
    with pytest.raises(ConfigError, match="load it"):
        generate(files, tokenizer, ["a"], config=EvalConfig(max_new_tokens=4, engine="transformers"))

    FakeVllm(tokenizer, ["a", "b"]).install(monkeypatch)
    assert choose_engine("vllm") == "vllm"
    for gpu, engine in ((True, "vllm"), (False, "transformers")):
        monkeypatch.setattr(generation.torch.cuda, "is_available", lambda gpu=gpu: gpu)
        assert choose_engine("auto") == engine
        assert choose_engine("transformers") == "transformers"

    with pytest.raises(ModelError, match="context of 128"):
        generate(files, tokenizer, ["a"], config=EvalConfig(max_new_tokens=128, engine="vllm"))
    (Path(files.adapter or "") / "adapter_config.json").write_text(json.dumps({"r": 513}))
    with pytest.raises(ModelError, match="rank 513; vLLM takes at most 512"):
        generate(files, tokenizer, ["a"], config=EvalConfig(max_new_tokens=4, engine="vllm"))
    absent = ModelFiles(files.path, str(tmp_path / "absent"))
    with pytest.raises(ModelError, match="adapter as a local folder"):
        generate(absent, tokenizer, ["a"], config=EvalConfig(max_new_tokens=4, engine="vllm"))


def test_a_run_by_vllm_gives_it_files_and_says_at_once_where_it_is_missing(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from influence_fast.config import DataConfig, ModelConfig, RunConfig, Source
    from influence_fast.run import pipeline
    from influence_fast.run.run_models import answering_model

    base = ModelConfig("absent/model", dtype="bfloat16", trust_remote_code=True)
    with answering_model(model, tmp_path, base, "vllm") as answering:
        assert answering == ModelFiles("absent/model", str(tmp_path), "bfloat16", True)
    with answering_model(model, None, base, "auto") as answering:
        assert answering is model
    data = DataConfig(Source("absent.jsonl"), holdout_validation=1, holdout_test=1)
    config = RunConfig(str(tmp_path / "run"), base, data, evaluation=EvalConfig(engine="vllm"))
    assert config.pruning.pass_rate_config(config.evaluation).engine == "auto"
    monkeypatch.setattr(generation.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="'vllm', which is not installed"):
        pipeline.run(config, progress=False)
    assert not (tmp_path / "run").exists()
