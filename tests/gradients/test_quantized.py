"""Rows over quantised bases against autograd through the same model, one example at a time."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import influence_fast as inf
from influence_fast.errors import ConfigError, ModelError
from influence_fast.gradients.engine import GradientEngine
from influence_fast.gradients.find_lora import find_lora_linears
from influence_fast.gradients.model import quantized
from influence_fast.gradients.rows.projection import Projection
from influence_fast.gradients.sharded import shard_model
from influence_fast.gradients.targets import gradient_layout

KINDS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4 twice": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
    "int8 with outliers": {"load_in_8bit": True, "llm_int8_threshold": 1.5},
    "nf4 but k": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "llm_int8_skip_modules": ["k_proj", "lm_head"]},
}
EXAMPLES = [
    {"input_ids": ids, "labels": torch.where(torch.arange(n) < n // 3, -100, ids)}
    for n in (2, 23, 9)
    for ids in [torch.randint(5, 300, (n,), generator=torch.Generator().manual_seed(n))]
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_model: Any) -> Path:
    """A tiny model whose biases are no zeros, on disk."""
    path, model = tmp_path_factory.mktemp("quantized") / "model", tiny_model("qwen2", hidden_size=64)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(path)
    return path


def load(folder: Path, kind: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    settings = {**KINDS[kind], "bnb_4bit_compute_dtype": dtype, **changes}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=BitsAndBytesConfig(**settings))


def with_lora(base: Any, **config: Any) -> Any:
    torch.manual_seed(0)
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", **config))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model.eval()


def plain_rows(model: Any, examples: list[dict[str, torch.Tensor]] = EXAMPLES) -> torch.Tensor:
    """[E, k]: autograd through peft's own layers, an example at a time."""
    layers = [(model.get_submodule(entry.module), entry.factor) for entry in gradient_layout(model)]
    factors = [
        layer.lora_B["default"].bias if factor == "lora_bias" else getattr(layer, factor)["default"].weight
        for layer, factor in layers
    ]
    rows = []
    for example in examples:
        loss = model(input_ids=example["input_ids"][None], labels=example["labels"][None]).loss
        rows.append(torch.cat([grad.flatten() for grad in torch.autograd.grad(loss, factors)]))
    return torch.stack(rows)


def worst(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float(((found - wanted).double().norm(dim=1) / wanted.double().norm(dim=1)).max())


@pytest.mark.parametrize("kind", KINDS)
def test_rows_equal_autograd_through_the_quantised_model(folder: Path, kind: str) -> None:
    model = with_lora(load(folder, kind))
    wanted = plain_rows(model)
    before = [type(module) for module in model.modules()]
    rows = inf.per_example_gradients(model, EXAMPLES)
    assert worst(rows, wanted) < 1e-5
    if kind.startswith("int8"):  # an example's row does not depend on its pack
        alone = torch.cat([inf.per_example_gradients(model, [example]) for example in EXAMPLES])
        assert worst(alone, rows) < 1e-5
    assert worst(plain_rows(model), wanted) == 0  # all is put back
    assert [type(module) for module in model.modules()] == before


def test_biases_of_an_adapter_over_a_quantised_base(folder: Path) -> None:
    model = with_lora(load(folder, "nf4"), lora_bias=True)
    assert sum(entry.factor == "lora_bias" for entry in gradient_layout(model)) == 14
    assert worst(inf.per_example_gradients(model, EXAMPLES), plain_rows(model)) < 1e-5


def test_dora_over_a_quantised_base_is_refused(folder: Path) -> None:
    model = with_lora(load(folder, "nf4"), use_dora=True)
    with pytest.raises(
        ModelError, match=r"q_proj: DoRA \(use_dora\) needs the norms .* quantised here: load the model"
    ):
        gradient_layout(model)


def test_outliers_of_a_neighbour_change_int8_products(folder: Path) -> None:
    """What calls an example at a time are for: the library's own product of a pack is another."""
    base = load(folder, "int8 with outliers")
    layer, x = base.model.layers[0].mlp.up_proj, torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    x[5, 3] = 40.0
    apart = torch.cat([layer(x[:4]), layer(x[4:])])
    assert worst(layer(x), apart) > 1e-4
    with quantized.settled(base), quantized.attention.example_bounds([0, 4, 8]):
        assert torch.equal(layer(x[None])[0], apart)


def test_bf16_rows_carry_no_more_noise_than_unquantised_ones(folder: Path) -> None:
    plain = with_lora(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16))
    noise = worst(inf.per_example_gradients(plain, EXAMPLES), plain_rows(plain))
    for kind in ("nf4", "int8"):
        model = with_lora(load(folder, kind, torch.bfloat16))
        assert worst(inf.per_example_gradients(model, EXAMPLES), plain_rows(model)) < 3 * noise


def test_fp16_outliers_are_put_back_before_they_are_kept(folder: Path) -> None:
    """The library sets them to zero in x itself for a while, and plain autograd through it fails."""
    model = with_lora(load(folder, "int8 with outliers", torch.float16))
    with quantized.settled(model):
        wanted = plain_rows(model)
    assert worst(inf.per_example_gradients(model, EXAMPLES), wanted) < 0.05


def test_a_model_prepared_for_training_computes_between_its_dtypes(folder: Path) -> None:
    """Norms and activations in fp32, products in bf16, the layers recomputed in the backward."""
    base = load(folder, "nf4", torch.bfloat16)
    model = with_lora(prepare_model_for_kbit_training(base))
    with GradientEngine(model, None) as engine:
        assert engine.packs_are_separate
        assert engine.reducer.dtype == torch.float32
        assert {group.dtype for group in engine.opened.groups} == {torch.float32}
    assert worst(inf.per_example_gradients(model, EXAMPLES), plain_rows(model)) < 1e-2


@pytest.mark.parametrize("projection", [Projection(dim=8), Projection(dim=4, width=60)], ids=["wide", "sketch"])
def test_projected_rows_are_those_of_the_dequantised_model(folder: Path, projection: Projection) -> None:
    model, plain = with_lora(load(folder, "nf4")), with_lora(AutoModelForCausalLM.from_pretrained(folder))
    for quantised, linear in zip(model.modules(), plain.modules(), strict=True):
        if isinstance(quantised, bnb.nn.Linear4bit):
            weight = bnb.functional.dequantize_4bit(quantised.weight.data, quantised.weight.quant_state)
            linear.weight = nn.Parameter(weight)
    rows = [inf.per_example_gradients(one, EXAMPLES, projection=projection) for one in (model, plain)]
    assert worst(*rows) < 1e-5


def test_one_weight_at_a_time_is_dequantised_and_none_is_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_lora(load(folder, "nf4"))
    made: list[weakref.ref[torch.Tensor]] = []
    real = bnb.functional.dequantize_4bit

    def watched(*args: Any, **kwargs: Any) -> torch.Tensor:
        assert not any(ref() is not None for ref in made)
        weight = real(*args, **kwargs)
        made.append(weakref.ref(weight))
        return weight

    monkeypatch.setattr(bnb.functional, "dequantize_4bit", watched)
    inf.per_example_gradients(model, EXAMPLES)
    assert len(made) >= 14  # seven linears in each of two layers
    with GradientEngine(model, None) as engine:
        kept = sum(group.forward_weight.numel() for group in engine.opened.groups)
    assert kept == sum(member.r * member.d_in for member in find_lora_linears(model))


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_check_judges_what_steps_in_the_forward_by_its_backward(folder: Path, kind: str) -> None:
    """Products rounded to 8 or 16 bits inside a model in fp32, whose difference quotients are noise."""
    base = prepare_model_for_kbit_training(load(folder, kind, torch.bfloat16), use_gradient_checkpointing=False)
    found = inf.check_model(with_lora(base), EXAMPLES, count=2, directions=1)
    assert found.ok, found
    assert found["rows"].note.endswith("as their backward multiplies")


def test_a_wrong_product_is_refused_on_opening(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, right = with_lora(load(folder, "nf4")), quantized.QuantizedProduct.backward
    monkeypatch.setattr(quantized.QuantizedProduct, "backward", lambda self, g: 1.001 * right(self, g))
    with pytest.raises(ModelError, match=r"q_proj: the base layer is bitsandbytes 4-bit .*no product with one weight"):
        inf.per_example_gradients(model, EXAMPLES)


def test_fp8_precision_refuses_a_quantised_base(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"quantised already: .*q_proj.*use 'auto'"):
        inf.per_example_gradients(with_lora(load(folder, "nf4")), EXAMPLES, precision="fp8")


def test_quantised_weights_are_not_spread_over_processes(folder: Path) -> None:
    with pytest.raises(ModelError, match=r"quantised weights cannot be spread over processes \(FSDP\)"):
        shard_model(with_lora(load(folder, "nf4")))


# ---- layers of other libraries, as they are written ----------------------------------------------------------


class Packed(nn.Module):
    """A linear in 8 bits whose numbers lie in buffers, as in GPTQ and AWQ."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, None
        scales = linear.weight.detach().abs().amax(dim=1, keepdim=True) / 127
        self.register_buffer("qweight", (linear.weight.detach() / scales).round().to(torch.int8).T.contiguous())
        self.register_buffer("scales", scales)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ (self.qweight.to(x.dtype) * self.scales.T)


class Bent(Packed):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).tanh()


class Rounded(Packed):
    """Rounds its input too, as layers that quantise activations do: no gradient comes through."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward((x * 16).round().detach() / 16)


HQQLinear = type("HQQLinear", (Packed,), {"__module__": "hqq.core.quantize", "dequantize": lambda self: self.scales})


def with_bases(tiny_lora: Any, kind: type[Packed]) -> Any:
    model = tiny_lora("llama")
    for module in list(model.modules()):
        if isinstance(module._modules.get("base_layer"), nn.Linear):
            module.base_layer = kind(module.base_layer)
    return model


@pytest.mark.parametrize("kind", [Packed, HQQLinear], ids=["names no weight", "names a wrong weight"])
def test_an_unknown_layer_is_multiplied_by_its_own_backward(tiny_lora: Any, kind: type[Packed]) -> None:
    model = with_bases(tiny_lora, kind)
    assert worst(inf.per_example_gradients(model, EXAMPLES), plain_rows(model)) < 1e-5


@pytest.mark.parametrize(("kind", "why"), [(Bent, "no product with one weight"), (Rounded, "no gradient passes")])
def test_a_layer_that_is_no_product_is_refused(tiny_lora: Any, kind: type[Packed], why: str) -> None:
    with pytest.raises(ModelError, match=rf"layers\.0\.self_attn\.q_proj: .*{why}.*load the model unquantised"):
        inf.per_example_gradients(with_bases(tiny_lora, kind), EXAMPLES)


def test_a_4bit_layer_reordered_for_a_cpu_is_read_by_its_outputs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on CPUs with bf16 arithmetic after a forward without gradients: no weight and no gradient is to be had."""
    model = with_lora(load(folder, "nf4"))
    wanted = plain_rows(model)
    for layer in model.modules():
        if isinstance(layer, bnb.nn.Linear4bit):
            weight = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
            layer.weight.quant_state.packing_format_for_cpu = True
            bias = layer.bias
            layer.forward = lambda x, w=weight, b=bias: nn.functional.linear(x.detach(), w, b)
    assert worst(inf.per_example_gradients(model, EXAMPLES), wanted) < 1e-5
