"""Kernels on a card: against the bytes they must move, plain PyTorch and torch.compile (a part of `gpu_session`)."""

from __future__ import annotations

import contextlib
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch._functorch import config as functorch

from influence_fast.gradients.model.loss import CARD_TOKENS, by_pytorch
from influence_fast.kernels import fp8_rows as eight
from influence_fast.kernels import gated_silu as gated
from influence_fast.kernels import quantize_rows as quantize
from influence_fast.kernels import rms_norm as norm
from influence_fast.kernels import rotary as rotate
from influence_fast.kernels import segment_outer as outer
from influence_fast.kernels import skinny_project as skinny
from influence_fast.kernels import token_loss
from influence_fast.kernels.fp8_rows import LOWEST_CAPABILITY
from influence_fast.kernels.segments import Segments
from influence_fast.products.inner_products import ProductOptions, inner_products, quantize_rows
from influence_fast.row_codec import to_int8

RANK = DIM = 16
MODULES = 196  # LoRA linears of Qwen2.5-7B
HOST_ROWS, STREAMED = "int8 rows of the host, by its cores", "int8 rows of the host, streamed"
AHEAD = 1_000_000  # cycles, half a millisecond

Variants = dict[str, Callable[[], Any]]


def timed(device: torch.device, run: Callable[[], Any], rounds: int, ahead: int = 0) -> list[float]:
    """Seconds of each of `rounds` runs after a warm-up; the L2 cache is overwritten before each on a card.

    ahead: cycles that the card is kept busy before, so that the host has launched all by when the clock starts.
    """
    run()
    flush = torch.empty(256 << 20, dtype=torch.int8, device=device) if device.type == "cuda" else None
    found = []
    for _ in range(rounds):
        if flush is not None:
            flush.zero_()
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            if ahead:
                torch.cuda._sleep(ahead)
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


def copy_bandwidth(device: torch.device, moved: int, rounds: int) -> float:
    """Bytes a second of a plain copy that moves so many, reads and writes together."""
    source = torch.empty(moved // 4, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / statistics.median(timed(device, lambda: target.copy_(source), rounds, AHEAD))


def matmul_peak(device: torch.device, size: int, rounds: int) -> float:
    """FLOP/s of a large square product in the steps' dtype: the ceiling that utilisation is measured against."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / min(timed(device, lambda: a @ b, rounds))


def profiled(run: Callable[[], Any], device: torch.device, shown: int) -> dict[str, Any]:
    """Seconds and calls of what `run` has a card do, by kernel (on a CPU: by operation), the longest first."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity

    activities = [ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU]
    run()
    run()
    with torch.profiler.profile(activities=activities) as watched:
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
    on = DeviceType.CUDA if device.type == "cuda" else DeviceType.CPU
    calls: dict[str, int] = {}
    seconds: dict[str, float] = {}
    for event in watched.events():
        if event.device_type == on:
            own = event.device_time if device.type == "cuda" else event.self_cpu_time_total
            calls[event.name] = calls.get(event.name, 0) + 1
            seconds[event.name] = seconds.get(event.name, 0.0) + own / 1e6
    longest = sorted(seconds, key=lambda kernel: -seconds[kernel])[:shown]
    return {
        "seconds": sum(seconds.values()),
        "kernels": sum(calls.values()),
        "longest": [{"kernel": k[:160], "calls": calls[k], "seconds": seconds[k]} for k in longest],
    }


@contextlib.contextmanager
def failing(what: str, errors: dict[str, str], key: str) -> Iterator[None]:
    """Keeps an error of the block as `errors[key]`, says it, and goes on: what else there is to measure is not lost."""
    try:
        yield
    except Exception as error:
        errors[key] = f"{type(error).__name__}: {error}"[:500]
        print(f"{what} failed:\n{traceback.format_exc()[-2000:]}", flush=True)
    if errors.get(key) and torch.cuda.is_available():
        torch.cuda.empty_cache()  # what the failed one held


class Table:
    """Rows of measured kernels."""

    def __init__(self, device: torch.device, bandwidth: float, rounds: int) -> None:
        self.device, self.bandwidth, self.rounds = device, bandwidth, rounds
        self.rows: list[dict[str, Any]] = []

    def add(self, name: str, shape: str, cost: Any, variants: Variants) -> None:
        """Times each variant; one that fails has its error in the row, and the others are timed all the same."""
        seconds: dict[str, dict[str, float]] = {}
        errors: dict[str, str] = {}
        for variant, run in variants.items():
            with failing(f"{name} {shape}, {variant}", errors, variant):
                # a reference may launch an operation an example
                ahead = AHEAD if variant.startswith("triton") else 20 * AHEAD
                seconds[variant] = summary(timed(self.device, run, self.rounds, ahead))
        row = {"kernel": name, "shape": shape, "seconds": seconds, "bytes": cost.bytes, "flops": cost.flops}
        if errors:
            row["errors"] = errors
        self.rows.append(row)
        ours = seconds.get("pytorch" if self.device.type == "cpu" else "triton")
        if ours is None:
            return
        row["share_of_copy_bandwidth"] = share = cost.bytes / ours["p50"] / self.bandwidth
        # the launch, and the last programs' end, are a larger part of a short kernel's time, and of a copy's
        as_large = copy_bandwidth(self.device, cost.bytes, self.rounds)
        row["share_of_as_large_a_copy"] = beside = cost.bytes / ours["p50"] / as_large
        print(
            f"{name:<19} {shape:<44} {ours['p50'] * 1e6:9.1f} us  {share:.0%} of copy, {beside:.0%} of one as large",
            flush=True,
        )


def kernels(device: torch.device, tokens: int, widths: tuple[int, ...], modules: int, rounds: int) -> dict[str, Any]:
    """Kernels against their byte floor, plain PyTorch and torch.compile; on a CPU the PyTorch side alone."""
    table = Table(device, copy_bandwidth(device, 4 * tokens * max(widths), rounds), rounds)
    print(f"a copy moves {table.bandwidth / 1e12:.3f} TB/s", flush=True)
    groups: dict[str, Callable[[], None]] = {
        f"skinny_project d={d}": partial(_projections, table, tokens, d) for d in widths
    }
    groups |= {f"segment_outer d={d}": partial(_exact_sums, table, tokens, d) for d in widths}
    groups |= {
        "segment_outer": partial(_projected_sums, table, tokens, modules),
        "quantize_rows": partial(_quantization, table, modules),
        "fp8_rows": partial(_rounding, table, tokens, widths),
        "token_loss": partial(_losses, table),
        "layers": partial(_layer, table, tokens, min(widths), max(widths)),
    }
    errors: dict[str, str] = {}
    for name, run in groups.items():
        with failing(name, errors, name):
            run()
    return {"copy_bytes_per_second": table.bandwidth, "rows": table.rows, "errors": errors}


def _projections(table: Table, tokens: int, d: int) -> None:
    for columns in (32, 64, 96):
        x = torch.randn(tokens, d, device=table.device).bfloat16()
        w = torch.randn(d, columns, device=table.device).bfloat16()
        variants: Variants = {"pytorch": lambda: x @ w}  # noqa: B023
        if table.device.type == "cuda":
            compiled = torch.compile(lambda x, w: x @ w)
            variants["torch.compile"] = lambda: compiled(x, w)  # noqa: B023
            variants["triton"] = lambda: skinny.skinny_project(x, w)  # noqa: B023
            for split in (False, True):
                variants[f"triton, split {split}"] = lambda split=split: skinny.skinny_project(x, w, split=split)  # noqa: B023
        table.add("skinny_project", f"T={tokens} d={d} N={columns}", skinny.cost(tokens, d, columns), variants)


def _exact_sums(table: Table, tokens: int, d: int) -> None:
    """A factor's exact gradients of 16 examples, straight into rows: dA of a module that reads d numbers a token."""
    segments = Segments.from_lengths([tokens // 16] * 16, device=table.device)
    on_host = Segments.from_lengths([tokens // 16] * 16)  # PyTorch's way slices by these, with no wait for the card
    u = torch.randn(tokens, 1, RANK, device=table.device).bfloat16()
    x = torch.randn(tokens, 1, d, device=table.device).bfloat16()
    rows, start = (
        torch.zeros(n, dtype=t, device=table.device) for n, t in ((16 * RANK * d, torch.float32), (1, torch.int64))
    )
    variants: Variants = {"pytorch": lambda: outer.reference(u, x, on_host)}
    if table.device.type == "cuda":
        by = lambda whole: outer.segment_outer(u, x, segments, rows.view(16, -1), start, whole=whole)  # noqa: E731
        variants |= {"triton": lambda: by(None), "triton, by chunks": lambda: by(False)}
    cost = outer.cost(tokens, 16, 1, RANK, d, row_itemsize=4)
    table.add("segment_outer", f"T={tokens} E=16 {RANK}x{d} exact", cost, variants)


def both_sides(device: torch.device, tokens: int, modules: int) -> list[tuple[torch.Tensor, ...]]:
    """(left, right, offsets) of dA and of dB of all modules, as the engine keeps them: columns of [u | y] and [h | z],
    each module's tokens side by side."""
    u_y, h_z = (torch.randn(modules, tokens, RANK + DIM, device=device).bfloat16().transpose(0, 1) for _ in range(2))
    at = torch.arange(2 * modules, device=device) * DIM * RANK
    return [
        (u_y[..., :RANK], h_z[..., RANK:], at[0::2].contiguous()),
        (u_y[..., RANK:], h_z[..., :RANK], at[1::2].contiguous()),
    ]


def _projected_sums(table: Table, tokens: int, modules: int) -> None:
    segments = Segments.from_lengths([tokens // 16] * 16, device=table.device)
    on_host = Segments.from_lengths([tokens // 16] * 16)
    sides = both_sides(table.device, tokens, modules)
    for stored in (torch.float32, torch.bfloat16):
        out = torch.empty(16, 2 * modules * DIM * RANK, dtype=stored, device=table.device)

        def both(whole: bool | None, out: torch.Tensor = out) -> None:
            for a, b, at in sides:
                outer.segment_outer(a, b, segments, out, at, whole=whole)

        variants: Variants = {"pytorch": lambda: [outer.reference(a, b, on_host) for a, b, _ in sides]}
        if table.device.type == "cuda":
            variants |= {"triton": partial(both, None), "triton, by chunks": partial(both, False)}
        one = outer.cost(tokens, 16, modules, DIM, RANK, row_itemsize=out.element_size())
        cost = type(one)(2 * one.flops, 2 * one.bytes)
        shape = f"T={tokens} E=16 M={modules} {DIM}x{RANK}, both sides, {out.element_size()}-byte rows"
        table.add("segment_outer", shape, cost, variants)


def _quantization(table: Table, modules: int) -> None:
    for width in (8192, 2 * DIM * RANK * modules):  # sketched rows, and the whole ones of a 7B model
        made = torch.randn(16, width, device=table.device)
        variants: Variants = {"pytorch": lambda: to_int8(made)}  # noqa: B023
        if table.device.type == "cuda":
            variants["triton"] = lambda: quantize.quantize_rows(made)  # noqa: B023
        table.add("quantize_rows", f"E=16 K={width}", quantize.cost(16, width), variants)


def _rounding(table: Table, tokens: int, widths: tuple[int, ...]) -> None:
    """Rows for 8-bit products, where a card has those."""
    on_card = table.device.type == "cuda"
    if on_card and torch.cuda.get_device_capability(table.device) < LOWEST_CAPABILITY:
        return
    for k in (512, *widths):  # gradients of k and v, inputs and gradients of the others
        matrix = torch.randn(tokens, k, device=table.device).bfloat16()
        variants: Variants = {"pytorch": lambda: eight.reference(matrix)}  # noqa: B023
        if on_card:
            fused = torch.compile(eight.reference)
            variants["torch.compile"] = lambda: fused(matrix)  # noqa: B023
            variants["triton"] = lambda: eight.fp8_rows(matrix)  # noqa: B023
        table.add("fp8_rows", f"n={tokens} k={k}", eight.cost(tokens, k), variants)


def _losses(table: Table) -> None:
    device = table.device
    counted, vocabulary = (CARD_TOKENS, 152_064) if device.type == "cuda" else (64, 300)
    logits = torch.randn(counted, vocabulary, device=device).bfloat16()
    targets, weights = torch.arange(counted, device=device) % vocabulary, torch.rand(counted, device=device)
    losses = torch.empty(counted, device=device)
    variants: Variants = {"pytorch": lambda: by_pytorch(logits, targets, losses, weights).bfloat16()}
    if device.type == "cuda":
        fused = torch.compile(by_pytorch)
        variants["torch.compile"] = lambda: fused(logits, targets, losses, weights).bfloat16()
        variants["triton"] = lambda: token_loss.token_loss(logits, targets, losses, weights=weights)
    table.add("token_loss", f"n={counted} V={vocabulary}", token_loss.cost(counted, vocabulary), variants)


def _layer(table: Table, tokens: int, hidden: int, mlp: int) -> None:
    """Parts of a layer, forward and backward; PyTorch's are what transformers writes, differentiated."""
    device = table.device
    x, g = (torch.randn(tokens, hidden, device=device).bfloat16() for _ in range(2))
    w, eps = torch.randn(hidden, device=device).bfloat16(), 1e-6
    _both_ways(
        table,
        f"rms_norm T={tokens} d={hidden}",
        partial(norm.reference, w=w, eps=eps),
        [x],
        g,
        (lambda: norm.rms_norm(x, w, eps), lambda: norm.rms_norm_backward(g, x, w, eps)),
        partial(norm.cost, tokens, hidden),
    )
    a, b, c = (torch.randn(tokens, mlp, device=device).bfloat16() for _ in range(3))
    _both_ways(
        table,
        f"gated_silu T={tokens} f={mlp}",
        gated.reference,
        [a, b],
        c,
        (lambda: gated.gated_silu(a, b), lambda: gated.gated_silu_backward(c, a, b)),
        partial(gated.cost, a.numel()),
    )
    heads = x.view(1, tokens, -1, min(128, hidden)).transpose(1, 2)
    _, count, _, size = heads.shape
    cos, sin = torch.randn(2, 1, tokens, size, device=device).bfloat16()
    _both_ways(
        table,
        f"rotary T={tokens} h={count} D={size}",
        partial(rotate.reference, cos=cos, sin=sin),
        [heads],
        heads,
        (lambda: rotate.rotary(heads, cos, sin), lambda: rotate.rotary(heads, cos, sin, backward=True)),
        lambda backward: rotate.cost(tokens, count, size),
    )


@functorch.patch(donated_buffer=False)  # or a compiled backward could be timed only once
def _both_ways(
    table: Table,
    named: str,
    reference: Callable[..., Any],
    inputs: list[torch.Tensor],
    grad: torch.Tensor,
    kernels: tuple[Callable[[], Any], Callable[[], Any]],  # forward, backward
    cost: Callable[..., Any],  # of `backward`
) -> None:
    """A row for the forward and one for the backward of `reference`, by PyTorch and by the kernels."""
    leaves = [one.detach().requires_grad_() for one in inputs]

    def gradient_by(function: Callable[..., Any]) -> Callable[[], Any]:
        made = function(*leaves)
        return lambda: torch.autograd.grad(made, leaves, grad, retain_graph=True)

    forward: Variants = {"pytorch": lambda: reference(*inputs)}
    backward: Variants = {"pytorch": gradient_by(reference)}
    if table.device.type == "cuda":
        fused = torch.compile(reference)
        forward |= {"torch.compile": lambda: fused(*inputs), "triton": kernels[0]}
        backward |= {"torch.compile": gradient_by(fused), "triton": kernels[1]}
    name, _, shape = named.partition(" ")
    table.add(name, shape, cost(backward=False), forward)
    table.add(f"{name} backward", shape, cost(backward=True), backward)


def products(device: torch.device, rows: int, width: int, rounds: int) -> Iterator[dict[str, Any]]:
    """Seconds of inner products of `rows` stored rows with queries, all on the device, by ours and by PyTorch.

    And those in which the card is busy, without the host's part, which a scoring has once and not once a block of rows.
    """
    made = torch.randn(rows, width, device=device)
    int8, scales = (quantize.quantize_rows if device.type == "cuda" else quantize_rows)(made)
    bf16 = made.bfloat16()
    del made
    on_host, its_scales = int8.cpu().numpy(), scales.cpu().numpy()
    ours = None if device.type == "cuda" else "torch"
    for count in (2, 64, 512):
        queries = torch.randn(count, width, device=device)
        variants: Variants = {
            "ours, int8": lambda: inner_products(int8, queries, row_scales=scales, options=ProductOptions(isa=ours)),  # noqa: B023
            "ours, bf16": lambda: inner_products(bf16, queries, options=ProductOptions(isa=ours)),  # noqa: B023
            "PyTorch, bf16": lambda: bf16 @ queries.bfloat16().T,  # noqa: B023
        }
        host = partial(inner_products, on_host, queries.cpu().numpy(), row_scales=its_scales)
        variants[HOST_ROWS] = host
        if device.type == "cuda":
            variants[STREAMED] = partial(host, options=ProductOptions(device=device))
        if device.type == "cuda" and count >= 32:
            rounded = queries.clamp(-1, 1).mul(127).to(torch.int8).T
            variants["torch._int_mm"] = lambda: torch._int_mm(int8, rounded).float().mul_(scales[:, None])  # noqa: B023
        row: dict[str, Any] = {"rows": rows, "width": width, "queries": count}
        row |= {"seconds": {}, "card_seconds": {}, "errors": {}}
        for name, run in variants.items():
            with failing(f"{count} queries, {name}", row["errors"], name):
                row["seconds"][name] = summary(timed(device, run, rounds))
                row["card_seconds"][name] = profiled(run, device, 1)["seconds"]
        times = ", ".join(
            f"{name} {s['p50'] * 1e3:.2f} ms ({row['card_seconds'][name] * 1e3:.2f} on the card)"
            for name, s in row["seconds"].items()
        )
        print(f"{count:>4} queries of {rows} rows: {times}", flush=True)
        yield row
