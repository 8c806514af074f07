"""Which parts of a model the kernels take over, found by what they compute; the numbers are test_backends.py's."""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN

from influence_fast import fused_layers
from influence_fast.engine import GradientEngine
from influence_fast.kernels.runtime import recording
from influence_fast.packing import pack_examples
from influence_fast.projection import Projection

LLAMAS = (0.0, True)


def of_transformers(model: str, name: str) -> Any:
    return getattr(importlib.import_module(f"transformers.models.{model}.modeling_{model}"), name)


@pytest.mark.parametrize(
    ("model", "name", "expected"),
    [
        ("llama", "LlamaRMSNorm", LLAMAS),
        ("mistral", "MistralRMSNorm", LLAMAS),
        ("qwen2", "Qwen2RMSNorm", LLAMAS),
        ("qwen3", "Qwen3RMSNorm", LLAMAS),
        ("gemma2", "Gemma2RMSNorm", (1.0, False)),
        ("olmo2", "Olmo2RMSNorm", (0.0, False)),
        ("cohere2", "Cohere2LayerNorm", None),
        ("nemotron", "NemotronLayerNorm1P", None),
    ],
)
def test_norms_are_told_by_what_they_compute(model: str, name: str, expected: object) -> None:
    for eps in (1e-6, 1e-5):
        assert fused_layers._norm_kind(of_transformers(model, name), eps) == expected


def test_pytorchs_own_norms_are_told_apart() -> None:
    assert fused_layers._norm_kind(nn.RMSNorm, 1e-6) == (0.0, False)
    assert fused_layers._norm_kind(nn.LayerNorm, 1e-5) is None


class Elsewhere(nn.Module):
    """A norm that adds eps in another place."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x / (x.square().mean(-1, keepdim=True).sqrt() + self.variance_epsilon)


class Gated(nn.Module):
    """A norm of two inputs: a forward of one would fail where its model calls it."""

    def forward(self, x: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
        out = self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)
        return out if gate is None else out * gate


@pytest.mark.parametrize("kind", [Elsewhere, Gated])
def test_what_only_looks_like_such_a_norm_is_left_alone(kind: type[nn.Module]) -> None:
    assert fused_layers._norm_kind(kind, 1e-6) is None


def test_mlps_are_told_by_what_they_compute() -> None:
    silu, gelu = type(ACT2FN["silu"]), type(ACT2FN["gelu_pytorch_tanh"])
    for model, name in (("llama", "LlamaMLP"), ("qwen2", "Qwen2MLP"), ("gemma2", "Gemma2MLP")):
        assert fused_layers._is_gated_silu(of_transformers(model, name), silu)
        assert not fused_layers._is_gated_silu(of_transformers(model, name), gelu)
    assert not fused_layers._is_gated_silu(of_transformers("phi3", "Phi3MLP"), silu)  # gate and up are one linear

    class Clamped(of_transformers("llama", "LlamaMLP")):  # type: ignore[misc]
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x).clamp(-1, 1))

    assert not fused_layers._is_gated_silu(Clamped, silu)


def test_rotary_functions_are_told_by_what_they_compute() -> None:
    for model, expected in (("llama", True), ("qwen2", True), ("qwen3", True), ("cohere", False), ("glm", False)):
        assert fused_layers._is_rotary(of_transformers(model, "apply_rotary_pos_emb")) is expected, model


def launched(model: Any, projection: Projection | None = None) -> Counter[str]:
    """Names of the kernels that a batch of 9 tokens launches; none is run."""
    ids = torch.arange(9)
    (pack,) = pack_examples([{"input_ids": ids, "labels": ids}], 9)
    with (
        recording(),
        GradientEngine(model, projection or Projection(dim=4), backend="triton") as engine,
        recording() as found,
    ):
        engine.run(pack)
    return Counter(launch.kernel.__name__ for launch in found)


@pytest.mark.parametrize(("kind", "norms"), [("llama", 2 * 2 + 1), ("qwen2", 2 * 2 + 1), ("qwen3", 4 * 2 + 1)])
def test_a_batch_goes_through_the_kernels(tiny_lora: Callable[..., Any], kind: str, norms: int) -> None:
    """Two layers; the gradient of the first norm's input is asked for by nobody."""
    pytest.importorskip("triton", reason="triton is not installed")
    model = tiny_lora(kind, torch.bfloat16, num_hidden_layers=2)
    found = launched(model)
    assert found["_rms_norm_kernel"] == norms
    assert found["_rms_norm_backward_kernel"] == norms - 1
    assert found["_gated_silu_kernel"] == found["_gated_silu_backward_kernel"] == 2
    assert found["_rotary_kernel"] == 2 * 2 * 2


def test_all_is_put_back(tiny_lora: Callable[..., Any]) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    model = tiny_lora("qwen2", torch.bfloat16)
    rotary = of_transformers("qwen2", "apply_rotary_pos_emb")
    before = {module: set(vars(module)) for module in model.modules()}
    launched(model)
    assert of_transformers("qwen2", "apply_rotary_pos_emb") is rotary
    assert {module: set(vars(module)) for module in model.modules()} == before
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_forward_of_somebody_elses_making_stays(tiny_lora: Callable[..., Any]) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    model = tiny_lora("qwen2", torch.bfloat16)
    norm = model.get_base_model().model.norm
    own = type(norm).forward
    calls = []

    def watched(x: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return own(norm, x)

    norm.forward = watched
    assert launched(model)["_rms_norm_kernel"] == 2 * len(model.get_base_model().model.layers)
    assert calls
    assert norm.forward is watched


def test_another_model_of_the_family_keeps_its_own_rotary_function(tiny_lora: Callable[..., Any]) -> None:
    """While an engine is open, what lies elsewhere or has other arguments goes the model's own way."""
    base = nn.Linear(2, 2, device="meta")
    calls: list[Any] = []
    rotary = fused_layers._rotary_by_kernel(lambda *args, **kwargs: calls.append((args, kwargs)), base)
    here = [torch.zeros(1, *shape) for shape in ((4, 3, 8), (2, 3, 8), (3, 8), (3, 8))]
    rotary(*here)
    there = [x.to("meta") for x in here]
    rotary(*there, unsqueeze_dim=2)
    rotary(there[0].expand(2, 4, 3, 8), *there[1:])
    rotary(*there[:2], there[2][..., :4], there[3][..., :4])
    assert len(calls) == 4
