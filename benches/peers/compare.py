"""Ours against every peer that installs, over work folders, on this machine: one table.

    python -m benches.peers.install
    python -m benches.peers.work make runs/peers/math500 --world math500 --data problems.jsonl
    python -m benches.peers.work make runs/peers/long --world long
    python -m benches.peers.compare --work runs/peers/math500 runs/peers/long --output benches/results/peers-cpu.json

Each row is a process of its own: loaded, warmed over a few examples, then timed. Rounds go over all rows in a rotating
order and ratios are taken inside a round. The slow peers run once, over the first `--subset` examples and `--asked`
queries, and ours over the same for its scoring. Scores are compared with those of whole gradients, by rank: a dot with
the exact dot, a cosine with the exact cosine; a preconditioned method has no exact counterpart here and is compared
with the dot, so its figure only says how far the method goes from it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benches.environment import describe
from benches.peers.install import default_venvs, is_installed, python_of
from influence_fast.isolation import safe_environment
from influence_fast.statistics.ranks import spearman

HERE = Path(__file__).parent
# end to end, times as fast: (peer, method) -> our method that does the same work, target
TARGETS = {
    ("bergson", "cosine"): ("cosine", 1.3),  # a store of rows, then scores
    ("bergson", "score_cosine"): ("stream", 1.3),  # one pass, no store
    ("less_like", "cosine"): ("cosine", 1.8),
}
SCORING_TARGET = 3.0  # every peer's scoring step
TIMEOUT = 900  # seconds for one row in one round


@dataclass(frozen=True)
class Job:
    """One row: a method of a peer. `full`: over everything and in every round, else once over the subset."""

    peer: str
    script: str
    method: str
    full: bool = False
    venv: str | None = None  # the peer's own environment; None is this one

    @property
    def name(self) -> str:
        return f"{self.peer} {self.method}"


JOBS = (
    Job("plain", "plain.py", "step", full=True),
    Job("ours", "ours.py", "cosine", full=True),
    Job("ours", "ours.py", "stream", full=True),
    Job("bergson", "bergson_peer.py", "cosine", full=True, venv="bergson"),
    Job("bergson", "bergson_peer.py", "score_cosine", full=True, venv="bergson"),
    Job("less_like", "less_like.py", "cosine", full=True),
    Job("ours", "ours.py", "cosine"),
    Job("ours", "ours.py", "dot"),
    Job("ours", "ours.py", "cosine_8192"),
    Job("ours", "ours.py", "ekfac"),
    Job("bergson", "bergson_peer.py", "trackstar", venv="bergson"),
    Job("vmap", "vmap_peer.py", "cosine"),
    Job("dattri", "dattri_peer.py", "cosine", venv="dattri"),
    Job("dattri", "dattri_peer.py", "logra_dot", venv="dattri"),
    Job("dattri", "dattri_peer.py", "trak", venv="dattri"),
    Job("traker", "traker_peer.py", "trak", venv="traker"),
    Job("kronfluence", "kronfluence_peer.py", "dot", venv="kronfluence"),
    Job("kronfluence", "kronfluence_peer.py", "ekfac", venv="kronfluence"),
    Job("logix", "logix_peer.py", "dot", venv="logix"),
)


def run_job(job: Job, work: Path, output: Path, venvs: Path, threads: int, *options: str) -> dict[str, Any]:
    """Runs one row in its own environment; returns what it wrote, or `{"failed": reason}`."""
    python = sys.executable if job.venv is None else str(python_of(job.venv, venvs))
    command = [python, str(HERE / job.script), str(work), str(output), "--method", job.method]
    command += ["--threads", str(threads), *options]
    environment = safe_environment() | {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        return {"failed": f"took more than {TIMEOUT} s"}
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        return {"failed": lines[-1] if lines else f"ended with {done.returncode}"}
    result: dict[str, Any] = json.loads(Path(f"{output}.json").read_text())
    return result


def exact_scores(arrays: Mapping[str, np.ndarray], convention: str) -> np.ndarray:
    """[N, Q] float64 of whole gradients, out of what `ours.py --method exact` wrote."""
    dots = np.asarray(arrays["scores"], np.float64)
    if convention == "cosine":
        return dots / arrays["norms"][:, None] / arrays["query_norms"][None, :]
    return dots


def agreement(scores: np.ndarray, exact: np.ndarray) -> dict[str, float]:
    """Rank correlation with the exact scores: the mean over queries, and that of the mean over queries.

    `exact` may have more rows and columns than `scores` [N, Q]: the first ones are compared.
    """
    exact = exact[: scores.shape[0], : scores.shape[1]]
    each = [spearman(one, other) for one, other in zip(scores.T, exact.T, strict=True)]
    return {"per_query": float(np.mean(each)), "mean": spearman(scores.mean(axis=1), exact.mean(axis=1))}


def seconds_of(result: Mapping[str, Any]) -> float:
    """End to end, in the one round that a result holds."""
    return float(sum(stage[0] for stage in result["seconds"].values()))


def row_of(rounds: Sequence[Mapping[str, Any]], plain: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One row of the table from the rounds of a job and those of the plain step.

    Where the job ran as often and over as many tokens as the plain step, the ratio is taken round by round; else per
    token, against the plain step's median round.
    """
    last = rounds[-1]
    total = [seconds_of(r) for r in rounds]
    tokens = last["tokens"] + last["query_tokens"]
    price = [seconds_of(r) / (r["tokens"] + r["query_tokens"]) for r in plain]  # seconds a token
    if len(price) != len(total):
        price = [statistics.median(price)] * len(total) if price else []
    ratios = [t / tokens / p for t, p in zip(total, price, strict=True)] if price else []
    scoring = last["seconds"].get("scoring")
    return {
        "peer": last["peer"],
        "method": last["method"],
        "what": last["what"],
        "convention": last["convention"],
        "examples": last["examples"],
        "queries": last["queries"],
        "tokens": last["tokens"],
        "rounds": len(rounds),
        "seconds": {name: [r["seconds"].get(name, [0.0])[0] for r in rounds] for name in last["seconds"]},
        "total_seconds": total,
        "tokens_per_second": tokens / statistics.median(total),
        "examples_per_second": (last["examples"] + last["queries"]) / statistics.median(total),
        "over_plain": spread(ratios),
        "scoring_us_per_pair": None
        if scoring is None
        else 1e6 * statistics.median(r["seconds"]["scoring"][0] for r in rounds) / (last["examples"] * last["queries"]),
        "peak_memory": max(r["peak_memory"] for r in rounds),
        "bytes_per_example": last["bytes_per_example"],
        "width": last["width"],
        "agreement": last.get("agreement"),
        "notes": last["notes"],
        "versions": last["versions"],
        "seed": last["seed"],
        "dtype": last["dtype"],
    }


def spread(values: Sequence[float]) -> dict[str, float] | None:
    """Median and range."""
    if not values:
        return None
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def targets_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """How many times as fast ours is: end to end against bergson and the LESS-like loop, and in scoring.

    End to end is taken round by round, a store against a store and one pass against one pass. Scoring is that of our
    store against a row's of as many examples and queries; rows that score inside another stage have none.
    """
    full = [row for row in rows if "failed" not in row and row["rounds"] and row["full"]]
    seconds = {(row["peer"], row["method"]): row["total_seconds"] for row in full}
    found: dict[str, Any] = {}
    for (peer, method), (mine, target) in TARGETS.items():
        if (peer, method) in seconds and ("ours", mine) in seconds:
            pairs = zip(seconds[peer, method], seconds["ours", mine], strict=True)
            times = [theirs / ours for theirs, ours in pairs]
            key = f"{peer} {method}"
            found[key] = {**(spread(times) or {}), "target": target, "met": statistics.median(times) >= target}
    scoring = {}
    for row in rows:
        if "failed" in row or row["peer"] in ("ours", "plain") or not row["scoring_us_per_pair"]:
            continue
        same = [
            other["scoring_us_per_pair"]
            for other in rows
            if other.get("peer") == "ours"
            and other.get("scoring_us_per_pair")
            and (other["examples"], other["queries"]) == (row["examples"], row["queries"])
            and other["method"] == "cosine"
        ]
        if same:
            times_as_fast = row["scoring_us_per_pair"] / min(same)
            key = f"{row['peer']} {row['method']}"
            scoring[key] = {"times": times_as_fast, "target": SCORING_TARGET, "met": times_as_fast >= SCORING_TARGET}
    return {"end_to_end": found, "scoring": scoring}


HEADER = (
    "| peer | method | examples x queries | tokens/s | examples/s | time over plain step | scoring, us a pair "
    "| peak memory, MiB | bytes an example | agreement (per query / mean) |",
    "|---|---|---|---|---|---|---|---|---|---|",
)


def markdown(world: str, rows: Sequence[Mapping[str, Any]], skipped: Mapping[str, str]) -> str:
    """The table of one world, and below it what is missing from it and why."""
    lines = [f"### {world}", "", *HEADER]
    reasons = dict(skipped)
    for row in rows:
        if "failed" in row:
            reasons[f"{row['peer']} {row['method']}"] = row["failed"]
            continue
        over = row["over_plain"]
        ratio = "-" if over is None else f"{over['median']:.2f}"
        if over is not None and row["rounds"] > 1:
            ratio += f" ({over['min']:.2f}-{over['max']:.2f})"
        agrees = row["agreement"]
        cells = [
            row["peer"],
            row["what"],
            f"{row['examples']} x {row['queries']}",
            f"{row['tokens_per_second']:,.0f}",
            f"{row['examples_per_second']:.2f}",
            ratio,
            "-" if row["scoring_us_per_pair"] is None else f"{row['scoring_us_per_pair']:.3g}",
            f"{row['peak_memory'] / 2**20:,.0f}",
            "-" if row["bytes_per_example"] is None else f"{row['bytes_per_example']:,.0f}",
            "-"
            if agrees is None
            else f"{agrees['per_query']:.3f} / {agrees['mean']:.3f}"
            + (" (dot)" if row["convention"] == "preconditioned" else ""),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    if reasons:
        lines += ["", *(f"- {name}: left out, {reason}" for name, reason in reasons.items())]
    return "\n".join(lines)


def verdicts(targets: Mapping[str, Any]) -> str:
    """The targets in words, one a line."""
    lines = [
        f"- ours against {peer}, end to end: {t['median']:.2f} times as fast ({t['min']:.2f}-{t['max']:.2f}), "
        f"target {t['target']}: {'met' if t['met'] else 'missed'}"
        for peer, t in targets["end_to_end"].items()
    ]
    lines += [
        f"- ours against {name}, scoring: {t['times']:.1f} times as fast, target {t['target']}: "
        f"{'met' if t['met'] else 'missed'}"
        for name, t in targets["scoring"].items()
    ]
    return "\n".join(lines)


class World:
    """One work folder and the runs over it."""

    def __init__(self, work: Path, scratch: Path, args: argparse.Namespace) -> None:
        self.work = work
        self.info = json.loads((work / "work.json").read_text())
        self.name = self.info.get("world", work.name)
        self.scratch = scratch / work.name
        self.args = args
        self.rounds: dict[Job, list[dict[str, Any]]] = {}
        self.failed: dict[Job, str] = {}
        self.exact: dict[str, np.ndarray] = {}

    def options(self, job: Job) -> list[str]:
        pool, queries = (min(self.args.limit or self.info[name], self.info[name]) for name in ("pool", "queries"))
        if not job.full:
            # as large a share of the tokens in both worlds, at least a batch
            pool = min(pool, max(2, round(self.args.subset * min(1, self.info["pool"] / 500))))
            queries = min(queries, self.args.asked)
        return ["--limit", str(pool), "--queries", str(queries)]

    def run(self, job: Job) -> None:
        if job in self.failed:
            return
        output = self.scratch / job.name.replace(" ", "-") / f"round-{len(self.rounds.get(job, []))}-{job.full}"
        result = run_job(job, self.work, output, self.args.venvs, self.args.threads, *self.options(job))
        print(f"{self.name}: {job.name}: {result.get('failed') or result['seconds']}", file=sys.stderr, flush=True)
        if "failed" in result:
            self.failed[job] = result["failed"]
            return
        with np.load(f"{output}.npz") as arrays:
            if "scores" in arrays:
                exact = exact_scores(self.exact, result["convention"])
                result["agreement"] = agreement(np.asarray(arrays["scores"], np.float64), exact)
        self.rounds.setdefault(job, []).append(result)

    def find_exact(self) -> None:
        output = self.scratch / "exact"
        job = Job("ours", "ours.py", "exact", full=True)
        result = run_job(job, self.work, output, self.args.venvs, self.args.threads, *self.options(job))
        if "failed" in result:
            raise SystemExit(f"{self.work}: the exact scores could not be computed: {result['failed']}")
        with np.load(f"{output}.npz") as arrays:
            self.exact = {name: arrays[name] for name in ("scores", "norms", "query_norms")}

    def rows(self, jobs: Sequence[Job]) -> list[dict[str, Any]]:
        plain = next((self.rounds[job] for job in jobs if job.peer == "plain" and job in self.rounds), [])
        rows = []
        for job in jobs:
            if job in self.failed:
                rows.append({"peer": job.peer, "method": job.method, "full": job.full, "failed": self.failed[job]})
            elif job in self.rounds:
                rows.append({**row_of(self.rounds[job], plain), "full": job.full})
        return rows

    def profiles(self, jobs: Sequence[Job], targets: Mapping[str, Any]) -> dict[str, Any]:
        """Where the time goes, in ours and in each peer against which a target was missed."""
        missed = {name.split()[0] for name, t in targets["end_to_end"].items() if not t["met"]}
        missed |= {name.split()[0] for name, t in targets["scoring"].items() if not t["met"]}
        found = {}
        for job in jobs:
            if job.full and missed and job.peer in {"ours", *missed} and job not in self.failed:
                options = ["--limit", "40", "--queries", "4", "--profile"]
                output = self.scratch / f"profile-{job.name.replace(' ', '-')}"
                result = run_job(job, self.work, output, self.args.venvs, self.args.threads, *options)
                found[job.name] = result.get("profile", result.get("failed"))
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, nargs="+", required=True, help="work folders")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--venvs", type=Path, default=default_venvs())
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--subset", type=int, default=24, help="examples of the slow peers, of a pool of 500")
    parser.add_argument("--asked", type=int, default=4, help="queries of the slow peers")
    parser.add_argument("--limit", type=int, help="at most so many examples and queries, for a quick look")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="*", help="only these peers (plain and ours always run)")
    args = parser.parse_args()

    wanted = [job for job in JOBS if not args.only or job.peer in ("plain", "ours", *args.only)]
    missing = {job.venv for job in wanted if job.venv and not is_installed(job.venv, args.venvs)}
    skipped = {
        str(name): "not installed; python -m benches.peers.install says why" for name in sorted(missing, key=str)
    }
    jobs = [job for job in wanted if job.venv not in missing]
    often, once = [job for job in jobs if job.full], [job for job in jobs if not job.full]
    tables: list[str] = []
    result: dict[str, Any] = {
        "what": "scores of a pool against queries by this package and its peers, each a warm process of its own",
        "threads": args.threads,
        "rounds": args.rounds,
        "skipped": skipped,
        "worlds": {},
    }
    with tempfile.TemporaryDirectory(prefix="peers-compare-") as scratch:
        for work in args.work:
            world = World(work, Path(scratch), args)
            world.find_exact()
            for index in range(args.rounds):
                shift = index % len(often)
                for job in often[shift:] + often[:shift]:
                    world.run(job)
            for job in once:
                world.run(job)
            rows = world.rows(jobs)
            targets = targets_of(rows)
            tables += [markdown(world.name, rows, skipped), verdicts(targets)]
            result["worlds"][world.name] = {
                "work": world.info,
                "rows": rows,
                "targets": targets,
                "profiles": world.profiles(jobs, targets),
            }
    result |= describe()
    print("\n\n".join(tables))
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
