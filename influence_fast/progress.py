"""Progress bars and lines on stderr; stdout is for a command's result."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any, TypeVar

T = TypeVar("T")
TOLD_EVERY = 10.0  # seconds between two lines about work that has no bar


def track(items: Iterable[T], what: str, *, shown: bool, total: int | None = None) -> Iterable[T]:
    """Return `items`, with a progress bar named `what` if `shown`; give `total` where they have no length."""
    if not shown:
        return items
    from rich.console import Console
    from rich.progress import track

    return track(items, what, total=total, console=Console(stderr=True), transient=True)


def bar(what: str, *columns: Any) -> Any:
    """Return a `rich.progress.Progress` named `what`: count done of total, then `columns`, then the time left."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    shown = (TextColumn(what), BarColumn(), MofNCompleteColumn(), *columns, TimeRemainingColumn())
    return Progress(*shown, console=Console(stderr=True))


class Told:
    """Progress lines on stderr about long work, by a clock: `near-duplicates: 40,000 of 100,000 compared, 0:00:20`.

    No line is written before `TOLD_EVERY` seconds, so short work prints nothing. `clock` returns seconds.
    """

    def __init__(self, what: str, *, shown: bool = True, clock: Callable[[], float] = time.monotonic) -> None:
        self._what, self._shown, self._clock = what, shown, clock
        self._start = self._last = clock()

    def stage(self, done: str, total: int) -> Callable[[int], None]:
        """Return a function to be called with the number done of `total`; it prints a line when one is due."""

        def tell(count: int) -> None:
            now = self._clock()
            if self._shown and now - self._last >= TOLD_EVERY:
                self._last = now
                spent = timedelta(seconds=int(now - self._start))
                print(f"{self._what}: {count:,} of {total:,} {done}, {spent}", file=sys.stderr, flush=True)

        return tell
