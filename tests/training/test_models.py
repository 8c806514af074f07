"""Loading: what comes back is what was saved, and each misfit is one line that names it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from influence_fast.errors import ConfigError, InfluenceFastError, ModelError
from influence_fast.training.models import adapter_warnings, check_tokenizer, load_model, load_tokenizer

Factory = Callable[..., Any]
IDS = torch.tensor([[5, 9, 100, 42, 7, 300]])


@pytest.fixture(params=["qwen2", "qwen3", "llama"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def model_folder(tmp_path: Path, tiny_model: Factory) -> Path:
    tiny_model().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def adapter_folder(tmp_path: Path, tiny_lora: Factory) -> Path:
    tiny_lora().save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def message(error: pytest.ExceptionInfo[InfluenceFastError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


def test_a_saved_model_comes_back(tmp_path: Path, tiny_model: Factory, kind: str) -> None:
    saved = tiny_model(kind)
    saved.save_pretrained(tmp_path)
    loaded = load_model(tmp_path, device="cpu")
    assert not loaded.training
    assert next(loaded.parameters()).dtype == torch.float32
    torch.testing.assert_close(loaded(IDS).logits, saved(IDS).logits, rtol=0, atol=0)


def test_bfloat16_and_attention_are_taken_over(model_folder: Path) -> None:
    loaded = load_model(model_folder, dtype="bfloat16", attn_implementation="eager", device="cpu")
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert loaded.config._attn_implementation == "eager"


def test_a_saved_adapter_comes_back(tmp_path: Path, tiny_model: Factory, tiny_lora: Factory, kind: str) -> None:
    tiny_model(kind).save_pretrained(tmp_path / "model")
    saved = tiny_lora(kind)
    saved.save_pretrained(tmp_path / "adapter")
    loaded = load_model(tmp_path / "model", adapter=tmp_path / "adapter", device="cpu")
    assert isinstance(loaded, PeftModel)
    torch.testing.assert_close(loaded(IDS).logits, saved(IDS).logits, rtol=0, atol=0)
    assert not torch.allclose(loaded(IDS).logits, tiny_model(kind)(IDS).logits)  # the adapter is at work
    trainable = {name for name, p in loaded.named_parameters() if p.requires_grad}
    assert trainable == {name for name, _ in loaded.named_parameters() if ".lora_" in name}


@pytest.mark.parametrize(
    ("source", "parts"),
    [
        ("./nowhere", ["./nowhere", "check the path"]),
        ("/nowhere/at/all", ["/nowhere/at/all", "check the path"]),
        ("someone/no-such-model", ["someone/no-such-model", "hub", "network"]),
    ],
)
def test_a_model_that_is_not_there(source: str, parts: list[str]) -> None:
    for load in (load_model, load_tokenizer):
        with pytest.raises(ModelError) as error:
            load(source)
        assert all(part in message(error) for part in parts)


def test_an_adapter_that_is_not_there(model_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no adapter at"):
        load_model(model_folder, adapter=tmp_path / "none")
    with pytest.raises(ModelError, match=r"someone/none.*hub"):
        load_model(model_folder, adapter="someone/none")
    with pytest.raises(ModelError, match="no adapter folder"):
        load_model(model_folder, adapter=model_folder)


def adapted(model_folder: Path, **more: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(load_model(model_folder), LoraConfig(r=2, target_modules=["q_proj"], **more))


def test_a_folder_of_several_adapters_names_them(model_folder: Path, tmp_path: Path) -> None:
    model: Any = adapted(model_folder)
    for name in ("math", "code"):
        model.add_adapter(name, model.peft_config["default"])
    model.save_pretrained(tmp_path, selected_adapters=["math", "code"])
    with pytest.raises(ModelError, match=rf"several adapters: give one of {tmp_path}/code, {tmp_path}/math"):
        load_model(model_folder, adapter=tmp_path)
    load_model(model_folder, adapter=tmp_path / "math")


@pytest.mark.parametrize("more", [{"modules_to_save": ["lm_head"]}, {"bias": "all"}, {}], ids=str)
def test_what_an_adapter_trains_beside_its_factors_is_told_from_its_folder(
    model_folder: Path, tmp_path: Path, more: dict[str, Any]
) -> None:
    model: Any = adapted(model_folder, **more)
    model.save_pretrained(tmp_path)
    said = adapter_warnings(str(tmp_path))
    named = {"modules_to_save": "(lm_head)", "bias": "(bias='all')"}
    assert [named[key] in said[0] for key in more] == [True] * len(said)
    assert adapter_warnings(str(model_folder)) == []  # of every weight


def test_an_adapter_folder_is_no_model(adapter_folder: Path) -> None:
    with pytest.raises(ModelError, match="holds a peft adapter: give its base model"):
        load_model(adapter_folder)


def test_pickled_weights_are_refused(model_folder: Path, adapter_folder: Path) -> None:
    weights = adapter_folder / "adapter_model.safetensors"
    torch.save(load_file(weights), adapter_folder / "adapter_model.bin")
    weights.unlink()
    with pytest.raises(ModelError, match=r"no adapter_model\.safetensors"):
        load_model(model_folder, adapter=adapter_folder)
    torch.save(load_file(model_folder / "model.safetensors"), model_folder / "pytorch_model.bin")
    (model_folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="no safetensors weights; convert") as error:
        load_model(model_folder)
    message(error)


def test_weights_that_are_missing_are_named(model_folder: Path) -> None:
    path = model_folder / "model.safetensors"
    weights = load_file(path)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.up_proj\.weight") as error:
        load_model(model_folder)
    message(error)


def test_damaged_weights(model_folder: Path, adapter_folder: Path) -> None:
    (adapter_folder / "adapter_model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(ModelError, match="damaged") as error:
        load_model(model_folder, adapter=adapter_folder)
    message(error)
    (model_folder / "model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(ModelError) as error:
        load_model(model_folder)
    assert str(model_folder) in message(error)


def test_adapter_of_another_width(tmp_path: Path, tiny_model: Factory, adapter_folder: Path) -> None:
    tiny_model(intermediate_size=64).save_pretrained(tmp_path / "wide")
    with pytest.raises(ModelError) as error:
        load_model(tmp_path / "wide", adapter=adapter_folder)
    text = message(error)
    # sorted by name, down_proj is the first that differs: 64 inputs, the adapter was made for 56
    assert "model.layers.0.mlp.down_proj has weight (32, 64)" in text
    assert "lora_A has shape (4, 56)" in text


def test_adapter_whose_outputs_differ(tmp_path: Path, tiny_model: Factory, adapter_folder: Path) -> None:
    tiny_model(num_key_value_heads=4).save_pretrained(tmp_path / "mha")
    with pytest.raises(ModelError) as error:
        load_model(tmp_path / "mha", adapter=adapter_folder)
    assert "self_attn.k_proj has weight (32, 32), lora_B has shape (16, 4)" in message(error)


def test_adapter_of_a_deeper_model(tmp_path: Path, tiny_lora: Factory, model_folder: Path) -> None:
    tiny_lora(num_hidden_layers=3).save_pretrained(tmp_path / "deep")
    with pytest.raises(ModelError, match=r"no module 'model\.layers\.2\.mlp\.down_proj'") as error:
        load_model(model_folder, adapter=tmp_path / "deep")
    message(error)


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
def test_adapter_of_a_shallower_model(tmp_path: Path, tiny_model: Factory) -> None:
    """peft itself would leave the third layer's factors as initialised."""
    shallow = get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj", "v_proj"]))
    shallow.save_pretrained(tmp_path / "adapter")
    tiny_model(num_hidden_layers=3).save_pretrained(tmp_path / "deep")
    with pytest.raises(ModelError, match=r"no lora_A for the module 'model\.layers\.2\.self_attn\.q_proj'"):
        load_model(tmp_path / "deep", adapter=tmp_path / "adapter")


def test_adapter_that_is_not_lora(tmp_path: Path, tiny_model: Factory, model_folder: Path) -> None:
    config = IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    get_peft_model(tiny_model(), config).save_pretrained(tmp_path / "ia3")
    with pytest.raises(ModelError, match=r"ia3 is IA3 .*only gradients of LoRA adapters"):
        load_model(model_folder, adapter=tmp_path / "ia3")


def test_an_adapter_of_nan_is_refused(model_folder: Path, adapter_folder: Path) -> None:
    path = adapter_folder / "adapter_model.safetensors"
    weights = load_file(path)
    name = sorted(weights)[3]
    weights[name][0, 0] = torch.nan
    save_file(weights, path)
    with pytest.raises(ModelError, match=r"holds NaN or infinite numbers in .*lora_"):
        load_model(model_folder, adapter=adapter_folder)


def test_dtypes_are_named_or_given(model_folder: Path) -> None:
    for dtype in ("bfloat16", torch.bfloat16):
        assert next(load_model(model_folder, dtype=dtype).parameters()).dtype == torch.bfloat16


def test_settings_that_do_not_exist(model_folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"'float16'.*'bfloat16'"):
        load_model(model_folder, dtype="float16")
    with pytest.raises(ConfigError, match="'gpu'"):
        load_model(model_folder, device="gpu")
    with pytest.raises(ConfigError, match="'cuda:99' is not there"):
        load_model(model_folder, device="cuda:99")


def test_a_saved_tokenizer_comes_back(tmp_path: Path, tiny_tokenizer: Factory, chatml: str) -> None:
    saved = tiny_tokenizer(chat_template=chatml)
    saved.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    text = "Ada has 12 apples — 30 more?<|im_end|>"
    assert loaded(text)["input_ids"] == saved(text)["input_ids"]
    assert loaded.chat_template == saved.chat_template


def test_padding_falls_back_to_eos(tmp_path: Path, tiny_tokenizer: Factory) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).pad_token_id == tokenizer.eos_token_id


def test_a_tokenizer_without_eos(tmp_path: Path, tiny_tokenizer: Factory) -> None:
    tiny_tokenizer(eos=None).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="neither an EOS token nor a chat template") as error:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in message(error)


def test_a_tokenizer_of_another_model(tmp_path: Path, tiny_tokenizer: Factory, tiny_model: Factory) -> None:
    tokenizer = tiny_tokenizer()
    highest = max(tokenizer.get_vocab().values())
    check_tokenizer(tiny_model(vocab_size=highest + 1), tokenizer)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=rf"id {highest}, the model has embeddings for {highest}") as error:
        load_tokenizer(tmp_path, model=tiny_model(vocab_size=highest))
    message(error)


def test_unwritten_memory_shows() -> None:
    """The fixture of conftest.py that every other test relies on."""
    assert torch.empty(1000).isnan().all()
    assert torch.empty_like(torch.ones(7, dtype=torch.bfloat16)).isnan().all()
