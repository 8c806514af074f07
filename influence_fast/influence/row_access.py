"""The rows of a store as preconditioners and scores read them: in pieces, by module, or divided by lengths."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch

from influence_fast.gradients.rows.layout import LayoutEntry, layout_width
from influence_fast.store.reader import Store


def blocks_of(store: Store) -> list[tuple[int, int]]:
    """Return [start, end) of each module in the store's rows; one block where the whole row was sketched."""
    factors = factors_of(store)
    return [(0, store.width)] if factors is None else module_blocks(factors)


def factors_of(store: Store) -> list[LayoutEntry] | None:
    """Return each LoRA factor's shape and offset in the store's rows; None where the whole row was sketched or is
    unknown."""
    if not store.manifest.modules or store.identity.projection_width is not None:
        return None
    return [LayoutEntry(m.module, m.factor, (m.shape[0], m.shape[1]), m.offset) for m in store.manifest.modules]


def module_blocks(layout: list[LayoutEntry]) -> list[tuple[int, int]]:
    """Return [start, end) of each module's factors in a row of `layout`."""
    starts = [entry.offset for i, entry in enumerate(layout) if i == 0 or entry.module != layout[i - 1].module]
    ends = [*starts[1:], layout_width(layout)]
    return list(zip(starts, ends, strict=True))


def row_blocks(store: Store, size: int = 1024) -> Iterable[torch.Tensor]:
    """Yield the store's rows in order, in pieces [n, k] fp32 of `size` rows."""
    for start in range(0, len(store), size):
        yield store.rows(slice(start, start + size))


class DividedRows:
    """A store whose rows are divided by their lengths in a preconditioner's metric; a zero row scores 0."""

    def __init__(self, store: Store, scales: np.ndarray) -> None:
        self.store, self.ids, self.scales = store, store.ids, scales

    def __len__(self) -> int:
        return len(self.store)

    def blocks(self) -> Iterator[tuple[int, Any, np.ndarray]]:
        """Yield the rows as `Store.blocks` does, with the scales of the division in their own."""
        for start, rows, scales in self.store.blocks():
            mine = self.scales[start : start + len(rows)]
            yield start, rows, mine if scales is None else mine * scales
