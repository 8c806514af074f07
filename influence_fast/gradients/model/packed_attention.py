"""Attention over a pack: each example attends to itself alone, at the cost of its own length squared.

Registered with transformers as an attention implementation. A dense block-diagonal mask would compute the whole
(T, T) product; here only the blocks are computed, so an example's numbers do not depend on its neighbours:

    varlen   16-bit models on a card: PyTorch's own variable-length flash attention, one launch for the whole pack
    SDPA     else: one call an example

Models that run flash-attention or flex attention keep theirs: transformers hands them the same `cu_seq_lens` and
positions.

The same pack gives the same bits in every run. Fused attentions on cards add up the gradient of the queries as blocks
of keys happen to finish, unless they are asked for one order; here they are.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from influence_fast.data.packing import Pack
from influence_fast.errors import ModelError
from influence_fast.transfer import all_to_device

PACKED = "influence_fast_packed"
REPLACED = ("eager", "sdpa", None)  # these see a pack as one text, or mask all of it
_deterministic: Any = torch.utils.deterministic
_FUSED = ("FlashAttention", "EfficientAttention", "varlen_attn")  # in the names of the backward functions of these
_LARGEST_HEAD = 256  # of flash attention, whose heads are multiples of 8


@contextlib.contextmanager
def packed(base: Any, config: Any) -> Iterator[None]:
    """Set attention that keeps the examples of a pack apart in `base`, while the block runs.

    `config` says which attention the model has.
    """
    before = config._attn_implementation
    if before not in REPLACED:
        yield
        return
    register()
    given = implementations(base)
    try:
        base.set_attn_implementation(PACKED)
        with unchanged_order(), _without_cudnn():
            yield
    finally:
        _assign(given)


def implementations(base: Any) -> list[tuple[Any, str | None]]:
    """Return the attention of every part of a model, each with the configuration that holds it.

    A model of text, images and sound may have another in each part, and a part refuses to be given that of another.
    """
    found: dict[int, Any] = {}
    unseen = [module.config for module in base.modules() if hasattr(module, "config")]
    while unseen:
        config = unseen.pop()
        if id(config) not in found and hasattr(config, "_attn_implementation_internal"):
            found[id(config)] = config
            unseen += [value for value in vars(config).values() if hasattr(value, "_attn_implementation_internal")]
    return [(config, config._attn_implementation_internal) for config in found.values()]


def _assign(chosen: list[tuple[Any, str | None]]) -> None:
    for config, name in chosen:
        config._attn_implementation_internal = name


@contextlib.contextmanager
def implementation(base: Any, chosen: list[tuple[Any, str | None]]) -> Iterator[None]:
    """Set the attention that `implementations` found before in the parts of `base`, while the block runs."""
    now = implementations(base)
    _assign(chosen)
    try:
        yield
    finally:
        _assign(now)


@contextlib.contextmanager
def unchanged_order() -> Iterator[None]:
    """Restore what `_in_order` asks PyTorch for, if the block ends in the middle of an attention's backward."""
    order = _order()
    try:
        yield
    finally:
        _set_order(*order)


@contextlib.contextmanager
def _without_cudnn() -> Iterator[None]:
    """Disable cuDNN's SDPA: its backward has no one order, and it plans anew for every length."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def register() -> None:
    """Add `PACKED` to transformers' attentions; harmless to repeat."""
    from transformers import AttentionInterface

    AttentionInterface.register(PACKED, packed_attention)


@dataclass(frozen=True, slots=True)
class PackedTokens:
    """A pack's tokens as a decoder reads them, all on one device.

    `cu_seqlens` has the bounds on the host too; it is None where the tensors' numbers are to change under a recorded
    step, which then must not look at them.
    """

    input_ids: torch.Tensor  # [1, T] int64
    position_ids: torch.Tensor  # [1, T] int64
    bounds: torch.Tensor  # [E + 1] int32
    longest: int  # tokens, of no example more
    cu_seqlens: list[int] | None

    @classmethod
    def of(cls, pack: Pack) -> PackedTokens:
        """Make the tokens of a pack, on the host."""
        bounds = torch.tensor(pack.cu_seqlens, dtype=torch.int32)
        return cls(pack.input_ids[None], pack.position_ids[None], bounds, max(pack.lengths), pack.cu_seqlens)

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [self.input_ids, self.position_ids, self.bounds]

    def with_tensors(self, tensors: Sequence[torch.Tensor]) -> PackedTokens:
        """Return these tokens with other tensors in that order: copies on another device."""
        input_ids, position_ids, bounds = tensors
        return PackedTokens(input_ids, position_ids, bounds, self.longest, self.cu_seqlens)

    def to(self, device: torch.device) -> PackedTokens:
        return self.with_tensors(all_to_device(self.tensors, device))


def call(
    module: Any,
    implementation: str | None,
    tokens: PackedTokens,
    *,
    with_bounds: bool = True,
    with_positions: bool = True,
    **kwargs: Any,
) -> Any:
    """Call a decoder or a whole model, whose attention is `implementation`, on a pack, and return its output.

    with_positions: whether it is told the tokens' positions; a model that is not makes its own, as for one text.
    """
    known = implementation == PACKED and tokens.cu_seqlens is not None
    if implementation is not None and implementation.startswith("flash_attention"):
        kwargs["deterministic"] = True
    # ours needs them on the host too, and reading them back would wait for the card
    on_host = tokens.cu_seqlens if known else tokens.bounds
    lengths = {"max_length_q": tokens.longest, "max_length_k": tokens.longest}
    bounds = {"cu_seq_lens_q": on_host, "cu_seq_lens_k": tokens.bounds, **lengths} if with_bounds else {}
    if with_positions:
        kwargs["position_ids"] = tokens.position_ids
    with example_bounds(tokens.cu_seqlens):
        return module(
            input_ids=tokens.input_ids,
            use_cache=False,
            **bounds,
            **kwargs,
        )


# Of the pack that a model is computing; for the whole process, since the backward on a GPU runs in other threads.
_bounds: list[int] | None = None


@contextlib.contextmanager
def example_bounds(cu_seqlens: list[int] | None) -> Iterator[None]:
    """Set `current_bounds` to `cu_seqlens` while the block runs."""
    global _bounds
    before, _bounds = _bounds, cu_seqlens
    try:
        yield
    finally:
        _bounds = before


def current_bounds() -> list[int] | None:
    """Return the bounds of the pack that a model is computing now, forward or backward; None outside of one."""
    return _bounds


@dataclass(frozen=True, slots=True)
class _PackOf:
    """Arguments that `call` passes through a model to its attention, by the names that transformers gives them.

    `packed_probe` and `packed_windows` are ours: lists that are told what reached the attention.
    """

    cu_seq_lens_q: list[int] | torch.Tensor | None = None
    cu_seq_lens_k: list[int] | torch.Tensor | None = None
    max_length_q: int | None = None
    packed_probe: list[bool] | None = None
    packed_windows: set[int] | None = None

    @classmethod
    def of(cls, keywords: dict[str, Any]) -> _PackOf:
        return cls(**{name: keywords.get(name) for name in cls.__slots__})

    def tell(self, varlen: bool, sliding_window: int | None) -> None:
        """Tell the lists that ask for it that the bounds did reach the attention, and with which window."""
        if self.packed_windows is not None and sliding_window is not None:
            self.packed_windows.add(sliding_window)
        if self.packed_probe is not None and self.cu_seq_lens_q is not None:
            self.packed_probe.append(varlen)

    def lengths(self, tokens: int) -> list[int]:
        """Return the tokens of each example; all of them where no bounds came, as for one text."""
        bounds = self.cu_seq_lens_q
        if bounds is None:
            return [tokens]
        bounds = bounds.tolist() if isinstance(bounds, torch.Tensor) else bounds
        return [end - start for start, end in pairwise(bounds)]


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,  # [1, heads, T, head_dim]
    key: torch.Tensor,  # [1, kv_heads, T, head_dim]
    value: torch.Tensor,  # [1, kv_heads, T, head_dim]
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Compute attention within each example of a pack, as transformers' attention interface.

    Returns ([1, T, heads, head_dim], None).

    kwargs: those of `_PackOf`; what else transformers passes (dropout, which is zero here) has no effect. Raises
    ModelError for an attention that has more than scaling and a window.
    """
    for unsupported in ("softcap", "s_aux", "position_bias"):
        if kwargs.get(unsupported) is not None:
            raise ModelError(f"attention with {unsupported} is not supported in packed batches")
    pack, varlen = _PackOf.of(kwargs), _has_varlen(query, value)
    pack.tell(varlen, sliding_window)
    if isinstance(pack.cu_seq_lens_k, torch.Tensor) and pack.max_length_q is not None and varlen:
        return _varlen(query, key, value, pack.cu_seq_lens_k, pack.max_length_q, scaling, sliding_window), None
    lengths = pack.lengths(query.shape[2])
    grouped = query.shape[1] != key.shape[1]
    if grouped and query.device.type == "cuda" and query.dtype == torch.float32:
        # The one fused attention of GPUs that takes fp32 takes no groups, and without it T x T numbers are kept.
        key, value = (_repeated(heads, query.shape[1] // key.shape[1]) for heads in (key, value))
        grouped = False
    # Split, not slicing: its backward is one concatenation, where each slice's would be a zero-filled copy.
    parts = zip(query.split(lengths, dim=2), key.split(lengths, dim=2), value.split(lengths, dim=2), strict=True)
    outputs = []
    for q, k, v in parts:
        mask = _window_mask(q.shape[2], sliding_window, q.device)
        out = scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=grouped
        )
        outputs.append(_in_order(out).transpose(1, 2))
    return torch.cat(outputs, dim=1), None


def _window_mask(n: int, sliding_window: int | None, device: torch.device) -> torch.Tensor | None:
    """Return which of n keys each query sees, [n, n] bool; None where that is all keys before it."""
    if sliding_window is None or n <= sliding_window:
        return None
    distance = torch.arange(n, device=device)[:, None] - torch.arange(n, device=device)[None, :]
    return (distance >= 0) & (distance < sliding_window)


def _repeated(heads: torch.Tensor, times: int) -> torch.Tensor:
    """Return [1, kv_heads, T, d] as [1, kv_heads * times, T, d], each head followed by its copies."""
    return heads[:, :, None].expand(-1, -1, times, -1, -1).flatten(1, 2)


def _varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds: torch.Tensor,  # [E + 1] int32
    longest: int,
    scaling: float | None,
    sliding_window: int | None,
) -> torch.Tensor:
    """Compute attention of all examples [1, T, heads, head_dim] in one launch."""
    attend = varlen_attention()
    assert attend is not None
    q, k, v = (part[0].transpose(0, 1) for part in (query, key, value))  # [T, heads, head_dim]
    # keys to the left that a token sees beside its own
    left = -1 if sliding_window is None else sliding_window - 1
    options: dict[str, Any] = {"scale": scaling, "window_size": (left, 0)}
    if q.shape[1] != k.shape[1] and _asks_for_groups(attend):
        options["enable_gqa"] = True
    out: torch.Tensor = attend(q, k, v, bounds, bounds, longest, longest, **options)
    return _in_order(out)[None]


def _in_order(out: torch.Tensor) -> torch.Tensor:
    """Return `out`, whose fused backward is to add up in one order.

    PyTorch is asked for that as long as the backward runs, and for nothing else, since many other operations would be
    slower for being asked, or refuse.
    """
    node = out.grad_fn
    if node is None or not _is_fused(node.name(), out.device):
        return out
    before: list[tuple[int, bool]] = []

    def ask(grads: Any) -> None:
        before.append(_order())
        _set_order(2, False)

    def done(*grads: Any) -> None:
        _set_order(*before.pop())

    node.register_prehook(ask)
    node.register_hook(done)
    return out


def _order() -> tuple[int, bool]:
    """Return whether PyTorch is asked for deterministic operations (2: yes), and then fills new memory."""
    return torch.get_deterministic_debug_mode(), _deterministic.fill_uninitialized_memory


def _set_order(mode: int, fill: bool) -> None:
    torch.set_deterministic_debug_mode(mode)
    _deterministic.fill_uninitialized_memory = fill


def _is_fused(backward: str, device: torch.device) -> bool:
    return device.type == "cuda" and any(name in backward for name in _FUSED)


def _has_varlen(query: torch.Tensor, value: torch.Tensor) -> bool:
    size = query.shape[-1]
    return (
        query.dtype in (torch.bfloat16, torch.float16)
        and size == value.shape[-1]
        and size <= _LARGEST_HEAD
        and size % 8 == 0
        and _runs_varlen(query.device)
    )


@functools.cache
def _runs_varlen(device: torch.device) -> bool:
    if device.type != "cuda" or torch.version.hip is not None or varlen_attention() is None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


@functools.cache
def varlen_attention() -> Callable[..., Any] | None:
    """Return PyTorch's `varlen_attn`, from the release on that has windows (2.11); None before."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn if "window_size" in inspect.signature(varlen_attn).parameters else None


@functools.cache
def _asks_for_groups(attend: Callable[..., Any]) -> bool:
    """Return whether grouped heads must be asked for; PyTorch 2.11 takes them without."""
    return "enable_gqa" in inspect.signature(attend).parameters
