"""A world of sums with a model and a tokenizer of their own, for tests of whole runs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

WORDS = ["<pad>", "<eos>", "<unk>", "what", "is", "plus", "The", "answer", "#", *map(str, range(20))]


def write_model(folder: Path, hidden: int = 32, words: list[str] = WORDS) -> None:
    vocabulary = {word: i for i, word in enumerate(words)}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(words),
        hidden_size=hidden,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
        eos_token_id=words.index("<eos>"),
        pad_token_id=words.index("<pad>"),
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)


def write_rows(path: Path, n: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    lines = []
    for i in range(n):
        a, b = (int(v) for v in rng.integers(0, 3, 2))
        wrong = i % 4 == 0
        answer = a + b + wrong
        row = {"id": f"{path.stem}-{i}", "prompt": f"what is {a} plus {b}", "completion": f"The answer is {answer}"}
        lines.append(json.dumps(row | {"answer": str(a + b), "label": "wrong_answer" if wrong else "clean"}))
    path.write_text("\n".join(lines) + "\n")
