"""Adapters that are not LoRA, and variants of LoRA that are no plain product, are named with what to do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
from peft import LoraConfig, get_peft_model

from influence_fast.errors import ModelError
from influence_fast.gradients.model.adapter_kinds import check_kind, kind_of
from influence_fast.gradients.targets import gradient_layout
from influence_fast.training.adapters import attach_adapter

TARGETS = {"target_modules": ["q_proj", "v_proj"]}
PROMPTS = {"num_virtual_tokens": 2, "task_type": "CAUSAL_LM"}
KINDS: dict[str, Callable[[], Any]] = {
    "IA3": lambda: peft.IA3Config(**TARGETS, feedforward_modules=[]),
    "VeRA": lambda: peft.VeraConfig(**TARGETS),
    "LoHa": lambda: peft.LoHaConfig(**TARGETS),
    "LoKr": lambda: peft.LoKrConfig(**TARGETS),
    "OFT": lambda: peft.OFTConfig(**TARGETS, oft_block_size=4, use_cayley_neumann=False),
    "FourierFT": lambda: peft.FourierFTConfig(**TARGETS, n_frequency=8),
    "AdaLoRA": lambda: peft.AdaLoraConfig(**TARGETS, total_step=10, init_r=4, target_r=2, tinit=1, tfinal=2),
    "prompt tuning": lambda: peft.PromptTuningConfig(**PROMPTS),
    "prefix tuning": lambda: peft.PrefixTuningConfig(**PROMPTS),
    "P-tuning": lambda: peft.PromptEncoderConfig(**PROMPTS),
    "trainable tokens alone": lambda: peft.TrainableTokensConfig(token_indices=[1, 2]),
}


@pytest.mark.parametrize("name", KINDS)
def test_adapters_of_other_kinds_are_named(name: str, tiny_model: Callable[..., Any], tmp_path: Path) -> None:
    """In memory, and from the folder that peft saved."""
    model = get_peft_model(tiny_model("llama", num_hidden_layers=1), KINDS[name]())
    model.save_pretrained(tmp_path)
    for call in (
        lambda: gradient_layout(model),
        lambda: attach_adapter(tiny_model("llama", num_hidden_layers=1), str(tmp_path), ""),
    ):
        with pytest.raises(ModelError, match=rf" is {name}\W.*only gradients of LoRA.*peft\.LoraConfig") as error:
            call()
        assert "\n" not in str(error.value)


def test_every_kind_that_peft_has_is_refused_but_lora() -> None:
    for kind in peft.PeftType:
        if kind == peft.PeftType.LORA:
            check_kind("this", kind_of(LoraConfig()))
            continue
        with pytest.raises(ModelError, match=r"^this is \S.*train a LoRA adapter"):
            check_kind("this", kind_of({"peft_type": kind.value}))


def test_only_active_adapters_have_to_be_lora(tiny_model: Callable[..., Any]) -> None:
    model = peft.PeftMixedModel(tiny_model("llama", num_hidden_layers=1), LoraConfig(**TARGETS), "one")
    model.add_adapter("other", peft.LoHaConfig(**TARGETS))
    model.set_adapter("one")
    assert len(gradient_layout(model)) == 4
    for active in ("other", ["one", "other"]):
        model.set_adapter(active)
        with pytest.raises(ModelError, match="the model's adapter 'other' is LoHa"):
            gradient_layout(model)


@pytest.mark.parametrize(
    ("config", "name", "setting"),
    [
        ({"alora_invocation_tokens": [1, 2], "task_type": "CAUSAL_LM"}, "aLoRA", "alora_invocation_tokens"),
        ({"init_lora_weights": "mica"}, "MiCA", "init_lora_weights"),
        ({"velora_config": {}}, "VeLoRA", "velora_config"),
    ],
)
def test_variants_that_are_no_plain_lora_are_named(
    config: dict[str, Any], name: str, setting: str, tiny_model: Callable[..., Any]
) -> None:
    model = get_peft_model(tiny_model("llama", num_hidden_layers=1), LoraConfig(**TARGETS, r=2, **config))
    with pytest.raises(ModelError, match=rf"q_proj: {name}.*train the adapter without {setting}"):
        gradient_layout(model)
