"""Everything that needs a card, in one command and under eight minutes: correctness first, then time.

    python -m benches.gpu_session [--output benches/results] [--only kernels steps ...] [--keep-going]
    python -m benches.gpu_session --smoke        # no card: tiny shapes on the CPU, to see that the script itself runs

tests      tests/gpu: every kernel and the whole gradient path against the CPU; the session stops if one fails.
kernels    At Qwen2.5-7B's widths against the card's measured copy bandwidth, plain PyTorch and torch.compile.
steps      Whole per-example-gradient steps at the shapes of Qwen2.5-0.5B, 1.5B and 7B (random weights, a few layers)
           beside a plain LoRA forward+backward of the same packed batch: seconds, tokens a second, model-FLOP
           utilisation, the share of the time in which the host is still launching, and the batch's peak memory beside
           the sum of docs/memory.md. Operation by operation too, without CUDA graphs; with 8-bit base products where
           the card has them; with attention that adds up in any order.
profile    Where a step's time on the card goes, kernel by kernel, ours and plain (7B and 0.5B).
crossing   Rows to the host over some packs: waited for after each, or written behind as fp32, bf16 and int8.
streaming  Scores by the number of queries, by the kernel and by forming a factor's gradients.
products   Inner products of stored rows with queries, both on the card, by our kernels and by PyTorch.
fused      The same with every result, over the bare product by cuBLAS; results are compared with float64 first.
long       One trace of 32k tokens through a whole model of Qwen2.5-7B's shape: does it fit, how long does it take.

Writes one JSON and one markdown table, named after the card and the date, with commit and versions, after every row:
what is measured is kept whatever comes after, and what fails is kept as its error. What failing tests print goes into a
file beside them.

From a checkout on a machine without a network: python -m pip install --no-build-isolation --no-deps -e .
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benches import card_kernels, card_products, card_steps
from benches.environment import describe

ROOT = Path(__file__).resolve().parents[1]  # `python -m` puts the folder it runs in first on the path
BUDGET = 8 * 60
TEST_LIMIT = 240  # seconds for all tests of a process
ONE_TEST = 100  # seconds, after which pytest names it


def correctness(log: Path | None) -> dict[str, Any]:
    """Runs tests/gpu in as many processes as there are cores, which compile kernels at the same time.

    log: file for what the processes with failures print.
    """
    command = [sys.executable, "-m", "pytest", "tests/gpu", "-q", "--tb=short", "--maxfail=8", "-rfE"]
    command += ["--import-mode=importlib", "-p", "no:cacheprovider", f"--timeout={ONE_TEST}"]
    shares = max(1, min(16, os.cpu_count() or 1))
    start = time.perf_counter()
    running = [
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
            env=os.environ
            | {"INFLUENCE_FAST_TEST_SHARE": f"{share}/{shares}", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
        )
        for share in range(shares)
    ]
    with ThreadPoolExecutor(shares) as pool:  # a pipe that nobody reads would fill up
        outputs = list(pool.map(_output, running))
    counts: Counter[str] = Counter()
    for output in outputs:
        last = output.strip().splitlines()[-1] if output.strip() else ""
        counts.update({what: int(n) for n, what in re.findall(r"(\d+) (passed|failed|skipped|errors?)", last)})
    failed = [
        output
        for process, output in zip(running, outputs, strict=True)
        if process.returncode not in (0, 5)  # 5: a share of no tests
    ]
    seconds = time.perf_counter() - start
    print(f"tests/gpu: {dict(counts)}, {seconds:.0f} s", flush=True)
    names = sorted({line[:300] for output in failed for line in re.findall(r"^(?:FAILED|ERROR) .*", output, re.M)})
    print("\n".join(names), flush=True)
    if log is not None and failed:
        log.write_text("\n\n".join(failed))
        print(f"what they print: {log}", flush=True)
    return {**counts, "processes_failed": len(failed), "failed_tests": names, "seconds": seconds}


def _output(process: subprocess.Popen[str]) -> str:
    """What a process printed; one that hangs is ended, and counts as failed."""
    try:
        return process.communicate(timeout=TEST_LIMIT)[0]
    except subprocess.TimeoutExpired:
        process.kill()
        return process.communicate()[0] + f"\nended after {TEST_LIMIT} s"


class Session:
    """The results so far, and the files they are kept in."""

    def __init__(self, output: Path | None, deadline: float, only: list[str]) -> None:
        self.deadline, self.only = deadline, only
        self.result: dict[str, Any] = describe()
        self.stem: Path | None = None
        if output is not None:
            output.mkdir(parents=True, exist_ok=True)
            card = str(self.result["machine"]["gpu"]).replace(" ", "-")
            self.stem = output / f"gpu-{card}-{datetime.now(UTC):%Y%m%d-%H%M}"

    def part(self, name: str, run: Callable[[], Any]) -> Any:
        """Runs a part, unless it is not asked for or the time is used up; one that fails does not stop the others.

        One that yields rows has each kept as it comes.
        """
        if self.only and name not in self.only:
            return None
        if time.monotonic() > self.deadline:
            self.result.setdefault("left_out", []).append(name)
            print(f"{name}: left out, the session's time is used up", flush=True)
            return None
        start = time.perf_counter()
        try:
            found = run()
            if isinstance(found, Iterator):
                self.result[name] = []
                for row in found:
                    self.result[name].append(row)
                    self._keep()
            else:
                self.result[name] = found
        except Exception:
            self.result.setdefault("failed", {})[name] = traceback.format_exc()
            print(f"{name} failed:\n{traceback.format_exc()}", flush=True)
        print(f"-- {name}: {time.perf_counter() - start:.0f} s", flush=True)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self._keep()
        return self.result.get(name)

    def _keep(self) -> None:
        """Writes what there is so far."""
        if self.stem is None:
            return
        self.stem.with_suffix(".json").write_text(json.dumps(self.result, indent=1) + "\n")
        try:
            self.stem.with_suffix(".md").write_text(markdown(self.result))
        except Exception:  # the numbers are kept, and a table can be made of them later
            print(f"no tables:\n{traceback.format_exc()}", flush=True)


def markdown(result: dict[str, Any]) -> str:
    """The tables, as they are committed beside the JSON."""
    lines = [
        f"# {result['machine']['gpu'] or result['machine']['cpu']}, commit {result['commit']}, {result['measured']}"
    ]
    for name, table in TABLES.items():
        if result.get(name):
            lines += ["", *table(result[name])]
    if failed := list(_errors(result)):
        lines += ["", "Not measured:", "", *failed]
    return "\n".join(lines) + "\n"


def _errors(result: Any, where: str = "") -> Iterator[str]:
    """A line for each error that a row has."""
    if isinstance(result, dict):
        errors = result.get("errors")  # of the tests it is a number
        for key, error in errors.items() if isinstance(errors, dict) else ():
            of = " ".join(str(result[k]) for k in ("kernel", "model", "shape", "queries") if k in result)
            yield f"- {where}: {of}, {key}: {' '.join(error.split())}"
        for key, value in result.items():
            yield from _errors(value, where or key)
    elif isinstance(result, list):
        for row in result:
            yield from _errors(row, where)


def _kernels_table(part: dict[str, Any]) -> list[str]:
    lines = [
        f"A plain copy moves {part['copy_bytes_per_second'] / 1e12:.2f} TB/s, reads and writes together.",
        "",
        "| kernel | shape | p50 us | share of copy bandwidth | of a copy of as many bytes | PyTorch / ours "
        "| torch.compile / ours |",
        f"{'|---' * 7}|",
    ]
    for row in part["rows"]:
        if "share_of_copy_bandwidth" not in row:
            continue
        seconds = {variant: found["p50"] for variant, found in row["seconds"].items()}
        ours = seconds["triton"] if "triton" in seconds else seconds["pytorch"]
        plain, compiled = (
            f"{seconds[way] / ours:.2f}" if way in seconds else "" for way in ("pytorch", "torch.compile")
        )
        lines.append(
            f"| {row['kernel']} | {row['shape']} | {ours * 1e6:.1f} | {row['share_of_copy_bandwidth']:.0%} | "
            f"{row['share_of_as_large_a_copy']:.0%} | {plain} | {compiled} |"
        )
    return lines


def _steps_table(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| model | layers | tokens | / plain LoRA step | tokens/s | MFU | operation by operation, / plain "
        "| with fp8, / plain | the model's own norms and MLPs, / plain | attention in any order, / plain "
        "| PyTorch alone, / plain | launching | operation by operation | batch GiB | by the sum |",
        f"{'|---' * 15}|",
    ]
    for row in rows:
        if "ratio_to_plain" not in row:
            continue
        memory = "" if row.get("batch_memory_gib") is None else f"{row['batch_memory_gib']:.2f}"
        plain, shares = row["seconds"]["plain LoRA step"]["p50"], row["launching_share"]
        ways = (card_steps.NO_GRAPHS, "triton fp8", card_steps.OWN_LAYERS, card_steps.ANY_ORDER, "torch")
        others = [row["seconds"].get(f"ours, {way}") for way in ways]
        cells = ["" if other is None else f"{other['p50'] / plain:.3f}" for other in others]
        cells += [f"{shares[way]:.0%}" if way in shares else "" for way in ("triton", card_steps.NO_GRAPHS)]
        lines.append(
            f"| {row['model']} | {row['layers']} | {row['tokens']} | {row['ratio_to_plain']:.3f} | "
            f"{row['tokens_per_second']:.0f} | {row['model_flop_utilisation']:.0%} | {' | '.join(cells)} | "
            f"{memory} | {row.get('batch_memory_sum_gib', float('nan')):.2f} |"
        )
    return lines


def _profile_table(rows: list[dict[str, Any]]) -> list[str]:
    lines = []
    for row in rows:
        lines += [
            f"{row['model']}, {row['step']}: {row['seconds'] * 1e3:.1f} ms in {row['kernels']} kernels",
            "",
            "| ms | share | calls | kernel |",
            "|---|---|---|---|",
        ]
        for found in row["longest"][:12]:
            share = found["seconds"] / max(row["seconds"], 1e-12)
            name = found["kernel"][:100].replace("|", "/")
            lines.append(f"| {found['seconds'] * 1e3:.2f} | {share:.0%} | {found['calls']} | `{name}` |")
        lines.append("")
    return lines


def _crossing_table(rows: list[dict[str, Any]]) -> list[str]:
    lines = ["| rows to the host | packs | tokens each | p50 s |", "|---|---|---|---|"]
    return lines + [f"| {r['rows']} | {r['packs']} | {r['tokens']} | {r['seconds']['p50']:.4f} |" for r in rows]


def _streaming_table(rows: list[dict[str, Any]]) -> list[str]:
    lines = ["| streamed queries | tokens | kernel, s | formed gradients, s |", "|---|---|---|---|"]
    for row in rows:
        kernel, form = (row["seconds"][way]["p50"] for way in ("kernel", "form"))
        lines.append(f"| {row['queries']} | {row['tokens']} | {kernel:.4f} | {form:.4f} |")
    return lines


def _products_table(rows: list[dict[str, Any]]) -> list[str]:
    ways = ("ours, int8", "torch._int_mm", "ours, bf16", "PyTorch, bf16", card_kernels.HOST_ROWS, card_kernels.STREAMED)
    lines = [
        "Milliseconds, and those in which the card is busy:",
        "",
        f"| rows | numbers a row | queries | {' | '.join(ways)} |",
        f"{'|---' * 9}|",
    ]
    for row in rows:
        found, busy = row["seconds"], row["card_seconds"]
        cells = [f"{found[w]['p50'] * 1e3:.2f} ({busy[w] * 1e3:.2f})" if w in busy else "" for w in ways]
        lines.append(f"| {row['rows']} | {row['width']} | {row['queries']} | {' | '.join(cells)} |")
    return lines


def _long_table(row: dict[str, Any]) -> list[str]:
    peak = "" if row["peak_gib"] is None else f"{row['peak_gib']:.1f}"
    return [
        "| one trace through | layers | tokens | s | tokens/s | peak GiB | by the sum | layers computed again |",
        "|---|---|---|---|---|---|---|---|",
        f"| {row['model']} | {row['layers']} | {row['tokens']} | {row['seconds']['p50']:.2f} | "
        f"{row['tokens_per_second']:.0f} | {peak} | {row['peak_sum_gib']:.1f} | {row['recomputed']} |",
    ]


TABLES: dict[str, Callable[[Any], list[str]]] = {
    "kernels": _kernels_table,
    "steps": _steps_table,
    "profile": _profile_table,
    "crossing": _crossing_table,
    "streaming": _streaming_table,
    "products": _products_table,
    "fused": card_products.table,
    "long": _long_table,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("benches/results"))
    parser.add_argument("--only", nargs="+", choices=["tests", *TABLES], default=[], help="parts to run (default all)")
    parser.add_argument("--keep-going", action="store_true", help="time kernels and steps although a test failed")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes on the CPU; writes nothing")
    args = parser.parse_args()
    deadline = time.monotonic() + BUDGET - 60
    if args.smoke:
        device, tiny = torch.device("cpu"), card_steps.SMOKE_SHAPES["tiny"]
        session = Session(None, deadline, args.only)
        tokens, widths, modules, rounds, stored = 256, (64,), 28, 2, (200, 64)
        shapes, short, few, long = card_steps.SMOKE_SHAPES, tokens, 2, ("tiny", tiny, 256)
    elif not torch.cuda.is_available():
        sys.exit("no CUDA device: run this where there is one, or try the script itself with --smoke")
    else:
        device, tiny = torch.device("cuda"), card_steps.SHAPES["Qwen2.5-0.5B"]
        session = Session(args.output, deadline, args.only)
        tokens, widths, modules, rounds, stored = 16_384, (3584, 18_944), card_kernels.MODULES, 20, (200_000, 8192)
        shapes, short, few, long = card_steps.SHAPES, 4096, 3, (*card_steps.LONG, 32_768)
        log = None if session.stem is None else session.stem.with_suffix(".tests.txt")
        tests = session.part("tests", lambda: correctness(log))
        asked = not args.only or "tests" in args.only
        if asked and not (tests and tests["processes_failed"] == 0 and tests.get("passed")) and not args.keep_going:
            sys.exit("tests/gpu failed, so nothing was timed (--keep-going times all the same)")
    session.part("kernels", lambda: card_kernels.kernels(device, tokens, widths, modules, rounds))
    session.part("steps", lambda: card_steps.steps(device, shapes, tokens, 2, deadline))
    profiled = {name: shape for name, shape in shapes.items() if not name.endswith("1.5B")}
    session.part("profile", lambda: card_steps.profile(device, profiled, tokens))
    session.part("long", lambda: card_steps.long_trace(device, *long, 1))
    session.part("products", lambda: card_kernels.products(device, *stored, few))
    session.part("fused", lambda: card_products.fused(device, *stored, few))
    session.part("crossing", lambda: card_steps.crossing(device, tiny, short, 8 * few, 2))
    session.part("streaming", lambda: card_steps.streaming(device, tiny, short, few))
    print(markdown(session.result))
    if "failed" in session.result:
        sys.exit(f"failed: {', '.join(session.result['failed'])}")


if __name__ == "__main__":
    main()
