"""Scoring at the size of Open-R1 (225k rows x 8192, int8, 1,000 queries), and what its gradient pass would take.

    python -m benches.open_r1_scale [--rows 225000] [--width 8192] [--queries 1000] [--threads 2] [--folder DIR]
                                    [--lengths lengths.txt] [--output benches/results/open-r1-scale-cpu.json]

1. Makes the store, through the store's own writer, from heavy-tailed rows with shared directions (1.9 GB on disk,
   deleted afterwards).
2. Scores all queries with ranks and group means over the memory-mapped store, at several numbers of rows. The roofline
   is the bare product's: seconds a row of `inner_products` with nothing but scores, over rows that are in memory, or
   the seconds of reading the rows from the page cache as often as the columns need, whichever is more. Everything is
   timed in rounds, the best round counts; CPU time is kept beside wall time, for machines that others use too.
3. Measures the gradient pass's tokens a second on this machine, and carries its utilisation over to cards and models
   by a formula that is printed. Nothing of that is a measurement on such a card.

Lengths of traces: a log-normal, cut at 16,384 tokens, with 75 % below 8,192 tokens, as the card of OpenR1-Math-220k
says ("only 75% of problems could be solved in under 8k tokens, and most of the remaining problems required the full 16k
tokens"), and half of the rest at the limit, which is how "most" is read here. `--lengths` takes real ones, one a line.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import torch

from benches.bench_inner_products import with_peak
from benches.environment import describe
from benches.models import heavy_tailed, qwen2_model, with_lora
from influence_fast.distributed.metrics import PEAK_FLOPS, example_flops
from influence_fast.gradients.per_example import per_example_gradients
from influence_fast.gradients.rows.projection import Projection
from influence_fast.products import native
from influence_fast.products.inner_products import ProductOptions, inner_products
from influence_fast.store.identity import StoreIdentity
from influence_fast.store.manifest import Manifest, Part
from influence_fast.store.reader import Store, open_store
from influence_fast.store.writer import StoreWriter

SHARD_ROWS = 1024
TARGETS = {
    "time / roofline": 1.5,
    "peak MiB above the mapped file": 1024.0,
    "cost per row, largest over smallest store": 1.10,
}
# layers, hidden size, heads, key/value heads, intermediate size: the published configurations
SHAPES = {
    "Qwen2.5-1.5B": (28, 1536, 12, 2, 8960),
    "Qwen2.5-7B": (28, 3584, 28, 4, 18944),
    "Qwen2.5-32B": (64, 5120, 40, 8, 27648),
}
CARDS = ("A100", "H100", "H200")
UTILISATIONS = (0.2, 0.4)  # to see what other shares of the card's peak would give
FORMULA = "hours = sum_i (4 P n_i + 6 L H n_i^2) / (utilisation * peak FLOP/s * cards) / 3600"


@dataclass(frozen=True)
class Leading:
    """The first `count` rows of a store, as far as `inner_products` looks at it."""

    store: Store
    count: int

    def __len__(self) -> int:
        return self.count

    def blocks(self) -> Iterator[tuple[int, np.ndarray, np.ndarray | None]]:
        for start, rows, scales in self.store.blocks():
            if start >= self.count:
                return
            left = self.count - start
            yield start, rows[:left], None if scales is None else scales[:left]


def make_store(path: Path, rows: int, width: int) -> Store:
    """int8 rows with the statistics of `heavy_tailed`, shard by shard."""
    return write_rows(path, rows, width, lambda first, last: heavy_tailed(last - first, width, first // SHARD_ROWS))


def write_rows(
    path: Path, rows: int, width: int, values: Callable[[int, int], torch.Tensor], dtype: str = "int8"
) -> Store:
    """A store of rows that belong to no model: `values(first, last)` gives [last - first, width] float32."""
    part = Part(None, rows, SHARD_ROWS, -(-rows // SHARD_ROWS))
    manifest = Manifest(
        identity=StoreIdentity(projection_kind="unknown"),
        modules=(),
        dtype=dtype,
        width=width,
        parts=(part,),
        source="benches",
        code_version="",
    )
    writer = StoreWriter(path, manifest)
    for index in range(part.shards):
        first, last = index * SHARD_ROWS, min((index + 1) * SHARD_ROWS, rows)
        ids = [f"trace-{i}" for i in range(first, last)]
        writer.write_shard(index, ids, values(first, last), first=first, last=last)
    return writer.finalize()


def interleaved(runs: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[tuple[float, float]]]:
    """(wall seconds, CPU seconds of all threads) of each run in each round, in a rotating order."""
    names = list(runs)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for index in range(rounds):
        shift = index % len(names)
        for name in names[shift:] + names[:shift]:
            start, busy = time.perf_counter(), time.process_time()
            runs[name]()
            found[name].append((time.perf_counter() - start, time.process_time() - busy))
    return found


def scoring(store: Store, queries: np.ndarray, threads: int, rounds: int) -> dict[str, Any]:
    count = len(queries)
    groups = [list(range(0, count, 2)), list(range(1, count, 2))]

    def score(rows: int) -> None:
        result = inner_products(
            Leading(store, rows),
            queries,
            normalize=True,
            groups=groups,
            ranks=True,
            options=ProductOptions(threads=threads),
        )
        assert result.mean_ranks is not None
        assert result.group_means is not None
        # the ranks of a column are 1 to N, so the mean of all mean ranks is known
        assert np.allclose(result.mean_ranks.mean(axis=0), (rows + 1) / 2)
        assert np.isfinite(result.group_means).all()

    whole = len(store)
    score(min(5000, whole))  # loads what a first call loads
    block = min(16 * SHARD_ROWS, whole)
    raw = np.concatenate([rows for _, rows, _ in Leading(store, block).blocks()])
    scales = np.concatenate([s for _, _, s in Leading(store, block).blocks() if s is not None])
    out = np.empty((block, count), np.float32)

    turns = -(-whole // block)  # as many rows as the store has: runs of one length meet the same interruptions

    def bare() -> None:
        for _ in range(turns):
            inner_products(
                raw, queries, row_scales=scales, normalize=True, options=ProductOptions(out=out, threads=threads)
            )

    def read() -> None:
        for _, rows, _ in store.blocks():
            np.add.reduce(rows.reshape(-1)[: rows.size // 8 * 8].view(np.int64))

    sizes = sorted({min(n, whole) for n in (5000, 20_000, 75_000, whole)})
    runs: dict[str, Callable[[], None]] = {str(n): partial(score, n) for n in sizes}
    runs |= {"bare product": bare, "reading": read}
    seconds, peak = with_peak(lambda: interleaved(runs, rounds))
    wall = {name: min(wall for wall, _ in times) for name, times in seconds.items()}
    busy = {name: min(cpu for _, cpu in times) for name, times in seconds.items()}
    columns = max(1, min(count, (224 << 20) // (4 * whole)))  # as products._columns_at_once has it for ranks
    passes = math.ceil(count / (columns - columns % 64 if columns > 64 else columns))
    per_row = {n: wall[str(n)] / n for n in sizes}
    busy_row = {n: busy[str(n)] / n for n in sizes}
    roofline = max(wall["bare product"] / (turns * block) * whole, wall["reading"] * passes)
    return {
        "seconds": {name: [wall for wall, _ in times] for name, times in seconds.items()},
        "CPU seconds": {name: [cpu for _, cpu in times] for name, times in seconds.items()},
        "microseconds a row": {str(n): 1e6 * value for n, value in per_row.items()},
        "CPU microseconds a row": {str(n): 1e6 * value for n, value in busy_row.items()},
        "cost per row, largest over smallest store": per_row[whole] / per_row[sizes[0]],
        "cost per row, largest over smallest store, CPU time": busy_row[whole] / busy_row[sizes[0]],
        "cost per row, spread": max(per_row.values()) / min(per_row.values()) - 1,
        "cost per row, spread of CPU time": max(busy_row.values()) / min(busy_row.values()) - 1,
        "bare product": {"rows": block, "GOP/s": 2 * turns * block * store.width * count / wall["bare product"] / 1e9},
        "passes over the rows": passes,
        "roofline seconds": roofline,
        "time / roofline": wall[str(whole)] / roofline,
        "CPU time / CPU time of the roofline": busy[str(whole)] / (busy["bare product"] / (turns * block) * whole),
        "peak MiB above the mapped file": peak,
    }


def gradient_pass(threads: int, rounds: int = 6) -> dict[str, Any]:
    """Tokens a second of projected per-example gradients here, and their share of what a matrix product reaches."""
    torch.manual_seed(0)
    model = with_lora(qwen2_model(4096, layers=4, width=512), rank=16)
    projection = Projection(dim=16, width=8192)
    generator = torch.Generator().manual_seed(0)
    lengths = [384, 512, 640, 1024, 1536]
    examples = []
    for n in lengths:
        ids = torch.randint(5, 4000, (n,), generator=generator)
        examples.append({"input_ids": ids, "labels": ids})
    flops = sum(map(example_flops(model), lengths))
    a, b = torch.randn(4096, 1024), torch.randn(1024, 4096)
    runs: dict[str, Callable[[], Any]] = {
        "gradients": lambda: per_example_gradients(model, examples, projection=projection),
        "product": lambda: [a @ b for _ in range(4)],
    }
    interleaved(runs, 1)
    seconds = {name: min(wall for wall, _ in times) for name, times in interleaved(runs, rounds).items()}
    best = seconds["gradients"]
    rate, product = flops / best, 4 * 2 * 4096 * 1024 * 4096 / seconds["product"]
    return {
        "model": "Qwen2 shape, 4 layers, 512 wide, LoRA r=16, fp32; one_sided dim=16, width=8192",
        "threads": threads,
        "tokens/s": sum(lengths) / best,
        "GFLOP/s": rate / 1e9,
        "GFLOP/s of a matrix product": product / 1e9,
        "utilisation": rate / product,
    }


def trace_lengths(count: int, cap: int = 16_384) -> np.ndarray:
    """Token counts of `count` traces, by the distribution at the top of this file."""
    low, high = NormalDist().inv_cdf(0.75), NormalDist().inv_cdf(0.875)
    sigma = math.log(cap / 8192) / (high - low)
    mean = math.log(8192) - low * sigma
    drawn = np.random.default_rng(0).lognormal(mean, sigma, count)
    return np.clip(drawn, 64, cap).astype(np.int64)


def model_flops(shape: tuple[int, int, int, int, int], lengths: np.ndarray) -> float:
    """FORMULA's numerator: see `influence_fast.distributed.metrics.example_flops`."""
    layers, hidden, heads, kv_heads, intermediate = shape
    key_value = hidden // heads * kv_heads
    weights = layers * (2 * hidden * hidden + 2 * hidden * key_value + 3 * hidden * intermediate)
    n = lengths.astype(np.float64)
    return float((4.0 * weights * n + 6.0 * layers * hidden * n * n).sum())


def extrapolate(lengths: np.ndarray, measured: float) -> list[dict[str, Any]]:
    return [
        {
            "model": name,
            "card": card,
            "cards": 8,
            "utilisation": round(utilisation, 3),
            "utilisation from": "this machine" if utilisation == measured else "assumed",
            "hours": flops / (utilisation * PEAK_FLOPS[card] * 8) / 3600,
            "tokens/s a card": float(lengths.sum()) * utilisation * PEAK_FLOPS[card] / flops,
        }
        for name, shape in SHAPES.items()
        for flops in [model_flops(shape, lengths)]
        for card in CARDS
        for utilisation in (measured, *UTILISATIONS)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=225_000)
    parser.add_argument("--width", type=int, default=8192)
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=native.default_threads())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where the store is made (default: the system's own)")
    parser.add_argument("--lengths", type=Path, help="token counts of real traces, one a line")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    result: dict[str, Any] = {
        "what": "scoring 1,000 queries with ranks and group means over a store of Open-R1's size; seconds",
        "rows": args.rows,
        "width": args.width,
        "queries": args.queries,
        "threads": args.threads,
        "path": native.chosen(),
        "load before": os.getloadavg()[0],
        "targets": TARGETS,
    }
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        start = time.perf_counter()
        make_store(Path(folder) / "store", args.rows, args.width)
        result["making the store"] = {"seconds": time.perf_counter() - start}
        store = open_store(Path(folder) / "store")
        queries = heavy_tailed(args.queries, args.width, seed=10**6).numpy()
        result["scoring"] = scoring(store, queries, args.threads, args.rounds)
        result["int8 of the queries, largest error of a cosine"] = agreement(store, queries)
    for name in TARGETS:
        print(f"{name}: {result['scoring'][name]:.3f} (target: at most {TARGETS[name]})")
    busy = result["scoring"]["CPU microseconds a row"]
    for rows, value in result["scoring"]["microseconds a row"].items():
        print(f"  {rows:>8} rows: {value:8.2f} us a row, {busy[rows]:8.2f} us of CPU time")

    result["gradient pass"] = gradient_pass(args.threads)
    lengths = np.loadtxt(args.lengths, dtype=np.int64, ndmin=1) if args.lengths else trace_lengths(args.rows)
    result["lengths"] = {
        "from": args.lengths.name if args.lengths else "log-normal cut at 16384; 75 % below 8192, 12.5 % at the cut",
        "traces": len(lengths),
        "tokens": int(lengths.sum()),
        "mean": float(lengths.mean()),
        "below 8192": float((lengths < 8192).mean()),
        "at the cut": float((lengths == lengths.max()).mean()),
    }
    result["formula"] = FORMULA
    result["projected"] = extrapolate(lengths, result["gradient pass"]["utilisation"])
    print(f"gradient pass here: {result['gradient pass']['tokens/s']:.0f} tokens/s; {FORMULA}")
    for cell in result["projected"]:
        print(
            f"  {cell['model']:14s} 8 x {cell['card']:5s} utilisation {cell['utilisation']:.2f} "
            f"({cell['utilisation from']}): {cell['hours']:7.2f} h"
        )
    result["load after"] = os.getloadavg()[0]
    result |= describe()
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(result, indent=1) + "\n")


def agreement(store: Store, queries: np.ndarray, rows: int = 500, count: int = 50) -> float:
    """Against float64 cosines of the stored rows: what the fast path's rounding of queries to int8 costs."""
    found = inner_products(Leading(store, rows), queries[:count], normalize=True)
    exact = store.rows(slice(0, rows)).double().numpy()
    wanted = queries[:count].astype(np.float64)
    exact /= np.linalg.norm(exact, axis=1, keepdims=True)
    wanted /= np.linalg.norm(wanted, axis=1, keepdims=True)
    return float(np.abs(found - exact @ wanted.T).max())


if __name__ == "__main__":
    main()
