"""The processes of one build: which of them this is, how it is stopped or given up, and what only one of them does."""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from influence_fast.distributed.claims import LEASE, Claims, Owner, WaitNotice
from influence_fast.errors import ConfigError

TIME_LIMIT = 600.0  # seconds without a finished batch after which a process counts as hung
EXIT_HUNG = 75  # a process that hangs ends itself with this code
T = TypeVar("T")
_STDERR = 2  # the file descriptor, for stack traces that cannot wait for Python
_LONGEST_WAIT = 1.0  # seconds between two looks at what others do


class Preempted(KeyboardInterrupt):
    """Stopped by SIGTERM, as spot machines and schedulers do; what was finished is kept."""

    exit_code = 128 + signal.SIGTERM


@dataclass(frozen=True)
class World:
    """This process's number among all, and among those of its host (which is that of its card)."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> World:
        """Read the world from RANK, WORLD_SIZE and LOCAL_RANK (torchrun, accelerate), else from SLURM's variables.

        Those of a job array come before those of srun.

        Raises ConfigError: values that are no numbers, or do not fit together.
        """
        env = os.environ if environment is None else environment
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        first = 0
        if "RANK" not in env and _number(env, "SLURM_ARRAY_TASK_COUNT", 1) > 1:
            names = ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT", "SLURM_LOCALID")
            first = _number(env, "SLURM_ARRAY_TASK_MIN", 0)
        elif "RANK" not in env and "SLURM_STEP_ID" in env:
            names = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")
        rank, size, local = (_number(env, name, default) for name, default in zip(names, (first, 1, 0), strict=True))
        rank -= first
        if names[0] == "SLURM_ARRAY_TASK_ID":
            size = max(size, rank + 1)  # numbers of an array may have gaps
        if not 0 <= rank < size or local < 0:
            raise ConfigError(
                f"{names[0]}={rank}, {names[1]}={size}, {names[2]}={local} do not fit together: "
                "start all processes by one launcher"
            )
        return cls(rank, size, local)


class Signals:
    """SIGTERM asks to stop at the end of the batch; a second one stops at once, as does the first with `at_once`."""

    def __init__(self, *, at_once: bool = False) -> None:
        self.stopping = False
        self._at_once = at_once
        self._before: Any = None

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._handle)
        return self

    def __exit__(self, *exc_info: Any) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _handle(self, number: int, frame: Any) -> None:
        if self.stopping or self._at_once:
            raise Preempted
        self.stopping = True

    def check(self) -> None:
        if self.stopping:
            raise Preempted


class Watch:
    """Ends this process, with its name and a stack trace, when a batch takes longer than the time limit.

    Alone it does nothing: a person watches a single process. A thread of ours says who hangs; where it cannot run
    (native code that holds the interpreter), the one that Python itself has for this follows a little later.
    """

    _GRACE = 10.0

    def __init__(self, world: World, time_limit: float) -> None:
        if not time_limit > 0:
            raise ConfigError(f"time_limit must be a number of seconds above 0, not {time_limit}")
        self.world = world
        self.time_limit = time_limit
        self._what: str | None = None
        self._last = time.monotonic()
        self._armed = 0.0
        self._closed = threading.Event()

    def __enter__(self) -> Watch:
        if self.world.size > 1:
            threading.Thread(target=self._run, daemon=True, name="influence-fast watch").start()
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self.stop()
        self._closed.set()

    def start(self, what: str) -> None:
        self._last = time.monotonic()
        self._what = what
        self._arm()

    def heartbeat(self) -> None:
        self._last = time.monotonic()
        if self._last - self._armed > 1.0:
            self._arm()

    def stop(self) -> None:
        self._what = None
        if self.world.size > 1:
            faulthandler.cancel_dump_traceback_later()

    def _arm(self) -> None:
        if self.world.size > 1 and self._what is not None:
            self._armed = time.monotonic()
            faulthandler.dump_traceback_later(self.time_limit + self._GRACE, exit=True, file=_STDERR)

    def _run(self) -> None:
        while not self._closed.wait(min(1.0, self.time_limit / 4)):
            what = self._what
            if what is not None and time.monotonic() - self._last > self.time_limit:
                print(
                    f"rank {self.world.rank} hangs in {what}: no batch finished for {self.time_limit:.0f} s; it ends "
                    "here, and the others take its work over",
                    file=sys.stderr,
                    flush=True,
                )
                faulthandler.dump_traceback(file=_STDERR)
                os._exit(EXIT_HUNG)


def once(
    folder: Path,
    world: World,
    done: Callable[[], bool],
    work: Callable[[Callable[[], None]], None],
    time_limit: float = TIME_LIMIT,
    lease: float = LEASE,
) -> None:
    """Run `work(heartbeat)` in one process for all that share `folder`; the others wait until `done()`.

    `heartbeat` is to be called as the work gets on; where it has not been for `time_limit` seconds, the claim is
    renewed no more, and `lease` seconds later another takes over. Who waits longer than five seconds says for whom.

    Raises Preempted at SIGTERM, with the claim given back: one left behind would hold up other hosts for `lease`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    claims = Claims(folder, Owner.here(world.rank), lease, hang_limit=time_limit)
    notice = WaitNotice(claims)
    with Signals(at_once=True):  # the work is whole or not done: there is no batch to finish for
        for pause in pauses():
            if done():
                return
            if claims.take("once"):
                with claims.renewing("once"):
                    if not done():
                        work(claims.heartbeat)
                    return
            notice.waiting([("once", f"what is made in {folder}")])
            time.sleep(pause)


def init_group(world: World, ranks: int, device: str) -> tuple[Any, Any]:
    """Return (mesh, process group) of the `ranks` neighbouring processes that hold one copy of a model together.

    Starts `torch.distributed` (gloo on CPUs, NCCL on GPUs) under the launcher's rendezvous. A group waits for
    its turn as long as it takes; a process that hangs is `build_distributed`'s affair.

    Raises ConfigError: the processes cannot be divided into groups of `ranks`.
    """
    if ranks < 1 or world.size % ranks:
        raise ConfigError(f"{world.size} processes cannot be divided into groups of {ranks}; start a multiple of it")
    from datetime import timedelta

    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    if device == "cuda":
        torch.cuda.set_device(world.local_rank)
    dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=timedelta(days=1))
    mesh = init_device_mesh(device, (world.size // ranks, ranks), mesh_dim_names=("copy", "shard"))["shard"]
    return mesh, mesh.get_group()


def close_group() -> None:
    """End `torch.distributed` in all processes together: none leaves while another may still talk to it."""
    import torch.distributed as dist

    dist.barrier()
    dist.destroy_process_group()


def retried(work: Callable[[], T], attempts: int = 5, first_pause: float = 2.0) -> T:
    """Run `work()`, again after 2, 4, 8, ... seconds while it fails for a passing reason: hub or network."""
    for attempt in range(attempts - 1):
        try:
            return work()
        except Exception as error:
            if not _passes(error):
                raise
            pause = first_pause * 2**attempt
            print(f"{error}: trying again in {pause:.0f} s", file=sys.stderr, flush=True)
            time.sleep(pause)
    return work()


def _passes(error: BaseException) -> bool:
    """Return whether the error, or one that led to it, is the network's or a busy server's."""
    seen: BaseException | None = error
    while seen is not None:
        status = getattr(getattr(seen, "response", None), "status_code", None)
        if status == 429 or (isinstance(status, int) and status >= 500):
            return True
        # of httpx: TransportError; "Offline" is a setting, which waiting does not change
        kinds = {kind.__name__ for kind in type(seen).__mro__}
        if kinds & {"ConnectionError", "TimeoutError", "TransportError"} and "OfflineModeIsEnabled" not in kinds:
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def _number(environment: Mapping[str, str], name: str, default: int) -> int:
    text = environment.get(name, str(default))
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"the environment variable {name} is {text!r}; it must be a whole number") from None


def largest(value: int, group: Any) -> int:
    """Return the largest of the values that the group's processes (None: all) give."""
    import torch
    import torch.distributed as dist

    device = "cuda" if dist.get_backend(group) == "nccl" else "cpu"
    number = torch.tensor(value, dtype=torch.int64, device=device)
    dist.all_reduce(number, dist.ReduceOp.MAX, group=group)
    return int(number)


def rank_in(group: Any) -> int:
    import torch.distributed as dist

    return dist.get_rank(group)


def pauses() -> Iterator[float]:
    pause = 0.01
    while True:
        yield pause
        pause = min(2 * pause, _LONGEST_WAIT)
