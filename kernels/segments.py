"""Packed examples cut into chunks, the unit of work of every ragged kernel.

Tokens of E examples lie one after another, T in all; `cu_seqlens` (E + 1,) int32 holds where each begins, as in
variable-length attention. Each example is cut from its own first token into chunks of `chunk` tokens (the last one
shorter). A program sums one chunk, or one after another; an example is summed from its chunks in order. Chunks do not
depend on the neighbours in the pack, so neither does the order of any sum: the same example gives the same bits alone,
packed or reordered.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from influence_fast.errors import ConfigError, DataError
from influence_fast.transfer import all_to_device

# 512 tokens of two (16,) bfloat16 operands are 32 KB read for one 1 KB partial sum: 6 % more traffic, and 32 programs
# a module for one 16k-token trace.
CHUNK = 512
_TABLES = (
    "cu_seqlens",
    "chunk_start",
    "chunk_stop",
    "chunk_example",
    "chunk_slot",
    "first_chunk",
    "split_example",
    "split_slot",
)


@dataclass(frozen=True, slots=True)
class Segments:
    """The chunk tables of one pack, all int32 on the device of the kernels; build once a batch, from host lengths.

    cu_seqlens: (E + 1,) first token of each example, and T at the end
    chunk_start, chunk_stop: (C,) tokens of each chunk
    chunk_example: (C,) the example a chunk belongs to
    chunk_slot: (C,) place among the partial sums, or -1 where the chunk is the whole example
    first_chunk: (E + 1,) chunks of example e are first_chunk[e] ... first_chunk[e + 1]
    split_example: (S,) examples of more than one chunk
    split_slot: (S + 1,) their partial sums are split_slot[i] ... split_slot[i + 1]
    slots: number of partial sums in all
    chunk: tokens in a chunk, but for an example's last one
    longest: no example has more tokens; only ever decides how work is spread, never the order of a sum
    """

    cu_seqlens: Tensor
    chunk_start: Tensor
    chunk_stop: Tensor
    chunk_example: Tensor
    chunk_slot: Tensor
    first_chunk: Tensor
    split_example: Tensor
    split_slot: Tensor
    examples: int
    tokens: int
    chunks: int
    slots: int
    chunk: int
    longest: int

    @classmethod
    def from_lengths(
        cls,
        lengths: Sequence[int],
        *,
        device: torch.device | str = "cpu",
        chunk: int = CHUNK,
        room: tuple[int, int] | None = None,
        longest: int | None = None,
    ) -> Segments:
        """Build tables for examples of these lengths in this order; one copy to the device, no synchronisation.

        room: (E, T), for a step that is recorded once and replayed: tables as large as any pack needs of fewer than E
        examples and at most T tokens. The examples too many have no tokens, and the last one the tokens too many;
        chunks too many have no tokens and belong to it. What kernels write for these is zeros, or not written.
        longest: tokens of no example more, for such a step; by default those of the longest here

        Raises DataError for an example of no tokens, ConfigError for no examples at all or more than there is room.
        """
        lengths = [int(length) for length in lengths]
        if not lengths:
            raise ConfigError("a pack needs at least one example; got an empty list of lengths")
        empty = [i for i, length in enumerate(lengths) if length < 1]
        if empty:
            raise DataError(
                f"example {empty[0]} of the pack has {lengths[empty[0]]} tokens (zero-length segments: "
                f"{len(empty)}); drop empty examples before packing"
            )
        tables = _cut(lengths, chunk)
        slots = tables["split_slot"][-1]
        if room is not None:
            slots = _fill(tables, *room, chunk)
        on_host = [torch.tensor(table, dtype=torch.int32) for table in tables.values()]
        on_device: dict[str, Any] = dict(zip(_TABLES, all_to_device(on_host, torch.device(device)), strict=True))
        return cls(
            **on_device,
            examples=len(tables["cu_seqlens"]) - 1,
            tokens=tables["cu_seqlens"][-1],
            chunks=len(tables["chunk_start"]),
            slots=slots,
            chunk=chunk,
            longest=max(lengths) if longest is None else longest,
        )

    @property
    def tables(self) -> list[Tensor]:
        """Return the tensors, in the order of the fields."""
        return [getattr(self, name) for name in _TABLES]

    def with_tables(self, tables: Sequence[Tensor]) -> Segments:
        """Return the same tables with other tensors in that order: copies on another device."""
        given: dict[str, Any] = dict(zip(_TABLES, tables, strict=True))
        return replace(self, **given)

    @classmethod
    def from_cu_seqlens(cls, cu_seqlens: Tensor, *, chunk: int = CHUNK) -> Segments:
        """Build tables for `cu_seqlens` (E + 1,) int32. It is read on the host: on a GPU this waits for the device.

        Raises ConfigError if it is not a 1-D int32 tensor that starts at 0, DataError for an example of no tokens.
        """
        if cu_seqlens.dim() != 1 or cu_seqlens.dtype != torch.int32 or cu_seqlens.numel() < 2:
            raise ConfigError(
                "cu_seqlens must be a 1-D int32 tensor of at least 2 entries (as in variable-length attention), "
                f"got {tuple(cu_seqlens.shape)} {cu_seqlens.dtype}"
            )
        bounds = cu_seqlens.tolist()
        if bounds[0] != 0:
            raise ConfigError(f"cu_seqlens must start at 0, got {bounds[0]}")
        lengths = [b - a for a, b in pairwise(bounds)]
        return cls.from_lengths(lengths, device=cu_seqlens.device, chunk=chunk)


def _cut(lengths: list[int], chunk: int) -> dict[str, list[int]]:
    """Build the tables of `Segments`, in its order, as lists."""
    tables: dict[str, list[int]] = {name: [] for name in _TABLES}
    for name in ("cu_seqlens", "first_chunk", "split_slot"):
        tables[name].append(0)
    for e, length in enumerate(lengths):
        begin, slots = tables["cu_seqlens"][-1], tables["split_slot"][-1]
        end = begin + length
        count = -(-length // chunk)
        for i in range(count):
            tables["chunk_start"].append(begin + i * chunk)
            tables["chunk_stop"].append(min(begin + (i + 1) * chunk, end))
            tables["chunk_example"].append(e)
            tables["chunk_slot"].append(slots + i if count > 1 else -1)
        if count > 1:
            tables["split_example"].append(e)
            tables["split_slot"].append(slots + count)
        tables["cu_seqlens"].append(end)
        tables["first_chunk"].append(len(tables["chunk_start"]))
    return tables


def _fill(tables: dict[str, list[int]], examples: int, tokens: int, chunk: int) -> int:
    """Pad the tables to the sizes of a step with room for so many; return its number of partial sums."""
    here, held = len(tables["cu_seqlens"]) - 1, tables["cu_seqlens"][-1]
    if here >= examples or held > tokens:
        raise ConfigError(f"no room for {here} examples of {held} tokens: it is for fewer than {examples} of {tokens}")
    # An example of l tokens has at most l / c + 1 chunks, and fewer than 2 l / c where it has more than one.
    chunks, splits = examples + tokens // chunk, tokens // (chunk + 1)
    last, chunks_here = examples - 1, len(tables["chunk_start"])
    sizes_and_fillers = {
        "cu_seqlens": (examples, held),
        "chunk_start": (chunks, tokens),
        "chunk_stop": (chunks, tokens),
        "chunk_example": (chunks, last),
        "chunk_slot": (chunks, -1),
        "first_chunk": (examples + 1, chunks_here),
        "split_example": (splits, last),
        "split_slot": (splits + 1, tables["split_slot"][-1]),
    }
    for name, (size, filler) in sizes_and_fillers.items():
        tables[name] += [filler] * (size - len(tables[name]))
    tables["cu_seqlens"].append(tokens)
    return 2 * tokens // chunk if splits else 0


def as_segments(segments: Segments | Tensor) -> Segments:
    """Turn a `cu_seqlens` tensor into its tables; ready tables pass through."""
    return segments if isinstance(segments, Segments) else Segments.from_cu_seqlens(segments)


def check_tokens(name: str, key: str, tensor: Tensor, segments: Segments) -> None:
    """Raise ConfigError unless the first dimension of `tensor` is the number of packed tokens."""
    if tensor.shape[0] != segments.tokens:
        raise ConfigError(f"{name}: {key} has {tensor.shape[0]} tokens, but cu_seqlens ends at {segments.tokens}")


def segment_sum(values: Tensor, segments: Segments) -> Tensor:
    """Sum rows of `values` (T, ...) over each example -> (E, ...), in its own dtype."""
    cu = segments.cu_seqlens.tolist()
    return torch.stack([values[a:b].sum(0) for a, b in pairwise(cu)])
