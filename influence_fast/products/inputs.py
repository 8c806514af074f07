"""What `inner_products` is handed: rows, queries, groups and outputs, checked and as the engines take them."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from influence_fast.errors import ConfigError, DataError, NumericError, shown, truncated_list
from influence_fast.row_codec import bf16_bits

Array = Any  # numpy array or torch tensor
Block = tuple[int, Array, Array | None]


@dataclass(frozen=True, slots=True)
class Source:
    """Rows in blocks, checked. kind: "float32", "bfloat16" or "int8"."""

    count: int
    width: int
    kind: str
    blocks: Callable[[], Iterator[Block]]
    array: Array | None = None
    is_torch: bool = False
    device: torch.device | None = None
    ids: Sequence[str] | None = None

    @property
    def on_device(self) -> bool:
        return self.device is not None and self.device.type != "cpu"


def scoring_device(source: Source, device: str | torch.device | None) -> torch.device | None:
    """Return the device to score on; None for the CPU's own paths."""
    if device is None:
        return source.device if source.on_device else None
    try:
        asked = torch.device(device)
    except RuntimeError:
        raise ConfigError(f"unknown device {device!r}; use 'cpu', 'cuda' or 'cuda:0'") from None
    if source.on_device:
        assert source.device is not None
        if asked.type != source.device.type or asked.index not in (None, source.device.index):
            raise DataError(f"rows lie on {source.device} and device is {asked}; move the rows, or leave device out")
        return source.device
    if asked.type == "cpu":
        return None
    if asked.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device {str(device)!r} is not available to this PyTorch; leave device out to use the CPU")
    if asked.type == "cuda" and asked.index is None:
        asked = torch.device("cuda", torch.cuda.current_device())
    return asked


def source_of(rows: Any, row_scales: Array | None) -> Source:
    if hasattr(rows, "blocks"):
        if row_scales is not None:
            raise DataError("row_scales belong to arrays; a store yields its scales with its blocks")
        return _store_source(rows)
    count, width = shape_of(rows, "rows")
    array, kind = _row_array(rows)
    scales = None if row_scales is None else _scale_array(row_scales, count)
    is_torch = isinstance(rows, torch.Tensor)

    def blocks() -> Iterator[Block]:
        yield 0, array, scales

    return Source(count, width, kind, blocks, array, is_torch, rows.device if is_torch else None)


def _store_source(store: Any) -> Source:
    first = next(iter(store.blocks()), None)
    ids = getattr(store, "ids", None)
    if first is None:
        return Source(0, 0, "float32", lambda: iter(()), ids=ids)
    kind = _row_array(first[1])[1]
    width = first[1].shape[1]
    count = len(store) if hasattr(store, "__len__") else sum(len(rows) for _, rows, _ in store.blocks())

    def blocks() -> Iterator[Block]:
        expected = 0
        for start, rows, scales in store.blocks():
            array, this = _row_array(rows)
            if start != expected or this != kind or array.shape[1] != width or start + len(array) > count:
                raise DataError(
                    f"block at row {start} does not follow the one before (expected row {expected}, {kind} rows of "
                    f"{width} numbers, {count} in all): blocks() must yield the rows in order"
                )
            if kind == "int8" and scales is None:
                raise DataError(f"block at row {start} has int8 rows and no scales; yield (start, rows, scales)")
            expected = start + len(array)
            yield start, array, None if scales is None else _scale_array(scales, len(array))
        if expected != count:
            raise DataError(f"blocks() yielded {expected} of {count} rows; it must yield them all")

    return Source(count, width, kind, blocks, ids=ids)


def shape_of(array: Any, name: str) -> tuple[int, int]:
    if not isinstance(array, np.ndarray | torch.Tensor):
        raise DataError(f"{name} are a {type(array).__name__}; pass a numpy array or a torch tensor")
    if isinstance(array, torch.Tensor) and (array.layout != torch.strided or array.is_nested or array.is_meta):
        kind = "meta" if array.is_meta else "nested" if array.is_nested else str(array.layout).removeprefix("torch.")
        raise DataError(f"{name} are a {kind} tensor; pass a dense one that holds its numbers")
    if array.ndim != 2:
        raise DataError(f"{name} have shape {tuple(array.shape)}; pass two dimensions, one row each")
    return int(array.shape[0]), int(array.shape[1])


_TORCH_KINDS = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.int8: "int8"}
_NUMPY_KINDS = {"float32": "float32", "uint16": "bfloat16", "bfloat16": "bfloat16", "int8": "int8"}


def _row_array(rows: Array) -> tuple[Array, str]:
    """Return the rows as the engines take them, and their kind.

    Rows on the CPU become numpy arrays (bf16 as uint16 bits, no copy); others stay the tensor itself.
    """
    if isinstance(rows, torch.Tensor):
        kind = _TORCH_KINDS.get(rows.dtype)
        if kind is not None and rows.device.type == "cpu":
            rows = rows.detach()
            rows = bf16_bits(rows) if kind == "bfloat16" else rows.numpy()
    else:
        kind = _NUMPY_KINDS.get(rows.dtype.name)
        if rows.dtype.name == "bfloat16":  # of ml_dtypes
            rows = rows.view(np.uint16)
        if not rows.dtype.isnative:
            kind = None
    if kind is None:
        raise DataError(f"rows have dtype {rows.dtype}; convert them to float32, bfloat16, or int8 with quantize_rows")
    if isinstance(rows, np.ndarray):
        if rows.size and rows.shape[1] > 1 and rows.strides[1] != rows.itemsize:
            raise DataError("rows are not contiguous along k; pass numpy.ascontiguousarray(rows) or rows.contiguous()")
        if not rows.flags.aligned:
            raise DataError("rows are not aligned to their elements; pass rows.copy()")
    return rows, kind


def _scale_array(scales: Array, count: int) -> Array:
    if isinstance(scales, torch.Tensor):
        scales = scales.detach().float().reshape(-1).contiguous()
        if scales.device.type == "cpu":
            scales = scales.numpy()
    else:
        scales = np.ascontiguousarray(scales, dtype=np.float32).reshape(-1)
    if scales.shape[0] != count:
        raise DataError(f"row_scales have {scales.shape[0]} values for {count} rows; pass one a row")
    return scales


def query_values(queries: Array, first: int, last: int, device: torch.device | None) -> Array:
    """Return fp32 queries [last - first, k] where the engine wants them.

    Raises NumericError for a value that is not finite.
    """
    part = queries[first:last]
    if isinstance(part, torch.Tensor):
        part = part.detach().to(device=device or "cpu", dtype=torch.float32)
        part = part if device is not None else part.contiguous().numpy()
    else:
        if part.dtype.kind not in "fiu":
            raise DataError(f"queries have dtype {part.dtype}; convert them to float32")
        with np.errstate(over="ignore"):
            part = np.ascontiguousarray(part, dtype=np.float32)
        part = part if device is None else torch.from_numpy(part).to(device)
    finite = torch.isfinite(part).all(1) if isinstance(part, torch.Tensor) else np.isfinite(part).all(1)
    if not bool(finite.all()):
        bad = [str(first + i) for i, good in enumerate(finite.tolist()) if not good]
        raise NumericError(f"queries {truncated_list(bad)} have NaN or infinite values; recompute or drop them")
    return part


_WHOLE = (torch.int16, torch.int32, torch.int64)


def check_groups(groups: Sequence[Sequence[int]] | None, count: int, ranks: bool) -> list[list[int]]:
    if groups is None:
        if ranks and count == 0:
            raise DataError("there is no query to rank rows for; pass at least one")
        return [list(range(count))] if ranks else []
    if isinstance(groups, str) or not _is_listing(groups) or not all(map(_is_listing, groups)):
        raise DataError(f"groups is {shown(groups)}; pass a list of lists of query numbers, or None")
    if len(groups) == 0:
        raise DataError("groups is an empty list; pass at least one group of query numbers, or None")
    checked = []
    for g, group in enumerate(groups):
        # a mask would be read as the queries 0 and 1
        if any(isinstance(q, bool | np.bool_) or getattr(q, "dtype", None) == torch.bool for q in group):
            raise DataError(f"group {g} is a mask of booleans; give the numbers of its queries")
        members = [int(q) if isinstance(q, numbers.Integral) else q for q in list(group)]
        members = [int(q) if isinstance(q, torch.Tensor) and q.dtype in _WHOLE else q for q in members]
        if not members:
            raise DataError(f"group {g} is empty; give it a query or leave it out")
        for q in members:
            if not isinstance(q, int) or not 0 <= q < count:
                raise DataError(f"group {g} names query {q!r}; there are queries 0 to {count - 1}")
        if len(set(members)) != len(members):
            double = next(q for i, q in enumerate(members) if q in members[:i])
            raise DataError(f"group {g} names query {double} twice; name it once")
        checked.append(members)
    return checked


def _is_listing(value: Any) -> bool:
    """Return whether a value has a length and can be iterated repeatedly; a mapping has names, so it is none."""
    return (
        hasattr(value, "__len__")
        and hasattr(value, "__iter__")
        and not isinstance(value, str | bytes | Mapping)
        and getattr(value, "ndim", 1) > 0
    )


def check_topk(topk: int | None, count: int) -> int:
    return 0 if topk is None else min(positive("topk", topk), count)


def positive(name: str, value: Any) -> int:
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < 1:
        raise DataError(f"{name} is {value!r}; pass a whole number of at least 1")
    return int(value)


def check_out(out: Array, count: int, q_count: int) -> Array:
    if shape_of(out, "out") != (count, q_count):
        raise DataError(f"out has shape {tuple(out.shape)}; the scores are ({count}, {q_count})")
    if out.dtype not in (np.float32, torch.float32):
        raise DataError(f"out has dtype {out.dtype}; the scores are float32")
    out = out.detach() if isinstance(out, torch.Tensor) else out  # the same memory, which is written to
    array = out.numpy() if isinstance(out, torch.Tensor) and out.device.type == "cpu" else out
    if isinstance(array, np.ndarray):
        if not array.flags.writeable:
            raise DataError("out is read-only; pass an array that may be written")
        if array.size and q_count > 1 and array.strides[1] != array.itemsize:
            raise DataError("out is not contiguous along its rows; pass numpy.empty((N, Q), numpy.float32)")
        if array.size and array.strides[0] < 0:
            raise DataError("out has its rows in reverse; pass numpy.empty((N, Q), numpy.float32)")
    step = array.strides[0] / array.itemsize if isinstance(array, np.ndarray) else array.stride(0)
    if count > 1 and step < q_count:
        raise DataError("out has rows that share memory; pass numpy.empty((N, Q), numpy.float32)")
    return array


def check_finite(bad: list[int], source: Source) -> None:
    if bad:
        names = [str(i) if source.ids is None else str(source.ids[i]) for i in bad]
        raise NumericError(
            f"rows {truncated_list(names)} have NaN or infinite values, or scores beyond fp32; recompute or drop them"
        )
