"""Builds the C++ core with address and undefined-behaviour sanitizers and runs its own tests."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from influence_fast.products import native

HERE = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.exhaustive
def test_core_under_sanitizers(tmp_path: Path) -> None:
    cmake = shutil.which("cmake")
    if cmake is None:
        pytest.skip("cmake is not installed")
    if not any(shutil.which(c) for c in (os.environ.get("CXX", ""), "c++", "g++", "clang++") if c):
        pytest.skip("no C++ compiler is installed")
    if _run(cmake, "-S", str(HERE), "-B", str(tmp_path), check=False).returncode:
        pytest.skip("the C++ compiler could not be configured")
    if "undefined reference to `__asan" in (build := _run(cmake, "--build", str(tmp_path), "-j2", check=False)).stdout:
        pytest.skip("the compiler has no sanitizer libraries")
    assert build.returncode == 0, build.stdout
    done = _run(str(tmp_path / "test_core"), check=False)
    assert done.returncode == 0, done.stdout
    ran = {line.split(":")[0] for line in done.stdout.splitlines() if line.endswith(": ok")}
    assert "portable" in ran
    if native.load()[0] is not None:
        assert ran == set(native.build_config()["available"])


def _run(*command: str, check: bool) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}  # leak checks need ptrace, absent in containers
    return subprocess.run(
        command, check=check, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment
    )
