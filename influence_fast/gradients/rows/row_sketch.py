"""The sketch of a laid-out row, or of one factor's block, to `width` numbers, and sums that keep their order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from influence_fast.gradients.rows.layout import LayoutEntry
from influence_fast.gradients.rows.projection import Projection, row_name
from influence_fast.philox import sign_matrix, sjlt_map
from influence_fast.transfer import to_device

if TYPE_CHECKING:
    from influence_fast.kernels.project_flat import FlatSketch

# Rows of a dense Rademacher matrix made at once: 2^24 signs, 64 MiB in fp32.
_RADEMACHER_CHUNK = 1 << 24


@dataclass(frozen=True, slots=True)
class BucketSums:
    """Signed sums of numbers by bucket, each in the order of the numbers: no atomics, the same bits in every run."""

    order: torch.Tensor  # [n] int64: the numbers, sorted by bucket
    sign: torch.Tensor  # [n], in that order
    offsets: torch.Tensor  # [width + 1] int64: where each bucket begins there

    @classmethod
    def of(cls, bucket: torch.Tensor, sign: torch.Tensor, width: int) -> BucketSums:
        """Make the sums that put number i of n into bucket[i] < width, times sign[i]."""
        order = torch.argsort(bucket, stable=True)
        edges = torch.arange(width + 1, dtype=bucket.dtype, device=bucket.device)
        return cls(order, sign[order], torch.searchsorted(bucket[order], edges))

    def __call__(self, values: torch.Tensor) -> torch.Tensor:
        """Sum values [E, n] into buckets [E, width]."""
        signed = (values[:, self.order] * self.sign.to(values.dtype)).T.contiguous()
        return segment_sums(signed, self.offsets).T


def segment_sums(values: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
    """Sum values [n, ...] from each edge to the next, in order, [S, ...]; edges [S + 1] int64, anywhere."""
    edges = to_device(edges, values.device)
    if values.is_meta:  # has no such operation
        return values.new_empty(edges.numel() - 1, *values.shape[1:])
    # unsafe: the offsets are not checked, which would wait for the card
    return torch.segment_reduce(values, "sum", offsets=edges, axis=0, initial=0, unsafe=True)


class RowSketch:
    """Sketches a laid-out row to `width` numbers: SJLT with one nonzero an input, or dense Rademacher.

    Each factor's block has maps of its own, seeded by `row_name` and the index inside the block, so
    the sketch of a module does not depend on which other modules a model has.
    """

    def __init__(
        self,
        layout: list[LayoutEntry],
        projection: Projection,
        device: torch.device,
    ) -> None:
        assert projection.width is not None
        self.width = projection.width
        self.seed = projection.seed
        self.device = device
        self.kind = projection.kind
        self.names = [row_name(entry.module, entry.factor) for entry in layout]
        self.shapes = [entry.shape for entry in layout]
        self.sizes = [rows * columns for rows, columns in self.shapes]
        self._maps: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._sums: dict[int | None, BucketSums] = {}

    def _map(self, block: int) -> tuple[torch.Tensor, torch.Tensor]:
        if block not in self._maps:
            bucket, sign = sjlt_map(self.seed, self.names[block], self.sizes[block], self.width)
            self._maps[block] = (bucket.to(self.device), sign.to(self.device))
        return self._maps[block]

    def _whole_map(self) -> tuple[torch.Tensor, torch.Tensor]:
        maps = [self._map(block) for block in range(len(self.names))]
        return torch.cat([bucket for bucket, _ in maps]), torch.cat([sign for _, sign in maps])

    @property
    def _is_card(self) -> bool:
        """Return whether `index_add_` would add by atomics, in another order in every run, as on a GPU."""
        return self.device.type == "cuda"

    def _in_order(self, block: int | None) -> BucketSums:
        """Return the sums of one block, or of whole rows, in an order that never changes."""
        if block not in self._sums:
            bucket, sign = self._whole_map() if block is None else self._map(block)
            self._sums[block] = BucketSums.of(bucket, sign, self.width)
        return self._sums[block]

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """Compute the SJLT of whole rows: [E, sum of sizes] -> [E, width]."""
        if self._is_card:
            return self._in_order(None)(rows)
        bucket, sign = self._whole_map()
        sign = sign.to(rows.dtype)
        out = torch.zeros(rows.shape[0], self.width, dtype=rows.dtype, device=rows.device)
        return out.index_add_(1, bucket, rows * sign)

    def flat(self, block: int) -> FlatSketch:
        """Make one factor's map, of a flat kind, as the kernel `project_flat` reads it; make once, keep."""
        from influence_fast.kernels.project_flat import FlatSketch

        name, shape = self.names[block], self.shapes[block]
        return FlatSketch.of(self.kind, self.seed, name, *shape, self.width, device=self.device)

    def add(self, row: torch.Tensor, block: int, values: torch.Tensor) -> None:
        """Add the sketch, of a flat kind, of one factor's block [n] to `row` [width]."""
        if self.kind == "rademacher":
            self._add_dense(row, block, values)
        else:
            self._add_sparse(row, block, values)

    def _add_sparse(self, row: torch.Tensor, block: int, values: torch.Tensor) -> None:
        """Add the SJLT of one factor's block [n] to `row` [width]."""
        if self._is_card:
            row += self._in_order(block)(values[None])[0]
            return
        bucket, sign = self._map(block)
        row.index_add_(0, bucket, values * sign.to(values.dtype))

    def _add_dense(self, row: torch.Tensor, block: int, values: torch.Tensor) -> None:
        """Add values [n] @ signs [n, width] / sqrt(width) to `row`; the signs are made in chunks, never stored."""
        step = max(1, _RADEMACHER_CHUNK // self.width)
        for start in range(0, values.numel(), step):
            part = values[start : start + step]
            signs = sign_matrix(
                self.seed, self.names[block], part.numel(), self.width, row_start=start, dtype=values.dtype
            ).to(self.device)
            row.add_(part @ signs, alpha=self.width**-0.5)
