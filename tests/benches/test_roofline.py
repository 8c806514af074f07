"""benches: floors and shares, ratios inside rounds, plots from result files, the comparison of two commits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benches import compare_refs, roofline
from benches.interleave import ratios, spread, summary
from benches.suites import plots
from benches.suites.case import STAGES, Case, Scale, cases_of
from influence_fast.kernels.runtime import Cost

MACHINE: dict[str, Any] = {
    "command": "make bench",
    "threads": 2,
    "path": "portable",
    "machine": {"cpu": "a processor", "cores": 2, "gpu": None},
    "versions": {"influence-fast": "0.1.0", "torch": "2", "python": "3.11"},
    "commit": "0123456789ab",
    "measured": "2026-01-02T03:04:05+00:00",
}


@pytest.mark.parametrize(
    ("cost", "seconds"),
    [(Cost(flops=10, bytes=400), 4.0), (Cost(flops=10_000, bytes=400), 10.0), (Cost(flops=0, bytes=50), 0.5)],
)
def test_a_floor_is_the_longer_of_moving_and_multiplying(cost: Cost, seconds: float) -> None:
    assert roofline.floor_seconds(cost, bandwidth=100.0, peak=1000.0) == seconds


def test_a_share_is_taken_inside_its_round() -> None:
    # The machine is half as fast in the second round, ceilings and stage alike: the share does not move.
    found = roofline.shares(
        [("moved", Cost(0, 100), "fp32"), ("multiplied", Cost(900, 10), "int8")],
        {"moved": [2.0, 4.0], "multiplied": [1.0, 2.0]},
        bandwidth=[100.0, 50.0],
        peaks={"fp32": [1.0, 0.5], "int8": [1000.0, 500.0]},
    )
    assert [(stage["bound"], stage["share"]["low"], stage["share"]["high"]) for stage in found] == [
        ("bytes", 0.5, 0.5),
        ("FLOPs", 0.9, 0.9),
    ]


def test_rates_are_amounts_over_seconds() -> None:
    top = roofline.Ceilings({}, {"copy": 8.0, "fp32": 20.0})
    assert top.rates({"copy": [2.0, 4.0], "fp32": [5.0, 1.0]}) == {"copy": [4.0, 2.0], "fp32": [4.0, 20.0]}


def test_ratios_are_of_one_round_and_above_one_where_ours_is_faster() -> None:
    ours, other = [1.0, 10.0, 2.0], [3.0, 30.0, 4.0]
    assert ratios(other, ours) == (3.0, 2.5, 3.0)
    first, second = summary({"ours": ours, "other": other})
    assert first["ratio"] == {"median": 1.0, "low": 1.0, "high": 1.0}
    assert second["seconds"] == spread(other)._asdict()
    with pytest.raises(ValueError, match="no round was timed"):
        spread([])


def test_a_line_is_marked_where_all_of_enough_rounds_agree() -> None:
    slow, fast = [2.0, 2.1, 2.2, 2.0, 2.0], [1.0, 1.1, 1.2, 1.0, 1.0]
    assert compare_refs.line("case", slow, fast).endswith("  faster")
    assert compare_refs.line("case", fast, slow).endswith("  slower")
    assert compare_refs.mark(slow, [*fast[:4], 3.0]) == ""
    assert compare_refs.mark(slow[:4], fast[:4]) == ""


def test_an_unknown_commit_is_named(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="'no-such-branch' is no commit"):
        compare_refs.snapshot("no-such-branch", tmp_path)


def test_every_suite_has_cases_with_names_of_their_own() -> None:
    for stage in STAGES:
        cases = cases_of(stage)
        groups = [case.group for case in cases]
        assert len(set(groups)) == len(groups) > 0
        assert all(case.names[0].startswith("ours") for case in cases)
        assert all(case.axis is None or case.axis in plots.AXES for case in cases)


def test_a_case_that_builds_something_else_is_an_error(tmp_path: Path) -> None:
    case = Case("sums", ("ours", "theirs"), lambda scale: {"ours": lambda: 1})
    with pytest.raises(ValueError, match=r"'sums' promises \('ours', 'theirs'\) and builds \('ours',\)"):
        case.variants(Scale(True, 1, tmp_path))


def result_files(folder: Path, rng: np.random.Generator) -> None:
    """Invented figures for the real cases."""
    entries = []
    for stage in STAGES:
        for case in cases_of(stage):
            at = {} if case.axis is None else {"axis": case.axis, "at": case.at}
            seconds = {name: rng.uniform(0.5, 2, 5).tolist() for name in case.names}
            entries += [{"stage": stage, "group": case.group, **at, **entry} for entry in summary(seconds)]
    stages = [("reading", Cost(0, 10**9), "fp32"), ("product", Cost(10**12, 10**9), "int8")]
    rates = {name: rng.uniform(1e10, 1e12, 5) for name in ("copy", "read", "fp32", "int8")}
    measured = {
        "ceilings": {name: spread(rate)._asdict() for name, rate in rates.items()},
        "stages": roofline.shares(stages, {s[0]: rng.uniform(1, 2, 5) for s in stages}, rates["copy"], rates),
    }
    (folder / "suites-cpu.json").write_text(json.dumps(MACHINE | {"results": entries}))
    (folder / "roofline-cpu.json").write_text(json.dumps(MACHINE | measured))


def test_plots_come_from_the_result_files_alone(tmp_path: Path) -> None:
    result_files(tmp_path, np.random.default_rng(0))
    written = plots.draw(tmp_path, tmp_path / "docs")
    assert [path.name for path in written] == [
        f"{name}.{kind}" for name in ("roofline", "ratios", "scaling") for kind in ("svg", "png")
    ]
    assert all(path.stat().st_size > 10_000 for path in written)
    ratio_svg, scaling_svg = ((tmp_path / "docs" / f"{name}.svg").read_text() for name in ("ratios", "scaling"))
    assert "mean ranks of 128 queries / bf16 matmul, argsort" in ratio_svg
    assert "1,024 wide" not in ratio_svg  # curves have a plot of their own
    assert "rows N of a score" in scaling_svg
    for svg in (ratio_svg, scaling_svg):
        assert "make bench: a processor, 2 of 2 cores, portable; influence-fast 0.1.0" in svg
    result = json.loads((tmp_path / "roofline-cpu.json").read_text())
    again = plots.save(plots.roofline(result), tmp_path / "again")
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in written[:2]]


def test_no_result_file_is_an_error_that_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"roofline-cpu\.json, suites-cpu\.json; run `make bench` first"):
        plots.draw(tmp_path, tmp_path)
