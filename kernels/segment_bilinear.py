# mypy: disable-error-code="no-untyped-def"
"""Scores of packed examples against query gradients, while the backward passes by (stream mode).

    out[e, q] = s * sum over tokens t of example e of  g[t]^T M[q] h[t]

    g (T, d), h (T, r), M (q, d, r). With M the query's dB (d_out, r) and g, h of a layer this is its part of the
    influence; the part of dA is the same with x for g, u for h and the query's dA transposed.

A program owns one chunk of one example and one tile of d x r: it sums G = sum_t g_t h_t^T over the tile in registers,
then takes the inner product of G with the same tile of every query. So g is read once whatever the number of queries,
and the work is 2 T d r + 2 C q d r FLOPs (C chunks) where the form (g M_q) h would need 2 T q d r. No (T, d)
intermediate, no stored gradient. The q numbers of each tile go to a small float32 table, which a second kernel adds in
order; with `accumulate` it adds to what `out` holds, so one (E, q) buffer runs through all layers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from influence_fast.errors import ConfigError
from influence_fast.kernels.outer_tile import outer_tile
from influence_fast.kernels.runtime import (
    DTYPES,
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
    tl,
)
from influence_fast.kernels.segments import Segments, as_segments, check_tokens, segment_sum


@jit
def _tile_kernel(
    g,  # [T, d]
    h,  # [T, r]
    queries,  # [q, d, r]
    chunk_start,  # [C] int32
    chunk_stop,  # [C] int32
    parts,  # [C, tiles, q] float32
    d_size,
    r_size,
    q_size,
    stride_gt,
    stride_ht,
    stride_mq,
    stride_md,
    stride_mr,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    PRECISION: tl.constexpr,
):
    chunk = tl.program_id(0)
    tiles_r = tl.cdiv(r_size, BLOCK_R)
    d = ((tl.program_id(1) // tiles_r) * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)
    r = ((tl.program_id(1) % tiles_r) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    d_mask = d < d_size
    r_mask = r < r_size
    begin = tl.load(chunk_start + chunk)
    stop = tl.load(chunk_stop + chunk)
    total = outer_tile(g, h, d, r, d_mask, r_mask, begin, stop, stride_gt, stride_ht, BLOCK_L, PRECISION)

    place = d[:, None] * stride_md + r[None, :] * stride_mr
    mask = d_mask[:, None] & r_mask[None, :]
    row = parts + (chunk.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * q_size
    for first in range(0, q_size, BLOCK_Q):
        q = first + tl.arange(0, BLOCK_Q)
        q_mask = q < q_size
        tile_m = tl.load(
            queries + q.to(tl.int64)[:, None, None] * stride_mq + place[None, :, :],
            mask=q_mask[:, None, None] & mask[None, :, :],
            other=0.0,
        )
        products = tile_m.to(tl.float32) * total[None, :, :]
        tl.store(row + q, tl.sum(tl.sum(products, axis=2), axis=1), mask=q_mask)


@jit
def _add_tiles_kernel(
    parts,  # [C, tiles, q] float32
    first_chunk,  # [E + 1] int32
    out,  # [E, q] float32
    scale,
    tiles,
    q_size,
    stride_oe,
    BLOCK_P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):
    e = tl.program_id(0).to(tl.int64)
    q = tl.program_id(1) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    q_mask = q < q_size
    # Blocks of partial sums start at the example's own first one, so their grouping is its own as well.
    begin = tl.load(first_chunk + e).to(tl.int64) * tiles
    count = (tl.load(first_chunk + e + 1) - tl.load(first_chunk + e)) * tiles
    lane = tl.arange(0, BLOCK_P)
    total = tl.zeros([BLOCK_Q], dtype=tl.float32)
    for start in range(0, count, BLOCK_P):
        p = start + lane
        block = tl.load(
            parts + (begin + p)[:, None] * q_size + q[None, :],
            mask=(p < count)[:, None] & q_mask[None, :],
            other=0.0,
        )
        total += tl.sum(block, axis=0)
    total *= scale
    target = out + e * stride_oe + q
    if ACCUMULATE:
        total += tl.load(target, mask=q_mask, other=0.0)
    tl.store(target, total, mask=q_mask)


def configuration(d_size: int, r_size: int, itemsize: int, precision: str = "ieee") -> dict[str, int]:
    """Tiles of d x r; as many queries at once as ptxas holds with no spill (twice as many spill on sm_80)."""
    block_d, block_r = min(padded(d_size), 64), min(padded(r_size), 64)
    block_q = max(1, 2048 // (block_d * block_r))
    fma = itemsize == 4 and precision == "ieee"
    return {
        "BLOCK_L": 32 if fma else 64,
        "BLOCK_D": block_d,
        "BLOCK_R": block_r,
        "BLOCK_Q": block_q,
        "num_warps": 4,
        "num_stages": 2 if fma else 3,
    }


def segment_bilinear(
    g: Tensor,
    h: Tensor,
    queries: Tensor,
    segments: Segments | Tensor,
    *,
    scale: float = 1.0,
    out: Tensor | None = None,
    accumulate: bool = False,
    precision: str = "ieee",
) -> Tensor:
    """s * sum_t g_t^T M_q h_t of each example and query -> (E, q) float32.

    g: (T, d), h: (T, r), one dtype, rows contiguous
    queries: (q, d, r), float32, bfloat16 or float16, any strides (a transposed dA as it is)
    segments: `Segments`, or cu_seqlens (E + 1,) int32 (then read on the host, which waits for a GPU)
    out: (E, q) float32, rows contiguous; made if None. accumulate: add to `out` instead of overwriting it

    Raises ConfigError for shapes, dtypes or devices that do not fit, DataError for an example of no tokens.
    """
    name = "segment_bilinear"
    segments = as_segments(segments)
    check_shape(name, "g", g, ("T", "d"))
    check_shape(name, "h", h, (g.shape[0], "r"))
    check_tokens(name, "g", g, segments)
    d_size, r_size = g.shape[1], h.shape[1]
    check_shape(name, "queries", queries, ("q", d_size, r_size))
    q_size = queries.shape[0]
    check_last_stride(name, g=g, h=h)
    check_dtype(name, g=g, h=h)
    check_precision(name, precision)
    if queries.dtype not in DTYPES:
        raise ConfigError(f"{name}: queries must be float32, bfloat16 or float16, got {queries.dtype}")
    if accumulate and out is None:
        raise ConfigError(f"{name}: accumulate=True needs the `out` to add to")
    if out is None:
        out = torch.empty(segments.examples, q_size, dtype=torch.float32, device=g.device)
    check_shape(name, "out", out, (segments.examples, q_size))
    check_last_stride(name, out=out)
    if out.dtype != torch.float32:
        raise ConfigError(f"{name}: out must be float32, got {out.dtype}")
    device = check_device(name, g=g, h=h, queries=queries, out=out, segments=segments.cu_seqlens)
    if q_size == 0:
        return out

    blocks = configuration(d_size, r_size, g.element_size(), precision)
    num_warps, num_stages = blocks.pop("num_warps"), blocks.pop("num_stages")
    tiles = ceil_div(d_size, blocks["BLOCK_D"]) * ceil_div(r_size, blocks["BLOCK_R"])
    parts = torch.empty(segments.chunks, tiles, q_size, dtype=torch.float32, device=device)
    launch(
        _tile_kernel,
        (segments.chunks, tiles),
        {
            "g": g,
            "h": h,
            "queries": queries,
            "chunk_start": segments.chunk_start,
            "chunk_stop": segments.chunk_stop,
            "parts": parts,
            "d_size": d_size,
            "r_size": r_size,
            "q_size": q_size,
            "stride_gt": g.stride(0),
            "stride_ht": h.stride(0),
            "stride_mq": queries.stride(0),
            "stride_md": queries.stride(1),
            "stride_mr": queries.stride(2),
        },
        {**blocks, "PRECISION": precision},
        device=device,
        num_warps=num_warps,
        num_stages=num_stages,
    )
    # Both sizes are fixed, or the grouping of the sum would depend on the number of queries.
    block_p, block_q = 128, 16
    launch(
        _add_tiles_kernel,
        (segments.examples, ceil_div(q_size, block_q)),
        {
            "parts": parts,
            "first_chunk": segments.first_chunk,
            "out": out,
            "scale": float(scale),
            "tiles": tiles,
            "q_size": q_size,
            "stride_oe": out.stride(0),
        },
        {"BLOCK_P": block_p, "BLOCK_Q": block_q, "ACCUMULATE": accumulate},
        device=device,
        num_warps=4,
        num_stages=1,
    )
    return out


def reference(g: Tensor, h: Tensor, queries: Tensor, segments: Segments | Tensor, *, scale: float = 1.0) -> Tensor:
    """The same in PyTorch, in the dtype of g: (E, q)."""
    tokens = torch.einsum("td,qdr,tr->tq", g, queries.to(g.dtype), h)
    return scale * segment_sum(tokens, as_segments(segments))


def cost(
    tokens: int,
    d_size: int,
    r_size: int,
    queries: int,
    chunks: int,
    *,
    itemsize: int = 2,
    query_itemsize: int = 4,
) -> Cost:
    """Floor of one call: 2 (T + C q) d r FLOPs; g, h and the queries moved once."""
    flops = 2 * (tokens + chunks * queries) * d_size * r_size
    moved = tokens * (d_size + r_size) * itemsize + queries * d_size * r_size * query_itemsize
    return Cost(flops, moved)
