"""The tiny model and ragged examples that the scripts run under TRITON_INTERPRET=1 share."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import Qwen2Config, Qwen2ForCausalLM


def tiny_world() -> tuple[Any, list[dict[str, torch.Tensor]]]:
    """A Qwen2-shaped LoRA model with non-zero B factors of two ranks, and examples of 2 to 33 tokens."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", rank_pattern={"q_proj": 2})
    model = get_peft_model(Qwen2ForCausalLM(config), lora, autocast_adapter_dtype=False)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    examples = []
    for n in (2, 7, 33, 13):
        ids = torch.randint(0, 61, (n,))
        labels = ids.clone()
        labels[: n // 2] = -100
        examples.append({"input_ids": ids, "labels": labels})
    return model, examples
