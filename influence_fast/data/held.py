"""Convert tokenized examples of any common form into mappings of tensors.

Taken are lists of mappings, a padded batch, a `datasets.Dataset` in any format (that of trl's `SFTTrainer` too), a data
frame or Arrow table, a `DataLoader` and a generator of any of these. The one form is a mapping of 1-D int tensors
`input_ids` and `labels` of one length, with `weights` (float) where losses are weighted, and with whatever else a row
holds.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from os import PathLike
from typing import Any

import numpy as np
import torch

from influence_fast.data.packing import IGNORED, example_name
from influence_fast.errors import DataError, shown, truncated_list

#: What `as_examples` takes.
Held = Iterable[Any] | Mapping[str, Any]

_MASKS = ("completion_mask", "assistant_masks")  # of trl, which makes the labels in its collator
_ALIGNED = ("input_ids", "labels", "weights", "attention_mask", "position_ids", *_MASKS)
_UNSIGNED = (torch.uint8, torch.uint16, torch.uint32, torch.uint64)
_A_ROW = ("id", *_ALIGNED, "seq_lengths")  # what a batch has for each of its rows
_TEXTS = ("prompt", "completion", "messages", "conversations", "text", "question", "problem", "instruction")
_NOT_TEXT = ("pixel_values", "input_features", "input_values", "inputs_embeds")  # what else a model may read


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
            (position_ids that restart), images or sounds beside its tokens, or weights that are not finite.
    """
    if isinstance(data, str | bytes | PathLike):
        raise DataError(
            f"examples are the text or path {shown(data)}: read a file by inf.load_examples(path), and tokenize it by "
            "inf.tokenize(examples, tokenizer).examples"
        )
    if hasattr(data, "too_long") and hasattr(data, "examples"):
        raise DataError("examples are all that inf.tokenize returned: give its .examples (.too_long have no tokens)")
    data = _records(data)
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
        _check_collated(data, item)
        found += _split(item, len(found))
    _check_order(data, found, numbered)
    return _numbered(found, numbered)


def _records(data: Any) -> Any:
    """Return a data frame (pandas, polars) or an Arrow table as a list of mappings, and anything else unchanged."""
    if hasattr(data, "to_pylist") and hasattr(data, "column_names"):
        return data.to_pylist()
    if hasattr(data, "to_dicts") and hasattr(data, "columns"):
        return data.to_dicts()
    if not (hasattr(data, "iloc") and hasattr(data, "columns")):
        return data
    # pandas has NaN where a cell is empty
    return [
        {name: value for name, value in row.items() if not (isinstance(value, float) and value != value)}
        for row in data.to_dict("records")
    ]


def _check_order(loader: Any, rows: list[dict[str, Any]], numbered: bool) -> None:
    """Warn of rows without ids in the order of a loader that shuffles; raise DataError where they would be numbered."""
    samplers = (getattr(loader, "sampler", None), getattr(getattr(loader, "batch_sampler", None), "sampler", None))
    random = any(isinstance(sampler, torch.utils.data.RandomSampler) for sampler in samplers)
    if not random or all(row.get("id") is not None for row in rows):
        return
    remedy = "give it shuffle=False, or rows with an 'id'"
    if numbered:
        raise DataError(f"the DataLoader shuffles, so that numbers would not be places in its data set: {remedy}")
    warnings.warn(
        f"the DataLoader shuffles, and results are in the order of this pass, not of its data set: {remedy}",
        stacklevel=4,
    )


def _check_collated(loader: Any, item: Any) -> None:
    """Raise DataError for lists that torch's default collation has turned into one tensor a position of the text."""
    if getattr(loader, "collate_fn", None) is not torch.utils.data.default_collate or not isinstance(item, Mapping):
        return
    if isinstance(item.get("input_ids"), list | tuple):
        raise DataError(
            "the DataLoader's default collation transposes lists of tokens, so that examples are lost: give it a "
            "collate_fn that pads (transformers' DataCollatorForSeq2Seq), or batch_size=None"
        )


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
        item = _records(self._data[place])
        row = _row(item[0] if isinstance(item, list) and len(item) == 1 else item, place)
        return _with_id(row, place) if self._numbered else row

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[place] for place in range(len(self)))


def _numbered(rows: list[dict[str, Any]], numbered: bool) -> list[dict[str, Any]]:
    return [_with_id(row, place) for place, row in enumerate(rows)] if numbered else rows


def _with_id(row: dict[str, Any], place: int) -> dict[str, Any]:
    return row if row.get("id") is not None else {**row, "id": str(place)}


def _split(item: Any, place: int) -> Iterator[dict[str, Any]]:
    """Yield the row that an item is, or the rows of a padded batch, a table or a list of rows."""
    item = _records(item)
    if isinstance(item, list | tuple) and item and all(isinstance(row, Mapping) for row in item):
        for i, row in enumerate(item):
            yield from _split(row, place + i)
    elif isinstance(item, Mapping) and _is_batch(item.get("input_ids")):
        rows = len(item["input_ids"])
        columns = {name: item[name] for name in _A_ROW if item.get(name) is not None}
        if np.ndim(columns.get("weights", [])) == 0:
            columns["weights"] = [columns["weights"]] * rows
        for name, column in columns.items():
            if not hasattr(column, "__len__") or len(column) != rows:
                count = len(column) if hasattr(column, "__len__") else "one"
                raise DataError(f"a batch of {rows} rows has {count} of {name!r}; give one for each row")
        _check_one_text(item, f"examples[{place}]", rows)
        for i in range(rows):
            yield _row({name: column[i] for name, column in columns.items()}, place + i)
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
        raise DataError(f"{name}: no 'input_ids'; {_without_tokens(item)}")
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


def _without_tokens(item: Mapping[str, Any]) -> str:
    """Return what a mapping is that has no tokens, and what to give in its place."""
    if any(hasattr(value, "column_names") for value in item.values()):
        return f"this holds the splits {truncated_list(map(repr, item))}: give one of them"
    if texts := [column for column in _TEXTS if column in item]:
        return f"a row of text ({', '.join(texts)}) is read by inf.load_examples, and tokenized by inf.tokenize"
    return "an example is {'input_ids', 'labels'}, 1-D whole numbers"


def _whole(values: Any, name: str, field: str) -> torch.Tensor:
    """Return values as a 1-D int tensor [n], which -100 fits into. Raises DataError where they are none."""
    try:
        if isinstance(values, np.ndarray) and values.dtype == object:
            values = list(values)
        elif isinstance(values, np.ndarray):  # of any byte order and stride, perhaps read-only
            values = np.require(values, values.dtype.newbyteorder("="), ["C", "W"])
        found = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise DataError(f"{name}: {field} is no list of whole numbers; give a 1-D int tensor") from None
    if found.ndim != 1:
        raise DataError(f"{name}: {field} must be 1-D, not {tuple(found.shape)}; give one example a row")
    if found.is_floating_point() and found.numel() == 0:
        return found.to(torch.int64)
    if found.is_floating_point() or found.is_complex() or (found.dtype == torch.bool and field != "attention_mask"):
        raise DataError(f"{name}: {field} is a tensor of {found.dtype}; give whole numbers")
    if field == "labels" and found.dtype in _UNSIGNED:
        raise DataError(f"{name}: labels of {found.dtype} cannot hold {IGNORED}, a token there; give signed ones")
    return found if found.dtype in (torch.int32, torch.int64) else found.to(torch.int64)


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
        values = _mask(item[mask], name, mask)
        if values.shape != ids.shape:
            raise DataError(f"{name}: {mask} has shape {tuple(values.shape)} for {len(ids)} tokens")
        counted &= values.bool().cpu()
    return torch.where(counted.to(ids.device), ids, IGNORED)


def _mask(values: Any, name: str, field: str) -> torch.Tensor:
    """Return a mask of zeros and ones as a tensor. Raises DataError where it holds anything else."""
    try:
        found = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError):
        raise DataError(f"{name}: {field} is no list of zeros and ones") from None
    if bool(((found != 0) & (found != 1)).any()):
        raise DataError(f"{name}: {field} holds other numbers than 0 and 1; learned tokens are 1")
    return found


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


def _check_one_text(item: Mapping[str, Any], name: str, rows: int = 1) -> None:
    """Raise DataError for a row that holds several examples, which would see each other, or more than text.

    rows: for a batch, how many it has; its seq_lengths and position_ids are looked at row by row.
    """
    remedy = "give one example a row (packing=False in trl)"
    if others := [key for key in item if str(key).startswith(_NOT_TEXT) and item[key] is not None]:
        raise DataError(f"{name}: it has {others[0]!r} beside its tokens, and text alone is scored; leave it out")
    ends, parts = item.get("cu_seq_lens_q"), item.get("seq_idx")
    if (ends is not None and len(ends) - 1 > rows) or (parts is not None and bool((torch.as_tensor(parts) > 0).any())):
        raise DataError(f"{name}: several examples are packed in one row (cu_seq_lens, seq_idx); {remedy}")
    if rows > 1 or _is_batch(item["input_ids"]):
        return
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
