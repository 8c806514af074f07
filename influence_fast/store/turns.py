"""Which shards of a store a process computes, in which order, with a bar that shows how far it is."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from influence_fast.progress import bar
from influence_fast.store.writer import StoreWriter


class Turns(Protocol):
    """Which shards this process computes, in which order, and who hears of it."""

    def shards(self, writer: StoreWriter, sizes: Sequence[tuple[int, int]]) -> Generator[int]:
        """Yield the shards, one after the other; going on means that the last one is done.

        sizes: (examples, tokens or characters) of every shard of the store.
        """
        ...

    def owns(self, index: int) -> bool:
        """Return whether shard `index`, computed, is this process's to write."""
        ...

    def advance(self, lengths: Sequence[int]) -> None:
        """Count examples that are done, of so many tokens each (0: set aside). May raise KeyboardInterrupt to stop."""
        ...


class FixedTurns:
    """With part=(rank, world) the shards rank, rank + world, ... of those that are not done yet."""

    def __init__(self, part: tuple[int, int] = (0, 1), progress: bool | None = None) -> None:
        self.rank, self.world = part
        self.progress = progress
        self._bar: Callable[[int], None] = lambda count: None

    def shards(self, writer: StoreWriter, sizes: Sequence[tuple[int, int]]) -> Generator[int]:
        mine = [index for index in writer.pending() if index % self.world == self.rank]
        todo = sum(sizes[index][0] for index in mine)
        whole = sum(examples for examples, _ in sizes) if self.world == 1 else todo
        with _progress_bar(self.progress, todo, whole) as self._bar:
            for index in mine:
                if writer.is_done(index):  # by another process on the same folder
                    self._bar(sizes[index][0])
                else:
                    yield index

    def owns(self, index: int) -> bool:
        return True

    def advance(self, lengths: Sequence[int]) -> None:
        self._bar(len(lengths))


@contextmanager
def _progress_bar(wanted: bool | None, todo: int, examples: int) -> Iterator[Callable[[int], None]]:
    if not (sys.stderr.isatty() if wanted is None else wanted) or todo == 0:
        yield lambda count: None
        return
    from rich.progress import ProgressColumn
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Any) -> Text:
            return Text("" if task.speed is None else f"{task.speed:.1f} examples/s")

    with bar("gradients", Rate()) as shown:
        task = shown.add_task("gradients", total=examples, completed=examples - todo)
        yield lambda count: shown.advance(task, count)
