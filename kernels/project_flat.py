# mypy: disable-error-code="no-untyped-def"
"""Per-example gradients of a whole factor straight into a sketch of `width` numbers.

    G[e] = s * sum over tokens t of example e of  g[t] h[t]^T     (d x r, flattened: i = row * r + column)
    rows[e] (+)= S G[e]                                            S (width, d r), from the counter function

    sjlt        one ±1 a column of S: rows[e, bucket(i)] += sign(i) G[e, i]
    rademacher  dense ±1 / sqrt(width), as TRAK and LESS use: rows[e, j] = sum_i S[j, i] G[e, i]

Neither stores the exact gradient, and neither adds floats with atomics.

**sjlt.** A program owns one chunk of an example and a run of tiles of d x r, and a float32 sketch of its own. It sums
a tile of G over the tokens in registers, then adds it to its sketch in rounds: coordinates of one tile that share a
bucket have different rounds, so a round writes no place twice, and a barrier stands between rounds. The round of a
coordinate is a function of the map alone and is tabulated once (`FlatSketch`, 2 bytes a coordinate). A second kernel
adds the sketches of an example in order. Traffic beyond g: C * splits sketches of `width` float32 (C chunks).

**rademacher.** The rows of S go through in slabs of at most SLAB coordinates, a block of d x r: `segment_outer` sums
that slab of G (E x SLAB float32, all that ever exists of the gradient), a kernel writes the slab's bits of S (width / 8
bytes a coordinate), and a matrix product adds G_slab S_slab to the (E, width) sketch. ±1 is exact in bfloat16 and
float32 is a sum of three bfloat16 numbers, so the products run on tensor cores and lose nothing: 2 E d r width FLOPs,
three times. Tensor cores cut their sums off where others round, so 32 coordinates at a time are summed there and added
up in float32. All examples of the pack share the bits; made in the product itself, every thread would make them again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from influence_fast.errors import ConfigError
from influence_fast.kernels import segment_outer as outer
from influence_fast.kernels.counter import sign_words, sjlt_entry
from influence_fast.kernels.runtime import (
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
    tl,
)
from influence_fast.kernels.segments import Segments, as_segments, check_tokens
from influence_fast.philox import FLAT_KINDS, key, sign_matrix, sjlt_map

SLAB = 32_768
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
        total = outer.outer_tile(g, h, d, r, d_mask, r_mask, begin, stop, stride_gt, stride_ht, BLOCK_L, PRECISION)
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


@jit(do_not_specialize=["first_row"])
def _slab_words_kernel(
    words,  # [n, 4 * blocks] int32
    keys,  # [3] int64: k0, k1, width
    first_row,
    count,  # n
    coordinates,  # of a run of coordinates that follow one another in G
    stride_run,  # from run to run in G
    BLOCK: tl.constexpr,
):
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    block = tl.program_id(1)
    run = c // coordinates
    row = first_row + run.to(tl.int64) * stride_run + (c - run * coordinates)
    w0, w1, w2, w3 = sign_words(row, block, tl.load(keys), tl.load(keys + 1))
    place = words + c.to(tl.int64) * (4 * tl.num_programs(1)) + 4 * block
    tl.store(place, w0.to(tl.int32, bitcast=True), mask=c < count)
    tl.store(place + 1, w1.to(tl.int32, bitcast=True), mask=c < count)
    tl.store(place + 2, w2.to(tl.int32, bitcast=True), mask=c < count)
    tl.store(place + 3, w3.to(tl.int32, bitcast=True), mask=c < count)


@jit(do_not_specialize=["examples"])
def _dense_kernel(
    slab,  # [E, n] float32
    words,  # [n, 4 * blocks] int32
    sketch,  # [E, width] float32, added to
    examples,
    count,  # n
    width,
    BLOCK_E: tl.constexpr,
    BLOCK_I: tl.constexpr,
    FIRST: tl.constexpr,
):
    e = tl.program_id(1).to(tl.int64) * BLOCK_E + tl.arange(0, BLOCK_E)
    lane = tl.arange(0, 128)
    column = tl.program_id(0) * 128 + lane
    e_mask = (e < examples)[:, None]
    target = sketch + e[:, None] * width + column[None, :]
    mask = e_mask & (column < width)[None, :]
    total = tl.zeros([BLOCK_E, 128], dtype=tl.float32) if FIRST else tl.load(target, mask=mask, other=0.0)
    words += (column // 32)[None, :]
    for start in range(0, count, BLOCK_I):
        i = start + tl.arange(0, BLOCK_I)
        inside = i < count
        values = tl.load(slab + e[:, None] * count + i[None, :], mask=e_mask & inside[None, :], other=0.0)
        word = tl.load(words + i.to(tl.int64)[:, None] * (4 * tl.num_programs(0)), mask=inside[:, None], other=0)
        bit = (word >> (lane % 32)[None, :]) & 1
        signs = (1.0 - 2.0 * bit.to(tl.float32)).to(tl.bfloat16)
        part = tl.zeros([BLOCK_E, 128], dtype=tl.float32)
        for _ in tl.static_range(3):
            term = values.to(tl.bfloat16)
            part = dot(term, signs, part, "ieee")
            values -= term.to(tl.float32)
        total += part
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


def tile_sides(d_size: int, r_size: int) -> tuple[int, int]:
    """About 1024 coordinates a tile, the longer side cut first."""
    block_d, block_r = min(padded(d_size), 64), min(padded(r_size), 64)
    while block_d * block_r > 1024:
        block_d, block_r = (block_d // 2, block_r) if block_d >= block_r else (block_d, block_r // 2)
    return block_d, block_r


def slab_sides(r_size: int) -> tuple[int, int]:
    """Rows and columns of a slab, at most SLAB coordinates: whole rows while 16 fit, as 16-byte aligned slices of g."""
    columns = min(r_size, SLAB // 16)
    return SLAB // columns // 16 * 16, columns


@dataclass(frozen=True, slots=True)
class FlatSketch:
    """The map of one factor of d x r into `width` numbers, with its tables on the device; make once, keep.

    rounds: (d * r,) int16, sjlt only: rank of a coordinate among those of its tile in the same bucket
    tile_rounds: (tiles,) int32, sjlt only: rounds that a tile needs
    keys: (3,) int64: the two key words and the width
    """

    kind: str
    seed: int
    name: str
    d_size: int
    r_size: int
    width: int
    keys: Tensor
    rounds: Tensor
    tile_rounds: Tensor

    @classmethod
    def of(
        cls,
        kind: str,
        seed: int,
        name: str,
        d_size: int,
        r_size: int,
        width: int,
        *,
        device: torch.device | str = "cpu",
    ) -> FlatSketch:
        """name: "<module>/row/<factor>". Raises ConfigError for an unknown kind or sizes out of range."""
        if kind not in FLAT_KINDS:
            raise ConfigError(f"a flat sketch is one of {', '.join(FLAT_KINDS)}, not {kind!r}")
        if min(d_size, r_size, width) < 1 or width >= 2**31:
            raise ConfigError(f"a flat sketch of {d_size} x {r_size} into {width} numbers is out of range")
        rounds = torch.empty(0, dtype=torch.int16)
        tile_rounds = torch.empty(0, dtype=torch.int32)
        if kind == "sjlt":
            bucket, _ = sjlt_map(seed, name, d_size * r_size, width)
            rounds, tile_rounds = scatter_rounds(bucket, d_size, r_size, width)
        keys = torch.tensor((*key(seed, name), width), dtype=torch.int64)
        return cls(
            kind,
            seed,
            name,
            d_size,
            r_size,
            width,
            keys.to(device),
            rounds.to(device),
            tile_rounds.to(device),
        )


def scatter_rounds(bucket: Tensor, d_size: int, r_size: int, width: int) -> tuple[Tensor, Tensor]:
    """Rank of each coordinate among the earlier ones of its tile with the same bucket, and ranks + 1 of each tile.

    bucket: (d * r,) int64 -> (d * r,) int16, (tiles,) int32.
    """
    block_d, block_r = tile_sides(d_size, r_size)
    tiles_d, tiles_r = ceil_div(d_size, block_d), ceil_div(r_size, block_r)
    row = torch.arange(d_size)[:, None] // block_d
    column = torch.arange(r_size)[None, :] // block_r
    tile = (row * tiles_r + column).flatten()
    place = tile * width + bucket
    order = torch.argsort(place, stable=True)
    in_order = place[order]
    position = torch.arange(place.numel())
    begins = torch.ones_like(place, dtype=torch.bool)
    begins[1:] = in_order[1:] != in_order[:-1]
    rank_in_order = position - torch.where(begins, position, 0).cummax(0).values
    rank = torch.empty_like(rank_in_order)
    rank[order] = rank_in_order
    most = torch.zeros(tiles_d * tiles_r, dtype=torch.int64)
    most.scatter_reduce_(0, tile, rank + 1, "amax")
    return rank.to(torch.int16), most.to(torch.int32)


def project_flat(
    g: Tensor,
    h: Tensor,
    segments: Segments | Tensor,
    sketch: FlatSketch,
    rows: Tensor,
    *,
    scale: float = 1.0,
    accumulate: bool = False,
    precision: str = "ieee",
) -> Tensor:
    """Writes (or adds) the sketch of s * sum_t g_t h_t^T of each example into `rows` and returns `rows`.

    g: (T, d), h: (T, r), one dtype, rows contiguous (for dA put the long side where `sketch` was told)
    segments: `Segments`, or cu_seqlens (E + 1,) int32 (then read on the host, which waits for a GPU)
    sketch: the map, made for this d, r and width
    rows: (E, width) float32 or bfloat16, rows contiguous (a slice of wider rows serves). accumulate: add to it, in
        float32, as one row shared by many factors needs

    Raises ConfigError for shapes, dtypes or devices that do not fit, DataError for an example of no tokens.
    """
    name = "project_flat"
    segments = as_segments(segments)
    check_shape(name, "g", g, ("T", sketch.d_size))
    check_shape(name, "h", h, (g.shape[0], sketch.r_size))
    check_tokens(name, "g", g, segments)
    check_shape(name, "rows", rows, (segments.examples, sketch.width))
    check_last_stride(name, g=g, h=h, rows=rows)
    check_dtype(name, g=g, h=h)
    check_precision(name, precision)
    if rows.dtype not in outer.ROW_DTYPES:
        raise ConfigError(f"{name}: rows must be float32 or bfloat16, got {rows.dtype}")
    check_device(name, g=g, h=h, rows=rows, segments=segments.cu_seqlens, sketch=sketch.keys)
    project = _project_sjlt if sketch.kind == "sjlt" else _project_rademacher
    project(g, h, segments, sketch, rows, float(scale), accumulate, precision)
    return rows


def _project_sjlt(
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


def _project_rademacher(
    g: Tensor,
    h: Tensor,
    segments: Segments,
    sketch: FlatSketch,
    rows: Tensor,
    scale: float,
    accumulate: bool,
    precision: str,
) -> None:
    examples, width, r_size = segments.examples, sketch.width, sketch.r_size
    total = torch.empty(examples, width, dtype=torch.float32, device=g.device)
    slab_rows, slab_columns = slab_sides(r_size)
    largest = min(slab_rows, sketch.d_size) * slab_columns
    blocks = ceil_div(width, 128)
    slabs = torch.empty(examples * largest, dtype=torch.float32, device=g.device)
    words = torch.empty(largest, 4 * blocks, dtype=torch.int32, device=g.device)
    offsets = torch.zeros(1, dtype=torch.int64, device=g.device)
    # Never 64: on sm_90 that would be another matrix instruction, and bits would depend on the number of examples.
    block_e = min(padded(examples), 32)
    for d, r in product(range(0, sketch.d_size, slab_rows), range(0, r_size, slab_columns)):
        left, right = g[:, None, d : d + slab_rows], h[:, None, r : r + slab_columns]
        block_rows, columns = left.shape[2], right.shape[2]
        count = block_rows * columns
        runs = 1 if columns == r_size else block_rows  # whole rows of G lie end to end
        slab = slabs[: examples * count].view(examples, count)
        outer.segment_outer(
            left,
            right,
            segments,
            slab,
            offsets,
            scale=scale / math.sqrt(width),
            precision=precision,
        )
        launch(
            _slab_words_kernel,
            (ceil_div(count, 256), blocks),
            {
                "words": words,
                "keys": sketch.keys,
                "first_row": d * r_size + r,
                "count": count,
                "coordinates": count // runs,
                "stride_run": r_size,
            },
            {"BLOCK": 256},
            device=g.device,
            num_warps=4,
            num_stages=1,
        )
        launch(
            _dense_kernel,
            (blocks, ceil_div(examples, block_e)),
            {
                "slab": slab,
                "words": words,
                "sketch": total,
                "examples": examples,
                "count": count,
                "width": width,
            },
            {"BLOCK_E": block_e, "BLOCK_I": 32, "FIRST": d == r == 0},
            device=g.device,
            num_warps=8,
            num_stages=2,
        )
    if accumulate:
        rows.copy_(rows.float().add_(total))
    else:
        rows.copy_(total)


def reference(g: Tensor, h: Tensor, segments: Segments | Tensor, sketch: FlatSketch, *, scale: float = 1.0) -> Tensor:
    """The same in PyTorch, in the dtype of g, through the exact gradient: (E, width)."""
    exact = scale * outer.reference(g[:, None, :], h[:, None, :], segments).flatten(1)
    return sketch_rows(exact, sketch)


def sketch_rows(exact: Tensor, sketch: FlatSketch) -> Tensor:
    """S applied to exact gradients (E, d * r) -> (E, width), in their dtype; the dense S is made whole."""
    n, width = exact.shape[1], sketch.width
    options: dict[str, Any] = {"dtype": exact.dtype, "device": exact.device}
    if sketch.kind == "rademacher":
        return exact @ sign_matrix(sketch.seed, sketch.name, n, width, **options) / math.sqrt(width)
    bucket, sign = sjlt_map(sketch.seed, sketch.name, n, width, **options)
    return exact.new_zeros(exact.shape[0], width).index_add_(1, bucket, exact * sign)


def cost(
    kind: str,
    tokens: int,
    examples: int,
    d_size: int,
    r_size: int,
    width: int,
    *,
    itemsize: int = 2,
    row_itemsize: int = 2,
) -> Cost:
    """Floor of one call: 2 T d r FLOPs, and 2 E d r width more where dense; g, h and rows moved once."""
    flops = 2 * tokens * d_size * r_size
    flops += (2 * width if kind == "rademacher" else 2) * examples * d_size * r_size
    moved = tokens * (d_size + r_size) * itemsize + examples * width * row_itemsize
    return Cost(flops, moved)
