"""8-bit products on a card, at numbers of tokens and lengths of sums that its libraries refuse by themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import influence_fast as inf
from influence_fast.gradients.engine import GradientEngine
from influence_fast.gradients.model import fp8
from influence_fast.gradients.model.backends import TORCH, TRITON
from influence_fast.gradients.per_example import packs_for
from influence_fast.kernels.fp8_rows import LOWEST_CAPABILITY
from influence_fast.kernels.runtime import INTERPRETED, unavailable

pytestmark = [
    pytest.mark.requires_gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
WHY_NO_KERNEL = "TRITON_INTERPRET=1 is set" if INTERPRETED else unavailable("cuda", LOWEST_CAPABILITY)
WITH_TRITON = [False, pytest.param(True, marks=pytest.mark.skipif(bool(WHY_NO_KERNEL), reason=WHY_NO_KERNEL))]


@pytest.fixture(autouse=True)
def _a_card_with_8_bit_products() -> None:
    if torch.cuda.get_device_capability() < LOWEST_CAPABILITY:
        pytest.skip("this card has no 8-bit products")


def random(*shape: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).cuda()


def wide(rows: fp8.Rows) -> torch.Tensor:
    return (rows.values.double() * rows.scales.double())[: rows.count]


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("triton", WITH_TRITON, ids=["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("tokens", "d_in", "d_out"),
    [(1, 48, 32), (5, 48, 32), (33, 48, 32), (1000, 48, 32), (33, 18_944, 512), (256, 18_944, 512), (257, 512, 18_944)],
)
def test_a_card_multiplies_any_number_of_tokens(
    tokens: int, d_in: int, d_out: int, dtype: torch.dtype, triton: bool
) -> None:
    x, weight = random(tokens, d_in, seed=0, dtype=dtype), random(d_out, d_in, seed=1, dtype=dtype)
    g = random(tokens, d_out, seed=2, dtype=dtype)
    backend = TRITON if triton else TORCH
    eight = fp8.Fp8Weight(weight, fp8.Product.on(weight.device, dtype), backend)
    rounded_x, rounded_g = fp8.to_fp8(x, backend), fp8.to_fp8(g, backend)
    for made, matrix in ((rounded_x, x), (rounded_g, g), (eight.rows, weight), (eight.columns, weight.T)):
        on_cpu = fp8.to_fp8(matrix.cpu())
        assert torch.equal(made.scales[: made.count].cpu(), on_cpu.scales)
        assert torch.equal(*(rows.values[: made.count].view(torch.uint8).cpu() for rows in (made, on_cpu)))
    assert relative(eight.forward(rounded_x, None), wide(rounded_x) @ wide(eight.rows).T) < 4e-3
    assert relative(eight.backward(rounded_g), wide(rounded_g) @ wide(eight.columns).T) < 4e-3


@pytest.mark.parametrize("triton", WITH_TRITON, ids=["torch", "triton"])
def test_rows_are_8_bit_ones(tiny_lora: Callable[..., Any], triton: bool) -> None:
    model = tiny_lora("qwen2", intermediate_size=64)
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(5, 90, (n,), generator=generator) for n in (2, 7, 31, 13, 20)]
    examples = [{"id": f"e{i}", "input_ids": each, "labels": each} for i, each in enumerate(ids)]
    exact = inf.per_example_gradients(model, examples).double()
    on_cpu = inf.per_example_gradients(model, examples, precision="fp8").double()
    backend = "triton" if triton else "torch"
    found = inf.per_example_gradients(model.cuda(), examples, precision="fp8", backend=backend).double().cpu()
    error = relative(on_cpu, exact)  # 0.11
    assert 0.5 * error < relative(found, exact) < 1.5 * error
    # products may be rounded to bf16 there, which moves some numbers to another e4m3 one
    assert relative(found, on_cpu) < 0.5 * error


@pytest.mark.skipif(bool(WHY_NO_KERNEL), reason=WHY_NO_KERNEL)
def test_recorded_steps_have_8_bit_products_too(tiny_lora: Callable[..., Any]) -> None:
    model = tiny_lora("qwen2", hidden_size=64, intermediate_size=64, num_attention_heads=4).to("cuda", torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(5, 90, (40,), generator=generator) for _ in range(40)]
    examples = [{"input_ids": each, "labels": each} for each in ids]
    rows = {}
    for recorded in (False, True):
        with GradientEngine(model, None, precision="fp8", backend="triton", cuda_graphs=recorded) as engine:
            rows[recorded] = torch.cat([engine.run(pack)[0] for pack in packs_for(engine, examples, 320)])
            assert bool(engine.runner.graphs and engine.runner.graphs.most_tokens) == recorded
    exact = inf.per_example_gradients(model, examples, max_tokens=320).double()
    # a number rounded otherwise may move an e4m3 one
    assert relative(rows[True], rows[False].double()) < 0.5 * relative(rows[False], exact)
