"""Influence scores against retraining, on worlds made on the spot; writes benches/results/proof-<world>.json.

    python -m benches.proof demo --output runs/proof-demo
    python -m benches.proof math500 --data problems.jsonl --output runs/proof-math500

`demo` is the demo's own model and data: arithmetic stories with corrupted traces, own answers as queries. `math500`
takes a file of worked solutions (`problem`, `solution`, `answer`): a byte-level BPE tokenizer and a 2-layer, 128-wide
Qwen2-shaped model are made from the longer problems (their first 256 tokens), a LoRA adapter is fine-tuned on 160 of
the 200 shortest, and the reference solutions of the other 40 are the queries. Both retrain 64 random halves with two
seeds, 16 sets without a tenth, and what is left without the most helpful and the most harmful examples.

`--peers FOLDER` adds the scores that other tools computed (FOLDER/<name>.npz, see benches/peers); `--work FOLDER`
writes what they need, and stops.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import torch

from benches.environment import describe
from benches.models import qwen2_model, train_tokenizer
from influence_fast.config import DataConfig, ModelConfig, PruningConfig, RunConfig, Source, ValidateConfig
from influence_fast.data.examples import Example, load_examples, save_examples, tokenize
from influence_fast.influence.settings import WHOLE, InfluenceConfig
from influence_fast.run import planner
from influence_fast.run.demo import WorldConfig, demo_config, make_world
from influence_fast.run.pipeline import Pipeline
from influence_fast.training.files import list_checkpoints
from influence_fast.training.fine_tuning import finetune
from influence_fast.training.settings import TrainConfig
from influence_fast.validation.page import text_tables, write_page
from influence_fast.validation.validate import validate

RESULTS = Path(__file__).parent / "results"
POOL, QUERIES = 160, 40  # of the math500 world: the shortest problems, so that retraining is a matter of seconds
PROOF = ("all", "queries")  # the group and kind of LDS that a method is judged by
METHODS: tuple[Any, ...] = (
    "ekfac-cosine",
    "cosine",
    "dot",
    "exact-dot",
    "exact-cosine",
    "exact-ekfac-cosine",
    "tracin",
    "cosine-checkpoints",
    "adam",
    "less",
    "less-checkpoints",
    "fisher",
    "fisher-auto",
    "fisher-cosine",
    "ekfac",
    "datainf",
    "trak",
    "loss",
    {"name": "ekfac-cosine, the data's labels", "fisher": "data"},
    {"name": "ekfac-cosine, 64 drawn examples", "fisher_examples": 64},
    {"name": "ekfac, the data's labels", "preconditioner": "ekfac", "fisher": "data"},
    {"name": "fisher-cosine, the data's labels", "preconditioner": "fisher_cosine", "fisher": "data"},
    {"name": "datainf, the data's labels", "preconditioner": "datainf", "fisher": "data"},
    {"name": "fitted sketch to 4096, the data's labels", "width": 4096, "fisher": "data"},
    {"name": "fitted sketch to 1024, the data's labels", "width": 1024, "fisher": "data"},
    {"name": "dim 4", "dim": 4},
    {"name": "dim 16", "dim": 16},
    {"name": "kron 16", "projection": "kron", "dim": 16},
    {"name": "checkpoints", "checkpoints": True},
    {"name": "int8", "store_dtype": "int8"},
    {"name": "top half of the layers", "layers": 0.5},
    {"name": "half of each trace", "tokens": 0.5},
    {"name": "quarter of each trace", "tokens": 0.25},
    {"name": "dim 16, int8, half of each trace", "dim": 16, "store_dtype": "int8", "tokens": 0.5},
    {"name": "fitted sketch to 1024", "width": 1024},
    {"name": "fitted sketch to 4096", "width": 4096},
    {"name": "dim 16, fitted sketch to 1024", "dim": 16, "width": 1024},
    {"name": "fitted sketch to 1024, on 64 examples", "width": 1024, "sketch_examples": 64},
    {"name": "fitted sketch to 1024, int8", "width": 1024, "store_dtype": "int8"},
    {"name": "fisher-cosine, sketch to 1024", "preconditioner": "fisher_cosine", "width": 1024},
    {"name": "cosine, sketch to 1024", "preconditioner": "cosine", "width": 1024},
    {"name": "cosine, sketch to 4096", "preconditioner": "cosine", "width": 4096},
    {"name": "cosine, sjlt to 1024", "preconditioner": "cosine", "projection": "sjlt", "width": 1024},
    {"name": "cosine, top half of the layers", "preconditioner": "cosine", "layers": 0.5},
)


PROXY = "proxy of half the width"


def proxy_folder(output: Path) -> Path:
    """Where the world of a run has its smaller model."""
    return output.with_name(f"{output.name}-world-proxy")


def demo(output: Path) -> RunConfig:
    """The demo's run, its checkpoints kept."""
    config = demo_config(output, progress=False)
    made = make_world(proxy_folder(output), config=WorldConfig(hidden_size=WorldConfig().hidden_size // 2))
    assert made.model_path == proxy_folder(output) / "model"
    return dataclasses.replace(config, training=dataclasses.replace(config.training, save_checkpoints=True))


def math500(output: Path, data: str) -> RunConfig:
    """A LoRA fine-tuning over worked solutions of a small model pre-trained on others of the same file."""
    world = output.with_name(f"{output.name}-world")
    examples = load_examples(data)
    by_length = sorted(examples, key=lambda e: (len(e.prompt) + len(e.completion), e.id))
    short = by_length[: POOL + QUERIES]
    random.Random(0).shuffle(short)
    pool, queries, base = short[:POOL], short[POOL:], by_length[POOL + QUERIES :]
    test = queries[:8]
    parts = {"pool": pool, "validation": queries, "test": test}
    if not (world / "made").exists():
        tokenizer = train_tokenizer([e.prompt + "\n" + e.completion for e in examples], vocab_size=2048)
        training = TrainConfig(epochs=4, learning_rate=3e-3, batch_size=8)
        texts = tokenize(base, tokenizer, max_length=256, truncate=True).examples
        for folder, width in ((world, 128), (proxy_folder(output), 64)):
            torch.manual_seed(0)
            model = qwen2_model(len(tokenizer), tokenizer.eos_token_id, layers=2, width=width)
            finetune(model, tokenizer, texts, folder / "model", config=training, lora=None)
        for name, part in parts.items():
            save_examples(part, world / f"{name}.jsonl")
        (world / "made").touch()
    sources = {name: Source(str(world / f"{name}.jsonl")) for name in parts}
    return RunConfig(
        output=str(output),
        title="Worked solutions, a small model",
        model=ModelConfig(str(world / "model")),
        data=DataConfig(**sources),
        training=TrainConfig(epochs=4, learning_rate=5e-3, batch_size=8, save_checkpoints=True),
        influence=InfluenceConfig(queries="reference"),
        pruning=PruningConfig(strategies=("random",)),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("world", choices=("demo", "math500"))
    parser.add_argument("--data", help="the problems, for math500")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--subsets", type=int, default=64)
    parser.add_argument("--peers", type=Path, help="folder of <name>.npz with other tools' scores")
    parser.add_argument("--work", type=Path, help="write the work folder for other tools here, and stop")
    args = parser.parse_args()
    if args.world == "math500" and not args.data:
        parser.error("math500 needs --data")
    torch.set_num_threads(1)

    config = demo(args.output) if args.world == "demo" else math500(args.output, args.data)
    if args.work:
        write_peer_work(config, args.work)
        return
    external = {path.stem: str(path) for path in sorted(args.peers.glob("*.npz"))} if args.peers else {}
    methods = (*METHODS, {"name": PROXY, "proxy": str(proxy_folder(args.output) / "model")})
    settings = ValidateConfig(methods, subsets=args.subsets, processes=args.processes, external=external)
    results = validate(dataclasses.replace(config, validate=settings))
    print(text_tables(results))
    write_page(results, args.output / "validation.html")
    kept = {key: value for key, value in results.items() if key not in ("config", "environment", "versions")}
    for row in kept["cost"]["rows"]:
        if row["method"] == PROXY:
            row["settings"]["proxy"] = PROXY  # not where it lay
    path = RESULTS / f"proof-{args.world}.json"
    path.write_text(json.dumps(describe() | kept, indent=1) + "\n")
    write_fidelity()
    print(f"results: {path}, {planner.TABLE}")


def write_fidelity() -> None:
    """The table that `influence_fast.plan` chooses from, out of the result files there are."""
    worlds = {path.stem.removeprefix("proof-"): json.loads(path.read_text()) for path in RESULTS.glob("proof-*.json")}
    rows: dict[str, dict[str, Any]] = {}
    for world, result in sorted(worlds.items()):
        costs = {row["method"]: row for row in result["cost"]["rows"]}
        scores = {row["method"]: row for row in result["lds"]["rows"] if (row["group"], row["of"]) == PROOF}
        whole = _pool_seconds(costs[result["default"]])
        for name, cost in costs.items():
            settings = cost["settings"]
            if settings["loss"] or settings["projection"] == WHOLE or settings["moments"] or settings.get("proxy"):
                continue  # no influence, no store worth its name, or a state or model that another run has not
            row = rows.setdefault(name, {"settings": settings, "cost": [], "worlds": {}})
            row["cost"].append(_pool_seconds(cost) / whole)
            exact = cost["spearman_to_exact"]
            found = {key: scores[name][key] for key in ("low", "high")} | {"lds": scores[name]["value"]}
            row["worlds"][world] = found | {"agreement": None if exact is None else exact["correct"]}
    table = [row | {"cost": sum(row["cost"]) / len(row["cost"])} for row in rows.values()]
    made = {world: {key: result[key] for key in ("commit", "measured")} for world, result in worlds.items()}
    planner.TABLE.write_text(json.dumps({"made_from": made, "rows": table}, indent=1) + "\n")


def _pool_seconds(cost: dict[str, Any]) -> float:
    """Seconds of what grows with the pool; sketches and preconditioners are fitted on so many examples of any."""
    once = ("fisher gradients", "fitting the sketch")
    return sum(seconds for stage, seconds in cost["seconds"].items() if stage not in once)


def write_peer_work(config: RunConfig, folder: Path) -> None:
    """The run's reference model, pool and queries in the form that benches/peers reads."""
    from benches.peers.work import write_work

    pipeline = Pipeline(config)
    adapter = Path(pipeline.reference_adapter())
    queries: list[Example] = pipeline.queries(adapter).examples
    write_work(
        folder,
        Path(config.model.path),
        list_checkpoints(adapter)[-1],
        pipeline.splits.tokenized.examples,
        tokenize(queries, pipeline.tokenizer).examples,
    )
    print(f"work folder for other tools: {folder}")


if __name__ == "__main__":
    main()
