# mypy: disable-error-code="no-untyped-def"
"""Add the ranks of rows in columns of scores to the sums of groups of columns.

    sums[i, g] += sum over columns c of group g of rank[c, i]        1 = lowest, ties share the mean of their ranks

The sort is PyTorch's. In a sorted column a value's rank is half the sum of the first and the last place of its run plus
one; a block of places without a tie, which is nearly every one, reads three neighbours and writes. Twice the rank is a
whole number, written into the memory of the column itself; a second kernel adds these by rows. Sums of halves are
exact in float64, so they have the same bits in any order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from influence_fast.errors import ConfigError
from influence_fast.kernels.runtime import Cost, ceil_div, check_device, check_shape, jit, launch, tl

# A sort holds values, places of 8 bytes, and as much again of its own: of this many bytes at a time.
_SORT_BYTES = 128 << 20
_BYTES_A_VALUE = 32
BLOCK = 1024


@jit
def _tied_ranks_kernel(
    ordered,  # [C, N] float32, ascending
    place,  # [C, N] int64: row of each
    twice,  # [C, N] int32, by rows
    count,  # N
    steps,  # of a binary search
    stride_ordered,
    stride_place,
    stride_twice,
    BLOCK: tl.constexpr,
):
    column = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = at < count
    values = ordered + column * stride_ordered
    own = tl.load(values + at, mask=mask, other=0.0)
    above = tl.load(values + at - 1, mask=mask & (at > 0), other=0.0)
    below = tl.load(values + at + 1, mask=at + 1 < count, other=0.0)
    tied_above = mask & (at > 0) & (above == own)
    tied_below = (at + 1 < count) & (below == own)
    first = tl.where(tied_above, 0, at)  # the run begins at first ... at
    last = at
    end = tl.where(tied_below, count, at + 1)  # and ends before at + 1 ... end
    begin = at + 1
    if tl.max((tied_above | tied_below).to(tl.int32), axis=0) > 0:
        for _ in range(0, steps):
            middle = (first + last) // 2
            searching = first < last
            smaller = tl.load(values + middle, mask=searching & mask, other=0.0) < own
            first = tl.where(searching & smaller, middle + 1, first)
            last = tl.where(searching & (smaller == 0), middle, last)
            middle = (begin + end) // 2
            searching = begin < end
            larger = tl.load(values + middle, mask=searching & mask, other=0.0) > own
            begin = tl.where(searching & (larger == 0), middle + 1, begin)
            end = tl.where(searching & larger, middle, end)
    row = tl.load(place + column * stride_place + at, mask=mask, other=0)
    tl.store(twice + column * stride_twice + row, first + end + 1, mask=mask)


@jit
def _add_ranks_kernel(
    twice,  # [C, N] int32
    group_begin,  # [G + 1] int32
    group_column,  # [members] int32
    sums,  # [N, G] float64, added to
    count,  # N
    stride_twice,
    stride_sums,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    g = tl.program_id(1)
    mask = i < count
    total = tl.zeros([BLOCK], dtype=tl.int64)
    for m in range(tl.load(group_begin + g), tl.load(group_begin + g + 1)):
        column = tl.load(group_column + m).to(tl.int64)
        total += tl.load(twice + column * stride_twice + i, mask=mask, other=0)
    target = sums + i * stride_sums + g
    before = tl.load(target, mask=mask, other=0.0)
    tl.store(target, before + total.to(tl.float64) * 0.5, mask=mask)


def add_column_ranks(columns: Tensor, group_begin: Tensor, group_column: Tensor, sums: Tensor) -> None:
    """Add each row's ranks in the columns of every group to `sums`; `columns` is overwritten.

    columns: (C, N) float32 without NaN, rows contiguous. group_begin, group_column: (G + 1,) and (members,) int32;
    the columns of group g are group_column[group_begin[g]:group_begin[g + 1]], and a group may have none here.
    sums: (N, G) float64. Raises ConfigError for shapes, dtypes or devices that do not fit.
    """
    name = "add_column_ranks"
    check_shape(name, "columns", columns, ("C", "N"))
    count = columns.shape[1]
    check_shape(name, "sums", sums, (count, group_begin.shape[0] - 1))
    device = check_device(name, columns=columns, begin=group_begin, column=group_column, sums=sums)
    if columns.dtype != torch.float32 or sums.dtype != torch.float64 or count >= 2**30:
        raise ConfigError(f"{name}: columns must be float32 of fewer than 2^30 rows, and sums float64")
    if columns.numel() == 0 or sums.numel() == 0:
        return
    twice = columns.view(torch.int32)
    at_once = max(1, _SORT_BYTES // (_BYTES_A_VALUE * count))
    for first in range(0, columns.shape[0], at_once):
        ordered, place = columns[first : first + at_once].sort(dim=1)
        launch(
            _tied_ranks_kernel,
            (ordered.shape[0], ceil_div(count, BLOCK)),
            {
                "ordered": ordered,
                "place": place,
                "twice": twice[first : first + at_once],
                "count": count,
                "steps": count.bit_length() + 1,
                "stride_ordered": ordered.stride(0),
                "stride_place": place.stride(0),
                "stride_twice": twice.stride(0),
            },
            {"BLOCK": BLOCK},
            device=device,
            num_warps=4,
            num_stages=1,
        )
    launch(
        _add_ranks_kernel,
        (ceil_div(count, BLOCK), sums.shape[1]),
        {
            "twice": twice,
            "group_begin": group_begin,
            "group_column": group_column,
            "sums": sums,
            "count": count,
            "stride_twice": twice.stride(0),
            "stride_sums": sums.stride(0),
        },
        {"BLOCK": BLOCK},
        device=device,
        num_warps=4,
        num_stages=1,
    )


def reference(columns: Tensor) -> Tensor:
    """Return the ranks of each column in PyTorch: float64 (C, N)."""
    ordered = columns.sort(dim=1).values
    first = torch.searchsorted(ordered, columns)
    end = torch.searchsorted(ordered, columns, right=True)
    return (first + end + 1).double() / 2


def cost(columns: int, rows: int) -> Cost:
    """Floor of one call: every value read and its rank written once."""
    return Cost(columns * rows, 8 * columns * rows)
