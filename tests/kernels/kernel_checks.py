"""Properties that hold bit for bit, and inputs that must be refused; run in the interpreter and on a card alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from kernel_cases import normal
from peft import LoraConfig, get_peft_model
from tolerances import TOLERANCES, relative_norm
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from influence_fast.data.packing import pack_examples
from influence_fast.errors import ConfigError, DataError
from influence_fast.gradients.engine import GradientEngine
from influence_fast.gradients.rows.projection import Projection
from influence_fast.kernels.counter import fill_signs, fill_sjlt
from influence_fast.kernels.fp8_rows import fp8_rows
from influence_fast.kernels.fp8_rows import reference as fp8_reference
from influence_fast.kernels.gated_silu import gated_silu, gated_silu_backward
from influence_fast.kernels.project_flat import FlatSketch, project_flat
from influence_fast.kernels.quantize_rows import quantize_rows
from influence_fast.kernels.rms_norm import MAX_FEATURES, rms_norm, rms_norm_backward
from influence_fast.kernels.rotary import rotary
from influence_fast.kernels.segment_bilinear import segment_bilinear
from influence_fast.kernels.segment_outer import reference as outer_reference
from influence_fast.kernels.segment_outer import segment_outer
from influence_fast.kernels.segments import Segments
from influence_fast.kernels.skinny_project import skinny_project
from influence_fast.kernels.token_loss import token_loss
from influence_fast.philox import sign_matrix, sjlt_map
from influence_fast.products.inner_products import quantize_rows as quantize_for_the_store
from influence_fast.row_codec import to_int8

Check = Callable[[torch.device], None]
BF16 = torch.bfloat16


def sign_bits_are_those_of_the_projection(device: torch.device) -> None:
    for row_start in (0, 2**32 - 9, 3 * 2**32 + 5):
        made = fill_signs(5, "m/out", 41, 261, row_start=row_start, device=device)
        assert torch.equal(made.cpu(), sign_matrix(5, "m/out", 41, 261, row_start=row_start))


def sjlt_map_is_that_of_the_projection(device: torch.device) -> None:
    for start, width in ((0, 8192), (2**32 - 100, 1009), (7, 1), (11, 2**31 - 1)):
        bucket, sign = fill_sjlt(5, "m/row", 700, width, start=start, device=device)
        expected = sjlt_map(5, "m/row", 700, width, start=start)
        assert torch.equal(bucket.cpu(), expected[0])
        assert torch.equal(sign.cpu(), expected[1])


def skinny_bits_do_not_depend_on_the_other_tokens_nor_on_the_split(device: torch.device) -> None:
    for dtype in (torch.float32, BF16):
        x = normal(70, 2100, dtype=dtype, device=device)
        w = normal(2100, 12, dtype=dtype, device=device, seed=1)
        whole = skinny_project(x, w, split=False, out_dtype=torch.float32)
        assert torch.equal(whole, skinny_project(x, w, split=True, out_dtype=torch.float32))
        alone = skinny_project(x[66:67], w, out_dtype=torch.float32)
        assert torch.equal(whole[66:67], alone)


def _pack(device: torch.device) -> tuple[list[int], list[list[int]]]:
    lengths = [5, 97, 33, 64]
    return lengths, [[0, 1, 2, 3], [2], [3, 1], [1, 0, 3, 2]]


def _rows_do_not_depend_on_the_pack(
    device: torch.device, rows_of: Callable[[Tensor, Tensor, Segments], Tensor]
) -> None:
    lengths, packs = _pack(device)
    g = [normal(n, 70, dtype=BF16, device=device, seed=i) for i, n in enumerate(lengths)]
    h = [normal(n, 16, dtype=BF16, device=device, seed=10 + i) for i, n in enumerate(lengths)]
    by_example: dict[int, Tensor] = {}
    for pack in packs:
        segments = Segments.from_lengths([lengths[i] for i in pack], device=device, chunk=32)
        rows = rows_of(torch.cat([g[i] for i in pack]), torch.cat([h[i] for i in pack]), segments)
        for place, i in enumerate(pack):
            assert torch.equal(by_example.setdefault(i, rows[place].clone()), rows[place])


def outer_rows_do_not_depend_on_the_pack(device: torch.device) -> None:
    offsets = torch.zeros(1, dtype=torch.int64, device=device)

    def rows_of(g: Tensor, h: Tensor, segments: Segments) -> Tensor:
        rows = torch.empty(segments.examples, 70 * 16, device=device)
        return segment_outer(g[:, None], h[:, None], segments, rows, offsets)

    _rows_do_not_depend_on_the_pack(device, rows_of)


def whole_examples_have_the_bits_of_their_chunks(device: torch.device) -> None:
    lengths = [1, 97, 130, 64, 65, 63, 300, 128, 256]
    segments = Segments.from_lengths(lengths, device=device, chunk=128)
    for dtype in (torch.float32, BF16):
        for modules, a, b in ((3, 16, 16), (1, 70, 16), (2, 16, 70)):
            left = normal(segments.tokens, modules, a, dtype=dtype, device=device)
            right = normal(segments.tokens, modules, b, dtype=dtype, device=device, seed=1)
            offsets = torch.arange(modules, device=device) * a * b
            by_chunk, whole = (
                segment_outer(
                    left,
                    right,
                    segments,
                    torch.empty(len(lengths), modules * a * b, device=device),
                    offsets,
                    scale=0.3,
                    whole=whole,
                )
                for whole in (False, True)
            )
            assert torch.equal(by_chunk, whole)
            expected = outer_reference(left.double(), right.double(), segments, scale=0.3).flatten(1)
            assert relative_norm(whole, expected) < TOLERANCES[torch.float32]


def bilinear_rows_do_not_depend_on_the_pack(device: torch.device) -> None:
    queries = normal(3, 70, 16, dtype=torch.float32, device=device, seed=99)
    _rows_do_not_depend_on_the_pack(device, lambda g, h, segments: segment_bilinear(g, h, queries, segments))


def flat_rows_do_not_depend_on_the_pack(device: torch.device) -> None:
    for kind in ("sjlt", "rademacher"):
        sketch = FlatSketch.of(kind, 0, "m/row", 70, 16, 130, device=device)

        def rows_of(g: Tensor, h: Tensor, segments: Segments, sketch: FlatSketch = sketch) -> Tensor:
            rows = torch.empty(segments.examples, sketch.width, device=device)
            return project_flat(g, h, segments, sketch, rows)

        _rows_do_not_depend_on_the_pack(device, rows_of)


def sjlt_repeats_bit_for_bit(device: torch.device) -> None:
    """Many collisions in a narrow sketch: any race between the rounds would show."""
    segments = Segments.from_lengths([40, 3], device=device, chunk=32)
    g = normal(43, 128, dtype=torch.float32, device=device)
    h = normal(43, 16, dtype=torch.float32, device=device, seed=1)
    sketch = FlatSketch.of("sjlt", 0, "m/row", 128, 16, 100, device=device)
    first = project_flat(g, h, segments, sketch, torch.empty(2, 100, device=device))
    for _ in range(2):
        again = project_flat(g, h, segments, sketch, torch.empty(2, 100, device=device))
        assert torch.equal(first, again)


def cu_seqlens_serve_as_segments(device: torch.device) -> None:
    cu = torch.tensor([0, 3, 20], dtype=torch.int32, device=device)
    x = normal(20, 1, 16, dtype=torch.float32, device=device)
    offsets = torch.zeros(1, dtype=torch.int64, device=device)
    rows = segment_outer(x, x, cu, torch.empty(2, 256, device=device), offsets)
    segments = Segments.from_lengths([3, 17], device=device)
    assert torch.equal(rows, segment_outer(x, x, segments, torch.empty(2, 256, device=device), offsets))


def _rows_to_quantize(examples: int, width: int, device: torch.device) -> Tensor:
    """Rows of many sizes, some of zeros, in a wider buffer; halves of a step, and a scale that has no fp32 number."""
    wide = normal(examples, width + 3, dtype=torch.float32, device=torch.device("cpu"), seed=width)
    wide *= 10.0 ** torch.linspace(-37, 37, examples)[:, None]
    wide[examples // 2] = 0
    if width > 5 and examples > 4:
        wide[1, 2:7] = torch.tensor([127.0, 0.5, 1.5, -2.5, -0.0])
        wide[1, 7:] = 0
        wide[-1] = 1e-40
        wide[-2, :] = torch.finfo(torch.float32).max
    return wide.to(device)[:, 2 : 2 + width]


def quantized_rows_are_those_of_the_store(device: torch.device) -> None:
    for examples, width in ((1, 1), (2, 17), (7, 130), (5, 4096), (9, 4099), (6, 8500)):
        rows = _rows_to_quantize(examples, width, device)
        made, scales = quantize_rows(rows)
        expected = quantize_for_the_store(rows.cpu().contiguous())
        assert torch.equal(made.cpu(), expected[0])
        assert torch.equal(scales.cpu(), expected[1])
        by_hand = to_int8(rows)
        assert torch.equal(by_hand[0], made)
        assert torch.equal(by_hand[1], scales)
    assert quantize_rows(torch.empty(0, 5, device=device))[0].shape == (0, 5)


def quantized_rows_that_are_not_finite_have_no_scale(device: torch.device) -> None:
    for bad in (float("nan"), float("inf"), -float("inf")):
        rows = normal(3, 4100, dtype=torch.float32, device=device)
        good = quantize_rows(rows)
        rows[1, 4099] = bad
        made, scales = quantize_rows(rows)
        assert scales.isnan().tolist() == [False, True, False]
        assert not made[1].any()
        assert torch.equal(made[[0, 2]], good[0][[0, 2]])
        assert torch.equal(scales[[0, 2]], good[1][[0, 2]])
        by_hand = to_int8(rows)
        assert torch.equal(by_hand[0], made)
        assert torch.equal(by_hand[1].isnan(), scales.isnan())


def _rows_for_fp8(n: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Rows of every size that the dtype has, some of zeros, in a wider buffer; halves between two e4m3 numbers."""
    least, most = (-7, 4) if dtype == torch.float16 else (-44, 37)
    wide = normal(n, width + 3, dtype=torch.float64, device=torch.device("cpu"), seed=width)
    wide *= 10.0 ** torch.linspace(least, most, n, dtype=torch.float64)[:, None]
    wide[n // 2] = 0
    if width > 7 and n > 1:  # a scale of 1; the last two of them lie on either side of zero's half
        wide[0, 2:10] = torch.tensor([448.0, 17.0, -19.0, -0.0, 2.0**-10, 3 * 2.0**-10, 1.01 * 2.0**-10, -(2.0**-10)])
        wide[0, 10:] = wide[0, 10:].clamp(-400, 400)
    if width > 7 and n > 4 and dtype == torch.float32:  # quotients next to a half, whose remainders have no fp32 number
        for row, pair in ((1, ("0x1.2106f8p-115", "0x1.b18a76p-125")), (2, ("0x1.257fc8p-112", "0x1.e22d58p-127"))):
            wide[row] = 0
            wide[row, 3:5] = torch.tensor([float.fromhex(number) for number in pair], dtype=torch.float64)
    return wide.to(dtype).to(device)[:, 2 : 2 + width]


def _bytes(values: Tensor) -> Tensor:
    return values.view(torch.uint8).cpu()


def rows_in_e4m3_have_the_bits_of_pytorch_on_a_cpu(device: torch.device) -> None:
    for dtype in (torch.float32, BF16, torch.float16):
        for n, width in ((1, 1), (2, 17), (300, 5), (7, 131), (33, 512), (5, 4095), (5, 4096), (9, 4097), (2, 8193)):
            matrix = _rows_for_fp8(n, width, dtype, device)
            values, scales = fp8_rows(matrix)
            assert (values.dtype, values.shape, scales.shape) == (torch.float8_e4m3fn, (n, width), (n, 1))
            for where in (torch.device("cpu"), device):
                expected = fp8_reference(matrix.to(where))
                assert torch.equal(scales.cpu(), expected[1].cpu())
                assert torch.equal(_bytes(values), _bytes(expected[0]))
            alone = fp8_rows(matrix[n - 1 :])
            assert torch.equal(_bytes(alone[0]), _bytes(values[n - 1 :]))
            assert torch.equal(alone[1], scales[n - 1 :])
    assert fp8_rows(torch.empty(0, 5, device=device))[0].shape == (0, 5)


def rows_beside_a_matrix_are_zeros_in_e4m3(device: torch.device) -> None:
    for n, width, rows in ((1, 1, 2), (3, 40, 272), (257, 70, 272), (2, 4097, 16)):
        matrix = _rows_for_fp8(n, width, BF16, device)
        values, scales = fp8_rows(matrix, rows)
        expected = fp8_rows(matrix)
        assert torch.equal(_bytes(values[:n]), _bytes(expected[0]))
        assert torch.equal(scales[:n], expected[1])
        assert not _bytes(values[n:]).any()
        assert (scales[n:] == 1).all()
        by_hand = fp8_reference(matrix, rows)
        assert torch.equal(_bytes(by_hand[0]), _bytes(values))
        assert torch.equal(by_hand[1], scales)


def rows_in_e4m3_that_are_not_finite_stay_so(device: torch.device) -> None:
    for bad in (float("nan"), float("inf"), -float("inf")):
        for width in (70, 4100):
            matrix = normal(3, width, dtype=torch.float32, device=device)
            good = fp8_rows(matrix)
            matrix[1, width - 1] = bad
            values, scales = fp8_rows(matrix)
            expected = fp8_reference(matrix.cpu())
            torch.testing.assert_close(values.float().cpu(), expected[0].float(), rtol=0, atol=0, equal_nan=True)
            torch.testing.assert_close(scales.cpu(), expected[1], rtol=0, atol=0, equal_nan=True)
            assert scales.isfinite().flatten().tolist() == [True, False, True]
            assert torch.equal(_bytes(values)[[0, 2]], _bytes(good[0])[[0, 2]])


def rows_for_a_bf16_store_are_written_by_the_kernel(device: torch.device) -> None:
    """The whole path, where the sums are final: bf16 rows from `segment_outer`; with a sketch behind it, fp32."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, rank_pattern={"q_proj": 2})
    model = get_peft_model(Qwen2ForCausalLM(config), lora, autocast_adapter_dtype=False).to(device)
    ids = torch.arange(50) % 61
    (pack,) = pack_examples([{"input_ids": ids[:n], "labels": ids[:n]} for n in (50, 7, 21)], 78)
    for width, dtype in ((None, BF16), (32, torch.float32)):
        found = []
        for bf16_rows in (True, False):
            projection = Projection(dim=8, width=width)
            with GradientEngine(model, projection, backend="triton", bf16_rows=bf16_rows) as engine:
                found.append(engine.run(pack)[0])
        assert [rows.dtype for rows in found] == [dtype, torch.float32]
        assert relative_norm(found[0], found[1]) < TOLERANCES[dtype]


def a_token_has_one_loss_whatever_its_neighbours(device: torch.device) -> None:
    logits = normal(9, 5000, dtype=BF16, device=device)
    targets = torch.arange(9, device=device)
    together = token_loss(logits, targets, torch.empty(9, device=device)).clone()
    for t in (0, 4, 8):
        one = slice(t, t + 1)
        assert torch.equal(token_loss(logits[one], targets[one], torch.empty(1, device=device)), together[one])


def logits_that_are_not_finite_give_such_losses(device: torch.device) -> None:
    """-inf is a token that cannot come, and no fault."""
    logits = torch.zeros(4, 4100, device=device)
    logits[0, 3], logits[1, 4099], logits[2, :4096] = float("nan"), float("inf"), -float("inf")
    losses = token_loss(logits, torch.full((4,), 4097, device=device), torch.empty(4, device=device))
    assert losses.isfinite().tolist() == [False, False, True, True]
    torch.testing.assert_close(losses[2:].cpu(), torch.tensor([4.0, 4100.0]).log())


def a_token_passes_a_layer_with_the_same_bits_whatever_its_neighbours(device: torch.device) -> None:
    for dtype in (torch.float32, BF16):
        x, g = (normal(37, 70, dtype=dtype, device=device, seed=seed) for seed in (0, 1))
        w = normal(70, dtype=dtype, device=device, seed=2)
        cos, sin = (normal(1, 37, 10, dtype=dtype, device=device, seed=seed) for seed in (3, 4))
        heads = x.view(1, 37, 7, 10).transpose(1, 2)
        whole = [rms_norm(x, w, 1e-6), rms_norm_backward(g, x, w, 1e-6), gated_silu(g, x)]
        whole += [*gated_silu_backward(x, g, x), rotary(heads, cos, sin).transpose(1, 2).reshape(37, 70)]
        for one in (slice(0, 1), slice(31, 33), slice(36, 37)):
            a, b = x[one], g[one]
            part = [rms_norm(a, w, 1e-6), rms_norm_backward(b, a, w, 1e-6), gated_silu(b, a)]
            turned = rotary(heads[:, :, one], cos[:, one], sin[:, one]).transpose(1, 2)
            part += [*gated_silu_backward(a, b, a), turned.reshape(-1, 70)]
            assert all(torch.equal(found, all_of[one]) for found, all_of in zip(part, whole, strict=True))


def norms_have_the_bits_of_the_models(device: torch.device) -> None:
    """Rounded where Llama's norm rounds; a card's and PyTorch's sums may differ in the last bit of a scale."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    theirs = LlamaRMSNorm(256, eps=1e-6).to(device)
    x, w = (normal(*shape, dtype=BF16, device=device, seed=3) for shape in ((40, 256), (256,)))
    theirs.weight.data = w
    assert float((rms_norm(x, w, 1e-6) == theirs(x)).float().mean()) > 0.99


CHECKS: list[Check] = [
    sign_bits_are_those_of_the_projection,
    sjlt_map_is_that_of_the_projection,
    skinny_bits_do_not_depend_on_the_other_tokens_nor_on_the_split,
    outer_rows_do_not_depend_on_the_pack,
    whole_examples_have_the_bits_of_their_chunks,
    bilinear_rows_do_not_depend_on_the_pack,
    flat_rows_do_not_depend_on_the_pack,
    sjlt_repeats_bit_for_bit,
    cu_seqlens_serve_as_segments,
    quantized_rows_are_those_of_the_store,
    quantized_rows_that_are_not_finite_have_no_scale,
    rows_in_e4m3_have_the_bits_of_pytorch_on_a_cpu,
    rows_beside_a_matrix_are_zeros_in_e4m3,
    rows_in_e4m3_that_are_not_finite_stay_so,
    rows_for_a_bf16_store_are_written_by_the_kernel,
    a_token_has_one_loss_whatever_its_neighbours,
    logits_that_are_not_finite_give_such_losses,
    a_token_passes_a_layer_with_the_same_bits_whatever_its_neighbours,
    norms_have_the_bits_of_the_models,
]


@dataclass(frozen=True)
class Refusal:
    id: str
    error: type[Exception]
    message: str
    call: Callable[[torch.device], object]


def _outer(
    device: torch.device,
    *,
    lengths: tuple[int, ...] = (3, 2),
    left: tuple[int, ...] = (5, 2, 4),
    right: tuple[int, ...] = (5, 2, 3),
    dtype: torch.dtype = torch.float32,
    rows: tuple[int, ...] = (2, 24),
    rows_dtype: torch.dtype = torch.float32,
    offsets_dtype: torch.dtype = torch.int64,
) -> Tensor:
    cu = torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)
    return segment_outer(
        torch.zeros(left, dtype=dtype, device=device),
        torch.zeros(right, device=device),
        cu,
        torch.zeros(rows, dtype=rows_dtype, device=device),
        torch.zeros(2, dtype=offsets_dtype, device=device),
    )


REFUSALS = [
    Refusal(
        "a zero-length segment",
        DataError,
        "example 1 of the pack has 0 tokens.*drop empty examples",
        lambda device: _outer(device, lengths=(3, 0, 2), rows=(3, 24)),
    ),
    Refusal(
        "no segments",
        ConfigError,
        "at least one example",
        lambda device: Segments.from_lengths([], device=device),
    ),
    Refusal(
        "cu_seqlens of int64",
        ConfigError,
        "cu_seqlens must be a 1-D int32",
        lambda device: Segments.from_cu_seqlens(torch.tensor([0, 3], device=device)),
    ),
    Refusal(
        "cu_seqlens that start late",
        ConfigError,
        "must start at 0, got 1",
        lambda device: Segments.from_cu_seqlens(torch.tensor([1, 3], dtype=torch.int32, device=device)),
    ),
    Refusal(
        "tokens that do not match",
        ConfigError,
        "left has 5 tokens, but cu_seqlens ends at 7",
        lambda device: _outer(device, lengths=(3, 4)),
    ),
    Refusal(
        "modules that do not match",
        ConfigError,
        r"right must have shape \(5, 2, b\)",
        lambda device: _outer(device, right=(5, 3, 3)),
    ),
    Refusal(
        "dtypes that do not match",
        ConfigError,
        "share one dtype.*left bfloat16, right float32",
        lambda device: _outer(device, dtype=BF16),
    ),
    Refusal(
        "blocks wider than a row",
        ConfigError,
        "2 blocks of 4 x 3 do not fit in rows of 23",
        lambda device: _outer(device, rows=(2, 23)),
    ),
    Refusal(
        "rows of float64",
        ConfigError,
        "rows must be float32 or bfloat16",
        lambda device: _outer(device, rows_dtype=torch.float64),
    ),
    Refusal(
        "whole examples of chunks that end inside a block of tokens",
        ConfigError,
        "chunks of 48 tokens are no multiple of 32",
        lambda device: segment_outer(
            torch.zeros(9, 1, 4, device=device),
            torch.zeros(9, 1, 4, device=device),
            Segments.from_lengths([9], device=device, chunk=48),
            torch.zeros(1, 16, device=device),
            torch.zeros(1, dtype=torch.int64, device=device),
            whole=True,
        ),
    ),
    Refusal(
        "rows to quantize that are not float32",
        ConfigError,
        "quantize_rows: rows must be float32, got torch.bfloat16",
        lambda device: quantize_rows(torch.zeros(2, 3, dtype=BF16, device=device)),
    ),
    Refusal(
        "rows to quantize of no numbers",
        ConfigError,
        "quantize_rows: rows have no numbers",
        lambda device: quantize_rows(torch.zeros(2, 0, device=device)),
    ),
    Refusal(
        "rows for 8 bits in float64",
        ConfigError,
        "float32, bfloat16, float16; got matrix float64",
        lambda device: fp8_rows(torch.zeros(2, 3, dtype=torch.float64, device=device)),
    ),
    Refusal(
        "rows for 8 bits that are columns",
        ConfigError,
        "fp8_rows: the last dimension of matrix must be contiguous",
        lambda device: fp8_rows(torch.zeros(2, 3, device=device).T),
    ),
    Refusal(
        "fewer rows in 8 bits than there are",
        ConfigError,
        r"fp8_rows: cannot make 1 rows of \(2, 3\)",
        lambda device: fp8_rows(torch.zeros(2, 3, device=device), 1),
    ),
    Refusal(
        "rows for 8 bits of no numbers",
        ConfigError,
        r"fp8_rows: cannot make 2 rows of \(2, 0\)",
        lambda device: fp8_rows(torch.zeros(2, 0, device=device)),
    ),
    Refusal(
        "losses that are not float32",
        ConfigError,
        "token_loss: losses must be contiguous torch.float32, got torch.bfloat16",
        lambda device: token_loss(
            torch.zeros(2, 3, device=device),
            torch.zeros(2, dtype=torch.int64, device=device),
            torch.zeros(2, dtype=BF16, device=device),
        ),
    ),
    Refusal(
        "targets of other tokens",
        ConfigError,
        r"token_loss: targets must have shape \(2\), got \(3,\)",
        lambda device: token_loss(
            torch.zeros(2, 3, device=device),
            torch.zeros(3, dtype=torch.int64, device=device),
            torch.zeros(2, device=device),
        ),
    ),
    Refusal(
        "a norm's weight of another size",
        ConfigError,
        r"rms_norm: w must have shape \(3\), got \(4,\)",
        lambda device: rms_norm(torch.zeros(2, 3, device=device), torch.zeros(4, device=device), 1e-6),
    ),
    Refusal(
        "a norm of rows that no program holds",
        ConfigError,
        f"rms_norm_backward: rows of {MAX_FEATURES + 1} numbers; it takes 1 to {MAX_FEATURES}",
        lambda device: rms_norm_backward(
            *(torch.zeros(1, MAX_FEATURES + 1, device=device) for _ in range(2)),
            torch.zeros(MAX_FEATURES + 1, device=device),
            1e-6,
        ),
    ),
    Refusal(
        "a gate of another dtype",
        ConfigError,
        "share one dtype.*a bfloat16, b float32",
        lambda device: gated_silu(torch.zeros(2, dtype=BF16, device=device), torch.zeros(2, device=device)),
    ),
    Refusal(
        "a gate that is transposed",
        ConfigError,
        "gated_silu_backward: g must be contiguous",
        lambda device: gated_silu_backward(
            torch.zeros(3, 2, device=device).T, torch.zeros(2, 3, device=device), torch.zeros(2, 3, device=device)
        ),
    ),
    Refusal(
        "heads without halves",
        ConfigError,
        "rotary: heads of 3 numbers have no halves",
        lambda device: rotary(torch.zeros(1, 2, 4, 3, device=device), *torch.zeros(2, 1, 4, 3, device=device)),
    ),
    Refusal(
        "angles of other tokens",
        ConfigError,
        r"rotary: sin must have shape \(1, 4, 2\), got \(1, 5, 2\)",
        lambda device: rotary(
            torch.zeros(1, 2, 4, 2, device=device),
            torch.zeros(1, 4, 2, device=device),
            torch.zeros(1, 5, 2, device=device),
        ),
    ),
    Refusal(
        "offsets of int32",
        ConfigError,
        "offsets must be int64",
        lambda device: _outer(device, offsets_dtype=torch.int32),
    ),
    Refusal(
        "x that is transposed",
        ConfigError,
        "last dimension of x must be contiguous",
        lambda device: skinny_project(torch.zeros(4, 3, device=device).T, torch.zeros(4, 2, device=device)),
    ),
    Refusal(
        "no columns at all",
        ConfigError,
        "0 columns asked for",
        lambda device: skinny_project(torch.zeros(4, 3, device=device), torch.zeros(3, 0, device=device)),
    ),
    Refusal(
        "too many columns",
        ConfigError,
        "257 columns asked for, needs 1 to 256",
        lambda device: skinny_project(torch.zeros(4, 3, device=device), torch.zeros(3, 257, device=device)),
    ),
    Refusal(
        "w of another d",
        ConfigError,
        r"w must have shape \(3, N\), got \(4, 2\)",
        lambda device: skinny_project(torch.zeros(4, 3, device=device), torch.zeros(4, 2, device=device)),
    ),
    Refusal(
        "float64",
        ConfigError,
        "float32, bfloat16, float16; got x float64",
        lambda device: skinny_project(
            torch.zeros(4, 3, dtype=torch.float64, device=device),
            torch.zeros(3, 2, dtype=torch.float64, device=device),
        ),
    ),
    Refusal(
        "an unknown precision",
        ConfigError,
        "precision must be one of ieee, tf32, tf32x3, not 'fp32'",
        lambda device: skinny_project(
            torch.zeros(4, 3, device=device), torch.zeros(3, 2, device=device), precision="fp32"
        ),
    ),
    Refusal(
        "accumulate into nothing",
        ConfigError,
        "accumulate=True needs the `out`",
        lambda device: segment_bilinear(
            torch.zeros(2, 3, device=device),
            torch.zeros(2, 4, device=device),
            torch.zeros(1, 3, 4, device=device),
            torch.tensor([0, 2], dtype=torch.int32, device=device),
            accumulate=True,
        ),
    ),
    Refusal(
        "an unknown sketch",
        ConfigError,
        "one of sjlt, rademacher, not 'gaussian'",
        lambda device: FlatSketch.of("gaussian", 0, "m/row", 2, 2, 2, device=device),
    ),
    Refusal(
        "a sketch of other sizes",
        ConfigError,
        r"h must have shape \(2, 5\)",
        lambda device: project_flat(
            torch.zeros(2, 3, device=device),
            torch.zeros(2, 4, device=device),
            torch.tensor([0, 2], dtype=torch.int32, device=device),
            FlatSketch.of("sjlt", 0, "m/row", 3, 5, 7, device=device),
            torch.zeros(1, 7, device=device),
        ),
    ),
]
