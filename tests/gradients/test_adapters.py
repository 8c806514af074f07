"""Adapters beside one plain LoRA pair: several active ones, biases of B, DoRA, other first factors."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

import influence_fast as inf
from influence_fast.data.fingerprints import weight_hashes
from influence_fast.errors import ModelError
from influence_fast.gradients.rows.layout import LayoutEntry
from influence_fast.gradients.rows.projection import Projection, random_matrix
from influence_fast.gradients.rows.row_sketch import RowSketch
from influence_fast.gradients.streaming import stream_influence
from influence_fast.gradients.targets import gradient_layout
from influence_fast.training.adapters import attach_adapter

PROJECTIONS = {
    "exact": None,
    "one_sided to a width": Projection(dim=6, width=64),
    "kron": Projection("kron", dim=3),
    "sjlt": Projection("sjlt", width=64),
}
LENGTHS = (4, 13, 7)
TARGETS = ["q_proj", "k_proj", "down_proj"]


def make_examples(lengths: tuple[int, ...] = LENGTHS) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(0, 320, (n,), generator=generator) for n in lengths]
    ids[1][2:5] = torch.tensor([7, 7, 9])  # once more than once, and the padding of one case
    return [{"id": f"ex-{i}", "input_ids": one, "labels": one} for i, one in enumerate(ids)]


def settle(model: Any, dtype: torch.dtype = torch.float64) -> Any:
    """The model in `dtype`, no parameter of an adapter at zero or, of a magnitude, at the weight's norm."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            noise = torch.randn(parameter.shape, generator=generator) * 0.2
            parameter.data = parameter.data * (1 + noise) if "magnitude" in name else noise
    return model.to(dtype).eval()


def make_model(tiny_model: Callable[..., Any], kind: str = "llama", **config: Any) -> Any:
    """One adapter over a layer whose linears have biases, but for those of the MLP."""
    token = {"pad_token_id": config.pop("pad_token_id")} if "pad_token_id" in config else {}
    base = tiny_model(kind, num_hidden_layers=1, attention_bias=True, **token)
    settings = {"r": 3, "lora_alpha": 6, "target_modules": TARGETS, "lora_dropout": 0.1} | config
    return settle(get_peft_model(base, LoraConfig(**settings), autocast_adapter_dtype=False))


def make_two(tiny_model: Callable[..., Any], *, alpha: int = 4, **second: Any) -> Any:
    """Adapters "default" on q, k and down, and "b" on q, v and down, both active."""
    model = make_model(tiny_model)
    settings = {"r": 2, "lora_alpha": alpha, "target_modules": ["q_proj", "v_proj", "down_proj"]} | second
    other = LoraConfig(**settings)
    model.add_adapter("b", other, autocast_adapter_dtype=False)
    model.base_model.set_adapter(["b", "default"])
    return settle(model)


def parameter_of(model: Any, entry: LayoutEntry) -> torch.Tensor:
    factor, _, adapter = entry.factor.partition(".")
    layer, adapter = model.get_submodule(entry.module), adapter or "default"
    if factor == "lora_bias":
        return layer.lora_B[adapter].bias
    found = getattr(layer, factor)[adapter]
    return found if isinstance(found, torch.Tensor) else found.weight


def by_autograd(model: Any, reduction: str = "mean") -> torch.Tensor:
    """[E, k] rows of the layout, an example at a time through the peft model as it stands."""
    model = copy.deepcopy(model)
    parameters = [parameter_of(model, entry).requires_grad_() for entry in gradient_layout(model)]
    rows = []
    for example in make_examples():
        ids = example["input_ids"]
        loss = F.cross_entropy(model(input_ids=ids[None]).logits[0, :-1], ids[1:], reduction=reduction)
        rows.append(torch.cat([grad.flatten() for grad in torch.autograd.grad(loss, parameters)]))
    return torch.stack(rows)


def projected(model: Any, exact: torch.Tensor, projection: Projection | None) -> torch.Tensor:
    """What `projection` makes of exact rows, by its matrices written out."""
    if projection is None:
        return exact
    layout = gradient_layout(model)
    if projection.flat:
        sketch, out = RowSketch(layout, projection, exact.device), exact.new_zeros(len(exact), projection.width)
        for row, whole in zip(out, exact, strict=True):
            for number, entry in enumerate(layout):
                sketch.add(row, number, whole[entry.columns])
        return out
    blocks = []
    for entry in layout:
        key = entry.module.removeprefix("base_model.model.")
        factor, dot, adapter = entry.factor.partition(".")
        rank = f"rank{dot}{adapter}"
        pair = {"A": (rank, "in"), "B": ("out", rank)}
        left, right = pair.get(factor.rpartition("_")[2], ("out", ""))
        block = exact[:, entry.columns].unflatten(1, entry.shape)
        if left != rank or projection.kind == "kron":
            block = random_matrix(projection, f"{key}/{left}", entry.shape[0]).double().T @ block
        if right and (right != rank or projection.kind == "kron"):
            block = block @ random_matrix(projection, f"{key}/{right}", entry.shape[1]).double()
        blocks.append(block.flatten(1))
    rows = torch.cat(blocks, dim=1)
    if projection.width is None:
        return rows
    return RowSketch(gradient_layout(model, replace(projection, width=None)), projection, rows.device)(rows)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float(((found - expected).norm(dim=1) / expected.norm(dim=1)).max())


def check_all_rows(model: Any) -> None:
    """Compare rows of every projection, packed means and single sums, and streamed scores with autograd."""
    examples = make_examples()
    exact = by_autograd(model)
    for name, projection in PROJECTIONS.items():
        expected = projected(model, exact, projection)
        found = inf.per_example_gradients(model, examples, projection=projection)
        assert relative(found, expected) < 1e-10, name
    summed = inf.per_example_gradients(model, examples, loss_reduction="sum", max_tokens=1)
    assert relative(summed, by_autograd(model, "sum")) < 1e-10
    assert relative(stream_influence(model, examples, exact), exact @ exact.T) < 1e-10


CASES: dict[str, Callable[[Callable[..., Any]], Any]] = {
    "two adapters": make_two,
    "two adapters of two scalings": lambda tiny: make_two(tiny, alpha=10, use_rslora=True, lora_bias=True),
    "lora_bias": lambda tiny: make_model(tiny, lora_bias=True),
    "embedding": lambda tiny: make_model(tiny, "qwen2", target_modules=["embed_tokens", "v_proj"], pad_token_id=7),
    "embeddings of two adapters": lambda tiny: make_two(tiny, alpha=10, target_modules=["embed_tokens", "q_proj"]),
    "DoRA": lambda tiny: make_model(tiny, use_dora=True, use_rslora=True),
}


@pytest.mark.parametrize("name", CASES)
def test_rows_of_other_adapters_are_autograds(name: str, tiny_model: Callable[..., Any]) -> None:
    check_all_rows(CASES[name](tiny_model))


def test_factors_of_several_adapters_follow_the_parameters(tiny_model: Callable[..., Any]) -> None:
    """One that changes one layer alone is named there too, and a single active one has the rows that it has alone."""
    model = make_two(tiny_model, lora_bias=True)
    layout = gradient_layout(model)
    names = [f"{entry.module}.{entry.factor}" for entry in layout]
    expected = []
    for name, _ in model.named_parameters():
        if "lora_" in name:
            name = name.replace("lora_B.b.bias", "lora_bias.b").removesuffix(".weight")
            expected.append(name)
    assert names == expected
    assert [e.factor for e in layout if "v_proj" in e.module] == ["lora_A.b", "lora_B.b", "lora_bias.b"]
    examples = make_examples()
    model.set_adapter("default")
    alone = inf.per_example_gradients(model, examples)
    assert {entry.factor for entry in gradient_layout(model)} == {"lora_A", "lora_B"}
    model.delete_adapter("b")
    assert torch.equal(inf.per_example_gradients(model, examples), alone)


def test_an_adapter_activated_twice_counts_twice(tiny_model: Callable[..., Any]) -> None:
    model = make_model(tiny_model)
    model.base_model.set_adapter(["default", "default"])
    assert relative(inf.per_example_gradients(model, make_examples()), by_autograd(model)) < 1e-10


@pytest.mark.parametrize("config", [{"use_dora": True}, {"lora_bias": True}], ids=["DoRA", "lora_bias"])
def test_bf16_rows_are_close_where_nothing_is_folded(tiny_model: Callable[..., Any], config: dict[str, Any]) -> None:
    model = make_model(tiny_model, **config)
    exact, examples = by_autograd(model), make_examples()
    for projection, most in ((None, 0.05), (PROJECTIONS["kron"], 0.05)):
        rows = inf.per_example_gradients(copy.deepcopy(model).bfloat16(), examples, projection=projection)
        expected = projected(model, exact, projection)
        assert float((rows.double() - expected).norm() / expected.norm()) < most


@pytest.mark.parametrize("start", ["pissa", "olora", "eva", "orthogonal", "gaussian"])
def test_other_first_factors_are_plain_lora(start: str, tiny_model: Callable[..., Any]) -> None:
    config = LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=start, rank_pattern={"k_proj": 2})
    model = get_peft_model(tiny_model(num_hidden_layers=1), config).double().eval()
    assert relative(inf.per_example_gradients(model, make_examples()), by_autograd(model)) < 1e-10


def test_dora_beside_another_active_adapter_is_refused(tiny_model: Callable[..., Any]) -> None:
    model = make_two(tiny_model, use_dora=True)
    with pytest.raises(ModelError, match=r"'?b'? \(DoRA\) would scale the others' outputs too: activate one at a time"):
        gradient_layout(model)


@pytest.mark.parametrize("mark", ["lora_B.bias", "lora_magnitude_vector"])
def test_stored_biases_and_magnitudes_are_loaded_or_missed(
    mark: str, tiny_model: Callable[..., Any], tmp_path: Path
) -> None:
    model = make_model(tiny_model, lora_bias="bias" in mark, use_dora="magnitude" in mark)
    model.save_pretrained(tmp_path)
    base = tiny_model("llama", torch.float64, num_hidden_layers=1, attention_bias=True)
    loaded = attach_adapter(copy.deepcopy(base), str(tmp_path), "").double()
    assert weight_hashes(loaded) == weight_hashes(model)
    examples = make_examples()
    assert torch.equal(inf.per_example_gradients(loaded, examples), inf.per_example_gradients(model, examples))
    parameter = next(p for n, p in loaded.named_parameters() if mark.replace("B.", "B.default.") in n)
    parameter.data[0] += 1
    assert weight_hashes(loaded)[0] == weight_hashes(model)[0]
    assert weight_hashes(loaded)[1] != weight_hashes(model)[1]
    stored = load_file(tmp_path / "adapter_model.safetensors")
    del stored[next(key for key in stored if mark in key)]
    save_file(stored, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ModelError, match=rf"has no {re.escape(mark)} for the module 'model\.layers"):
        attach_adapter(base, str(tmp_path), "")
