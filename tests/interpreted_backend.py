"""Run by test_backends.py with TRITON_INTERPRET=1: the triton backend against the torch one in float64."""

from __future__ import annotations

import copy
import json

import torch
from peft import LoraConfig, get_peft_model
from transformers import Qwen2Config, Qwen2ForCausalLM

import influence_fast as inf


def main() -> None:
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

    errors = {}
    for name, projection in (
        ("one_sided", inf.Projection(dim=8)),
        ("width", inf.Projection(dim=8, width=64)),
        ("kron", inf.Projection("kron", dim=8)),
        ("exact", None),
    ):
        exact = copy.deepcopy(model).double()
        truth = inf.per_example_gradients(exact, examples, projection=projection, backend="torch")
        for dtype in (torch.float32, torch.bfloat16):
            cast = copy.deepcopy(model).to(dtype)
            found = {}
            for backend in ("triton", "torch"):
                rows = inf.per_example_gradients(cast, examples, projection=projection, backend=backend)
                found[backend] = float((rows.double() - truth).norm() / truth.norm())
            errors[f"{name}-{str(dtype).removeprefix('torch.')}"] = found
    print(json.dumps(errors))


if __name__ == "__main__":
    main()
