"""Per-example projected gradients against plain peft forward+backward, over the same examples, on this machine.

    python -m benches.bench_gradients --data problems.jsonl [--rounds 5] [--output results.json]

`problems.jsonl` has `problem` and `solution` columns. The model is Qwen2-shaped, 4 layers, 256 wide, LoRA r=16 on
all linears. Baselines: length-sorted padded batches (best of three batch sizes, chosen before timing), and one
example at a time. Every round times all of them over one chunk of examples, in a rotating order; a ratio is taken
inside its round, and the median and range over rounds are reported.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benches.environment import describe
from benches.interleave import timed
from benches.models import qwen2_model, train_tokenizer, with_lora
from influence_fast.data.examples import load_examples, tokenize
from influence_fast.gradients.per_example import iter_gradient_rows
from influence_fast.gradients.rows.projection import Projection
from influence_fast.gradients.rows.row_spec import RowSpec


def padded(model: Any, examples: list[dict[str, Any]], batch_size: int) -> None:
    """Plain forward+backward over length-sorted padded batches; gradients accumulate, as in training."""
    ordered = sorted(examples, key=lambda e: len(e["input_ids"]))
    for start in range(0, len(ordered), batch_size):
        batch = ordered[start : start + batch_size]
        longest = max(len(e["input_ids"]) for e in batch)
        ids = torch.zeros(len(batch), longest, dtype=torch.int64)
        mask = torch.zeros(len(batch), longest, dtype=torch.int64)
        labels = torch.full((len(batch), longest), -100)
        for i, e in enumerate(batch):
            n = len(e["input_ids"])
            ids[i, :n], mask[i, :n], labels[i, :n] = e["input_ids"], 1, e["labels"]
        model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss.backward()


def one_by_one(model: Any, examples: list[dict[str, Any]]) -> None:
    """Plain forward+backward, batch size 1: a per-example gradient without a projection."""
    for e in examples:
        model(input_ids=e["input_ids"][None], labels=e["labels"][None], use_cache=False).loss.backward()


def ours(model: Any, examples: list[dict[str, Any]], projection: Projection) -> None:
    for _ in iter_gradient_rows(model, examples, RowSpec.of(projection, dtype="fp32")):
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="jsonl with problem and solution columns")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--chunk", type=int, default=100, help="examples in one round")
    parser.add_argument("--dim", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)

    rows = load_examples(args.data)
    tokenizer = train_tokenizer([row.prompt + "\n" + row.completion for row in rows], vocab_size=4096)
    examples = tokenize(rows, tokenizer).examples
    model = with_lora(qwen2_model(len(tokenizer)), rank=16)
    projection = Projection(dim=args.dim)

    warm = examples[: args.chunk]
    sizes = {size: timed(lambda size=size: padded(model, warm, size)) for size in (4, 8, 16)}
    batch_size = min(sizes, key=sizes.__getitem__)
    runs: dict[str, Callable[[list[dict[str, Any]]], None]] = {
        "ours": lambda chunk: ours(model, chunk, projection),
        f"padded batches of {batch_size}": lambda chunk: padded(model, chunk, batch_size),
        "one by one": lambda chunk: one_by_one(model, chunk),
    }
    for run in runs.values():
        run(warm[:20])
    names = list(runs)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for index in range(args.rounds):
        start = index * args.chunk % max(1, len(examples) - args.chunk + 1)
        chunk = examples[start : start + args.chunk]
        shift = index % len(names)
        for name in names[shift:] + names[:shift]:
            seconds[name].append(timed(lambda name=name, chunk=chunk: runs[name](chunk)))
            model.zero_grad(set_to_none=True)
    ratios = {name: [o / b for o, b in zip(seconds["ours"], seconds[name], strict=True)] for name in names[1:]}
    faster = [o / min(seconds[name][i] for name in names[1:]) for i, o in enumerate(seconds["ours"])]
    ratios["the faster of the two"] = faster
    result = {
        "what": "per-example projected gradients / plain peft forward+backward, same examples",
        "examples": len(examples),
        "tokens": sum(len(e["input_ids"]) for e in examples),
        "projection": f"one_sided, dim={args.dim}",
        "model": "a 4-layer, 256-wide Qwen2 shape, LoRA r=16 on all linears, fp32",
        "seconds": seconds,
        "ratio": {name: {"median": statistics.median(r), "min": min(r), "max": max(r)} for name, r in ratios.items()},
        **describe(),
    }
    for name, r in result["ratio"].items():
        print(f"ours / {name}: {r['median']:.3f} ({r['min']:.3f} to {r['max']:.3f})")
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
