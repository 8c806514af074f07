"""Modules of other factors than lora_A and lora_B in every reducer, sketch and preconditioner."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from factor_cases import PROJECTIONS, exact_rows, make_calls, make_modules, projected_rows, run

import influence_fast as inf
from influence_fast.errors import ModelError
from influence_fast.gradients import engine, streaming
from influence_fast.gradients.find_lora import find_lora_linears
from influence_fast.gradients.model.lora import LoraLinear
from influence_fast.gradients.rows import factors
from influence_fast.gradients.rows.factors import Columns, Side, blocks_of, sides_of, tokens_of
from influence_fast.gradients.rows.layout import LayoutEntry, layout_of, layout_width
from influence_fast.gradients.rows.projection import SIDED_KINDS, Projection, random_matrix
from influence_fast.gradients.step.reduction import FullReducer, ProjectedReducer
from influence_fast.gradients.streaming import StreamReducer, stream_influence
from influence_fast.influence import adam, preconditioners
from influence_fast.influence.ekfac import fit_ekfac
from influence_fast.influence.row_access import module_blocks
from influence_fast.influence.sketch_fitting import leading


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def rows_of(projection: Projection | None, modules: list[LoraLinear]) -> torch.Tensor:
    kind = ProjectedReducer if projection is not None and projection.kind in SIDED_KINDS else FullReducer
    return run(kind(modules, layout_of(modules, projection), projection), make_calls(modules))


@pytest.mark.parametrize("name", PROJECTIONS)
def test_rows_of_one_two_and_four_factors(name: str) -> None:
    modules, projection = make_modules(), PROJECTIONS[name]
    expected = projected_rows(modules, exact_rows(modules, make_calls(modules)), projection)
    assert relative(rows_of(projection, modules), expected) < 1e-6  # the random columns are fp32


def test_layout_lists_each_factor_in_its_projected_shape() -> None:
    modules = make_modules()
    shapes = {
        "exact": [(4, 7), (9, 4), (9, 1), (3, 1), (11, 7)],
        "one_sided": [(4, 6), (6, 4), (6, 1), (3, 1), (6, 6)],
        "kron": [(5, 5), (5, 5), (5, 1), (3, 1), (5, 5)],
        "sjlt": [(4, 7), (9, 4), (9, 1), (3, 1), (11, 7)],
    }
    for name, expected in shapes.items():
        layout = layout_of(modules[1:3], PROJECTIONS[name])
        assert [entry.shape for entry in layout] == expected
        assert [entry.factor for entry in layout] == ["lora_A", "lora_B", "bias.default", "sums", "weight"]
        sizes = [a * b for a, b in expected]
        assert [entry.offset for entry in layout] == [sum(sizes[:i]) for i in range(len(sizes))]


@pytest.mark.parametrize(("plain", "count", "way"), [(False, 2, "ride"), (False, 6, "form"), (True, 2, "form")])
def test_streamed_scores_of_other_factors(plain: bool, count: int, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a plain weight there is no narrow side that a query could ride on."""
    modules = make_modules()
    calls = make_calls(modules)
    if not plain:
        kept = [0, 1, 3]
        calls = [(kept.index(n), *rest) for n, *rest in calls if n in kept]
        modules = [modules[n] for n in kept]
    layout = layout_of(modules)
    queries = torch.randn(count, layout_width(layout), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = exact_rows(modules, calls) @ queries.T
    for chunk in (1 << 24, 1):
        monkeypatch.setattr(streaming, "_CHUNK", chunk)
        reducer = StreamReducer(modules, layout, queries)
        assert reducer.way == way
        assert relative(run(reducer, calls), expected) < 1e-12


def test_ekfac_and_its_sketch_over_blocks_of_every_shape() -> None:
    modules, projection = make_modules(), PROJECTIONS["one_sided"]
    layout, rows = layout_of(modules, projection), rows_of(projection, modules)
    fitted = fit_ekfac(lambda: [rows], layout, 0.1)
    for entry, (left, right), values in zip(layout, fitted.bases, fitted.eigenvalues, strict=True):
        block = rows[:, entry.columns].unflatten(1, entry.shape)
        second = (left.T @ block @ right).square().mean(dim=0)
        torch.testing.assert_close(values, second + 0.1 * second.mean())
        inverse = left @ ((left.T @ block @ right) / values) @ right.T
        assert relative(fitted.apply(rows)[:, entry.columns], inverse.flatten(1)) < 1e-10
    narrow = Projection(dim=6, width=50)
    sketch = leading(fitted, narrow)
    found = rows_of(replace(narrow, sketch=sketch), modules)
    assert relative(found, fitted.whiten(rows)[:, sketch.chosen]) < 1e-5  # its bases are fp32


@pytest.mark.parametrize("name", [n for n in preconditioners.PRECONDITIONERS if n not in ("none", "cosine")])
def test_every_preconditioner_takes_modules_of_any_factors(name: str) -> None:
    modules, projection = make_modules(), PROJECTIONS["one_sided"]
    layout, rows = layout_of(modules, projection), rows_of(projection, modules)
    blocks = module_blocks(layout)
    assert [end - start for start, end in blocks] == [57, 57, 36, 24, 36]
    fitted = preconditioners.fit(name, lambda: [rows], blocks, factors=layout)
    applied = fitted.apply(rows)
    assert applied.shape == rows.shape
    assert bool(applied.isfinite().all())


@pytest.mark.parametrize("kind", SIDED_KINDS)
@pytest.mark.parametrize(("factor", "shape"), [("weight", (9, 7)), ("bias", (9, 1)), ("lora_A.two", (4, 7))])
def test_projected_moments_of_other_factors(kind: str, factor: str, shape: tuple[int, int]) -> None:
    projection = Projection(kind, dim=5)
    moment = torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = moment
    left, right = sides_of(factor)
    if left is Side.WIDE or kind == "kron":
        expected = random_matrix(projection, "left", shape[0]).double().square().T @ expected
    if right is Side.WIDE:
        expected = expected @ random_matrix(projection, "right", shape[1]).double().square()
    found = adam._projected(moment, LayoutEntry("m", factor, shape, 0), projection)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_what_has_no_known_sides_or_place_is_refused() -> None:
    with pytest.raises(ModelError, match=r"lora_E: no gradient is known .*lora_A"):
        sides_of("lora_E")
    modules = make_modules()
    layout = layout_of(modules)
    for other in (layout[:-1], layout[1:], [*layout, layout[-1]], layout_of(modules, PROJECTIONS["one_sided"])):
        with pytest.raises(ValueError, match=r"is not at|no module has"):
            blocks_of(modules, other, None)
    with pytest.raises(ValueError, match="no tokens here"):
        tokens_of(Side.WIDE, torch.zeros(3, 2))
    assert tokens_of(Columns(1, 2), torch.arange(6).view(3, 2)).flatten().tolist() == [1, 3, 5]
    assert set(factors.SIDES) >= {"lora_A", "lora_B", "weight", "bias"}


def plain(linear: LoraLinear) -> LoraLinear:
    """The linear without its adapter: r = 0."""
    return replace(linear, a=linear.a[:0], b=linear.b[:, :0], scaling=1.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_linear_without_an_adapter_has_the_row_of_its_weight(
    tiny_model: Callable[..., Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole engine, fused and not; the adapter is fresh, so that the model is the one without it."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"])
    model = get_peft_model(tiny_model("qwen2", dtype), config, autocast_adapter_dtype=False)
    linears = [plain(m) for m in find_lora_linears(model)]
    monkeypatch.setattr(engine, "find_linears", lambda model, projection: linears)
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(0, 320, (n,), generator=generator) for n in (4, 13)]
    examples = [{"input_ids": i, "labels": i} for i in ids]
    expected = []
    for i in ids:
        weights = [m.layer.get_base_layer().weight.requires_grad_() for m in linears]
        loss = torch.nn.functional.cross_entropy(model(input_ids=i[None]).logits[0, :-1], i[1:])
        expected.append(torch.cat([g.double().flatten() for g in torch.autograd.grad(loss, weights)]))
    limit = 1e-10 if dtype == torch.float64 else 2e-2
    exact = torch.stack(expected)
    assert relative(inf.per_example_gradients(model, examples), exact) < limit
    projection = Projection(dim=6)
    projected = projected_rows(linears, exact, projection)
    assert relative(inf.per_example_gradients(model, examples, projection=projection), projected) < max(limit, 1e-6)
    assert relative(stream_influence(model, examples, exact), exact @ exact.T) < limit
