"""The cases of tests/kernels as real launches, and the shapes that only a card can carry."""

from __future__ import annotations

import kernel_checks as checks
import pytest
import torch
from kernel_cases import Case, cases, normal
from tolerances import TOLERANCES, relative_norm

from influence_fast.kernels import project_flat as flat
from influence_fast.kernels import segment_bilinear as bilinear
from influence_fast.kernels import segment_outer as outer
from influence_fast.kernels import skinny_project as skinny
from influence_fast.kernels.fp8_rows import LOWEST_CAPABILITY, fp8_rows
from influence_fast.kernels.fp8_rows import reference as fp8_reference
from influence_fast.kernels.runtime import INTERPRETED, unavailable
from influence_fast.kernels.segments import Segments

WHY_NOT = "TRITON_INTERPRET=1 is set, so nothing would be launched" if INTERPRETED else unavailable("cuda")
pytestmark = [
    pytest.mark.requires_gpu,
    pytest.mark.skipif(bool(WHY_NOT), reason=f"kernels need a GPU: {WHY_NOT}"),
]

CUDA = torch.device("cuda")
BF16 = torch.bfloat16
# One 16k-token trace, a prime, a single token, chunk and its neighbours.
LENGTHS = [16_384, 1, 4_099, 511, 512, 513]


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.id)
def test_kernel_agrees_with_float64(case: Case) -> None:
    actual, expected = case.run(CUDA)
    assert actual.dtype == case.stored
    assert relative_norm(actual, expected) < TOLERANCES[case.stored]


@pytest.mark.parametrize("check", checks.CHECKS, ids=lambda check: check.__name__)
def test_property(check: checks.Check) -> None:
    if "e4m3" in check.__name__ and (why := unavailable(CUDA, LOWEST_CAPABILITY)):
        pytest.skip(why)
    check(CUDA)


@pytest.mark.parametrize("refusal", checks.REFUSALS, ids=lambda refusal: refusal.id)
def test_bad_input_is_refused_by_name(refusal: checks.Refusal) -> None:
    with pytest.raises(refusal.error, match=refusal.message):
        refusal.call(CUDA)


@pytest.mark.parametrize("columns", [16, 32, 64, 96, 128, 256])
@pytest.mark.parametrize("features", [896, 3584, 18_944])
def test_skinny_project_at_the_widths_of_models(features: int, columns: int) -> None:
    x = normal(1_031, features, dtype=BF16, device=CUDA)
    w = normal(columns, features, dtype=BF16, device=CUDA, seed=1).T
    expected = x.double() @ w.double()
    whole = skinny.skinny_project(x, w, out_dtype=torch.float32, split=False)
    assert relative_norm(whole, expected) < TOLERANCES[torch.float32]
    assert torch.equal(whole, skinny.skinny_project(x, w, out_dtype=torch.float32, split=True))
    assert torch.equal(whole[7:8], skinny.skinny_project(x[7:8], w, out_dtype=torch.float32))
    assert relative_norm(skinny.skinny_project(x, w), expected) < TOLERANCES[BF16]


@pytest.mark.parametrize("dtype", [BF16, torch.float32], ids=str)
@pytest.mark.parametrize("features", [512, 896, 3584, 18_944])
def test_e4m3_rows_at_the_widths_of_models(features: int, dtype: torch.dtype) -> None:
    if why := unavailable(CUDA, LOWEST_CAPABILITY):
        pytest.skip(why)
    matrix = normal(1_031, features, dtype=dtype, device=CUDA)
    values, scales = fp8_rows(matrix, 1_040)
    expected = fp8_reference(matrix.cpu(), 1_040)
    assert torch.equal(scales.cpu(), expected[1])
    assert torch.equal(values.cpu().view(torch.uint8), expected[0].view(torch.uint8))


def test_segment_outer_over_a_long_trace() -> None:
    segments = Segments.from_lengths(LENGTHS, device=CUDA)
    both = normal(segments.tokens, 14, 32, dtype=BF16, device=CUDA)
    offsets = torch.arange(14, device=CUDA) * 256
    rows = torch.full((len(LENGTHS), 14 * 256), float("nan"), device=CUDA)
    outer.segment_outer(both[:, :, :16], both[:, :, 16:], segments, rows, offsets)
    expected = outer.reference(both[:, :, :16].double(), both[:, :, 16:].double(), segments)
    assert relative_norm(rows, expected.flatten(1)) < TOLERANCES[torch.float32]


def test_segment_bilinear_over_a_long_trace() -> None:
    segments = Segments.from_lengths(LENGTHS, device=CUDA)
    g = normal(segments.tokens, 3584, dtype=BF16, device=CUDA)
    h = normal(segments.tokens, 16, dtype=BF16, device=CUDA, seed=1)
    queries = normal(20, 3584, 16, dtype=torch.float32, device=CUDA, seed=2)
    made = bilinear.segment_bilinear(g, h, queries, segments)
    exact = outer.reference(g.double()[:, None], h.double()[:, None], segments)[:, 0]
    expected = torch.einsum("edr,qdr->eq", exact, queries.double())
    assert relative_norm(made, expected) < TOLERANCES[torch.float32]


@pytest.mark.parametrize("kind", ["sjlt", "rademacher"])
def test_project_flat_over_a_long_trace(kind: str) -> None:
    segments = Segments.from_lengths(LENGTHS, device=CUDA)
    g = normal(segments.tokens, 3584, dtype=BF16, device=CUDA)
    h = normal(segments.tokens, 16, dtype=BF16, device=CUDA, seed=1)
    sketch = flat.FlatSketch.of(kind, 0, "m/row", 3584, 16, 8192, device=CUDA)
    rows = torch.full((len(LENGTHS), 8192), float("nan"), device=CUDA)
    flat.project_flat(g, h, segments, sketch, rows)
    first = rows.clone()
    exact = outer.reference(g.double()[:, None], h.double()[:, None], segments).flatten(1)
    expected = flat.sketch_rows(exact, sketch)
    assert relative_norm(rows, expected) < TOLERANCES[torch.float32]
    for _ in range(5):
        assert torch.equal(first, flat.project_flat(g, h, segments, sketch, rows))
