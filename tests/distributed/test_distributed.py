"""Many processes on one store: whoever dies, hangs, joins or leaves, the store is bit for bit that of one process."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from trials import world

from influence_fast.distributed import metrics
from influence_fast.distributed.claims import Claims, Owner, WaitNotice
from influence_fast.distributed.metrics import Follower, board, folder_of, peak_flops, rates_text, summary, time_left
from influence_fast.distributed.processes import Preempted, World, once, retried
from influence_fast.errors import ConfigError, DataError
from influence_fast.store.reader import open_store
from influence_fast.store.verification import verify_store

# It depends on a clock or on other processes: a failure is run once more and listed (RERUN).
pytestmark = pytest.mark.flaky(reruns=1)

EXAMPLES = 48
SHARDS = 16

# Imports everything once, then forks a process for each line it reads, so that a trial costs the build alone.
NURSERY = (
    world(longest=60)
    + """
import json, os, signal, sys, time
from dataclasses import replace
from influence_fast.influence.building import build_store
from influence_fast.distributed.builds import DistributedOptions, build_distributed
from influence_fast.distributed.processes import Preempted, World
from influence_fast.gradients import per_example as gradients
from influence_fast.store import writer as store_writer
from influence_fast.gradients.per_example import iter_gradient_rows
from influence_fast.gradients.rows.row_spec import RowSpec
from influence_fast.store.building import BuildOptions

examples[25]["labels"] = torch.full_like(examples[25]["labels"], -100)
spec = RowSpec(dim=4, width=64, sketch="random", dtype="int8")
options = dict(shard_rows=3, progress=False)

def slow(*args, pause, **more):
    for batch in iter_gradient_rows(*args, **more):
        time.sleep(pause)
        yield batch

def child(task):
    torch.set_num_threads(1)
    settings = dict(options)
    settings.update(task.get("options", {}))
    made = replace(spec, max_tokens=settings.pop("max_tokens", None))
    if task.get("pause"):
        gradients.iter_gradient_rows = lambda *args, **more: slow(*args, pause=task["pause"], **more)
    if task.get("full"):
        def full(handle, data):
            if ".rows-" in handle.name and handle.tell() == 0 and len(os.listdir(task["path"])) > 30:
                raise OSError(28, "No space left on device")
            handle.write(data)
        store_writer._write = full
    try:
        if task["world"] == 0:
            build_store(task["path"], model, examples, made, options=BuildOptions(**settings))
        else:
            world = World(task["rank"], task["world"])
            how = DistributedOptions(world=world, time_limit=task["time_limit"], lease=task.get("lease", 60.0),
                                     profile=task.get("profile", False), **settings)
            build_distributed(task["path"], model, examples, made, options=how)
    except Preempted as stop:
        print("stopped:", stop, file=sys.stderr)
        os._exit(stop.exit_code)
    except BaseException as error:
        print(type(error).__name__, error, file=sys.stderr)
        os._exit(1)
    os._exit(0)

print("ready", flush=True)
for line in sys.stdin:
    task = json.loads(line)
    if "wait" in task:
        print(os.waitstatus_to_exitcode(os.waitpid(task["wait"], 0)[1]), flush=True)
        continue
    pid = os.fork()
    if pid == 0:
        child(task)
    print(pid, flush=True)
"""
)


class Nursery:
    """Starts builds as processes of their own, which may be killed."""

    def __init__(self, folder: Path) -> None:
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONWARNINGS": "ignore",
        }
        self.log = folder / "stderr"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", NURSERY],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment,
            )
        assert self._answer() == "ready"

    def start(self, path: Path, rank: int = 0, world: int = 1, **more: Any) -> int:
        return int(self._ask({"path": str(path), "rank": rank, "world": world, "time_limit": 60.0} | more))

    def start_all(self, path: Path, world: int, **more: Any) -> list[int]:
        return [self.start(path, rank, world, **more) for rank in range(world)]

    def wait(self, pid: int) -> int:
        """Its exit code, -9 for one that was killed."""
        return int(self._ask({"wait": pid}))

    def whole(self, path: Path, **more: Any) -> dict[str, bytes]:
        """The files of the store that one process makes."""
        assert self.wait(self.start(path, world=0, **more)) == 0
        return stored_bytes(path)

    def said(self) -> str:
        return self.log.read_text()

    def _ask(self, task: dict[str, Any]) -> str:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(task) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


def stored_bytes(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def recorded(folder: Path) -> int:
    return len(list(folder.glob("shard-*.json")))


def until(condition: Any, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


@pytest.fixture(scope="module")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    made = Nursery(tmp_path_factory.mktemp("nursery"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def expected(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    files = nursery.whole(tmp_path_factory.mktemp("whole") / "s")
    assert len(files) == 1 + 5 * SHARDS
    return files


# ---- the same store ------------------------------------------------------------------------------------------------


def test_four_processes_make_the_store_of_one(nursery: Nursery, expected: dict[str, bytes], tmp_path: Path) -> None:
    folder = tmp_path / "s"
    codes = [nursery.wait(pid) for pid in nursery.start_all(folder, 4)]
    assert codes == [0] * 4
    assert stored_bytes(folder) == expected
    assert verify_store(folder) == []
    assert open_store(folder).set_aside == [("e25", "no completion token to learn from")]
    totals = summary(folder_of(folder))
    assert totals.examples == EXAMPLES  # each shard was computed once
    assert 0 <= totals.idle_share < 1
    assert totals.ranks == {0, 1, 2, 3}


def test_a_process_joins_late_and_finds_the_finished_store(
    nursery: Nursery, expected: dict[str, bytes], tmp_path: Path
) -> None:
    folder = tmp_path / "s"
    first = nursery.start(folder, 0, 2, pause=0.02)
    until(lambda: recorded(folder) > 2)
    second = nursery.start(folder, 1, 2)
    assert [nursery.wait(first), nursery.wait(second)] == [0, 0]
    assert nursery.wait(nursery.start(folder, 5, 6)) == 0
    assert stored_bytes(folder) == expected


@pytest.mark.parametrize("rounds", [3, pytest.param(20, marks=pytest.mark.exhaustive)])
def test_kill_9_of_any_rank_with_changing_world_sizes_loses_nothing(
    nursery: Nursery, expected: dict[str, bytes], tmp_path: Path, rounds: int
) -> None:
    """Each round starts 1 to 4 processes on what the rounds before have left, and kills some or all of them."""
    rng = random.Random(rounds)
    killed = trial = played = 0
    while played < rounds:
        trial += 1
        folder = tmp_path / f"trial{trial}"
        for _ in range(4):
            if played == rounds:
                break
            world = rng.randint(1, 4)
            pids = nursery.start_all(folder, world)
            goal = min(recorded(folder) + rng.randint(0, 6), SHARDS - 1) if folder.exists() else rng.randint(0, 6)
            victims = rng.sample(pids, rng.randint(1, world))
            end = time.monotonic() + 10
            while folder.exists() <= (goal > 0) and recorded(folder) < goal and time.monotonic() < end:
                time.sleep(0.002)
            time.sleep(rng.uniform(0, 0.03))
            for pid in victims:
                os.kill(pid, signal.SIGKILL)  # its number is its own until it is waited for, even when it has ended
            codes = dict(zip(pids, (nursery.wait(pid) for pid in pids), strict=True))
            assert all(codes[pid] == 0 for pid in pids if pid not in victims)
            dead = sum(codes[pid] == -signal.SIGKILL for pid in victims)
            killed += dead
            played += dead > 0  # a round whose victims had already ended proves nothing
            if recorded(folder) == SHARDS and len(victims) < world:
                break
        last = nursery.start_all(folder, rng.randint(1, 3))
        assert {nursery.wait(pid) for pid in last} == {0}
        assert stored_bytes(folder) == expected
        assert verify_store(folder) == []
    assert killed >= rounds


# ---- stopping and hanging --------------------------------------------------------------------------------------------


def test_sigterm_keeps_the_finished_batches_of_the_shard_in_hand(nursery: Nursery, tmp_path: Path) -> None:
    options = {"shard_rows": EXAMPLES, "max_tokens": 1}  # one shard, a batch an example
    expected = nursery.whole(tmp_path / "whole", options=options)
    folder = tmp_path / "s"
    pid = nursery.start(folder, options=options, pause=0.05)
    until(lambda: (folder / ".claim-00000").exists())
    time.sleep(0.5)
    os.kill(pid, signal.SIGTERM)
    assert nursery.wait(pid) == 128 + signal.SIGTERM
    assert "0 of 1 shards" in nursery.said()
    assert [p.name for p in folder.glob(".*")] == [".partial-00000.safetensors"]  # and the claim is given back
    assert nursery.wait(nursery.start(folder, options=options)) == 0
    assert stored_bytes(folder) == expected
    lines = [json.loads(line) for line in (folder_of(folder) / "rank-00000.jsonl").read_text().splitlines()]
    assert [line["event"] for line in lines].count("stopped") == 1
    whole = sum(int(shard["tokens"]) for shard in lines)
    second = sum(int(line["tokens"]) for line in lines[[line["event"] for line in lines].index("stopped") + 1 :])
    assert 0 < second < whole  # no token was computed twice: the two runs add up to the data
    assert whole == nursery_tokens()


def nursery_tokens() -> int:
    """Tokens of the nursery's examples that have a gradient."""
    import torch

    generator = torch.Generator().manual_seed(0)
    lengths = []
    for _ in range(EXAMPLES):
        lengths.append(int(torch.randint(3, 60, (), generator=generator)))
        torch.randint(5, 300, (lengths[-1],), generator=generator)
    return sum(lengths) - lengths[25]


def test_a_rank_that_hangs_is_named_and_its_work_taken_over(
    nursery: Nursery, expected: dict[str, bytes], tmp_path: Path
) -> None:
    folder = tmp_path / "s"
    hanging = nursery.start(folder, 1, 2, pause=1000, time_limit=2.0)
    until(lambda: list(folder.glob(".claim-0*")))
    claim = next(folder.glob(".claim-0*")).name.removeprefix(".claim-")
    other = nursery.start(folder, 0, 2)
    assert nursery.wait(hanging) == 75
    assert nursery.wait(other) == 0
    said = nursery.said()
    assert f"rank 1 hangs in shard {claim}: no batch finished for 2 s" in said
    assert "in slow" in said  # the stack trace
    assert f"rank 0 takes over shard {claim} of rank 1 (process {hanging} on " in said
    assert stored_bytes(folder) == expected


def test_a_suspended_rank_loses_its_shard_and_does_no_harm(
    nursery: Nursery, expected: dict[str, bytes], tmp_path: Path
) -> None:
    folder = tmp_path / "s"
    suspended = nursery.start(folder, 1, 2, pause=0.5, lease=1.0)
    until(lambda: list(folder.glob(".claim-0*")))
    os.kill(suspended, signal.SIGSTOP)
    other = nursery.start(folder, 0, 2, lease=1.0)
    assert nursery.wait(other) == 0
    os.kill(suspended, signal.SIGCONT)
    assert nursery.wait(suspended) == 0
    # Stopped before its first renewal, it loses the shard after a quarter of the lease.
    taken = rf"rank 0 takes over shard \d+ of rank 1 \(process {suspended} on .*\): "
    assert re.search(taken + r"(not renewed in 1 s|never renewed in 0.25 s)", nursery.said())
    assert stored_bytes(folder) == expected


def test_a_full_disk_stops_every_rank_and_loses_nothing(
    nursery: Nursery, expected: dict[str, bytes], tmp_path: Path
) -> None:
    folder = tmp_path / "s"
    assert [nursery.wait(pid) for pid in nursery.start_all(folder, 2, full=1)] == [1, 1]
    assert "the disk is full while writing" in nursery.said()
    assert [nursery.wait(pid) for pid in nursery.start_all(folder, 2)] == [0, 0]
    assert stored_bytes(folder) == expected


def test_alone_it_shows_one_bar_keeps_metrics_and_a_trace(
    tmp_path: Path, tiny_lora: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    from influence_fast.distributed.builds import DistributedOptions, build_distributed
    from influence_fast.gradients.rows.row_spec import RowSpec
    from influence_fast.influence.building import build_store
    from influence_fast.store.building import BuildOptions

    model, generator = tiny_lora(), torch.Generator().manual_seed(0)
    examples = []
    for i in range(12):
        ids = torch.randint(5, 300, (int(torch.randint(3, 40, (), generator=generator)),), generator=generator)
        examples.append({"id": f"e{i}", "input_ids": ids, "labels": ids.clone()})
    spec = RowSpec(dim=4, dtype="fp32", max_tokens=30)
    before = signal.getsignal(signal.SIGTERM)
    build_distributed(
        tmp_path / "s",
        model,
        examples,
        spec,
        options=DistributedOptions(shard_rows=4, world=World(), progress=True, profile=True, peak=1e9),
    )
    assert signal.getsignal(signal.SIGTERM) is before
    said = capsys.readouterr().err
    assert "12/12" in said
    assert "tokens/s" in said
    assert "MFU" in said
    build_store(tmp_path / "whole", model, examples, spec, options=BuildOptions(shard_rows=4))
    assert stored_bytes(tmp_path / "s") == stored_bytes(tmp_path / "whole")
    totals = summary(folder_of(tmp_path / "s"))
    assert (totals.examples, totals.tokens) == (12, sum(len(e["input_ids"]) for e in examples))
    # 2 layers of 32 wide: q, o 32 x 32; k, v 32 x 16; gate, up, down 32 x 56
    weights = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 56)
    flops = sum(4 * weights * n + 6 * 2 * 32 * n * n for n in (len(e["input_ids"]) for e in examples))
    assert totals.flops == pytest.approx(flops)
    trace = json.loads((folder_of(tmp_path / "s") / "trace-rank-00000.json").read_text())
    assert any("addmm" in str(event.get("name")) for event in trace["traceEvents"])


# ---- the pieces ----------------------------------------------------------------------------------------------------


def owner(pid: int, host: str | None = None) -> Owner:
    here = Owner.here(0)
    return Owner(1, host or here.host, pid, here.started)


def test_a_claim_has_one_owner_until_it_is_released(tmp_path: Path) -> None:
    first, second = (Claims(tmp_path, Owner.here(rank), 60.0) for rank in (0, 1))
    assert first.take("a")
    assert not second.take("a")
    assert (first.holds("a"), second.holds("a")) == (True, False)
    second.release("a")  # not its own
    assert first.holds("a")
    first.release("a")
    assert second.take("a")
    second.sweep()
    assert list(tmp_path.iterdir()) == []


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_an_ended_owner_on_this_host_is_known_at_once(tmp_path: Path) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    assert Claims(tmp_path, owner(ended.pid)).take("a")
    watcher = Claims(tmp_path, Owner.here(0))
    assert watcher.take("a")
    assert str(watcher.lost[0]).startswith("a of rank 1 (")
    assert str(watcher.lost[0]).endswith(": it ended")


def test_a_claim_of_another_host_is_taken_when_its_lease_is_over(tmp_path: Path) -> None:
    elsewhere, clock = Claims(tmp_path, owner(1, "elsewhere")), Clock()
    assert elsewhere.take("renewed")
    elsewhere.renew("renewed")
    assert elsewhere.take("never")
    (tmp_path / ".claim-torn").write_bytes(b"")  # of a process that was killed as it wrote it
    watcher = Claims(tmp_path, Owner.here(0), 60.0, clock=clock)
    taken: dict[str, float] = {}
    for clock.now in (0.0, 10.0, 16.0, 40.0, 59.0, 90.0, 99.0, 101.0):
        if clock.now == 40:
            os.utime(tmp_path / ".claim-renewed", ns=(5, 5))  # a sign of life, whatever the other host's clock says
        for name in {"renewed", "never", "torn"} - taken.keys():
            if watcher.take(name):
                taken[name] = clock.now
    assert taken == {"never": 16, "torn": 16, "renewed": 101}
    assert sorted(str(lost).partition(": ")[2] for lost in watcher.lost) == [
        "never renewed in 15 s",
        "not renewed in 15 s",
        "not renewed in 60 s",
    ]


def test_a_shorter_lease_does_not_take_what_a_live_process_renews(tmp_path: Path) -> None:
    elsewhere, clock = Claims(tmp_path, owner(1, "elsewhere"), 60.0), Clock()
    assert elsewhere.take("a")  # and renewed every 5 seconds
    elsewhere.renew("a")
    watcher = Claims(tmp_path, Owner.here(0), 2.0, clock=clock)
    for clock.now in (0.0, 3.0, 14.0):
        assert not watcher.take("a")
    clock.now = 15.5
    assert watcher.take("a")


def test_a_claim_is_renewed_while_it_is_held_and_released_after(tmp_path: Path) -> None:
    claims = Claims(tmp_path, Owner.here(0), 0.06)
    assert claims.take("a")
    path = tmp_path / ".claim-a"
    with claims.renewing("a"):
        stamps = set()
        until(lambda: stamps.add(path.stat().st_mtime_ns) or len(stamps) > 3)  # type: ignore[func-returns-value]
    assert not path.exists()


def test_a_claim_whose_owner_hangs_is_renewed_no_more(tmp_path: Path) -> None:
    clock = Clock()
    claims = Claims(tmp_path, Owner.here(0), 60.0, hang_limit=600.0, clock=clock)
    assert claims.take("a")
    path = tmp_path / ".claim-a"
    claims.heartbeat()
    for clock.now, renewed in ((599.0, True), (601.0, False)):
        os.utime(path, ns=(5, 5))
        claims.renew("a")
        assert (path.stat().st_mtime_ns != 5) is renewed
    claims.heartbeat()
    claims.renew("a")
    assert path.stat().st_mtime_ns != 5


def test_who_waits_says_for_whom_and_until_when_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    for name in ("00003", "00007"):
        assert Claims(tmp_path, owner(77, "elsewhere/pid:[1]")).take(name)
    watcher = Claims(tmp_path, Owner.here(0), 60.0, clock=clock)
    notice = WaitNotice(watcher, clock)
    for clock.now in (0.0, 1.0, 4.9, 5.1, 6.0, 7.0):
        assert not watcher.take("00003")
        assert not watcher.take("00007")
        notice.waiting([("00003", "shard 3"), ("00007", "shard 7")])
        if clock.now < 5:
            assert capsys.readouterr().err == ""
    said = capsys.readouterr().err
    assert re.fullmatch(
        r"rank 0 waits for shard 3 and 1 more of rank 1 \(process 77 on elsewhere\): taken over at \d\d:\d\d:\d\d, "
        r"in 10 s, unless renewed before; --lease sets that time, and deleting .*/\.claim-00003 ends it at once\n",
        said,
    )
    notice.over()
    notice.waiting([("00003", "shard 3")])
    assert capsys.readouterr().err == ""


def test_a_claim_of_a_dead_container_does_not_stall_a_build(
    nursery: Nursery, expected: dict[str, bytes], tmp_path: Path
) -> None:
    folder = tmp_path / "s"
    folder.mkdir()
    about = {"rank": 4, "host": "gone/pid:[1]", "pid": 7, "started": 1.0, "nonce": "00"}
    (folder / ".claim-00002").write_text(json.dumps(about))
    assert nursery.wait(nursery.start(folder, 0, 1, lease=0.5)) == 0
    assert "takes over shard 00002 of rank 4 (process 7 on gone): not renewed in 0.5 s" in nursery.said()
    assert stored_bytes(folder) == expected


def test_what_one_process_does_for_all_is_taken_from_a_dead_container(tmp_path: Path) -> None:
    assert Claims(tmp_path, owner(1, "gone")).take("once")
    made: list[int] = []
    once(tmp_path, World(0, 2), lambda: bool(made), lambda heartbeat: made.append(1), lease=0.2)
    assert made == [1]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("lease", [0.0, -1.0, float("nan"), float("inf")])
def test_a_lease_that_is_no_time_is_refused(tmp_path: Path, lease: float) -> None:
    with pytest.raises(ConfigError, match="--lease"):
        Claims(tmp_path, Owner.here(0), lease)


def test_sigterm_in_what_one_process_does_for_all_gives_its_claim_back(tmp_path: Path) -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    try:
        with pytest.raises(Preempted):
            once(tmp_path, World(0, 2), lambda: False, lambda heartbeat: os.kill(os.getpid(), signal.SIGTERM))
        assert list(tmp_path.iterdir()) == []
        os.kill(os.getpid(), signal.SIGTERM)  # the handler from before is back
        assert heard == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_pid_that_another_process_has_now_is_a_dead_owner() -> None:
    here = Owner.here(0)
    assert not here.is_dead()
    assert Owner(0, here.host, here.pid, here.started - 5).is_dead()


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, (0, 1, 0)),
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}, (3, 4, 1)),
        ({"SLURM_STEP_ID": "0", "SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1"}, (5, 8, 1)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, (0, 1, 0)),  # the batch script itself
        ({"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_COUNT": "8", "SLURM_ARRAY_TASK_MIN": "1"}, (6, 8, 0)),
        ({"SLURM_ARRAY_TASK_ID": "0", "SLURM_ARRAY_TASK_COUNT": "8", "RANK": "1", "WORLD_SIZE": "2"}, (1, 2, 0)),
    ],
)
def test_ranks_come_from_the_launcher(environment: dict[str, str], expected: tuple[int, int, int]) -> None:
    world = World.from_environment(environment)
    assert (world.rank, world.size, world.local_rank) == expected


def test_a_launcher_that_contradicts_itself_is_named() -> None:
    with pytest.raises(ConfigError, match="WORLD_SIZE is 'two'"):
        World.from_environment({"RANK": "0", "WORLD_SIZE": "two"})
    with pytest.raises(ConfigError, match="RANK=2, WORLD_SIZE=2"):
        World.from_environment({"RANK": "2", "WORLD_SIZE": "2"})


def test_only_what_passes_is_tried_again(capsys: pytest.CaptureFixture[str]) -> None:
    calls: list[int] = []

    def work(error: Exception, failures: int) -> str:
        calls.append(1)
        if len(calls) <= failures:
            try:
                raise error
            except Exception as cause:
                raise DataError("the hub did not answer") from cause
        return "done"

    assert retried(lambda: work(ConnectionError("reset"), 2), first_pause=0.001) == "done"
    assert len(calls) == 3
    assert "trying again" in capsys.readouterr().err
    calls.clear()
    with pytest.raises(DataError, match="did not answer"):
        retried(lambda: work(ValueError("no such split"), 2), first_pause=0.001)
    assert len(calls) == 1
    calls.clear()
    with pytest.raises(DataError):
        retried(lambda: work(TimeoutError(), 9), attempts=3, first_pause=0.001)
    assert len(calls) == 3


def test_totals_follow_the_lines_as_they_are_written(tmp_path: Path) -> None:
    line = {"rank": 2, "examples": 3, "tokens": 100, "flops": 4e12, "work_s": 3.0, "wait_s": 1.0}
    file = tmp_path / "rank-00002.jsonl"
    file.write_text(json.dumps(line) + "\n" + '{"rank": 2, "exam')
    follower = Follower(tmp_path)
    assert follower.look().tokens == 100
    with file.open("a") as more:
        more.write("\n" + json.dumps(line) + "\n")  # the torn line of a killed process, and one that is whole
    (tmp_path / "rank-00000.jsonl").write_text(json.dumps(line | {"rank": 0, "wait_s": 5.0}) + "\n")
    totals = follower.look()
    assert (totals.examples, totals.tokens, totals.ranks) == (9, 300, {0, 2})
    assert totals.idle_share == pytest.approx(7 / 16)
    assert rates_text(totals, 10.0, 6e11) == "30 tokens/s, 0.90 examples/s, 2 ranks, MFU 100 %"


def test_a_log_gets_lines_where_a_terminal_has_the_bar(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    line = {"rank": 0, "examples": 30, "tokens": 900, "flops": 0.0, "work_s": 3.0, "wait_s": 1.0}
    with board(None, tmp_path, 10, 2000, None) as shown:
        assert shown is not None
        (tmp_path / "rank-00000.jsonl").write_text(json.dumps(line) + "\n")
        shown.update()
        assert capsys.readouterr().err == ""  # not a minute yet
        monkeypatch.setattr(metrics.Log, "every", 0.0)
        shown.update()
        said = capsys.readouterr().err
        assert said.startswith("gradients: 40 of 2,000 examples, ")
        assert "tokens/s" in said
        assert said.endswith(" left\n")
    assert "examples" in capsys.readouterr().err
    for wanted, total in ((False, 2000), (None, 10)):  # not asked for; nothing left
        with board(wanted, tmp_path, 10, total, None) as shown:
            assert shown is None
    assert time_left(100, 30, 30.0) == "0:01:40"


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA L40", None),
        ("NVIDIA RTX A1000", None),
    ],
)
def test_peaks_are_those_of_whole_names(monkeypatch: pytest.MonkeyPatch, name: str, tflops: int | None) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda")) == (None if tflops is None else tflops * 1e12)
