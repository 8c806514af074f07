"""From kept gradients to scores, each peer's own step over the same rows: a size at which the step counts.

    python -m benches.peers.scoring [--rows 40000] [--width 8192] [--queries 50 512] [--rounds 5]
                                    [--output benches/results/peers-scoring-cpu.json]

`compare` times the step on hundreds of examples, where it takes a millisecond and says little. Here every peer gets
rows with the statistics of gradients in the format that it keeps them in, and makes all N x Q scores of them: rounds
go over all peers in a rotating order, each in a process of its own, warmed once; ratios are taken inside a round.
`scores` is the step itself; `load` what the peer does before it can begin, which a warm process pays once. kronfluence
and logix keep no rows that are scored later, or did not install. Scores are compared with float64 ones by rank.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benches.environment import describe
from benches.models import heavy_tailed
from benches.peers.compare import spread
from benches.peers.install import default_venvs, is_installed, python_of
from benches.peers.stored import CHECKED
from influence_fast.isolation import safe_environment
from influence_fast.products import native
from influence_fast.statistics.ranks import spearman

SCRIPT = Path(__file__).with_name("stored.py")
OURS = ("ours_int8", "ours_bf16")
PEERS = {"bergson": "bergson", "traker": "traker", "less_like": None, "dattri": "dattri"}  # name -> environment
WHAT = {
    "ours_int8": "a store of int8 rows, mapped",
    "ours_bf16": "a store of bf16 rows, mapped",
    "bergson": "an index of fp32 rows, Attributor",
    "traker": "a map of fp32 features, BasicScoreComputer",
    "less_like": "an fp32 tensor by torch.load, torch.matmul",
    "dattri": "an fp32 tensor in memory, its train_rep @ test_rep.T",
}
TARGET = 3.0


def make_rows(folder: Path, rows: int, width: int, queries: int) -> None:
    """rows.npy [N, k] and queries.npy [Q, k], float32, drawn block by block."""
    kept = np.lib.format.open_memmap(folder / "rows.npy", mode="w+", dtype=np.float32, shape=(rows, width))
    for index, first in enumerate(range(0, rows, 4096)):
        last = min(first + 4096, rows)
        kept[first:last] = heavy_tailed(last - first, width, seed=index).numpy()
    kept.flush()
    np.save(folder / "queries.npy", heavy_tailed(queries, width, seed=1_000_003).numpy())


def run(kind: str, folder: Path, python: str, queries: int, threads: int) -> dict[str, Any]:
    """One round of one kind: its seconds and bytes kept, or `{"failed": reason}`."""
    command = [python, str(SCRIPT), kind, str(folder), "--queries", str(queries), "--threads", str(threads)]
    environment = safe_environment() | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    if kind in OURS:
        environment["PYTHONPATH"] = str(SCRIPT.parents[2])
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or [f"ended with {done.returncode}"])[-1]}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def agreement(folder: Path, kind: str, queries: int) -> float:
    """Lowest Spearman correlation over the queries with float64 scores, of the rows that were handed back."""
    rows = np.load(folder / "rows.npy", mmap_mode="r")[:CHECKED].astype(np.float64)
    exact = rows @ np.load(folder / "queries.npy")[:queries].astype(np.float64).T
    found = np.load(folder / f"{kind}.npy")
    return min(spearman(a, b) for a, b in zip(found.T, exact.T, strict=True))


def case(folder: Path, pythons: Mapping[str, str], queries: int, rounds: int, threads: int) -> dict[str, Any]:
    """All kinds at one number of queries: seconds by round, ratios to ours, agreement; and those that failed."""
    names = list(pythons)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    failed: dict[str, str] = {}
    for index in range(rounds):
        shift = index % len(names)
        for name in names[shift:] + names[:shift]:
            if name in failed:
                continue
            result = run(name, folder, pythons[name], queries, threads)
            print(
                f"{queries} queries, {name}: {result.get('failed') or result['seconds']}", file=sys.stderr, flush=True
            )
            if "failed" in result:
                failed[name] = result["failed"]
            else:
                found[name].append(result)
    rows = {}
    for name in names:
        if name in failed:
            continue
        seconds = [r["seconds"]["scores"] for r in found[name]]
        rows[name] = {
            "what": WHAT[name],
            "kept_bytes": found[name][-1]["kept"],
            "load_seconds": [r["seconds"]["load"] for r in found[name]],
            "scores_seconds": seconds,
            "agreement": agreement(folder, name, queries),
            "over": {own: over(seconds, [r["seconds"]["scores"] for r in found[own]]) for own in OURS},
        }
    return {"rows": rows, "failed": failed}


def over(theirs: Sequence[float], ours: Sequence[float]) -> dict[str, float]:
    """Their time over ours, round by round: above 1 ours is the faster."""
    return spread([a / b for a, b in zip(theirs, ours, strict=True)]) or {}


def markdown(cases: Mapping[str, Mapping[str, Any]]) -> str:
    lines = [
        "| queries | peer | rows | scores, s | load, s | over ours, int8 | over ours, bf16 | lowest rank agreement |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for queries, found in cases.items():
        for name, row in found["rows"].items():
            ratios = [row["over"][own] for own in OURS]
            cells = [
                queries,
                name,
                row["what"],
                f"{statistics.median(row['scores_seconds']):.3f}",
                f"{statistics.median(row['load_seconds']):.3f}",
                *(f"{r['median']:.1f} ({r['min']:.1f}-{r['max']:.1f})" for r in ratios),
                f"{row['agreement']:.5f}",
            ]
            lines.append("| " + " | ".join(cells) + " |")
        lines += [f"- {name}: left out, {reason}" for name, reason in found["failed"].items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=40_000)
    parser.add_argument("--width", type=int, default=8192)
    parser.add_argument("--queries", type=int, nargs="+", default=[50, 512])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=native.default_threads())
    parser.add_argument("--venvs", type=Path, default=default_venvs())
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()

    pythons = dict.fromkeys(OURS, sys.executable)
    skipped = {}
    for name, venv in PEERS.items():
        if venv is None or is_installed(venv, args.venvs):
            pythons[name] = sys.executable if venv is None else str(python_of(venv, args.venvs))
        else:
            skipped[name] = "not installed; python -m benches.peers.install says why"
    with tempfile.TemporaryDirectory(prefix="peers-scoring-") as temporary:
        folder = Path(temporary)
        make_rows(folder, args.rows, args.width, max(args.queries))
        cases = {str(q): case(folder, pythons, q, args.rounds, args.threads) for q in args.queries}
    result = {
        "what": "all N x Q scores from kept rows; their time over ours, inside one round",
        "rows": args.rows,
        "width": args.width,
        "rounds": args.rounds,
        "threads": args.threads,
        "path": native.chosen(),
        "target": TARGET,
        "skipped": skipped,
        "cases": cases,
        **describe(),
    }
    print(markdown(cases))
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
