# mypy: disable-error-code="no-untyped-def"
"""Ragged per-example sums of small outer products, written straight into the row buffer.

    rows[e, offset_m : offset_m + a b] = s_m * sum over tokens t of example e of  left[t, m] right[t, m]^T

    left (T, M, a), right (T, M, b): M modules of one shape, strided views (columns of a `skinny_project` output serve
    as they are); the block of a module is a x b, row-major, at its own offset of a row of K numbers. With left = y
    and right = h this is the projected dB, with u and z the projected dA, with the plain g and h the exact dB.

Bytes: left and right once, the blocks once. Tokens are summed by chunks of an example, each from zero, and the chunks
added in order. Where modules, tiles of a x b and examples fill the card, one program takes a whole example. Where they
do not, it takes one chunk, a longer example leaves a float32 partial sum a chunk, and a second kernel adds those in the
same order: 2 S M a b numbers more to move for S partial sums. No atomics: the same bits run after run, in any pack.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from influence_fast.errors import ConfigError
from influence_fast.kernels.outer_tile import module_tile
from influence_fast.kernels.runtime import (
    Cost,
    ceil_div,
    check_device,
    check_dtype,
    check_last_stride,
    check_precision,
    check_shape,
    jit,
    launch,
    padded,
    processors,
    tl,
)
from influence_fast.kernels.segments import Segments, as_segments, check_tokens

ROW_DTYPES = (torch.float32, torch.bfloat16)
# That keep enough loads on their way for a processor: each has two tiles of 64 tokens in flight, 4 to 20 KB.
_PROGRAMS = 4


@jit
def _example_kernel(
    left,  # [T, M, a]
    right,  # [T, M, b]
    cu_seqlens,  # [E + 1] int32
    offsets,  # [M] int64
    scales,  # [M] float32, or unused
    rows,  # [E, K]
    scale,
    modules,
    a_size,
    b_size,
    stride_lt,
    stride_lm,
    stride_rt,
    stride_rm,
    stride_row,
    CHUNK: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    e = (tl.program_id(0) // modules).to(tl.int64)
    m = (tl.program_id(0) % modules).to(tl.int64)
    begin = tl.load(cu_seqlens + e)
    stop = tl.load(cu_seqlens + e + 1)
    block, mask, total = module_tile(
        left,
        right,
        m,
        begin,
        stop,
        a_size,
        b_size,
        stride_lt,
        stride_lm,
        stride_rt,
        stride_rm,
        BLOCK_L,
        BLOCK_A,
        BLOCK_B,
        PRECISION,
        CHUNK,
    )
    if HAS_SCALES:
        scale = tl.load(scales + m)
    tl.store(rows + e * stride_row + tl.load(offsets + m) + block, total * scale, mask=mask)


@jit
def _chunk_kernel(
    left,  # [T, M, a]
    right,  # [T, M, b]
    chunk_start,  # [C] int32
    chunk_stop,  # [C] int32
    chunk_example,  # [C] int32
    chunk_slot,  # [C] int32
    offsets,  # [M] int64
    scales,  # [M] float32, or unused
    rows,  # [E, K]
    parts,  # [slots, M, a, b] float32
    scale,
    modules,
    a_size,
    b_size,
    stride_lt,
    stride_lm,
    stride_rt,
    stride_rm,
    stride_row,
    BLOCK_L: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # Modules run fastest, so programs that share the lines of one token run side by side.
    chunk = tl.program_id(0) // modules
    m = (tl.program_id(0) % modules).to(tl.int64)
    begin = tl.load(chunk_start + chunk)
    stop = tl.load(chunk_stop + chunk)
    block, mask, total = module_tile(
        left,
        right,
        m,
        begin,
        stop,
        a_size,
        b_size,
        stride_lt,
        stride_lm,
        stride_rt,
        stride_rm,
        BLOCK_L,
        BLOCK_A,
        BLOCK_B,
        PRECISION,
        0,
    )
    slot = tl.load(chunk_slot + chunk).to(tl.int64)
    if slot < 0:
        if HAS_SCALES:
            scale = tl.load(scales + m)
        e = tl.load(chunk_example + chunk).to(tl.int64)
        tl.store(rows + e * stride_row + tl.load(offsets + m) + block, total * scale, mask=mask)
    else:
        tl.store(parts + (slot * modules + m) * a_size * b_size + block, total, mask=mask)


@jit
def _add_chunks_kernel(
    parts,  # [slots, M, a * b] float32
    split_example,  # [S] int32
    split_slot,  # [S + 1] int32
    offsets,  # [M] int64
    scales,  # [M] float32, or unused
    rows,  # [E, K]
    scale,
    modules,
    size,
    stride_row,
    BLOCK: tl.constexpr,
    HAS_SCALES: tl.constexpr,
):
    i = tl.program_id(0) // modules
    m = (tl.program_id(0) % modules).to(tl.int64)
    block = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = block < size
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for slot in range(tl.load(split_slot + i), tl.load(split_slot + i + 1)):
        total += tl.load(parts + (slot * modules + m) * size + block, mask=mask, other=0.0)
    if HAS_SCALES:
        scale = tl.load(scales + m)
    e = tl.load(split_example + i).to(tl.int64)
    tl.store(rows + e * stride_row + tl.load(offsets + m) + block, total * scale, mask=mask)


def configuration(a_size: int, b_size: int, itemsize: int, precision: str = "ieee") -> dict[str, int]:
    """Tiles of the a x b block; one warp where a tile is 16 x 16, so that many programs share a processor.

    Twice as wide ones are no faster on an H200, and leave a shape of 16 x 3584 too few programs to take whole examples.
    """
    block_a, block_b = min(padded(a_size), 64), min(padded(b_size), 64)
    area = block_a * block_b
    num_warps = 1 if area <= 512 else 2 if area <= 1024 else 4
    if itemsize == 4 and precision == "ieee":
        return {
            "BLOCK_L": 32,
            "BLOCK_A": block_a,
            "BLOCK_B": block_b,
            "num_warps": num_warps,
            "num_stages": 2,
        }
    return {"BLOCK_L": 64, "BLOCK_A": block_a, "BLOCK_B": block_b, "num_warps": num_warps, "num_stages": 3}


def segment_outer(
    left: Tensor,
    right: Tensor,
    segments: Segments | Tensor,
    rows: Tensor,
    offsets: Tensor,
    *,
    scale: float | Tensor = 1.0,
    precision: str = "ieee",
    whole: bool | None = None,
) -> Tensor:
    """Writes s_m * sum_t left[t, m] right[t, m]^T of each example into `rows` and returns `rows`.

    left: (T, M, a), right: (T, M, b), one dtype, last dimension contiguous
    segments: `Segments`, or cu_seqlens (E + 1,) int32 (then read on the host, which waits for a GPU)
    rows: (E, K) float32 or bfloat16, last dimension contiguous; only the M blocks of a * b numbers are written
    offsets: (M,) int64, first number of each block; the blocks must lie inside a row and apart (not checked: that
        would wait for the device)
    scale: one number, or (M,) float32
    whole: one program an example, not a chunk (None: where that fills the card); the bits are the same

    Raises ConfigError for shapes, dtypes or devices that do not fit, or for whole examples whose chunks are no multiple
    of a block of tokens, DataError for an example of no tokens.
    """
    name = "segment_outer"
    segments = as_segments(segments)
    check_shape(name, "left", left, ("T", "M", "a"))
    tokens, modules, a_size = left.shape
    check_shape(name, "right", right, (tokens, modules, "b"))
    b_size = right.shape[2]
    check_tokens(name, "left", left, segments)
    check_shape(name, "rows", rows, (segments.examples, "K"))
    check_shape(name, "offsets", offsets, (modules,))
    check_last_stride(name, left=left, right=right, rows=rows, offsets=offsets)
    check_dtype(name, left=left, right=right)
    check_precision(name, precision)
    if rows.dtype not in ROW_DTYPES:
        raise ConfigError(f"{name}: rows must be float32 or bfloat16, got {rows.dtype}")
    if offsets.dtype != torch.int64:
        raise ConfigError(f"{name}: offsets must be int64, got {offsets.dtype}")
    if modules * a_size * b_size > rows.shape[1]:
        raise ConfigError(
            f"{name}: {modules} blocks of {a_size} x {b_size} do not fit in rows of {rows.shape[1]} numbers"
        )
    scales = scale if isinstance(scale, Tensor) else None
    if scales is not None:
        check_shape(name, "scale", scales, (modules,))
        if scales.dtype != torch.float32 or not scales.is_contiguous():
            raise ConfigError(f"{name}: a tensor of scales must be contiguous float32, got {scales.dtype}")
    device = check_device(
        name, left=left, right=right, rows=rows, offsets=offsets, scale=scales, segments=segments.cu_seqlens
    )
    number = 1.0 if isinstance(scale, Tensor) else float(scale)

    tiles = configuration(a_size, b_size, left.element_size(), precision)
    num_warps, num_stages = tiles.pop("num_warps"), tiles.pop("num_stages")
    across = ceil_div(a_size, tiles["BLOCK_A"]) * ceil_div(b_size, tiles["BLOCK_B"])
    fits = segments.chunk % tiles["BLOCK_L"] == 0
    if whole and not fits:
        raise ConfigError(f"{name}: chunks of {segments.chunk} tokens are no multiple of {tiles['BLOCK_L']}")
    if whole is None:
        # Some programs a processor for as long as the longest example takes.
        busy = _PROGRAMS * processors(device) * segments.longest <= segments.tokens * modules * across
        whole = fits and segments.slots > 0 and busy
    shared = {
        "left": left,
        "right": right,
        "offsets": offsets,
        "scales": scales if scales is not None else rows,
        "rows": rows,
        "scale": number,
        "modules": modules,
        "a_size": a_size,
        "b_size": b_size,
        "stride_lt": left.stride(0),
        "stride_lm": left.stride(1),
        "stride_rt": right.stride(0),
        "stride_rm": right.stride(1),
        "stride_row": rows.stride(0),
    }
    constants = {**tiles, "HAS_SCALES": scales is not None, "PRECISION": precision}
    how: dict[str, Any] = {"device": device, "num_warps": num_warps, "num_stages": num_stages}
    if whole:
        launch(
            _example_kernel,
            (segments.examples * modules, across),
            {**shared, "cu_seqlens": segments.cu_seqlens},
            {**constants, "CHUNK": segments.chunk},
            **how,
        )
        return rows
    # Of no numbers where no example is split, but float32 too: for another pointer Triton compiles another variant.
    parts = torch.empty(segments.slots, modules, a_size, b_size, dtype=torch.float32, device=device)
    chunks = {key: getattr(segments, key) for key in ("chunk_start", "chunk_stop", "chunk_example", "chunk_slot")}
    launch(_chunk_kernel, (segments.chunks * modules, across), {**shared, **chunks, "parts": parts}, constants, **how)
    if segments.slots:
        size = a_size * b_size
        block = min(padded(size), 1024)
        launch(
            _add_chunks_kernel,
            (segments.split_example.numel() * modules, ceil_div(size, block)),
            {
                "parts": parts,
                "split_example": segments.split_example,
                "split_slot": segments.split_slot,
                "offsets": offsets,
                "scales": scales if scales is not None else rows,
                "rows": rows,
                "scale": number,
                "modules": modules,
                "size": size,
                "stride_row": rows.stride(0),
            },
            {"BLOCK": block, "HAS_SCALES": scales is not None},
            device=device,
            num_warps=4,
            num_stages=1,
        )
    return rows


def reference(left: Tensor, right: Tensor, segments: Segments | Tensor, *, scale: float | Tensor = 1.0) -> Tensor:
    """The same blocks in PyTorch, in the dtype of `left`: (E, M, a, b)."""
    segments = as_segments(segments)
    cu = segments.cu_seqlens.tolist()
    sums = torch.stack([torch.einsum("tma,tmb->mab", left[a:b], right[a:b]) for a, b in pairwise(cu)])
    factor = scale.to(sums.dtype)[:, None, None] if isinstance(scale, Tensor) else scale
    return sums * factor


def cost(
    tokens: int,
    examples: int,
    modules: int,
    a_size: int,
    b_size: int,
    *,
    itemsize: int = 2,
    row_itemsize: int = 2,
) -> Cost:
    """Floor of one call: 2 T M a b FLOPs; left, right and the blocks moved once."""
    moved = tokens * modules * (a_size + b_size) * itemsize
    moved += examples * modules * a_size * b_size * row_itemsize
    return Cost(2 * tokens * modules * a_size * b_size, moved)
