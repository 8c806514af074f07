"""Start Python processes that run no file of the current folder.

`python -m` and `python -c` put the current folder first on the path, and PYTHONPATH may name it: a `sympy.py` that came
with somebody's data would then run in place of the library.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_WORKER = Path(__file__).with_name("limited_worker.py")


@dataclass(frozen=True)
class Limited:
    """The result of a limited process: `output`, `errors`, and the limit that stopped it ("", "time" or "memory")."""

    output: bytes
    errors: bytes
    stopped: str


def limited(work: Mapping[str, Any], *, seconds: int, memory: int) -> Limited:
    """Run a task of `limited_worker` in a process limited to `seconds` of processor time and `memory` bytes.

    `work` holds the task's name under "task", and plain values.
    """
    sent = pickle.dumps({**work, "seconds": seconds, "memory": memory})
    command = [sys.executable, "-I", str(_WORKER)]
    # Each thread of numpy's OpenBLAS takes address space, which is limited.
    environment = isolated_environment() | {"OPENBLAS_NUM_THREADS": "1"}
    try:
        done = subprocess.run(command, input=sent, capture_output=True, timeout=6 * seconds, cwd="/", env=environment)
    except subprocess.TimeoutExpired as over:
        return Limited(b"", over.stderr or b"", "time")
    if done.returncode < 0:
        return Limited(b"", done.stderr, "time")
    return Limited(done.stdout, done.stderr, "memory" if b"MemoryError" in done.stderr else "")


def isolated_environment() -> dict[str, str]:
    """Return this process's environment without the variables that make Python import or run other files."""
    unsafe = ("PYTHONPATH", "PYTHONSTARTUP", "PYTHONHOME", "PYTHONINSPECT", "PYTHONUSERBASE", "PYTHONBREAKPOINT")
    return {name: value for name, value in os.environ.items() if name not in unsafe}


def trusted_folders() -> list[str]:
    """Return the folders of this process's path that are absolute and are not the current folder."""
    try:
        here = Path.cwd().resolve()
    except FileNotFoundError:
        # The current folder was deleted.
        here = None
    return [entry for entry in sys.path if Path(entry).is_absolute() and Path(entry).resolve() != here]


def safe_environment() -> dict[str, str]:
    """Return this process's environment with only the absolute folders of PYTHONPATH: `.` is any current folder."""
    found = dict(os.environ)
    if "PYTHONPATH" in found:
        folders = [folder for folder in found["PYTHONPATH"].split(os.pathsep) if Path(folder).is_absolute()]
        found["PYTHONPATH"] = os.pathsep.join(folders)
    return found


@contextlib.contextmanager
def current_folder_off_path() -> Iterator[None]:
    """Start processes inside the block, as those of `multiprocessing`, without the current folder on their path.

    Their environment passes this on to their own children. The path that `multiprocessing` hands on from this process
    is not changed.
    """
    before = {name: os.environ.get(name) for name in ("PYTHONSAFEPATH", "PYTHONPATH")}
    os.environ.update(safe_environment() | {"PYTHONSAFEPATH": "1"})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
