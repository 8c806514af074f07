"""How near each kernel and stage comes to what this machine can do at all.

    python -m benches.roofline [--quick] [--rounds 15] [--threads 2] [--device cpu] [--output results.json]
                               [--plots docs]

Ceilings are measured, not looked up: bytes a second of a copy and of a read, FLOP/s of a large matrix product in each
dtype. A stage's floor is the longer of its bytes at the faster of copy and read, and its FLOPs at the product's rate
in its dtype. Each operand is counted as moved once. The ceilings are PyTorch's: a stage whose operands stay in cache,
or that multiplies faster than PyTorch, passes 100 %. All of them are timed in turn, and the share (floor / time) is
taken inside a round, from the ceilings of that round.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benches.environment import describe
from benches.interleave import interleaved, spread
from benches.models import heavy_tailed, qwen2_model, with_lora
from benches.suites import plots
from benches.suites.case import VOCABULARY, Scale, ragged_examples
from benches.suites.test_kernels import DIM, RANK, factors
from benches.suites.test_preconditioners import blocks_of, world
from benches.suites.test_store import write_store
from influence_fast.distributed.metrics import example_flops
from influence_fast.gradients.per_example import per_example_gradients
from influence_fast.gradients.rows.projection import Projection
from influence_fast.influence.fisher import fit_fisher
from influence_fast.kernels import project_flat, segment_bilinear, segment_outer, skinny_project
from influence_fast.kernels.runtime import Cost
from influence_fast.kernels.segments import Segments
from influence_fast.products import native
from influence_fast.products.inner_products import ProductOptions, inner_products, quantize_rows

COMMAND = "python -m benches.roofline"


@dataclass(frozen=True)
class Stage:
    """Something timed: what it must do at least, in which dtype its products are, and a call of it."""

    name: str
    cost: Cost
    dtype: str
    run: Callable[[], Any]


def floor_seconds(cost: Cost, bandwidth: float, peak: float) -> float:
    """The least time of `cost` on a machine of `bandwidth` bytes/s and `peak` FLOP/s, the two going on at once."""
    return max(cost.bytes / bandwidth, cost.flops / peak)


def shares(
    stages: Sequence[tuple[str, Cost, str]],
    seconds: Mapping[str, Sequence[float]],
    bandwidth: Sequence[float],
    peaks: Mapping[str, Sequence[float]],
) -> list[dict[str, Any]]:
    """One entry a stage (name, cost, dtype): its floor over its time, round by round.

    seconds: stage -> seconds of each round; bandwidth: bytes/s in each round; peaks: dtype -> FLOP/s in each round.
    """
    found = []
    for name, cost, dtype in stages:
        floors = [floor_seconds(cost, b, p) for b, p in zip(bandwidth, peaks[dtype], strict=True)]
        time = spread(seconds[name])
        by_bytes = spread([cost.bytes / b for b in bandwidth]).median
        by_flops = spread([cost.flops / p for p in peaks[dtype]]).median
        found.append(
            {
                "name": name,
                "dtype": dtype,
                "flops": cost.flops,
                "bytes": cost.bytes,
                "bound": "bytes" if by_bytes >= by_flops else "FLOPs",
                "seconds": time._asdict(),
                "share": spread([f / s for f, s in zip(floors, seconds[name], strict=True)])._asdict(),
            }
        )
    return found


@dataclass(frozen=True)
class Ceilings:
    """Calls that show what the machine can do, and how much each call does."""

    runs: dict[str, Callable[[], Any]]
    amounts: dict[str, float]  # bytes, or FLOPs

    def rates(self, seconds: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
        """Bytes/s or FLOP/s of each ceiling in each round."""
        return {name: [amount / s for s in seconds[name]] for name, amount in self.amounts.items()}


def ceilings(device: torch.device, quick: bool) -> Ceilings:
    """ "copy", "read" and a matrix product in each dtype that this PyTorch multiplies here."""
    size = 256 if quick else (8192 if device.type == "cuda" else 2048)
    numbers = (1 << 20) if quick else (1 << 25)
    source, target = (torch.ones(numbers, dtype=torch.int64, device=device) for _ in range(2))
    runs: dict[str, Callable[[], Any]] = {"copy": lambda: target.copy_(source), "read": lambda: source.sum()}
    amounts = {"copy": 2.0 * source.nbytes, "read": float(source.nbytes)}
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        name = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
        runs[name] = lambda a=a, b=b: a @ b
        amounts[name] = 2.0 * size**3
    left, right = (torch.randint(-127, 128, (size, size), dtype=torch.int8, device=device) for _ in range(2))
    runs["int8"] = lambda: torch._int_mm(left, right.T)
    amounts["int8"] = 2.0 * size**3
    return Ceilings(runs, amounts)


def kernel_stages(device: torch.device, quick: bool) -> list[Stage]:
    """On a card, each Triton kernel at one 7B layer's shape (bf16). Elsewhere what takes their place, over a model."""
    if device.type != "cuda":
        scale = Scale(quick, torch.get_num_threads(), Path())
        x, w = torch.randn(scale(4096, 64), scale(1024, 64)), torch.randn(scale(1024, 64), RANK + DIM)
        cost = skinny_project.cost(*x.shape, RANK + DIM, itemsize=4, out_itemsize=4)
        whole = factors(scale)
        return [
            Stage("[h|z] = x [A^T|R]", cost, "fp32", lambda: skinny_project.reference(x, w)),
            Stage("projected factors, 28 modules", whole.cost, "fp32", whole.ours),
        ]
    unit, d = (4, 64) if quick else (256, 3584)
    lengths = [unit * (1 + e % 7) for e in range(16)]
    segments = Segments.from_lengths(lengths, device=device)
    tokens, examples, modules = segments.tokens, len(lengths), 28

    def tensor(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device).bfloat16()

    x, w, h = tensor(tokens, d), tensor(d, RANK + DIM), tensor(tokens, RANK)
    left, right = tensor(tokens, modules, DIM), tensor(tokens, modules, RANK)
    sums = torch.zeros(examples, modules * DIM * RANK, device=device)
    offsets = torch.arange(modules, device=device) * DIM * RANK
    queries = torch.randn(4, d, RANK, device=device)
    sketch = project_flat.FlatSketch.of("sjlt", 0, "m/row", d, RANK, 8192, device=device)
    rows = torch.zeros(examples, 8192, device=device)
    return [
        Stage(
            "skinny_project",
            skinny_project.cost(tokens, d, RANK + DIM),
            "bf16",
            lambda: skinny_project.skinny_project(x, w),
        ),
        Stage(
            "segment_outer, 28 modules",
            segment_outer.cost(tokens, examples, modules, DIM, RANK, row_itemsize=4),
            "bf16",
            lambda: segment_outer.segment_outer(left, right, segments, sums, offsets),
        ),
        Stage(
            "segment_bilinear, 4 queries",
            segment_bilinear.cost(tokens, d, RANK, 4, segments.chunks),
            "bf16",
            lambda: segment_bilinear.segment_bilinear(x, h, queries, segments),
        ),
        Stage(
            "project_flat, sjlt",
            project_flat.cost("sjlt", tokens, examples, d, RANK, 8192, row_itemsize=4),
            "bf16",
            lambda: project_flat.project_flat(x, h, segments, sketch, rows),
        ),
    ]


def scoring_stages(device: torch.device, quick: bool, threads: int) -> list[Stage]:
    """Inner products and ranks, for rows of each dtype, with few and with many queries."""
    n, k = (256, 64) if quick else ((200_000, 8192) if device.type == "cuda" else (16_384, 4096))
    rows = heavy_tailed(n, k, seed=0)
    raw, scales = quantize_rows(rows)
    stored: dict[str, tuple[torch.Tensor, dict[str, torch.Tensor]]] = {
        "int8": (raw.to(device), {"row_scales": scales.to(device)}),
        "bf16": (rows.bfloat16().to(device), {}),
        "fp32": (rows.to(device), {}),
    }
    found = []
    for count in (2, 512):
        queries = heavy_tailed(count, k, seed=1).to(device)
        out = torch.empty(n, count, device=device)
        for dtype, (values, options) in stored.items():
            cost = Cost(2 * n * k * count, values.nbytes + queries.nbytes + out.nbytes)

            def run(v: Any = values, q: Any = queries, o: Any = out, options: Any = options) -> Any:
                return inner_products(v, q, options=ProductOptions(out=o, threads=threads), **options)

            found.append(Stage(f"inner products, {dtype}, {count} queries", cost, dtype, run))
    # Columns must at least be written and read once more to be ranked.
    cost = Cost(2 * n * k * 512, raw.nbytes + queries.nbytes + 2 * 4 * n * 512)
    values, options = stored["int8"]
    run = lambda: inner_products(values, queries, ranks=True, options=ProductOptions(threads=threads), **options)  # noqa: E731
    found.append(Stage("ranks, int8, 512 queries", cost, "int8", run))
    if device.type == "cpu":
        cost = Cost(n * k, rows.nbytes + raw.nbytes)
        found.append(Stage("rows to int8", cost, "fp32", lambda: quantize_rows(rows, threads=threads)))
    return found


def pipeline_stages(device: torch.device, quick: bool, folder: Path) -> list[Stage]:
    """Whole stages: the gradient pass, a store read back, a Fisher fitted."""
    width, layers = (64, 1) if quick else ((2048, 4) if device.type == "cuda" else (512, 4))
    model = with_lora(qwen2_model(VOCABULARY, layers=layers, width=width), rank=RANK).to(device)
    examples = ragged_examples(4 if quick else 8, 16 if quick else 256)
    one = example_flops(model)
    weights = sum(p.nbytes for p in model.parameters())
    cost = Cost(round(sum(one(len(e["input_ids"])) for e in examples)), 2 * weights)
    projection = Projection(dim=DIM)
    found = [
        Stage(
            "gradient pass, fp32",
            cost,
            "fp32",
            lambda: per_example_gradients(model, examples, projection=projection),
        )
    ]
    if device.type == "cpu":
        rows, _, layout = world(quick)
        blocks = blocks_of(layout, 2)
        size = blocks[0][1]
        flops = len(blocks) * (len(rows) * size * (size + 1) + size**3 // 3)
        cost = Cost(flops, rows.nbytes + 8 * len(blocks) * size * size)
        found.append(Stage("Fisher fit", cost, "fp64", lambda: fit_fisher(lambda: rows.split(512), blocks, 0.1)))
        stored = heavy_tailed(64 if quick else 8192, 32 if quick else 4096, seed=0)
        store = write_store(folder / "store", stored, "bf16")
        cost = Cost(0, stored.numel() * (2 + 4))
        found.append(Stage("store, all rows in fp32", cost, "fp32", lambda: store.rows()))
    return found


def on_device(run: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """The call, and a wait for the card where there is one."""
    if device.type == "cpu":
        return run

    def waited() -> None:
        run()
        torch.cuda.synchronize()

    return waited


def measure(device: torch.device, quick: bool, rounds: int, threads: int) -> dict[str, Any]:
    """Everything in turn, `rounds` times after one to warm up."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        stages = [
            *kernel_stages(device, quick),
            *scoring_stages(device, quick, threads),
            *pipeline_stages(device, quick, Path(folder)),
        ]
        top = ceilings(device, quick)
        runs = {f"ceiling: {name}": run for name, run in top.runs.items()} | {s.name: s.run for s in stages}
        seconds = interleaved({name: on_device(run, device) for name, run in runs.items()}, rounds)
    rates = top.rates({name: seconds[f"ceiling: {name}"] for name in top.runs})
    bandwidth = [max(pair) for pair in zip(rates["copy"], rates["read"], strict=True)]
    return {
        "what": "floor / time of each stage, inside a round: median and quartiles",
        "command": COMMAND,
        "device": device.type,
        "threads": threads,
        "path": native.chosen(),
        "rounds": rounds,
        "ceilings": {name: spread(values)._asdict() for name, values in rates.items()},
        "stages": shares([(s.name, s.cost, s.dtype) for s in stages], seconds, bandwidth, rates),
        **describe(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=native.default_threads())
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--quick", action="store_true", help="tiny sizes, two rounds: does it run? nothing is written")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--plots", type=Path, help="folder for roofline.svg and roofline.png")
    args = parser.parse_args()
    if args.quick and (args.output or args.plots):
        parser.error("--quick times nothing worth keeping: leave out --output and --plots")
    torch.set_num_threads(args.threads)
    result = measure(torch.device(args.device), args.quick, 2 if args.quick else args.rounds, args.threads)
    for name, rate in result["ceilings"].items():
        unit = "GB/s" if name in ("copy", "read") else "GFLOP/s"
        print(f"{name:32s} {rate['median'] / 1e9:10.1f} {unit} ({rate['low'] / 1e9:.1f} to {rate['high'] / 1e9:.1f})")
    for stage in result["stages"]:
        share = stage["share"]
        print(
            f"{stage['name']:32s} {stage['seconds']['median'] * 1e3:10.2f} ms, of which "
            f"its floor by {stage['bound']:5s} is {share['median']:.0%} ({share['low']:.0%} to {share['high']:.0%})"
        )
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(result, indent=1) + "\n")
    if args.plots:
        plots.save(plots.roofline(result), args.plots / "roofline")


if __name__ == "__main__":
    main()
