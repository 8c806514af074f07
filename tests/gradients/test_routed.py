"""LoRA on routed experts against torch.autograd, one example at a time through the plain peft model, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from routed_cases import (
    EXPERTS,
    BatchedExperts,
    Expert,
    ListedExperts,
    by_autograd,
    fused_model,
    make_examples,
    model_of,
    relative,
)
from torch import nn

import influence_fast as inf
from influence_fast.gradients.engine import GradientEngine
from influence_fast.gradients.find_lora import find_lora_linears
from influence_fast.gradients.model.routed_modules import routed_modules
from influence_fast.gradients.rows.layout import layout_of
from influence_fast.gradients.rows.projection import Projection, random_matrix
from influence_fast.gradients.rows.row_sketch import RowSketch
from influence_fast.gradients.step.autograd_parameters import AutogradParameters, SplitModule
from influence_fast.gradients.step.routed import RoutedExperts, Routing
from influence_fast.gradients.targets import gradient_layout

EXACT = 1e-10


class Turned(Expert):
    """An MLP to which the tokens come last first."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.flip(1)).flip(1)


def parts_of(model: Any) -> tuple[set[type], bool]:
    """How parameters are computed, and whether examples are packed."""
    with GradientEngine(model, None) as engine:
        return {type(part) for part in engine.opened.parameters}, engine.packs_are_separate


@pytest.mark.parametrize("kind", EXPERTS)
def test_rows_of_fused_experts_beside_attention_are_exact(kind: str) -> None:
    model = fused_model(kind, ("o_proj", "q_proj", "q_b_proj"))
    examples = make_examples()
    wanted = by_autograd(model, examples)
    assert relative(inf.per_example_gradients(model, examples, max_tokens=1), wanted) < EXACT
    # DeepSeek's router multiplies in float32, whatever the model's dtype, and its bits depend on the batch
    packed = 1e-6 if kind == "deepseek_v3" else EXACT
    assert relative(inf.per_example_gradients(model, examples), wanted) < packed
    assert parts_of(model)[0] == {RoutedExperts}


@pytest.mark.parametrize("parameter", ["experts.gate_up_proj", "experts.down_proj"])
def test_rows_of_one_fused_parameter_and_nothing_else_are_exact(parameter: str) -> None:
    model = fused_model("mixtral", parameters=(parameter,))
    examples = make_examples()
    assert parts_of(model) == ({RoutedExperts}, True)
    rows = inf.per_example_gradients(model, examples, loss_reduction="sum")
    assert relative(rows, by_autograd(model, examples, "sum")) < EXACT


def test_all_linear_of_peft_with_its_routers_is_exact_and_packed() -> None:
    model = fused_model("qwen3_moe", "all-linear", ())
    assert parts_of(model) == ({RoutedExperts, SplitModule}, True)
    examples = make_examples()
    assert relative(inf.per_example_gradients(model, examples), by_autograd(model, examples)) < EXACT


@pytest.fixture(scope="module")
def mixed() -> tuple[Any, list[dict[str, Any]], torch.Tensor]:
    """A model with LoRA on experts and on attention, examples, and their exact rows."""
    model, examples = fused_model("mixtral", ("q_proj",)), make_examples()
    return model, examples, inf.per_example_gradients(model, examples)


@pytest.mark.parametrize("kind", ["one_sided", "kron"])
def test_projected_rows_are_projections_of_exact_ones(kind: str, mixed: Any) -> None:
    model, examples, exact = mixed
    linears, projection = find_lora_linears(model), Projection(kind, dim=4)
    layout = layout_of(linears)
    parts = []
    for linear, (a, b) in zip(linears, zip(layout[::2], layout[1::2], strict=True), strict=True):
        r_in, r_out, rank = (
            random_matrix(projection, f"{linear.key}/{side}", size).double()
            for side, size in (("in", linear.d_in), ("out", linear.d_out), ("rank", linear.r))
        )
        rank = rank if kind == "kron" else torch.eye(linear.r, dtype=torch.float64)
        d_a, d_b = (exact[:, entry.columns].view(-1, *entry.shape) for entry in (a, b))
        parts += [(rank.T @ d_a @ r_in).flatten(1), (r_out.T @ d_b @ rank).flatten(1)]
    wanted = torch.cat(parts, dim=1)
    rows = inf.per_example_gradients(model, examples, projection=projection)
    assert relative(rows, wanted) < EXACT
    short = Projection(kind, dim=4, width=32)
    sketched = RowSketch(layout_of(linears, projection), short, torch.device("cpu"))(wanted)
    assert relative(inf.per_example_gradients(model, examples, projection=short), sketched) < EXACT


def test_flat_sketches_are_those_of_exact_rows(mixed: Any) -> None:
    model, examples, exact = mixed
    projection = Projection("sjlt", width=32)
    wanted = RowSketch(layout_of(find_lora_linears(model)), projection, torch.device("cpu"))(exact)
    assert relative(inf.per_example_gradients(model, examples, projection=projection), wanted) < EXACT


@pytest.mark.parametrize("queries", [2, 6])  # that ride on the products, and that do not
def test_streamed_scores_are_products_with_exact_rows(queries: int, mixed: Any) -> None:
    model, examples, exact = mixed
    asked = torch.randn(queries, exact.shape[1], dtype=torch.float64)
    assert relative(inf.stream_influence(model, examples, asked), exact @ asked.T) < EXACT


@pytest.mark.parametrize("ordered", [True, False])
def test_rows_of_listed_experts_are_exact_one_at_a_time(ordered: bool) -> None:
    model = model_of(lambda: ListedExperts(ordered), target_modules="all-linear")
    examples = make_examples()
    wanted = by_autograd(model, examples)
    assert relative(inf.per_example_gradients(model, examples), wanted) < EXACT
    assert parts_of(model) == (set(), False)
    never = [e.columns for e in gradient_layout(model) if ".experts.3." in e.module]
    assert never
    assert all(not wanted[:, columns].any() for columns in never)
    asked = torch.randn(2, wanted.shape[1], dtype=torch.float64)
    assert relative(inf.stream_influence(model, examples, asked), wanted @ asked.T) < EXACT
    projection = Projection(dim=4)
    rows = inf.per_example_gradients(model, examples, projection=projection)
    entry = next(e for e in gradient_layout(model) if e.factor == "lora_A" and ".experts.0.up" in e.module)
    mine = next(e for e in gradient_layout(model, projection) if e[:2] == entry[:2])
    r_in = random_matrix(projection, f"{entry.module.removeprefix('base_model.model.')}/in", 16).double()
    d_a = wanted[:, entry.columns].view(-1, *entry.shape)
    assert relative(rows[:, mine.columns], (d_a @ r_in).flatten(1)) < EXACT


def test_a_linear_that_sees_the_pack_in_another_order_is_exact() -> None:
    model = model_of(lambda: Turned(16, 10), target_modules=["up_proj", "q_proj"])
    examples = make_examples()
    assert parts_of(model) == (set(), False)
    assert relative(inf.per_example_gradients(model, examples), by_autograd(model, examples)) < EXACT


def test_parameters_of_an_unknown_module_are_exact_by_autograd() -> None:
    model = model_of(BatchedExperts, target_parameters=["mlp.weights"], target_modules=["q_proj"])
    examples = make_examples()
    assert parts_of(model) == ({AutogradParameters}, False)
    held = {name: (p.requires_grad, p.grad) for name, p in model.named_parameters()}
    rows, wanted = inf.per_example_gradients(model, examples), by_autograd(model, examples)
    assert relative(rows, wanted) < EXACT
    asked = torch.randn(2, rows.shape[1], dtype=torch.float64)
    assert relative(inf.stream_influence(model, examples, asked), wanted @ asked.T) < EXACT
    assert {name: (p.requires_grad, p.grad) for name, p in model.named_parameters()} == held


def test_a_linears_weight_as_parameter_is_that_linears_lora() -> None:
    model = model_of(nn.Identity, target_parameters=["q_proj.weight"])
    assert parts_of(model) == (set(), True)
    examples = make_examples()
    assert relative(inf.per_example_gradients(model, examples), by_autograd(model, examples)) < EXACT


def test_a_row_does_not_depend_on_the_experts_of_its_pack() -> None:
    model, examples = fused_model("olmoe"), make_examples((3, 17, 2, 9))
    whole = inf.per_example_gradients(model, examples)
    some = inf.per_example_gradients(model, examples[1:3])
    assert relative(some, whole[1:3]) < EXACT


def test_an_expert_whose_forward_is_another_goes_by_autograd(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fused_model("mixtral")
    experts = model.base_model.model.model.layers[0].mlp.experts.get_base_layer()
    plain = type(experts).forward
    monkeypatch.setattr(experts, "forward", lambda x, *rest: plain(experts, 2 * x, *rest), raising=False)
    assert parts_of(model) == ({RoutedExperts, AutogradParameters}, False)
    examples = make_examples((5, 2))
    wanted = []  # a copy of the model would have the forward of the first
    factors = [p for name, p in model.named_parameters() if "lora_" in name]
    for example in examples:
        logits = model(input_ids=example["input_ids"][None]).logits[0, :-1]
        loss = nn.functional.cross_entropy(logits, example["labels"][1:])
        wanted.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, factors)]))
    assert relative(inf.per_example_gradients(model, examples), torch.stack(wanted)) < EXACT


def test_choices_of_no_expert_are_dropped() -> None:
    routing = Routing.of(torch.tensor([[1, 3], [0, 1], [3, 3]]), experts=3)
    assert routing.counts == [1, 2, 0]
    assert routing.tokens.tolist() == [1, 0, 1]
    assert routing.order.tolist() == [2, 0, 3]


def test_experts_are_the_linears_of_one_list() -> None:
    names = [f"layers.{i}.experts.{e}.up" for i in range(2) for e in range(3)] + ["layers.0.gate", "vision.0.q"]
    assert routed_modules(names, strange={1}, uncalled={4, 7}) == {0, 1, 2, 3, 4, 5}
    assert routed_modules(names, strange=set(), uncalled={7}) == set()


def test_triton_kernels_sum_routed_tokens(interpreted: Callable[[str], Any]) -> None:
    assert interpreted("interpreted_routed.py") < 1e-5
