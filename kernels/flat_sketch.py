"""The map of one factor's gradient into a sketch, with the tables that its kernels read.

A sjlt adds coordinates that share a bucket in rounds, so that no round writes a place twice. The round of a coordinate
is a function of the map and of the tiles alone, so it is tabulated once, 2 bytes a coordinate.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from influence_fast.errors import ConfigError
from influence_fast.kernels.runtime import ceil_div, padded
from influence_fast.philox import FLAT_KINDS, key, sjlt_map


def tile_sides(d_size: int, r_size: int) -> tuple[int, int]:
    """About 1024 coordinates a tile, the longer side cut first."""
    block_d, block_r = min(padded(d_size), 64), min(padded(r_size), 64)
    while block_d * block_r > 1024:
        block_d, block_r = (block_d // 2, block_r) if block_d >= block_r else (block_d, block_r // 2)
    return block_d, block_r


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
