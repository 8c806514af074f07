"""Run by test_streaming.py with TRITON_INTERPRET=1: stream mode on `segment_bilinear` against float64 products."""

from __future__ import annotations

import copy
import json

import torch
from peft import LoraConfig, get_peft_model
from transformers import Qwen2Config, Qwen2ForCausalLM

import influence_fast as inf
from influence_fast import streaming


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

    exact = inf.per_example_gradients(copy.deepcopy(model).double(), examples, backend="torch")
    queries = exact[:3] + 0.1 * exact.norm(dim=1).mean() * torch.randn(3, exact.shape[1]) / exact.shape[1] ** 0.5
    truth = exact @ queries.T
    errors = {}
    for dtype in (torch.float32, torch.bfloat16):
        cast = copy.deepcopy(model).to(dtype)
        for chunk in (1 << 24, 1):  # all queries in one launch, and one by one
            streaming._CHUNK = chunk
            found = {}
            for backend in ("triton", "torch"):
                scores = streaming.stream_influence(cast, examples, queries, backend=backend)
                found[backend] = float((scores.double() - truth).norm() / truth.norm())
            errors[f"{str(dtype).removeprefix('torch.')}-{chunk}"] = found
    print(json.dumps(errors))


if __name__ == "__main__":
    main()
