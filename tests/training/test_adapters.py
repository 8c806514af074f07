"""What an adapter stores is at work on the base that it was trained on, or it is refused by name."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from influence_fast.errors import ModelError, warn_once
from influence_fast.gradients.find_lora import find_lora_linears
from influence_fast.training.adapter_bases import adapter_warnings
from influence_fast.training.fine_tuning import finetuned, load_finetuned
from influence_fast.training.models import load_model
from influence_fast.training.vocabulary import fit_vocabulary

Factory = Callable[..., Any]
IDS = torch.tensor([[5, 9, 100, 42, 7, 300]])


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    warn_once.cache_clear()
    caplog.set_level(logging.WARNING, logger="influence_fast")
    return lambda: [record.getMessage() for record in caplog.records if record.name.startswith("influence_fast")]


@pytest.fixture(params=["qwen2", "llama"], ids=["tied", "untied"])
def base(request: pytest.FixtureRequest, tmp_path: Path, tiny_model: Factory) -> Path:
    tiny_model(request.param).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def adapted(base: Path, rows: int | None = None, **settings: Any) -> Any:
    """A peft model over `base`, with no factor at zero, resized to `rows` embeddings first."""
    model: Any = load_model(base, device="cpu")
    if rows is not None:
        model.resize_token_embeddings(rows)
    settings = {"r": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"} | settings
    peft = get_peft_model(model, LoraConfig(**settings))
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return peft.eval()


def edit(adapter: Path, **changes: Any) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# ---- stored and not loaded ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "changes", "module"),
    [
        ("target_modules", {"target_modules": ["q_proj"]}, "model.layers.0.self_attn.v_proj"),
        ("target_modules", {"target_modules": r".*layers\.1\..*(q|v)_proj"}, "model.layers.0.self_attn.q_proj"),
        ("target_modules", {"target_modules": ["nothing_of_this"]}, "model.layers.0.self_attn.q_proj"),
        ("layers_to_transform", {"layers_to_transform": [0]}, "model.layers.1.self_attn.q_proj"),
        ("exclude_modules", {"exclude_modules": ["v_proj"]}, "model.layers.0.self_attn.v_proj"),
        (
            "layers_pattern",
            {"layers_pattern": ["blocks"], "layers_to_transform": [0, 1]},
            "model.layers.0.self_attn.q_proj",
        ),
        ("r, rank_pattern", {"rank_pattern": {"v_proj": 1}}, "model.layers.0.self_attn.v_proj"),
        ("r, rank_pattern", {"r": 3}, "model.layers.0.self_attn.q_proj"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
@pytest.mark.parametrize("base", ["qwen2"], indirect=True)
def test_stored_factors_that_settings_leave_out_are_refused(
    base: Path, tmp_path: Path, setting: str, changes: dict[str, Any], module: str
) -> None:
    adapted(base).save_pretrained(tmp_path / "adapter")
    edit(tmp_path / "adapter", **changes)
    with pytest.raises(ModelError) as error:
        load_model(base, adapter=tmp_path / "adapter", device="cpu")
    text = str(error.value)
    assert "\n" not in text
    assert module in text
    assert setting in text


@pytest.mark.parametrize(
    ("settings", "changes", "module"),
    [
        ({"modules_to_save": ["lm_head"]}, {"modules_to_save": None}, "lm_head"),
        ({"modules_to_save": ["lm_head"]}, {"modules_to_save": ["embed_tokens"]}, "lm_head"),
        ({"modules_to_save": ["embed_tokens"]}, {"modules_to_save": None}, "model.embed_tokens"),
        ({"modules_to_save": ["model.norm"]}, {"modules_to_save": None}, "model.norm"),
        ({"modules_to_save": ["mlp"]}, {"modules_to_save": ["norm"]}, "model.layers.0.mlp.down_proj"),
        ({"bias": "all"}, {"bias": "none"}, "model.layers.0.self_attn.k_proj.bias"),
        ({"bias": "lora_only"}, {"bias": "none"}, "model.layers.0.self_attn.q_proj.bias"),
    ],
    ids=str,
)
def test_whole_modules_that_settings_leave_out_are_refused(
    base: Path, tmp_path: Path, settings: dict[str, Any], changes: dict[str, Any], module: str
) -> None:
    saved = adapted(base, **settings)
    if "bias" in settings and not any(name.endswith(".bias") for name, _ in saved.named_parameters()):
        pytest.skip("a model without biases")
    saved.save_pretrained(tmp_path / "adapter")
    load_model(base, adapter=tmp_path / "adapter", device="cpu")
    edit(tmp_path / "adapter", **changes)
    with pytest.raises(ModelError, match=rf"stores numbers of {module}, which .*{next(iter(settings))}.* in its"):
        load_model(base, adapter=tmp_path / "adapter", device="cpu")


@pytest.mark.parametrize("rows", [[[1, 2], [0, 1]], [[0, 2], [0, 2]]], ids=["swapped", "twice"])
@pytest.mark.parametrize("base", ["qwen2"], indirect=True)
def test_layers_are_not_rearranged_by_an_adapter(base: Path, tmp_path: Path, rows: list[list[int]]) -> None:
    adapted(base).save_pretrained(tmp_path / "adapter")
    edit(tmp_path / "adapter", layer_replication=rows)
    with pytest.raises(ModelError, match=r"rearranges the base model's layers \(layer_replication"):
        load_model(base, adapter=tmp_path / "adapter", device="cpu")


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "OLoRA", "corda", "lora_ga", "new"])
@pytest.mark.parametrize("base", ["qwen2"], indirect=True)
def test_factors_taken_out_of_the_base_are_refused(base: Path, tmp_path: Path, start: str) -> None:
    adapted(base).save_pretrained(tmp_path / "adapter")
    edit(tmp_path / "adapter", init_lora_weights=start)
    with pytest.raises(ModelError, match=rf"init_lora_weights '{start}' in its .*conversion") as error:
        load_model(base, adapter=tmp_path / "adapter", device="cpu")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("start", [True, False, "gaussian", "orthogonal", "eva", "mica"])
@pytest.mark.parametrize("base", ["qwen2"], indirect=True)
def test_other_starts_of_factors_leave_the_base_alone(base: Path, tmp_path: Path, start: str | bool) -> None:
    saved = adapted(base)
    saved.save_pretrained(tmp_path / "adapter")
    edit(tmp_path / "adapter", init_lora_weights=start)
    model = load_model(base, device="cpu")
    before = model(IDS).logits
    with finetuned(model, tmp_path / "adapter") as tuned:
        torch.testing.assert_close(tuned(IDS).logits, saved(IDS).logits, rtol=0, atol=1e-6)
    torch.testing.assert_close(model(IDS).logits, before, rtol=0, atol=0)


@pytest.mark.parametrize("base", ["qwen2"], indirect=True)
def test_stored_vectors_of_dora_need_their_setting(base: Path, tmp_path: Path) -> None:
    adapted(base, use_dora=True).save_pretrained(tmp_path / "adapter")
    edit(tmp_path / "adapter", use_dora=False)
    with pytest.raises(ModelError, match="use_dora"):
        load_model(base, adapter=tmp_path / "adapter", device="cpu")


@pytest.mark.parametrize("base", ["qwen2"], indirect=True)
def test_a_tensor_under_an_unknown_name_is_refused(base: Path, tmp_path: Path) -> None:
    adapted(base).save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file(load_file(path) | {"base_model.model.extra.weight": torch.ones(2)}, path)
    with pytest.raises(ModelError, match=r"stores base_model\.model\.extra\.weight, which peft did not load"):
        load_model(base, adapter=tmp_path / "adapter", device="cpu")


@pytest.mark.parametrize("base", ["qwen2"], indirect=True)
def test_values_that_change_on_loading_are_refused(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import peft.peft_model

    adapted(base).save_pretrained(tmp_path / "adapter")
    load = peft.peft_model.load_peft_weights

    def rounded(*args: Any, **more: Any) -> Any:
        return {name: values.to(torch.bfloat16).float() for name, values in load(*args, **more).items()}

    monkeypatch.setattr(peft.peft_model, "load_peft_weights", rounded)
    with pytest.raises(ModelError, match=r"stores other values of .*lora_A.* than peft loaded"):
        load_model(base, adapter=tmp_path / "adapter", device="cpu")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["model.norm", "down_proj"]},
        {"bias": "all"},
        {"bias": "lora_only"},
        {"use_dora": True},
        {"use_rslora": True, "rank_pattern": {"q_proj": 3}},
        {"trainable_token_indices": [5, 9]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"layers_to_transform": [1]},
        {"target_modules": "all-linear", "exclude_modules": ["o_proj"]},
    ],
    ids=str,
)
def test_adapters_as_peft_saves_them_load(base: Path, tmp_path: Path, settings: dict[str, Any], dtype: str) -> None:
    saved = adapted(base, **settings)
    saved.save_pretrained(tmp_path / "adapter")
    loaded = load_model(base, adapter=tmp_path / "adapter", dtype=dtype, device="cpu")
    if dtype == "float32":
        torch.testing.assert_close(loaded(IDS).logits, saved(IDS).logits, rtol=0, atol=1e-6)


# ---- a resized vocabulary ----------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"modules_to_save": ["embed_tokens", "lm_head"]}], ids=["frozen", "trained"])
@pytest.mark.parametrize("rows", [330, 310])
def test_a_base_is_resized_to_what_an_adapter_stores(
    base: Path, tmp_path: Path, said: Any, rows: int, settings: dict[str, Any]
) -> None:
    saved = adapted(base, rows, **settings)
    saved.save_pretrained(tmp_path / "adapter")
    for _ in range(2):
        loaded = load_model(base, adapter=tmp_path / "adapter", device="cpu")
        ids = torch.tensor([[5, 9, 100, rows - 1]])
        torch.testing.assert_close(loaded(ids).logits, saved(ids).logits, rtol=0, atol=1e-6)
    (line,) = [line for line in said() if "resized" in line]
    assert f"was trained with {rows} embeddings: those of {base} (320) are resized" in line
    assert not any("frozen" in line for line in said())


def test_trained_tokens_of_a_resized_vocabulary_load(base: Path, tmp_path: Path) -> None:
    saved = adapted(base, 330, trainable_token_indices=[5, 325])
    saved.save_pretrained(tmp_path / "adapter")
    loaded = load_model(base, adapter=tmp_path / "adapter", device="cpu")
    ids = torch.tensor([[5, 9, 325]])
    torch.testing.assert_close(loaded(ids).logits, saved(ids).logits, rtol=0, atol=1e-6)


def test_trained_tokens_without_embeddings_are_refused(base: Path, tmp_path: Path) -> None:
    saved = adapted(base, 330, trainable_token_indices=[5, 325])
    saved.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    with pytest.raises(ModelError, match=r"trains token 325 .*has embeddings for 320.*save_embedding_layers=True"):
        load_model(base, adapter=tmp_path / "adapter", device="cpu")


@pytest.mark.parametrize("base", ["llama"], indirect=True)
def test_one_resized_matrix_of_two_is_refused(base: Path, tmp_path: Path) -> None:
    saved = adapted(base, 330, modules_to_save=["embed_tokens"])
    saved.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    with pytest.raises(ModelError, match=r"stores 330 embeddings where .* has 320, and none for lm_head"):
        load_model(base, adapter=tmp_path / "adapter", device="cpu")


def test_a_resized_base_is_the_same_each_time(base: Path, tmp_path: Path) -> None:
    adapted(base, 330).save_pretrained(tmp_path / "adapter")
    bases = [load_model(base, device="cpu") for _ in range(2)]
    for seed, model in enumerate(bases):
        torch.manual_seed(seed)
        fit_vocabulary(model, str(tmp_path / "adapter"), str(base))
    weights = [model.get_input_embeddings().weight for model in bases]
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=0)
    mean = weights[0][:320].double().mean(dim=0).float()
    torch.testing.assert_close(weights[0][320:], mean.expand(10, -1))


def test_embeddings_come_back_when_an_adapter_goes(base: Path, tmp_path: Path) -> None:
    saved = adapted(base, 330)
    with torch.no_grad():
        saved.get_input_embeddings().weight[7] += 1
    saved.save_pretrained(tmp_path / "adapter")
    model = load_model(base, device="cpu")
    before = model(IDS).logits
    with finetuned(model, tmp_path / "adapter") as tuned:
        torch.testing.assert_close(tuned(IDS).logits, saved(IDS).logits, rtol=0, atol=1e-6)
    torch.testing.assert_close(model(IDS).logits[..., :320], before, rtol=0, atol=1e-6)


# ---- what is trained beside --------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["qwen2"], indirect=True)
def test_tokens_that_are_trained_are_told(base: Path, tmp_path: Path, said: Any) -> None:
    saved = adapted(base, trainable_token_indices=[5, 9])
    saved.save_pretrained(tmp_path / "adapter")
    assert "(trainable_token_indices)" in adapter_warnings(str(tmp_path / "adapter"))[0]
    find_lora_linears(saved)
    (line,) = [line for line in said() if "tokens of" in line]
    assert "embed_tokens" in line


@pytest.mark.parametrize("base", ["qwen2"], indirect=True)
def test_parameters_unfrozen_by_hand_are_told(base: Path, said: Any) -> None:
    model = adapted(base)
    find_lora_linears(model)
    assert said() == []
    model.get_parameter("base_model.model.model.layers.1.input_layernorm.weight").requires_grad_(True)
    find_lora_linears(model)
    (line,) = said()
    assert "ask for gradients (model.layers.1.input_layernorm.weight)" in line


@pytest.mark.parametrize("base", ["qwen2"], indirect=True)
@pytest.mark.parametrize("settings", [{"modules_to_save": ["norm"]}, {"bias": "all"}], ids=str)
def test_what_settings_unfreeze_is_told_once(base: Path, said: Any, settings: dict[str, Any]) -> None:
    find_lora_linears(adapted(base, **settings))
    assert not any("ask for gradients" in line for line in said())


def test_embeddings_unfrozen_by_hand_and_stored_are_told(base: Path, tmp_path: Path, said: Any) -> None:
    saved = adapted(base, 330)
    saved.save_pretrained(tmp_path / "frozen")
    load_model(base, adapter=tmp_path / "frozen", device="cpu")
    assert not any("more than LoRA factors" in line for line in said())
    with torch.no_grad():
        saved.get_input_embeddings().weight[7] += 1
    saved.save_pretrained(tmp_path / "trained")
    load_model(base, adapter=tmp_path / "trained", device="cpu")
    (line,) = [line for line in said() if "more than LoRA factors" in line]
    assert "embed_tokens.weight" in line


# ---- the base ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["qwen2"], indirect=True)
def test_another_base_of_equal_shapes_is_told(base: Path, tmp_path: Path, tiny_model: Factory, said: Any) -> None:
    adapted(base).save_pretrained(tmp_path / "adapter")
    other = tmp_path / "elsewhere" / "base"
    tiny_model(seed=1).save_pretrained(other)
    for _ in range(2):
        model = load_model(other, adapter=tmp_path / "adapter", device="cpu")
    (line,) = said()
    assert str(other) in line
    assert f"another base model, {base}," in line
    plain = model.unload()
    assert adapter_warnings(str(tmp_path / "adapter"), plain, str(other)) == [line]
    assert adapter_warnings(str(tmp_path / "adapter"), load_model(base, device="cpu"), str(base)) == []


@pytest.mark.parametrize("base", ["qwen2"], indirect=True)
def test_a_copy_of_the_base_is_the_base(base: Path, tmp_path: Path, said: Any) -> None:
    adapted(base).save_pretrained(tmp_path / "adapter")
    shutil.copytree(base, tmp_path / "copy")
    (tmp_path / "link").symlink_to(base)
    for place in (base, tmp_path / "copy", tmp_path / "link"):
        for dtype in ("float32", "bfloat16"):
            load_model(place, adapter=tmp_path / "adapter", dtype=dtype, device="cpu")
    assert said() == []


@pytest.mark.parametrize("base", ["qwen2"], indirect=True)
@pytest.mark.parametrize(
    ("named", "known"),
    [
        (None, True),
        ("", True),
        ("someone/base", True),
        ("someone/Base", True),
        ("/gone/models/base/", True),
        ("/cache/models--someone--base/snapshots/0123abc", True),
        ("someone/another", False),
        ("/gone/models/another", False),
        ("/cache/models--someone--another/snapshots/0123abc", False),
    ],
)
def test_a_base_that_is_not_here_is_told_by_its_name(
    base: Path, tmp_path: Path, said: Any, named: str | None, known: bool
) -> None:
    adapted(base).save_pretrained(tmp_path / "adapter")
    edit(tmp_path / "adapter", base_model_name_or_path=named)
    load_model(base, adapter=tmp_path / "adapter", device="cpu")
    assert [str(named) in line for line in said()] == ([] if known else [True])


@pytest.mark.parametrize("base", ["qwen2"], indirect=True)
def test_a_base_made_in_memory_has_no_name_to_compare(
    base: Path, tmp_path: Path, said: Any, tiny_model: Factory
) -> None:
    adapted(base).save_pretrained(tmp_path / "adapter")
    edit(tmp_path / "adapter", base_model_name_or_path="someone/another")
    load_finetuned(tiny_model(), tmp_path / "adapter")
    assert said() == []
