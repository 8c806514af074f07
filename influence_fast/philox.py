"""Random signs as counter-based functions of (seed, name, row, column), the same on every device and inside kernels.

Every bit comes from Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011):
a block cipher applied to the coordinates, so an entry depends only on its own (seed, name, row, column).
The same bits therefore come out on a CPU, on any GPU and inside a kernel, and a matrix is prefix-stable: more
rows or more columns leave the ones already there unchanged.

    key        first 8 bytes of SHA-256("<seed>:<name>") as two little-endian uint32
    signs      words = philox(counter = (row mod 2^32, row >> 32, column // 128, 0), key)
               entry = +1 where bit column % 128 of the 128 bits in `words` is 0, else -1
    SJLT       words = philox(counter = (i mod 2^32, i >> 32, 0, 1), key); bucket = words[0] * width >> 32;
               sign = +1 where bit 0 of words[1] is 0, else -1
               (one nonzero a column; Dasgupta, Kumar and Sarlós, STOC 2010)

Nothing of the package but errors is imported here, so that kernels may import it.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from influence_fast.errors import ConfigError

# Projections of whole factors.
FLAT_KINDS = ("sjlt", "rademacher")
MAX_WIDTH = 2**31 - 1

_MULTIPLIER = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_U32 = 0xFFFFFFFF


def key(seed: int, name: str) -> tuple[int, int]:
    """Return the Philox key of one random matrix: two uint32 from SHA-256("<seed>:<name>")."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")


def philox4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the four output words of Philox4x32-10, as int64 tensors holding uint32 values.

    The four words of `counter` are int64 tensors of uint32 values and broadcast together.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # The 64-bit product wraps in int64, but its bits are those of the unsigned product.
        product0 = c0 * _MULTIPLIER[0]
        product1 = c2 * _MULTIPLIER[1]
        c0, c2 = _high(product1) ^ c1 ^ k0, _high(product0) ^ c3 ^ k1
        c1, c3 = product1.bitwise_and_(_U32), product0.bitwise_and_(_U32)
        k0, k1 = (k0 + _WEYL[0]) & _U32, (k1 + _WEYL[1]) & _U32
    return c0, c1, c2, c3


def sign_matrix(
    seed: int,
    name: str,
    rows: int,
    columns: int,
    *,
    row_start: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Return rows `row_start` to `row_start + rows` of the unscaled ±1 matrix of (seed, name).

    The result is [rows, columns] of `dtype` on `device`.
    """
    row = torch.arange(row_start, row_start + rows, dtype=torch.int64, device=device)
    blocks = -(-columns // 128)
    block = torch.arange(blocks, dtype=torch.int64, device=device)
    low, high = (row & _U32)[:, None], (row >> 32)[:, None]
    zero = torch.zeros((), dtype=torch.int64, device=device)
    words = philox4x32((low, high, block[None, :], zero), key(seed, name))  # 4 x [rows, blocks]
    used = [word for i, word in enumerate(words) if i * 32 < columns]
    bits = torch.arange(min(32, columns), dtype=torch.int32, device=device)
    stacked = torch.stack([_as_int32(word) for word in used], dim=-1)  # [rows, blocks, words]
    # ±1 in int8 first: the expanded form is 32 times the words, so its passes are kept narrow.
    sign = 1 - 2 * ((stacked[..., None] >> bits) & 1).to(torch.int8)
    return sign.reshape(rows, -1)[:, :columns].to(dtype).contiguous()


def sjlt_map(
    seed: int,
    name: str,
    n: int,
    width: int,
    *,
    start: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor]:
    """Return the bucket and the sign of coordinates `start` to `start + n` in a sparse sketch of `width` numbers.

    bucket is [n] int64 in [0, width) and sign [n] ±1 of `dtype`: sketch[bucket[i]] += sign[i] * row[i] keeps inner
    products in expectation without a further scale. Raises ConfigError for a width outside [1, `MAX_WIDTH`].
    """
    if not 1 <= width <= MAX_WIDTH:
        raise ConfigError(f"sketch width {width} is not between 1 and {MAX_WIDTH}")
    index = torch.arange(start, start + n, dtype=torch.int64, device=device)
    zero = torch.zeros((), dtype=torch.int64, device=device)
    words = philox4x32((index & _U32, index >> 32, zero, zero + 1), key(seed, name))
    bucket = _high(words[0] * width)
    sign = (1 - 2 * (words[1] & 1)).to(dtype)
    return bucket, sign


def _high(product: Tensor) -> Tensor:
    return (product >> 32).bitwise_and_(_U32)


def _as_int32(word: Tensor) -> Tensor:
    """Return the same 32 bits as a signed number; a right shift then keeps the bit that `& 1` picks."""
    return (word - ((word >> 31) << 32)).to(torch.int32)
