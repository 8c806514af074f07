# mypy: disable-error-code="no-untyped-def"
"""Multiply per-example gradients by a dense matrix of signs: rows[e, j] = sum_i S[j, i] G[e, i], S = 1 or -1 over
sqrt(width).

The rows of S go through in slabs of at most SLAB coordinates, a block of d x r: `segment_outer` sums that slab of G
(E x SLAB float32, all that ever exists of the gradient), a kernel writes the slab's bits of S (width / 8 bytes a
coordinate), and a matrix product adds G_slab S_slab to the (E, width) sketch. ±1 is exact in bfloat16 and float32 is a
sum of three bfloat16 numbers, so the products run on tensor cores and lose nothing: 2 E d r width FLOPs, three times.
Tensor cores cut their sums off where others round, so 32 coordinates at a time are summed there and added up in
float32. All examples of the pack share the bits; made in the product itself, every thread would make them again.
"""

from __future__ import annotations

import math
from itertools import product

import torch
from torch import Tensor

from influence_fast.kernels import segment_outer as outer
from influence_fast.kernels.counter import sign_words
from influence_fast.kernels.flat_sketch import FlatSketch
from influence_fast.kernels.runtime import ceil_div, dot, jit, launch, padded, tl
from influence_fast.kernels.segments import Segments

SLAB = 32_768


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


def slab_sides(r_size: int) -> tuple[int, int]:
    """Rows and columns of a slab, at most SLAB coordinates: whole rows while 16 fit, as 16-byte aligned slices of g."""
    columns = min(r_size, SLAB // 16)
    return SLAB // columns // 16 * 16, columns


def project_rademacher(
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
