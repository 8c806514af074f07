"""Work shared out by files in a folder: any process may join, leave or die, and nothing else has to know of it.

A claim is a file that names its owner and whose time stamp moves as the owner gets on. It saves work and guards no
data: two owners of one piece write the same bytes, each whole, so the worst that a lost race costs is time.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import time
from dataclasses import asdict, dataclass
from pathlib import Path

_BEAT_EVERY = 1.0  # seconds between two moves of a claim's time stamp


@dataclass(frozen=True)
class Owner:
    """A process: `started` (seconds since the epoch) tells it from a later one with the same number."""

    rank: int
    host: str
    pid: int
    started: float

    @classmethod
    def here(cls, rank: int) -> Owner:
        """This process."""
        import psutil

        return cls(rank, _host(), os.getpid(), psutil.Process().create_time())

    def is_dead(self) -> bool:
        """Whether it has certainly ended; on another host nobody can tell."""
        import psutil

        if self.host != _host():
            return False
        try:
            process = psutil.Process(self.pid)
            return process.create_time() != self.started or process.status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True
        except psutil.AccessDenied:
            return False

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.pid} on {self.host.partition('/')[0]})"


@dataclass(frozen=True)
class TakenOver:
    """A claim that was taken from its owner, and why: "it ended", or "no progress for 600 s"."""

    name: str
    owner: Owner | None
    why: str

    def __str__(self) -> str:
        return f"{self.name} of {self.owner or 'an unknown process'}: {self.why}"


class Claims:
    """The claims in `folder`, as `owner` sees them.

    time_limit: seconds without a sign of progress after which a claim is given up for lost. They are counted by
    the clock of the process that watches, so clocks of different hosts need not agree.
    """

    def __init__(self, folder: Path, owner: Owner, time_limit: float) -> None:
        self.folder = folder
        self.owner = owner
        self.time_limit = time_limit
        self.lost: list[TakenOver] = []  # claims of others that this process has taken over
        self._mine = json.dumps(asdict(owner) | {"nonce": secrets.token_hex(8)}).encode()
        self._seen: dict[str, tuple[tuple[bytes, int], float]] = {}
        self._beaten = 0.0

    def take(self, name: str) -> bool:
        """Whether the piece `name` is now this process's: it was free, or its owner is lost."""
        if self._create(name):
            return True
        lost = self._lost(name)
        if lost is None or not self._create(name):
            return False
        self.lost.append(lost)
        return True

    def holds(self, name: str) -> bool:
        """Whether the claim is still this process's: one that was slow may have lost it."""
        return self._read(name) == self._mine

    def beat(self, name: str) -> None:
        """Shows that the work on `name` gets on; cheap enough to be called for every batch."""
        now = time.monotonic()
        if now - self._beaten >= _BEAT_EVERY and self.holds(name):
            self._beaten = now
            with contextlib.suppress(OSError):
                os.utime(self._path(name))

    def release(self, name: str) -> None:
        if self.holds(name):
            self._path(name).unlink(missing_ok=True)

    def sweep(self) -> None:
        """Removes every claim, for when all the work is done."""
        for left_over in self.folder.glob(".claim-*"):
            left_over.unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        return self.folder / f".claim-{name}"

    def _read(self, name: str) -> bytes | None:
        try:
            return self._path(name).read_bytes()
        except FileNotFoundError:
            return None

    def _create(self, name: str) -> bool:
        """Makes the claim with its content, or leaves the one that is there."""
        path = self._path(name)
        if path.exists():
            return False
        temporary = self.folder / f".claim-{secrets.token_hex(8)}.tmp"
        try:
            temporary.write_bytes(self._mine)
            return self._link(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    def _link(self, temporary: Path, path: Path) -> bool:
        try:
            os.link(temporary, path)
            return True
        except FileExistsError:
            return False
        except OSError:  # a file system without hard links
            return self._create_exclusively(path)

    def _create_exclusively(self, path: Path) -> bool:
        try:
            with path.open("xb") as handle:
                handle.write(self._mine)
            return True
        except FileExistsError:
            return False

    def _lost(self, name: str) -> TakenOver | None:
        """Removes the claim if its owner is dead or has shown no progress for the time limit."""
        path = self._path(name)
        try:
            state = (path.read_bytes(), path.stat().st_mtime_ns)
        except FileNotFoundError:
            return None
        owner = _owner(state[0])
        now = time.monotonic()
        last, since = self._seen.get(name, (None, now))
        if last != state:
            since = now
        self._seen[name] = (state, since)
        if owner is not None and owner.is_dead():
            why = "it ended"
        elif now - since > self.time_limit:
            why = f"no progress for {self.time_limit:.0f} s"
        else:
            return None
        aside = self.folder / f".claim-{secrets.token_hex(8)}.tmp"
        try:
            os.rename(path, aside)  # of several that try, one succeeds
        except FileNotFoundError:
            return None
        try:
            if aside.read_bytes() != state[0]:  # another was faster, and this is its own new claim
                with contextlib.suppress(OSError):
                    os.link(aside, path)
                return None
        finally:
            aside.unlink(missing_ok=True)
        return TakenOver(name, owner, why)


def _owner(content: bytes) -> Owner | None:
    try:
        values = json.loads(content)
        return Owner(int(values["rank"]), str(values["host"]), int(values["pid"]), float(values["started"]))
    except (ValueError, KeyError, TypeError):
        return None


def _host() -> str:
    """The host's name and, where there is such a thing, its process namespace: containers may share a name."""
    try:
        return f"{socket.gethostname()}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()
