"""Convert tokenized examples of any common form into mappings of tensors.

Taken are lists of mappings, a padded batch, a `datasets.Dataset` in any format (that of trl's `SFTTrainer` too), a
`DataLoader` and a generator of any of these. The one form is a mapping of 1-D int tensors `input_ids` and `labels` of
one length, with `weights` (float) where losses are weighted, and with whatever else a row holds.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch

from influence_fast.data.packing import IGNORED, example_name
from influence_fast.errors import DataError

#: What `as_examples` takes.
Held = Iterable[Any] | Mapping[str, Any]

_MASKS = ("completion_mask", "assistant_masks")  # of trl, which makes the labels in its collator
_ALIGNED = ("input_ids", "labels", "weights", "attention_mask", "position_ids", *_MASKS)


def as_examples(data: Held, *, numbered: bool = False) -> Sequence[dict[str, Any]]:
    """Return tokenized examples as mappings of tensors; rows of a `datasets.Dataset` are converted when they are read.

    Args:
        data: a sequence, mapping or iterable as the module's docstring says. A row or a padded batch has `input_ids`
            (lists, arrays or tensors of whole numbers) and `labels` (-100 where ignored) or in their place trl's
            `completion_mask` and `assistant_masks`; an `attention_mask` of one run of ones says what is padding;
            `weights`, a number a token or one for all, multiply the tokens' losses.
        numbered: whether rows without an `id` get their place as one.

    Raises:
        DataError: a row is of another form, has a hole in its mask, labels under padding, several examples in one row
            (position_ids that restart), or weights that are not finite.
    """
    if isinstance(data, Mapping):
        return _numbered(list(_split(data, 0)), numbered)
    if isinstance(data, list | tuple):
        return _numbered([row for place, item in enumerate(data) for row in _split(item, place)], numbered)
    if hasattr(data, "__getitem__") and hasattr(data, "__len__"):
        return _Rows(data, numbered)
    if not isinstance(data, Iterable):
        raise DataError(
            f"examples are a {type(data).__name__}: give a list of {{'input_ids', 'labels'}}, a padded batch, a "
            "datasets.Dataset or a DataLoader"
        )
    found: list[dict[str, Any]] = []
    for item in data:
        found += _split(item, len(found))
    return _numbered(found, numbered)


class _Rows(Sequence[dict[str, Any]]):
    """The rows of a dataset that is too large to hold, each converted when it is read."""

    def __init__(self, data: Any, numbered: bool) -> None:
        self._data = data
        self._numbered = numbered

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        place = range(len(self))[place]
        row = _row(self._data[place], place)
        return _with_id(row, place) if self._numbered else row

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[place] for place in range(len(self)))


def _numbered(rows: list[dict[str, Any]], numbered: bool) -> list[dict[str, Any]]:
    return [_with_id(row, place) for place, row in enumerate(rows)] if numbered else rows


def _with_id(row: dict[str, Any], place: int) -> dict[str, Any]:
    return row if row.get("id") is not None else {**row, "id": str(place)}


def _split(item: Any, place: int) -> Iterator[dict[str, Any]]:
    """Yield the row that an item is, or the rows of a padded batch."""
    if isinstance(item, Mapping) and _is_batch(item.get("input_ids")):
        rows = len(item["input_ids"])
        for name in _ALIGNED:
            if item.get(name) is not None and len(item[name]) != rows:
                raise DataError(f"a batch of {rows} rows has {len(item[name])} of {name!r}; give one for each row")
        names = [name for name in ("id", *_ALIGNED) if item.get(name) is not None]
        for i in range(rows):
            yield _row({name: item[name][i] for name in names}, place + i)
    else:
        yield _row(item, place)


def _text(name: Any) -> Any:
    """Return a whole number of any type as text, and anything else unchanged."""
    if isinstance(name, torch.Tensor | np.generic | np.ndarray) and name.ndim == 0:
        name = name.item()
    return str(name) if isinstance(name, int) and not isinstance(name, bool) else name


def _is_batch(ids: Any) -> bool:
    if hasattr(ids, "ndim"):
        return bool(ids.ndim == 2)
    first = next(islice(ids, 1), None) if isinstance(ids, list | tuple) else None
    return isinstance(first, list | tuple) or getattr(first, "ndim", 0) == 1


def _row(item: Any, place: int) -> dict[str, Any]:
    """Return one example as a mapping of tensors. Raises DataError where it is not tokenized as `as_examples` says."""
    if not isinstance(item, Mapping):
        raise DataError(
            f"examples[{place}] is a {type(item).__name__}, not tokens: give inf.tokenize(examples, "
            "tokenizer).examples, or {'input_ids', 'labels'}"
        )
    name = example_name(item, place)
    if "input_ids" not in item:
        raise DataError(f"{name}: no 'input_ids'; an example is {{'input_ids', 'labels'}}, 1-D whole numbers")
    row = dict(item)
    if "id" in row:
        row["id"] = _text(row["id"])
    row["input_ids"] = _whole(item["input_ids"], name, "input_ids")
    row["labels"] = _labels(item, row["input_ids"], name)
    if item.get("weights") is not None:
        row["weights"] = _weights(item["weights"], row["labels"], name)
    else:
        row.pop("weights", None)
    _check_one_text(item, name)
    if item.get("attention_mask") is None:
        return row
    del row["attention_mask"]
    run = _run(_whole(item["attention_mask"], name, "attention_mask"), row["labels"], name)
    return row | {key: row[key][run] for key in ("input_ids", "labels", "weights") if key in row}


def _whole(values: Any, name: str, field: str) -> torch.Tensor:
    """Return values as a 1-D int tensor [n]. Raises DataError where they are none."""
    try:
        found = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise DataError(f"{name}: {field} is no list of whole numbers; give a 1-D int tensor") from None
    if found.ndim != 1:
        raise DataError(f"{name}: {field} must be 1-D, not {tuple(found.shape)}; give one example a row")
    if found.is_floating_point() and found.numel() == 0:
        return found.to(torch.int64)
    if found.is_floating_point() or found.is_complex() or (found.dtype == torch.bool and field != "attention_mask"):
        raise DataError(f"{name}: {field} is a tensor of {found.dtype}; give whole numbers")
    return found


def _labels(item: Mapping[str, Any], ids: torch.Tensor, name: str) -> torch.Tensor:
    """Return the labels [n], given or computed from trl's masks."""
    if item.get("labels") is not None:
        labels = _whole(item["labels"], name, "labels")
        if labels.shape != ids.shape:
            raise DataError(
                f"{name}: input_ids and labels must be 1-D and of one length, not {tuple(ids.shape)} and "
                f"{tuple(labels.shape)}"
            )
        return labels
    masks = [mask for mask in _MASKS if item.get(mask) is not None]
    if not masks:
        raise DataError(
            f"{name}: no 'labels'; give them, -100 where a token is not learned (or a copy of input_ids, to learn all)"
        )
    counted = torch.ones(len(ids), dtype=torch.bool)
    for mask in masks:
        values = torch.as_tensor(item[mask])
        if values.shape != ids.shape:
            raise DataError(f"{name}: {mask} has shape {tuple(values.shape)} for {len(ids)} tokens")
        counted &= values.bool().cpu()
    return torch.where(counted.to(ids.device), ids, IGNORED)


def _weights(values: Any, labels: torch.Tensor, name: str) -> torch.Tensor:
    """Return the float weight of each token [n]."""
    try:
        # numbers of Python are doubles, and rounding them would make another dataset of the same one in numpy
        dtype = None if hasattr(values, "dtype") else torch.float64
        weights = torch.as_tensor(values, dtype=dtype, device=labels.device)
    except (TypeError, ValueError, RuntimeError):
        raise DataError(f"{name}: weights are no numbers; give a float for each token, or one for all") from None
    if not weights.is_floating_point():
        weights = weights.to(torch.float64)
    weights = weights.expand(len(labels)) if weights.ndim == 0 else weights
    if weights.shape != labels.shape:
        raise DataError(
            f"{name}: weights have shape {tuple(weights.shape)} for {len(labels)} tokens; give one each, or one"
        )
    if not bool(weights[labels != IGNORED].isfinite().all()):
        raise DataError(f"{name}: a weight of a learned token is NaN or infinite")
    return weights


def _check_one_text(item: Mapping[str, Any], name: str) -> None:
    """Raise DataError for a row that holds several examples, which would see each other."""
    remedy = "give one example a row (packing=False in trl)"
    if item.get("seq_lengths") is not None and len(item["seq_lengths"]) > 1:
        raise DataError(f"{name}: seq_lengths say that {len(item['seq_lengths'])} examples are in this row; {remedy}")
    if item.get("position_ids") is None:
        return
    positions = _whole(item["position_ids"], name, "position_ids").cpu()
    if item.get("attention_mask") is not None:
        positions = positions[torch.as_tensor(item["attention_mask"]).cpu() != 0]
    if not torch.equal(positions.to(torch.int64), torch.arange(len(positions))):
        raise DataError(f"{name}: position_ids do not count up from 0, and are not kept; {remedy}, or leave them out")


def _run(mask: torch.Tensor, labels: torch.Tensor, name: str) -> slice:
    """Return the slice of tokens that an attention mask [n] leaves, which must be one run."""
    if mask.shape != labels.shape:
        raise DataError(f"{name}: attention_mask has {len(mask)} numbers for {len(labels)} tokens")
    seen = (mask != 0).nonzero().flatten()
    if len(seen) == 0:
        raise DataError(f"{name}: attention_mask leaves no token")
    first, last = int(seen[0]), int(seen[-1]) + 1
    if last - first != len(seen) or bool(((mask != 0) & (mask != 1)).any()):
        raise DataError(f"{name}: attention_mask must be one run of ones (several examples in one row?)")
    padding = torch.cat([labels[:first], labels[last:]])
    if bool((padding != IGNORED).any()):
        raise DataError(f"{name}: tokens that attention_mask hides have labels, and a loss; label them {IGNORED}")
    return slice(first, last)
