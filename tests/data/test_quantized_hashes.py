"""A base is known by all that its quantised weights are read by: codes, scales, and how they were made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from influence_fast.data.fingerprints import weight_hashes

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
SETTINGS: list[dict[str, Any]] = [
    NF4,
    {**NF4, "bnb_4bit_quant_type": "fp4"},
    {**NF4, "bnb_4bit_use_double_quant": True},
    {"load_in_8bit": True},
    {"load_in_8bit": True, "llm_int8_threshold": 0.0},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_model: Any) -> Path:
    path = tmp_path_factory.mktemp("hashes") / "model"
    tiny_model("qwen2", num_hidden_layers=1).save_pretrained(path)
    return path


def load(folder: Path, settings: dict[str, Any], dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, quantization_config=BitsAndBytesConfig(**settings)
    ).eval()


def base_hash(model: Any) -> str:
    return weight_hashes(model)[0]


def test_quantised_bases_are_told_apart_from_each_other_and_the_plain_one(folder: Path) -> None:
    plain = base_hash(AutoModelForCausalLM.from_pretrained(folder))
    assert len({plain, *(base_hash(load(folder, settings)) for settings in SETTINGS)}) == len(SETTINGS) + 1


@pytest.mark.parametrize("settings", [SETTINGS[2], SETTINGS[3]], ids=["nf4", "int8"])
def test_a_quantised_base_keeps_its_hash(folder: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    """Through a forward, which moves its numbers, saving, loading, and an adapter."""
    model = load(folder, settings)
    before = base_hash(model)
    model(input_ids=torch.arange(4)[None])
    assert base_hash(model) == before
    model.save_pretrained(tmp_path)
    assert base_hash(AutoModelForCausalLM.from_pretrained(tmp_path)) == before
    assert base_hash(get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))) == before


@pytest.mark.parametrize("settings", [SETTINGS[0], SETTINGS[3]], ids=["nf4", "int8"])
def test_a_scale_that_differs_gives_another_hash(folder: Path, settings: dict[str, Any]) -> None:
    model = load(folder, settings)
    before = base_hash(model)
    weight = model.model.layers[0].mlp.up_proj.weight
    (weight.quant_state.absmax if isinstance(weight, bnb.nn.Params4bit) else weight.SCB)[3] *= 1.001
    assert base_hash(model) != before


def test_weights_in_buffers_count() -> None:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.in_features = self.out_features = 4
            self.register_buffer("qweight", torch.zeros(4, 4, dtype=torch.int8))

    model = nn.Sequential(Packed())
    before = base_hash(model)
    model[0].qweight[1, 1] = 1
    assert base_hash(model) != before
