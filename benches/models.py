"""Small models, tokenizers and rows made on the spot, so that a bench needs no download."""

from __future__ import annotations

from typing import Any

import torch


def train_tokenizer(texts: list[str], vocab_size: int) -> Any:
    """A byte-level BPE tokenizer with an EOS and a padding token, fitted on `texts`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def qwen2_model(vocab_size: int, eos_token_id: int | None = None, layers: int = 4, width: int = 256) -> Any:
    """A Qwen2-shaped causal LM with random weights: grouped-query attention, tied embeddings."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=max(1, width // 128),
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        eos_token_id=eos_token_id,
        pad_token_id=0,
    )
    return Qwen2ForCausalLM(config)


def with_lora(model: Any, rank: int) -> Any:
    """The model with a LoRA adapter of `rank` on all linears, its B factors non-zero."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return model


def heavy_tailed(n: int, k: int, seed: int) -> torch.Tensor:
    """Normal rows with a few shared directions and per-column scales over a decade, as gradients have."""
    g = torch.Generator().manual_seed(seed)
    shared = torch.Generator().manual_seed(99)
    directions = torch.randn(8, k, generator=shared)
    scale = torch.exp(torch.randn(k, generator=shared) * 0.7)
    x = torch.randn(n, k, generator=g)
    x += torch.randn(n, 8, generator=g) @ directions * 0.3
    return x.mul_(scale)
