"""What a build on many processes does with its time: JSON lines for each rank, one bar over all, a Chrome trace.

The lines stand beside the store, in `<store>.metrics/rank-00000.jsonl`, one file a rank, and are appended to when the
build goes on. A line counts from the line before it:

    time        seconds since the epoch
    rank, event "start", "progress", "shard", "taken over", "stopped" or "finished"
    shard       the shard in hand, or null
    examples, tokens, flops   done
    work_s, wait_s            seconds at work, and seconds without a shard to work on
    tokens_per_s              tokens / work_s, or null
"""

from __future__ import annotations

import contextlib
import json
import re
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from influence_fast.atomic import beside
from influence_fast.data.adapter_names import is_adapter_parameter
from influence_fast.progress import bar

EVERY = 1.0  # seconds between two lines of a rank, and between two looks at those of the others
LOGGED = 60.0  # seconds between two lines of progress in a log
TRACED = 8  # batches in a profile
# Dense bf16 FLOP/s from the makers' data sheets, by words of the card's name; the first that fits counts.
PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "GH200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
}


def folder_of(store: Path) -> Path:
    """Return the folder of the metrics of the store at `store`."""
    return beside(store, ".metrics")


def peak_flops(device: torch.device) -> float | None:
    """Return what a GPU can do in dense bf16, FLOP/s; None for a CPU or a GPU that is not in PEAK_FLOPS."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((value for part, value in PEAK_FLOPS.items() if re.search(rf"\b{part}\b", name)), None)


def example_flops(model: Any) -> Callable[[int], float]:
    """Return the FLOPs of the forward and the activation backward of one example, by its tokens n.

    4 P n + 6 L H n^2: P weights in the decoder's linears, multiplied once forward and once backward, 2 FLOPs each;
    L layers of causal attention over H = heads x head size numbers (2 H n^2 forward, twice that backward). The head,
    the adapter and the projections are left out, so a utilisation made of this is a lower bound.
    """
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = base.config
    weights = sum(
        parameter.numel()
        for name, parameter in base.get_decoder().named_parameters()
        if parameter.ndim == 2 and "embed" not in name and not is_adapter_parameter(name)
    )
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    layers = config.num_hidden_layers
    return lambda n: 4.0 * weights * n + 6.0 * layers * heads * size * n * n


class Meter:
    """Writes one rank's lines. `folder` None writes nothing.

    A full disk does not stop the work for the sake of its metrics: the line is lost.
    """

    def __init__(self, folder: Path | None, rank: int, flops: Callable[[int], float] | None = None) -> None:
        self.rank = rank
        self.shard: int | None = None
        self._flops = flops
        self.folder = folder
        self._path: Path | None = None
        if folder is not None:
            with contextlib.suppress(OSError):
                folder.mkdir(parents=True, exist_ok=True)
                self._path = folder / f"rank-{rank:05d}.jsonl"
        self._clear()
        self._mark = self._written = time.perf_counter()
        self.write("start")

    def add(self, lengths: Sequence[int]) -> None:
        """Count examples that are done, of so many tokens each."""
        self._pass(waiting=False)
        self._examples += len(lengths)
        self._tokens += sum(lengths)
        if self._flops is not None:
            self._flop_count += sum(self._flops(n) for n in lengths)
        if time.perf_counter() - self._written >= EVERY:
            self.write("progress")

    def begin(self, shard: int) -> None:
        """Start a shard; the time since the last event counts as idle."""
        self._pass(waiting=True)
        self.shard = shard

    def end(self) -> None:
        self._pass(waiting=False)
        self.write("shard")
        self.shard = None

    def wait(self) -> None:
        """Count the time since the last event as idle: there is still nothing to do."""
        self._pass(waiting=True)
        if time.perf_counter() - self._written >= EVERY:
            self.write("progress")

    def write(self, event: str, **more: Any) -> None:
        line = {
            "time": time.time(),
            "rank": self.rank,
            "event": event,
            "shard": self.shard,
            "examples": self._examples,
            "tokens": self._tokens,
            "flops": self._flop_count,
            "work_s": self._seconds[0],
            "wait_s": self._seconds[1],
            "tokens_per_s": self._tokens / self._seconds[0] if self._seconds[0] else None,
        }
        self._written = time.perf_counter()
        self._clear()
        if self._path is not None:
            with contextlib.suppress(OSError), self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line | more) + "\n")

    def _pass(self, *, waiting: bool) -> None:
        now = time.perf_counter()
        self._seconds[waiting] += now - self._mark
        self._mark = now

    def _clear(self) -> None:
        self._examples, self._tokens, self._flop_count = 0, 0, 0.0
        self._seconds = [0.0, 0.0]


@dataclass
class Totals:
    """Sums over lines, of all ranks together."""

    examples: int = 0
    tokens: int = 0
    flops: float = 0.0
    work_s: float = 0.0
    wait_s: float = 0.0
    ranks: set[int] = field(default_factory=set)

    @property
    def idle_share(self) -> float:
        """Return the share of the ranks' time in which they had no shard to work on."""
        spent = self.work_s + self.wait_s
        return self.wait_s / spent if spent else 0.0

    def add(self, line: dict[str, Any]) -> None:
        self.ranks.add(line["rank"])
        for name in ("examples", "tokens", "flops", "work_s", "wait_s"):
            setattr(self, name, getattr(self, name) + line[name])


class Follower:
    """Reads the lines of all ranks as they are written, each once, and sums them up."""

    def __init__(self, folder: Path, *, from_now: bool = False) -> None:
        self.folder = folder
        self.totals = Totals()
        self._offsets: dict[Path, int] = {}
        if from_now:
            self._offsets = {path: path.stat().st_size for path in self._files()}

    def look(self) -> Totals:
        for path in self._files():
            with path.open("rb") as file:
                file.seek(self._offsets.get(path, 0))
                for line in file:
                    if not line.endswith(b"\n"):
                        break  # still being written
                    self._offsets[path] = self._offsets.get(path, 0) + len(line)
                    with contextlib.suppress(ValueError, KeyError, TypeError):  # torn by a kill: no reason to stop
                        self.totals.add(json.loads(line))
        return self.totals

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("rank-*.jsonl"))


def summary(folder: Path) -> Totals:
    """Return the sums over all lines of all ranks in a store's metrics folder."""
    return Follower(folder).look()


class Board(ABC):
    """A progress bar of all ranks, whose metrics are read every `every` seconds and at the end."""

    every: float

    def __init__(self, folder: Path, done: int, total: int, peak: float | None) -> None:
        self._follower = Follower(folder, from_now=True)
        self._done, self._total, self._peak = done, total, peak
        self._start = self._looked = time.perf_counter()

    def update(self, *, at_once: bool = False) -> None:
        now = time.perf_counter()
        if now - self._looked < self.every and not at_once:
            return
        self._looked = now
        totals, seconds = self._follower.look(), now - self._start
        self._show(min(self._done + totals.examples, self._total), totals, seconds)

    @abstractmethod
    def _show(self, done: int, totals: Totals, seconds: float) -> None:
        """Log or draw `done` examples in all, of which those of `totals` in the last `seconds`."""

    def close(self) -> None:
        self.update(at_once=True)


class Bar(Board):
    """One bar for all ranks: examples, tokens/s, examples/s, time left, and the model-FLOP utilisation if known."""

    every = EVERY

    def __init__(self, folder: Path, done: int, total: int, peak: float | None) -> None:
        from rich.progress import TextColumn

        super().__init__(folder, done, total, peak)
        self._bar = bar("gradients", TextColumn("{task.fields[rates]}"))
        self._task = self._bar.add_task("gradients", total=total, completed=done, rates="")
        self._bar.start()

    def _show(self, done: int, totals: Totals, seconds: float) -> None:
        self._bar.update(self._task, completed=done, rates=rates_text(totals, seconds, self._peak))

    def close(self) -> None:
        super().close()
        self._bar.stop()


class Log(Board):
    """Progress in a job's log, where a bar cannot be drawn: a line a minute on stderr, and one at the end."""

    every = LOGGED

    def _show(self, done: int, totals: Totals, seconds: float) -> None:
        left = f", {time_left(self._total - done, totals.examples, seconds)} left" if totals.examples else ""
        print(
            f"gradients: {done:,} of {self._total:,} examples, {rates_text(totals, seconds, self._peak)}{left}",
            file=sys.stderr,
            flush=True,
        )


def time_left(examples: int, done: int, seconds: float) -> str:
    """Return the time left, `0:01:40` for 100 examples at the pace of `done` in `seconds`, to the second."""
    return str(timedelta(seconds=round(examples * seconds / done)))


def rates_text(totals: Totals, seconds: float, peak: float | None) -> str:
    """Return `1200 tokens/s, 2.4 examples/s, 4 ranks, MFU 31 %`: over `seconds`, `peak` FLOP/s a rank."""
    ranks = max(1, len(totals.ranks))
    text = f"{totals.tokens / seconds:.0f} tokens/s, {totals.examples / seconds:.2f} examples/s, {ranks} ranks"
    return text if peak is None else f"{text}, MFU {100 * totals.flops / seconds / (peak * ranks):.0f} %"


@contextlib.contextmanager
def board(
    wanted: bool | None, folder: Path | None, done: int, total: int, peak: float | None
) -> Iterator[Board | None]:
    """Yield a bar where it is wanted and, with None, on a terminal; else with None a log; None if nothing is left."""
    if folder is None or done >= total or wanted is False:
        yield None
        return
    shown = (Bar if wanted or sys.stderr.isatty() else Log)(folder, done, total, peak)
    try:
        yield shown
    finally:
        shown.close()


@contextlib.contextmanager
def chrome_trace(path: Path | None) -> Iterator[Callable[[], None]]:
    """Record `TRACED` batches from the third on to `path`, for chrome://tracing; what it gives is called after each."""
    if path is None:
        yield lambda: None
        return
    from torch.profiler import ProfilerActivity, profile, schedule

    def keep(profiler: Any) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(path))

    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
    steps = schedule(wait=1, warmup=1, active=TRACED, repeat=1)
    with profile(activities=activities, schedule=steps, on_trace_ready=keep) as profiler:
        yield profiler.step
