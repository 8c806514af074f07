"""Queries of a store come from the adapters that its rows came from: by number, name, order and layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

import influence_fast as inf
from influence_fast.data.fingerprints import adapter_hash
from influence_fast.errors import StoreError
from influence_fast.gradients.rows.projection import Projection
from influence_fast.store.queries import query_gradients

KINDS = {
    "exact": None,
    "one_sided": Projection(dim=4),
    "kron": Projection("kron", dim=3),
    "width": Projection(width=48),
}


def examples() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": (ids := torch.randint(3, 60, (n,), generator=generator)), "labels": ids} for n in (4, 6)]


def with_adapters(tiny_model: Any, names: tuple[str, ...], values: tuple[int, ...]) -> Any:
    """A model with adapters of these names, whose factors are drawn by `values`, all active in their order."""
    settings: dict[str, Any] = {"r": 2, "target_modules": ["q_proj", "v_proj"]}
    model: Any = get_peft_model(tiny_model("qwen2"), LoraConfig(**settings), adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, LoraConfig(**settings))
    for name, value in zip(names, values, strict=True):
        generator = torch.Generator().manual_seed(value)
        for key, parameter in model.named_parameters():
            if f".{name}." in key:
                parameter.data = torch.randn(parameter.shape, generator=generator)
    model.base_model.set_adapter(list(names))
    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("names", "values"), [(("a", "b"), (0, 1)), (("two", "one"), (1, 0))])
def test_renamed_or_reordered_adapters_are_refused(
    tmp_path: Path, tiny_model: Any, kind: str, names: tuple[str, ...], values: tuple[int, ...]
) -> None:
    model = with_adapters(tiny_model, ("one", "two"), (0, 1))
    store = inf.build_store(tmp_path / "s", model, examples(), inf.RowSpec.of(KINDS[kind], dtype="fp32"))
    same = with_adapters(tiny_model, ("one", "two"), (0, 1))
    assert torch.allclose(query_gradients(store, same, examples()), store.rows(), rtol=1e-5, atol=1e-6)
    with pytest.raises(StoreError, match="adapter"):
        query_gradients(store, with_adapters(tiny_model, names, values), examples())


@pytest.mark.parametrize("active", [["one", "one"], ["two"], []])
def test_another_choice_of_one_layer_is_another_adapter(tiny_model: Any, active: list[str]) -> None:
    model = with_adapters(tiny_model, ("one", "two"), (0, 1))
    model.set_adapter("one")
    before = adapter_hash(model)
    layer = next(module for module in model.modules() if hasattr(module, "lora_A"))
    layer._active_adapter = active
    assert adapter_hash(model) != before


def test_one_adapter_by_another_name_is_the_same(tmp_path: Path, tiny_model: Any) -> None:
    store = inf.build_store(
        tmp_path / "s",
        with_adapters(tiny_model, ("one",), (0,)),
        examples(),
        inf.RowSpec.of(KINDS["kron"], dtype="fp32"),
    )
    rows = query_gradients(store, with_adapters(tiny_model, ("other",), (0,)), examples())
    assert torch.allclose(rows, store.rows(), rtol=1e-5, atol=1e-6)
