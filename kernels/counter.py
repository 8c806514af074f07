# mypy: disable-error-code="no-untyped-def"
"""The counter-based random matrices of `gradients.projection`, inside kernels: the same bits, entry by entry.

One Philox4x32-10 call gives 128 sign bits of one row in about 110 integer instructions. Beside a tile of columns every
thread makes them again for its own, so what is used more than once is written out first. `fill_signs` and `fill_sjlt`
write whole matrices and maps on the device, where the PyTorch form would make a dozen passes over 64-bit integers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from influence_fast.kernels.runtime import ceil_div, check_device, jit, launch, tl
from influence_fast.philox import key


@jit
def sign_words(row, block, k0, k1):
    """Draw 128 sign bits of each row as four uint32: columns block * 128 ... block * 128 + 127. row: int64."""
    low = (row & 0xFFFFFFFF).to(tl.uint32)
    high = (row >> 32).to(tl.uint32)
    zero = low * 0
    third = zero + block.to(tl.uint32)
    return tl.philox_impl(low, high, third, zero, k0.to(tl.uint32), k1.to(tl.uint32))


@jit
def sign_tile(row, lane, block, k0, k1):
    """Return signs ±1 as float32 [K, N]: row int64 [K], lane int32 [N] in [0, 128), columns block * 128 + lane."""
    w0, w1, w2, w3 = sign_words(row, block, k0, k1)
    lanes = lane[None, :]
    which = lanes // 32
    low = tl.where(which == 0, w0[:, None], w1[:, None])
    word = tl.where(which < 2, low, tl.where(which == 2, w2[:, None], w3[:, None]))
    bit = (word >> (lanes % 32).to(tl.uint32)) & 1
    return 1.0 - 2.0 * bit.to(tl.float32)


@jit
def sjlt_entry(index, width, k0, k1):
    """Draw the bucket (int64) and sign (float32) of coordinates `index` (int64) in a sketch of `width` numbers."""
    low = (index & 0xFFFFFFFF).to(tl.uint32)
    high = (index >> 32).to(tl.uint32)
    zero = low * 0
    w0, w1, _w2, _w3 = tl.philox_impl(low, high, zero, zero + 1, k0.to(tl.uint32), k1.to(tl.uint32))
    bucket = ((w0.to(tl.uint64) * width.to(tl.uint64)) >> 32).to(tl.int64)
    sign = 1.0 - 2.0 * (w1 & 1).to(tl.float32)
    return bucket, sign


@jit
def _fill_signs_kernel(out, keys, rows, columns, row_start, BLOCK_ROWS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    block = tl.program_id(1)
    lane = tl.arange(0, 128)
    column = block * 128 + lane
    signs = sign_tile(row + row_start, lane, block, tl.load(keys), tl.load(keys + 1))
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    tl.store(out + row[:, None] * columns + column[None, :], signs, mask=inside)


@jit
def _fill_sjlt_kernel(bucket, sign, keys, n, width, start, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    slot, value = sjlt_entry(index + start, tl.load(keys + 2), tl.load(keys), tl.load(keys + 1))
    tl.store(bucket + index, slot, mask=index < n)
    tl.store(sign + index, value, mask=index < n)


def fill_signs(
    seed: int,
    name: str,
    rows: int,
    columns: int,
    *,
    row_start: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cuda",
) -> Tensor:
    """Draw `philox.sign_matrix` by a kernel on `device`: the same (rows, columns) of ±1."""
    out = torch.empty(rows, columns, dtype=dtype, device=device)
    keys = torch.tensor(key(seed, name), dtype=torch.int64, device=device)
    check_device("fill_signs", out=out)
    block = 32
    launch(
        _fill_signs_kernel,
        (ceil_div(rows, block), ceil_div(columns, 128)),
        {"out": out, "keys": keys, "rows": rows, "columns": columns, "row_start": row_start},
        {"BLOCK_ROWS": block},
        device=out.device,
        num_warps=4,
        num_stages=1,
    )
    return out


def fill_sjlt(
    seed: int, name: str, n: int, width: int, *, start: int = 0, device: torch.device | str = "cuda"
) -> tuple[Tensor, Tensor]:
    """Draw `philox.sjlt_map` by a kernel on `device`: bucket (n,) int64 and sign (n,) float32."""
    bucket = torch.empty(n, dtype=torch.int64, device=device)
    sign = torch.empty(n, dtype=torch.float32, device=device)
    keys = torch.tensor((*key(seed, name), width), dtype=torch.int64, device=device)
    check_device("fill_sjlt", bucket=bucket)
    block = 512
    launch(
        _fill_sjlt_kernel,
        (ceil_div(n, block),),
        {"bucket": bucket, "sign": sign, "keys": keys, "n": n, "width": width, "start": start},
        {"BLOCK": block},
        device=bucket.device,
        num_warps=4,
        num_stages=1,
    )
    return bucket, sign
