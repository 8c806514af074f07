"""Adapters beside one plain LoRA pair: several active ones, biases of B, DoRA, other initialisations; other kinds."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model

import influence_fast as inf
from influence_fast.errors import ModelError
from influence_fast.gradients.lora import LayoutEntry
from influence_fast.gradients.projection import Projection, random_matrix
from influence_fast.gradients.row_sketch import RowSketch
from influence_fast.gradients.streaming import stream_influence

PROJECTIONS = {
    "exact": None,
    "one_sided": Projection(dim=6),
    "one_sided to a width": Projection(dim=6, width=64),
    "kron": Projection("kron", dim=3),
    "sjlt": Projection("sjlt", width=64),
    "rademacher": Projection("rademacher", width=40),
}
LENGTHS = (4, 13, 7)
TARGETS = ["q_proj", "k_proj", "down_proj"]


def make_examples(lengths: tuple[int, ...] = LENGTHS) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(0, 320, (n,), generator=generator) for n in lengths]
    return [{"id": f"ex-{i}", "input_ids": one, "labels": one} for i, one in enumerate(ids)]


def settle(model: Any, dtype: torch.dtype = torch.float64) -> Any:
    """The model in `dtype`, no parameter of an adapter at zero or, of a magnitude, at the weight's norm."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            noise = torch.randn(parameter.shape, generator=generator) * 0.2
            parameter.data = parameter.data * (1 + noise) if "magnitude" in name else noise
    return model.to(dtype).eval()


def make_model(tiny_model: Callable[..., Any], kind: str = "qwen2", **config: Any) -> Any:
    settings = {"r": 3, "lora_alpha": 6, "target_modules": TARGETS, "lora_dropout": 0.1} | config
    return settle(get_peft_model(tiny_model(kind), LoraConfig(**settings), autocast_adapter_dtype=False))


def make_two(tiny_model: Callable[..., Any], *, alpha: int = 4, **second: Any) -> Any:
    """Adapters "default" on q, k and down, and "b" on q, v and down, both active."""
    first = LoraConfig(r=3, lora_alpha=6, target_modules=TARGETS)
    model = get_peft_model(tiny_model("llama", attention_bias=True), first, autocast_adapter_dtype=False)
    targets = ["q_proj", "v_proj", "down_proj"]
    other = LoraConfig(r=2, lora_alpha=alpha, target_modules=targets, **second)
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
    parameters = [parameter_of(model, entry).requires_grad_() for entry in inf.gradient_layout(model)]
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
    layout = inf.gradient_layout(model)
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
        left, right = {"lora_A": (rank, "in"), "lora_B": ("out", rank)}.get(factor, ("out", ""))
        block = exact[:, entry.columns].unflatten(1, entry.shape)
        if left != rank or projection.kind == "kron":
            block = random_matrix(projection, f"{key}/{left}", entry.shape[0]).double().T @ block
        if right and (right != rank or projection.kind == "kron"):
            block = block @ random_matrix(projection, f"{key}/{right}", entry.shape[1]).double()
        blocks.append(block.flatten(1))
    rows = torch.cat(blocks, dim=1)
    if projection.width is None:
        return rows
    return RowSketch(inf.gradient_layout(model, replace(projection, width=None)), projection, rows.device)(rows)


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
    for count in (2, 3):
        assert relative(stream_influence(model, examples, exact[:count]), exact @ exact[:count].T) < 1e-10


CASES: dict[str, Callable[[Callable[..., Any]], Any]] = {
    "two adapters": lambda tiny: make_two(tiny),
    "two adapters of two scalings": lambda tiny: make_two(tiny, alpha=10, use_rslora=True),
    "two adapters, one with a bias": lambda tiny: make_two(tiny, alpha=10, lora_bias=True),
    "lora_bias": lambda tiny: make_model(tiny, lora_bias=True),
    "lora_bias over biases": lambda tiny: settle(
        get_peft_model(
            tiny("llama", attention_bias=True),
            LoraConfig(r=2, target_modules="all-linear", lora_bias=True),
            autocast_adapter_dtype=False,
        )
    ),
    "DoRA": lambda tiny: make_model(tiny, use_dora=True),
    "DoRA over biases": lambda tiny: settle(
        get_peft_model(
            tiny("llama", attention_bias=True, mlp_bias=True),
            LoraConfig(r=2, target_modules="all-linear", use_dora=True, use_rslora=True),
            autocast_adapter_dtype=False,
        )
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_rows_of_other_adapters_are_autograds(name: str, tiny_model: Callable[..., Any]) -> None:
    check_all_rows(CASES[name](tiny_model))
