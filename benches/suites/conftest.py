"""Turns each suite's CASES into pytest-benchmark tests, one a variant, all variants of a case timed in turn.

pytest-benchmark runs one test after another. So the first test of a case times the rounds of all its variants in
turn, and each test then shows pytest-benchmark its own rounds by a clock that goes on by what was measured.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benches.environment import describe
from benches.interleave import interleaved, summary
from benches.suites.case import Case, Scale
from influence_fast.products import native


class Clock:
    """A timer that stands still but for what it is told to add."""

    __name__ = "rounds timed in turn"

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


CLOCK = Clock()
ENTRIES = pytest.StashKey[list[dict[str, Any]]]()


def stage_of(path: Path) -> str:
    return path.stem.removeprefix("test_")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("influence-fast")
    group.addoption("--quick", action="store_true", help="tiny sizes and two rounds: does it run? no timing is kept")
    group.addoption("--threads", type=int, default=native.default_threads())
    group.addoption("--results", type=Path, help="JSON file for the figures")


def pytest_configure(config: pytest.Config) -> None:
    if config.option.quick and config.option.results:
        raise pytest.UsageError("--quick times nothing worth keeping: leave out --results")
    config.stash[ENTRIES] = []
    torch.set_num_threads(config.option.threads)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "variant" not in metafunc.fixturenames:
        return
    stage = stage_of(metafunc.definition.path)
    parameters = [
        pytest.param(
            (case, name),
            id=f"{case.group}: {name}",
            marks=pytest.mark.benchmark(group=f"{stage}: {case.group}", timer=CLOCK),
        )
        for case in metafunc.module.CASES
        for name in case.names
    ]
    metafunc.parametrize("variant", parameters)


@pytest.fixture(scope="module")
def timed(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Case], dict[str, list[float]]]:
    """Seconds of every round of each variant of a case; timed once, on first use."""
    found: dict[str, dict[str, list[float]]] = {}
    option = request.config.option
    stage = stage_of(request.path)

    def run(case: Case) -> dict[str, list[float]]:
        if case.group not in found:
            torch.manual_seed(0)
            scale = Scale(option.quick, option.threads, tmp_path_factory.mktemp("case"))
            seconds = interleaved(case.variants(scale), 2 if option.quick else case.rounds)
            gc.collect()
            found[case.group] = seconds
            at = {} if case.axis is None else {"axis": case.axis, "at": case.at}
            request.config.stash[ENTRIES] += [
                {"stage": stage, "group": case.group, **at, **entry, "rounds": case.rounds}
                for entry in summary(seconds)
            ]
        return found[case.group]

    return run


@pytest.fixture
def side_by_side(
    benchmark: Any, variant: tuple[Case, str], timed: Callable[[Case], dict[str, list[float]]]
) -> Callable[[], None]:
    """Shows one variant's rounds to pytest-benchmark, with its ratio to ours."""

    def show() -> None:
        case, name = variant
        seconds = timed(case)
        durations = iter(seconds[name])

        def pass_time() -> None:
            CLOCK.now += next(durations)

        ratio = next(entry["ratio"] for entry in summary(seconds) if entry["name"] == name)
        benchmark.extra_info.update(ratio_to_ours=ratio, axis=case.axis, at=case.at)
        benchmark.pedantic(pass_time, rounds=len(seconds[name]))

    return show


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    path = session.config.option.results
    if path is None or exitstatus != 0:
        return
    result = {
        "what": "seconds of a call, and time of the other / time of ours inside a round: median and quartiles",
        "command": "make bench",
        "threads": session.config.option.threads,
        "path": native.chosen(),
        "results": session.config.stash[ENTRIES],
        **describe(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """The ratios, which pytest-benchmark's own tables do not show."""
    terminalreporter.section("time of the other / time of ours, inside a round: median (quartiles)")
    for entry in config.stash[ENTRIES]:
        if not entry["name"].startswith("ours"):
            r = entry["ratio"]
            what = f"{entry['stage']}: {entry['group']}: {entry['name']}"
            terminalreporter.write_line(f"{what:<100} {r['median']:8.2f} ({r['low']:.2f}-{r['high']:.2f})")
