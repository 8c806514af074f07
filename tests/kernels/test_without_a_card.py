"""What works with neither a card nor the interpreter, and with no Triton at all; references, costs and tables."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from tolerances import TOLERANCES, relative_norm
from torch.utils.flop_counter import FlopCounterMode

from influence_fast.errors import ConfigError
from influence_fast.kernels import (
    flat_sketch,
    fp8_rows,
    gated_silu,
    project_flat,
    quantize_rows,
    rms_norm,
    rotary,
    segment_bilinear,
    segment_outer,
    skinny_project,
    token_loss,
)
from influence_fast.kernels.fp8_rows import LOWEST_CAPABILITY
from influence_fast.kernels.runtime import INTERPRETED, WHY_NO_TRITON, unavailable
from influence_fast.kernels.segments import Segments
from influence_fast.philox import sjlt_map
from influence_fast.products import inner_products as products
from influence_fast.row_codec import to_int8

LENGTHS = [3, 64, 1, 129]


def _normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_relative_norm_is_what_it_says() -> None:
    expected = torch.tensor([3.0, 4.0])
    assert relative_norm(expected, expected) == 0.0
    assert relative_norm(torch.tensor([3.0, 4.5]), expected) == pytest.approx(0.1)
    assert relative_norm(torch.tensor([3.0, float("nan")]), expected) == float("inf")
    with pytest.raises(ValueError, match="shapes differ"):
        relative_norm(torch.ones(2, 1), expected)
    with pytest.raises(ValueError, match="say nothing"):
        relative_norm(torch.zeros(2), torch.zeros(2))


@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
def test_tolerances_pass_one_rounding_and_catch_a_lost_term(dtype: torch.dtype) -> None:
    values = _normal(257)
    assert relative_norm(values.to(dtype), values) < TOLERANCES[dtype] / 2
    lost = values.clone()
    lost[int(values.abs().median(dim=0).indices)] = 0.0
    assert relative_norm(lost.to(dtype), values) > TOLERANCES[dtype]


def test_a_bfloat16_sum_is_outside_the_bfloat16_tolerance() -> None:
    values = _normal(64, 4096).abs().to(torch.bfloat16)
    running = torch.zeros(64, dtype=torch.bfloat16)
    for column in values.T:
        running += column
    assert relative_norm(running, values.double().sum(1)) > TOLERANCES[torch.bfloat16]


@pytest.mark.skipif(INTERPRETED, reason="under the interpreter CPU tensors are taken")
def test_cpu_tensors_are_refused_with_the_remedy() -> None:
    with pytest.raises(ConfigError, match=r"need CUDA tensors, not 'cpu'.*TRITON_INTERPRET=1.*`reference`"):
        skinny_project.skinny_project(torch.zeros(2, 3), torch.zeros(3, 4))


@pytest.mark.skipif(INTERPRETED or bool(WHY_NO_TRITON), reason="no card would be asked")
def test_cards_too_old_for_a_kernel_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, refused in (((7, 5), True), ((8, 6), True), ((8, 9), False), ((9, 0), False), ((12, 0), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, capability=capability: capability)
        assert ("is below 8.9" in unavailable("cuda", LOWEST_CAPABILITY)) == refused
        assert ("is below 8.0" in unavailable("cuda")) == (capability < (8, 0))


def test_all_but_a_launch_works_without_triton() -> None:
    program = """
import sys
class NoTriton:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ModuleNotFoundError("No module named 'triton'")
sys.meta_path.insert(0, NoTriton())
import torch
from influence_fast.errors import ConfigError
from influence_fast.kernels import project_flat, segment_bilinear, segment_outer, skinny_project
from influence_fast.kernels.runtime import unavailable
assert "install influence-fast[kernels]" in unavailable("cuda")
x, w = torch.ones(2, 3), torch.ones(3, 4)
assert torch.equal(skinny_project.reference(x, w), torch.full((2, 4), 3.0))
cu = torch.tensor([0, 2], dtype=torch.int32)
assert torch.equal(segment_outer.reference(x[:, None], x[:, None], cu), torch.full((1, 1, 3, 3), 2.0))
try:
    skinny_project.skinny_project(x, w)
except ConfigError as error:
    assert "triton cannot be imported" in str(error)
    print("refused")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "refused", done.stderr


def test_segments_cut_examples_from_their_own_start() -> None:
    segments = Segments.from_lengths([3, 70, 32, 65], chunk=32)
    assert segments.cu_seqlens.tolist() == [0, 3, 73, 105, 170]
    assert segments.chunk_start.tolist() == [0, 3, 35, 67, 73, 105, 137, 169]
    assert segments.chunk_stop.tolist() == [3, 35, 67, 73, 105, 137, 169, 170]
    assert segments.chunk_example.tolist() == [0, 1, 1, 1, 2, 3, 3, 3]
    assert segments.chunk_slot.tolist() == [-1, 0, 1, 2, -1, 3, 4, 5]
    assert segments.first_chunk.tolist() == [0, 1, 4, 5, 8]
    assert segments.split_example.tolist() == [1, 3]
    assert segments.split_slot.tolist() == [0, 3, 6]
    assert (segments.examples, segments.tokens, segments.chunks, segments.slots) == (4, 170, 8, 6)
    tables = [table for name in Segments.__slots__ if isinstance(table := getattr(segments, name), torch.Tensor)]
    assert len(tables) == 8
    assert all(table.data_ptr() % 16 == 0 for table in tables)
    same = Segments.from_cu_seqlens(segments.cu_seqlens, chunk=32)
    assert torch.equal(same.chunk_start, segments.chunk_start)


def test_outer_reference_is_the_sum_of_outer_products() -> None:
    segments = Segments.from_lengths(LENGTHS)
    left, right = _normal(segments.tokens, 2, 5), _normal(segments.tokens, 2, 3)
    made = segment_outer.reference(left, right, segments, scale=torch.tensor([2.0, 0.5]))
    expected = torch.zeros(4, 2, 5, 3, dtype=torch.float64)
    token = 0
    for e, length in enumerate(LENGTHS):
        for _ in range(length):
            for m, scale in enumerate((2.0, 0.5)):
                expected[e, m] += scale * torch.outer(left[token, m], right[token, m])
            token += 1
    assert relative_norm(made, expected) < 1e-12


def test_bilinear_reference_is_the_inner_product_with_the_exact_gradient() -> None:
    segments = Segments.from_lengths(LENGTHS)
    g, h, queries = _normal(segments.tokens, 7), _normal(segments.tokens, 4), _normal(3, 7, 4)
    exact = segment_outer.reference(g[:, None], h[:, None], segments)[:, 0]
    expected = torch.einsum("edr,qdr->eq", exact, queries) * 0.5
    assert relative_norm(segment_bilinear.reference(g, h, queries, segments, scale=0.5), expected) < 1e-12


@pytest.mark.parametrize("kind", ["sjlt", "rademacher"])
def test_flat_reference_keeps_inner_products_in_the_mean(kind: str) -> None:
    """Mean over seeds of <S a, S b> against <a, b>, within five deviations of the mean."""
    n, width = 300, 64
    segments = Segments.from_lengths([2, 3])
    g, h = _normal(5, 9), _normal(5, 4)
    exact = segment_outer.reference(g[:, None], h[:, None], segments).flatten(1)
    true = float(exact[0] @ exact[1])
    products = []
    for seed in range(n):
        sketch = project_flat.FlatSketch.of(kind, seed, "m/row", 9, 4, width)
        rows = project_flat.reference(g, h, segments, sketch)
        products.append(float(rows[0] @ rows[1]))
    variance = float(exact[0].square().sum() * exact[1].square().sum() + true**2) / width
    assert abs(sum(products) / n - true) < 5 * (variance / n) ** 0.5


def test_quantized_reference_has_the_bits_of_the_store() -> None:
    rows = _normal(40, 77).float() * torch.logspace(-44, 38, 40)[:, None]
    rows[7] = 0
    made, scales = to_int8(rows)
    expected = products.quantize_rows(rows)
    assert torch.equal(made, expected[0])
    assert torch.equal(scales, expected[1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_the_e4m3_reference_takes_the_nearest_number(dtype: torch.dtype) -> None:
    """Of all there are, by float64; up to the last place of the fp32 quotient, and halves to even."""
    rows = (_normal(30, 77) * torch.logspace(-36, 36, 30, dtype=torch.float64)[:, None]).to(dtype)
    rows[7] = 0
    values, scales = fp8_rows.reference(rows)
    torch.testing.assert_close(scales.double(), rows.abs().amax(1, keepdim=True).double().clamp_min(1e-37) / 448)
    numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    numbers = numbers[numbers.isfinite()]
    exact = rows.double() / scales.double()
    least = (exact[:, :, None] - numbers).abs().amin(2)
    assert bool(((values.double() - exact).abs() <= least + 2.0**-22 * exact.abs()).all())
    whole = torch.tensor([[448.0, 17.0, 19.0, -21.0, 2.0**-10, 3 * 2.0**-10]], dtype=dtype)
    assert fp8_rows.reference(whole)[0].double().tolist() == [[448.0, 16.0, 20.0, -20.0, 0.0, 2.0**-8]]


def test_scatter_rounds_never_meet() -> None:
    """Within one tile and one round every bucket is named at most once, and the rounds are as few as can be."""
    d, r, width = 200, 20, 50
    sketch = project_flat.FlatSketch.of("sjlt", 0, "m/row", d, r, width)
    bucket, _ = sjlt_map(0, "m/row", d * r, width)
    block_d, block_r = flat_sketch.tile_sides(d, r)
    tile = (torch.arange(d)[:, None] // block_d) * -(-r // block_r) + torch.arange(r)[None, :] // block_r
    tile = tile.flatten()
    for t in range(int(tile.max()) + 1):
        inside = tile == t
        pairs = torch.stack([bucket[inside], sketch.rounds[inside].long()], dim=1)
        assert pairs.unique(dim=0).shape[0] == int(inside.sum())
        assert int(sketch.tile_rounds[t]) == int(bucket[inside].bincount().max())


def test_the_reference_of_the_loss_is_pytorchs_cross_entropy() -> None:
    logits = _normal(5, 11).requires_grad_()
    targets, weights = torch.tensor([0, 3, 10, 3, 7]), torch.tensor([1.0, 0.0, 0.5, 2.0, 1.0], dtype=torch.float64)
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    losses, gradient = token_loss.reference(logits.detach(), targets, weights)
    torch.testing.assert_close(losses, expected.detach())
    torch.testing.assert_close(gradient, torch.autograd.grad((expected * weights).sum(), logits)[0])


def test_the_references_of_a_layer_are_what_models_compute() -> None:
    x, w = _normal(5, 12), _normal(12)
    expected = torch.nn.functional.rms_norm(x, (12,), w, 1e-3)
    torch.testing.assert_close(rms_norm.reference(x, w, 1e-3), expected)
    torch.testing.assert_close(rms_norm.reference(x, w - 1, 1e-3, offset=1.0), expected)
    torch.testing.assert_close(gated_silu.reference(x, 2 * x), 2 * x * x / (1 + torch.exp(-x)))
    # a rotation keeps the length of every pair, and the product of two heads depends on their distance alone
    angles = torch.arange(5, dtype=torch.float64)[:, None] * torch.tensor([1.0, 0.1, 0.01], dtype=torch.float64)
    cos, sin = (part.repeat(1, 2)[None] for part in (angles.cos(), angles.sin()))
    heads = _normal(1, 2, 1, 6).expand(1, 2, 5, 6)
    turned = rotary.reference(heads, cos, sin)
    torch.testing.assert_close(turned.norm(dim=-1), heads.norm(dim=-1))
    products = torch.einsum("td,sd->ts", turned[0, 0], turned[0, 1])
    torch.testing.assert_close(products[1:, 1:], products[:-1, :-1])
    assert not torch.allclose(products[0], products[1])


def test_costs_count_the_flops_of_the_references() -> None:
    segments = Segments.from_lengths([3, 64, 130])  # a product of one token is no matrix product to the counter
    tokens = segments.tokens
    x, w = _normal(tokens, 33), _normal(33, 12)
    with FlopCounterMode(display=False) as counter:
        skinny_project.reference(x, w)
    assert skinny_project.cost(tokens, 33, 12).flops == counter.get_total_flops()
    left, right = _normal(tokens, 2, 5), _normal(tokens, 2, 3)
    with FlopCounterMode(display=False) as counter:
        segment_outer.reference(left, right, segments)
    assert segment_outer.cost(tokens, 3, 2, 5, 3).flops == counter.get_total_flops()


def test_costs_count_each_operand_once() -> None:
    assert skinny_project.cost(10, 7, 4, itemsize=2, out_itemsize=4).bytes == 10 * 7 * 2 + 7 * 4 * 2 + 10 * 4 * 4
    assert segment_outer.cost(10, 3, 2, 5, 4, row_itemsize=4).bytes == 10 * 2 * 9 * 2 + 3 * 2 * 20 * 4
    assert segment_bilinear.cost(10, 7, 4, 3, 2) == (2 * (10 + 6) * 28, 10 * 11 * 2 + 3 * 28 * 4)
    assert quantize_rows.cost(10, 7) == (70, 10 * 7 * 5 + 10 * 4)
    assert fp8_rows.cost(10, 7) == (70, 10 * 7 * 3 + 10 * 4)
    assert token_loss.cost(10, 7) == (4 * 70, 10 * 7 * 2 * 2 + 10 * 16)
    assert rms_norm.cost(10, 7).bytes == (2 * 70 + 7) * 2
    assert rms_norm.cost(10, 7, backward=True).bytes == (3 * 70 + 7) * 2
    assert gated_silu.cost(70).bytes == 3 * 70 * 2
    assert gated_silu.cost(70, backward=True, itemsize=4).bytes == 5 * 70 * 4
    assert rotary.cost(10, 3, 8).bytes == 2 * (10 * 3 * 8 + 10 * 8) * 2
    assert project_flat.cost("sjlt", 10, 3, 7, 4, 64).flops == 2 * 10 * 28 + 2 * 3 * 28
    assert project_flat.cost("rademacher", 10, 3, 7, 4, 64).flops == 2 * 10 * 28 + 2 * 3 * 28 * 64
