"""Reads files that are out to break their loaders: each must end soon, with a result or with a one-line error.

OMP_NUM_THREADS=1 python -m benches.hostile_files               # every room; prints tried and held
OMP_NUM_THREADS=1 python -m benches.hostile_files data models --show
"""

from __future__ import annotations

import argparse
import collections
import os
import random
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from benches.hostile import configs, data, importers, models, tables, tasks
from benches.hostile.case import Case, tried_apart

ROOMS: dict[str, Callable[[random.Random, Path], Iterator[Case]]] = {
    "data": data.cases,
    "configurations": configs.cases,
    "tasks": tasks.cases,
    "models": models.cases,
    "importers": importers.cases,
    "tables": tables.cases,
}


def main() -> None:
    """Try every case of the rooms asked for and print how many held."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("rooms", nargs="*", choices=[*ROOMS, []], default=[])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show", action="store_true", help="print every case that did not hold")
    args = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
    for name in args.rooms or ROOMS:
        with tempfile.TemporaryDirectory() as shared:
            found = {case.name: tried_apart(case) for case in ROOMS[name](random.Random(args.seed), Path(shared))}
        kinds = collections.Counter(outcome.kind for outcome in found.values())
        held = sum(outcome.held for outcome in found.values())
        slowest = max(outcome.seconds for outcome in found.values())
        largest = max(outcome.resident for outcome in found.values()) / 2**30
        others = ", ".join(f"{kind} {count}" for kind, count in sorted(kinds.items()))
        print(
            f"{name:<16} tried {len(found):>4}  held {held:>4}  slowest {slowest:.1f} s  {largest:.1f} GiB  ({others})"
        )
        if args.show:
            for case, outcome in found.items():
                if not outcome.held:
                    spent = f"{outcome.seconds:.1f} s, {outcome.resident >> 20} MiB"
                    print(f"    {case}: {outcome.kind} {outcome.text} ({spent})")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
