"""One build on many processes, started by torchrun, accelerate launch, srun or a job array, on any number of hosts.

The processes share the store's folder and nothing else: each takes the heaviest shard that nobody has claimed
(`claims`), computes and writes it, and takes the next. So a slow one holds nobody up, one may die at any moment or
join late, and the store comes out bit for bit as from one process. Only a model sharded over several cards (FSDP2,
`sharded`) needs a process group; then the processes of a group work as one.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from influence_fast.building import build_shards, warn_of_set_aside
from influence_fast.claims import Claims, Owner
from influence_fast.eigen_sketch import EigenSketch
from influence_fast.errors import ConfigError
from influence_fast.fp8 import AUTO, check_precision
from influence_fast.metrics import Board, Meter, board, chrome_trace, example_flops, folder_of
from influence_fast.projection import Projection
from influence_fast.sharded import LockstepRows
from influence_fast.sketch_fitting import Find, Fit, Keep, kept
from influence_fast.sketch_fitting import fit_projection as fit_by_itself
from influence_fast.store import Store, open_store
from influence_fast.store_manifest import Manifest, file_name
from influence_fast.store_writer import StoreWriter

TIME_LIMIT = 600.0  # seconds without a finished batch after which a process counts as hung
EXIT_HUNG = 75  # a process that hangs ends itself with this code
T = TypeVar("T")
_FINALIZE = "finalize"
_STDERR = 2  # the file descriptor, for stack traces that cannot wait for Python
_LONGEST_WAIT = 1.0  # seconds between two looks for a free shard


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
        """From RANK, WORLD_SIZE and LOCAL_RANK (torchrun, accelerate), else a SLURM job array's, else srun's variables.

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


def build_distributed(
    path: str | Path,
    model: nn.Module,
    tokenizer: Any,
    dataset: Sequence[Any],
    *,
    world: World | None = None,
    group: Any = None,
    time_limit: float = TIME_LIMIT,
    progress: bool | None = None,
    metrics: bool = True,
    profile: bool = False,
    peak: float | None = None,
    **options: Any,
) -> Store:
    """`build_store` by every process that runs this with the same arguments, until the store in `path` is finished.

    Args:
        path: a folder that all processes see.
        world: by default what the launcher says (`World.from_environment`).
        group: for a model that `sharded.shard_model` has spread out, the process group it is spread over.
        time_limit: seconds without a finished batch after which a process is given up: it ends itself (exit code
            75, with a stack trace), and the others take over its shard and say so. Above the slowest batch.
        progress: one bar for all processes, shown by rank 0; by default when stderr is a terminal.
        metrics: JSON lines of each rank in `<path>.metrics` (see `metrics`).
        profile: a Chrome trace of each rank's first batches, in `<path>.metrics/trace-rank-00000.json`.
        peak: FLOP/s of one process's card, for the utilisation that the bar shows.
        options: as `build_store`: projection, dtype, loss_reduction, precision, shard_rows, ...

    Returns the finished store, in every process. Raises as `build_store`, and Preempted after SIGTERM: the batches
    of the shard in hand are kept too, and the same command goes on, with any number of processes.
    """
    check_precision(options.get("precision", AUTO), sharded=group is not None)
    world = World.from_environment() if world is None else world
    path = Path(path)
    folder = folder_of(path) if metrics or profile else None
    leads = group is None or _rank_in(group) == 0
    meter = Meter(folder if metrics and leads else None, world.rank, example_flops(model))
    trace = folder / f"trace-rank-{world.rank:05d}.json" if profile and folder is not None else None
    with _Signals() as signals, _Watch(world, time_limit) as watch, chrome_trace(trace) as traced:
        alone = ClaimedTurns(world, meter, signals, watch, progress=progress, peak=peak, after_batch=traced)
        turns: ClaimedTurns | LockstepTurns = alone
        if group is not None:
            turns = LockstepTurns(alone, group)
            options = {**options, "gradients": LockstepRows(group)}
        try:
            writer = build_shards(path, model, tokenizer, dataset, turns=turns, **options)
            store = turns.finish(writer, len(dataset))
        except KeyboardInterrupt:
            meter.write("stopped")
            raise
    meter.write("finished")
    return store


class ClaimedTurns:
    """Shards as they can be claimed, the heaviest first, until all are done; see `building.Turns`."""

    def __init__(
        self,
        world: World,
        meter: Meter,
        signals: _Signals,
        watch: _Watch,
        *,
        progress: bool | None = None,
        peak: float | None = None,
        after_batch: Callable[[], None] = lambda: None,
    ) -> None:
        self.world = world
        self.meter = meter
        self.signals = signals
        self.watch = watch
        self._progress = progress if world.rank == 0 else False
        self._peak = peak
        self._after_batch = after_batch
        self._claims: Claims | None = None
        self._name = ""
        self._board: Board | None = None
        self._said = 0

    def shards(self, writer: StoreWriter, sizes: Sequence[tuple[int, int]]) -> Generator[int]:
        claims = self._claims_on(writer.path)
        pending = writer.pending()
        total = sum(examples for examples, _ in sizes)
        done = total - sum(sizes[index][0] for index in pending)
        left = sorted(pending, key=lambda index: (-sizes[index][1], index))
        with board(self._progress, self.meter.folder, done, total, self._peak) as self._board:
            pause = _pauses()
            while left:
                before = len(left)
                for index in list(left):
                    if self._done(writer, index):
                        left.remove(index)
                    elif claims.take(_name(index)):
                        with self._holding(_name(index)):
                            if not self._done(writer, index):  # it may have been finished before it was claimed
                                self.meter.begin(index)
                                yield index
                                self.meter.end()
                        left.remove(index)
                    self._tell()
                if len(left) < before:
                    pause = _pauses()
                elif left:
                    self._wait(next(pause))

    def owns(self, index: int) -> bool:
        return self._claims is not None and self._claims.holds(_name(index))

    def advance(self, lengths: Sequence[int]) -> None:
        self.meter.add(lengths)
        self.watch.beat()
        if self._claims is not None:
            self._claims.beat(self._name)
        if self._board is not None:
            self._board.update()
        if lengths:
            self._after_batch()
        self.signals.check()

    def finish(self, writer: StoreWriter, examples: int) -> Store:
        """Closes the store, or waits until another process has. Raises as `StoreWriter.finalize`."""
        claims = self._claims_on(writer.path)
        for pause in _pauses():
            if Manifest.load(writer.path).complete:
                return self._swept(writer, claims)
            if claims.take(_FINALIZE):
                with self._holding(_FINALIZE):
                    if not Manifest.load(writer.path).complete:  # nobody else closes it while this claim is held
                        warn_of_set_aside(writer.finalize(), examples)
                    return self._swept(writer, claims)
            self._wait(pause)
        raise AssertionError("unreachable")

    def _swept(self, writer: StoreWriter, claims: Claims) -> Store:
        """The finished store, without what was left by processes that were killed, closing it included."""
        claims.sweep()
        writer.sweep()
        return open_store(writer.path)

    @contextlib.contextmanager
    def _holding(self, name: str) -> Iterator[None]:
        assert self._claims is not None
        self._name = name
        self.watch.start(f"shard {name}" if name != _FINALIZE else "the last step")
        self._tell()
        try:
            yield
        finally:
            self.watch.stop()
            self._claims.release(name)

    def _wait(self, seconds: float) -> None:
        self.signals.check()
        time.sleep(seconds)
        self.meter.wait()
        if self._board is not None:
            self._board.update()

    def _tell(self) -> None:
        """Says what was taken over since the last time, and from whom."""
        assert self._claims is not None
        for lost in self._claims.lost[self._said :]:
            print(f"rank {self.world.rank} takes over shard {lost}", file=sys.stderr, flush=True)
            self.meter.write("taken over", what=str(lost))
        self._said = len(self._claims.lost)

    def _claims_on(self, folder: Path) -> Claims:
        if self._claims is None:
            self._claims = Claims(folder, Owner.here(self.world.rank), self.watch.time_limit)
        return self._claims

    def _done(self, writer: StoreWriter, index: int) -> bool:
        return (writer.path / file_name("shard", index)).exists() and writer.is_done(index)


class LockstepTurns:
    """The same for a group of processes that hold one model together: its first process takes shards for all."""

    def __init__(self, turns: ClaimedTurns, group: Any) -> None:
        self.turns = turns
        self.group = group
        self.leads = _rank_in(group) == 0

    def shards(self, writer: StoreWriter, sizes: Sequence[tuple[int, int]]) -> Generator[int]:
        if self.leads:
            with closing(self.turns.shards(writer, sizes)) as shards:
                for index in shards:
                    self._agree(index)
                    yield index
            self._agree(-1)
            return
        while (index := self._agree(-1)) >= 0:
            self.turns.watch.start(f"shard {index}")
            yield index
            self.turns.watch.stop()

    def owns(self, index: int) -> bool:
        return self.leads and self.turns.owns(index)

    def advance(self, lengths: Sequence[int]) -> None:
        # Stopping is agreed on: one that left alone would leave the others waiting for its part of the weights.
        self.turns.signals.stopping = bool(_largest(int(self.turns.signals.stopping), self.group))
        self.turns.advance(lengths)

    def finish(self, writer: StoreWriter, examples: int) -> Store:
        return self.turns.finish(writer, examples)

    def _agree(self, value: int) -> int:
        return _largest(value, self.group)  # all but the leader say -1


class _Signals:
    """SIGTERM asks to stop at the end of the batch; a second one stops at once."""

    def __init__(self) -> None:
        self.stopping = False
        self._before: Any = None

    def __enter__(self) -> _Signals:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._handle)
        return self

    def __exit__(self, *exc_info: Any) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _handle(self, number: int, frame: Any) -> None:
        if self.stopping:
            raise Preempted
        self.stopping = True

    def check(self) -> None:
        if self.stopping:
            raise Preempted


class _Watch:
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

    def __enter__(self) -> _Watch:
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

    def beat(self) -> None:
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
) -> None:
    """`work(beat)`, done by one process for all that share `folder`; the others wait until `done()`.

    `beat` is to be called as the work gets on; where it has not been for `time_limit` seconds, another takes over.
    """
    folder.mkdir(parents=True, exist_ok=True)
    claims = Claims(folder, Owner.here(world.rank), time_limit)
    for pause in _pauses():
        if done():
            return
        if claims.take("once"):
            try:
                if not done():
                    work(lambda: claims.beat("once"))
                return
            finally:
                claims.release("once")
        time.sleep(pause)


def fit_projection(
    path: str | Path,
    model: nn.Module,
    dataset: Sequence[Any],
    *,
    world: World | None = None,
    group: Any = None,
    time_limit: float = TIME_LIMIT,
    **options: Any,
) -> Projection:
    """`sketch_fitting.fit_projection` for the store in `path`, by every process that runs this with the same arguments.

    One of them fits, and the others take what it kept; with a `group` (see `build_distributed`) all compute, and rank
    0's is kept. Returns the same everywhere. Raises as it does.
    """
    world = World.from_environment() if world is None else world
    path = Path(path)

    def by_claim(find: Find, fit: Fit, keep: Keep) -> EigenSketch:
        once(path, world, lambda: find() is not None, lambda beat: keep(fit(beat)), time_limit)
        return kept(find)

    def together(find: Find, fit: Fit, keep: Keep) -> EigenSketch:
        if _largest(int(find() is None), None):  # somebody found none: all compute, in lockstep
            sketch = fit(lambda: None)
            if world.rank == 0:
                keep(sketch)
            _largest(0, None)  # kept now
        return kept(find)

    if group is None:
        return fit_by_itself(model, dataset, folder=path, share=by_claim, **options)
    return fit_by_itself(model, dataset, folder=path, share=together, gradients=LockstepRows(group), **options)


def init_group(world: World, ranks: int, device: str) -> tuple[Any, Any]:
    """(mesh, process group) of the `ranks` neighbouring processes that hold one copy of a model together.

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


def retried(work: Callable[[], T], attempts: int = 5, first_pause: float = 2.0) -> T:
    """`work()`, again after 2, 4, 8, ... seconds while it fails for a reason that passes: the hub or the network."""
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
    """Whether the error, or one that led to it, is the network's or a busy server's."""
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


def _name(index: int) -> str:
    return f"{index:05d}"


def _number(environment: Mapping[str, str], name: str, default: int) -> int:
    text = environment.get(name, str(default))
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"the environment variable {name} is {text!r}; it must be a whole number") from None


def _largest(value: int, group: Any) -> int:
    """The largest of the values that the group's processes (None: all) give."""
    import torch
    import torch.distributed as dist

    device = "cuda" if dist.get_backend(group) == "nccl" else "cpu"
    number = torch.tensor(value, dtype=torch.int64, device=device)
    dist.all_reduce(number, dist.ReduceOp.MAX, group=group)
    return int(number)


def _rank_in(group: Any) -> int:
    import torch.distributed as dist

    return dist.get_rank(group)


def _pauses() -> Iterator[float]:
    pause = 0.01
    while True:
        yield pause
        pause = min(2 * pause, _LONGEST_WAIT)
