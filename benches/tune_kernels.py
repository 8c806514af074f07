"""Tile sizes of the bandwidth-bound kernels, tried on the card at hand; where another wins, change `configuration`.

    python -m benches.tune_kernels [--output tuning.json]

Every candidate is compiled first, several at a time, and then timed as `gpu_session` times kernels. The figure is the
share of the measured copy bandwidth that the bytes of `cost` make of the time; `*` marks what `configuration` chooses.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benches.card_kernels import AHEAD, DIM, MODULES, RANK, both_sides, copy_bandwidth, timed
from influence_fast.kernels import segment_outer as outer
from influence_fast.kernels import skinny_project as skinny
from influence_fast.kernels.segments import Segments

TOKENS, EXAMPLES = 16_384, 16
CUDA = torch.device("cuda")


@dataclass(frozen=True)
class Candidate:
    """One way to launch one kernel at one shape."""

    shape: str
    tiles: str
    chosen: bool
    bytes: int
    run: Callable[[], Any]


def with_tiles(module: Any, tiles: dict[str, int], call: Callable[[], Any]) -> Callable[[], Any]:
    """`call` with `configuration` of the module returning these tiles."""

    def run() -> Any:
        with mock.patch.object(module, "configuration", side_effect=lambda *_, **__: dict(tiles)):
            return call()

    return run


def described(tiles: dict[str, int], note: str = "") -> str:
    return " ".join(f"{name.removeprefix('BLOCK_')}={value}" for name, value in tiles.items()) + note


def projections() -> Iterator[Candidate]:
    tried = [
        {"BLOCK_T": t, "BLOCK_K": k, "num_warps": warps, "num_stages": stages}
        for t, k, warps, stages in (
            (32, 64, 2, 6),
            (32, 128, 4, 4),
            (32, 256, 4, 3),
            (64, 64, 4, 3),
            (64, 64, 4, 4),
            (64, 64, 4, 6),
            (64, 128, 4, 3),
            (64, 128, 4, 4),
            (64, 128, 8, 4),
            (64, 256, 8, 3),
            (128, 64, 4, 3),
            (128, 64, 4, 5),
            (128, 64, 8, 3),
            (128, 64, 8, 4),
            (128, 64, 8, 5),
            (128, 128, 8, 3),
            (128, 128, 8, 4),
        )
    ]
    for d, (columns, by_column) in product((3584, 18_944), ((32, False), (32, True), (64, False))):
        x = torch.randn(TOKENS, d, device=CUDA).bfloat16()
        w = torch.randn(d, columns, device=CUDA).bfloat16()
        w = w.T.contiguous().T if by_column else w  # as forward weights lie, and as backward weights do
        chosen = skinny.configuration(columns, 2)
        for tiles in tried if chosen in tried else [chosen, *tried]:
            for split in (False, True) if tiles == chosen else (False,):
                yield Candidate(
                    f"skinny_project d={d} N={columns} w by {'column' if by_column else 'row'}",
                    described(tiles, " split" if split else ""),
                    tiles == chosen and not split,
                    skinny.cost(TOKENS, d, columns).bytes,
                    with_tiles(skinny, tiles, lambda x=x, w=w, s=split: skinny.skinny_project(x, w, split=s)),
                )


def sums() -> Iterator[Candidate]:
    segments = Segments.from_lengths([TOKENS // EXAMPLES] * EXAMPLES, device=CUDA)
    sides = both_sides(CUDA, TOKENS, MODULES)
    rows = torch.empty(EXAMPLES, 2 * MODULES * DIM * RANK, device=CUDA)
    chosen = outer.configuration(RANK, DIM, 2)
    for length, warps, stages in product((64, 128, 256), (1, 2, 4), (2, 3)):
        tiles = {"BLOCK_L": length, "BLOCK_A": 16, "BLOCK_B": 16, "num_warps": warps, "num_stages": stages}

        def both() -> None:
            for a, b, at in sides:
                outer.segment_outer(a, b, segments, rows, at)

        cost = 2 * outer.cost(TOKENS, EXAMPLES, MODULES, RANK, DIM, row_itemsize=4).bytes
        shape = f"segment_outer M={MODULES} both sides"
        yield Candidate(shape, described(tiles), tiles == chosen, cost, with_tiles(outer, tiles, both))
    start = torch.zeros(1, dtype=torch.int64, device=CUDA)
    for d, wide_left in product((3584, 18_944), (False, True)):
        narrow = torch.randn(TOKENS, 1, RANK, device=CUDA).bfloat16()
        wide = torch.randn(TOKENS, 1, d, device=CUDA).bfloat16()
        left, right = (wide, narrow) if wide_left else (narrow, wide)
        exact = torch.empty(EXAMPLES, RANK * d, device=CUDA)
        chosen = outer.configuration(left.shape[2], right.shape[2], 2)
        for length, across, warps, stages in product((64, 128), (64, 128, 256), (2, 4, 8), (3, 4)):
            if across > 64 * warps // 2:
                continue  # more than 32 sums a thread
            a, b = (across, 16) if wide_left else (16, across)
            tiles = {"BLOCK_L": length, "BLOCK_A": a, "BLOCK_B": b, "num_warps": warps, "num_stages": stages}
            for whole in (False, True):
                run = partial(outer.segment_outer, left, right, segments, exact, start, whole=whole)
                yield Candidate(
                    f"segment_outer {left.shape[2]}x{right.shape[2]} exact",
                    described(tiles, " whole" if whole else ""),
                    tiles == chosen,
                    outer.cost(TOKENS, EXAMPLES, 1, RANK, d, row_itemsize=4).bytes,
                    with_tiles(outer, tiles, run),
                )


def compile_all(candidates: list[Candidate], share: int, shares: int) -> None:
    """Fills Triton's cache with every `shares`-th candidate."""
    for candidate in candidates[share::shares]:
        with contextlib.suppress(Exception):  # too much shared memory, say: seen again when it is timed
            candidate.run()


def compile_in_processes(count: int) -> None:
    """`compile_all` in so many processes: most of a compilation holds Python's lock."""
    commands = [[sys.executable, "-m", "benches.tune_kernels", "--compile", f"{i}/{count}"] for i in range(count)]
    root = Path(__file__).resolve().parents[1]  # `python -m` puts the folder it runs in first on the path
    for process in [subprocess.Popen(command, stderr=subprocess.DEVNULL, cwd=root) for command in commands]:
        process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--compile", help=argparse.SUPPRESS)  # SHARE/SHARES: a process of `compile_in_processes`
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no CUDA device: nothing to tune")
    if not args.compile:
        compile_in_processes(max(1, min(8, os.cpu_count() or 1)))  # each holds the tensors of all candidates, some 6 GB
    candidates = [*projections(), *sums()]
    if args.compile:
        share, _, shares = args.compile.partition("/")
        compile_all(candidates, int(share), int(shares))
        return
    bandwidth = copy_bandwidth(CUDA, 4 * TOKENS * 18_944, 20)
    found: dict[str, list[tuple[float, str]]] = {}
    for candidate in candidates:
        try:
            seconds = statistics.median(timed(CUDA, candidate.run, args.rounds, AHEAD))
        except Exception as error:
            print(f"{candidate.shape} {candidate.tiles}: {type(error).__name__}", file=sys.stderr)
            continue
        label = candidate.tiles + (" *" if candidate.chosen else "")
        found.setdefault(candidate.shape, []).append((candidate.bytes / seconds / bandwidth, label))
    for shape, results in found.items():
        results.sort(reverse=True)
        shown = results[:4] + [result for result in results[4:] if result[1].endswith("*")]
        print(f"{shape}: " + "; ".join(f"{share:.0%} {label}" for share, label in shown))
    if args.output:
        args.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
