"""Find real wrong solutions: a pretrained model, traces that real models wrote, and labels that only judge.

    python -m benches.real_model rows  --model MODEL --solutions gsm8k_model_solutions.jsonl --output runs/real-coder
    python -m benches.real_model judge --output runs/real-coder

MODEL is a checkpoint folder or a hub name. `rows` takes questions that have both a right and a wrong solution, one of
each, splits them into a pool and a validation set, and writes gradient rows of both, and those of labels that the model
draws, under a fresh LoRA adapter (B = 0); it goes on where it was stopped, and a later call with more `--pairs` adds to
what is there. `judge` scores the blocks of the pool that are finished by every method and writes `detection.json` and a
table, and with `--page docs/real-model.md` that page: AUC of the wrong solutions, the share of questions whose wrong
solution scores above its right one, and the precision among the top 10 and 30 %, with 95 % bootstrap intervals over
questions.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import influence_fast as inf
from benches.environment import describe
from influence_fast.data.schemas import Example
from influence_fast.errors import DataError
from influence_fast.influence.contrast import Pair
from influence_fast.influence.fisher_rows import fisher_folders
from influence_fast.selection.embeddings import cosine_similarity, example_embeddings
from influence_fast.statistics.ranks import auc
from influence_fast.store.merge import merge_stores

RANK, ALPHA, DIM = 8, 16, 16
BLOCK = 25  # questions of the pool in a store of their own, so that a larger pool keeps the rows of a smaller one
PREPARED, EMBEDDINGS, SECONDS = "examples.json", "embeddings.npy", "cpu_seconds.json"
PRECONDITIONERS = ("none", "cosine", "ekfac", "ekfac_cosine", "fisher", "fisher_cosine", "datainf")
DRAWS, SHARES = 2000, (10, 30)


def parser() -> argparse.ArgumentParser:
    """Return the command line's options."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = made.add_subparsers(dest="verb", required=True)
    rows = verbs.add_parser("rows")
    rows.add_argument("--model", required=True)
    rows.add_argument("--solutions", type=Path, required=True)
    rows.add_argument("--output", type=Path, required=True)
    rows.add_argument("--pairs", type=int, default=300, help="questions in the pool, two solutions each")
    rows.add_argument("--validation", type=int, default=60, help="held-out questions, two solutions each")
    rows.add_argument("--fisher-examples", type=int, default=64)
    rows.add_argument("--dtype", default="fp32", choices=("fp32", "bf16"))
    rows.add_argument("--seed", type=int, default=0)
    judge = verbs.add_parser("judge")
    judge.add_argument("--output", type=Path, required=True)
    return made


def paired_solutions(path: Path, count: int, seed: int) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Return `count` questions' (right, wrong) solutions, drawn by `seed`; one of each for a question that has both.

    Raises DataError where fewer questions have both.
    """
    of: dict[str, dict[bool, list[dict[str, Any]]]] = defaultdict(lambda: {True: [], False: []})
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            of[row["question_id"]][bool(row["is_correct"])].append(row)
    both = sorted(name for name, kinds in of.items() if kinds[True] and kinds[False])
    if len(both) < count:
        raise DataError(f"{path}: {len(both)} questions have a right and a wrong solution, {count} are asked for")
    rng = random.Random(seed)
    rng.shuffle(both)
    return [(rng.choice(of[name][True]), rng.choice(of[name][False])) for name in both[:count]]


def examples_of(pairs: list[tuple[dict[str, Any], dict[str, Any]]]) -> list[Example]:
    """Return the examples of pairs, the right one of each first."""
    return [
        Example(id=row["id"], prompt=row["question"], completion=row["solution"], answer="")
        for pair in pairs
        for row in pair
    ]


def make_rows(args: argparse.Namespace) -> None:
    """Write the stores of pool, validation answers and drawn labels."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    args.output.mkdir(parents=True, exist_ok=True)
    pairs = paired_solutions(args.solutions, args.pairs + args.validation, args.seed)
    validation, pool = pairs[: args.validation], pairs[args.validation :]
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    record = {"settings": settings, "pool": pool, "validation": validation, "environment": describe()}
    (args.output / PREPARED).write_text(json.dumps(record))

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    base = AutoModelForCausalLM.from_pretrained(
        args.model, dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
    )
    torch.manual_seed(args.seed)
    model = get_peft_model(
        base, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    spec = inf.RowSpec(dim=DIM, dtype="fp32", seed=args.seed)
    options = inf.BuildOptions(shard_rows=10)

    def build(name: str, some: list[tuple[dict[str, Any], dict[str, Any]]]) -> Any:
        with counted(args.output / SECONDS, name.partition("-")[0]):
            return inf.build_store(
                args.output / name, model, examples_of(some), spec, tokenizer=tokenizer, options=options
            )

    build("validation", validation)
    asked = inf.tokenize(examples_of(validation)[::2], tokenizer).examples
    for start in range(0, len(pool), BLOCK):
        block = pool[start : start + BLOCK]
        store = build(block_name(start), block)
        tokens = inf.tokenize(examples_of(block), tokenizer).examples
        saved = args.output / f"{block_name(start)}-{EMBEDDINGS}"
        if not saved.is_file():
            with counted(args.output / SECONDS, "embeddings"), model.disable_adapter():
                rows = cosine_similarity(example_embeddings(model, tokens), example_embeddings(model, asked))
            np.save(saved, rows.mean(axis=1))
        if not start:
            with counted(args.output / SECONDS, "fisher"):
                inf.Scorer.fit(
                    store, preconditioner="ekfac", model=model, examples=tokens, fisher_examples=args.fisher_examples
                )


def block_name(start: int) -> str:
    """Return the name of the store of the pool's questions from `start` on."""
    return f"pool-{start:04d}"


@contextmanager
def counted(path: Path, name: str) -> Iterator[None]:
    """Add the process's seconds of CPU to those of `name` in a file."""
    start = time.process_time()
    yield
    seconds = json.loads(path.read_text()) if path.is_file() else {}
    seconds[name] = seconds.get(name, 0.0) + time.process_time() - start
    path.write_text(json.dumps(seconds))


@dataclass(frozen=True)
class Judged:
    """Hold a pool's solutions, the model's losses on them, and its stores."""

    wrong: np.ndarray  # [N] bool, the right and the wrong solution of each question one after the other
    losses: np.ndarray  # [N]
    characters: np.ndarray  # [N] of the solution
    pool: Any
    queries: torch.Tensor  # [Q, k], right and wrong in turn
    fisher: Any
    embeddings: np.ndarray  # [N] mean cosine with the right validation answers


def standardised(values: np.ndarray) -> np.ndarray:
    """Return values with mean 0 and standard deviation 1."""
    return (values - values.mean()) / values.std()


def wrongness(judged: Judged) -> dict[str, dict[str, np.ndarray]]:
    """Return preconditioner -> method -> scores [N] that are to be high for wrong solutions."""
    loss = judged.losses
    right, wrong = (list(range(start, len(judged.queries), 2)) for start in (0, 1))
    found = {"no gradients": {"loss (perplexity)": loss, "length in characters": judged.characters}}
    found["no gradients"]["embedding, far from right answers"] = -judged.embeddings
    pairs = [Pair((r,), (w,)) for r, w in zip(right, wrong, strict=True)]
    for name in PRECONDITIONERS:
        scorer = inf.Scorer.fit(judged.pool, preconditioner=name, fisher=judged.fisher)
        table = scorer.scores(judged.queries, {"right": right, "wrong": wrong}, pairs=pairs)
        found[name] = {
            "low benefit (right answers)": -table["s_right"],
            "high harm (wrong answers)": table["s_wrong"],
            "combined": table["rank_wrong"] - table["rank_right"],
            "contrast": table["s_contrast"],
            "contrast, mean rank": table["mean_rank_contrast"],
            "contrast + loss": standardised(table["s_contrast"]) + standardised(loss),
        }
    return found


def measured(scores: np.ndarray, loss: np.ndarray, wrong: np.ndarray, seed: int = 0) -> dict[str, Any]:
    """Return the measures of one method, with 95 % percentile intervals over questions, and its AUC less the loss's."""
    pairs = np.arange(len(wrong)).reshape(-1, 2)
    rng = np.random.default_rng(seed)
    draws = [pairs[rng.integers(0, len(pairs), len(pairs))].ravel() for _ in range(DRAWS)]
    aucs = np.array([auc(scores[drawn], wrong[drawn]) for drawn in draws])
    of_loss = np.array([auc(loss[drawn], wrong[drawn]) for drawn in draws])
    above = scores[pairs[:, 1]] - scores[pairs[:, 0]]
    order = np.argsort(-scores, kind="stable")
    return {
        "auc": auc(scores, wrong),
        "auc_interval": np.percentile(aucs, [2.5, 97.5]).tolist(),
        "above_loss": auc(scores, wrong) - auc(loss, wrong),
        "above_loss_interval": np.percentile(aucs - of_loss, [2.5, 97.5]).tolist(),
        "paired": float((above > 0).mean() + (above == 0).mean() / 2),
        **{f"precision_{share}": float(wrong[order[: len(wrong) * share // 100]].mean()) for share in SHARES},
    }


def judge(folder: Path) -> dict[str, Any]:
    """Score the pool by every method; return and write what `docs/real-model.md` shows."""
    prepared = json.loads((folder / PREPARED).read_text())
    queries = inf.open_store(folder / "validation")
    starts = range(0, len(prepared["pool"]), BLOCK)
    stores = [inf.open_store(folder / block_name(start)) for start in starts if finished(folder / block_name(start))]
    pairs = prepared["pool"][: len(stores) * BLOCK]
    with tempfile.TemporaryDirectory() as temporary:
        joined = [store.path for store in stores]
        pool = merge_stores(joined, Path(temporary) / "pool") if len(joined) > 1 else stores[0]
        ids = [row["id"] for pair in pairs for row in pair]
        if list(pool.ids) != ids or list(queries.ids) != [r["id"] for pair in prepared["validation"] for r in pair]:
            raise DataError(f"{folder}: the stores are not of these solutions; make them anew")
        (fisher,) = fisher_folders(stores[0].path)
        embeddings = [folder / f"{block_name(start)}-{EMBEDDINGS}" for start in starts[: len(stores)]]
        judged = Judged(
            wrong=np.array([not row["is_correct"] for pair in pairs for row in pair]),
            losses=np.asarray(pool.losses, np.float64),
            characters=np.array([float(len(row["solution"])) for pair in pairs for row in pair]),
            pool=pool,
            queries=queries.rows(),
            fisher=inf.open_store(fisher),
            embeddings=np.concatenate([np.load(path) for path in embeddings]),
        )
        return written(folder, prepared, judged)


def finished(path: Path) -> bool:
    """Say whether a block is whole: its embeddings are written last."""
    return path.with_name(f"{path.name}-{EMBEDDINGS}").is_file()


def written(folder: Path, prepared: dict[str, Any], judged: Judged) -> dict[str, Any]:
    """Measure every method; return and write what the page shows."""
    methods = [
        {"preconditioner": name, "method": method, **measured(scores, judged.losses, judged.wrong)}
        for name, some in wrongness(judged).items()
        for method, scores in some.items()
    ]
    seconds = json.loads((folder / SECONDS).read_text())
    found = {
        "settings": prepared["settings"],
        "environment": prepared["environment"],
        "pool": len(judged.pool),
        "queries": len(judged.queries),
        "fisher_rows": len(judged.fisher),
        "cpu_seconds": seconds,
        "methods": methods,
    }
    (folder / "detection.json").write_text(json.dumps(found, indent=1))
    return found


def main(argv: list[str] | None = None) -> int:
    """Run one stage."""
    args = parser().parse_args(argv)
    if args.verb == "rows":
        make_rows(args)
    else:
        for row in sorted(judge(args.output)["methods"], key=lambda row: -row["auc"]):
            low, high = row["auc_interval"]
            name = f"{row['preconditioner']}: {row['method']}"
            print(f"{row['auc']:.3f} [{low:.3f}, {high:.3f}]  {row['paired']:.2f}  {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
