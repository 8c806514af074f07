"""Inner products of CUDA tensors (scored by PyTorch on their device) against the CPU's."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from influence_fast.errors import NumericError
from influence_fast.inner_products import inner_products, quantize_rows

pytestmark = [
    pytest.mark.requires_gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("kind", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("normalize", [False, True], ids=["dot", "cosine"])
def test_fused_results(kind: str, normalize: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(301, 517, generator=generator)
    queries = torch.randn(37, 517, generator=generator)
    scales = None
    if kind == "bf16":
        rows = rows.bfloat16()
    elif kind == "int8":
        rows, scales = quantize_rows(rows)
    asked = {"normalize": normalize, "groups": [[0, 36], list(range(20))], "topk": 7, "ranks": True}
    want = inner_products(rows, queries, row_scales=scales, **asked)
    on_card = None if scales is None else scales.cuda()
    got = inner_products(rows.cuda(), queries.cuda(), row_scales=on_card, **asked)
    assert got.group_means.device.type == "cuda"
    scale = want.group_means.abs().max().item()
    np.testing.assert_allclose(got.group_means.cpu(), want.group_means, atol=1e-5 * scale)
    # Scores that differ in rounding may swap neighbours: at most a place or two of 301.
    np.testing.assert_allclose(got.mean_ranks.cpu(), want.mean_ranks, atol=1.0)
    np.testing.assert_allclose(got.topk[0].cpu(), want.topk[0], rtol=1e-4, atol=1e-5 * scale)


def test_non_finite_rows_are_named() -> None:
    rows = torch.randn(20, 9, device="cuda")
    rows[3, 2] = torch.nan
    with pytest.raises(NumericError, match="rows 3 "):
        inner_products(rows, torch.randn(2, 9, device="cuda"), ranks=True)
