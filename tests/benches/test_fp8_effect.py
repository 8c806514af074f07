"""The emulation of 8-bit products: its rounding, its products against plain autograd, and the real path beside it."""

from __future__ import annotations

import pytest
import torch

from benches.fp8_effect import (
    ITS_EMULATION,
    OURS,
    VOCABULARY,
    RoundedLinear,
    bf16,
    effect,
    fp8,
    markov,
)
from benches.models import qwen2_model, with_lora


@pytest.mark.parametrize(("dtype", "step"), [(torch.float8_e4m3fn, 2.0**-4), (torch.float8_e5m2, 2.0**-3)])
def test_rounding_is_to_nearest_within_the_format_and_keeps_the_largest(dtype: torch.dtype, step: float) -> None:
    rows = torch.randn(7, 50, generator=torch.Generator().manual_seed(0)) * torch.logspace(-8, 8, 7)[:, None]
    rows[3] = 0
    rounded = fp8(dtype)(rows)
    largest = rows.abs().amax(dim=1)
    assert torch.allclose(rounded.abs().amax(dim=1), largest, rtol=1e-6)
    normal = rows.abs() > largest[:, None] * 2.0**-9  # below, e4m3 has fewer bits
    error = (rounded - rows).abs()[normal] / rows.abs()[normal]
    assert step / 4 < float(error.max()) <= step * (1 + 1e-6)
    assert not rounded[3].any()


def test_products_of_operands_that_are_not_rounded_are_autograds() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 7, generator=generator, dtype=torch.float64, requires_grad=True)
    weight, bias, g = (torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((3, 7), (3,), (2, 5, 3)))
    expected = torch.nn.functional.linear(x, weight, bias)
    (grad,) = torch.autograd.grad(expected, x, g)
    made = RoundedLinear.apply(x, weight, bias, lambda rows: rows, lambda rows: rows)
    torch.testing.assert_close(made, expected)
    torch.testing.assert_close(torch.autograd.grad(made, x, g)[0], grad)
    rough = RoundedLinear.apply(x.float(), weight.float(), bias.float(), bf16, fp8(torch.float8_e5m2))
    assert 0 < float((rough - expected).norm() / expected.norm()) < 0.01


def test_the_real_path_stands_beside_its_emulation() -> None:
    torch.manual_seed(0)
    model = with_lora(qwen2_model(VOCABULARY, layers=1, width=64).eval(), 4)
    found = effect(model, markov(5, seed=1), markov(2, seed=2))
    assert list(found) == ["bf16", "fp8, gradients e5m2", ITS_EMULATION, OURS]
    real = found[OURS]
    assert found["bf16"]["gradient error"] < real["gradient error"] < 0.1
    assert real["from its emulation"] < 0.2 * real["gradient error"]
