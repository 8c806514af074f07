"""What every peer's script shares: reads a work folder, loads the model, times the stages, writes the outcome.

Only torch, numpy, transformers and peft are imported, so that it runs in any peer's own environment. A script is

    python benches/peers/PEER.py WORK OUTPUT --method M [--repeat 3] [--limit N] [--queries Q] [--threads 2]

and writes OUTPUT.npz with `scores` float32 [N, Q] (positive: more of the example lowers the query's loss), `ids` and
`query_ids`, and OUTPUT.json with seconds of each stage and round, peak memory, bytes per example and versions.

Stages: `gradients` (of the pool and of the queries, kept or stored as the peer does), `fit` (whatever is fitted on
them: Fisher, Kronecker factors) and `scoring` (from kept gradients to N x Q scores). Where a peer cannot part two
stages, the sum is under the first of them and a note says so.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import importlib
import json
import os
import platform
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

IGNORED = -100  # label of a token that the loss leaves out
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PROJECTION_DIM = 16  # columns of a side projection where a peer projects factor by factor
PROJECTION_WIDTH = 8192  # numbers in a row where a peer projects the whole gradient, as in LESS

EVEN_TOKENS = 16384  # in a padded batch of `even_batch`
TokenizedExample = dict[str, Any]  # {"id": str, "input_ids": [T] int64, "labels": [T] int64}


@dataclass(frozen=True)
class Work:
    """A work folder in memory: what is scored, against what, and where the model is."""

    folder: Path
    pool: list[TokenizedExample]
    queries: list[TokenizedExample]
    dtype: torch.dtype
    seed: int

    def head(self, pool: int, queries: int) -> Work:
        """The same work with the first `pool` examples and the first `queries` queries."""
        return replace(self, pool=self.pool[:pool], queries=self.queries[:queries])

    @property
    def model_folder(self) -> Path:
        return self.folder / "model"

    @property
    def adapter_folder(self) -> Path:
        return self.folder / "adapter"


@dataclass
class Run:
    """One round: its clock, a folder of its own, and what the method has to say of itself."""

    temporary: Path
    seconds: dict[str, float] = field(default_factory=dict)
    bytes_per_example: float | None = None
    width: int | None = None
    notes: list[str] = field(default_factory=list)
    arrays: dict[str, Any] = field(default_factory=dict)  # more to write beside the scores

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Adds the block's wall-clock seconds to the stage `name`."""
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def keeps(self, rows: Any) -> None:
        """Says how wide a row is and what it takes: `rows` is what is kept of the pool's gradients, [N, width]."""
        self.width = int(rows.shape[1])
        size = rows.element_size() if isinstance(rows, torch.Tensor) else rows.itemsize
        self.bytes_per_example = float(size * self.width)


# (work, round) -> scores [N, Q], or None where the method makes none
Scoring = Callable[[Work, Run], "torch.Tensor | np.ndarray | None"]


@dataclass(frozen=True)
class Method:
    """`prepare(work)` loads what stays warm between rounds and returns the round itself.

    `convention` says which exact scores the method's are compared with: "dot", "cosine" (unit norm on both sides)
    or "preconditioned" (there is no exact counterpart without the inverse Hessian: compared with the dot).
    """

    prepare: Callable[[Work], Scoring]
    convention: str
    what: str


# ---- work folders ----------------------------------------------------------------------------------------


def read_work(folder: str | Path) -> Work:
    """Reads a work folder. Raises FileNotFoundError naming the missing part."""
    folder = Path(folder).resolve()
    for part in ("work.json", "pool.jsonl", "queries.jsonl", "model", "adapter"):
        if not (folder / part).exists():
            raise FileNotFoundError(f"{folder} is no work folder: it has no {part}; make one with benches.peers.work")
    info = json.loads((folder / "work.json").read_text())
    return Work(
        folder=folder,
        pool=read_examples(folder / "pool.jsonl"),
        queries=read_examples(folder / "queries.jsonl"),
        dtype=DTYPES[info["dtype"]],
        seed=int(info["seed"]),
    )


def read_examples(path: Path) -> list[TokenizedExample]:
    """`{"id", "input_ids", "labels"}` a line, the last two as int64 tensors."""
    examples = []
    with path.open() as lines:
        for line in lines:
            row = json.loads(line)
            tensors = {name: torch.tensor(row[name], dtype=torch.int64) for name in ("input_ids", "labels")}
            examples.append({"id": row["id"], **tensors})
    return examples


def scratch_folder() -> Path:
    """A new folder that is gone when the process ends."""
    folder = Path(tempfile.mkdtemp(prefix="peers-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def load_model(work: Work, **options: Any) -> Any:
    """The work's peft model in evaluation mode; only the adapter's factors ask for a gradient."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(work.model_folder, dtype=work.dtype, **options)
    # cast adapters would differ from peer to peer: keep what was saved
    model = PeftModel.from_pretrained(base, work.adapter_folder, is_trainable=True, autocast_adapter_dtype=False)
    return model.eval()


def trainable(model: Any) -> dict[str, torch.Tensor]:
    """The adapter's factors by name, in `named_parameters` order."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def completion_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of one example's completion tokens: logits [T, vocab], labels [T] -> scalar."""
    targets = labels[1:]
    losses = torch.nn.functional.cross_entropy(logits[:-1].float(), targets, ignore_index=IGNORED, reduction="none")
    return losses.sum() / (targets != IGNORED).sum()


def padded(examples: Sequence[TokenizedExample], length: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded `input_ids` and `labels`, [n, length] int64; padding is token 0 and carries no loss."""
    longest = max(len(e["input_ids"]) for e in examples) if length is None else length
    ids = torch.zeros(len(examples), longest, dtype=torch.int64)
    labels = torch.full((len(examples), longest), IGNORED)
    for i, e in enumerate(examples):
        ids[i, : len(e["input_ids"])], labels[i, : len(e["labels"])] = e["input_ids"], e["labels"]
    return ids, labels


def by_length(examples: Sequence[TokenizedExample], max_tokens: int) -> list[list[int]]:
    """Places of `examples`, longest first, in batches of at most `max_tokens` tokens with their padding."""
    batches: list[list[int]] = []
    longest = 0
    for i in sorted(range(len(examples)), key=lambda i: -len(examples[i]["input_ids"])):
        if not batches or longest * (len(batches[-1]) + 1) > max_tokens:
            batches.append([])
            longest = len(examples[i]["input_ids"])
        batches[-1].append(i)
    return batches


def even_batch(*sets: Sequence[TokenizedExample]) -> int:
    """Examples in a batch for a peer that wants batches of one size, given sorted examples."""
    longest = max(len(e["input_ids"]) for examples in sets for e in examples)
    return max(1, min(8, EVEN_TOKENS // longest))


def unsorted(scores: torch.Tensor, rows: Sequence[int], columns: Sequence[int]) -> torch.Tensor:
    """Scores [N, Q] of sorted examples and queries, back in the work's order."""
    out = torch.empty_like(scores)
    out[torch.as_tensor(rows)[:, None], torch.as_tensor(columns)[None, :]] = scores
    return out


# ---- scores ----------------------------------------------------------------------------------------------


def dot_scores(rows: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
    """[N, k] and [Q, k] -> [N, Q]."""
    return rows @ queries.T


def cosine_scores(rows: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
    """As `dot_scores`, of unit rows and unit queries."""
    return torch.nn.functional.normalize(rows) @ torch.nn.functional.normalize(queries).T


# ---- the script ------------------------------------------------------------------------------------------


def main(peer: str, methods: Mapping[str, Method], packages: Sequence[str] = (), warm: int = 4) -> None:
    """Runs one method of `peer` over a work folder and writes OUTPUT.npz and OUTPUT.json.

    `packages` are the distributions whose versions are told beside torch's, transformers' and peft's; `warm` is the
    number of examples of the untimed first round.
    """
    parser = argparse.ArgumentParser(description=f"{peer} over a work folder")
    parser.add_argument("work", type=Path)
    parser.add_argument("output", type=Path, help="written: OUTPUT.npz and OUTPUT.json")
    parser.add_argument("--method", choices=sorted(methods), required=True)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--limit", type=int, help="only the first so many examples of the pool")
    parser.add_argument("--queries", type=int, help="only the first so many queries")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--profile", action="store_true", help="once more under torch's profiler, untimed")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    work = read_work(args.work)
    work = work.head(args.limit or len(work.pool), args.queries or len(work.queries))
    method = methods[args.method]

    torch.manual_seed(work.seed)
    score = method.prepare(work)
    before = peak_memory()
    with _round() as run:
        score(work.head(warm, 2), run)
    rounds: list[Run] = []
    for _ in range(args.repeat):
        torch.manual_seed(work.seed)
        with _round() as run:
            scores = score(work, run)
            rounds.append(run)
    result: dict[str, Any] = {
        "peer": peer,
        "method": args.method,
        "what": method.what,
        "convention": method.convention,
        "examples": len(work.pool),
        "queries": len(work.queries),
        "tokens": sum(len(e["input_ids"]) for e in work.pool),
        "query_tokens": sum(len(e["input_ids"]) for e in work.queries),
        "seconds": {name: [run.seconds.get(name, 0.0) for run in rounds] for name in _stages(rounds)},
        "peak_memory": peak_memory(),
        "peak_memory_before": before,
        "bytes_per_example": rounds[-1].bytes_per_example,
        "width": rounds[-1].width,
        "threads": args.threads,
        "seed": work.seed,
        "dtype": str(work.dtype).removeprefix("torch."),
        "notes": rounds[-1].notes,
        "versions": versions(["torch", "transformers", "peft", *packages]),
    }
    if args.profile:
        result["profile"] = profile(score, work)
    arrays = {"ids": np.array([e["id"] for e in work.pool]), "query_ids": np.array([e["id"] for e in work.queries])}
    arrays.update(rounds[-1].arrays)
    if scores is not None:
        arrays["scores"] = np.asarray(torch.as_tensor(scores).detach().cpu(), np.float32)
        if arrays["scores"].shape != (len(work.pool), len(work.queries)):
            raise SystemExit(f"{peer} {args.method}: scores of shape {arrays['scores'].shape}, not [N, Q]")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    np.savez(f"{args.output}.npz", **arrays)
    Path(f"{args.output}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(f"{peer} {args.method}: {result['examples']} x {result['queries']}, {result['seconds']}")


@contextlib.contextmanager
def _round() -> Iterator[Run]:
    folder = Path(tempfile.mkdtemp(prefix="peers-"))
    try:
        yield Run(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def profile(score: Scoring, work: Work, top: int = 12) -> list[dict[str, Any]]:
    """The operators that take most of a round's CPU time, with their share of it, seconds and calls."""
    with _round() as run, torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        score(work, run)
    found = sorted(profiler.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in found)
    return [
        {
            "operator": event.key,
            "share": event.self_cpu_time_total / total,
            "seconds": event.self_cpu_time_total / 1e6,
            "calls": event.count,
        }
        for event in found[:top]
    ]


def _stages(rounds: Sequence[Run]) -> list[str]:
    return list(dict.fromkeys(name for run in rounds for name in run.seconds))


def peak_memory() -> int:
    """Bytes: the most this process has had resident so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak) if sys.platform == "darwin" else int(peak) * 1024


def versions(packages: Sequence[str]) -> dict[str, str | None]:
    """Versions of distributions, and of Python."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = getattr(_imported(name), "__version__", None)
    return found


def _imported(name: str) -> Any:
    with contextlib.suppress(ImportError):
        return importlib.import_module(name)
    return None
