"""Attention over packs: the one-launch path against the call an example, by the semantics that PyTorch documents."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from varlen import varlen_attn

from influence_fast.gradients.model import packed_attention as attention

LENGTHS = (5, 1, 9, 3)
BOUNDS = [0, 5, 6, 15, 18]


@functools.wraps(varlen_attn)  # its words are looked at
def documented(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *bounds: Any, **options: Any) -> Any:
    """`varlen_attn`, asked as the packed attention asks it."""
    cu_seq_q, cu_seq_k, max_q, max_k = bounds
    assert torch.equal(cu_seq_q, cu_seq_k)
    assert max_q == max_k == max(LENGTHS)
    return varlen_attn(query, key, value, *bounds, **options)


def inputs(dtype: torch.dtype, device: str = "cpu", kv_heads: int = 2) -> list[torch.Tensor]:
    """Query, key and value as transformers hands them over: [1, heads, T, d], a transposed view."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, BOUNDS[-1], heads, 8) for heads in (4, kv_heads, kv_heads)]
    made = [torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype) for shape in shapes]
    return [tensor.requires_grad_().transpose(1, 2) for tensor in made]


def attend(tensors: list[torch.Tensor], **options: Any) -> torch.Tensor:
    bounds = torch.tensor(BOUNDS, dtype=torch.int32)
    options = {"cu_seq_lens_q": BOUNDS, "cu_seq_lens_k": bounds, "max_length_q": max(LENGTHS), **options}
    out, _ = attention.packed_attention(torch.nn.Module(), *tensors, None, **options)
    return out


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("scaling", [None, 0.3])
@pytest.mark.parametrize("window", [None, 1, 3, 100])
def test_one_launch_gives_what_a_call_an_example_gives(
    monkeypatch: pytest.MonkeyPatch, window: int | None, scaling: float | None, kv_heads: int
) -> None:
    options = {"scaling": scaling, "sliding_window": window}
    apart = inputs(torch.float64, kv_heads=kv_heads)
    expected = attend(apart, **options)
    monkeypatch.setattr(attention, "_has_varlen", lambda query, value: True)
    monkeypatch.setattr(attention, "varlen_attention", lambda: documented)
    together = inputs(torch.float64, kv_heads=kv_heads)
    found = attend(together, **options)
    torch.testing.assert_close(found, expected)
    upstream = torch.randn(expected.shape, dtype=torch.float64)
    for one, other in zip(
        torch.autograd.grad(found, together, upstream), torch.autograd.grad(expected, apart, upstream), strict=True
    ):
        torch.testing.assert_close(one, other)


def test_pytorch_2_11_is_not_told_of_grouped_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its function has windows, takes fewer heads of keys as they are, and has no word for it."""
    given: dict[str, Any] = {}

    def older(q: Any, k: Any, v: Any, cu_q: Any, cu_k: Any, max_q: int, max_k: int, **options: Any) -> Any:
        given.update(options)
        return q

    monkeypatch.setattr(attention, "varlen_attention", lambda: older)
    attention._varlen(*inputs(torch.bfloat16), torch.tensor(BOUNDS, dtype=torch.int32), max(LENGTHS), 0.5, None)
    assert given == {"scale": 0.5, "window_size": (-1, 0)}


def test_sdpa_leaves_cudnn_out_while_packs_are_attended_to(tiny_lora: Callable[..., Any]) -> None:
    base = tiny_lora().get_base_model()
    before = torch.backends.cuda.cudnn_sdp_enabled()
    with attention.packed(base, base.config):
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert torch.backends.cuda.cudnn_sdp_enabled() == before


@pytest.mark.skipif(attention.varlen_attention() is None, reason="this PyTorch has no varlen_attn with windows")
def test_pytorchs_own_takes_the_call() -> None:
    """On the meta device, where its shapes are checked and nothing is computed."""
    tensors = inputs(torch.bfloat16, "meta")
    bounds = torch.tensor(BOUNDS, dtype=torch.int32, device="meta")
    out = attention._varlen(*tensors, bounds, max(LENGTHS), 0.5, 3)
    assert out.shape == (1, BOUNDS[-1], 4, 8)
    grads = torch.autograd.grad(out.sum(), tensors)
    assert [grad.shape for grad in grads] == [tensor.shape for tensor in tensors]


def test_what_runs_in_one_launch() -> None:
    query = torch.zeros(1, 2, 3, 8, dtype=torch.bfloat16)
    assert not attention._has_varlen(query, query)  # no card
    for other in (query.float(), query[..., :7], torch.zeros(1, 2, 3, 512, dtype=torch.bfloat16)):
        assert not attention._has_varlen(other, other)


@pytest.fixture
def nothing_asked_for() -> Iterator[None]:
    """The mode that users have, and not the tests' own."""
    torch.use_deterministic_algorithms(False)
    yield
    torch.use_deterministic_algorithms(True, warn_only=True)


@pytest.mark.skipif(attention.varlen_attention() is None, reason="this PyTorch has no varlen_attn with windows")
@pytest.mark.usefixtures("nothing_asked_for")
def test_the_backward_of_fused_attention_is_asked_for_one_order_and_nothing_else_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    card = torch.device("cuda")
    tensors = inputs(torch.bfloat16, "meta")
    bounds = torch.tensor(BOUNDS, dtype=torch.int32, device="meta")
    out = attention._varlen(*tensors, bounds, max(LENGTHS), 0.5, 3)
    assert attention._is_fused(out.grad_fn.next_functions[0][0].name(), card)  # below the added dimension
    for name in ("ScaledDotProductFlashAttentionBackward0", "ScaledDotProductEfficientAttentionBackward0"):
        assert attention._is_fused(name, card)
        assert not attention._is_fused(name, torch.device("cpu"))
    assert not attention._is_fused("BmmBackward0", card)

    monkeypatch.setattr(attention, "_is_fused", lambda name, device: "Seen" in name)
    seen: list[tuple[str, int, bool]] = []

    def look(where: str) -> None:
        filled = torch.utils.deterministic.fill_uninitialized_memory
        seen.append((where, torch.get_deterministic_debug_mode(), filled))

    class Seen(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor, name: str) -> torch.Tensor:
            ctx.where = name
            return x * 2

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> Any:
            look(ctx.where)
            return grad * 2, None

    x = torch.ones(3, requires_grad=True)
    first = attention._in_order(Seen.apply(x, "first"))
    first.register_hook(lambda grad: look("between"))
    attention._in_order(Seen.apply(first + 1, "second")).sum().backward()
    look("after")
    assert seen == [("second", 2, False), ("between", 0, True), ("first", 2, False), ("after", 0, True)]
    assert x.grad.tolist() == [4, 4, 4]


@pytest.mark.usefixtures("nothing_asked_for")
def test_a_backward_that_fails_leaves_nothing_asked_for(
    monkeypatch: pytest.MonkeyPatch, tiny_lora: Callable[..., Any]
) -> None:
    class Failing(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> Any:
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(attention, "_is_fused", lambda name, device: "Failing" in name)
    base = tiny_lora().get_base_model()
    with pytest.raises(torch.OutOfMemoryError), attention.packed(base, base.config):
        attention._in_order(Failing.apply(torch.ones(3, requires_grad=True))).sum().backward()
    assert torch.get_deterministic_debug_mode() == 0
    assert torch.utils.deterministic.fill_uninitialized_memory


def test_models_with_flash_attention_of_their_own_are_asked_for_one_order() -> None:
    tokens = attention.PackedTokens(*torch.zeros(3, 1, 2, dtype=torch.int64), 2, None)
    asked = attention.call(dict, "flash_attention_2", tokens)
    assert asked["deterministic"] is True
    assert "deterministic" not in attention.call(dict, attention.PACKED, tokens)
