"""Gradients of questions, made as the rows of a store were."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from influence_fast.data.adapter_names import plain_name
from influence_fast.data.held import Held
from influence_fast.errors import StoreError
from influence_fast.gradients.per_example import per_example_gradients
from influence_fast.gradients.rows.projection import Projection
from influence_fast.gradients.targets import gradient_layout
from influence_fast.store.planning import identity_of

if TYPE_CHECKING:
    from influence_fast.store.reader import Store


def query_gradients(store: Store, model: Any, queries: Held, *, max_tokens: int | None = None) -> torch.Tensor:
    """Return gradients of tokenized examples, [Q, k] fp32 on the host, made as the store's rows were.

    `queries` as the examples of `per_example_gradients`.

    Projection (a fitted sketch included), loss reduction and precision are the store's. Raises StoreError where the
    model or its adapter is not the store's: their gradients would have the same width, and mean something else.
    """
    spec = store.spec
    projection = spec.projection()
    options: dict[str, Any] = {
        "projection": projection,
        "loss_reduction": spec.loss_reduction,
        "precision": spec.precision,
    }
    store.identity.check(identity_of(model, **options), store.path)
    _check_layout(store, model, projection)
    return per_example_gradients(model, queries, max_tokens=max_tokens, **options).cpu()


def _check_layout(store: Store, model: Any, projection: Projection | None) -> None:
    """Raise StoreError where the model's rows have other factors, or in another order, than the store's."""
    ours, theirs = (
        [(plain_name(e.module), e.factor, tuple(e.shape), e.offset) for e in entries]
        for entries in (gradient_layout(model, projection), store.manifest.modules)
    )
    if not theirs or ours == theirs or any(factor == "gradient" for _, factor, _, _ in theirs):  # imported
        return
    place = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    a, b = (f"{e[place][1]} of {e[place][0]}" if place < len(e) else "nothing" for e in (ours, theirs))
    raise StoreError(
        f"{store.path}: the model's rows have {a} where the store's have {b} (factor {place}): load the adapters by "
        "the names and in the order that the store was built with, or build it again"
    )
