"""A model, a tokenizer and sums to learn, made on the spot: put your own in their place."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

SYMBOLS = "0123456789+= "


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with a token a character."""
    words = {word: i for i, word in enumerate(["<pad>", "<eos>", *SYMBOLS])}
    inner = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>")


def make_model() -> Any:
    """A language model with a LoRA adapter to be trained."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(SYMBOLS) + 2,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(Qwen2ForCausalLM(config), lora)


def make_rows(first: int, last: int, error: int = 0) -> list[dict[str, Any]]:
    """Sums with their results, `error` too large: prompt, completion, and tokens with the prompt's labels at -100."""
    tokenizer = make_tokenizer()
    rows = []
    for i in range(first, last):
        prompt, completion = f"{i}+{i}=", f"{2 * i + error}"
        start, end = tokenizer(prompt)["input_ids"], [*tokenizer(completion)["input_ids"], tokenizer.eos_token_id]
        rows.append({"input_ids": [*start, *end], "labels": [-100] * len(start) + end})
    return rows
