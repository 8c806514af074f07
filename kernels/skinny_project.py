# mypy: disable-error-code="no-untyped-def"
"""Tall inputs times a few columns, in one pass: out = (x [W | R]) * c.

    x (T, d) activations or output gradients of packed tokens, W (d, n_w) small and cached (LoRA's A^T or B of every
    module that shares the input, random columns too if they are cached), R (d, n_r) of ±1 from the counter function,
    never stored, c (N,) one factor a column (LoRA's s, 1/sqrt(p)). N = n_w + n_r from 1 to 256.

    forward   [h | z] = x [A^T | R_in]       backward   [u | y] = g [B | R_out]

Bytes: x once, W and R from the L2 cache, out once; at N = 32 in bfloat16 that is 32 FLOPs a byte, far below any
card's ridge, so the floor is one read of x.

A program owns BLOCK_T rows and all N columns. The sum over d runs in chunks of CHUNK_K, each summed from zero and the
chunks added in order. Where T is too short to fill the card, one program takes one chunk and a second kernel adds the
chunks in that same order: the bits of a row depend neither on T nor on the card's size, only on its own values.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from influence_fast.errors import ConfigError
from influence_fast.kernels.counter import SignColumns, select_word, sign_words
from influence_fast.kernels.runtime import (
    DTYPES,
    Cost,
    ceil_div,
    check_device,
    check_dtype,
    check_last_stride,
    check_precision,
    check_shape,
    dot,
    jit,
    launch,
    padded,
    processors,
    tl,
)

MAX_COLUMNS = 256
CHUNK_K = 1024
# Of more 16-bit columns PyTorch's product is faster: 155 us against 247 at N = 96, d = 18944 and T = 16384 on an H200,
# where at N = 32 it is 158 against 150.
MOST_COLUMNS_16_BIT = 64


@jit
def _sign_columns(row, column, keys, MODULES: tl.constexpr, DIM: tl.constexpr):
    """±1 as float32 [K, N] of MODULES matrices of DIM columns side by side; one counter a row and matrix."""
    module = (column // DIM)[None, :]
    lane = (column % DIM)[None, :]
    word = tl.zeros([row.shape[0], column.shape[0]], dtype=tl.uint32)
    for m in tl.static_range(MODULES):
        k0 = tl.load(keys + 2 * m)
        k1 = tl.load(keys + 2 * m + 1)
        w0, w1, w2, w3 = sign_words(row, tl.full((), 0, tl.int32), k0, k1)
        w0, w1, w2, w3 = w0[:, None], w1[:, None], w2[:, None], w3[:, None]
        own = w0 if DIM <= 32 else select_word(lane, w0, w1, w2, w3)
        word = tl.where(module == m, own, word)
    bit = (word >> (lane % 32).to(tl.uint32)) & 1
    return 1.0 - 2.0 * bit.to(tl.float32)


@jit(do_not_specialize=["tokens"])
def _skinny_kernel(
    x,  # [T, d]
    w,  # [d, n_w]
    keys,  # [MODULES, 2] int64, or unused
    factors,  # [N] float32, or unused
    out,  # [T, N], or [chunks, T, N] float32 where SPLIT
    tokens,
    features,
    cached_columns,
    stride_xt,
    stride_wd,
    stride_wn,
    stride_ot,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHUNK: tl.constexpr,
    PAD_W: tl.constexpr,  # 0: no cached columns
    PAD_R: tl.constexpr,  # 0: no generated columns
    MODULES: tl.constexpr,
    DIM: tl.constexpr,
    HAS_FACTORS: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    t_mask = (t < tokens)[:, None]
    lane_k = tl.arange(0, BLOCK_K)
    x_row = x + t[:, None] * stride_xt
    first = 0
    last = features
    if SPLIT:
        first = tl.program_id(1) * CHUNK
        last = tl.minimum(first + CHUNK, features)
        out += tl.program_id(1).to(tl.int64) * tokens * stride_ot

    if PAD_W > 0:
        column_w = tl.arange(0, PAD_W)
        mask_w = (column_w < cached_columns)[None, :]
        w_column = w + column_w.to(tl.int64)[None, :] * stride_wn
        chunk_w = tl.zeros([BLOCK_T, PAD_W], dtype=tl.float32)
        total_w = tl.zeros([BLOCK_T, PAD_W], dtype=tl.float32)
    if PAD_R > 0:
        column_r = tl.arange(0, PAD_R)
        chunk_r = tl.zeros([BLOCK_T, PAD_R], dtype=tl.float32)
        total_r = tl.zeros([BLOCK_T, PAD_R], dtype=tl.float32)

    for start in range(first, last, BLOCK_K):
        k = (start + lane_k).to(tl.int64)
        k_mask = k < features
        tile = tl.load(x_row + k[None, :], mask=t_mask & k_mask[None, :], other=0.0)
        # A chunk ends where a multiple of CHUNK is reached; the last, shorter one is added after the loop.
        ends = (start + BLOCK_K) % CHUNK == 0
        if PAD_W > 0:
            weights = tl.load(w_column + k[:, None] * stride_wd, mask=k_mask[:, None] & mask_w, other=0.0)
            chunk_w = dot(tile, weights, chunk_w, PRECISION)
            if not SPLIT:
                total_w = tl.where(ends, total_w + chunk_w, total_w)
                chunk_w = tl.where(ends, 0.0, chunk_w)
        if PAD_R > 0:
            signs = _sign_columns(k, column_r, keys, MODULES, DIM).to(tile.dtype)
            chunk_r = dot(tile, signs, chunk_r, PRECISION)
            if not SPLIT:
                total_r = tl.where(ends, total_r + chunk_r, total_r)
                chunk_r = tl.where(ends, 0.0, chunk_r)

    out_row = out + t[:, None] * stride_ot
    if PAD_W > 0:
        total_w += chunk_w
        if HAS_FACTORS and not SPLIT:
            total_w *= tl.load(factors + column_w, mask=column_w < cached_columns, other=0.0)[None, :]
        tl.store(out_row + column_w[None, :], total_w, mask=t_mask & mask_w)
    if PAD_R > 0:
        total_r += chunk_r
        mask_r = column_r < MODULES * DIM
        if HAS_FACTORS and not SPLIT:
            total_r *= tl.load(factors + cached_columns + column_r, mask=mask_r, other=0.0)[None, :]
        tl.store(out_row + cached_columns + column_r[None, :], total_r, mask=t_mask & mask_r[None, :])


@jit(do_not_specialize=["size"])
def _add_chunks_kernel(
    parts,  # [chunks, T, N] float32
    factors,  # [N] float32, or unused
    out,  # [T, N]
    size,
    columns,
    chunks,
    stride_ot,
    BLOCK: tl.constexpr,
    HAS_FACTORS: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < size
    part = parts + i
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for _ in range(0, chunks):
        total += tl.load(part, mask=mask, other=0.0)
        part += size
    t = i // columns
    n = i % columns
    if HAS_FACTORS:
        total *= tl.load(factors + n, mask=mask, other=0.0)
    tl.store(out + t * stride_ot + n, total, mask=mask)


def configuration(columns: int, itemsize: int, precision: str = "ieee", generated: int = 0) -> dict[str, int]:
    """Tile sizes by the number of columns and bytes an element; never by T, so that bits do not depend on T."""
    wide = columns > 64
    num_warps = 8 if wide else 4
    if itemsize == 4 and precision == "ieee":
        # No tensor cores: small tiles and more warps, or the operands of the FMA loop spill.
        num_warps = 8 if columns > 32 else 4
        block_k = 16 if columns > 128 or generated > 32 else 32
        num_stages = 2 if block_k == 16 else 3
        return {"BLOCK_T": 32, "BLOCK_K": block_k, "num_warps": num_warps, "num_stages": num_stages}
    # The generated bits of a tile live in registers as 32-bit words: half the tile where there are many.
    block_k = 32 if generated > 32 or (wide and itemsize == 4) else 64
    # tf32x3 holds three products' operands at once: 64 rows of more than 128 columns spill 1 KB a thread.
    block_t = 32 if precision == "tf32x3" and itemsize == 4 and columns > 128 else 64
    if itemsize == 2 and columns <= 32 and not generated:
        # as fast as twice the rows (99 % of a copy's bandwidth at d = 18944), and more programs for short packs
        return {"BLOCK_T": 64, "BLOCK_K": 128, "num_warps": 4, "num_stages": 4}
    if itemsize == 2 and columns <= 128 and not generated:
        # Every program reads all of w from the L2 cache, d N numbers for each d BLOCK_T of x: with 64 rows that cache
        # would have to give as much again as memory at N = 64, which it cannot.
        return {"BLOCK_T": 128, "BLOCK_K": block_k, "num_warps": 8, "num_stages": 3 if wide else 4}
    return {"BLOCK_T": block_t, "BLOCK_K": block_k, "num_warps": num_warps, "num_stages": 3 if wide else 4}


def skinny_project(
    x: Tensor,
    w: Tensor | None,
    *,
    signs: SignColumns | None = None,
    factors: Tensor | None = None,
    out: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    precision: str = "ieee",
    split: bool | None = None,
) -> Tensor:
    """[x W | x R] * factors, one pass over x.

    x: (T, d), rows contiguous; float32, bfloat16 or float16
    w: (d, n_w) of the dtype of x, any strides (A.T of a LoRA factor as it is), or None
    signs: the generated ±1 columns R, unscaled, or None
    factors: (n_w + n_r,) float32, one a column, applied to the float32 sum; None for ones
    out: (T, n_w + n_r), rows contiguous; made with `out_dtype` (that of x by default) if None
    precision: of float32 products: "ieee", "tf32" or "tf32x3"
    split: one program a chunk of d (None: where T alone leaves half of the card idle); the bits are the same

    Raises ConfigError for shapes, dtypes or devices that do not fit.
    """
    name = "skinny_project"
    check_shape(name, "x", x, ("T", "d"))
    check_last_stride(name, x=x)
    check_precision(name, precision)
    tokens, features = x.shape
    cached = 0
    if w is not None:
        check_shape(name, "w", w, (features, "n"))
        cached = w.shape[1]
    generated = signs.columns if signs is not None else 0
    columns = cached + generated
    if not 1 <= columns <= MAX_COLUMNS:
        raise ConfigError(
            f"{name}: {columns} columns asked for, needs 1 to {MAX_COLUMNS}; share fewer modules in one call"
        )
    dtype = check_dtype(name, x=x, w=w)
    device = check_device(name, x=x, w=w, keys=None if signs is None else signs.keys, factors=factors, out=out)
    if factors is not None:
        check_shape(name, "factors", factors, (columns,))
        if factors.dtype != torch.float32 or not factors.is_contiguous():
            raise ConfigError(f"{name}: factors must be contiguous float32, got {factors.dtype}")
    if out is None:
        out = torch.empty(tokens, columns, dtype=out_dtype or dtype, device=device)
    check_shape(name, "out", out, (tokens, columns))
    check_last_stride(name, out=out)
    if out.dtype not in DTYPES:
        raise ConfigError(f"{name}: out must be float32, bfloat16 or float16, got {out.dtype}")
    if tokens == 0:
        return out

    tiles = configuration(columns, x.element_size(), precision, generated)
    num_warps, num_stages = tiles.pop("num_warps"), tiles.pop("num_stages")
    chunks = ceil_div(features, CHUNK_K)
    rows = ceil_div(tokens, tiles["BLOCK_T"])
    if split is None:
        # partial sums of N = 96 columns are two fifths more bytes at d = 3584: too dear for a last few processors
        split = chunks > 1 and 2 * rows <= processors(device)
    target = torch.empty(chunks, tokens, columns, dtype=torch.float32, device=device) if split else out
    arguments: dict[str, Any] = {
        "x": x,
        "w": w if w is not None else x,
        "keys": signs.keys if signs is not None else x,
        "factors": factors if factors is not None else x,
        "out": target,
        "tokens": tokens,
        "features": features,
        "cached_columns": cached,
        "stride_xt": x.stride(0),
        "stride_wd": w.stride(0) if w is not None else 0,
        "stride_wn": w.stride(1) if w is not None else 0,
        "stride_ot": columns if split else out.stride(0),
    }
    constants = {
        **tiles,
        "CHUNK": CHUNK_K,
        "PAD_W": padded(cached) if cached else 0,
        "PAD_R": padded(generated) if generated else 0,
        "MODULES": len(signs.names) if signs is not None else 0,
        "DIM": signs.dim if signs is not None else 1,
        "HAS_FACTORS": factors is not None,
        "SPLIT": split,
        "PRECISION": precision,
    }
    launch(
        _skinny_kernel,
        (rows, chunks if split else 1),
        arguments,
        constants,
        device=device,
        num_warps=num_warps,
        num_stages=num_stages,
    )
    if split:
        block = 512
        launch(
            _add_chunks_kernel,
            (ceil_div(tokens * columns, block),),
            {
                "parts": target,
                "factors": arguments["factors"],
                "out": out,
                "size": tokens * columns,
                "columns": columns,
                "chunks": chunks,
                "stride_ot": out.stride(0),
            },
            {"BLOCK": block, "HAS_FACTORS": factors is not None},
            device=device,
            num_warps=4,
            num_stages=1,
        )
    return out


def reference(
    x: Tensor, w: Tensor | None, *, signs: SignColumns | None = None, factors: Tensor | None = None
) -> Tensor:
    """The same in PyTorch, in the dtype of x: (T, d) -> (T, n_w + n_r)."""
    parts = [] if w is None else [x @ w]
    if signs is not None:
        parts.append(x @ signs.matrix(x.shape[1], dtype=x.dtype, device=x.device))
    out = torch.cat(parts, dim=1)
    return out if factors is None else out * factors.to(out.dtype)


def cost(
    tokens: int,
    features: int,
    columns: int,
    *,
    itemsize: int = 2,
    out_itemsize: int = 2,
    generated: int = 0,
) -> Cost:
    """Floor of one call: 2 T d N FLOPs; x, the cached columns and out moved once."""
    cached = features * (columns - generated)
    moved = (tokens * features + cached) * itemsize + tokens * columns * out_itemsize
    return Cost(2 * tokens * features * columns, moved)
