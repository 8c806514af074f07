"""Copy between the host and a GPU so that nothing waits inside a batch.

    to_device     small tables and token ids go through pinned memory, behind the work that is already queued
    all_to_device several of them in one copy, end to end (`joined`) and taken apart again (`parted`)
    WriteBehind   rows come back on a stream of their own while the next pack is computed

On the CPU nothing is copied, and all pass things through.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

# Bytes. Triton compiles another variant for pointers that are not a multiple of it.
_ALIGNED = 16


def to_device(tensor: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Return `tensor.to(device, dtype)`, copied from the host to a GPU without waiting for the GPU."""
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device, dtype)
    return tensor.to(dtype=dtype).pin_memory().to(device, non_blocking=True)


def all_to_device(tensors: Sequence[Tensor], device: torch.device) -> Sequence[Tensor]:
    """Return host tensors on `device`, brought there in one copy as by `to_device`; on the CPU themselves."""
    return tensors if device.type == "cpu" else parted(to_device(joined(tensors), device), tensors)


def joined(tensors: Sequence[Tensor]) -> Tensor:
    """Return host tensors concatenated as bytes [n] uint8, each starting at a multiple of 16 bytes."""
    parts = []
    for tensor in tensors:
        flat = tensor.contiguous().view(-1).view(torch.uint8)
        parts += [flat, flat.new_zeros(-len(flat) % _ALIGNED)]
    return torch.cat(parts)


def parted(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Return views into `flat`, the result of `joined` on any device, with the shapes and dtypes of `like`."""
    found, first = [], 0
    for tensor in like:
        found.append(flat[first : first + tensor.nbytes].view(tensor.dtype).view(tensor.shape))
        first += tensor.nbytes + -tensor.nbytes % _ALIGNED
    return found


class Copier(Protocol):
    """Start copies to the host."""

    def start(self, tensors: Sequence[Tensor]) -> tuple[list[Tensor], Callable[[], Any]]:
        """Return the copies, and a function that waits for them: their numbers are valid once it has returned."""
        ...


class CudaCopier:
    """Copies to pinned memory on a side stream, behind what the current stream has queued by then."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)

    def start(self, tensors: Sequence[Tensor]) -> tuple[list[Tensor], Callable[[], Any]]:
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            copies = [_to_pinned(tensor, self.stream) for tensor in tensors]
            # blocking: the host sleeps while it waits, and leaves its core to the writer of the store
            done = torch.cuda.Event(blocking=True)
            done.record(self.stream)
        return copies, done.synchronize


def _to_pinned(tensor: Tensor, stream: Any) -> Tensor:
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    copy.copy_(tensor, non_blocking=True)
    # Otherwise its memory would be given to the next pack before it has been read.
    tensor.record_stream(stream)
    return copy


class WriteBehind:
    """Return what was pushed one push later, when the GPU already has the next pack to work on.

    On the CPU, or wherever no `Copier` is needed, a push is returned at once.
    """

    def __init__(self, device: torch.device) -> None:
        self._copier = copier_for(device)
        self._waiting: tuple[list[int], list[Tensor], Callable[[], Any]] | None = None

    @property
    def crosses(self) -> bool:
        """Return whether tensors are on a GPU and must be copied."""
        return self._copier is not None

    def push(self, key: list[int], tensors: Sequence[Tensor]) -> list[tuple[list[int], list[Tensor]]]:
        """Start to copy `tensors`, and return what is ready: (key, host tensors) of the previous push."""
        if self._copier is None:
            return [(key, [tensor.cpu() for tensor in tensors])]
        ready, self._waiting = self._waiting, (key, *self._copier.start(tensors))
        return _arrived(ready)

    def flush(self) -> list[tuple[list[int], list[Tensor]]]:
        """Return what is still being copied, once it has arrived."""
        ready, self._waiting = self._waiting, None
        return _arrived(ready)


def _arrived(
    sent: tuple[list[int], list[Tensor], Callable[[], Any]] | None,
) -> list[tuple[list[int], list[Tensor]]]:
    if sent is None:
        return []
    key, copies, wait = sent
    wait()
    return [(key, copies)]


def copier_for(device: torch.device) -> Copier | None:
    """Return a copier from this device to the host, None where the host can read its memory."""
    return CudaCopier(device) if device.type == "cuda" else None
