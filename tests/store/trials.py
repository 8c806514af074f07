"""Trials of builds: what a process builds that is started for many of them, and what a store then holds."""

from __future__ import annotations

from pathlib import Path

from influence_fast.gradients.rows.projection import Projection
from influence_fast.store.identity import StoreIdentity, projection_fields

_WORLD = """
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Qwen2Config

torch.set_num_threads(1)
torch.manual_seed(0)
config = Qwen2Config(vocab_size=320, hidden_size=32, intermediate_size=56, num_hidden_layers=2,
                     num_attention_heads=4, num_key_value_heads=2)
model = get_peft_model(AutoModelForCausalLM.from_config(config), LoraConfig(r=4, target_modules="all-linear"))
for name, parameter in model.named_parameters():
    if "lora_B" in name:
        torch.nn.init.normal_(parameter, std=0.2)
generator = torch.Generator().manual_seed(0)
examples = []
for i in range(48):
    ids = torch.randint(5, 300, (int(torch.randint(3, LONGEST, (), generator=generator)),), generator=generator)
    examples.append(dict(id=f"e{i}", input_ids=ids, labels=ids.clone()))
"""


def made_up_identity(projection: Projection) -> StoreIdentity:
    """What a store that no model made is said to be of."""
    return StoreIdentity(
        model_id="tiny",
        model_hash="a" * 64,
        adapter_hash="b" * 64,
        tokenizer_hash="c" * 64,
        dataset_fingerprint="d" * 64,
        tokenization="text, max_length=None, truncate=False",
        loss_reduction="mean",
        **projection_fields(projection),
    )


def world(longest: int) -> str:
    """A program that makes `model` and 48 `examples` of fewer than `longest` tokens."""
    return _WORLD.replace("LONGEST", str(longest))


def stored_bytes(folder: Path) -> dict[str, bytes]:
    """Each file of a store."""
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if not p.name.startswith(".")}
