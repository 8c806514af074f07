"""Start Python processes that run no file of the current folder.

`python -m` and `python -c` put the current folder first on the path, and PYTHONPATH may name it: a `sympy.py` that came
with somebody's data would then run in place of the library.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path


def isolated_environment() -> dict[str, str]:
    """Return this process's environment without what makes Python import or run other files."""
    unsafe = ("PYTHONPATH", "PYTHONSTARTUP", "PYTHONHOME", "PYTHONINSPECT", "PYTHONUSERBASE", "PYTHONBREAKPOINT")
    return {name: value for name, value in os.environ.items() if name not in unsafe}


def trusted_folders() -> list[str]:
    """Return the folders of this process's path that are absolute and are not the current folder."""
    try:
        here = Path.cwd().resolve()
    except FileNotFoundError:  # the current folder was deleted
        here = None
    return [entry for entry in sys.path if Path(entry).is_absolute() and Path(entry).resolve() != here]


def safe_environment() -> dict[str, str]:
    """Return this process's environment with the absolute folders of PYTHONPATH alone; `.` is whatever is current."""
    found = dict(os.environ)
    if "PYTHONPATH" in found:
        folders = [folder for folder in found["PYTHONPATH"].split(os.pathsep) if Path(folder).is_absolute()]
        found["PYTHONPATH"] = os.pathsep.join(folders)
    return found


@contextlib.contextmanager
def current_folder_off_path() -> Iterator[None]:
    """Let processes started inside, as those of `multiprocessing`, begin without the current folder on their path.

    Their own settings and those of their children hold it too. The path that `multiprocessing` hands on from this
    process is not changed.
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
