"""Inner products of rows on a GPU: are they right, and what the passes add to cuBLAS (a part of `gpu_session`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benches.card_kernels import Variants, failing, profiled, summary, timed
from influence_fast.products import gpu, pytorch
from influence_fast.products.inner_products import ProductOptions, inner_products, quantize_rows

TOP = 100
# Time of the bare product over ours: scores alone, and group means and the top k with them.
TARGETS = {"scores": 0.95, "everything": 1 / 1.3}
TILE_MIB = (8, 16, 32, 64, 128)


def fused(device: torch.device, rows: int, width: int, rounds: int) -> Iterator[dict[str, Any]]:
    """Yield the seconds of fused inner products by dtype and number of queries beside the bare product by cuBLAS.

    Raises AssertionError before anything is timed if a result of a part of the rows is wrong.
    """
    made = torch.randn(rows, width, device=device)
    stored: dict[str, tuple[Tensor, Tensor | None]] = {"int8": quantized(made), "bf16": (made.bfloat16(), None)}
    del made
    isa = None if device.type == "cuda" else "torch"
    for kind, (values, scales) in stored.items():
        for count in (1, 2, 64, 129):
            few = slice(0, min(rows, 3001))
            check(values[few], None if scales is None else scales[few], count, isa)
        print(f"inner products of {kind} rows are right", flush=True)
    for kind, (values, scales) in stored.items():
        for count in (2, 64, 512):
            yield measure(values, scales, count, rounds, isa) | {"rows": rows, "width": width, "kind": kind}
    if device.type == "cuda":
        yield from tiles(*stored["int8"], rounds)


def quantized(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Round rows to int8 where they lie, a part at a time."""
    parts = [quantize_rows(part.cpu()) for part in rows.split(8192)]
    return torch.cat([part for part, _ in parts]).to(rows.device), torch.cat([s for _, s in parts]).to(rows.device)


def check(rows: Tensor, scales: Tensor | None, count: int, isa: str | None) -> None:
    """Raise AssertionError unless every result agrees with float64, and with the scores that were written."""
    generator = torch.Generator().manual_seed(count)
    queries = torch.randn(count, rows.shape[1], generator=generator).to(rows.device)
    groups = [[0, count - 1] if count > 1 else [0], list(range(count))]
    out = torch.full((len(rows), count), torch.nan, device=rows.device)
    keep = min(TOP, len(rows))
    found = inner_products(
        rows, queries, row_scales=scales, groups=groups, topk=keep, ranks=True, options=ProductOptions(out=out, isa=isa)
    )
    rounded = pytorch.Queries(queries, "int8" if rows.dtype == torch.int8 else "bfloat16")
    exact = rows.double() @ (rounded.values.double() * rounded.factor.double()[:, None]).T
    exact = exact if scales is None else exact * scales.double()[:, None]
    assert _off(out, exact) < 3e-5, f"scores are off by {_off(out, exact):.1e}"
    means = torch.stack([out[:, group].double().mean(1) for group in groups], 1)
    assert _off(found.group_means, means) < 1e-6, "group means are not those of the scores"
    ordered = out.T.contiguous().sort(dim=1, descending=True, stable=True)
    assert found.topk is not None
    assert torch.equal(found.topk[0], ordered.values[:, :keep]), "the top scores are not those of a sort"
    assert torch.equal(found.topk[1], ordered.indices[:, :keep]), "the top rows are not those of a stable sort"
    ranks = torch.stack([pytorch.average_ranks(column) for column in out.T], 1)
    by_group = torch.stack([ranks[:, group].mean(1) for group in groups], 1)
    assert _off(found.mean_ranks, by_group) < 1e-12, "mean ranks are not those of the scores"


def _off(found: Any, exact: Tensor) -> float:
    exact = exact.double()
    return float((found.double() - exact).norm() / exact.norm())


def measure(rows: Tensor, scales: Tensor | None, count: int, rounds: int, isa: str | None) -> dict[str, Any]:
    """Return seconds by variant, and those in which the GPU is busy."""
    device = rows.device
    queries, out = torch.randn(count, rows.shape[1], device=device), torch.empty(len(rows), count, device=device)
    groups = [list(range(0, count, 2)), list(range(1, count, 2))]

    def ours(by: str | None, **asked: Any) -> Callable[[], Any]:
        options = ProductOptions(out=None if asked else out, isa=by)
        return lambda: inner_products(rows, queries, row_scales=scales, options=options, **asked)

    variants: Variants = {"bare product": bare(rows, queries), "scores": ours(isa)}
    variants["everything"] = ours(isa, groups=groups, topk=TOP)
    variants["everything and ranks"] = ours(isa, groups=groups, topk=TOP, ranks=True)
    if device.type == "cuda":
        variants["scores, mma kernel"] = ours("mma")
    row: dict[str, Any] = {"queries": count, "seconds": {}, "card_seconds": {}, "errors": {}}
    for name, run in variants.items():
        with failing(f"{count} queries, {name}", row["errors"], name):
            row["seconds"][name] = summary(timed(device, run, rounds))
            row["card_seconds"][name] = profiled(run, device, 1)["seconds"]
    if "bare product" in row["seconds"]:
        first = row["seconds"]["bare product"]["p50"]
        row["of_the_bare_product"] = {name: first / found["p50"] for name, found in row["seconds"].items()}
    return row


def bare(rows: Tensor, queries: Tensor) -> Callable[[], Any]:
    """Return the product alone, of operands that are ready; int8 queries are padded to 8, as cuBLAS wants them."""
    if rows.dtype == torch.int8:
        padded = torch.zeros(-(-len(queries) // 8) * 8, queries.shape[1], dtype=torch.int8, device=rows.device)
        padded[: len(queries)] = queries.clamp(-1, 1).mul(127).to(torch.int8)
        return lambda: torch._int_mm(rows, padded.T)
    half = queries.bfloat16().T
    return lambda: rows @ half


def tiles(rows: Tensor, scales: Tensor | None, rounds: int) -> Iterator[dict[str, Any]]:
    """Yield the seconds of 512 int8 queries by the size of a tile's products."""
    before = gpu._TILE_BYTES
    try:
        for mib in TILE_MIB:
            gpu._TILE_BYTES = mib << 20
            found = measure(rows, scales, 512, rounds, None)
            yield found | {"rows": len(rows), "width": rows.shape[1], "kind": f"int8, tiles of {mib} MiB"}
    finally:
        gpu._TILE_BYTES = before


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Return the lines of the markdown table."""
    ways = ("bare product", "scores", "everything", "everything and ranks", "scores, mma kernel")
    targets = ", ".join(f"{name} {target:.2f}" for name, target in TARGETS.items())
    lines = [
        f"Milliseconds (and of the bare product's speed: targets {targets}):",
        "",
        f"| rows | numbers a row | dtype | queries | {' | '.join(ways)} |",
        f"{'|---' * (4 + len(ways))}|",
    ]
    for row in rows:
        seconds, of = row["seconds"], row.get("of_the_bare_product", {})
        cells = [f"{seconds[w]['p50'] * 1e3:.2f} ({of.get(w, float('nan')):.2f})" if w in seconds else "" for w in ways]
        lines.append(f"| {row['rows']} | {row['width']} | {row['kind']} | {row['queries']} | {' | '.join(cells)} |")
    return lines
