"""One build on many processes, started by torchrun, accelerate launch, srun or a job array, on any number of hosts.

The processes share the store's folder and nothing else: each takes the heaviest shard that nobody has claimed
(`claims`), computes and writes it, and takes the next. So a slow one holds nobody up, one may die at any moment or
join late, and the store comes out bit for bit as from one process. Only a model sharded over several cards (FSDP2,
`sharded`) needs a process group; then the processes of a group work as one.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from torch import nn

from influence_fast.deprecation import also_called_as, moved
from influence_fast.distributed.claims import LEASE, Claims, Owner, WaitNotice, check_lease
from influence_fast.distributed.metrics import Board, Meter, board, chrome_trace, example_flops, folder_of
from influence_fast.distributed.processes import TIME_LIMIT, Signals, Watch, World, largest, once, pauses, rank_in
from influence_fast.errors import ConfigError, StoreError
from influence_fast.gradients.rows.eigen_sketch import EigenSketch
from influence_fast.gradients.rows.precision import check_precision
from influence_fast.gradients.rows.projection import Projection
from influence_fast.gradients.rows.row_spec import RowSpec
from influence_fast.gradients.sharded import LockstepRows
from influence_fast.influence.preconditioners import DEFAULT
from influence_fast.influence.sketch_fitting import AS_USUAL, Find, Fit, Keep, SketchFit, kept, resolved
from influence_fast.influence.sketch_fitting import fit_projection as fit_by_itself
from influence_fast.store.building import (
    DEFAULT_SPEC,
    BuildOptions,
    ShardBuild,
    check_some,
    old_build,
    translated_build,
    warn_of_set_aside,
)
from influence_fast.store.manifest import Manifest, file_name
from influence_fast.store.reader import Store, open_store
from influence_fast.store.shard_rows import AS_TOKENS, Texts
from influence_fast.store.survey import held
from influence_fast.store.writer import StoreWriter

_FINALIZE = "finalize"


@dataclass(frozen=True)
class DistributedOptions(BuildOptions):
    """Say how many processes build a store together, beside what `BuildOptions` says.

    world: by default what the launcher says (`World.from_environment`).
    group: for a model that `sharded.shard_model` has spread out, the process group it is spread over.
    time_limit: seconds without a finished batch after which a process is given up: it ends itself (exit code 75, with a
        stack trace), and the others take over its shard and say so. Above the slowest batch.
    lease: seconds without a renewal after which a shard's claim is taken from a process of another host that may be
        dead (on this host that is known at once), and a quarter of it where the claim was never renewed. A live process
        renews its claims every tenth of the lease or so, however long a batch takes, so this may be far below
        `time_limit`. Who waits longer than five seconds says for whom and until when.
    metrics: JSON lines of each rank in `<path>.metrics` (see `metrics`).
    profile: a Chrome trace of each rank's first batches, in `<path>.metrics/trace-rank-00000.json`.
    peak: FLOP/s of one process's card, for the utilisation that the bar shows.

    `progress` is one bar for all processes, shown by rank 0; by default when stderr is a terminal, and else a line a
    minute.
    """

    world: World | None = None
    group: Any = None
    time_limit: float = TIME_LIMIT
    lease: float = LEASE
    metrics: bool = True
    profile: bool = False
    peak: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_lease(self.lease)
        if self.part != (0, 1):
            raise ConfigError("part: shards are shared out as processes come; leave it out")

    def of_world(self) -> World:
        """Return the processes that work together."""
        return World.from_environment() if self.world is None else self.world


DEFAULT_DISTRIBUTED = DistributedOptions()
_OF_LAUNCH = ("world", "group", "time_limit", "lease", "metrics", "profile", "peak")


def _translated(values: dict[str, Any]) -> dict[str, Any]:
    """Translate `build_distributed(path, model, tokenizer, dataset, projection=..., world=..., ...)`."""
    launch = moved(values, _OF_LAUNCH)
    new = translated_build(values)
    shared = {f.name: getattr(new["options"], f.name) for f in fields(BuildOptions)}
    return {**new, "options": DistributedOptions(**shared, **launch)}


@also_called_as(
    replace(
        old_build("build_distributed(path, model, data, spec, options=DistributedOptions(...))", *_OF_LAUNCH),
        translate=_translated,
    )
)
def build_distributed(
    path: str | Path,
    model: nn.Module,
    data: Sequence[Any],
    spec: RowSpec = DEFAULT_SPEC,
    *,
    tokenizer: Any = None,
    max_length: int | None = None,
    truncate: bool = False,
    options: DistributedOptions = DEFAULT_DISTRIBUTED,
) -> Store:
    """Run `build_store` in every process that calls this with the same arguments, until the store is finished.

    Args:
        path: a folder that all processes see.
        model, data, spec, tokenizer, max_length, truncate: as for `build_store`. The sketch that the spec asks for is
            fitted by one of the processes.
        options: who works together, and how.

    Returns the finished store, in every process. Raises as `build_store`, and Preempted after SIGTERM: the batches
    of the shard in hand are kept too, and the same command goes on, with any number of processes.
    """
    dataset, texts = held(data), Texts(tokenizer, max_length, truncate)

    def fit(asked: RowSpec) -> Projection:
        return fit_projection(path, model, dataset, asked, texts=texts, options=options)

    return build_by_claims(path, model, dataset, resolved(spec, DEFAULT, model, fit), texts, options)


def build_by_claims(
    path: str | Path,
    model: nn.Module,
    dataset: Sequence[Any],
    spec: RowSpec,
    texts: Texts,
    options: DistributedOptions,
) -> Store:
    """Build the store of a dataset (of `survey.held`) whose spec's sketch is settled. Raises as `build_distributed`."""
    group, world = options.group, options.of_world()
    check_precision(spec.precision, sharded=group is not None)
    path = Path(path)
    folder = folder_of(path) if options.metrics or options.profile else None
    leads = group is None or rank_in(group) == 0
    meter = Meter(folder if options.metrics and leads else None, world.rank, example_flops(model))
    trace = folder / f"trace-rank-{world.rank:05d}.json" if options.profile and folder is not None else None
    with Signals() as signals, Watch(world, options.time_limit) as watch, chrome_trace(trace) as traced:
        alone = ClaimedTurns(meter, signals, watch, options, after_batch=traced)
        turns: ClaimedTurns | LockstepTurns = alone
        if group is not None:
            turns = LockstepTurns(alone, group)
            options = replace(options, gradients=LockstepRows(group))
        try:
            build = ShardBuild.open(path, model, dataset, spec, texts, options)
            build.run(turns)
            store = turns.finish(build.writer, len(dataset))
        except KeyboardInterrupt:
            meter.write("stopped")
            raise
    meter.write("finished")
    return store


class ClaimedTurns:
    """Shards as they can be claimed, the heaviest first, until all are done; see `building.Turns`."""

    def __init__(
        self,
        meter: Meter,
        signals: Signals,
        watch: Watch,
        options: DistributedOptions,
        *,
        after_batch: Callable[[], None] = lambda: None,
    ) -> None:
        self.world = options.of_world()
        self.meter = meter
        self.signals = signals
        self.watch = watch
        self._lease = options.lease
        self._progress = options.progress if self.world.rank == 0 else False
        self._peak = options.peak
        self._after_batch = after_batch
        self._claims: Claims | None = None
        self._board: Board | None = None
        self._said = 0

    def shards(self, writer: StoreWriter, sizes: Sequence[tuple[int, int]]) -> Generator[int]:
        claims = self._claims_on(writer.path)
        pending = writer.pending()
        total = sum(examples for examples, _ in sizes)
        done = total - sum(sizes[index][0] for index in pending)
        left = sorted(pending, key=lambda index: (-sizes[index][1], index))
        with board(self._progress, self.meter.folder, done, total, self._peak) as self._board:
            pause, notice = pauses(), WaitNotice(claims)
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
                    pause = pauses()
                    notice.over()
                elif left:
                    notice.waiting((_name(index), f"shard {index}") for index in left)
                    self._wait(next(pause))

    def owns(self, index: int) -> bool:
        return self._claims is not None and self._claims.holds(_name(index))

    def advance(self, lengths: Sequence[int]) -> None:
        self.meter.add(lengths)
        self.watch.heartbeat()
        if self._claims is not None:
            self._claims.heartbeat()
        if self._board is not None:
            self._board.update()
        if lengths:
            self._after_batch()
        self.signals.check()

    def finish(self, writer: StoreWriter, examples: int) -> Store:
        """Close the store, or wait until another process has. Raises as `StoreWriter.finalize`."""
        claims = self._claims_on(writer.path)
        notice = WaitNotice(claims)
        for pause in pauses():
            if Manifest.load(writer.path).complete:
                store = self._swept(writer, claims)
                check_some(store, examples)
                return store
            if claims.take(_FINALIZE):
                with self._holding(_FINALIZE):
                    if not Manifest.load(writer.path).complete:  # nobody else closes it while this claim is held
                        warn_of_set_aside(writer.finalize(), examples)
                    return self._swept(writer, claims)
            notice.waiting([(_FINALIZE, "the last step")])
            self._wait(pause)
        raise AssertionError("unreachable")

    def _swept(self, writer: StoreWriter, claims: Claims) -> Store:
        """Return the finished store, without what killed processes left, those killed while they closed it included."""
        claims.sweep()
        writer.sweep()
        return open_store(writer.path)

    @contextlib.contextmanager
    def _holding(self, name: str) -> Iterator[None]:
        assert self._claims is not None
        self.watch.start(f"shard {name}" if name != _FINALIZE else "the last step")
        self._tell()
        try:
            with self._claims.renewing(name):
                yield
        finally:
            self.watch.stop()

    def _wait(self, seconds: float) -> None:
        self.signals.check()
        time.sleep(seconds)
        self.meter.wait()
        if self._board is not None:
            self._board.update()

    def _tell(self) -> None:
        """Log what was taken over since the last time, and from whom."""
        assert self._claims is not None
        for lost in self._claims.lost[self._said :]:
            print(f"rank {self.world.rank} takes over shard {lost}", file=sys.stderr, flush=True)
            self.meter.write("taken over", what=str(lost))
        self._said = len(self._claims.lost)

    def _claims_on(self, folder: Path) -> Claims:
        if self._claims is None:
            owner = Owner.here(self.world.rank)
            self._claims = Claims(folder, owner, self._lease, hang_limit=self.watch.time_limit)
        return self._claims

    def _done(self, writer: StoreWriter, index: int) -> bool:
        return (writer.path / file_name("shard", index)).exists() and writer.is_done(index)


class LockstepTurns:
    """Turns for a group of processes that hold one model together: its first process takes shards for all."""

    def __init__(self, turns: ClaimedTurns, group: Any) -> None:
        self.turns = turns
        self.group = group
        self.leads = rank_in(group) == 0

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
        self.turns.signals.stopping = bool(largest(int(self.turns.signals.stopping), self.group))
        self.turns.advance(lengths)

    def finish(self, writer: StoreWriter, examples: int) -> Store:
        return self.turns.finish(writer, examples)

    def _agree(self, value: int) -> int:
        return largest(value, self.group)  # all but the leader say -1


def fit_projection(
    path: str | Path,
    model: nn.Module,
    dataset: Sequence[Any],
    spec: RowSpec,
    *,
    texts: Texts = AS_TOKENS,
    fit: SketchFit = AS_USUAL,
    options: DistributedOptions = DEFAULT_DISTRIBUTED,
) -> Projection:
    """Run `sketch_fitting.fit_projection` for the store in `path`, in every process with the same arguments.

    One of them fits, and the others take what it kept; with a group of processes that hold one model all compute, and
    rank 0's is kept. Returns the same everywhere. Raises as it does.
    """
    group, world = options.group, options.of_world()
    check_precision(spec.precision, sharded=group is not None)
    path = Path(path)

    def by_claim(find: Find, anew: Fit, keep: Keep) -> EigenSketch:
        once(
            path,
            world,
            lambda: find() is not None,
            lambda heartbeat: keep(anew(heartbeat)),
            options.time_limit,
            options.lease,
        )
        return kept(find)

    def together(find: Find, anew: Fit, keep: Keep) -> EigenSketch:
        if largest(int(find() is None), None):  # somebody found none: all compute, in lockstep
            sketch = anew(lambda: None)
            failed: StoreError | None = None
            if world.rank == 0:
                try:
                    keep(sketch)
                except StoreError as error:
                    failed = error
            if largest(int(failed is not None), None):  # kept now, or all stop
                raise failed or StoreError(f"{path}: rank 0 could not keep the sketch; its message says why")
        return kept(find)

    fit = replace(fit, share=by_claim if group is None else together)
    if group is not None:
        fit = replace(fit, gradients=LockstepRows(group))
    return fit_by_itself(
        model,
        dataset,
        spec,
        tokenizer=texts.tokenizer,
        max_length=texts.max_length,
        truncate=texts.truncate,
        fit=fit,
        folder=path,
    )


def _name(index: int) -> str:
    return f"{index:05d}"
