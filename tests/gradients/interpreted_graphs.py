"""Run by test_cuda_graphs.py with TRITON_INTERPRET=1: recorded steps against steps run operation by operation."""

from __future__ import annotations

import functools
import json
from typing import Any
from unittest import mock

import torch
from peft import LoraConfig, get_peft_model
from tape import TapeRecorder
from transformers import Qwen2Config, Qwen2ForCausalLM
from varlen import varlen_attn

import influence_fast as inf
from influence_fast.gradients.engine import GradientEngine
from influence_fast.gradients.model import packed_attention as attention
from influence_fast.gradients.per_example import packs_for
from influence_fast.gradients.rows.projection import Projection
from influence_fast.gradients.step import opened
from influence_fast.gradients.streaming import StreamReducer
from influence_fast.influence.sketch_fitting import fit_projection
from influence_fast.kernels.segments import Segments


@functools.wraps(varlen_attn)  # its words are looked at
def causal(*args: Any, window_size: tuple[int, int], **options: Any) -> torch.Tensor:
    """`varlen_attn`, asked for what a model without windows has."""
    assert window_size == (-1, 0)
    return varlen_attn(*args, window_size=window_size, **options)


def world() -> tuple[Any, list[dict[str, torch.Tensor]]]:
    """A model of one layer and two LoRA modules, and examples of which several packs have one shape."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 40, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = Qwen2Config(vocab_size=61, num_hidden_layers=1, **sizes)
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"])
    model = get_peft_model(Qwen2ForCausalLM(config), lora, autocast_adapter_dtype=False)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    generator = torch.Generator().manual_seed(1)
    examples = []
    for n in (14, 30, 18, 22, 25, 16, 29, 20, 14, 17, 26, 20):
        ids = torch.randint(0, 61, (n,), generator=generator)
        examples.append({"input_ids": ids, "labels": torch.where(torch.arange(n) < n // 3, -100, ids)})
    return model, examples


def main() -> None:
    model, examples = world()
    fitted = fit_projection(model, examples, inf.RowSpec.of(Projection(dim=8, width=60)))
    queries = inf.per_example_gradients(model, examples[:2], backend="torch")
    ways: dict[str, dict[str, Any]] = {
        "one_sided": {"projection": Projection(dim=8)},
        "width": {"projection": Projection(dim=8, width=64)},
        "eigen": {"projection": fitted},
        "exact": {"projection": None},
        "sjlt": {"projection": Projection("sjlt", width=32)},
        "rademacher": {"projection": Projection("rademacher", width=32)},
        "stream": {"projection": None, "reducer": lambda *layout: StreamReducer(*layout, queries)},
    }
    recorders: list[TapeRecorder] = []

    def recorder(device: torch.device) -> TapeRecorder:
        recorders.append(TapeRecorder())
        return recorders[-1]

    found = {}
    with (
        mock.patch("influence_fast.gradients.engine.CudaRecorder", recorder),
        mock.patch.object(opened, "not_recordable", return_value=""),
        mock.patch.object(attention, "_has_varlen", return_value=True),
        mock.patch.object(attention, "varlen_attention", return_value=causal),
        mock.patch.dict(Segments.from_lengths.__func__.__kwdefaults__, chunk=16),  # so that examples are split
    ):
        for name, way in ways.items():
            results = []
            for recorded in (False, True):
                with GradientEngine(model, backend="triton", cuda_graphs=recorded, **way) as engine:
                    packs = packs_for(engine, examples, 64)
                    results.append([engine.run(pack) for pack in packs])
            rows, losses = (
                [torch.cat([pair[part].double() for pair in result]) for result in results] for part in (0, 1)
            )
            found[name] = {
                "rows": float((rows[1] - rows[0]).norm() / rows[0].norm()),
                "losses": float((losses[1] - losses[0]).norm() / losses[0].norm()),
                "packs": len(packs),
                "replays": recorders[-1].replays,
            }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
