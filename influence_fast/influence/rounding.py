"""Whether a store's 8 bits are enough for what a preconditioner makes of its rows."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
import torch

from influence_fast.errors import truncated_list
from influence_fast.gradients.rows.layout import LayoutEntry
from influence_fast.row_codec import decoded_arrays
from influence_fast.store.reader import Store

_ROWS = 1024  # looked at
_SHARE = 0.1  # of a factor's squares, above which rounding shows in the scores


def warn_if_coarse(
    store: Store, queries: torch.Tensor, factors: Sequence[LayoutEntry] | None, preconditioner: str
) -> None:
    """Warn if int8 rows lose whole LoRA factors that `preconditioner` weighs like the others.

    A row has one scale, by its largest number. Rounding to it adds scale^2 / 12 to the square of every number: little
    to a plain inner product, which the large factors decide, but much to one in which H^-1 has raised the small ones.
    A factor that is zero in the queries [Q, k] too has lost nothing: that of a fresh adapter's A.
    """
    if store.manifest.dtype != "int8" or factors is None or len(store) == 0:
        return
    _, rows, scales = next(iter(store.blocks()))
    assert scales is not None  # int8 rows have them
    squares = decoded_arrays(rows[:_ROWS], scales[:_ROWS]).double().square().mean(dim=0)
    noise = float(np.square(scales[:_ROWS], dtype=np.float64).mean()) / 12
    asked = queries.any(dim=0)
    lost = [
        f"{entry.module}.{entry.factor}"
        for entry in factors
        if bool(asked[entry.columns].any()) and noise > _SHARE * float(squares[entry.columns].mean())
    ]
    if lost:
        warnings.warn(
            f"{store.path}: 8 bits with one scale a row are too few for {len(lost)} of {len(factors)} LoRA factors "
            f"({truncated_list(lost)}), where rounding is more than a tenth of the gradients, and {preconditioner!r} "
            "weighs all alike: build the store in bf16, or with a fitted sketch (a width)",
            stacklevel=4,
        )
