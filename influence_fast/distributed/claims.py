"""Work shared out by files in a folder: any process may join, leave or die, and nothing else has to know of it.

A claim is a file that names its owner, who renews it by moving its time stamp while it lives and gets on. It saves
work and guards no data: two owners of one piece write the same bytes, each whole, so the worst that a lost race costs
is time.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from pathlib import Path

from influence_fast.errors import ConfigError

LEASE = 60.0  # seconds without a renewal after which a claim counts as lost
_RENEWALS = 12  # in a lease: a live process would have to miss them all
_LONGEST_PAUSE = 10.0  # seconds between two renewals
_LONGEST_LEASE = 7 * 24 * 3600.0
_NEVER = 10**9  # time stamp, in nanoseconds since the epoch, of a claim that was not renewed yet
_TOLD_AFTER = 5.0  # seconds of waiting after which it is said for whom

_State = tuple[bytes, int]  # what a claim's file holds, and its time stamp


@dataclass(frozen=True)
class Owner:
    """A process: `started` (seconds since the epoch) tells it from a later one with the same number."""

    rank: int
    host: str
    pid: int
    started: float

    @classmethod
    def here(cls, rank: int) -> Owner:
        """Return the claimant that this process is."""
        import psutil

        return cls(rank, _host(), os.getpid(), psutil.Process().create_time())

    def is_dead(self) -> bool:
        """Return whether the process has certainly ended; of another host's nobody can tell."""
        import psutil

        if self.host != _host():
            return False
        try:
            process = psutil.Process(self.pid)
            return process.create_time() != self.started or process.status() == psutil.STATUS_ZOMBIE
        except (psutil.NoSuchProcess, ValueError, OverflowError):  # or a number that no process can have
            return True
        except psutil.AccessDenied:
            return False

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.pid} on {self.host.partition('/')[0]})"


@dataclass(frozen=True)
class TakenOver:
    """A claim that was taken from its owner, and why: "it ended", or "not renewed in 60 s"."""

    name: str
    owner: Owner | None
    why: str

    def __str__(self) -> str:
        return f"{self.name} of {self.owner or 'an unknown process'}: {self.why}"


class Claims:
    """The claims in `folder`, as `owner` sees them.

    Args:
        lease: seconds without a renewal after which a claim of another process is given up for lost, and a quarter of
            it where the claim was never renewed: its owner renews it as soon as it has it. They are counted by the
            clock of the process that watches, so clocks of different hosts need not agree.
        hang_limit: seconds without `heartbeat` after which this process renews its own claims no more.
        clock: seconds that only grow.

    Raises ConfigError for a lease that is no time.
    """

    def __init__(
        self,
        folder: Path,
        owner: Owner,
        lease: float = LEASE,
        *,
        hang_limit: float = math.inf,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        check_lease(lease)
        self.folder = folder
        self.owner = owner
        self.lease = lease
        self.hang_limit = hang_limit
        self.lost: list[TakenOver] = []  # claims of others that this process has taken over
        self._clock = clock
        self._every = min(lease / _RENEWALS, _LONGEST_PAUSE)
        about = {**asdict(owner), "every": self._every, "nonce": secrets.token_hex(8)}
        self._mine = json.dumps(about).encode()
        self._seen: dict[str, tuple[_State, float]] = {}
        self._progressed = clock()

    def take(self, name: str) -> bool:
        """Return whether the piece `name` is now this process's: it was free, or its owner is lost."""
        if self._create(name):
            return True
        lost = self._lost(name)
        if lost is None or not self._create(name):
            return False
        self.lost.append(lost)
        return True

    def holds(self, name: str) -> bool:
        """Return whether the claim is still this process's: one that was slow may have lost it."""
        return self._read(name) == self._mine

    def heartbeat(self) -> None:
        """Record that the work gets on; cheap enough to be called for every batch."""
        self._progressed = self._clock()

    def renew(self, name: str) -> None:
        """Update the claim's time stamp, unless it was lost or nothing got on for `hang_limit` seconds."""
        if self._clock() - self._progressed <= self.hang_limit and self.holds(name):
            with contextlib.suppress(OSError):
                os.utime(self._path(name))

    @contextlib.contextmanager
    def renewing(self, name: str) -> Iterator[None]:
        """Keep a claim that was taken renewed, at once and then by a thread, and release it at the end."""
        ended = threading.Event()

        def run() -> None:
            while not ended.wait(self._every):
                self.renew(name)

        self.heartbeat()
        self.renew(name)
        thread = threading.Thread(target=run, daemon=True, name="influence-fast lease")
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            self.release(name)

    def release(self, name: str) -> None:
        """Remove the claim if it is still this process's."""
        if self.holds(name):
            self._path(name).unlink(missing_ok=True)

    def sweep(self) -> None:
        """Remove every claim, for when all the work is done."""
        for left_over in self.folder.glob(".claim-*"):
            left_over.unlink(missing_ok=True)

    def waiting_for(self, name: str) -> str | None:
        """Return whom the last `take` of `name` waits for and until when, or None where it is free."""
        if name not in self._seen:
            return None
        state, since = self._seen[name]
        seconds = max(0.0, self._patience(state) - (self._clock() - since))
        until = datetime.now() + timedelta(seconds=seconds)
        return (
            f"{_owner(state[0]) or 'an unknown process'}: taken over at {until:%H:%M:%S}, in {seconds:.0f} s, unless "
            f"renewed before; --lease sets that time, and deleting {self._path(name)} ends it at once"
        )

    def _patience(self, state: _State) -> float:
        """Return the seconds for which a claim may stay as it is before it is given up for lost."""
        content, stamp = state
        if stamp == _NEVER or _owner(content) is None:
            return self.lease / 4
        # One that was told a longer lease than this process may renew less often.
        return max(self.lease, 3 * _renewed_every(content))

    def _path(self, name: str) -> Path:
        return self.folder / f".claim-{name}"

    def _read(self, name: str) -> bytes | None:
        try:
            return self._path(name).read_bytes()
        except FileNotFoundError:
            return None

    def _create(self, name: str) -> bool:
        """Write the claim with its content, or leave the one that is there."""
        path = self._path(name)
        if path.exists():
            return False
        temporary = self.folder / f".claim-{secrets.token_hex(8)}.tmp"
        try:
            temporary.write_bytes(self._mine)
            _mark_never_renewed(temporary)
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
            _mark_never_renewed(path)
            return True
        except FileExistsError:
            return False

    def _lost(self, name: str) -> TakenOver | None:
        """Remove the claim if its owner is dead or has not renewed it for the lease."""
        path = self._path(name)
        try:
            state = (path.read_bytes(), path.stat().st_mtime_ns)
        except FileNotFoundError:
            self._seen.pop(name, None)
            return None
        owner = _owner(state[0])
        now = self._clock()
        last, since = self._seen.get(name, (None, now))
        if last != state:
            since = now
        self._seen[name] = (state, since)
        if owner is not None and owner.is_dead():
            why = "it ended"
        elif now - since > self._patience(state):
            why = f"{'never renewed' if state[1] == _NEVER else 'not renewed'} in {self._patience(state):g} s"
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


class WaitNotice:
    """Says once, on stderr, for whom a process waits: after `_TOLD_AFTER` seconds in which it got nothing to do."""

    def __init__(self, claims: Claims, clock: Callable[[], float] = time.monotonic) -> None:
        self._claims, self._clock = claims, clock
        self.over()

    def over(self) -> None:
        """Record that there is work again, so that the next wait is logged anew."""
        self._since: float | None = None
        self._said = False

    def waiting(self, pieces: Iterable[tuple[str, str]]) -> None:
        """Record that nothing could be taken of `pieces`: (name of the claim, what it is in words)."""
        now = self._clock()
        self._since = now if self._since is None else self._since
        if self._said or now - self._since < _TOLD_AFTER:
            return
        told = [(what, text) for name, what in pieces if (text := self._claims.waiting_for(name)) is not None]
        if told:
            self._said = True
            what, text = told[0]
            more = f" and {len(told) - 1} more" if len(told) > 1 else ""
            print(f"rank {self._claims.owner.rank} waits for {what}{more} of {text}", file=sys.stderr, flush=True)


def _mark_never_renewed(path: Path) -> None:
    with contextlib.suppress(OSError):
        os.utime(path, ns=(_NEVER, _NEVER))


def check_lease(lease: float) -> None:
    """Raise ConfigError unless `lease` is a time in seconds."""
    if not 0 < lease <= _LONGEST_LEASE:
        raise ConfigError(f"lease (--lease) must be a number of seconds above 0 and at most a week, not {lease}")


def _renewed_every(content: bytes) -> float:
    """Return the seconds between two renewals, as the owner of a claim states them; 0 where it does not."""
    try:
        every = float(json.loads(content)["every"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return 0.0
    return every if 0 < every <= _LONGEST_PAUSE else 0.0


def _owner(content: bytes) -> Owner | None:
    try:
        values = json.loads(content)
        return Owner(int(values["rank"]), str(values["host"]), int(values["pid"]), float(values["started"]))
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None


def _host() -> str:
    """Return the host's name and, where there is one, its process namespace: containers may share a name."""
    try:
        return f"{socket.gethostname()}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()
