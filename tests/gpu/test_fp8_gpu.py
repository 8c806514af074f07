"""8-bit products on a card, at numbers of tokens and lengths of sums that its libraries refuse by themselves."""

from __future__ import annotations

import pytest
import torch

from influence_fast.gradients import fp8

pytestmark = [
    pytest.mark.requires_gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def random(*shape: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).cuda()


def wide(rows: fp8.Rows) -> torch.Tensor:
    return rows.values.double() * rows.scales.double()


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("tokens", "d_in", "d_out"),
    [(1, 48, 32), (5, 48, 32), (33, 48, 32), (1000, 48, 32), (33, 18_944, 512), (256, 18_944, 512), (257, 512, 18_944)],
)
def test_a_card_multiplies_any_number_of_tokens(tokens: int, d_in: int, d_out: int, dtype: torch.dtype) -> None:
    if torch.cuda.get_device_capability() < fp8.LOWEST_CAPABILITY:
        pytest.skip("this card has no 8-bit products")
    x, weight = random(tokens, d_in, seed=0, dtype=dtype), random(d_out, d_in, seed=1, dtype=dtype)
    g = random(tokens, d_out, seed=2, dtype=dtype)
    eight = fp8.Fp8Weight(weight, fp8.Product.on(weight.device, dtype))
    rounded_x, rounded_g = fp8.to_fp8(x), fp8.to_fp8(g)
    assert torch.equal(wide(rounded_x).cpu(), wide(fp8.to_fp8(x.cpu())))
    assert relative(eight.forward(rounded_x, None), wide(rounded_x) @ wide(eight.rows).T) < 4e-3
    assert relative(eight.backward(rounded_g), wide(rounded_g) @ wide(eight.columns).T) < 4e-3
