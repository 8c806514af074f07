"""What one batch asks of host and memory: operations a layer and bytes they move, ours beside a plain LoRA step.

    python -m benches.launches [--output benches/results/launches.json]

No card, no clock. Small models on a fast card wait for the host, which launches each operation one by one, so their
number is what counts there. The model lies on PyTorch's meta device: every operation of forward and backward is
dispatched and none computed; Triton kernels are recorded instead of launched (`kernels.runtime.recording`). Views and
allocations launch nothing and are not counted; an attention counts as one operation each way, as flash attention is.
The figure of a layer is the difference between a model with one layer more and one with one less; `rest` is embedding,
head and loss, and with ours the sums over examples. Where steps are replayed as CUDA graphs none of this is launched
one by one: a batch is then a copy of its inputs, a graph, and copies of its rows and losses.

Bytes are those of each operation's operands and results. PyTorch's matrix products and attention are left out, as most
of them wait for arithmetic where all else waits for memory; every kernel of ours is counted.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benches.environment import describe
from influence_fast.data.packing import pack_examples
from influence_fast.gradients.engine import GradientEngine
from influence_fast.gradients.model import packed_attention as attention
from influence_fast.gradients.rows.projection import Projection
from influence_fast.kernels.runtime import recording

SHAPE = {  # Qwen2.5-0.5B, whose layers are the smallest
    "vocab_size": 151_936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
}
TOKENS = 512
ALLOCATIONS = {"aten::empty", "aten::empty_like", "aten::new_empty", "aten::empty_strided", "aten::new_empty_strided"}
UNCOUNTED = ALLOCATIONS | {"aten::detach", "aten::_unsafe_view"}
PRODUCTS = {"aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm"}


class Operations(TorchDispatchMode):
    """Counts operations with a tensor on the meta device that make or change numbers, and bytes that they move."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given, made = (tensors_on_meta(leaves) for leaves in ((args, kwargs), out))
        if (given or made) and not func.is_view and func._schema.name not in UNCOUNTED:
            self.count += 1
            if func._schema.name not in PRODUCTS and not OneAttention.running:
                self.bytes += sum(map(held, given + made))
        return out


def tensors_on_meta(values: Any) -> list[torch.Tensor]:
    """Each tensor among the values once."""
    found = {id(leaf): leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor) and leaf.is_meta}
    return list(found.values())


def held(tensor: torch.Tensor) -> int:
    """Bytes of a tensor's numbers; one that is repeated by a stride of 0 is read once."""
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return tensor.element_size() * math.prod(size for size, stride in sizes if stride)


class OneAttention(torch.autograd.Function):
    """One operation forward and one backward, of the right shapes."""

    running = False

    @staticmethod
    def forward(ctx: Any, *inputs: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(*inputs)
        return OneAttention._clone(inputs[0])

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        query, key, value = ctx.saved_tensors
        return OneAttention._clone(query), torch.empty_like(key), torch.empty_like(value)

    @staticmethod
    def _clone(tensor: torch.Tensor) -> torch.Tensor:
        OneAttention.running = True
        try:
            return tensor.clone()
        finally:
            OneAttention.running = False


def one_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any) -> Any:
    return OneAttention.apply(query, key, value)


def model_of(layers: int) -> Any:
    """A Qwen2.5-0.5B shape with `layers` layers and LoRA on every linear, bf16, on the meta device."""
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen2Config, Qwen2ForCausalLM

    with torch.device("meta"):
        model = Qwen2ForCausalLM(Qwen2Config(**SHAPE, num_hidden_layers=layers, tie_word_embeddings=True))
        lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
        return get_peft_model(model, lora, autocast_adapter_dtype=False).to(torch.bfloat16)


Found = tuple[int, int]  # operations, bytes


def plain(layers: int) -> Found:
    """A forward and backward of the model's own loss."""
    model = model_of(layers)
    ids = torch.zeros(1, TOKENS, dtype=torch.int64, device="meta")

    def step() -> None:
        # a mask made ready: transformers would look at the numbers of one
        model(input_ids=ids, labels=ids, attention_mask={"full_attention": None}, use_cache=False).loss.backward()

    step()  # gradients are allocated
    with mock.patch.object(nn.functional, "scaled_dot_product_attention", one_attention), Operations() as found:
        step()
    return found.count, found.bytes


def ours(layers: int, backend: str, projection: Projection | None) -> Found:
    """A pack through the engine, Triton kernels counted as one operation a launch."""
    ids = torch.zeros(TOKENS, dtype=torch.int64)
    (pack,) = pack_examples([{"input_ids": ids, "labels": ids}], TOKENS)
    with (
        mock.patch.object(attention, "scaled_dot_product_attention", one_attention),
        recording(),
        GradientEngine(model_of(layers), projection, backend=backend) as engine,
    ):
        engine.run(pack)
        with Operations() as found, recording() as launches:
            engine.run(pack)
    by_kernels = sum(held(tensor) for launch in launches for tensor in tensors_on_meta(launch.arguments))
    return found.count + len(launches), found.bytes + by_kernels


def per_layer(count: Callable[[int], Found]) -> dict[str, int]:
    """Operations of a layer, and of all that is not in a layer; bytes a token that a layer's move."""
    (two, moved_by_two), (three, moved_by_three) = count(2), count(3)
    moved = (moved_by_three - moved_by_two) // TOKENS
    return {"layer": three - two, "rest": two - 2 * (three - two), "bytes": moved}


def measure() -> dict[str, dict[str, int]]:
    """Every way and its operations."""
    projection = Projection(dim=16)
    return {
        "plain LoRA step": per_layer(plain),
        "ours, PyTorch": per_layer(lambda layers: ours(layers, "torch", projection)),
        "ours, Triton": per_layer(lambda layers: ours(layers, "triton", projection)),
        "ours, Triton, exact rows": per_layer(lambda layers: ours(layers, "triton", None)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    found = measure()
    print("| way | operations a layer | beyond the layers | of a 24-layer model | KB a token and layer |")
    print("|---|---|---|---|---|")
    for name, row in found.items():
        whole, moved = 24 * row["layer"] + row["rest"], row["bytes"] / 1e3
        print(f"| {name} | {row['layer']} | {row['rest']} | {whole} | {moved:.0f} |")
    if args.output:
        result = {
            "what": "operations launched by one batch of one example, bytes a token moved outside of products",
            "shape": SHAPE,
            "operations": found,
        }
        args.output.write_text(json.dumps(result | describe(), indent=1) + "\n")


if __name__ == "__main__":
    main()
