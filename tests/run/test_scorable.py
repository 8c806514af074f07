"""What "all-linear" leaves out, and what is refused before anything is trained."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Qwen3Config, Qwen3ForCausalLM

import influence_fast as inf
from influence_fast.config import RunConfig
from influence_fast.errors import ModelError, warn_once
from influence_fast.gradients.targets import gradient_layout
from influence_fast.run import pipeline
from influence_fast.run.scorable import check_scorable
from influence_fast.settings import from_dict
from influence_fast.training.fresh_adapter import attach_lora
from influence_fast.training.settings import LoraSettings

SIZES = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


class Doubling(nn.Linear):
    """No plain product."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


def make_model() -> Any:
    """A decoder with a linear that is no plain product and one that no text comes through."""
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(**SIZES))
    model.model.layers[1].mlp.up_proj = Doubling(16, 12, bias=False)
    model.model.vision = nn.Linear(16, 16)
    return model


def config_of(**lora: Any) -> RunConfig:
    data = {"pool": {"path": "pool.jsonl"}, "holdout_validation": 1, "holdout_test": 1}
    return from_dict(RunConfig, {"model": {"path": "m"}, "data": data, "output": "out", "lora": lora})


def test_all_linear_is_what_can_be_scored(caplog: pytest.LogCaptureFixture) -> None:
    warn_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        model = attach_lora(make_model(), LoraSettings(r=2), 0)
    assert "all-linear leaves out layers that cannot be scored" in caplog.text
    assert "it is a Doubling" in caplog.text
    modules = {entry.module.removeprefix("base_model.model.model.") for entry in gradient_layout(model)}
    assert len(modules) == 2 * 7 - 1
    assert not modules & {"vision", "layers.1.mlp.up_proj"}


def test_a_target_that_cannot_be_scored_is_refused_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    asking = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    check_scorable(model, config_of(r=2))
    with pytest.raises(ModelError, match="LoRA over Doubling is not supported"):
        check_scorable(model, config_of(r=2, target_modules=["up_proj"]))
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == asking


def test_a_run_asks_before_it_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise ModelError("not to be scored")

    one = object.__new__(pipeline.Pipeline)
    one.config, one.base = config_of(), None
    monkeypatch.setattr(pipeline.Pipeline, "_has_reference", lambda self: False)
    monkeypatch.setattr(pipeline, "check_scorable", refuse)
    with pytest.raises(ModelError, match="not to be scored"):
        one.run()


def test_names_of_parameters_reach_the_adapter_and_no_dropout_does() -> None:
    settings = from_dict(LoraSettings, {"target_modules": [], "target_parameters": ["experts.down_proj"]})
    assert settings.record()["target_parameters"] == ("experts.down_proj",)
    assert "target_parameters" not in LoraSettings().record()
    assert LoraSettings(target_modules=("all-linear",)).target_modules == "all-linear"
    with pytest.raises(inf.errors.ConfigError, match=r"must be 0 with lora\.target_parameters"):
        LoraSettings(dropout=0.1, target_parameters=("experts.down_proj",))
