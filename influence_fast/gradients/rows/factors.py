"""What a module adds to a gradient row: its factors, each a sum over tokens of outer products.

    G = scale * sum_t left_t right_t^T      left [T, a], right [T, b], G (a, b) of one example

`left` is a part of what the backward leaves of a module and `right` of what the forward leaves: columns that were
multiplied out beside the layer's own product, the whole output gradient g or input x, or the constant 1.

    factor      left         right        exact shape
    lora_A      u = B^T g    x            (r, d_in)
    lora_B      g            h = A x      (d_out, r)
                of an embedding `lora_embedding_A` (r, V) and `lora_embedding_B`, x one-hot (see `lora_embedding`)
    weight      g            x            (d_out, d_in)
    bias        g            1            (d_out, 1)
    lora_bias   g            1            (d_out, 1), of lora_B

DoRA's `lora_magnitude_vector` (d_out, 1) is a sum of columns of its own, g v / n entry by entry (see `lora_parts`).

A projection of the sides puts columns y = R_out^T g and z = R_in^T x in the place of the wide sides g and x.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from influence_fast.errors import ModelError, truncated_list
from influence_fast.gradients.rows.projection import Projection

if TYPE_CHECKING:
    from influence_fast.gradients.model.lora import LoraLinear
    from influence_fast.gradients.rows.layout import LayoutEntry


class Side(enum.Enum):
    """One side of a factor: the few columns of an adapter's rank, all of x or g, or 1 for every token."""

    RANK = "rank"
    WIDE = "wide"
    ONES = "ones"


class Columns(NamedTuple):
    """Columns `start` to `stop` of what a module's forward or backward leaves."""

    start: int
    stop: int

    @property
    def width(self) -> int:
        return self.stop - self.start


# The sides of a factor whose name begins so; a name goes on after a dot where a module has several of a kind.
SIDES: dict[str, tuple[Side, Side]] = {
    "lora_A": (Side.RANK, Side.WIDE),
    "lora_B": (Side.WIDE, Side.RANK),
    "lora_embedding_A": (Side.RANK, Side.WIDE),
    "lora_embedding_B": (Side.WIDE, Side.RANK),
    "weight": (Side.WIDE, Side.WIDE),
    "bias": (Side.WIDE, Side.ONES),
    "lora_bias": (Side.WIDE, Side.ONES),
    "lora_magnitude_vector": (Side.WIDE, Side.ONES),
}


@dataclass(frozen=True)
class Factor:
    """One parameter's part of a gradient row.

    Attributes:
        name: its name in the layout of a row: a key of `SIDES`, or one with a dot and more.
        shape: (a, b) of its block in a row, after a projection of its sides.
        left: columns of what the backward left, `Side.WIDE` for the whole g, or `Side.ONES`.
        right: columns of what the forward left, `Side.WIDE` for the whole x, or `Side.ONES`.
        scale: what the sum over tokens is multiplied by.
        left_rank, right_rank: the names that seed the random matrices which a "kron" projection multiplies this side
            of the summed block by; None for a side that has its final size before.
    """

    name: str
    shape: tuple[int, int]
    left: Columns | Side
    right: Columns | Side
    scale: float = 1.0
    left_rank: str | None = None
    right_rank: str | None = None

    @property
    def whole(self) -> bool:
        """Return whether both sides are whole, so that neither is narrow."""
        return self.left is Side.WIDE and self.right is Side.WIDE

    @property
    def left_is_long(self) -> bool:
        """Return whether the left side is the one to keep whole, where only one can be."""
        return self.left is Side.WIDE or (self.right is not Side.WIDE and self.shape[0] > self.shape[1])

    @property
    def short(self) -> int:
        """Return the columns of the other side than the long one."""
        return self.shape[1] if self.left_is_long else self.shape[0]

    def sum(
        self,
        kept: torch.Tensor,  # [n, c_in] of the forward
        out_of: torch.Tensor,  # [n, c_out] of the backward
        g: torch.Tensor,  # [n, d_out]
        x: torch.Tensor | None,  # [n, d_in]
        dtype: torch.dtype,
    ) -> torch.Tensor:
        """Return the scaled sum over all tokens, of one example: [a, b], before a projection of the rank's side."""
        left, right = tokens_of(self.left, out_of, g), tokens_of(self.right, kept, x)
        return (left.to(dtype).T @ right.to(dtype)).mul_(self.scale)


class Block(NamedTuple):
    """A factor and its place in a row: `number` counts the entries of the layout."""

    number: int
    factor: Factor
    columns: slice


def sides_of(name: str) -> tuple[Side, Side]:
    """Return (left, right) of the factor called `name`. Raises ModelError for a name of no known kind."""
    kind = name.partition(".")[0]
    if kind not in SIDES:
        raise ModelError(f"{name}: no gradient is known for a factor of this name; known are {truncated_list(SIDES)}")
    return SIDES[kind]


def projected_axes(name: str, projection: Projection | None) -> tuple[bool, bool]:
    """Return whether `projection` multiplies each side of the factor called `name` by random columns."""
    if projection is None or not projection.sided:
        return False, False
    ones = {Side.WIDE, Side.RANK} if projection.kind == "kron" else {Side.WIDE}
    left, right = sides_of(name)
    return left in ones, right in ones


def make_factor(
    name: str,
    ends: tuple[int, int],
    rank: Columns,
    projection: Projection | None,
    narrow: tuple[int, int],
    scale: float,
    rank_name: str,
) -> Factor:
    """Return the factor called `name` of a module, under a projection of its sides or none.

    Args:
        ends: (d_out, d_in) of the module.
        rank: where the columns of the factor's own adapter are, among those that the side of `Side.RANK` is taken from.
        narrow: the backward's and the forward's columns that stand before the projected ones of g and x.
        rank_name: the name that seeds the matrix by which "kron" multiplies the rank's side.
    """
    projected = projected_axes(name, projection)
    columns: list[Columns | Side] = []
    sizes: list[int] = []
    seeds: list[str | None] = []
    for side, multiplied, end, first in zip(sides_of(name), projected, ends, narrow, strict=True):
        dim = projection.dim if projection is not None and multiplied else None
        seeds.append(rank_name if side is Side.RANK and multiplied else None)
        if side is Side.ONES:
            columns.append(side)
            sizes.append(1)
        elif side is Side.RANK:
            columns.append(rank)
            sizes.append(rank.width if dim is None else dim)
        else:
            columns.append(side if dim is None else Columns(first, first + dim))
            sizes.append(end if dim is None else dim)
    return Factor(name, (sizes[0], sizes[1]), columns[0], columns[1], scale, seeds[0], seeds[1])


def blocks_of(
    linears: Sequence[LoraLinear], layout: Sequence[LayoutEntry], projection: Projection | None
) -> list[list[Block]]:
    """Return each module's factors with their places in a row of `layout`, which is that of `linears`.

    Raises ValueError for the layout of other modules.
    """
    entries = iter(enumerate(layout))
    blocks: list[list[Block]] = []
    for linear in linears:
        blocks.append([])
        for factor in linear.factors(projection):
            number, entry = next(entries, (-1, None))
            if entry is None or (entry.module, entry.factor, entry.shape) != (linear.name, factor.name, factor.shape):
                raise ValueError(f"{linear.name}: its factor {factor.name} {factor.shape} is not at {entry}")
            blocks[-1].append(Block(number, factor, entry.columns))
    if (rest := next(entries, None)) is not None:
        raise ValueError(f"no module has {rest[1]}")
    return blocks


def tokens_of(side: Columns | Side, columns: torch.Tensor, whole: torch.Tensor | None = None) -> torch.Tensor:
    """Return one side of a factor for each token: [..., n], of `columns` [..., c] or of `whole`.

    Raises ValueError where the side is the whole tensor and that was not kept.
    """
    if isinstance(side, Columns):
        return columns[..., side.start : side.stop]
    if side is Side.ONES:
        return columns.new_ones(*columns.shape[:-1], 1)
    if side is not Side.WIDE or whole is None:
        raise ValueError(f"a side of a factor is {side}, of which there are no tokens here")
    return whole
