"""The tokenizer that is loaded is the one that the model, or its adapter, was trained with."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from influence_fast.data.fingerprints import tokenizer_hash
from influence_fast.errors import ModelError, warn_once
from influence_fast.training.fine_tuning import finetune
from influence_fast.training.settings import LoraSettings, TrainConfig
from influence_fast.training.tokenizers import load_tokenizer

Factory = Callable[..., Any]
OTHER = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}<eos>{% endfor %}"


@pytest.fixture
def base(tmp_path: Path, tiny_model: Factory, tiny_tokenizer: Factory, chatml: str) -> Path:
    tiny_model().save_pretrained(tmp_path / "base")
    tiny_tokenizer(chat_template=chatml).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def adapter(tmp_path: Path, tiny_lora: Factory) -> Path:
    tiny_lora().save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    warn_once.cache_clear()
    caplog.set_level(logging.WARNING, logger="influence_fast")
    return lambda: [record.getMessage() for record in caplog.records if record.name.startswith("influence_fast")]


def test_an_adapter_without_tokenizer_has_its_bases(base: Path, adapter: Path, said: Any) -> None:
    assert tokenizer_hash(load_tokenizer(base, adapter=adapter)) == tokenizer_hash(load_tokenizer(base))
    assert said() == []


def test_an_adapters_equal_tokenizer_is_not_spoken_of(base: Path, adapter: Path, said: Any) -> None:
    load_tokenizer(base).save_pretrained(adapter)
    assert tokenizer_hash(load_tokenizer(base, adapter=adapter)) == tokenizer_hash(load_tokenizer(base))
    assert said() == []


def test_an_adapters_own_tokenizer_is_used_and_said_once(
    base: Path, adapter: Path, said: Any, tiny_tokenizer: Factory
) -> None:
    own = tiny_tokenizer(chat_template=OTHER, bos=True)
    own.save_pretrained(adapter)
    for _ in range(2):
        found = load_tokenizer(base, adapter=adapter)
        assert tokenizer_hash(found) == tokenizer_hash(own)
    (line,) = said()
    assert str(adapter) in line
    assert str(base) in line
    assert "another special tokens, chat template" in line


@pytest.mark.parametrize("file", ["chat_template.jinja", "chat_template.json", "tokenizer_config.json"])
def test_an_adapters_template_alone_goes_on_the_bases_tokenizer(
    base: Path, adapter: Path, said: Any, file: str
) -> None:
    content = OTHER if file.endswith("jinja") else json.dumps({"chat_template": OTHER})
    (adapter / file).write_text(content)
    found = load_tokenizer(base, adapter=adapter)
    assert found.chat_template == OTHER
    assert found.get_vocab() == load_tokenizer(base).get_vocab()
    (line,) = said()
    assert "its own chat template" in line


def test_a_template_that_is_the_bases_is_not_spoken_of(base: Path, adapter: Path, said: Any, chatml: str) -> None:
    (adapter / "chat_template.jinja").write_text(chatml)
    assert load_tokenizer(base, adapter=adapter).chat_template == chatml
    assert said() == []


def test_named_templates_are_kept_by_name(base: Path, adapter: Path) -> None:
    named = [{"name": "default", "template": OTHER}, {"name": "tools", "template": "t"}]
    (adapter / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert load_tokenizer(base, adapter=adapter).chat_template == {"default": OTHER, "tools": "t"}


def test_a_config_file_that_is_no_json_is_named(base: Path, adapter: Path) -> None:
    (adapter / "tokenizer_config.json").write_text("{")
    with pytest.raises(ModelError, match=r"tokenizer_config\.json is not JSON"):
        load_tokenizer(base, adapter=adapter)


def test_a_tokenizer_that_is_named_is_used_before_both(
    base: Path, adapter: Path, tmp_path: Path, said: Any, tiny_tokenizer: Factory
) -> None:
    tiny_tokenizer(chat_template=OTHER).save_pretrained(adapter)
    tiny_tokenizer(chat_template="third").save_pretrained(tmp_path / "third")
    assert load_tokenizer(base, adapter=adapter, tokenizer=tmp_path / "third").chat_template == "third"
    assert said() == []


def test_an_adapter_that_is_not_there_is_named(base: Path) -> None:
    with pytest.raises(ModelError, match="no adapter at /nowhere/at/all"):
        load_tokenizer(base, adapter="/nowhere/at/all")
    with pytest.raises(ModelError, match=r"someone/none.*hub"):
        load_tokenizer(base, adapter="someone/none")


def test_an_adapters_tokenizer_comes_from_the_hub(
    base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch, tiny_tokenizer: Factory
) -> None:
    import fnmatch

    import huggingface_hub

    tiny_tokenizer(chat_template=OTHER).save_pretrained(adapter)
    asked: list[str] = []

    def download(repo: str, allow_patterns: list[str]) -> str:
        asked.append(repo)
        wanted = [p.name for p in adapter.iterdir() if any(fnmatch.fnmatch(p.name, a) for a in allow_patterns)]
        assert {"tokenizer.json", "tokenizer_config.json"} <= set(wanted)
        assert "adapter_model.safetensors" not in wanted
        return str(adapter)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert load_tokenizer(base, adapter="someone/adapter").chat_template == OTHER
    assert asked == ["someone/adapter"]


def test_the_bases_own_class_reads_an_adapters_files(base: Path, adapter: Path, said: Any) -> None:
    """AutoTokenizer takes a class by the model's type, which an adapter's folder does not say."""
    for folder in (base, adapter):
        load_tokenizer(base).save_pretrained(folder)
    for folder in (base, adapter):
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": "LlamaTokenizer"}))
    assert tokenizer_hash(load_tokenizer(base, adapter=adapter)) == tokenizer_hash(load_tokenizer(base))
    assert said() == []


def test_more_tokens_than_embeddings_say_how_to_save_the_adapter(
    base: Path, adapter: Path, tiny_tokenizer: Factory, tiny_model: Factory
) -> None:
    own = tiny_tokenizer()
    own.add_tokens([f"<extra{i}>" for i in range(100)])
    own.save_pretrained(adapter)
    with pytest.raises(ModelError, match=r"embeddings for 320; the adapter .* stores none either: .*save_embedding"):
        load_tokenizer(base, adapter=adapter, model=tiny_model())


@pytest.mark.parametrize("unk", [True, False])
def test_a_template_stands_for_a_missing_eos(tmp_path: Path, tiny_tokenizer: Factory, chatml: str, unk: bool) -> None:
    tokenizer = tiny_tokenizer(eos=None, chat_template=chatml)
    tokenizer.pad_token = None
    if unk:
        tokenizer.unk_token = "<bos>"
    tokenizer.save_pretrained(tmp_path)
    found = load_tokenizer(tmp_path)
    assert found.eos_token is None
    assert found.pad_token == ("<bos>" if unk else "<|im_start|>")


def test_without_any_special_token_padding_stays_unset(tmp_path: Path, chatml: str) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    plain = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1})))
    plain.chat_template = chatml
    plain.save_pretrained(tmp_path)
    found = load_tokenizer(tmp_path)
    assert (found.pad_token, found.eos_token) == (None, None)


def test_a_fine_tuning_keeps_its_tokenizer_beside_the_adapter(
    base: Path, tmp_path: Path, said: Any, tiny_model: Factory, tiny_tokenizer: Factory
) -> None:
    own = tiny_tokenizer(chat_template=OTHER)
    ids = own("Ada has 12 apples")["input_ids"]
    examples = [{"id": "a", "input_ids": ids, "labels": ids}]
    config = TrainConfig(max_steps=1, precision="fp32", save_checkpoints=1)
    lora = LoraSettings(r=2)
    result = finetune(tiny_model(), own, examples, tmp_path / "out", config=config, lora=lora, progress=False)
    for folder in (result.path, *result.checkpoints):
        assert load_tokenizer(base, adapter=folder).chat_template == OTHER
    assert len(said()) == 2


def test_the_command_line_uses_the_adapters_tokenizer_or_the_named_one(
    base: Path, adapter: Path, tmp_path: Path, tiny_tokenizer: Factory
) -> None:
    from influence_fast.cli import options

    tiny_tokenizer(chat_template=OTHER).save_pretrained(adapter)
    tiny_tokenizer(chat_template="third").save_pretrained(tmp_path / "third")
    parser = argparse.ArgumentParser()
    options.add_model(parser, adapter=True)
    given = ["--model", str(base), "--adapter", str(adapter), "--device", "cpu"]
    assert options.open_model(parser.parse_args(given))[1].chat_template == OTHER
    given += ["--tokenizer", str(tmp_path / "third")]
    assert options.open_model(parser.parse_args(given))[1].chat_template == "third"
