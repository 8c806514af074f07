"""Packed examples cut into chunks, the unit of work of every ragged kernel.

Tokens of E examples lie one after another, T in all; `cu_seqlens` (E + 1,) int32 holds where each begins, as in
variable-length attention. Each example is cut from its own first token into chunks of `chunk` tokens (the last one
shorter). A program sums one chunk; an example of several chunks is summed from its chunks in order. Chunks do not
depend on the neighbours in the pack, so neither does the order of any sum: the same example gives the same bits alone,
packed or reordered.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from influence_fast.errors import ConfigError, DataError

# 512 tokens of two (16,) bfloat16 operands are 32 KB read for one 1 KB partial sum: 6 % more traffic, and 32 programs
# a module for one 16k-token trace.
CHUNK = 512


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

    @classmethod
    def from_lengths(
        cls, lengths: Sequence[int], *, device: torch.device | str = "cpu", chunk: int = CHUNK
    ) -> Segments:
        """Tables for examples of these lengths in this order; one copy to the device, no synchronisation.

        Raises DataError for an example of no tokens, ConfigError for no examples at all.
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
        cu = [0]
        start: list[int] = []
        stop: list[int] = []
        example: list[int] = []
        slot: list[int] = []
        first = [0]
        split_example: list[int] = []
        split_slot = [0]
        slots = 0
        for e, length in enumerate(lengths):
            begin = cu[-1]
            end = begin + length
            count = -(-length // chunk)
            for i in range(count):
                start.append(begin + i * chunk)
                stop.append(min(begin + (i + 1) * chunk, end))
                example.append(e)
                slot.append(slots + i if count > 1 else -1)
            if count > 1:
                slots += count
                split_example.append(e)
                split_slot.append(slots)
            cu.append(end)
            first.append(len(start))
        # Each table begins at a multiple of 16 bytes: Triton compiles one more variant for a pointer that does not.
        parts = [cu, start, stop, example, slot, first, split_example, split_slot]
        padded = [part + [0] * (-len(part) % 4) for part in parts]
        packed = torch.tensor([value for part in padded for value in part], dtype=torch.int32)
        if torch.device(device).type == "cuda":
            packed = packed.pin_memory()
        views = packed.to(device, non_blocking=True).split([len(part) for part in padded])
        tables = [view[: len(part)] for view, part in zip(views, parts, strict=True)]
        return cls(
            cu_seqlens=tables[0],
            chunk_start=tables[1],
            chunk_stop=tables[2],
            chunk_example=tables[3],
            chunk_slot=tables[4],
            first_chunk=tables[5],
            split_example=tables[6],
            split_slot=tables[7],
            examples=len(lengths),
            tokens=cu[-1],
            chunks=len(start),
            slots=slots,
        )

    @classmethod
    def from_cu_seqlens(cls, cu_seqlens: Tensor, *, chunk: int = CHUNK) -> Segments:
        """Tables for `cu_seqlens` (E + 1,) int32. Reads it on the host: on a GPU this waits for the device.

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


def as_segments(segments: Segments | Tensor) -> Segments:
    """A `cu_seqlens` tensor becomes its tables; ready tables pass through."""
    return segments if isinstance(segments, Segments) else Segments.from_cu_seqlens(segments)


def check_tokens(name: str, key: str, tensor: Tensor, segments: Segments) -> None:
    """ConfigError unless the first dimension of `tensor` is the number of packed tokens."""
    if tensor.shape[0] != segments.tokens:
        raise ConfigError(f"{name}: {key} has {tensor.shape[0]} tokens, but cu_seqlens ends at {segments.tokens}")


def segment_sum(values: Tensor, segments: Segments) -> Tensor:
    """Reference: sum rows of `values` (T, ...) over each example -> (E, ...), in its own dtype."""
    cu = segments.cu_seqlens.tolist()
    return torch.stack([values[a:b].sum(0) for a, b in pairwise(cu)])
