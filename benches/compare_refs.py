"""This working tree against another commit: every suite's own code, built from both, in rounds in turn.

    python -m benches.compare_refs BASE [--suites inner_products ranks] [--rounds 9] [--threads 2] [--quick]
                                   [--output ratios.json]

Both sides are installed into temporary folders (so each has its own native module, built in the same way) and run on
this virtual environment's other packages, in a process each; the processes take turns round by round. The cases are
those of this tree's `benches/suites`; one that calls what BASE lacks is BASE's own of the same name on that side, which
the line says, and one that BASE cannot run at all is named. Nothing is asserted: where every round
says that this tree is slower or faster the line is marked, and a person decides.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from benches.environment import describe
from benches.interleave import ratios, spread, timed
from benches.suites.case import STAGES, Scale, cases_of
from influence_fast.products import native

ROOT = Path(__file__).resolve().parents[1]
SIDES = ("BASE", "this tree")
FEWEST_ROUNDS = 5  # equal sides agree in all of 5 rounds once in 16 times, in all of 9 once in 256
ROUND_SECONDS, MOST_CALLS = 0.05, 50  # short calls are repeated within a round


def line(name: str, base: Sequence[float], own: Sequence[float]) -> str:
    """One case: milliseconds of both sides, BASE / this tree with its quartiles, and the mark."""
    ratio = ratios(base, own)
    return (
        f"{name:<64.64} {1e3 * spread(base).median:10.2f} {1e3 * spread(own).median:10.2f} "
        f"{ratio.median:8.2f} ({ratio.low:.2f}-{ratio.high:.2f}){mark(base, own)}"
    )


def mark(base: Sequence[float], own: Sequence[float]) -> str:
    """A word where every round says the same of this tree, and there are enough rounds for that to mean something."""
    faster = [other > mine for other, mine in zip(base, own, strict=True)]
    if len(faster) < FEWEST_ROUNDS or len(set(faster)) > 1:
        return ""
    return "  faster" if faster[0] else "  slower"


def snapshot(ref: str, folder: Path) -> str:
    """The files of commit `ref` into `folder`; returns its full name. Exits where there is no such commit."""
    found = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "--verify", "--quiet", f"{ref}^{{commit}}"],
        capture_output=True,
        text=True,
    )
    if found.returncode:
        sys.exit(
            f"{ref!r} is no commit of {ROOT}; give a branch, a tag or a hash, as in `make bench-compare BASE=main`"
        )
    # An archive, not a worktree: nothing is left in .git where this is interrupted.
    commit = found.stdout.strip()
    path = folder.with_suffix(".tar")
    subprocess.run(["git", "-C", str(ROOT), "archive", f"--output={path}", commit], check=True)
    with tarfile.open(path) as tar:
        tar.extractall(folder, filter="data")
    return commit


def install(source: Path, target: Path, build: Path) -> None:
    """The package at `source`, native module and all, into the folder `target`."""
    command = [sys.executable, "-I", "-m", "pip", "install", "--quiet", "--no-deps", "--disable-pip-version-check"]
    command += ["--target", str(target), f"--config-settings=build-dir={build}", str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"building {source} failed:\n{done.stderr[-4000:]}")


class Side:
    """A process with one side's package, told case by case and round by round what to run."""

    def __init__(self, package: Path, scale: Mapping[str, Any], errors: Path, cases: Path = ROOT) -> None:
        # Without `site` the editable install's import hook, which would win over any path, is not there.
        paths = [package, cases, sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))}
        self.errors = errors.open("w")
        self.process = subprocess.Popen(
            [sys.executable, "-S", "-P", "-m", "benches.compare_refs", "--serve", json.dumps(dict(scale))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            env=environment,
            text=True,
        )
        where = Path(self._answer()["package"])
        if package not in where.parents:
            raise RuntimeError(f"the package was to come from {package}, and came from {where}")

    def ask(self, **question: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        print(json.dumps(question), file=self.process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        text = self.process.stdout.readline()
        if not text:
            self.errors.close()
            raise RuntimeError(f"a benchmark process ended:\n{Path(self.errors.name).read_text()[-4000:]}")
        return dict(json.loads(text))

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()
        self.errors.close()


def repeated(run: Callable[[], Any], calls: int) -> Callable[[], None]:
    def every() -> None:
        for _ in range(calls):
            run()

    return every


def serve(options: Mapping[str, Any]) -> None:
    """The process behind `Side`, line by line: {"build": [stage, name]} makes a case, {"run": n} calls it n times.

    Either is answered with {"seconds": of one call} or {"error": why not}.
    """
    import torch

    import influence_fast

    answers, sys.stdout = sys.stdout, sys.stderr  # whatever a case prints is no answer
    torch.set_num_threads(options["threads"])

    def answer(**values: Any) -> None:
        print(json.dumps(values), file=answers, flush=True)

    answer(package=str(influence_fast.__file__))
    run: Callable[[], Any] | None = None
    with tempfile.TemporaryDirectory() as folder:
        for number, text in enumerate(sys.stdin):
            question = json.loads(text)
            try:
                if "build" in question:
                    run = None  # the last case's inputs go before the next one's come
                    stage, group = question["build"]
                    empty = Path(folder) / str(number)
                    empty.mkdir()
                    torch.manual_seed(0)
                    case = next((case for case in cases_of(stage) if case.group == group), None)
                    if case is None:
                        raise LookupError(f"no case {group!r} in the suite {stage}")
                    run = case.variants(Scale(options["quick"], options["threads"], empty))[case.names[0]]
                    run()
                    answer(seconds=timed(run))
                else:
                    assert run is not None
                    answer(seconds=timed(repeated(run, question["run"])) / question["run"])
            except Exception as error:  # BASE may lack what a case calls: that is an answer too
                answer(error=f"{type(error).__name__}: {error}".splitlines()[0])


class CannotRunError(Exception):
    """One side cannot run a case: the message says which and why."""


def compare(sides: Mapping[str, Side], stage: str, group: str, rounds: int) -> dict[str, list[float]]:
    """Seconds of a call on each side in each round, after one round to warm up. Raises CannotRunError."""

    def ask(name: str, **question: Any) -> float:
        answer = sides[name].ask(**question)
        if "error" in answer:
            raise CannotRunError(f"{name}: {answer['error']}")
        return float(answer["seconds"])

    names = list(sides)
    slowest = max([ask(name, build=[stage, group]) for name in names])
    calls = max(1, min(MOST_CALLS, int(ROUND_SECONDS / slowest)))
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for index in range(-1, rounds):
        for name in names if index % 2 == 0 else names[::-1]:
            found = ask(name, run=calls)
            if index >= 0:
                seconds[name].append(found)
    return seconds


@contextmanager
def both_sides(base: str, options: Mapping[str, Any]) -> Iterator[tuple[dict[str, Side], dict[str, Side], str]]:
    """Build and start both sides; yield them, them with BASE's own cases on its side, and the full name of BASE."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        work = Path(folder)
        (work / "source").mkdir()
        commit = snapshot(base, work / "source")
        sides = {}
        for number, (name, source) in enumerate(zip(SIDES, (work / "source", ROOT), strict=True)):
            print(f"building {name} ...", file=sys.stderr, flush=True)
            package = work / f"package-{number}"
            install(source, package, work / f"build-{number}")
            sides[name] = Side(package, options, work / f"errors-{number}.txt")
            stack.callback(sides[name].close)
        old = work / "source"
        with_own = dict(sides)
        if (old / "benches" / "suites").is_dir():
            # Its cases, told by this tree's protocol.
            shutil.copy(__file__, old / "benches" / "compare_refs.py")
            with_own[SIDES[0]] = Side(work / "package-0", options, work / "errors-own.txt", old)
            stack.callback(with_own[SIDES[0]].close)
        yield sides, with_own, commit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base", nargs="?", help="a branch, a tag or a hash")
    parser.add_argument("--suites", nargs="+", default=list(STAGES), choices=STAGES)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=native.default_threads())
    parser.add_argument("--quick", action="store_true", help="tiny sizes, two rounds: does it run?")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--serve", type=json.loads, help=argparse.SUPPRESS)  # the processes of `Side`
    args = parser.parse_args()
    if args.serve:
        serve(args.serve)
        return
    if not args.base:
        parser.error("say what to compare with: make bench-compare BASE=<branch, tag or hash>")
    if args.quick and args.output:
        parser.error("--quick times nothing worth keeping: leave out --output")
    rounds = 2 if args.quick else args.rounds
    results: dict[str, Any] = {}
    with both_sides(args.base, {"quick": args.quick, "threads": args.threads}) as (sides, with_own, commit):
        print(f"BASE is {commit[:12]}; ms, ms, BASE / this tree: median (quartiles) of {rounds} rounds")
        for stage in args.suites:
            for case in cases_of(stage):
                name = f"{stage}: {case.group}"
                for pair, note in ((sides, ""), (with_own, "  (BASE's own case)")):
                    try:
                        seconds = compare(pair, stage, case.group, rounds)
                    except CannotRunError as error:
                        why = str(error)
                        continue
                    print(line(name, *seconds.values()) + note, flush=True)
                    results[name] = seconds
                    break
                else:
                    print(f"{name:<64.64} not compared ({why})", flush=True)
                    results[name] = {"not compared": why}
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        found = {"base": commit, "threads": args.threads, "seconds": results, **describe()}
        args.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
