# mypy: disable-error-code="no-untyped-def"
"""Tall inputs times a few columns, in one pass: out = x W.

    x (T, d) activations or output gradients of packed tokens, W (d, N) small and cached (LoRA's A^T or B and the random
    columns, of every module that shares the input). N from 1 to 256.

    forward   [h | z] = x [A^T | R_in]       backward   [u | y] = g [B | R_out]

Random columns made in the kernel from their counter, so that R need not be stored, took 2.1 and 2.7 times as long as
reading them (16 of N = 32 columns, d = 3584 and 18944, T = 16384, benches/results/gpu-*-1921.json), and are gone.

Bytes: x once, W from the L2 cache, out once; at N = 32 in bfloat16 that is 32 FLOPs a byte, far below any
GPU's ridge, so the floor is one read of x.

A program owns BLOCK_T rows and all N columns. The sum over d runs in chunks of CHUNK_K, each summed from zero and the
chunks added in order. Where T is too short to fill the GPU, one program takes one chunk and a second kernel adds the
chunks in that same order: the bits of a row depend neither on T nor on the GPU's size, only on its own values.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from influence_fast.errors import ConfigError
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
# where at N = 32 it is 158 against 152 (benches/results/gpu-*-1921.json).
MOST_COLUMNS_16_BIT = 64


@jit(do_not_specialize=["tokens"])
def _skinny_kernel(
    x,  # [T, d]
    w,  # [d, N]
    out,  # [T, N], or [chunks, T, N] float32 where SPLIT
    tokens,
    features,
    columns,
    stride_xt,
    stride_wd,
    stride_wn,
    stride_ot,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHUNK: tl.constexpr,
    PAD: tl.constexpr,  # N, padded
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

    column = tl.arange(0, PAD)
    mask_w = (column < columns)[None, :]
    w_column = w + column.to(tl.int64)[None, :] * stride_wn
    chunk = tl.zeros([BLOCK_T, PAD], dtype=tl.float32)
    total = tl.zeros([BLOCK_T, PAD], dtype=tl.float32)

    for start in range(first, last, BLOCK_K):
        k = (start + lane_k).to(tl.int64)
        k_mask = k < features
        tile = tl.load(x_row + k[None, :], mask=t_mask & k_mask[None, :], other=0.0)
        weights = tl.load(w_column + k[:, None] * stride_wd, mask=k_mask[:, None] & mask_w, other=0.0)
        chunk = dot(tile, weights, chunk, PRECISION)
        if not SPLIT:
            # A chunk ends where a multiple of CHUNK is reached; the last, shorter one is added after the loop.
            ends = (start + BLOCK_K) % CHUNK == 0
            total = tl.where(ends, total + chunk, total)
            chunk = tl.where(ends, 0.0, chunk)

    total += chunk
    tl.store(out + t[:, None] * stride_ot + column[None, :], total, mask=t_mask & mask_w)


@jit(do_not_specialize=["size"])
def _add_chunks_kernel(
    parts,  # [chunks, T, N] float32
    out,  # [T, N]
    size,
    columns,
    chunks,
    stride_ot,
    BLOCK: tl.constexpr,
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
    tl.store(out + t * stride_ot + n, total, mask=mask)


def configuration(columns: int, itemsize: int, precision: str = "ieee") -> dict[str, int]:
    """Return tile sizes by the number of columns and bytes an element; never by T, so that bits do not depend on T."""
    wide = columns > 64
    num_warps = 8 if wide else 4
    if itemsize == 4 and precision == "ieee":
        # No tensor cores: small tiles and more warps, or the operands of the FMA loop spill.
        num_warps = 8 if columns > 32 else 4
        block_k = 16 if columns > 128 else 32
        num_stages = 2 if block_k == 16 else 3
        return {"BLOCK_T": 32, "BLOCK_K": block_k, "num_warps": num_warps, "num_stages": num_stages}
    if itemsize == 2 and not wide:
        # On an H200 97 % of a copy's bandwidth at N = 32 and 94 % at N = 64 (d = 18944): as fast as twice the rows, and
        # more programs for short packs. 96 KB of shared memory, which cards of 100 KB have too.
        return {"BLOCK_T": 64, "BLOCK_K": 128, "num_warps": 4, "num_stages": 4 if columns <= 32 else 3}
    if itemsize == 2 and columns <= 128:
        # Every program reads all of w from the L2 cache, d N numbers for each d BLOCK_T of x: with 64 rows that cache
        # would have to give more than memory, which it cannot.
        return {"BLOCK_T": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3}
    block_k = 32 if wide and itemsize == 4 else 64
    # tf32x3 holds three products' operands at once: 64 rows of more than 128 columns spill 1 KB a thread.
    block_t = 32 if precision == "tf32x3" and itemsize == 4 and columns > 128 else 64
    return {"BLOCK_T": block_t, "BLOCK_K": block_k, "num_warps": num_warps, "num_stages": 3 if wide else 4}


def skinny_project(
    x: Tensor,
    w: Tensor,
    *,
    out: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    precision: str = "ieee",
    split: bool | None = None,
) -> Tensor:
    """Multiply x by w in one pass over x.

    x: (T, d), rows contiguous; float32, bfloat16 or float16
    w: (d, N) of the dtype of x, any strides (A.T of a LoRA factor as it is)
    out: (T, N), rows contiguous; made with `out_dtype` (that of x by default) if None
    precision: of float32 products: "ieee", "tf32" or "tf32x3"
    split: one program a chunk of d (None: where T alone leaves half of the GPU idle); the bits are the same

    Raises ConfigError for shapes, dtypes or devices that do not fit.
    """
    name = "skinny_project"
    check_shape(name, "x", x, ("T", "d"))
    check_last_stride(name, x=x)
    check_precision(name, precision)
    tokens, features = x.shape
    check_shape(name, "w", w, (features, "N"))
    columns = w.shape[1]
    if not 1 <= columns <= MAX_COLUMNS:
        raise ConfigError(
            f"{name}: {columns} columns asked for, needs 1 to {MAX_COLUMNS}; share fewer modules in one call"
        )
    dtype = check_dtype(name, x=x, w=w)
    device = check_device(name, x=x, w=w, out=out)
    if out is None:
        out = torch.empty(tokens, columns, dtype=out_dtype or dtype, device=device)
    check_shape(name, "out", out, (tokens, columns))
    check_last_stride(name, out=out)
    if out.dtype not in DTYPES:
        raise ConfigError(f"{name}: out must be float32, bfloat16 or float16, got {out.dtype}")
    if tokens == 0:
        return out

    tiles = configuration(columns, x.element_size(), precision)
    num_warps, num_stages = tiles.pop("num_warps"), tiles.pop("num_stages")
    chunks = ceil_div(features, CHUNK_K)
    rows = ceil_div(tokens, tiles["BLOCK_T"])
    if split is None:
        # partial sums of N = 96 columns are two fifths more bytes at d = 3584: too dear for a last few processors
        split = chunks > 1 and 2 * rows <= processors(device)
    target = torch.empty(chunks, tokens, columns, dtype=torch.float32, device=device) if split else out
    arguments: dict[str, Any] = {
        "x": x,
        "w": w,
        "out": target,
        "tokens": tokens,
        "features": features,
        "columns": columns,
        "stride_xt": x.stride(0),
        "stride_wd": w.stride(0),
        "stride_wn": w.stride(1),
        "stride_ot": columns if split else out.stride(0),
    }
    constants = {
        **tiles,
        "CHUNK": CHUNK_K,
        "PAD": padded(columns),
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
                "out": out,
                "size": tokens * columns,
                "columns": columns,
                "chunks": chunks,
                "stride_ot": out.stride(0),
            },
            {"BLOCK": block},
            device=device,
            num_warps=4,
            num_stages=1,
        )
    return out


def reference(x: Tensor, w: Tensor) -> Tensor:
    """Compute `skinny_project` in PyTorch, in the dtype of x: (T, d) -> (T, N)."""
    return x @ w


def cost(tokens: int, features: int, columns: int, *, itemsize: int = 2, out_itemsize: int = 2) -> Cost:
    """Return the least work of one call: 2 T d N FLOPs; x, w and out moved once."""
    moved = (tokens + columns) * features * itemsize + tokens * columns * out_itemsize
    return Cost(2 * tokens * features * columns, moved)
