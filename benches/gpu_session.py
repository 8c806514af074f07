"""Everything that needs a card, in one command and under eight minutes: correctness first, then time.

    python -m benches.gpu_session [--output benches/results]
    python -m benches.gpu_session --smoke        # no card: tiny shapes on the CPU, to see that the script itself runs

1. tests/gpu: every kernel and the whole gradient path against the CPU; the session stops if one fails.
2. Kernels at Qwen2.5-7B's widths against the card's measured copy bandwidth, plain PyTorch and torch.compile.
3. Whole per-example-gradient steps at the shapes of Qwen2.5-0.5B, 1.5B and 7B (random weights, a few layers) beside a
   plain LoRA forward+backward of the same packed batch: seconds, tokens a second, model-FLOP utilisation, the share of
   the time in which the host is still launching, and the batch's peak memory beside the sum of docs/memory.md. As
   CUDA graphs too, with 8-bit base products where the card has them, and with attention that adds up in any order.
4. Rows to the host over eight packs: waited for after each pack, or written behind as fp32, bf16 and int8.
5. Streaming scores by the number of queries, by the kernel and by forming a factor's gradients.

Writes one JSON and one markdown table, named after the card and the date, with commit and versions.

From a checkout on a machine without a network: python -m pip install --no-build-isolation --no-deps -e .
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import influence_fast as inf
from benches.environment import describe
from influence_fast import attention, fp8
from influence_fast import streaming as stream
from influence_fast.engine import GradientEngine
from influence_fast.gradients import iter_gradient_rows
from influence_fast.kernels import quantize_rows as quantize
from influence_fast.kernels import segment_outer as outer
from influence_fast.kernels import skinny_project as skinny
from influence_fast.kernels import token_loss
from influence_fast.kernels.segments import Segments
from influence_fast.lora import layout_width
from influence_fast.loss import CARD_TOKENS, by_pytorch
from influence_fast.memory import gradient_memory
from influence_fast.packing import pack_examples

# hidden, intermediate, heads, key/value heads, vocabulary, layers run here (the 7B is repeated layers of its shape)
SHAPES = {
    "Qwen2.5-0.5B": (896, 4864, 14, 2, 151_936, 24),
    "Qwen2.5-1.5B": (1536, 8960, 12, 2, 151_936, 14),
    "Qwen2.5-7B": (3584, 18_944, 28, 4, 152_064, 4),
}
SMOKE_SHAPES = {"tiny": (64, 128, 2, 1, 300, 2)}
RANK = DIM = 16
ANY_ORDER = "triton, attention in any order"
BUDGET = 8 * 60


def timed(device: torch.device, run: Callable[[], Any], rounds: int) -> list[float]:
    """Seconds of each of `rounds` runs after a warm-up; the L2 cache is overwritten before each on a card."""
    run()
    flush = torch.empty(256 << 20, dtype=torch.int8, device=device) if device.type == "cuda" else None
    found = []
    for _ in range(rounds):
        if flush is not None:
            flush.zero_()
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            run()
            end.record()
            torch.cuda.synchronize()
            found.append(begin.elapsed_time(end) / 1e3)
        else:
            start = time.perf_counter()
            run()
            found.append(time.perf_counter() - start)
    return found


def summary(seconds: list[float]) -> dict[str, float]:
    """p20, p50 and p80."""
    ordered = sorted(seconds)
    at = lambda q: ordered[min(len(ordered) - 1, int(q * len(ordered)))]  # noqa: E731
    return {"p20": at(0.2), "p50": statistics.median(ordered), "p80": at(0.8)}


def correctness() -> dict[str, Any]:
    """Runs tests/gpu in as many processes as compile kernels at a time; stops the session where one fails."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "tests/gpu",
        "-q",
        "-x",
        "--import-mode=importlib",
        "-p",
        "no:cacheprovider",
    ]
    shares = max(1, min(8, (os.cpu_count() or 1) // 2))
    start = time.perf_counter()
    running = [
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"INFLUENCE_FAST_TEST_SHARE": f"{share}/{shares}"},
        )
        for share in range(shares)
    ]
    with ThreadPoolExecutor(shares) as pool:  # a pipe that nobody reads would fill up
        outputs = list(pool.map(lambda process: process.communicate()[0], running))
    last = [output.strip().splitlines()[-1] if output.strip() else "no output" for output in outputs]
    for line in last:
        print(f"tests/gpu: {line}", flush=True)
    for process, output in zip(running, outputs, strict=True):
        if process.returncode not in (0, 5):
            sys.exit(f"tests/gpu failed, so nothing was timed:\n{output[-6000:]}")
    return {"tests": last, "tests_seconds": time.perf_counter() - start}


def copy_bandwidth(device: torch.device, numbers: int, rounds: int) -> float:
    """Bytes read and written a second by a plain copy."""
    source = torch.empty(numbers, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / min(timed(device, lambda: target.copy_(source), rounds))


def of_128_rows(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """`skinny_project` with programs of twice the rows, which read w half as often: by arithmetic w is a third of what
    crosses the second-level cache at 32 columns. If it measures better, it belongs into `skinny_project.configuration`.
    """
    wide = {"BLOCK_T": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3}
    with mock.patch.object(skinny, "configuration", return_value=wide):
        return skinny.skinny_project(x, w)


def kernels(device: torch.device, tokens: int, widths: tuple[int, ...], rounds: int) -> list[dict[str, Any]]:
    """Kernels against their byte floor, plain PyTorch and torch.compile; on a CPU the PyTorch side alone."""
    bandwidth = copy_bandwidth(device, tokens * max(widths), rounds)
    rows = []

    def add(name: str, shape: str, cost: Any, variants: dict[str, Callable[[], Any]]) -> None:
        seconds = {variant: summary(timed(device, run, rounds)) for variant, run in variants.items()}
        best = seconds.get("triton", seconds["pytorch"])["p50"]
        row = {"kernel": name, "shape": shape, "seconds": seconds, "bytes": cost.bytes, "flops": cost.flops}
        row["share_of_copy_bandwidth"] = cost.bytes / best / bandwidth
        rows.append(row)
        print(f"{name:<16} {shape:<36} {best * 1e6:9.1f} us  {row['share_of_copy_bandwidth']:.0%} of copy", flush=True)

    triton = device.type == "cuda"
    for d in widths:
        for columns in (32, 64, 96):
            x = torch.randn(tokens, d, device=device).bfloat16()
            w = torch.randn(d, columns, device=device).bfloat16()
            variants: dict[str, Callable[[], Any]] = {"pytorch": lambda x=x, w=w: x @ w}
            if triton:
                compiled = torch.compile(lambda x, w: x @ w)
                variants["torch.compile"] = lambda x=x, w=w, f=compiled: f(x, w)
                variants["triton"] = lambda x=x, w=w: skinny.skinny_project(x, w)
                variants["triton, 128 rows"] = lambda x=x, w=w: of_128_rows(x, w)
            add("skinny_project", f"T={tokens} d={d} N={columns}", skinny.cost(tokens, d, columns), variants)
    modules = 28
    lengths = [tokens // 16] * 16
    left = torch.randn(tokens, modules, DIM, device=device).bfloat16()
    right = torch.randn(tokens, modules, RANK, device=device).bfloat16()
    segments = Segments.from_lengths(lengths, device=device)
    block = DIM * RANK
    offsets = torch.arange(modules, device=device) * block
    for stored in (torch.float32, torch.bfloat16):
        out = torch.empty(len(lengths), modules * block, dtype=stored, device=device)
        variants = {"pytorch": lambda: outer.reference(left, right, segments)}
        if triton:
            variants["triton"] = lambda out=out: outer.segment_outer(left, right, segments, out, offsets)
        cost = outer.cost(tokens, len(lengths), modules, DIM, RANK, row_itemsize=out.element_size())
        add("segment_outer", f"T={tokens} E=16 M={modules} {DIM}x{RANK} {out.element_size()}-byte rows", cost, variants)
    for width in (8192, 2 * block * 7 * modules):  # sketched rows, and the whole ones of a 7B model
        made = torch.randn(16, width, device=device)
        variants = {"pytorch": lambda made=made: quantize.reference(made)}
        if triton:
            variants["triton"] = lambda made=made: quantize.quantize_rows(made)
        add("quantize_rows", f"E=16 K={width}", quantize.cost(16, width), variants)
    counted, vocabulary = (CARD_TOKENS, 152_064) if triton else (64, 300)
    logits = torch.randn(counted, vocabulary, device=device).bfloat16()
    targets, weights = torch.arange(counted, device=device) % vocabulary, torch.rand(counted, device=device)
    losses = torch.empty(counted, device=device)
    variants = {"pytorch": lambda: by_pytorch(logits, targets, losses, weights).bfloat16()}
    if triton:
        fused = torch.compile(by_pytorch)
        variants["torch.compile"] = lambda: fused(logits, targets, losses, weights).bfloat16()
        variants["triton"] = lambda: token_loss.token_loss(logits, targets, losses, weights=weights)
    add("token_loss", f"n={counted} V={vocabulary}", token_loss.cost(counted, vocabulary), variants)
    return rows


def model_of(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Any:
    """A Qwen2-shaped peft model with random weights on the device."""
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen2Config, Qwen2ForCausalLM

    hidden, intermediate, heads, kv_heads, vocabulary, layers = shape
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=32_768,
        tie_word_embeddings=hidden < 3584,
    )
    with torch.device(device):
        model = Qwen2ForCausalLM(config).to(dtype)
    lora = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear")
    return get_peft_model(model, lora, autocast_adapter_dtype=False).to(device)


def matmul_flops(shape: tuple[int, ...], tokens: int) -> float:
    """Forward and activation backward through the frozen linears and the head: 4 N T."""
    hidden, intermediate, heads, kv_heads, vocabulary, layers = shape
    head_dim = hidden // heads
    attention = hidden * hidden * 2 + 2 * hidden * kv_heads * head_dim
    return 4.0 * tokens * (layers * (attention + 3 * hidden * intermediate) + vocabulary * hidden)


def ways_of(device: torch.device) -> dict[str, dict[str, Any]]:
    """Each way to run a step here, and the engine's options for it."""
    ways: dict[str, dict[str, Any]] = {"torch": {"backend": "torch"}}
    if device.type != "cuda":
        return ways
    ways |= {"triton": {"backend": "triton"}, "triton graphs": {"backend": "triton", "cuda_graphs": True}}
    ways[ANY_ORDER] = {"backend": "triton"}
    if torch.cuda.get_device_capability(device) >= fp8.LOWEST_CAPABILITY:
        ways["triton fp8"] = {"backend": "triton", "precision": fp8.FP8}
    return ways


@contextlib.contextmanager
def attention_of(way: str) -> Iterator[None]:
    """What attention's backward is asked for: one order, but for the way that is there to show what this costs."""
    if way != ANY_ORDER:
        yield
        return
    with mock.patch.object(attention, "_is_fused", return_value=False):
        yield


def launching_share(run: Callable[[], Any]) -> float:
    """Share of a batch's time after which the host has launched all of it; near 1, the card waits for the host."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    launched = time.perf_counter() - start
    torch.cuda.synchronize()
    return launched / (time.perf_counter() - start)


def steps(
    device: torch.device, shapes: dict[str, Any], tokens: int, rounds: int, deadline: float
) -> list[dict[str, Any]]:
    """Per-example projected gradients of one packed batch beside a plain LoRA forward+backward of it, interleaved."""
    rows = []
    peak = matmul_peak(device, 8192 if device.type == "cuda" else 256, rounds)
    ways = ways_of(device)
    for name, shape in shapes.items():
        if time.monotonic() > deadline:
            print(f"{name}: left out, the session's time is used up", flush=True)
            continue
        model = model_of(shape, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
        length = tokens // 16
        ids = [torch.randint(0, shape[4], (length,)) for _ in range(16)]
        examples = [{"input_ids": i, "labels": torch.where(torch.arange(length) < length // 8, -100, i)} for i in ids]
        packed = torch.stack(ids).to(device)
        labels = torch.stack([e["labels"] for e in examples]).to(device)
        projection = inf.Projection(dim=DIM)

        pack = pack_examples(examples, tokens)[0]

        def plain(model: Any = model, packed: Any = packed, labels: Any = labels) -> None:
            model(input_ids=packed, labels=labels, use_cache=False).loss.backward()
            model.zero_grad(set_to_none=True)

        seconds: dict[str, list[float]] = {}
        launching: dict[str, list[float]] = {}
        for _ in range(rounds):
            seconds.setdefault("plain LoRA step", []).extend(timed(device, plain, 1))
            for way, options in ways.items():
                with attention_of(way), GradientEngine(model, projection, **options) as engine:
                    run = partial(engine.run, pack)
                    if engine.cuda_graphs:
                        run()  # a shape is recorded when it is seen again, which the warm-up then is
                    found = timed(device, run, 1)
                    if engine.cuda_graphs and not (engine._graphs and engine._graphs.most_tokens):
                        print(f"{name}: no step was recorded, so there is no time for graphs", flush=True)
                        continue
                    if device.type == "cuda":
                        launching.setdefault(way, []).append(launching_share(run))
                seconds.setdefault(f"ours, {way}", []).extend(found)
        best = statistics.median(seconds.get("ours, triton", seconds["ours, torch"]))
        measured, summed = batch_memory(device, model, projection, pack)
        row = {
            "model": name,
            "layers": shape[5],
            "tokens": tokens,
            "seconds": {variant: summary(found) for variant, found in seconds.items()},
            "ratio_to_plain": best / statistics.median(seconds["plain LoRA step"]),
            "tokens_per_second": tokens / best,
            "model_flop_utilisation": matmul_flops(shape, tokens) / best / peak,
            "launching_share": {way: statistics.median(shares) for way, shares in launching.items()},
            "batch_memory_gib": measured,
            "batch_memory_sum_gib": summed,
        }
        rows.append(row)
        print(
            f"{name:<14} {row['ratio_to_plain']:.3f} x plain, {row['tokens_per_second']:.0f} tokens/s, "
            f"{row['model_flop_utilisation']:.0%} of the measured matmul peak",
            flush=True,
        )
        del model
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return rows


def batch_memory(device: torch.device, model: Any, projection: inf.Projection, pack: Any) -> tuple[float | None, float]:
    """GiB that one batch adds at its peak, as the allocator counts it (None on a CPU) and as the sum says."""
    checkpointing, measured = False, None
    with GradientEngine(model, projection) as engine:
        checkpointing = engine.overflows(len(pack.input_ids))
        if device.type == "cuda":
            engine.run(pack)
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            engine.run(pack)
            measured = (torch.cuda.max_memory_allocated() - before) / 2**30
        summed = gradient_memory(
            engine.base.config,
            len(pack.input_ids),
            parameters=0,
            rank=RANK,
            dim=DIM,
            examples=len(pack.indices),
            completion_tokens=int((pack.targets >= 0).sum()),
            weight_bytes=engine.linears[0].weight.element_size(),
            checkpointing=checkpointing,
            triton=engine.backend == "triton",
        )
    return measured, summed.batch / 2**30


def crossing(device: torch.device, shape: tuple[int, ...], tokens: int, rounds: int) -> list[dict[str, Any]]:
    """Seconds of eight packs with their rows on the host, by how the rows get there."""
    model = model_of(shape, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    length = tokens // 16
    ids = [torch.randint(0, shape[4], (length,)) for _ in range(8 * 16)]
    examples = [{"input_ids": i, "labels": i} for i in ids]
    projection = inf.Projection(dim=DIM)

    def waiting() -> None:
        with GradientEngine(model, projection) as engine:
            for pack in pack_examples(examples, tokens):
                engine.run(pack)[0].cpu()

    def behind(dtype: str) -> None:
        for _ in iter_gradient_rows(model, examples, projection=projection, max_tokens=tokens, row_dtype=dtype):
            pass

    ways: dict[str, Callable[[], Any]] = {"waited for": waiting}
    ways |= {f"behind, {dtype}": lambda dtype=dtype: behind(dtype) for dtype in ("fp32", "bf16", "int8")}
    found: dict[str, list[float]] = {}
    for _ in range(rounds):
        for way, run in ways.items():
            found.setdefault(way, []).extend(timed(device, run, 1))
    for way, seconds in found.items():
        print(f"rows {way:<14} {statistics.median(seconds):.4f} s for 8 packs", flush=True)
    return [{"rows": way, "packs": 8, "tokens": tokens, "seconds": summary(s)} for way, s in found.items()]


def streaming(device: torch.device, shape: tuple[int, ...], tokens: int, rounds: int) -> list[dict[str, Any]]:
    """Seconds of one pack's scores by the number of queries: the kernel for all of them, and never."""
    model = model_of(shape, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    length = tokens // 16
    ids = [torch.randint(0, shape[4], (length,)) for _ in range(16)]
    (pack,) = pack_examples([{"input_ids": i, "labels": i} for i in ids], tokens)
    width = layout_width(inf.gradient_layout(model))
    found = []
    for count in (1, 4, 16, 64):
        queries = torch.randn(count, width, device=device)
        seconds = {}
        for way, columns in (("kernel", 1 << 30), ("form", 0)):
            with mock.patch.object(stream, "_KERNEL_COLUMNS", columns):
                reducer = partial(stream.StreamReducer, queries=queries)  # by the linears and their layout
                with GradientEngine(model, None, reducer=reducer) as engine:
                    seconds[way] = summary(timed(device, lambda engine=engine: engine.run(pack), rounds))
        found.append({"queries": count, "tokens": tokens, "seconds": seconds})
        print(
            f"{count:>3} streamed queries: " + ", ".join(f"{w} {s['p50']:.4f} s" for w, s in seconds.items()),
            flush=True,
        )
    return found


def matmul_peak(device: torch.device, size: int, rounds: int) -> float:
    """FLOP/s of a large square product in the steps' dtype: the ceiling that utilisation is measured against."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / min(timed(device, lambda: a @ b, rounds))


def markdown(result: dict[str, Any]) -> str:
    """The tables, as they are committed beside the JSON."""
    lines = [
        f"# {result['machine']['gpu'] or result['machine']['cpu']}, commit {result['commit']}, {result['measured']}",
        "",
        "| kernel | shape | p50 us | share of copy bandwidth | PyTorch / ours |",
        "|---|---|---|---|---|",
    ]
    for row in result["kernels"]:
        ours = row["seconds"].get("triton", row["seconds"]["pytorch"])["p50"]
        ratio = row["seconds"]["pytorch"]["p50"] / ours
        share = row["share_of_copy_bandwidth"]
        lines.append(f"| {row['kernel']} | {row['shape']} | {ours * 1e6:.1f} | {share:.0%} | {ratio:.2f} |")
    lines += [
        "",
        "| model | layers | tokens | / plain LoRA step | tokens/s | MFU | as graphs, / plain | with fp8, / plain "
        "| attention in any order, / plain | launching | as graphs | batch GiB | by the sum |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["steps"]:
        memory = "" if row["batch_memory_gib"] is None else f"{row['batch_memory_gib']:.2f}"
        plain, shares = row["seconds"]["plain LoRA step"]["p50"], row["launching_share"]
        others = [row["seconds"].get(f"ours, {way}") for way in ("triton graphs", "triton fp8", ANY_ORDER)]
        cells = ["" if other is None else f"{other['p50'] / plain:.3f}" for other in others]
        cells += [f"{shares[way]:.0%}" if way in shares else "" for way in ("triton", "triton graphs")]
        lines.append(
            f"| {row['model']} | {row['layers']} | {row['tokens']} | {row['ratio_to_plain']:.3f} | "
            f"{row['tokens_per_second']:.0f} | {row['model_flop_utilisation']:.0%} | {' | '.join(cells)} | "
            f"{memory} | {row['batch_memory_sum_gib']:.2f} |"
        )
    lines += ["", "| rows to the host | packs | tokens each | p50 s |", "|---|---|---|---|"]
    for row in result["crossing"]:
        lines.append(f"| {row['rows']} | {row['packs']} | {row['tokens']} | {row['seconds']['p50']:.4f} |")
    lines += ["", "| streamed queries | tokens | kernel, s | formed gradients, s |", "|---|---|---|---|"]
    for row in result["streaming"]:
        kernel, form = (row["seconds"][way]["p50"] for way in ("kernel", "form"))
        lines.append(f"| {row['queries']} | {row['tokens']} | {kernel:.4f} | {form:.4f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("benches/results"))
    parser.add_argument("--smoke", action="store_true", help="tiny shapes on the CPU; writes nothing")
    args = parser.parse_args()
    deadline = time.monotonic() + BUDGET - 60
    if args.smoke:
        device = torch.device("cpu")
        result: dict[str, Any] = {
            "kernels": kernels(device, 256, (64,), 3),
            "steps": steps(device, SMOKE_SHAPES, 256, 2, deadline),
            "crossing": crossing(device, SMOKE_SHAPES["tiny"], 256, 2),
            "streaming": streaming(device, SMOKE_SHAPES["tiny"], 256, 2),
            **describe(),
        }
        print(markdown(result))
        return
    if not torch.cuda.is_available():
        sys.exit("no CUDA device: run this where there is one, or try the script itself with --smoke")
    device = torch.device("cuda")
    result = correctness()
    result["kernels"] = kernels(device, 16_384, (3584, 18_944), 20)
    result["steps"] = steps(device, SHAPES, 16_384, 5, deadline)
    result["crossing"] = crossing(device, SHAPES["Qwen2.5-0.5B"], 4096, 3) if time.monotonic() < deadline else []
    result["streaming"] = streaming(device, SHAPES["Qwen2.5-0.5B"], 4096, 3) if time.monotonic() < deadline else []
    result |= describe()
    args.output.mkdir(parents=True, exist_ok=True)
    card = str(result["machine"]["gpu"]).replace(" ", "-")
    stem = args.output / f"gpu-{card}-{datetime.now(UTC):%Y%m%d-%H%M}"
    stem.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    stem.with_suffix(".md").write_text(markdown(result))
    print(markdown(result) + f"written: {stem}.json, {stem}.md")


if __name__ == "__main__":
    main()
