"""From the coordinates of a projected, sketched row back to those of the exact gradient: the transposed map.

A row is z = P g, with P linear. A score q^T H^-1 z is (P^T H^-1 q) . g, so that what P^T makes of a preconditioned
query can be multiplied with gradients that are never projected: in stream mode, or token by token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from influence_fast.data.adapter_names import plain_name
from influence_fast.errors import ConfigError
from influence_fast.gradients.rows.eigen_sketch import EigenSketch
from influence_fast.gradients.rows.factors import Side, projected_axes, sides_of
from influence_fast.gradients.rows.layout import LayoutEntry, in_top_layers, layout_width
from influence_fast.gradients.rows.projection import Projection, random_matrix, row_name
from influence_fast.philox import sign_matrix, sjlt_map

# Rows of a dense Rademacher matrix made at once: 2^24 signs, 64 MiB in fp32.
_CHUNK = 1 << 24


def exact_coordinates(rows: torch.Tensor, projection: Projection | None, layout: Sequence[LayoutEntry]) -> torch.Tensor:
    """Return P^T of rows [Q, k] in the coordinates of exact gradients, [Q, K] fp64.

    projection: P, a fitted sketch included; None leaves rows as they are. layout: of exact rows, all layers included
    (`gradient_layout` of `exact_rows(projection)`); the modules that P leaves out get zeros.

    Raises ConfigError where the rows are not of this projection and layout.
    """
    rows = rows.double()
    if projection is None or projection.exact:
        return rows
    entries = in_top_layers(layout, projection)
    whole = projected_layout(entries, projection)
    width = projection.width or layout_width(whole)
    if rows.shape[1] != width:
        raise ConfigError(f"rows of {rows.shape[1]} numbers are not of {projection}, which makes {width} of them")
    if projection.sketch is not None:
        rows = _unsketched(rows, projection.sketch)
    elif projection.width is not None:
        rows = torch.cat([_unbucketed(rows, entry, projection) for entry in whole], dim=1)
    out = rows.new_zeros(len(rows), layout_width(layout))
    for entry, projected in zip(entries, whole, strict=True):
        block = rows[:, projected.columns].unflatten(1, projected.shape)
        out[:, entry.columns] = _unprojected(block, entry, projection).flatten(1)
    return out


def projected_layout(entries: Sequence[LayoutEntry], projection: Projection) -> list[LayoutEntry]:
    """Return the layout of the rows of exact `entries` whose sides are projected, before any sketch."""
    projected, offset = [], 0
    for entry in entries:
        ones = projected_axes(entry.factor, projection)
        rows, columns = (projection.dim if one else size for size, one in zip(entry.shape, ones, strict=True))
        projected.append(LayoutEntry(entry.module, entry.factor, (rows, columns), offset))
        offset += rows * columns
    return projected


def _unsketched(rows: torch.Tensor, sketch: EigenSketch) -> torch.Tensor:
    """Undo w = (U_A^T G U_B) / sqrt(S + lambda) at the chosen places by its transposed map, [Q, width] -> [Q, K]."""
    turned = rows.new_zeros(len(rows), layout_width(sketch.layout))
    turned[:, sketch.chosen] = rows * sketch.scale.to(rows)
    out = torch.empty_like(turned)
    number: dict[tuple[int, int], int] = {}
    for entry in sketch.layout:
        place = number.get(entry.shape, 0)
        number[entry.shape] = place + 1
        left, right = (side[place].to(rows) for side in sketch.bases[entry.shape])
        block = turned[:, entry.columns].unflatten(1, entry.shape)
        out[:, entry.columns] = (left @ block @ right.T).flatten(1)
    return out


def _unbucketed(rows: torch.Tensor, entry: LayoutEntry, projection: Projection) -> torch.Tensor:
    """Return one factor's block [Q, n] of rows [Q, width], by the transposed random sketch of whole rows."""
    assert projection.width is not None
    name, size = row_name(entry.module, entry.factor), entry.shape[0] * entry.shape[1]
    if projection.kind != "rademacher":
        bucket, sign = sjlt_map(projection.seed, name, size, projection.width, dtype=rows.dtype)
        return rows[:, bucket] * sign
    step = max(1, _CHUNK // projection.width)
    parts = []
    for start in range(0, size, step):
        count = min(step, size - start)
        signs = sign_matrix(projection.seed, name, count, projection.width, row_start=start, dtype=rows.dtype)
        parts.append(rows @ signs.T * projection.width**-0.5)
    return torch.cat(parts, dim=1)


def _unprojected(block: torch.Tensor, entry: LayoutEntry, projection: Projection) -> torch.Tensor:
    """Return R_left block R_right^T of one factor, [Q, m', n'] -> [Q, m, n], for the sides that were projected."""
    left, right = (
        random_matrix(projection, name, size).to(block) if one else None
        for name, size, one in zip(
            _side_names(entry), entry.shape, projected_axes(entry.factor, projection), strict=True
        )
    )
    block = block if left is None else left @ block
    return block if right is None else block @ right.T


def _side_names(entry: LayoutEntry) -> tuple[str, str]:
    """Return the names that seed the matrices of a factor's sides."""
    key = plain_name(entry.module)
    _, dot, adapter = entry.factor.partition(".")
    rank = f"{key}/rank{dot}{adapter}"  # of several adapters, each has its own
    left, right = sides_of(entry.factor)
    return (rank if left is Side.RANK else f"{key}/out"), (rank if right is Side.RANK else f"{key}/in")
