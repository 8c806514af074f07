"""LoRA layers that a forward on text does not call, or calls with other tokens than the text's."""

from __future__ import annotations

import copy
import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.functional import pad

import influence_fast as inf
from benches.model_zoo import by_autograd, examples_for, tiny, with_adapter
from influence_fast.errors import ModelError
from influence_fast.gradients.engine import GradientEngine
from influence_fast.gradients.find_lora import find_lora_linears
from influence_fast.gradients.model.backends import TORCH
from influence_fast.gradients.rows.projection import Projection
from influence_fast.gradients.step.input_groups import InputGroup
from influence_fast.gradients.step.reduction import random_columns
from influence_fast.gradients.targets import gradient_layout


def _product(mlp: Any, x: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x))
    return result


def _in_two_streams(mlp: Any, x: torch.Tensor) -> torch.Tensor:
    return _product(mlp, torch.cat([x, x.flip(-1), x * 0.5], dim=1)).unflatten(1, (3, -1)).sum(dim=1)


def _of_the_token_before(mlp: Any, x: torch.Tensor) -> torch.Tensor:
    return pad(_product(mlp, x[:, :-1]), (0, 0, 1, 0)) if x.shape[1] > 1 else x * 0


def _not_at_all(mlp: Any, x: torch.Tensor) -> torch.Tensor:
    return x * 0.1


class _Called(torch.nn.Module):
    """An MLP that another function of its linears takes the place of."""

    def __init__(self, mlp: Any, function: Any) -> None:
        super().__init__()
        self.mlp, self.function = mlp, function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.function(self.mlp, x)
        return result


def _model(*functions: Any) -> Any:
    base = tiny("llama")
    for layer, function in zip(base.model.layers, functions, strict=False):
        layer.mlp = _Called(layer.mlp, function)
    return with_adapter(base)


def _error(rows: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((rows - wanted).norm() / wanted.norm())


def test_layers_that_see_other_tokens_have_autograds_rows() -> None:
    model = _model(_in_two_streams, _of_the_token_before)
    examples = examples_for(model, (12, 2, 3))
    with GradientEngine(model, None) as engine:
        assert not engine.packs_are_separate
    wanted = by_autograd(model, examples)
    assert _error(inf.per_example_gradients(model, examples), wanted) < 1e-12
    queries = torch.randn(2, wanted.shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert _error(inf.stream_influence(model, examples, queries), wanted @ queries.T) < 1e-12


def test_projected_rows_of_such_layers_are_the_rows_projected() -> None:
    model = _model(_in_two_streams, _of_the_token_before)
    examples = examples_for(model, (9, 2))
    projection = Projection(kind="one_sided", dim=5)
    exact, rows = (inf.per_example_gradients(model, examples, projection=kind) for kind in (None, projection))
    layouts = [gradient_layout(model, kind) for kind in (None, projection)]
    sides = [side for linear in find_lora_linears(model) for side in random_columns(projection, linear, TORCH)]
    for wide, narrow, side in zip(*layouts, sides, strict=True):
        factors = exact[:, wide.columns].view(-1, *wide.shape)
        wanted = factors @ side.double() if wide.factor == "lora_A" else side.double().T @ factors
        assert _error(rows[:, narrow.columns], wanted.flatten(1)) < 1e-12


def test_layers_that_text_never_calls_have_zero_rows(caplog: pytest.LogCaptureFixture) -> None:
    model = _model(_not_at_all)
    examples = examples_for(model)
    with caplog.at_level(logging.WARNING):
        rows = inf.per_example_gradients(model, examples)
    assert "never calls the LoRA layers" in caplog.text
    assert _error(rows, by_autograd(model, examples)) < 1e-12
    unused = [entry for entry in gradient_layout(model) if ".layers.0.mlp." in entry.module]
    assert len(unused) == 6
    assert not any(rows[:, entry.columns].any() for entry in unused)
    with GradientEngine(model, None) as engine:
        assert engine.packs_are_separate


def test_a_layer_first_called_by_a_longer_text_is_in_its_row() -> None:
    """The probe of two tokens does not reach it; it must not be left at zero for that."""
    model = _model(lambda mlp, x: _product(mlp, x) if x.shape[1] > 4 else x * 0.1)
    examples = examples_for(model)
    rows = inf.per_example_gradients(model, examples, max_tokens=1)
    assert _error(rows, by_autograd(model, examples)) < 1e-12
    reached = next(entry for entry in gradient_layout(model) if ".layers.0.mlp." in entry.module)
    assert rows[0, reached.columns].any()
    assert not rows[1, reached.columns].any()


def test_a_model_whose_text_reaches_no_lora_layer_is_refused() -> None:
    base = tiny("llama")
    base.vision = copy.deepcopy(base.model.layers[0].mlp)
    model = with_adapter(base, r".*vision\.up_proj")
    with pytest.raises(ModelError, match=r"vision\.up_proj: .*calls no LoRA layer.*name layers of the text decoder"):
        inf.per_example_gradients(model, examples_for(model))


def test_other_tokens_in_a_pack_of_several_examples_are_refused() -> None:
    group: Any = SimpleNamespace(
        tokens=12, reducer=SimpleNamespace(examples=2), members=[SimpleNamespace(name="layers.0.experts.1")]
    )
    x = torch.ones(7, 3)
    with pytest.raises(ModelError, match=r"layers\.0\.experts\.1: sees 7 tokens of a pack of 12.*max_tokens=1"):
        InputGroup.add(group, 0, x, x, x, x)
