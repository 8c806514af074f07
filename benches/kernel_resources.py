"""Registers, shared memory and spills of every Triton kernel as it would be launched, with no card needed.

    python -m benches.kernel_resources [--arch 80 90] [--format text|markdown|json] [--only NAME]

Each launcher is called under `recording` with tensors that have no memory, at the shapes of real layers; every launch
it would make is compiled ahead of time with the specialisation Triton would choose, and the numbers are what ptxas
says of the result. A kernel that spills exits with code 1.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from influence_fast.kernels import (
    column_ranks,
    project_flat,
    rms_norm,
    row_factors,
    score_tile,
    segment_bilinear,
    segment_outer,
    skinny_project,
)
from influence_fast.kernels.counter import fill_signs, fill_sjlt
from influence_fast.kernels.fp8_rows import LOWEST_CAPABILITY, fp8_rows
from influence_fast.kernels.gated_silu import gated_silu, gated_silu_backward
from influence_fast.kernels.quantize_rows import quantize_rows
from influence_fast.kernels.rotary import rotary
from influence_fast.kernels.runtime import INTERPRETED, WHY_NO_TRITON, Launch, recording
from influence_fast.kernels.segments import Segments
from influence_fast.kernels.token_loss import token_loss

# Shared memory a block may ask for, bytes (CUDA C++ programming guide, compute capabilities).
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}
ARCHITECTURES = tuple(SHARED_LIMIT)
# Kernels that are for newer cards alone, and the first of those.
NEWER = {"_fp8_rows_kernel": 10 * LOWEST_CAPABILITY[0] + LOWEST_CAPABILITY[1]}

_TYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
}


@dataclass(frozen=True, slots=True)
class Resources:
    """What one compiled kernel needs: registers a thread, bytes of shared memory a block, bytes spilled."""

    case: str
    kernel: str
    arch: int
    warps: int
    stages: int
    registers: int
    shared: int
    spill_stores: int
    spill_loads: int

    @property
    def spills(self) -> int:
        return self.spill_stores + self.spill_loads


def cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """(name, call) of every default configuration, at the shapes of a 7B model's layers."""
    meta = torch.device("meta")
    # Two examples fit one chunk, one is split: both paths are launched.
    segments = Segments.from_lengths([300, 400, 2000], device="cpu")
    tokens = segments.tokens
    on_meta = _on_meta(segments)
    many = _on_meta(Segments.from_lengths([100] * 64, device="cpu"))

    def tensor(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device=meta)

    for dtype in (torch.bfloat16, torch.float32):
        short = str(dtype).removeprefix("torch.").replace("bfloat", "bf").replace("float", "fp")
        for columns in (16, 32, 64, 96, 128, 256):
            for split in (False, True):
                x, a = tensor(tokens, 3584, dtype=dtype), tensor(columns, 3584, dtype=dtype)

                def project(x: torch.Tensor = x, a: torch.Tensor = a, s: bool = split) -> object:
                    return skinny_project.skinny_project(x, a.T, split=s)

                yield f"skinny_project {short} N={columns}{' split' if split else ''}", project
        for a_size, b_size in ((16, 16), (16, 8), (64, 16), (64, 64), (3584, 16), (16, 3584)):
            left = tensor(tokens, 2, a_size, dtype=dtype)
            right = tensor(tokens, 2, b_size, dtype=dtype)
            offsets = tensor(2, dtype=torch.int64)

            for stored in segment_outer.ROW_DTYPES:
                rows = tensor(3, 2 * a_size * b_size, dtype=stored)

                for whole in (False, True):

                    def outer(
                        left: torch.Tensor = left,
                        right: torch.Tensor = right,
                        rows: torch.Tensor = rows,
                        offsets: torch.Tensor = offsets,
                        whole: bool = whole,
                    ) -> object:
                        return segment_outer.segment_outer(left, right, on_meta, rows, offsets, whole=whole)

                    name = f"segment_outer {short} {a_size}x{b_size}, {_TYPES[stored]} rows"
                    yield f"{name}{', whole' if whole else ''}", outer
        for r_size in (8, 16, 64):
            g, h = tensor(tokens, 3584, dtype=dtype), tensor(tokens, r_size, dtype=dtype)
            queries = tensor(16, 3584, r_size, dtype=torch.float32)

            def bilinear(g: torch.Tensor = g, h: torch.Tensor = h, queries: torch.Tensor = queries) -> object:
                return segment_bilinear.segment_bilinear(g, h, queries, on_meta)

            yield f"segment_bilinear {short} r={r_size}", bilinear
        for kind, packed in (("sjlt", on_meta), ("rademacher", on_meta), ("rademacher", many)):
            for d, r in ((3584, 16), (16, 3584)):  # factor B, factor A
                sketch = _on_meta(project_flat.FlatSketch.of(kind, 0, "m/row", d, r, 8192))
                g, h = tensor(packed.tokens, d, dtype=dtype), tensor(packed.tokens, r, dtype=dtype)
                rows = tensor(packed.examples, 8192, dtype=torch.float32)

                def flat(
                    g: torch.Tensor = g,
                    h: torch.Tensor = h,
                    rows: torch.Tensor = rows,
                    packed: Segments = packed,
                    sketch: project_flat.FlatSketch = sketch,
                ) -> object:
                    return project_flat.project_flat(g, h, packed, sketch, rows, accumulate=True)

                yield f"project_flat {short} {kind} {d}x{r} E={packed.examples}", flat
        for width in (64, 128, 896, 3584, 8192, 16_384):
            x, w = tensor(tokens, width, dtype=dtype), tensor(width, dtype=dtype)
            yield (
                f"rms_norm {short} d={width}",
                lambda x=x, w=w: [rms_norm.rms_norm(x, w, 1e-6), rms_norm.rms_norm(x, w, 1e-6, round_first=False)],
            )
            yield f"rms_norm {short} d={width} backward", lambda x=x, w=w: rms_norm.rms_norm_backward(x, x, w, 1e-6)
        x = tensor(tokens, 18_944, dtype=dtype)
        yield f"gated_silu {short}", lambda x=x: [gated_silu(x, x), gated_silu_backward(x, x, x)]
        for size in (64, 128, 256):
            heads = tensor(1, tokens, 28, size, dtype=dtype).transpose(1, 2)
            angles = tensor(1, tokens, size, dtype=dtype)
            yield (
                f"rotary {short} D={size}",
                lambda x=heads, a=angles: [rotary(x, a, a), rotary(x, a, a, backward=True)],
            )
    for precision in ("tf32", "tf32x3"):
        for columns in (32, 128, 256):
            x = tensor(tokens, 3584, dtype=torch.float32)
            a = tensor(columns, 3584, dtype=torch.float32)
            yield (
                f"skinny_project {precision} N={columns}",
                lambda x=x, a=a, p=precision: skinny_project.skinny_project(x, a.T, precision=p, split=False),
            )
    # Triton turns every argument that is 1 into a constant, which is another program.
    ones = _on_meta(Segments.from_lengths([1], device="cpu"))
    single = _on_meta(Segments.from_lengths([1025], device="cpu"))
    for packed in (ones, single):
        case = f"all sizes 1, T={packed.tokens}"
        one = tensor(packed.tokens, 1)
        place = tensor(1, dtype=torch.int64)
        yield f"skinny_project {case}", lambda x=one: skinny_project.skinny_project(x, x[:1], split=True)
        yield (
            f"segment_outer {case}",
            lambda x=one[:, None], s=packed, o=place: segment_outer.segment_outer(x, x, s, tensor(1, 1), o),
        )
        yield (
            f"segment_bilinear {case}",
            lambda x=one, s=packed: segment_bilinear.segment_bilinear(x, x, tensor(1, 1, 1), s),
        )
        for kind in ("sjlt", "rademacher"):
            sketch = _on_meta(project_flat.FlatSketch.of(kind, 0, "m/row", 1, 1, 1))
            yield (
                f"project_flat {kind} {case}",
                lambda x=one, s=packed, k=sketch: project_flat.project_flat(x, x, s, k, tensor(1, 1)),
            )
        yield (
            f"rms_norm {case}",
            lambda x=one: [rms_norm.rms_norm(x, x[0], 1e-6), rms_norm.rms_norm_backward(x, x, x[0], 1e-6)],
        )
        yield f"gated_silu {case}", lambda x=one: [gated_silu(x, x), gated_silu_backward(x, x, x)]
        yield f"quantize_rows {case}", lambda x=one: quantize_rows(x.float())
        yield f"fp8_rows {case}", lambda x=one: fp8_rows(x)
    for width in (16, 8192, 8191):
        yield f"quantize_rows K={width}", lambda k=width: quantize_rows(tensor(16, k, dtype=torch.float32))
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for width in (48, 512, 896, 3584, 4864, 18_944, 18_943):
            yield (
                f"fp8_rows {_TYPES[dtype]} k={width}",
                lambda d=dtype, k=width: fp8_rows(tensor(1000, k, dtype=d), 1008),
            )
    for dtype in (torch.bfloat16, torch.float32):
        for vocabulary in (152_064, 61):
            yield (
                f"token_loss {_TYPES[dtype]} V={vocabulary}",
                lambda d=dtype, v=vocabulary: [
                    token_loss(
                        tensor(1024, v, dtype=d),
                        tensor(1024, dtype=torch.int64),
                        tensor(1024, dtype=torch.float32),
                        weights=weights,
                    )
                    for weights in (None, tensor(1024, dtype=torch.float32))
                ],
            )
    yield from _product_cases()
    yield "fill_signs", lambda: fill_signs(0, "m/in", 3584, 16, device=meta)
    yield "fill_sjlt", lambda: fill_sjlt(0, "m/row", 3584 * 16, 8192, device=meta)


def _product_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """(name, call) of the passes over tiles of inner products: every result at once and each alone."""
    meta = torch.device("meta")

    def tensor(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device=meta)

    def taken(dtype: torch.dtype, planes: int, queries: int, keep: int, *, every: bool = True) -> None:
        rows = 4096
        tile = score_tile.Tile(
            tensor(planes, rows, queries, dtype=dtype),
            tensor(planes, queries),
            tensor(rows, dtype=torch.int32),
            row_factor=tensor(rows),
        )
        lists = score_tile.GroupTables(
            tensor(9, dtype=torch.int32),
            tensor(8, dtype=torch.int32),
            tensor(8, score_tile.query_block(queries), dtype=torch.int8),
        )
        top = score_tile.RunningTop.of(queries, keep, rows, meta) if keep else None
        sums = tensor(rows, 4, dtype=torch.float64)
        found = score_tile.TileResults(tensor(rows, queries), tensor(queries, 10 * rows), sums, lists, top)
        score_tile.score_tile(tile, found if every else score_tile.TileResults(scores=found.scores))

    for dtype in (torch.int32, torch.float32):
        for planes in (1, 2, 4):
            for queries in (8, 64, 512):
                shape = f"{_TYPES[dtype]} P={planes} Q={queries}"
                yield f"score_tile {shape}", lambda a=(dtype, planes, queries, 0): taken(*a, every=False)
                yield f"score_tile {shape}, all", lambda a=(dtype, planes, queries, 10): taken(*a)
    for keep in (1, 100, 1000):
        yield f"score_tile top {keep}", lambda k=keep: taken(torch.int32, 1, 512, k)
    for count in (1, 200_000):
        yield (
            f"column_ranks N={count}",
            lambda n=count: column_ranks.add_column_ranks(
                tensor(4, n), tensor(3, dtype=torch.int32), tensor(4, dtype=torch.int32), tensor(n, 2).double()
            ),
        )
    for dtype in (torch.int8, torch.bfloat16):
        for width in (1, 517, 8192):
            yield (
                f"row_factors {_TYPES[dtype]} k={width}",
                lambda d=dtype, k=width: [
                    row_factors.row_factors(tensor(100, k, dtype=d), scales) for scales in (None, tensor(100))
                ],
            )


def measure(architectures: tuple[int, ...] = ARCHITECTURES, only: str = "") -> list[Resources]:
    """Compiles every distinct launch of every case whose name contains `only`, for each architecture it is for."""
    if WHY_NO_TRITON:
        raise RuntimeError(WHY_NO_TRITON)
    if INTERPRETED:
        raise RuntimeError("TRITON_INTERPRET=1 is set: nothing is compiled under the interpreter; unset it")
    work: list[tuple[str, Launch, int]] = []
    seen = set()
    for case, call in cases():
        if only not in case:
            continue
        with recording() as launches:
            call()
        for item in launches:
            identity = _identity(item)
            if identity not in seen:
                seen.add(identity)
                lowest = NEWER.get(item.kernel.__name__, 0)
                work += [(case, item, arch) for arch in architectures if arch >= lowest]
    results = [(case, item, arch, _compile(item, arch)) for case, item, arch in work]
    with ThreadPoolExecutor(max_workers=2) as pool:
        return list(pool.map(lambda found: _read(*found), results))


def table(rows: list[Resources], markdown: bool = False) -> str:
    """The figures as text, one line a kernel and architecture."""
    head = ["case", "kernel", "sm", "warps", "stages", "registers", "shared KB", "spill bytes"]
    body = [
        [
            row.case,
            row.kernel,
            str(row.arch),
            str(row.warps),
            str(row.stages),
            str(row.registers),
            f"{row.shared / 1024:.1f}",
            str(row.spills),
        ]
        for row in rows
    ]
    if markdown:
        lines = ["| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *body]]
        return "\n".join(lines)
    widths = [max(len(line[i]) for line in [head, *body]) for i in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in [head, *body]
    )


def _on_meta(value: Any) -> Any:
    """A dataclass of tables with its tensors moved to the device without memory."""
    fields = {name: getattr(value, name) for name in value.__slots__}
    moved = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in fields.items()}
    return type(value)(**moved)


def _specialise(item: Launch) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], Any]]:
    """Signature, constants and attributes as Triton's launcher derives them: 1 is a constant, 16 | n is known."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int], Any] = {}
    for place, name in enumerate(item.kernel.arg_names):
        if name in item.constants:
            signature[name], constants[name] = "constexpr", item.constants[name]
            continue
        value = item.arguments[name]
        if isinstance(value, torch.Tensor):
            signature[name] = "*" + _TYPES[value.dtype]
            aligned = (value.storage_offset() * value.element_size()) % 16 == 0
        elif isinstance(value, float):
            signature[name], aligned = "fp32", False
        elif value == 1 and not item.kernel.params[place].do_not_specialize:
            signature[name], constants[name], aligned = "constexpr", 1, False
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            aligned = value % 16 == 0 and not item.kernel.params[place].do_not_specialize
        if aligned:
            attributes[(place,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def _identity(item: Launch) -> tuple[object, ...]:
    signature, constants, attributes = _specialise(item)
    parts = (signature.items(), constants.items(), attributes.keys())
    return (item.kernel.__name__, *(tuple(part) for part in parts), item.num_warps, item.num_stages)


def _compile(item: Launch, arch: int) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes = _specialise(item)
    source = ASTSource(item.kernel, signature, constants, attributes)
    options = {"num_warps": item.num_warps, "num_stages": item.num_stages}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def _read(case: str, item: Launch, arch: int, compiled: Any) -> Resources:
    """Assembles the PTX once more with `ptxas -v`: the register and spill counts that need no card."""
    import triton

    with tempfile.TemporaryDirectory() as folder:
        ptx = Path(folder) / "kernel.ptx"
        ptx.write_text(compiled.asm["ptx"])
        target = re.search(r"^\.target\s+(sm_\w+)", compiled.asm["ptx"], re.MULTILINE)
        assert target is not None
        log = subprocess.run(
            [
                triton.knobs.nvidia.ptxas.path,
                "-v",
                "--regAllocOptLevel=2",
                f"--gpu-name={target.group(1)}",
                str(ptx),
                "-o",
                str(Path(folder) / "kernel.cubin"),
            ],
            check=True,
            capture_output=True,
            text=True,
        ).stderr

    def figure(pattern: str) -> int:
        found = re.search(pattern, log)
        if found is None:
            raise RuntimeError(f"ptxas -v said nothing of {pattern!r} for {case}: {log}")
        return int(found.group(1))

    return Resources(
        case=case,
        kernel=item.kernel.__name__,
        arch=arch,
        warps=item.num_warps,
        stages=item.num_stages,
        registers=figure(r"Used (\d+) registers"),
        shared=compiled.metadata.shared,
        spill_stores=figure(r"(\d+) bytes spill stores"),
        spill_loads=figure(r"(\d+) bytes spill loads"),
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", default=list(ARCHITECTURES), choices=ARCHITECTURES)
    parser.add_argument("--format", choices=("text", "markdown", "json"), default="text")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    options = parser.parse_args()
    rows = measure(tuple(options.arch), options.only)
    spilled = sum(row.spills > 0 for row in rows)
    if options.format == "json":
        print(json.dumps([asdict(row) | {"spills": row.spills} for row in rows]))
    else:
        print(table(rows, options.format == "markdown"))
        print(f"\n{len(rows)} kernels compiled, {spilled} with spills")
    return 1 if spilled else 0


if __name__ == "__main__":
    sys.exit(main())
