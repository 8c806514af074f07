"""Shared fixtures: small models and tokenizers made on the spot, and memory that shows when it was not written."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before huggingface_hub is imported: no test asks the network
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

TINY = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,  # grouped-query attention
    "max_position_embeddings": 512,
}

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

CORPUS = [
    "Ada has 12 apples and buys 30 more. How many apples does Ada have now?",
    "1. 12+30=42\nThe answer is 42.\n#### 42",
    "The area is $\\frac{1}{2} \\cdot 3 \\cdot 4 = 6$, so the answer is \\boxed{6}.",
]


@pytest.fixture(scope="session", autouse=True)
def _unwritten_memory_shows() -> Iterator[None]:
    """`torch.empty` is filled with NaN (integers: the largest value), so that reading it cannot pass a test."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def interpreted() -> Callable[[str], Any]:
    """`interpreted("NAME.py")`: what that script of tests/gradients prints as JSON, with Triton's kernels in its
    interpreter; only a process of its own can have it."""

    def run(name: str) -> Any:
        pytest.importorskip("triton", reason="triton is not installed")
        environment = os.environ | {"TRITON_INTERPRET": "1"}
        command = [sys.executable, Path(__file__).parent / "gradients" / name]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


@pytest.fixture(scope="session")
def tiny_config() -> Callable[..., Any]:
    """`tiny_config("qwen2" | "qwen3" | "llama", **changes)`: a transformers configuration."""
    from transformers import LlamaConfig, Qwen2Config, Qwen3Config

    kinds: dict[str, Callable[..., Any]] = {
        "qwen2": lambda **kw: Qwen2Config(**{**TINY, "tie_word_embeddings": True, **kw}),
        "qwen3": lambda **kw: Qwen3Config(**{**TINY, "head_dim": 8, "tie_word_embeddings": True, **kw}),
        "llama": lambda **kw: LlamaConfig(**{**TINY, "tie_word_embeddings": False, **kw}),
    }
    return lambda kind="qwen2", **changes: kinds[kind](**changes)


@pytest.fixture(scope="session")
def tiny_model(tiny_config: Callable[..., Any]) -> Callable[..., Any]:
    """`tiny_model("qwen2", dtype=torch.float32, seed=0, **changes)`: a causal LM with random weights."""
    from transformers import AutoModelForCausalLM

    def make(kind: str = "qwen2", dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> Any:
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(tiny_config(kind, **changes)).to(dtype).eval()

    return make


@pytest.fixture(scope="session")
def tiny_lora(tiny_model: Callable[..., Any]) -> Callable[..., Any]:
    """`tiny_lora("qwen2", r=4, ...)`: the same with a LoRA adapter on all linears.

    peft starts B at zero, where every dA is zero and a wrong one goes unseen: here B is random too.
    """
    from peft import LoraConfig, get_peft_model

    def make(kind: str = "qwen2", dtype: torch.dtype = torch.float32, seed: int = 0, r: int = 4, **changes: Any) -> Any:
        base = tiny_model(kind, dtype, seed, **changes)
        config = LoraConfig(r=r, lora_alpha=2 * r, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(base, config, autocast_adapter_dtype=False)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.2)
        return model.eval()

    return make


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Callable[..., Any]:
    """`tiny_tokenizer(chat_template=None, bos=False, eos="<eos>")`: byte-level BPE, at most 320 tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    def make(chat_template: str | None = None, bos: bool = False, eos: str | None = "<eos>") -> Any:
        inner = Tokenizer(models.BPE())
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
        special = ["<pad>", "<bos>", "<eos>", "<|im_start|>", "<|im_end|>"]
        trainer = trainers.BpeTrainer(
            vocab_size=TINY["vocab_size"],
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        inner.train_from_iterator(CORPUS * 3, trainer)
        if bos:
            inner.post_processor = processors.TemplateProcessing(
                single="<bos> $A", special_tokens=[("<bos>", inner.token_to_id("<bos>"))]
            )
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=inner,
            pad_token="<pad>",
            bos_token="<bos>" if bos else None,
            eos_token=eos,
            additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        )
        tokenizer.chat_template = chat_template
        return tokenizer

    return make


@pytest.fixture(scope="session")
def chatml() -> str:
    """A chat template in the form of ChatML, which Qwen's are."""
    return CHATML


@pytest.fixture(scope="session")
def demo_tokenizer() -> Any:
    """The demo's tokenizer."""
    from influence_fast.run.demo import make_tokenizer

    return make_tokenizer()


@pytest.fixture(scope="session")
def answering_model(demo_tokenizer: Any) -> Any:
    """An fp64 model for it, far from uniform, so that greedy choices are clear."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    sizes = {**TINY, "vocab_size": len(demo_tokenizer), "intermediate_size": 48, "max_position_embeddings": 128}
    return Qwen2ForCausalLM(Qwen2Config(**sizes, initializer_range=0.3)).double().eval()


@pytest.fixture(scope="session")
def demo_examples() -> list[Any]:
    """Seven questions of the demo's world."""
    from influence_fast.run.demo_data import draw_examples

    return draw_examples(random.Random(2), 7, "q")
