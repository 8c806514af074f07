"""The main job on real worked solutions, with a model made on the spot.

    python -m benches.real_traces --data problems.jsonl --output runs/real-traces

`problems.jsonl` has `problem` and `solution` columns (solutions end in \\boxed{answer}). A byte-level BPE tokenizer is
fitted on the file and a 4-layer, 256-wide Qwen2-shaped model with random weights is fine-tuned by LoRA (r = 16, all
linears) from there. Such a model answers nothing correctly: what this shows is the road itself at real lengths and with
real text, not a gain in accuracy. 50 examples are held out to ask and 50 to judge. Besides the run, all examples of
the file, the held-out ones included, are scored against the 50 that ask.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from benches.models import qwen2_model, train_tokenizer
from influence_fast.config import RunConfig
from influence_fast.data.examples import load_examples, tokenize
from influence_fast.run.pipeline import Pipeline
from influence_fast.selection.pool_scores import ScoredPool, score_pool
from influence_fast.settings import from_dict
from influence_fast.training.fine_tuning import load_finetuned


def settings(model: Path, data: str, output: Path) -> dict[str, Any]:
    """The run's configuration, as it would stand in a YAML file."""
    return {
        "title": "Real worked solutions, a small model from random weights",
        "output": str(output / "run"),
        "model": {"path": str(model)},
        "data": {"pool": data, "holdout_validation": 50, "holdout_test": 50},
        "training": {"epochs": 1, "learning_rate": 1e-3, "batch_size": 8},
        "lora": {"r": 16, "alpha": 32},
        "influence": {"fallback": "reference"},
        "pruning": {"fractions": [0.1, 0.5]},
        "evaluation": {"max_new_tokens": 64, "batch_size": 25},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()

    model_path = args.output / "model"
    examples = load_examples(args.data)
    if not model_path.exists():
        tokenizer = train_tokenizer([e.prompt + "\n" + e.completion for e in examples], vocab_size=4096)
        torch.manual_seed(0)
        qwen2_model(len(tokenizer), tokenizer.eos_token_id).save_pretrained(model_path)
        tokenizer.save_pretrained(model_path)
    pipeline = Pipeline(from_dict(RunConfig, settings(model_path, args.data, args.output)))
    results = pipeline.run()
    for cell in results["cells"]:
        print({key: cell[key] for key in ("strategy", "fraction", "kept", "dropped", "accuracy", "seconds")})

    adapter = pipeline.reference_adapter()
    model = load_finetuned(pipeline.base, adapter)
    scored = score_pool(
        ScoredPool(
            model,
            pipeline.tokenizer,
            examples,
            tokenize(examples, pipeline.tokenizer).examples,
            pipeline.queries(adapter),
        ),
        args.output / "store-all",
        pipeline.config.gradients,
        pipeline.config.influence,
    )
    table = scored.table
    table.save(args.output / "scores-all.csv")
    held_out = len(pipeline.splits.validation)
    print(f"all {len(table.ids)} examples against {held_out} held out: {json.dumps(scored.seconds)}")


if __name__ == "__main__":
    main()
