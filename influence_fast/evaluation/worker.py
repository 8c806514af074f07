"""Own the grading worker, a process of its own: no exception stops sympy in C code or its use of memory.

math-verify's own limits need the main thread. A worker that overruns is killed and replaced.
"""

from __future__ import annotations

import atexit
import json
import os
import queue
import subprocess
import sys
import threading
from pathlib import Path

from influence_fast.errors import ConfigError
from influence_fast.isolation import isolated_environment, trusted_folders

START_LIMIT = 120.0  # seconds for the worker to import sympy, on a busy machine
PROGRAM = Path(__file__).resolve().with_name("worker_main.py")


class Worker:
    """Own one worker process, which reads and writes a JSON line a pair; it starts on first use and after a kill."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._owner = 0

    def verify(self, answer: str, gold: str, timeout: float) -> tuple[bool, str]:
        """Return the worker's verdict and a note; (False, "timed out ...") where it takes over `timeout` seconds.

        Raises ConfigError where the worker does not start.
        """
        with self._lock:
            # A worker may have died since its last item, so a new one gets a second try.
            for _ in range(2):
                process = self._started()
                request = {"answer": answer, "gold": gold, "timeout": timeout}
                try:
                    assert process.stdin is not None
                    process.stdin.write(json.dumps(request) + "\n")
                    process.stdin.flush()
                    line = self._lines.get(timeout=timeout + 1.0)
                except queue.Empty:
                    self.stop()
                    return False, f"timed out after {timeout:g} s"
                except (BrokenPipeError, OSError):
                    line = None
                if line is not None:
                    reply = json.loads(line)
                    return bool(reply["correct"]), str(reply["note"])
                self.stop()
            return False, "the grading worker died on this answer"

    def _started(self) -> subprocess.Popen[str]:
        if self._process is not None and self._process.poll() is None and self._owner == os.getpid():
            return self._process
        self._process = subprocess.Popen(
            [sys.executable, "-I", str(PROGRAM), *trusted_folders()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
            cwd=PROGRAM.parent,
            env={**isolated_environment(), "OMP_NUM_THREADS": "1"},
        )
        self._owner = os.getpid()
        self._lines = queue.Queue()
        threading.Thread(target=_pump, args=(self._process, self._lines), daemon=True).start()
        try:
            ready = self._lines.get(timeout=START_LIMIT)
        except queue.Empty:
            ready = None
        if ready is None:
            self.stop()
            raise ConfigError(f"the grading worker did not start: run `{sys.executable} -I {PROGRAM}` to see why")
        return self._process

    def stop(self) -> None:
        """Kill the worker; the next item starts a new one."""
        if self._process is not None and self._owner == os.getpid():
            self._process.kill()
            self._process.wait()
        self._process = None


def _pump(process: subprocess.Popen[str], lines: queue.Queue[str | None]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        lines.put(line)
    # None says that the worker has ended.
    lines.put(None)


WORKER = Worker()
atexit.register(WORKER.stop)
