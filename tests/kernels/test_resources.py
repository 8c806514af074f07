"""Every kernel, compiled ahead of time in its default configurations: no spills, within shared memory."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benches.kernel_resources import NEWER

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def resources() -> list[dict]:
    pytest.importorskip("triton", reason="triton is not installed: the kernels cannot be compiled")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "benches.kernel_resources", "--format", "json", "--arch", arch],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        for arch in ("80", "90")
    ]
    rows = []
    for process in started:
        out, errors = process.communicate()
        assert out.startswith("["), f"{out[-5_000:]}\n{errors[-10_000:]}"
        rows += json.loads(out)
    return rows


@pytest.mark.slow
def test_no_kernel_spills_registers(resources: list[dict]) -> None:
    spilled = [f"{row['case']} sm_{row['arch']}: {row['spills']} bytes" for row in resources if row["spills"]]
    assert not spilled


@pytest.mark.slow
def test_shared_memory_fits_the_card(resources: list[dict]) -> None:
    limit = {80: 163 * 1024, 90: 227 * 1024}
    too_large = [f"{row['case']} sm_{row['arch']}" for row in resources if row["shared"] > limit[row["arch"]]]
    assert not too_large


@pytest.mark.slow
def test_every_kernel_is_compiled_for_every_architecture_it_is_for(resources: list[dict]) -> None:
    written = set()
    for file in (ROOT / "kernels").glob("*.py"):
        written |= set(re.findall(r"^def (_\w+_kernel)\(", file.read_text(), re.MULTILINE))
    assert len(written) >= 10
    for arch in (80, 90):
        left_out = {kernel for kernel, lowest in NEWER.items() if arch < lowest}
        assert {row["kernel"] for row in resources if row["arch"] == arch} == written - left_out
