"""Which parts of a model the kernels take over, found by what they compute; the numbers are test_backends.py's."""

from __future__ import annotations

import functools
import importlib
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN

from influence_fast.data.packing import pack_examples
from influence_fast.gradients.engine import GradientEngine
from influence_fast.gradients.model import fused_layers
from influence_fast.gradients.rows.projection import Projection
from influence_fast.kernels.runtime import recording

LLAMAS = (0.0, True)


def of_transformers(model: str, name: str) -> Any:
    return getattr(importlib.import_module(f"transformers.models.{model}.modeling_{model}"), name)


def norm_kind(kind: Any, eps: float) -> object:
    return fused_layers._norm_kind(kind.forward, kind, eps)


def is_gated(kind: Any, activation: nn.Module) -> bool:
    return fused_layers._is_gated_silu(kind.forward, kind, activation)


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
        assert norm_kind(of_transformers(model, name), eps) == expected


def test_pytorchs_own_norms_are_told_apart() -> None:
    assert norm_kind(nn.RMSNorm, 1e-6) == (0.0, False)
    assert norm_kind(nn.LayerNorm, 1e-5) is None


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
    assert norm_kind(kind, 1e-6) is None


class Swish(nn.Module):
    def __init__(self, beta: float = 1.0) -> None:
        super().__init__()
        self.beta = beta

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.silu(x) if self.beta == 1 else x * torch.sigmoid(self.beta * x)


def test_mlps_are_told_by_what_they_compute() -> None:
    silu, gelu = ACT2FN["silu"], ACT2FN["gelu_pytorch_tanh"]
    for model, name in (("llama", "LlamaMLP"), ("qwen2", "Qwen2MLP"), ("gemma2", "Gemma2MLP")):
        assert is_gated(of_transformers(model, name), silu)
        assert not is_gated(of_transformers(model, name), gelu)
    assert not is_gated(of_transformers("phi3", "Phi3MLP"), silu)  # gate and up are one linear
    llamas = of_transformers("llama", "LlamaMLP")
    assert is_gated(llamas, Swish())
    assert not is_gated(llamas, Swish(1.7))

    class Clamped(llamas):  # type: ignore[misc,valid-type]
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x).clamp(-1, 1))

    class RoundedLate(llamas):  # type: ignore[misc,valid-type]
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            middle = self.act_fn(self.gate_proj(x).float()) * self.up_proj(x).float()
            return self.down_proj(middle.to(x.dtype))

    assert not is_gated(Clamped, silu)
    assert not is_gated(RoundedLate, silu)


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


@pytest.mark.parametrize("how", ["hook", "forward"])
def test_an_activation_that_somebody_steers_by_stays(tiny_lora: Callable[..., Any], how: str) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    model = tiny_lora("qwen2", torch.bfloat16)
    act = model.get_base_model().model.layers[0].mlp.act_fn
    if how == "hook":
        act.register_forward_hook(lambda module, inputs, out: out * 0.5)
    else:
        act.forward = lambda x: x
    assert launched(model)["_gated_silu_kernel"] == len(model.get_base_model().model.layers) - 1


def test_norms_of_another_dtype_stay(tiny_lora: Callable[..., Any]) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    model = tiny_lora("qwen2", torch.bfloat16, num_hidden_layers=2)
    base = model.get_base_model()
    for module in base.modules():
        if isinstance(module, type(base.model.norm)):
            module.weight.data = module.weight.data.float()
    with fused_layers.fused(base, torch.bfloat16) as found:
        assert (found.norms, found.mlps) == (False, True)
    base.model.norm.weight.data = base.model.norm.weight.data.bfloat16()
    x = torch.randn(3, base.config.hidden_size)
    expected = base.model.norm(x)
    with fused_layers.fused(base, torch.bfloat16) as found:
        assert found.norms
        torch.testing.assert_close(base.model.norm(x), expected)  # of float32, which the weights are not


def test_a_class_that_is_changed_is_looked_at_again(
    tiny_lora: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    model = tiny_lora("qwen2", torch.bfloat16)
    assert launched(model)["_rms_norm_kernel"]
    kind = of_transformers("qwen2", "Qwen2RMSNorm")
    own = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x: 1.5 * own(self, x))
    assert not launched(model)["_rms_norm_kernel"]


def test_an_attention_that_somebody_wraps_stays(tiny_lora: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' own decorators rename arguments; another's may do anything."""
    pytest.importorskip("triton", reason="triton is not installed")
    model = tiny_lora("qwen2", torch.bfloat16)
    kind = of_transformers("qwen2", "Qwen2Attention")
    own = kind.forward

    @functools.wraps(own)
    def halved(self: Any, *args: Any, **kwargs: Any) -> Any:
        out, *rest = own(self, *args, **kwargs)
        return 0.5 * out, *rest

    assert launched(model)["_rotary_kernel"]
    monkeypatch.setattr(kind, "forward", halved)
    assert not launched(model)["_rotary_kernel"]


def test_engines_open_and_close_in_any_order(tiny_lora: Callable[..., Any]) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    rotary = of_transformers("qwen2", "apply_rotary_pos_emb")
    models = [tiny_lora("qwen2", torch.bfloat16) for _ in range(2)]
    with recording():
        first, second = (GradientEngine(model, Projection(dim=4), backend="triton") for model in models)
        first.__enter__()
        second.__enter__()
        assert of_transformers("qwen2", "apply_rotary_pos_emb") is rotary  # it is other models' too
        first.__exit__()
        second.__exit__()
    assert not any("forward" in vars(module) for model in models for module in model.modules())
    assert launched(models[0])["_rotary_kernel"]


def test_what_the_rotary_kernel_cannot_turn_is_left_to_the_models_function() -> None:
    calls: list[Any] = []
    rotary = fused_layers._rotary_by_kernel(lambda *args, **kwargs: calls.append((args, kwargs)))
    q, k, cos, sin = (torch.zeros(1, *shape) for shape in ((4, 3, 8), (2, 3, 8), (3, 8), (3, 8)))
    rotary(q, cos=cos, sin=sin)
    rotary(q, k, cos, sin, unsqueeze_dim=2)
    rotary(q, k, cos, sin, 2)
    rotary(q.expand(2, 4, 3, 8), k, cos, sin)
    rotary(q, k, cos[..., :4], sin[..., :4])
    rotary(*(x.double() for x in (q, k, cos, sin)))
    rotary(q, k.bfloat16(), cos, sin)
    assert len(calls) == 7


def test_gradients_and_inputs_of_any_strides() -> None:
    """Recorded: what the launchers would refuse is made contiguous."""
    pytest.importorskip("triton", reason="triton is not installed")
    with recording():
        x = torch.zeros(4, 6, requires_grad=True)
        fused_layers._RmsNorm.apply(x.T, torch.ones(4), 1e-6, 0.0, True).sum().backward()
        heads = torch.zeros(1, 8, 3, 2, requires_grad=True)
        angles = torch.zeros(1, 8, 3).transpose(1, 2)
        fused_layers._Rotary.apply(heads.transpose(1, 3), angles, angles).sum().backward()
        fused_layers._GatedSilu.apply(x.T, x.T).sum().backward()
    assert x.grad is not None
    assert heads.grad is not None
