"""Inner products of stored rows with queries, against the PyTorch calls one would write instead, on this machine.

    python -m benches.bench_inner_products [--quick] [--rows 40000] [--width 8192] [--rounds 7] [--threads 2]
                                           [--output results.json]

Every round runs all variants of a case once, in a rotating order; a ratio is taken inside its round (time of the
other / time of ours, so above 1 is faster), and the median and range over rounds are reported. Peak memory is taken
in a fresh process over memory-mapped rows, above what it holds before the call.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from benches.environment import describe
from benches.interleave import interleaved
from benches.models import heavy_tailed
from influence_fast.products import native
from influence_fast.products.inner_products import ProductOptions, inner_products, quantize_rows
from influence_fast.statistics.ranks import spearman

T = TypeVar("T")

Variants = dict[str, Callable[[], Any]]
MANY, FEW = 512, 2

TARGETS = {  # case -> {other: the least median ratio}
    "many": {"torch._int_mm": 1.0, "torch bf16 matmul": 1.6},
    "many ranks": {"torch bf16 matmul + argsort": 3.0},
    "few": {"single-pass read": 0.9, "torch fp32 matmul": 3.0},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=40_000)
    parser.add_argument("--width", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=native.default_threads())
    parser.add_argument("--quick", action="store_true", help="a tenth of the rows, three rounds")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--peak", type=Path, help=argparse.SUPPRESS)  # the fresh process: see peak_memory
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.peak:
        print(measure_peak(args.peak, args.rows, args.width, args.threads))
        return
    if args.quick:
        args.rows, args.rounds = args.rows // 10, 3

    # The fp32 matrix is 1.3 GB at full size; int8 and bf16 are what a store holds.
    rows = heavy_tailed(args.rows, args.width, seed=0)
    queries = heavy_tailed(MANY, args.width, seed=1)
    quantized, scales = quantize_rows(rows)
    result: dict[str, Any] = {
        "what": "time of the other / time of ours, inside one round",
        "rows": args.rows,
        "width": args.width,
        "threads": args.threads,
        "path": native.chosen(),
        "targets": TARGETS,
    }
    cases = {
        "many": many(rows, quantized, scales, queries, args.threads),
        "many ranks": many_ranks(rows, quantized, scales, queries, args.threads),
        "few": few(rows, quantized, scales, queries[:FEW], args.threads),
    }
    for name, variants in cases.items():
        seconds = interleaved(variants, args.rounds)
        result[name] = report(name, seconds, args)
    result["spearman of int8 to fp32 scores"] = agreement(rows, quantized, scales, queries)
    print(f"Spearman of int8 to fp32 scores, lowest of {MANY} queries: {result['spearman of int8 to fp32 scores']:.5f}")
    del rows, cases
    gc.collect()
    result["peak MiB above the inputs"] = peak_memory(quantized, scales, args)
    print(f"peak memory above the inputs: {result['peak MiB above the inputs']:.0f} MiB (target: below 512)")
    result |= describe()
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(result, indent=1) + "\n")


def many(rows: torch.Tensor, quantized: Any, scales: Any, queries: torch.Tensor, threads: int) -> Variants:
    """The (N, Q) scores. PyTorch gets operands that are already in the right type and layout; ours converts inside."""
    half, half_queries = rows.bfloat16(), queries.bfloat16().T
    other = quantize_rows(queries)[0].T.contiguous()
    out = torch.empty(len(rows), len(queries))
    return {
        "ours": lambda: inner_products(
            quantized, queries, row_scales=scales, options=ProductOptions(out=out, threads=threads)
        ),
        "ours, bf16 rows": lambda: inner_products(half, queries, options=ProductOptions(out=out, threads=threads)),
        "torch._int_mm": lambda: torch._int_mm(quantized, other),
        "torch bf16 matmul": lambda: half @ half_queries,
    }


def many_ranks(rows: torch.Tensor, quantized: Any, scales: Any, queries: torch.Tensor, threads: int) -> Variants:
    """Group means and mean ranks of two groups: the paper's s_C, s_I and their ranks."""
    half, half_queries = rows.bfloat16(), queries.bfloat16().T
    groups = [list(range(0, MANY, 2)), list(range(1, MANY, 2))]

    def torch_ranks() -> None:
        scores = half @ half_queries
        torch.argsort(scores, dim=0)  # the ranks themselves would be one more scatter

    return {
        "ours": lambda: inner_products(
            quantized, queries, row_scales=scales, groups=groups, ranks=True, options=ProductOptions(threads=threads)
        ),
        "torch bf16 matmul + argsort": torch_ranks,
    }


def few(rows: torch.Tensor, quantized: torch.Tensor, scales: Any, queries: torch.Tensor, threads: int) -> Variants:
    """Two aggregated queries: the time of reading the rows. The read is a sum over the same bytes as int64."""
    words = quantized.reshape(-1).view(torch.int64) if quantized.numel() % 8 == 0 else quantized.reshape(-1)
    columns = queries.T.contiguous()
    return {
        "ours": lambda: inner_products(quantized, queries, row_scales=scales, options=ProductOptions(threads=threads)),
        "ours, precision high": lambda: inner_products(
            quantized, queries, row_scales=scales, options=ProductOptions(precision="high", threads=threads)
        ),
        "single-pass read": lambda: words.sum(),
        "torch fp32 matmul": lambda: rows @ columns,
    }


def report(case: str, seconds: dict[str, list[float]], args: argparse.Namespace) -> dict[str, Any]:
    q = FEW if case == "few" else MANY
    rows: dict[str, Any] = {}
    print(f"{case}: {args.rows} x {args.width} rows, {q} queries")
    for name, times in seconds.items():
        median = statistics.median(times)
        ratios = [other / ours for other, ours in zip(times, seconds["ours"], strict=True)]
        rows[name] = {
            "seconds": times,
            "Mrows/s": args.rows / median / 1e6,
            "GOP/s": 2 * args.rows * args.width * q / median / 1e9,
            "ratio": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)},
        }
        r = rows[name]["ratio"]
        target = TARGETS[case].get(name)
        print(
            f"  {name:28s} {median * 1e3:9.1f} ms  {rows[name]['GOP/s']:6.0f} GOP/s  "
            f"x {r['median']:.2f} ({r['min']:.2f} to {r['max']:.2f})" + (f"  target {target}" if target else "")
        )
    return rows


def agreement(rows: torch.Tensor, quantized: torch.Tensor, scales: torch.Tensor, queries: torch.Tensor) -> float:
    """Lowest Spearman correlation over the queries, of at most 5000 rows."""
    exact = inner_products(rows[:5000], queries)
    ours = inner_products(quantized[:5000], queries, row_scales=scales[:5000])
    return min(spearman(exact[:, q].numpy(), ours[:, q].numpy()) for q in range(len(queries)))


ROOT = Path(__file__).resolve().parents[1]  # `python -m` puts the folder it runs in first on the path


def peak_memory(quantized: torch.Tensor, scales: torch.Tensor, args: argparse.Namespace) -> float:
    """MiB of resident memory a fresh process adds while it ranks over memory-mapped rows."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        quantized.numpy().tofile(path / "rows.bin")
        scales.numpy().tofile(path / "scales.bin")
        command = [sys.executable, "-m", "benches.bench_inner_products", "--peak", folder]
        command += ["--rows", str(args.rows), "--width", str(args.width), "--threads", str(args.threads)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    return float(done.stdout)


def with_peak(run: Callable[[], T]) -> tuple[T, float]:
    """(what `run` gives, MiB of anonymous memory it added at its peak; the mapped rows belong to the page cache)."""
    before, peak, done = anonymous(), 0.0, threading.Event()

    def sample() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, anonymous())

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        value = run()
    finally:
        done.set()
        sampler.join()
    return value, peak - before


def measure_peak(folder: Path, n: int, k: int, threads: int) -> float:
    """MiB that a call adds at its peak."""
    rows = np.memmap(folder / "rows.bin", np.int8, "r", shape=(n, k))
    scales = np.fromfile(folder / "scales.bin", np.float32)
    queries = np.random.default_rng(0).standard_normal((MANY, k), dtype=np.float32)
    inner_products(rows[:100], queries[:2], row_scales=scales[:100])  # loads what a first call loads
    options: dict[str, Any] = {"groups": [[0, 1], [2]], "topk": 100, "ranks": True}
    options["options"] = ProductOptions(threads=threads)
    return with_peak(lambda: inner_products(rows, queries, row_scales=scales, **options))[1]


def anonymous() -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("no RssAnon in /proc/self/status; the peak is measured on Linux only")


if __name__ == "__main__":
    main()
