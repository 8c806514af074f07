"""Inner products of int8 and bf16 rows by the mma kernel of csrc/cuda, with the names and arguments of `pytorch`.

Rows that lie on the GPU go to cuBLAS where Triton is there (`gpu`, which says when they come here all the same).

Rows may lie on the device, or be numpy arrays (memory-mapped shards), which are streamed through two pinned buffers.
Products, cosines, group sums and the search for NaN are one kernel; the sort of whole columns for ranks and that of a
chunk's scores for the top k are PyTorch's, which are hard to beat. fp32 rows have no tensor-core product that keeps
their precision: they go through `pytorch` on the device.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from influence_fast.products import native, pytorch
from influence_fast.products.blocks import Block, Wanted
from influence_fast.products.pytorch import TopK, rank
from influence_fast.products.terms import Terms

__all__ = ["KINDS", "Queries", "TopK", "finish", "rank", "score"]

KINDS = ("bfloat16", "int8")
_SCRATCH_BYTES = 1 << 26  # of scores held for the top k, or on their way to the host
_PINNED_BYTES = 1 << 25  # of each of the two buffers


class Queries:
    """Queries as the kernel takes them: one or two terms of the rows' dtype, q = sum_t factor[t] terms[t].

    values: [Q, k] fp32 on the device. rows: "bfloat16" or "int8". high: a second term holds what the first rounded
    away. isa and threads are not used.
    """

    def __init__(self, values: Tensor, rows: str, high: bool = False, isa: str = "", threads: int = 1) -> None:
        made = Terms(values, rows, high)
        self.rows, self.count, self.width, self.device = rows, made.count, made.width, values.device
        self.terms, self.factor, self.cosine = made.terms, made.factor, made.cosine
        self.flags: list[tuple[int, Tensor]] = []  # (first row, int32 [n]: 1 where a score is not finite)
        self._stream: Any = None
        self._lists: tuple[Any, Any, Tensor, Tensor] | None = None

    def packed(self, normalize: bool) -> Any:
        factor = self.cosine if normalize else self.factor
        return _native().CudaQueries(
            self.terms.data_ptr(),
            factor.data_ptr(),
            self.terms.shape[0],
            self.count,
            self.width,
            self.terms.stride(1) * self.terms.element_size(),
            self.rows == "int8",
        )

    def stream(self, rows: int) -> Any:
        """The pinned buffers, made for the first block."""
        if self._stream is None:
            row_bytes = self.width * self.terms.element_size()
            chunk = _native().cuda_chunk_rows(rows, row_bytes, _PINNED_BYTES)
            self._stream = _native().CudaStream(_index(self.device), chunk, row_bytes)
        return self._stream

    def close(self) -> None:
        """Waits for what is queued and frees the buffers."""
        if self._stream is not None:
            self._stream.finish()
            self._stream = None

    def tile_lists(self, begin: Any, query: Any) -> tuple[Tensor, Tensor]:
        """Members of each group in each tile of queries, on the device; made once for the same lists."""
        if self._lists is None or self._lists[0] is not begin or self._lists[1] is not query:
            first, column = _native().cuda_tile_groups(begin, query, self.count)
            column = column if column.size else np.zeros(1, np.int32)  # an address even where no member is left
            self._lists = (begin, query, *(torch.from_numpy(a).to(self.device) for a in (first, column)))
        return self._lists[2], self._lists[3]


def score(queries: Queries, block: Block, wanted: Wanted) -> list[int]:
    """Queue the work of a block on PyTorch's current stream; see `csrc/cuda/score.h`.

    Rows with a NaN or infinite score are named by `finish`, so that no block waits for the one before: the list
    returned here is empty. rows, scales and scores may be numpy arrays or tensors of the device; columns and
    group_sums are of the device.
    """
    n = block.rows.shape[0]
    flags = torch.zeros(n, dtype=torch.int32, device=queries.device)
    queries.flags.append((block.start, flags))
    if n == 0 or queries.count == 0:
        return []
    row_factor = torch.empty(n if wanted.normalize else 0, dtype=torch.float32, device=queries.device)
    packed = queries.packed(wanted.normalize)
    out = pytorch.tensor(wanted.scores) if wanted.scores is not None else None
    direct = out is not None and out.device == queries.device and (out.stride(1) == 1 or queries.count == 1)
    held = wanted.topk is not None or (out is not None and not direct)
    slab = max(1, _SCRATCH_BYTES // (4 * queries.count)) if held else n
    scratch = torch.empty((min(slab, n), queries.count), dtype=torch.float32, device=queries.device) if held else None
    for first in range(0, n, slab):
        last = min(n, first + slab)
        target = scratch if held else out[first:last] if out is not None else None
        part = block.part(first, last)
        addresses = _addresses(queries, part, wanted.part(first, last), target)
        addresses |= {"bad": flags[first:].data_ptr(), "normalize": wanted.normalize}
        if wanted.normalize:
            addresses["row_factor"] = row_factor[first:].data_ptr()
        _queue(queries, packed, part, _native().CudaOutputs(**addresses), n, wanted.threads)
        if scratch is not None:
            finished = scratch[: last - first]
            if out is not None:
                out[first:last] = finished
            if wanted.topk is not None:
                wanted.topk.offer(part.start, finished)
    return []


def _addresses(queries: Queries, block: Block, wanted: Wanted, scores: Tensor | None) -> dict[str, Any]:
    """Return the results that the kernel writes itself, as `Outputs` of csrc/cuda/score.h names them."""
    found: dict[str, Any] = {}
    if scores is not None:
        found |= {"scores": scores.data_ptr(), "scores_stride": scores.stride(0)}
    if wanted.columns is not None:
        columns = wanted.columns
        found |= {"columns": columns[:, block.start :].data_ptr(), "columns_stride": columns.stride(0)}
    if wanted.group_sums is not None:
        begin, column = queries.tile_lists(wanted.group_begin, wanted.group_query)
        sums = wanted.group_sums
        found |= {"group_sums": sums.data_ptr(), "group_stride": sums.stride(0), "groups": sums.shape[1]}
        found |= {"group_begin": begin.data_ptr(), "group_column": column.data_ptr()}
    return found


def finish(queries: Queries) -> list[int]:
    """Waits for all blocks; the rows with a NaN or infinite score, in order."""
    queries.close()
    bad: list[int] = []
    for start, flags in queries.flags:
        bad += (start + torch.nonzero(flags)[:, 0]).tolist()
    queries.flags.clear()
    return bad


def _queue(queries: Queries, packed: Any, part: Block, out: Any, block: int, threads: int) -> None:
    """Queue a part of a block of `block` rows, from wherever its rows lie."""
    stream = torch.cuda.current_stream(queries.device).cuda_stream
    rows, scales = part.rows, part.scales
    if isinstance(rows, Tensor):
        by_row = None if scales is None else pytorch.tensor(scales).to(queries.device)
        size, stride = rows.element_size(), rows.stride(0) * rows.element_size()
        where = 0 if by_row is None else by_row.data_ptr()
        if rows.shape[1] > 1 and rows.stride(1) != 1:
            rows, stride = rows.contiguous(), rows.shape[1] * size
        _native().cuda_score(_index(queries.device), packed, rows.data_ptr(), rows.shape[0], stride, where, out, stream)
    else:
        scales = scales.cpu().numpy() if isinstance(scales, Tensor) else scales
        queries.stream(block).push(packed, rows, scales, out, threads, stream)


def _native() -> Any:
    return native.load()[0]


def _index(device: torch.device) -> int:
    return device.index if device.index is not None else torch.cuda.current_device()
