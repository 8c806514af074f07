"""A model as it was given: what opening it replaces, and how to have it back for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from influence_fast.gradients.model import packed_attention as attention


@dataclass(frozen=True, eq=False)
class GivenModel:
    """Remember the forwards and the attention that a model had before it was opened.

    replaced: modules whose forward is another while the model is open, and their own instance's one, or None.
    """

    base: Any
    replaced: Sequence[tuple[Any, Any]]
    implementations: list[tuple[Any, str | None]]

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """Restore the model's own forwards and attention, as it was given, while the block runs; dropout is off."""
        ours = [(module, vars(module).pop("forward")) for module, _ in self.replaced]
        try:
            for module, own in self.replaced:
                if own is not None:
                    module.forward = own
            with attention.implementation(self.base, self.implementations):
                yield
        finally:
            for module, forward in ours:
                module.forward = forward
