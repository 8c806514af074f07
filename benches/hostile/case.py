"""One hostile input, and what becomes of it."""

from __future__ import annotations

import os
import resource
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from influence_fast.errors import InfluenceFastError

LIMIT = 5  # seconds that an input may take
MEMORY = 2 << 30  # bytes that a process may hold
TOLD = ("result", "told")  # the outcomes that are right


@dataclass(frozen=True)
class Case:
    """`make(folder)` writes the input into an empty folder and returns the call that reads it."""

    name: str
    make: Callable[[Path], Callable[[], Any]]


@dataclass(frozen=True)
class Outcome:
    """`kind`: "result" or "told" where all is well, else what is not."""

    kind: str
    text: str
    seconds: float
    resident: int = 0

    @property
    def held(self) -> bool:
        return self.kind in TOLD and self.seconds < LIMIT and self.resident < MEMORY


class Overrun(BaseException):
    """Raised by the alarm; no loader catches it."""


def _overrun(number: int, frame: FrameType | None) -> None:
    raise Overrun


@contextmanager
def alarm(seconds: float) -> Iterator[None]:
    before = signal.signal(signal.SIGALRM, _overrun)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def tried(case: Case, folder: Path) -> Outcome:
    """Run one case in this process, in the empty `folder`."""
    call = case.make(folder)
    start = time.perf_counter()
    try:
        with alarm(LIMIT):
            call()
        kind, text = "result", ""
    except InfluenceFastError as error:
        text = str(error)
        kind = "told" if text.isprintable() and text.strip() and len(text) < 4000 else "not one line"
    except Overrun:
        kind, text = "hung", ""
    except BaseException as error:  # tokenizers raise panics that are no Exception
        kind, text = "raised", f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return Outcome(kind, text, time.perf_counter() - start)


def tried_apart(case: Case) -> Outcome:
    """Run one case in a process of its own, whose memory and time are limited."""
    with tempfile.TemporaryDirectory() as name:
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            _report(case, Path(name), writing)
        os.close(writing)
        return _outcome(child, reading)


def _report(case: Case, folder: Path, writing: int) -> None:
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + 2 * MEMORY, mapped + 2 * MEMORY))
    try:
        found = tried(case, folder)
    except BaseException as error:
        found = Outcome("broken case", f"{type(error).__name__}: {error}", 0.0)
    os.write(writing, f"{found.kind}\0{found.text[:4000]}\0{found.seconds}".encode("utf-8", "replace"))
    os._exit(0)


def _outcome(child: int, reading: int) -> Outcome:
    end = time.monotonic() + 3 * LIMIT
    while True:
        done, status, usage = os.wait4(child, os.WNOHANG)
        if done:
            break
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
            os.wait4(child, 0)
            os.close(reading)
            return Outcome("hung", "in native code", 3.0 * LIMIT)
        time.sleep(0.002)
    with os.fdopen(reading, "rb") as file:
        parts = file.read().decode("utf-8", "replace").split("\0")
    if len(parts) != 3:
        return Outcome("died", f"status {status}", 0.0, usage.ru_maxrss << 10)
    return Outcome(parts[0], parts[1], float(parts[2]), usage.ru_maxrss << 10)
