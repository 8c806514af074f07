# mypy: disable-error-code="no-untyped-def"
"""Scatter per-example gradients into a sjlt sketch: rows[e, bucket(i)] += sign(i) G[e, i].

A program owns one chunk of an example and a run of tiles of d x r, and a float32 sketch of its own. It sums a tile of
G over the tokens in registers, then adds it to its sketch in the rounds of `FlatSketch`, with a barrier between rounds.
A second kernel adds the sketches of an example in order. Traffic beyond g: C * splits sketches of `width` float32
(C chunks).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from influence_fast.kernels.counter import sjlt_entry
from influence_fast.kernels.flat_sketch import FlatSketch, tile_sides
from influence_fast.kernels.outer_tile import outer_tile
from influence_fast.kernels.runtime import ceil_div, jit, launch, padded, tl
from influence_fast.kernels.segments import Segments

TILES_A_PROGRAM = 8  # at least
MOST_SPLITS = 8  # programs, and so sketches, of a chunk


@jit
def _scatter_kernel(
    g,  # [T, d]
    h,  # [T, r]
    chunk_start,  # [C] int32
    chunk_stop,  # [C] int32
    rounds,  # [d * r] int16: round of each coordinate within its tile
    tile_rounds,  # [tiles] int32: rounds of each tile
    keys,  # [3] int64: k0, k1, width
    parts,  # [C, splits, width] float32
    d_size,
    r_size,
    tiles,
    stride_gt,
    stride_ht,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_W: tl.constexpr,
    PRECISION: tl.constexpr,
):
    chunk = tl.program_id(0)
    split = tl.program_id(1)
    k0 = tl.load(keys)
    k1 = tl.load(keys + 1)
    width = tl.load(keys + 2)
    sketch = parts + (chunk.to(tl.int64) * tl.num_programs(1) + split) * width
    for zeroed in range(0, width, BLOCK_W):
        place = zeroed + tl.arange(0, BLOCK_W)
        tl.store(sketch + place, tl.zeros([BLOCK_W], dtype=tl.float32), mask=place < width)
    tl.debug_barrier()

    begin = tl.load(chunk_start + chunk)
    stop = tl.load(chunk_stop + chunk)
    tiles_r = tl.cdiv(r_size, BLOCK_R)
    for tile in range(split * TILES, tl.minimum(split * TILES + TILES, tiles)):
        d = ((tile // tiles_r) * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)
        r = ((tile % tiles_r) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
        d_mask = d < d_size
        r_mask = r < r_size
        total = outer_tile(g, h, d, r, d_mask, r_mask, begin, stop, stride_gt, stride_ht, BLOCK_L, PRECISION)
        index = d[:, None] * r_size + r[None, :]
        own_round = tl.load(rounds + index, mask=d_mask[:, None] & r_mask[None, :], other=-1)
        bucket, sign = sjlt_entry(index, width, k0, k1)
        total *= sign
        # num_stages=1: the loads of a round must not be fetched ahead of the stores of the one before.
        for i in tl.range(0, tl.load(tile_rounds + tile), num_stages=1):
            now = own_round == i
            before = tl.load(sketch + bucket, mask=now, other=0.0)
            tl.store(sketch + bucket, before + total, mask=now)
            tl.debug_barrier()


@jit
def _add_sketches_kernel(
    parts,  # [C, splits, width] float32
    first_chunk,  # [E + 1] int32
    rows,  # [E, width]
    scale,
    splits,
    width,
    stride_row,
    BLOCK: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):
    e = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < width
    total = tl.zeros([BLOCK], dtype=tl.float32)
    first = tl.load(first_chunk + e).to(tl.int64) * splits
    last = tl.load(first_chunk + e + 1).to(tl.int64) * splits
    for p in range(first, last):
        total += tl.load(parts + p * width + i, mask=mask, other=0.0)
    total *= scale
    target = rows + e * stride_row + i
    if ACCUMULATE:
        total += tl.load(target, mask=mask, other=0.0).to(tl.float32)
    tl.store(target, total, mask=mask)


def configuration(d_size: int, r_size: int, itemsize: int, precision: str = "ieee") -> dict[str, int]:
    """Tiles of d x r of the scatter kernel. `FlatSketch` tabulates rounds for these, so they depend on d and r alone
    in their sides."""
    fma = itemsize == 4 and precision == "ieee"
    block_d, block_r = tile_sides(d_size, r_size)
    return {
        "BLOCK_L": 32 if fma else 64,
        "BLOCK_D": block_d,
        "BLOCK_R": block_r,
        "num_warps": 4,
        "num_stages": 2 if fma else 3,
    }


def project_sjlt(
    g: Tensor,
    h: Tensor,
    segments: Segments,
    sketch: FlatSketch,
    rows: Tensor,
    scale: float,
    accumulate: bool,
    precision: str,
) -> None:
    blocks: dict[str, Any] = configuration(sketch.d_size, sketch.r_size, g.element_size(), precision)
    num_warps, num_stages = blocks.pop("num_warps"), blocks.pop("num_stages")
    tiles = sketch.tile_rounds.numel()
    share = max(TILES_A_PROGRAM, ceil_div(tiles, MOST_SPLITS))
    splits = ceil_div(tiles, share)
    parts = torch.empty(segments.chunks, splits, sketch.width, dtype=torch.float32, device=g.device)
    block_w = min(padded(sketch.width), 1024)
    launch(
        _scatter_kernel,
        (segments.chunks, splits),
        {
            "g": g,
            "h": h,
            "chunk_start": segments.chunk_start,
            "chunk_stop": segments.chunk_stop,
            "rounds": sketch.rounds,
            "tile_rounds": sketch.tile_rounds,
            "keys": sketch.keys,
            "parts": parts,
            "d_size": sketch.d_size,
            "r_size": sketch.r_size,
            "tiles": tiles,
            "stride_gt": g.stride(0),
            "stride_ht": h.stride(0),
        },
        {**blocks, "TILES": share, "BLOCK_W": block_w, "PRECISION": precision},
        device=g.device,
        num_warps=num_warps,
        num_stages=num_stages,
    )
    launch(
        _add_sketches_kernel,
        (segments.examples, ceil_div(sketch.width, block_w)),
        {
            "parts": parts,
            "first_chunk": segments.first_chunk,
            "rows": rows,
            "scale": scale,
            "splits": splits,
            "width": sketch.width,
            "stride_row": rows.stride(0),
        },
        {"BLOCK": block_w, "ACCUMULATE": accumulate},
        device=g.device,
        num_warps=4,
        num_stages=1,
    )
