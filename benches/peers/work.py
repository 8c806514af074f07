"""Makes work folders: one model, adapter and set of tokenized examples that every peer reads.

    python -m benches.peers.work make FOLDER --world math500 --data problems.jsonl
    python -m benches.peers.work make FOLDER --world long

A work folder holds `model/` (base model and tokenizer, save_pretrained), `adapter/` (peft LoRA, its B factors not
zero), `pool.jsonl` and `queries.jsonl` (`{"id", "input_ids", "labels"}` a line) and `work.json` (dtype, seed, sizes).
Any code can write one by `write_work`; `worker.read_work` reads it.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benches.models import qwen2_model, train_tokenizer, with_lora
from influence_fast.atomic import replacing
from influence_fast.data.examples import Example, load_examples, tokenize
from influence_fast.data.packing import check_examples
from influence_fast.errors import DataError

WORLDS = ("math500", "long")
VOCABULARY = 4096
# examples that ask; they are scored too, as when a run scores all that it has
ASKING = {"math500": 50, "long": 2}
LONG_TRACES = 12
LONG_TOKENS = (3584, 4608)  # shortest and longest; 4096 on average


def write_work(
    folder: str | Path,
    model_dir: str | Path,
    adapter_dir: str | Path,
    pool: Sequence[Mapping[str, Any]],
    queries: Sequence[Mapping[str, Any]],
    *,
    dtype: str = "float32",
    seed: int = 0,
    notes: Mapping[str, Any] | None = None,
) -> Path:
    """Writes a work folder, whole or not at all, and returns its path.

    Args:
        folder: where; must not exist.
        model_dir: base model and tokenizer (save_pretrained), copied.
        adapter_dir: peft LoRA adapter (save_pretrained), copied.
        pool, queries: tokenized examples `{"id", "input_ids", "labels"}`, 1-D int tensors or lists, labels -100 where
            ignored and aligned with input_ids.
        dtype: "float32" or "bfloat16", in which every peer loads the base model.
        seed: of whatever is random in a peer (projections, samples).
        notes: more to say in work.json.

    Raises:
        DataError: the folder exists, a folder has no model or adapter, or an example is malformed.
    """
    folder, model_dir, adapter_dir = Path(folder), Path(model_dir), Path(adapter_dir)
    if folder.exists():
        raise DataError(f"{folder} exists; remove it or choose another folder for the work")
    for source, needed in ((model_dir, "config.json"), (adapter_dir, "adapter_config.json")):
        if not (source / needed).is_file():
            raise DataError(f"{source} has no {needed}; give a folder made by save_pretrained")
    sets = {"pool": [_tensors(e) for e in pool], "queries": [_tensors(e) for e in queries]}
    for examples in sets.values():
        check_examples(examples)
    with replacing(folder) as temporary:
        temporary.mkdir()
        shutil.copytree(model_dir, temporary / "model")
        shutil.copytree(adapter_dir, temporary / "adapter")
        for name, examples in sets.items():
            with (temporary / f"{name}.jsonl").open("w") as file:
                for e in examples:
                    row = {"id": e["id"], "input_ids": e["input_ids"].tolist(), "labels": e["labels"].tolist()}
                    file.write(json.dumps(row) + "\n")
        info = {
            "dtype": dtype,
            "seed": seed,
            **{name: len(examples) for name, examples in sets.items()},
            **{f"{name}_tokens": sum(len(e["input_ids"]) for e in examples) for name, examples in sets.items()},
            **(notes or {}),
        }
        (temporary / "work.json").write_text(json.dumps(info, indent=1) + "\n")
    return folder


def _tensors(example: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "id": str(example["id"]),
        **{name: torch.as_tensor(example[name], dtype=torch.int64) for name in ("input_ids", "labels")},
    }


def math_examples(data: str) -> list[Example]:
    """The real worked solutions of `data` (`problem` and `solution` columns)."""
    return load_examples(data)


def long_examples(seed: int) -> list[Example]:
    """Long made-up traces: running sums whose number of steps is drawn so that the lengths span `LONG_TOKENS`."""
    rng = random.Random(seed)
    examples = []
    for index in range(LONG_TRACES):
        total = rng.randrange(1000)
        lines = []
        for step in range(700):
            term = rng.randrange(1, 1000)
            lines.append(f"Step {step + 1}: {total} + {term} = {total + term}.")
            total += term
        examples.append(Example(id=f"long-{index}", prompt="Add the terms one by one.", completion="\n".join(lines)))
    return examples


def make(folder: str | Path, world: str, data: str | None, seed: int, dtype: str, steps: int) -> Path:
    """The work folder of a world: tokenizer and model made on the spot, a short pre-training, a random adapter."""
    if world == "math500" and data is None:
        raise DataError("the math500 world needs --data: a jsonl file with problem and solution columns")
    examples = math_examples(str(data)) if world == "math500" else long_examples(seed)
    tokenizer = train_tokenizer([e.prompt + "\n" + e.completion for e in examples], vocab_size=VOCABULARY)
    tokenized = tokenize(examples, tokenizer).examples
    if world == "long":
        tokenized = _cut(tokenized, seed)
    torch.manual_seed(seed)
    model = qwen2_model(VOCABULARY, tokenizer.eos_token_id)
    pretrain(model, tokenized, steps, seed)
    order = list(range(len(tokenized)))
    random.Random(seed).shuffle(order)
    asking = set(order[: ASKING[world]])
    with tempfile.TemporaryDirectory() as temporary:
        model.save_pretrained(f"{temporary}/model")
        tokenizer.save_pretrained(f"{temporary}/model")
        with_lora(model, rank=16).save_pretrained(f"{temporary}/adapter")
        return write_work(
            folder,
            f"{temporary}/model",
            f"{temporary}/adapter",
            tokenized,
            [tokenized[i] for i in sorted(asking)],
            dtype=dtype,
            seed=seed,
            notes={
                "world": world,
                "model": f"4-layer, 256-wide Qwen2 shape, vocabulary {VOCABULARY}, pre-trained for {steps} steps",
                "adapter": "LoRA r=16 on all linears, random B factors (standard deviation 0.02)",
            },
        )


def _cut(examples: Sequence[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    cut = []
    for example in examples:
        tokens = rng.randint(*LONG_TOKENS)
        cut.append({**example, **{name: example[name][:tokens] for name in ("input_ids", "labels")}})
    return cut


def pretrain(model: Any, examples: Sequence[Mapping[str, Any]], steps: int, seed: int) -> None:
    """A few AdamW steps on windows of the examples, so that gradients are not those of a random model."""
    rng = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    window = min(128, *(len(e["input_ids"]) for e in examples)) if examples else 0
    for _ in range(steps):
        rows = []
        for example in rng.choices(examples, k=16):
            start = rng.randrange(len(example["input_ids"]) - window + 1)
            rows.append(example["input_ids"][start : start + window])
        batch = torch.stack(rows)
        model(input_ids=batch, labels=batch, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    actions = parser.add_subparsers(dest="action", required=True)
    making = actions.add_parser("make", help="make a work folder")
    making.add_argument("folder", type=Path)
    making.add_argument("--world", choices=WORLDS, default="math500")
    making.add_argument("--data", help="jsonl with problem and solution columns, for math500")
    making.add_argument("--seed", type=int, default=0)
    making.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    making.add_argument("--steps", type=int, default=100, help="of pre-training")
    making.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    folder = make(args.folder, args.world, args.data, args.seed, args.dtype, args.steps)
    print((folder / "work.json").read_text().strip())


if __name__ == "__main__":
    main()
