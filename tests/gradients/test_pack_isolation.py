"""Packs of models that see them as one text: found out by trying, and taken one example at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

import influence_fast as inf
from influence_fast.errors import ModelError
from influence_fast.gradients.engine import GradientEngine
from influence_fast.gradients.model import packed_attention as attention
from influence_fast.gradients.model.pack_isolation import Separation, separation

COMMON = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LINEAR = {f"linear_{what}": n for what, n in (("num_key_heads", 2), ("num_value_heads", 2), ("key_head_dim", 8))}
# model type -> its own settings, LoRA's modules
SEEN_TOGETHER: dict[str, tuple[dict[str, Any], list[str]]] = {
    # attention that cannot be replaced
    "bloom": ({"vocab_size": 300, "hidden_size": 32, "n_layer": 2, "n_head": 4}, ["query_key_value"]),
    "mpt": ({"vocab_size": 300, "d_model": 32, "n_layers": 2, "n_heads": 4, "expansion_ratio": 2}, ["Wqkv"]),
    # a convolution, a state space, a linear attention beside attention that does keep examples apart
    "lfm2": (COMMON | {"layer_types": ["conv", "full_attention"]}, ["q_proj", "v_proj"]),
    "falcon_h1": (COMMON | {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8}, ["q_proj"]),
    "qwen3_5_text": (
        COMMON
        | LINEAR
        | {"head_dim": 8, "linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"]},
        ["q_proj", "v_proj"],
    ),
}
APART: dict[str, tuple[dict[str, Any], list[str]]] = {
    "llama": (COMMON, ["q_proj", "down_proj"]),
    "mistral": (COMMON | {"sliding_window": 4}, ["q_proj"]),
    "gemma3_text": (COMMON | {"head_dim": 8, "sliding_window": 4}, ["q_proj"]),
}


def make(kind: str, dtype: torch.dtype = torch.float64) -> Any:
    settings, modules = (SEEN_TOGETHER | APART)[kind]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings), dtype=dtype)
    model = get_peft_model(model, LoraConfig(r=2, target_modules=modules), autocast_adapter_dtype=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
            elif "lora_" not in name and parameter.dim() > 1:
                parameter.mul_(4)  # so that what examples see of each other is no rounding
    return model.to(dtype)


def by_autograd(model: Any, examples: list[dict[str, Any]]) -> torch.Tensor:
    """One example at a time through the model as it is."""
    model.eval()
    rows = []
    for example in examples:
        model.zero_grad()
        logits = model(input_ids=example["input_ids"][None], use_cache=False).logits[0, :-1]
        torch.nn.functional.cross_entropy(logits, example["labels"][1:]).backward()
        rows.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    model.zero_grad()
    return torch.stack(rows)


@pytest.mark.parametrize("kind", [*SEEN_TOGETHER, *APART])
def test_examples_have_the_gradients_that_they_have_alone(kind: str) -> None:
    model, generator = make(kind), torch.Generator().manual_seed(1)
    ids = [torch.randint(3, 300, (n,), generator=generator) for n in (9, 23, 2, 14)]
    examples = [{"input_ids": i, "labels": i} for i in ids]
    rows, want = inf.per_example_gradients(model, examples), by_autograd(model, examples)
    assert (rows - want).norm() < 1e-7 * want.norm()
    with GradientEngine(model, None) as engine:
        assert engine.packs_are_separate == (kind in APART)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["falcon_h1", "lfm2", *APART])
def test_rounding_is_not_taken_for_a_neighbour(kind: str, dtype: torch.dtype) -> None:
    base = make(kind, dtype).get_base_model().eval()
    decoder = base.get_decoder()
    with attention.packed(base, decoder.config):
        found = separation(decoder, decoder.config._attn_implementation, torch.device("cpu"))
    assert found == Separation(kind in APART)


def test_a_model_with_a_memory_is_refused() -> None:
    base = make("llama").get_base_model().eval()
    calls: list[int] = []

    def remember(_: Any, __: Any, output: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return output * len(calls)

    base.model.layers[1].mlp.register_forward_hook(remember)
    with pytest.raises(ModelError, match=r"LlamaForCausalLM: .*keeps a state between calls"):
        separation(base, attention.PACKED, torch.device("cpu"))


@pytest.mark.parametrize("hands_on", [True, False], ids=["bounds", "no bounds"])
def test_a_head_that_is_more_than_a_product_is_found_by_trying(hands_on: bool) -> None:
    """Packs are then tried on the whole model, which may not hand their bounds on."""
    model, generator = make("llama"), torch.Generator().manual_seed(1)
    base = model.get_base_model()
    forward = base.forward

    def halved(**kwargs: Any) -> Any:
        if not hands_on:
            kwargs = {name: value for name, value in kwargs.items() if "seq_lens" not in name and "max_len" not in name}
        return _halved(forward(**kwargs))

    base.forward = halved
    ids = [torch.randint(3, 300, (n,), generator=generator) for n in (9, 23, 2)]
    examples = [{"input_ids": i, "labels": i} for i in ids]
    want = by_autograd(model, examples)
    assert (inf.per_example_gradients(model, examples) - want).norm() < 1e-7 * want.norm()
    with GradientEngine(model, None) as engine:
        assert engine.packs_are_separate == hands_on


def test_logits_of_another_width_than_the_head_are_the_models_own() -> None:
    model, generator = make("llama"), torch.Generator().manual_seed(1)
    base = model.get_base_model()
    forward = base.forward

    def cut(**kwargs: Any) -> Any:
        output = forward(**kwargs)
        output.logits = output.logits[..., :290]
        return output

    base.forward = cut
    ids = [torch.randint(3, 290, (n,), generator=generator) for n in (9, 4)]
    examples = [{"input_ids": i, "labels": i} for i in ids]
    want = by_autograd(model, examples)
    assert (inf.per_example_gradients(model, examples) - want).norm() < 1e-7 * want.norm()


def test_padding_whose_embedding_is_zero_is_no_neighbour() -> None:
    """The derivative of a norm's root at zero is no number."""
    base = make("llama").get_base_model().eval()
    decoder = base.get_decoder()
    root = lambda _, __, x: x / x.square().mean(dim=-1, keepdim=True).sqrt()  # noqa: E731
    decoder.embed_tokens.register_forward_hook(root)
    with torch.no_grad():
        decoder.embed_tokens.weight[:3] = 0
    with attention.packed(base, decoder.config):
        assert separation(decoder, attention.PACKED, torch.device("cpu")) == Separation(True)


def test_embeddings_that_are_not_called_are_taken_for_packs_that_are_not_apart() -> None:
    base = make("llama").get_base_model().eval()
    decoder = base.get_decoder()
    decoder.embed_tokens = _Looked(decoder.embed_tokens.weight)
    with attention.packed(base, decoder.config):
        assert separation(decoder, attention.PACKED, torch.device("cpu")) == Separation(False)


class _Looked(torch.nn.Module):
    """Embeddings whose hooks are not run."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = weight

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.embedding(ids, self.weight)


def _halved(output: Any) -> Any:
    output.logits = output.logits / 2
    return output
