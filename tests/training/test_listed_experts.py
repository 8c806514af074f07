"""Adapters of experts in a list, over a model that has them in one parameter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from influence_fast.errors import ModelError
from influence_fast.training.fine_tuning import load_finetuned
from influence_fast.training.fresh_adapter import attach_lora
from influence_fast.training.listed_experts import is_listed
from influence_fast.training.settings import LoraSettings

EXPERTS, RANK = 3, 2
SHAPES = {"gate_proj": (10, 16), "up_proj": (10, 16), "down_proj": (16, 10)}


def make_model() -> Any:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=61,
        hidden_size=16,
        intermediate_size=12,
        moe_intermediate_size=10,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=EXPERTS,
        num_experts_per_tok=2,
        experts_implementation="eager",
    )
    return Qwen3MoeForCausalLM(config).eval()


@pytest.fixture
def listed(tmp_path: Path) -> Path:
    """An adapter as older classes of the model have it: a pair of factors for every linear of every expert."""
    generator = torch.Generator().manual_seed(1)
    stored = {}
    for layer in range(2):
        for expert in range(EXPERTS):
            for name, (d_out, d_in) in SHAPES.items():
                module = f"base_model.model.model.layers.{layer}.mlp.experts.{expert}.{name}"
                stored[f"{module}.lora_A.weight"] = torch.randn(RANK, d_in, generator=generator)
                stored[f"{module}.lora_B.weight"] = torch.randn(d_out, RANK, generator=generator)
    save_file(stored, tmp_path / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "target_modules": list(SHAPES), "bias": "none"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings | {"lora_dropout": 0.0}))
    return tmp_path


def test_factors_of_listed_experts_are_at_work_in_fused_ones(listed: Path) -> None:
    merged, tuned = make_model(), load_finetuned(make_model(), listed)
    stored = load_file(listed / "adapter_model.safetensors")
    for number, layer in enumerate(merged.model.layers):
        for expert in range(EXPERTS):
            module = f"base_model.model.model.layers.{number}.mlp.experts.{expert}"
            gate, up, down = (
                2 * stored[f"{module}.{name}.lora_B.weight"] @ stored[f"{module}.{name}.lora_A.weight"]
                for name in SHAPES
            )
            layer.mlp.experts.gate_up_proj.data[expert] += torch.cat([gate, up])
            layer.mlp.experts.down_proj.data[expert] += down
    ids = torch.arange(12)[None]
    with torch.no_grad():
        wanted, found = merged(input_ids=ids).logits, tuned(input_ids=ids).logits
    assert float((found - wanted).norm() / wanted.norm()) < 1e-5


def test_a_listed_expert_that_is_missing_is_refused(listed: Path) -> None:
    path = listed / "adapter_model.safetensors"
    save_file({k: v for k, v in load_file(path).items() if "layers.1.mlp.experts.2.down" not in k}, path)
    with pytest.raises(ModelError, match="adapter"):
        load_finetuned(make_model(), listed)


def test_an_adapter_of_fused_experts_is_loaded_as_it_was_saved(tmp_path: Path) -> None:
    names = ("experts.gate_up_proj", "experts.down_proj")
    tuned = attach_lora(make_model(), LoraSettings(r=2, target_modules=("q_proj",), target_parameters=names), 0)
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    tuned.save_pretrained(tmp_path)
    ids = torch.arange(12)[None]
    loaded = load_finetuned(make_model(), tmp_path)
    assert torch.equal(loaded(input_ids=ids).logits, tuned(input_ids=ids).logits)


def test_only_experts_and_routers_may_be_elsewhere() -> None:
    modules = {"model.layers.0.mlp.experts", "model.layers.0.mlp.gate"}
    assert is_listed("model.layers.0.mlp.experts.2.up_proj", modules)
    assert not is_listed("model.layers.0.mlp.gate", modules)
    assert not is_listed("model.layers.7.self_attn.q_proj", modules)
