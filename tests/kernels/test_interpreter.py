"""Runs the kernels in Triton's interpreter, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest

HERE = Path(__file__).parent


@pytest.mark.slow
def test_kernels_agree_with_float64_in_the_interpreter() -> None:
    triton = pytest.importorskip("triton", reason="triton is not installed: the kernels cannot be interpreted")
    versions = (triton.__version__.split(".")[:2], numpy.__version__.split(".")[:2])
    old_triton, new_numpy = (tuple(map(int, version)) for version in versions)
    if old_triton < (3, 7) and new_numpy >= (2, 4):
        pytest.skip("the interpreter of triton 3.6 breaks with numpy 2.4: install triton 3.7 or numpy 2.3")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "interpreted", str(HERE)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=HERE.parents[1])
    summary = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else "no output"
    assert done.returncode == 0, f"{done.stdout[-20_000:]}\n{done.stderr[-5_000:]}"
    assert " passed" in summary
    assert "skipped" not in summary
