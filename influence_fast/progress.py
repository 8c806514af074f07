"""Progress bars on stderr: what a command prints is its result."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

T = TypeVar("T")


def track(items: Iterable[T], what: str, *, shown: bool, total: int | None = None) -> Iterable[T]:
    """`items`, with a bar called `what` where it is `shown`; `total` where they have no length."""
    if not shown:
        return items
    from rich.console import Console
    from rich.progress import track

    return track(items, what, total=total, console=Console(stderr=True), transient=True)


def bar(what: str, *columns: Any) -> Any:
    """A `rich.progress.Progress` called `what`: how many are done of how many, then `columns`, then the time left."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    shown = (TextColumn(what), BarColumn(), MofNCompleteColumn(), *columns, TimeRemainingColumn())
    return Progress(*shown, console=Console(stderr=True))
