"""Tiny models with routed experts and LoRA on them, and their rows by plain autograd."""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

VOCAB = 61
LENGTHS = (11, 2, 5, 17)
FUSED = ("experts.gate_up_proj", "experts.down_proj")
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
EXPERTS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 10},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 3},
    "deepseek_v3": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 10,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
        "kv_lora_rank": 8,
        "q_lora_rank": 8,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    },
}


class Expert(nn.Module):
    """A gated MLP, as remote code has one for each expert."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(functional.silu(self.up_proj(x)))


class ListedExperts(nn.Module):
    """Experts in a list, each called with its tokens; the last is never chosen. `ordered`: by the token's place."""

    def __init__(self, ordered: bool) -> None:
        super().__init__()
        self.gate = nn.Linear(16, 4)
        self.experts = nn.ModuleList([Expert(16, 10) for _ in range(4)])
        self.ordered = ordered

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        x = hidden.view(-1, hidden.shape[-1])
        scores = self.gate(x) + torch.tensor([0.0, 0.0, 0.0, -1e6], dtype=x.dtype)
        weights, chosen = scores.softmax(-1).topk(2)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            tokens, place = torch.where(chosen == number)
            if len(tokens):
                order = torch.arange(len(tokens)) if self.ordered else torch.arange(len(tokens)).flip(0)
                found = expert(x[tokens[order]]) * weights[tokens[order], place[order], None]
                out = out.index_add(0, tokens[order], found)
        return out.view(hidden.shape)


class BatchedExperts(nn.Module):
    """Experts in one parameter, all of which see all tokens: no interface of transformers'."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(16, 3, bias=False)
        self.weights = nn.Parameter(0.2 * torch.randn(3, 16, 16))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        shares = self.gate(hidden).softmax(-1)[0]
        return torch.einsum("te,tei->ti", shares, torch.einsum("td,edi->tei", hidden[0], self.weights))[None]


def adapted(model: Any, dtype: torch.dtype = torch.float64, **lora: Any) -> Any:
    """The model with a LoRA adapter of rank 3 whose factors are no zeros."""
    torch.manual_seed(3)
    settings = {"r": 3, "lora_alpha": 6, "target_modules": []} | lora
    model = get_peft_model(model.to(dtype), LoraConfig(**settings), autocast_adapter_dtype=False)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.2)
        elif parameter.dim() > 1:
            parameter.data.mul_(5)  # so that experts, and what tokens see of each other, matter
    return model.to(dtype).eval()


def fused_model(kind: str, modules: Any = (), parameters: tuple[str, ...] = FUSED, **lora: Any) -> Any:
    """A model of `kind` with LoRA on `parameters` and on linears named `modules`."""
    torch.manual_seed(1)
    config = AutoConfig.for_model(kind, **SIZES | EXPERTS[kind])
    config._experts_implementation = "eager"  # grouped products take no float64
    targets = modules if isinstance(modules, str) else list(modules)
    return adapted(
        AutoModelForCausalLM.from_config(config, dtype=torch.float64),
        target_modules=targets,
        target_parameters=list(parameters) or None,
        **lora,
    )


def model_of(block: Any, **lora: Any) -> Any:
    """A Qwen3 whose MLPs are what `block` makes, with LoRA."""
    torch.manual_seed(1)
    model = Qwen3ForCausalLM(Qwen3Config(**SIZES))
    for layer in model.model.layers:
        layer.mlp = block()
    return adapted(model, **lora)


def make_examples(lengths: tuple[int, ...] = LENGTHS) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    examples = []
    for n in lengths:
        ids = torch.randint(0, VOCAB, (n,), generator=generator)
        labels = ids.clone()
        labels[: n // 3] = -100
        examples.append({"input_ids": ids, "labels": labels})
    return examples


def by_autograd(model: Any, examples: list[dict[str, Any]], reduction: str = "mean") -> torch.Tensor:
    """[E, k] exact rows: one ordinary forward and backward an example of the plain peft model."""
    model = copy.deepcopy(model).eval()
    factors = [p for name, p in model.named_parameters() if "lora_" in name]
    rows = []
    for example in examples:
        logits = model(input_ids=example["input_ids"][None]).logits[0, :-1]
        loss = functional.cross_entropy(logits, example["labels"][1:], reduction=reduction)
        grads = torch.autograd.grad(loss, factors, allow_unused=True)
        rows.append(torch.cat([(f * 0 if g is None else g).flatten() for f, g in zip(factors, grads, strict=True)]))
    return torch.stack(rows).detach()


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())
