"""A run of an adapter has the adapter's own tokens, template and vocabulary at every stage."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from worlds import WORDS, write_model, write_rows

from influence_fast.cli import main
from influence_fast.config import RunConfig, load_config
from influence_fast.data.examples import load_examples, tokenize
from influence_fast.data.fingerprints import dataset_fingerprint, tokenizer_hash
from influence_fast.errors import ModelError
from influence_fast.run import dry_run
from influence_fast.run.pipeline import Pipeline
from influence_fast.store.reader import open_store
from influence_fast.training.models import load_model, load_tokenizer

TEMPLATE = "{% for m in messages %}{{ '# ' + m['content'] + ' <eos> ' }}{% endfor %}"
MORE = [*WORDS, "Sum:", "more"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, and an adapter with two more words, whose template opens with a word of its own."""
    folder = tmp_path_factory.mktemp("world")
    write_model(folder / "model")
    write_model(folder / "more", words=MORE)
    tokenizer = load_tokenizer(folder / "more")
    tokenizer.chat_template = TEMPLATE
    model: Any = load_model(folder / "model", device="cpu")
    model.resize_token_embeddings(len(MORE))
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    tuned.save_pretrained(folder / "adapter")
    tokenizer.save_pretrained(folder / "adapter")
    for name, n in (("pool", 8), ("validation", 4), ("test", 2)):
        write_rows(folder / f"{name}.jsonl", n, seed=n)
    return folder


def config_of(world: Path, output: str, **model: str) -> RunConfig:
    settings = {
        "output": str(world / output),
        "model": {"path": "model", "adapter": "adapter"} | model,
        "data": {"pool": "pool.jsonl", "validation": "validation.jsonl", "test": "test.jsonl"},
        "training": {"max_steps": 2, "batch_size": 4},
        "lora": {"r": 2},
        "gradients": {"dim": 4},
        "influence": {"preconditioner": "cosine", "queries": "reference"},
        "pruning": {"strategies": ["random"], "fractions": [0.25]},
        "evaluation": {"max_new_tokens": 4},
    }
    path = world / f"{output}.yaml"
    path.write_text(yaml.safe_dump(settings))
    return load_config(path)


def test_a_run_goes_on_the_adapters_tokens(world: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = config_of(world, "run")
    pipeline = Pipeline(config, progress=False)
    own = load_tokenizer(world / "adapter")
    assert tokenizer_hash(pipeline.tokenizer) == tokenizer_hash(pipeline.target_tokenizer) == tokenizer_hash(own)
    caplog.clear()
    pipeline.run()
    assert not any("more than LoRA factors" in record.getMessage() for record in caplog.records)
    expected = tokenize(load_examples(world / "pool.jsonl"), own).examples
    assert open_store(world / "run" / "store").identity.dataset_fingerprint == dataset_fingerprint(expected)
    grid = world / "run" / "adapters" / "full-seed0"  # the grid's own adapters are loaded like any other
    assert tokenizer_hash(load_tokenizer(world / "model", adapter=grid)) == tokenizer_hash(own)
    assert load_model(world / "model", adapter=grid, device="cpu").get_input_embeddings().weight.shape[0] == len(MORE)


def test_the_dry_run_counts_the_adapters_tokens(world: Path) -> None:
    lengths = {}
    for name, adapter in (("own", "adapter"), ("bare", "bare")):
        if adapter == "bare":
            shutil.copytree(world / "adapter", world / "bare", dirs_exist_ok=True)
            for file in (*(world / "bare").glob("tokenizer*"), *(world / "bare").glob("*.jinja")):
                file.unlink()
        lengths[name] = dry_run.plan(config_of(world, f"dry-{name}", adapter=adapter)).longest
    assert lengths["own"] != lengths["bare"]


def test_a_named_tokenizer_is_used_and_its_path_is_beside_the_file(world: Path) -> None:
    config = config_of(world, "named", tokenizer="model")
    assert config.model.tokenizer == str(world / "model")
    found = Pipeline(config, progress=False).tokenizer
    assert tokenizer_hash(found) == tokenizer_hash(load_tokenizer(world / "model"))


def test_an_adapters_tokens_without_embeddings_stop_a_run(world: Path) -> None:
    shutil.copytree(world / "adapter", world / "unsaved", dirs_exist_ok=True)
    plain = get_peft_model(load_model(world / "model", device="cpu"), LoraConfig(r=2, target_modules=["q_proj"]))
    plain.save_pretrained(world / "unsaved")
    with pytest.raises(
        ModelError, match=r"token 'more' with id .* stores none either: .*--tokenizer, model\.tokenizer"
    ):
        Pipeline(config_of(world, "stopped", adapter="unsaved"), progress=False)


@pytest.mark.parametrize("verb", ["build", "score", "eval", "plan"])
def test_verbs_take_the_adapters_tokenizer_or_the_named_one(
    world: Path, tmp_path: Path, verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from influence_fast.training import tokenizers

    opened: list[str] = []
    unwrapped = tokenizers._open

    def recorded(source: str, *args: Any, **more: Any) -> Any:
        opened.append(str(source))
        return unwrapped(source, *args, **more)

    monkeypatch.setattr(tokenizers, "_open", recorded)
    more = {
        "score": ["--validation", world / "validation.jsonl", "--queries", "reference", "--output", tmp_path / "s.csv"],
        "build": ["--output", tmp_path / "store", "--dim", "4"],
        "eval": ["--output", tmp_path / "t.jsonl", "--max-new-tokens", "2"],
        "plan": ["--seconds", "100"],
    }[verb]
    given = [verb, "--model", world / "model", "--adapter", world / "adapter", "--data", world / "pool.jsonl"]
    given += ["--device", "cpu", *more]
    assert main([*map(str, given), "--tokenizer", str(world / "more")]) == 0
    assert opened == [str(world / "more")]
    opened.clear()
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()
    assert main(list(map(str, given))) == 0
    assert str(world / "adapter") in opened
