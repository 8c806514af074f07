"""The grading worker: a process that no file of the current folder or PYTHONPATH gets into."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from influence_fast.errors import ConfigError
from influence_fast.evaluation import worker
from influence_fast.evaluation.worker import Worker
from influence_fast.isolation import current_folder_off_path, isolated_environment, trusted_folders

# It depends on a clock or on other processes: a failure is run once more and listed (RERUN).
pytestmark = pytest.mark.flaky(reruns=1)

# Modules of the standard library, of math-verify, and those that Python runs at its start.
HOSTILE = (
    *("sitecustomize", "usercustomize", "json", "logging", "signal", "resource", "threading", "re", "fractions"),
    *("sympy", "math_verify", "mpmath", "latex2sympy2_extended", "antlr4", "gmpy2", "flint", "numpy", "influence_fast"),
)
PROGRAM = """
import os, sys
from influence_fast.evaluation.grading import equal_answers
os.environ["PYTHONPATH"] = {path!r}
os.chdir({folder!r})
if {listed!r}:
    sys.path.insert(0, "")
    sys.path.insert(0, {folder!r})
print(equal_answers({answer!r}, {gold!r}, timeout=60.0))
"""


@pytest.fixture
def hostile_folder(tmp_path: Path) -> Path:
    for name in HOSTILE:
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'a').write({name!r} + ' ')\n")
    return tmp_path


def ran(folder: Path) -> str:
    marker = folder / "ran"
    return marker.read_text() if marker.exists() else ""


def test_the_hostile_folder_runs_where_nothing_keeps_it_out(hostile_folder: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": "."}
    subprocess.run([sys.executable, "-c", "import gmpy2"], cwd=hostile_folder, env=environment, check=False)
    assert "sitecustomize" in ran(hostile_folder)


@pytest.mark.parametrize("path", ["", ".", ":", "{folder}", ".:{folder}"])
def test_grading_runs_no_file_of_folder_or_pythonpath(
    hostile_folder: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.chdir(hostile_folder)
    monkeypatch.setenv("PYTHONPATH", path.format(folder=hostile_folder))
    grader = Worker()
    try:
        assert grader.verify(r"\sqrt{8}", r"2\sqrt{2}", 60.0) == (True, "compared by sympy")
        assert grader.verify(r"\sum_{k=1}^{3} k^2", "14", 60.0) == (True, "compared by math-verify")
    finally:
        grader.stop()
    assert ran(hostile_folder) == ""


@pytest.mark.parametrize("listed", [False, True])
def test_grading_in_a_fresh_process_runs_nothing_either(hostile_folder: Path, listed: bool) -> None:
    program = PROGRAM.format(path=".", folder=str(hostile_folder), listed=listed, answer=r"\sqrt{8}", gold=r"2\sqrt{2}")
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "(True, 'compared by sympy')", done.stderr
    assert ran(hostile_folder) == ""


def test_processes_of_multiprocessing_start_without_the_folder(hostile_folder: Path) -> None:
    (hostile_folder / "multiprocessing.py").write_text((hostile_folder / "json.py").read_text())
    program = (
        "import concurrent.futures, multiprocessing, os\n"
        "from influence_fast.isolation import current_folder_off_path\n"
        "import math\n"
        f"os.chdir({str(hostile_folder)!r})\n"
        "os.environ['PYTHONPATH'] = '.'\n"
        "with current_folder_off_path():\n"
        "    context = multiprocessing.get_context('spawn')\n"
        "    with concurrent.futures.ProcessPoolExecutor(1, context) as pool:\n"
        "        print(list(pool.map(math.sqrt, [4.0])))\n"
    )
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[2.0]", done.stderr
    assert ran(hostile_folder) == ""


def test_the_environment_is_restored_after_processes_started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PYTHONPATH", f".:{tmp_path}:")
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    with current_folder_off_path():
        assert (os.environ["PYTHONSAFEPATH"], os.environ["PYTHONPATH"]) == ("1", str(tmp_path))
    assert "PYTHONSAFEPATH" not in os.environ
    assert os.environ["PYTHONPATH"] == f".:{tmp_path}:"
    assert "PYTHONPATH" not in isolated_environment()


def test_trusted_folders_are_absolute_and_not_the_current(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", ".", str(tmp_path), "relative", "/usr/lib/python"])
    assert trusted_folders() == ["/usr/lib/python"]


def test_a_worker_that_does_not_start_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with pytest.raises(ConfigError, match=r"worker did not start: run `.*false -I .*worker_main.py` to see"):
        Worker().verify("x", "y", 5.0)


def test_the_worker_finds_its_packages_on_the_path_of_its_owner(monkeypatch: pytest.MonkeyPatch) -> None:
    # As for an interpreter whose own folders do not have them: `-S` leaves out site-packages.
    folders = [sys.executable, "-I", "-S", str(worker.PROGRAM), *trusted_folders()]
    done = subprocess.run(folders, input="", capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["ready"], done.stderr
