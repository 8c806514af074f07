"""What a trainer trains on, read again one example at a time: its data set by its own collator."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from influence_fast.data.held import as_examples
from influence_fast.errors import DataError

_REMEDY = "give what is to be scored as InfluenceCallback(..., examples=...)"
# beside the tokens, of models that read more than text
_NOT_TEXT = ("pixel_values", "image", "video", "audio", "input_features", "inputs_embeds")


class TrainedRows(Sequence[dict[str, Any]]):
    """The examples of a data set as its collator makes them, each read when it is asked for, with ids.

    The collator decides what is trained on: it makes labels, masks prompts and cuts. An example without an `id` gets
    its place.
    """

    def __init__(self, dataset: Any, collate: Callable[[list[Any]], Any] | None) -> None:
        self._dataset = dataset
        self._collate = collate

    @classmethod
    def of(cls, loader: Any) -> TrainedRows:
        """Return the rows of a trainer's `DataLoader`. Raises DataError for data that cannot be read again."""
        dataset = getattr(loader, "dataset", None)
        once = isinstance(dataset, torch.utils.data.IterableDataset)
        if once or not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
            kind = type(dataset).__name__
            raise DataError(f"the training set is a {kind}, whose examples cannot be read again: {_REMEDY}")
        return cls(dataset, getattr(loader, "collate_fn", None))

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        place = range(len(self))[place]
        row = self._dataset[place]
        if isinstance(row, Mapping) and row.get("seq_lengths") is not None and len(row["seq_lengths"]) > 1:
            raise DataError(f"row {place} of the training set holds several examples (packing): {_REMEDY}")
        name = row.get("id") if isinstance(row, Mapping) else None
        batch = row if self._collate is None else self._collate([row])
        if isinstance(batch, Mapping):
            others = [key for key in batch if str(key).startswith(_NOT_TEXT)]
            if others:
                raise DataError(f"training example {place} has {others[0]!r} beside its text, which is not scored")
        found = as_examples(batch if isinstance(batch, Mapping) else [batch])
        if len(found) != 1:
            raise DataError(
                f"row {place} of the training set became {len(found)} examples in a batch (pairs, or several texts "
                f"in a row): {_REMEDY}"
            )
        (named,) = as_examples([{**found[0], "id": place if name is None else name}])
        return named
