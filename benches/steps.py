"""Find the wrong step of a trace by the influence of its steps; writes benches/results/steps-<task>.json.

    python -m benches.steps demo --output runs/steps-demo [--seeds 5]
    python -m benches.steps mistakes --data mistakes_word_sorting.jsonl --output runs/steps-words
    python -m benches.steps page

`demo`: the demo's own task and model; of the corrupted traces with exactly one wrong line, the share in which a score
is highest on that line. `mistakes`: traces of a real model in which people marked the first wrong step (BIG-Bench
Mistake: `input`, `steps`, `mistake_index`): a small model is trained on two thirds of the task's traces and its adapter
on the same, right and wrong traces of the last third are the queries; accuracy and mean reciprocal rank of the marked
step.
Influence of steps stands beside a step's own mean loss and largest token loss, its place (first, last, at random) and
sums by position. `page` writes docs/steps.md. Finished seeds are kept in the output folder.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import influence_fast as inf
from benches.environment import describe
from benches.models import qwen2_model, train_tokenizer
from influence_fast.data.examples import Example
from influence_fast.gradients.rows.row_spec import RowSpec
from influence_fast.influence.contrast import Pair
from influence_fast.influence.pool_gradients import pool_gradients
from influence_fast.influence.settings import InfluenceConfig
from influence_fast.influence.step_influence import StepInfluence
from influence_fast.influence.step_scores import as_table
from influence_fast.run.demo import demo_config
from influence_fast.run.demo_data import NEW_WORDINGS
from influence_fast.run.pipeline import Pipeline
from influence_fast.statistics.intervals import wilson_interval
from influence_fast.training.fine_tuning import finetune, finetuned
from influence_fast.training.settings import LoraSettings, TrainConfig

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parents[1] / "docs" / "steps.md"
RANK, BATCH, STEPS = 16, 16, 400  # of the small model that real traces are tried on


def misread_line(prompt: str) -> int | None:
    """Return the line of a corrupted demo trace that is wrong, None where several are."""
    signs = [re.escape(NEW_WORDINGS[kind]).replace(r"\{n\}", r"\d+") for kind in ("times", "share")]
    events = [part.strip() + "." for part in prompt.split(".")[1:-1]]
    wrong = [place for place, event in enumerate(events) if any(re.fullmatch(sign, event) for sign in signs)]
    return wrong[0] if len(wrong) == 1 else None


def judged(scores: Mapping[str, Sequence[np.ndarray]], wrong: Sequence[int]) -> dict[str, dict[str, Any]]:
    """Return method -> hits, traces and reciprocal ranks, of scores [S] that are to be highest on the wrong step."""
    found = {}
    for name, of_traces in scores.items():
        # steps that tie share the mean of their places
        ranks = [
            1 + (one > one[place]).sum() + ((one == one[place]).sum() - 1) / 2
            for one, place in zip(of_traces, wrong, strict=True)
        ]
        first = [
            float(one[place] == one.max()) / float((one == one.max()).sum())
            for one, place in zip(of_traces, wrong, strict=True)
        ]
        found[name] = {"hits": sum(first), "traces": len(wrong), "reciprocal": [float(1 / rank) for rank in ranks]}
    return found


def scores_of(found: list[StepInfluence], position: list[StepInfluence], names: list[str]) -> dict[str, Any]:
    """Return method -> for each trace the scores of its steps, high where a step is to be suspected."""

    def columns(some: list[StepInfluence]) -> dict[str, list[np.ndarray]]:
        table = as_table(some, names)
        rows = list(table.of_examples().values())
        parts = {name: [table[name][one] for one in rows] for name in (*(f"s_{n}" for n in names),)}
        picked = {
            "influence on wrong answers": parts["s_incorrect"],
            "low influence on right answers": [-one for one in parts["s_correct"]],
            "wrong less right": [w - r for w, r in zip(parts["s_incorrect"], parts["s_correct"], strict=True)],
        }
        if "contrast" in names:
            picked["contrast"] = parts["s_contrast"]
        return picked

    scores: dict[str, Any] = columns(found)
    scores |= {
        f"{name}, a token": [s / n for s, n in zip(some, counts(found), strict=True)] for name, some in scores.items()
    }
    scores |= {f"by position: {name}": some for name, some in columns(position).items()}
    scores["the step's mean loss"] = [np.array(one.losses) for one in found]
    both = [standardised(scores[name]) for name in ("wrong less right", "the step's mean loss")]
    scores["wrong less right + mean loss"] = [harm + loss for harm, loss in zip(*both, strict=True)]
    scores["its largest token loss"] = [
        np.array([float(one.token_losses[list(step.tokens)].max()) for step in one.steps]) for one in found
    ]
    scores["the first step"] = [-np.arange(len(one.steps), dtype=float) for one in found]
    scores["the last step"] = [np.arange(len(one.steps), dtype=float) for one in found]
    scores["at random"] = [np.zeros(len(one.steps)) for one in found]
    return scores


def standardised(scores: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Return scores with mean 0 and standard deviation 1 over the steps of all traces."""
    every = np.concatenate(scores)
    return [(one - every.mean()) / every.std() for one in scores]


def counts(found: list[StepInfluence]) -> list[np.ndarray]:
    """Return how many tokens each step of each trace has."""
    return [np.array([float(len(step.tokens)) for step in one.steps]) for one in found]


def influences(
    model: Any,
    tokenizer: Any,
    pool: list[dict[str, Any]],
    queries: tuple[list[dict[str, Any]], dict[str, list[int]], Sequence[Pair]],
    suspects: list[dict[str, Any]],
    steps: Any,
    folder: Path,
) -> dict[str, Any]:
    """Return the scores of the suspects' steps by every method, and the seconds of the passes."""
    influence, seconds = InfluenceConfig(), dict[str, float]()
    asked, groups, pairs = queries
    made = pool_gradients(model, pool, asked, folder / "store", RowSpec(), influence, seconds, progress=False)
    directions = made.scorer(influence, model).directions(made.queries, groups, pairs=pairs)
    names, rows = list(directions), torch.stack(list(directions.values()))
    start = time.perf_counter()
    two = inf.step_influence(model, suspects, rows[:2], steps=steps, tokenizer=tokenizer, method="jvp")
    seconds["steps of two directions"] = time.perf_counter() - start
    start = time.perf_counter()
    inf.per_example_gradients(model, suspects)
    seconds["gradients of the same traces"] = time.perf_counter() - start
    found = two if len(rows) == 2 else inf.step_influence(model, suspects, rows, steps=steps, tokenizer=tokenizer)
    position = inf.step_influence(model, suspects, rows, steps=steps, tokenizer=tokenizer, method="position")
    return {"scores": scores_of(found, position, names), "seconds": seconds}


def demo(folder: Path, seed: int) -> dict[str, Any]:
    """Judge the methods on the demo's task of one seed."""
    pipeline = Pipeline(demo_config(folder / f"seed{seed}", seed=seed, progress=False), progress=False)
    reference = pipeline.reference_adapter()
    queries = pipeline.queries(reference)
    suspects = [e for e in pipeline.splits.pool if e.label == "wrong_step" and misread_line(e.prompt) is not None]
    tokens = {one["id"]: one for one in pipeline.splits.tokenized.examples}
    asked = inf.tokenize(queries.examples, pipeline.tokenizer).examples
    with finetuned(pipeline.base, reference) as model:
        found = influences(
            model,
            pipeline.tokenizer,
            pipeline.splits.tokenized.examples,
            (asked, queries.groups, ()),
            [tokens[e.id] for e in suspects],
            "lines",
            folder / f"seed{seed}",
        )
    wrong = [misread_line(e.prompt) for e in suspects]
    return {"methods": judged(found["scores"], [w for w in wrong if w is not None]), "seconds": found["seconds"]}


def mistakes(data: Path, folder: Path, seed: int) -> dict[str, Any]:
    """Judge the methods on real traces with a marked step."""
    rows = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if len(row["steps"]) > 1]
    examples = [Example(row["id"], row["input"], "\n".join(row["steps"]), row["target"]) for row in rows]
    order = np.random.default_rng(seed).permutation(len(rows)).tolist()
    third = len(rows) // 3
    held, pool = order[:third], order[third:]
    # the tokenizer and the model's first training see the pool alone
    tokenizer = train_tokenizer([f"{examples[i].prompt}\n{examples[i].completion}" for i in pool], 1024)
    torch.manual_seed(seed)
    model = qwen2_model(len(tokenizer), tokenizer.eos_token_id, layers=3, width=128)
    tokens = inf.tokenize(examples, tokenizer).examples
    pretrain(model, [tokens[i] for i in pool], seed)
    adapter = finetune(
        model,
        tokenizer,
        [tokens[i] for i in pool],
        folder / f"adapter-{data.stem}-seed{seed}",
        config=TrainConfig(epochs=2, learning_rate=2e-3, batch_size=8, seed=seed),
        lora=LoraSettings(r=RANK),
        progress=False,
    )
    suspects = [i for i in pool if rows[i]["mistake_index"] is not None]
    right = [i for i in held if rows[i]["mistake_index"] is None]
    wrong = [i for i in held if rows[i]["mistake_index"] is not None]
    asked = [tokens[i] for i in (*right, *wrong)]
    groups = {
        "correct": list(range(len(right))),
        "incorrect": list(range(len(right), len(asked))),
    }
    with finetuned(model, adapter.path) as tuned:
        found = influences(
            tuned,
            tokenizer,
            [tokens[i] for i in pool],
            (asked, groups, ()),
            [tokens[i] for i in suspects],
            "lines" if all("\n" not in step for row in rows for step in row["steps"]) else splitter(rows),
            folder / f"{data.stem}-seed{seed}",
        )
    marked = [int(rows[i]["mistake_index"]) for i in suspects]
    return {"methods": judged(found["scores"], marked), "seconds": found["seconds"], "right queries": len(right)}


def splitter(rows: list[dict[str, Any]]) -> Any:
    """Return the function that splits the joined steps of a trace at the steps' own ends."""
    by_text = {"\n".join(row["steps"]): row["steps"] for row in rows}

    def spans(text: str) -> list[tuple[int, int]]:
        ends = np.cumsum([len(step) + 1 for step in by_text[text]]).tolist()
        return list(zip([0, *ends[:-1]], [*ends[:-1], len(text)], strict=True))

    return spans


def pretrain(model: Any, tokens: list[dict[str, Any]], seed: int) -> None:
    """Train every weight on whole texts for a fixed number of batches."""
    rng = np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=STEPS, pct_start=0.1)
    model.train()
    for _ in range(STEPS):
        some = [tokens[i]["input_ids"][:384] for i in rng.choice(len(tokens), BATCH)]
        ids = torch.nn.utils.rnn.pad_sequence(some, batch_first=True, padding_value=0)
        labels = torch.nn.utils.rnn.pad_sequence(some, batch_first=True, padding_value=-100)
        mask = (labels != -100).long()
        model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()


def joined(seeds: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the methods' accuracy with its 95 % Wilson interval, by seed, and the mean reciprocal rank."""
    rows = []
    for name in seeds[0]["methods"]:
        parts = [seed["methods"][name] for seed in seeds]
        hits, traces = sum(part["hits"] for part in parts), sum(part["traces"] for part in parts)
        reciprocal = np.concatenate([part["reciprocal"] for part in parts])
        draws = np.random.default_rng(0).choice(reciprocal, (2000, len(reciprocal))).mean(axis=1)
        rows.append(
            {
                "method": name,
                "accuracy": hits / traces,
                "interval": list(wilson_interval(hits, traces)),
                "by_seed": [part["hits"] / part["traces"] for part in parts],
                "mrr": float(reciprocal.mean()),
                "mrr_interval": np.percentile(draws, [2.5, 97.5]).tolist(),
                "traces": traces,
            }
        )
    return sorted(rows, key=lambda row: -row["accuracy"])


def main(argv: list[str] | None = None) -> int:
    """Run one part."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = made.add_subparsers(dest="verb", required=True)
    for verb in ("demo", "mistakes"):
        sub = verbs.add_parser(verb)
        sub.add_argument("--output", type=Path, required=True)
        sub.add_argument("--seeds", type=int, default=5)
    sub.add_argument("--data", type=Path, required=True)
    verbs.add_parser("page")
    args = made.parse_args(argv)
    if args.verb == "page":
        from benches.steps_page import write_page

        return write_page(RESULTS, PAGE)
    name = "demo" if args.verb == "demo" else args.data.stem
    settings: dict[str, Any] = {"task": name, "seeds": args.seeds}
    if args.verb == "mistakes":
        settings["data_sha256"] = hashlib.sha256(args.data.read_bytes()).hexdigest()
    args.output.mkdir(parents=True, exist_ok=True)
    seeds = []
    for seed in range(args.seeds):
        kept = args.output / f"{name}-seed{seed}.json"
        if not kept.is_file():
            found = demo(args.output, seed) if args.verb == "demo" else mistakes(args.data, args.output, seed)
            kept.write_text(json.dumps(found))
        seeds.append(json.loads(kept.read_text()))
    rows = joined(seeds)
    record = {
        "settings": settings,
        "environment": describe(),
        "seconds": [s["seconds"] for s in seeds],
        "methods": rows,
    }
    (RESULTS / f"steps-{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    for row in rows:
        low, high = row["interval"]
        print(f"{row['accuracy']:.3f} [{low:.3f}, {high:.3f}]  mrr {row['mrr']:.3f}  {row['method']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
