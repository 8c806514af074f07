"""Run the grading worker: read pairs of answers as JSON lines and write verdicts. Started by `worker.Worker` alone.

It is run as a file with `python -I`, so that neither the current folder nor PYTHONPATH is on its path.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from pathlib import Path

# Bytes of address space: 9^9^9^9 must fail here and not exhaust the machine.
MEMORY = 2 << 30


class _OutOfTime(BaseException):
    """An interruption that is no Exception, since math-verify and sympy catch those."""


def _find_packages(others: list[str]) -> None:
    """Make this package and math-verify importable where the interpreter's own folders do not have them.

    Added folders come last, so that nothing in them takes the place of a module of the standard library or of an
    installed package.
    """
    from importlib.util import find_spec

    if find_spec("influence_fast") is None:
        sys.path.append(str(Path(__file__).resolve().parents[2]))
    if find_spec("math_verify") is None:
        sys.path.extend(folder for folder in others if folder not in sys.path)


def _limit_memory() -> None:
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    except (ImportError, ValueError, OSError):
        # Without this limit on a system the time limit still holds.
        pass


def _alarm(signum: int, frame: object) -> None:
    raise _OutOfTime


def serve() -> None:
    """Answer requests until the input ends. An alarm ends most overruns, cheaper than a kill and a new import."""
    _limit_memory()
    replies = os.fdopen(os.dup(1), "w")
    # Output of a library must not be read as a reply.
    os.dup2(2, 1)
    logging.disable(logging.CRITICAL)
    _find_packages(sys.argv[1:])
    from influence_fast.evaluation.symbolic import verdict

    signal.signal(signal.SIGALRM, _alarm)
    # This imports sympy and warms up math-verify's parser before any time is measured.
    verdict(r"\sum_{k=1}^{3} k^2", "14")
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        correct, note = False, "compared by math-verify"
        try:
            signal.setitimer(signal.ITIMER_REAL, request["timeout"])
            correct, note = verdict(request["answer"], request["gold"])
        except _OutOfTime:
            note = f"timed out after {request['timeout']:g} s"
        except (Exception, RecursionError, MemoryError) as error:
            note = f"comparison failed: {type(error).__name__}"
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps({"correct": correct, "note": note}), file=replies, flush=True)


if __name__ == "__main__":
    serve()
