"""The paper's experiment in miniature, on several worlds: does pruning by influence beat the baselines?

    python -m benches.paper_mini --output runs/paper-mini

Each seed is a world of its own: tokenizer, pre-training, corrupted pool, questions, scores and fine-tunings are all
made anew, so that the intervals are over everything that could have gone otherwise. All strategies drop 10 % and 50 %
of the pool; the table has the mean accuracy over seeds, its 95 % interval over seeds and questions, and the paired
difference to `random` and to each named baseline, Holm-corrected over the whole table. Writes
benches/results/paper-mini-cpu.json and docs/paper-mini.md; interrupted, it goes on where it was.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from benches.environment import describe
from benches.update_readme import measured
from influence_fast.isolation import current_folder_off_path

STRATEGIES = (
    "random",
    "low_benefit",
    "high_harm",
    "combined",
    "combined_mean_rank",
    "embedding",
    "perplexity_high",
    "perplexity_mid",
    "perplexity_low",
)
BASELINES = ("random", "perplexity_high", "perplexity_mid", "perplexity_low", "embedding", "full")
OURS = ("combined", "high_harm", "low_benefit", "combined_mean_rank")
ROOT = Path(__file__).resolve().parents[1]


def one_world(output: str, seed: int) -> dict[str, Any]:
    """The whole pipeline on the demo's world of `seed`: cells, each question's outcome, detection."""
    import torch

    from influence_fast.run.demo import demo_config
    from influence_fast.run.pipeline import Pipeline
    from influence_fast.run.results import correct_answers

    torch.set_num_threads(1)
    config = demo_config(Path(output) / f"seed-{seed}", seed=seed, progress=False)
    grid = dataclasses.replace(config.pruning, strategies=STRATEGIES, seeds=(seed,))
    pipeline = Pipeline(dataclasses.replace(config, pruning=grid), progress=False)
    results = pipeline.run()
    return {
        "seed": seed,
        "base": results["accuracy_before"]["accuracy"],
        "cells": results["cells"],
        "correct": [correct_answers(pipeline.folder, cell) for cell in results["cells"]],
        "detection": {row["method"]: row["auc"] for row in results["detection"]},
    }


def table_of(worlds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means with intervals, and every comparison of ours with a baseline, over all worlds."""
    from influence_fast.statistics.paired_tests import compare, holm
    from influence_fast.statistics.two_level import two_level_interval

    answers: dict[tuple[str, float], np.ndarray] = {}
    for cell in worlds[0]["cells"]:
        key = (cell["strategy"], cell["fraction"])
        rows = [
            list(correct.values())
            for world in worlds
            for found, correct in zip(world["cells"], world["correct"], strict=True)
            if (found["strategy"], found["fraction"]) == key
        ]
        answers[key] = np.array(rows, np.float64)  # [worlds, questions]; questions of different worlds differ
    settings = []
    for (strategy, fraction), correct in answers.items():
        low, high = two_level_interval(correct)
        cells = [c for w in worlds for c in w["cells"] if (c["strategy"], c["fraction"]) == (strategy, fraction)]
        settings.append(
            {
                "strategy": strategy,
                "fraction": fraction,
                "accuracy": float(correct.mean()),
                "low": low,
                "high": high,
                "by_seed": correct.mean(axis=1).tolist(),
                "harmful_dropped": float(np.mean([c["harmful_dropped"] / c["harmful_total"] for c in cells])),
            }
        )
    comparisons = []
    for (strategy, fraction), ours in answers.items():
        for baseline in BASELINES if strategy in OURS else ():
            other = answers[baseline, 0.0 if baseline == "full" else fraction]
            comparisons.append({"strategy": strategy, "fraction": fraction, "against": baseline} | compare(ours, other))
    for row, p in zip(comparisons, holm([row["p"] for row in comparisons]), strict=True):
        row["p_adjusted"] = float(p)
    names = worlds[0]["detection"]
    return {
        "seeds": [world["seed"] for world in worlds],
        "questions": int(next(iter(answers.values())).shape[1]),
        "base": [world["base"] for world in worlds],
        "settings": settings,
        "comparisons": comparisons,
        "auc": {name: [world["detection"][name] for world in worlds] for name in names},
    }


def markdown(result: dict[str, Any]) -> str:
    """The committed table."""
    seeds = len(result["seeds"])
    lines = [
        "# The paper in miniature",
        "",
        f"Arithmetic stories with corrupted traces (the demo's world), {seeds} seeds, each a world of its own; "
        f"{result['questions']} test questions a seed. Accuracy: mean over seeds, 95 % interval over seeds and "
        f"questions. The base model, before fine-tuning, answers {np.mean(result['base']):.3f}.",
        "",
        "| strategy | dropped | accuracy | by seed | share of the corrupted traces dropped |",
        "|---|---|---|---|---|",
    ]
    for row in sorted(result["settings"], key=lambda row: (row["fraction"], -row["accuracy"])):
        by_seed = " ".join(f"{value:.3f}" for value in row["by_seed"])
        lines.append(
            f"| {row['strategy']} | {100 * row['fraction']:.0f} % | **{row['accuracy']:.3f}** "
            f"({row['low']:.3f}-{row['high']:.3f}) | {by_seed} | {row['harmful_dropped']:.2f} |"
        )
    lines += [
        "",
        f"Paired differences, Holm-corrected over all {len(result['comparisons'])}:",
        "",
        "| strategy | dropped | against | difference (95 % interval) | p, corrected |",
        "|---|---|---|---|---|",
    ]
    for row in result["comparisons"]:
        lines.append(
            f"| {row['strategy']} | {100 * row['fraction']:.0f} % | {row['against']} | {row['difference']:+.3f} "
            f"({row['low']:+.3f} to {row['high']:+.3f}) | {row['p_adjusted']:.4f} |"
        )
    lines += ["", "AUC of finding the corrupted traces, by seed:", "", "| order | mean | by seed |", "|---|---|---|"]
    for name, values in sorted(result["auc"].items(), key=lambda item: -np.mean(item[1])):
        lines.append(f"| {name} | {np.mean(values):.3f} | {' '.join(f'{value:.3f}' for value in values)} |")
    where = measured(result)
    return "\n".join([*lines, "", f"`make paper-mini` ({result['minutes']:.0f} min): {where}", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default="runs/paper-mini")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    start = time.perf_counter()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.processes, context) as pool:
        with current_folder_off_path():
            waiting = [pool.submit(one_world, args.output, seed) for seed in args.seeds]
        worlds = []
        for future in waiting:
            worlds.append(future.result())
            print(f"seed {worlds[-1]['seed']} done, {(time.perf_counter() - start) / 60:.1f} min", flush=True)
    result = describe() | {"minutes": (time.perf_counter() - start) / 60} | table_of(worlds)
    (ROOT / "benches" / "results" / "paper-mini-cpu.json").write_text(json.dumps(result, indent=1) + "\n")
    page = ROOT / "docs" / "paper-mini.md"
    page.parent.mkdir(exist_ok=True)
    page.write_text(markdown(result))
    print(markdown(result))


if __name__ == "__main__":
    main()
