# mypy: disable-error-code="no-untyped-def"
"""Sum a tile of outer products over tokens, in registers: the step that the ragged kernels share.

    total[a, b] = sum over begin <= t < stop of left[t, a] right[t, b]

`outer_tile` is given the places of its columns, `module_tile` finds them for one of many modules of one shape.
"""

from __future__ import annotations

from influence_fast.kernels.runtime import dot, jit, tl


@jit
def outer_tile(
    left,  # [T, ...], its column 0
    right,  # [T, ...], its column 0
    a,  # [BLOCK_A] int64
    b,  # [BLOCK_B] int64
    a_mask,
    b_mask,
    begin,
    stop,
    stride_lt,
    stride_rt,
    BLOCK_L: tl.constexpr,
    PRECISION: tl.constexpr,
    CHUNK: tl.constexpr = 0,  # else every CHUNK tokens are summed from zero, and these sums added in order
):
    """sum over begin <= t < stop of left[t, a] right[t, b]^T as float32 [BLOCK_A, BLOCK_B], in registers."""
    lane = tl.arange(0, BLOCK_L)
    total = tl.zeros([a.shape[0], b.shape[0]], dtype=tl.float32)
    chunks = tl.zeros([a.shape[0], b.shape[0]], dtype=tl.float32)
    for start in range(begin, stop, BLOCK_L):
        t = (start + lane).to(tl.int64)
        t_mask = t < stop
        # Transposed by its addresses: read as [t, a] and passed through tl.trans, the compiler loads it through
        # registers on sm_80 (and for 16-wide tiles on sm_90), past the cp.async pipeline.
        tile_left = tl.load(
            left + t[None, :] * stride_lt + a[:, None], mask=a_mask[:, None] & t_mask[None, :], other=0.0
        )
        tile_right = tl.load(
            right + t[:, None] * stride_rt + b[None, :], mask=t_mask[:, None] & b_mask[None, :], other=0.0
        )
        total = dot(tile_left, tile_right, total, PRECISION)
        if CHUNK > 0:
            ends = (start - begin + BLOCK_L) % CHUNK == 0
            chunks = tl.where(ends, chunks + total, chunks)
            total = tl.where(ends, 0.0, total)
    return chunks + total if CHUNK > 0 else total


@jit
def module_tile(
    left,  # [T, M, a]
    right,  # [T, M, b]
    m,
    begin,
    stop,
    a_size,
    b_size,
    stride_lt,
    stride_lm,
    stride_rt,
    stride_rm,
    BLOCK_L: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
    PRECISION: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """This program's tile of a module's block: places inside the block, which of them there are, and `outer_tile`."""
    tiles_b = tl.cdiv(b_size, BLOCK_B)
    a = ((tl.program_id(1) // tiles_b) * BLOCK_A + tl.arange(0, BLOCK_A)).to(tl.int64)
    b = ((tl.program_id(1) % tiles_b) * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)
    a_mask = a < a_size
    b_mask = b < b_size
    left += m * stride_lm
    right += m * stride_rm
    total = outer_tile(left, right, a, b, a_mask, b_mask, begin, stop, stride_lt, stride_rt, BLOCK_L, PRECISION, CHUNK)
    return a[:, None] * b_size + b[None, :], a_mask[:, None] & b_mask[None, :], total
