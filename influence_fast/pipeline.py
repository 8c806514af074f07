"""The whole road: data -> fine-tuning -> gradients -> scores -> pruning -> fine-tuning again -> evaluation -> report.

Only this file knows the order. Every finished piece is kept in the run's folder under its own name and is not done
again when the run is repeated after an interruption.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from influence_fast import doctor, pruning, scoring
from influence_fast.adam import adam_moments
from influence_fast.building import build_store
from influence_fast.config import GradientConfig, InfluenceConfig, RunConfig, Source, to_dict
from influence_fast.data import Example, TokenizedSet, load_examples, load_rows, save_examples, tokenize
from influence_fast.errors import ConfigError, DataError, listing
from influence_fast.evaluation import EvalConfig, evaluate
from influence_fast.gradients import per_example_gradients, per_example_losses
from influence_fast.lora import gradient_layout
from influence_fast.models import load_model, load_tokenizer
from influence_fast.packing import IGNORED
from influence_fast.report import save_results, write_report
from influence_fast.scores import ScoreTable
from influence_fast.training import TrainResult, finetune, load_finetuned
from influence_fast.workdir import RunFolder

HARMLESS = (None, "clean")  # labels that do not mark an example as known to be harmful


@dataclass(frozen=True)
class Splits:
    """The three sets of a run, as examples, and the pool tokenized."""

    pool: list[Example]
    validation: list[Example]
    test: list[Example]
    tokenized: TokenizedSet


@dataclass(frozen=True)
class Queries:
    """What the training examples are scored against: texts, and their places by group."""

    examples: list[Example]
    groups: dict[str, list[int]]
    warnings: list[str]


class Pipeline:
    """One run of `config`. `run()` goes the whole road; each step can be called again and finds its result."""

    def __init__(self, config: RunConfig, *, progress: bool = True) -> None:
        self.config = config
        self.talks = progress
        self.progress = progress and sys.stderr.isatty()  # bars are for terminals; a log gets a line a piece of work
        self.started = time.perf_counter()
        self.folder = RunFolder(config)
        self.warnings: list[str] = []
        self.groups: dict[str, int] = {}
        self.tokenizer = load_tokenizer(config.model.path, trust_remote_code=config.model.trust_remote_code)
        self.base = load_model(
            config.model.path,
            dtype=config.model.dtype,
            device=config.model.device,
            trust_remote_code=config.model.trust_remote_code,
        )
        self.splits = self._load()

    def _once(self, name: str, work: Callable[[], Any]) -> Any:
        if self.talks and not self.folder.has(name):
            print(f"{time.perf_counter() - self.started:7.1f} s  {name}", file=sys.stderr, flush=True)
        return self.folder.once(name, work)

    def run(self) -> dict[str, Any]:
        """Everything, to `report.html` and `results.json`; returns what the report shows."""
        before = self._evaluate("base", None)
        reference = self.reference_adapter()
        table = self.scores(reference)
        cells = self.cells(table)
        results = self._results(before, table, cells)
        save_results(results, self.folder / "results.json")
        write_report(results, self.folder / "report.html")
        return results

    # ---- data ----------------------------------------------------------------------------------------------

    def _load(self) -> Splits:
        data = self.config.data
        pool = _examples(data.pool)
        held = data.holdout_validation * (data.validation is None) + data.holdout_test * (data.test is None)
        if held >= len(pool):
            raise ConfigError(f"data: holding out {held} of the pool's {len(pool)} examples would leave none")
        order = list(range(len(pool)))
        if held:
            random.Random(self.config.seed).shuffle(order)
        taken = iter(order)
        validation = (
            _examples(data.validation)
            if data.validation
            else [pool[next(taken)] for _ in range(data.holdout_validation)]
        )
        test = _examples(data.test) if data.test else [pool[next(taken)] for _ in range(data.holdout_test)]
        kept = [pool[i] for i in sorted(taken)]
        for name, part in (("validation", validation), ("test", test)):
            without = [example.id for example in part if example.answer is None]
            if without:
                raise DataError(
                    f"{name}: no final answer to grade against in {listing(without)}: add an 'answer' column, "
                    r"or solutions that end in \boxed{} or ####"
                )
        tokenized = tokenize(kept, self.tokenizer, max_length=data.max_length, truncate=data.truncate)
        if tokenized.too_long:
            names = listing(f"{name} ({n} tokens)" for name, n in tokenized.too_long)
            self.warnings.append(
                f"{len(tokenized.too_long)} of {len(kept)} pool examples are longer than max_length "
                f"{data.max_length} and were left out: {names}"
            )
        if tokenized.truncated:
            self.warnings.append(f"{len(tokenized.truncated)} pool examples were cut to {data.max_length} tokens")
        usable = {example["id"] for example in tokenized.examples}
        return Splits([e for e in kept if e.id in usable], validation, test, tokenized)

    # ---- the fine-tuned model that is asked ------------------------------------------------------------------

    def reference_adapter(self) -> str | Path:
        """The adapter whose answers and gradients the scores are made of: given, or trained on the whole pool."""
        if self.config.model.adapter is not None:
            return self.config.model.adapter
        return self._train("full", self.config.pruning.seeds[0], range(len(self.splits.pool))).path

    def _train(self, name: str, seed: int, rows: Sequence[int]) -> TrainResult:
        examples = [self.splits.tokenized.examples[i] for i in rows]
        return finetune(
            self.base,
            self.tokenizer,
            examples,
            self.folder / "adapters" / f"{name}-seed{seed}",
            config=dataclasses.replace(self.config.training, seed=seed),
            lora=self.config.lora,
            progress=self.progress,
        )

    def _evaluate(self, name: str, adapter: str | Path | None) -> dict[str, Any]:
        """Accuracy on the test questions, with its interval; transcripts are kept."""

        def work() -> dict[str, Any]:
            with contextlib.nullcontext(self.base) if adapter is None else self._finetuned(adapter) as model:
                result = evaluate(
                    model,
                    self.tokenizer,
                    self.splits.test,
                    config=self.config.evaluation,
                    transcripts=self.folder / "transcripts" / f"{name}.jsonl",
                    progress=self.progress,
                )
            low, high = result.interval
            return {"accuracy": result.accuracy, "low": low, "high": high, "n": len(self.splits.test)}

        return self._once(f"evaluations/{name}", work)

    # ---- scores --------------------------------------------------------------------------------------------

    def queries(self, adapter: str | Path) -> Queries:
        """The texts whose gradients ask, and which of them form the correct and the incorrect group."""
        validation = self.splits.validation
        if self.config.influence.queries == "reference":
            return make_queries(validation, None, None)

        def work() -> list[dict[str, Any]]:
            with self._finetuned(adapter) as model:
                transcripts = self.folder / "transcripts" / "validation.jsonl"
                return own_answers(
                    model, self.tokenizer, validation, self.config.evaluation, transcripts, progress=self.progress
                )

        answers = self._once("own_answers", work)
        return make_queries(validation, answers, self.config.influence.fallback)

    def scores(self, adapter: str | Path) -> ScoreTable:
        """Scores of the pool, in `scores.parquet` and `scores.csv`."""
        queries = self.queries(adapter)
        self.warnings += queries.warnings
        self.groups = {name: len(members) for name, members in queries.groups.items()}
        path = self.folder / "scores.parquet"

        def work() -> dict[str, float]:
            with self._finetuned(adapter) as model:
                table, seconds = score_pool(
                    model,
                    self.tokenizer,
                    self.splits.tokenized.examples,
                    queries,
                    self.folder / "store",
                    self.config.gradients,
                    self.config.influence,
                    progress=self.progress,
                )
            table.save(self.folder / "scores.csv")
            table.save(path)
            return seconds

        self._once("scoring_seconds", work)
        return ScoreTable.load(path)

    @contextlib.contextmanager
    def _finetuned(self, adapter: str | Path) -> Iterator[Any]:
        """The base with an adapter, taken off again at the end."""
        model: Any = load_finetuned(self.base, adapter)
        try:
            yield model
        finally:
            if hasattr(model, "unload"):
                model.unload()

    # ---- the grid ------------------------------------------------------------------------------------------

    def cells(self, table: ScoreTable) -> list[dict[str, Any]]:
        """One fine-tuning and one evaluation for each strategy, fraction and seed; each is done once."""
        grid = self.config.pruning
        cells = []
        strategies = [s for s in grid.strategies if s != "full"]
        for seed in grid.seeds:
            cells.append(self._cell(table, "full", 0.0, seed))
            for strategy in strategies:
                cells += [self._cell(table, strategy, fraction, seed) for fraction in grid.fractions]
        return cells

    def _cell(self, table: ScoreTable, strategy: str, fraction: float, seed: int) -> dict[str, Any]:
        name = "full" if strategy == "full" else f"{strategy}-{round(100 * fraction)}"
        place = {example.id: i for i, example in enumerate(self.splits.pool)}
        selection = pruning.select(table, strategy, fraction=fraction, seed=seed)
        rows = [place[table.ids[i]] for i in selection.keep]

        def work() -> dict[str, Any]:
            if strategy != "full":
                self._write_pruned(name if strategy != "random" else f"{name}-seed{seed}", rows)
            trained = self._train(name, seed, range(len(self.splits.pool)) if strategy == "full" else rows)
            cell = {"strategy": strategy, "fraction": fraction, "seed": seed, "seconds": trained.seconds}
            cell |= {"kept": len(rows), "dropped": len(selection.drop)}
            cell |= self._harmful(table, selection.drop)
            return cell | self._evaluate(f"{name}-seed{seed}", trained.path)

        return self._once(f"cells/{name}-seed{seed}", work)

    def _write_pruned(self, name: str, rows: Sequence[int]) -> None:
        source = load_rows(self.config.data.pool.path, split=self.config.data.pool.split)
        kept = [self.splits.pool[i] for i in rows]
        save_examples(kept, self.folder / "pruned" / f"{name}{source.suffix}", source, self.config.data.pool.columns)

    def _harmful(self, table: ScoreTable, dropped: np.ndarray) -> dict[str, Any]:
        """How many of the examples known to be harmful were dropped, and how many chance would drop."""
        harmful = self._known_harmful(table)
        if harmful is None:
            return {}
        total = int(harmful.sum())
        return {
            "harmful_dropped": int(harmful[dropped].sum()),
            "harmful_total": total,
            "expected_by_chance": total * len(dropped) / len(table.ids),
        }

    def _known_harmful(self, table: ScoreTable) -> np.ndarray | None:
        labels = {example.id: example.label for example in self.splits.pool}
        harmful = np.array([labels[i] not in HARMLESS for i in table.ids])
        return harmful if harmful.any() else None

    # ---- results -------------------------------------------------------------------------------------------

    def _results(self, before: dict[str, Any], table: ScoreTable, cells: list[dict[str, Any]]) -> dict[str, Any]:
        pool = {example.id: example for example in self.splits.pool}
        labels: dict[str, int] = {}
        for example in self.splits.pool:
            if example.label is not None:
                labels[example.label] = labels.get(example.label, 0) + 1
        return {
            "title": self.config.title,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "config": to_dict(self.config),
            "versions": doctor.versions(),
            "environment": doctor.environment(),
            "data": {
                "pool": len(pool),
                "validation": len(self.splits.validation),
                "test": len(self.splits.test),
                "labels": labels or None,
                "set_aside": [
                    {"id": name, "why": f"{n} tokens, longer than max_length"}
                    for name, n in self.splits.tokenized.too_long
                ],
            },
            "accuracy_before": {"name": "base model"} | before,
            "cells": cells,
            "detection": self._detection(table),
            "scores": self._trace_scores(table, pool),
            "rank_agreement": _rank_agreement(table),
            "curves": self._curves(),
            "cost": self._costs(cells),
            "queries": self.groups,
            "warnings": self.warnings,
        }

    def _trace_scores(self, table: ScoreTable, pool: dict[str, Example]) -> list[dict[str, Any]] | None:
        if "s_incorrect" not in table.columns:
            return None
        grid = self.config.pruning
        dropped: dict[int, list[str]] = {}
        for strategy in grid.strategies:
            for fraction in grid.fractions if strategy not in ("full", "random") else ():
                selection = pruning.select(table, strategy, fraction=fraction, seed=grid.seeds[0])
                for i in selection.drop:
                    dropped.setdefault(int(i), []).append(f"{strategy} {round(100 * fraction)} %")
        n = len(table.ids)
        c = table.columns
        return [
            {
                "id": name,
                "s_correct": float(c["s_correct"][i]),
                "s_incorrect": float(c["s_incorrect"][i]),
                "rank_correct": float(n + 1 - c["rank_correct"][i]),
                "rank_incorrect": float(n + 1 - c["rank_incorrect"][i]),
                "label": pool[name].label,
                "prompt": pool[name].prompt,
                "completion": pool[name].completion,
                "loss": float(c["loss"][i]),
                "dropped_by": dropped.get(i, []),
            }
            for i, name in enumerate(table.ids)
        ]

    def _detection(self, table: ScoreTable) -> list[dict[str, Any]] | None:
        harmful = self._known_harmful(table)
        if harmful is None:
            return None
        rng = np.random.default_rng(self.config.seed)
        found = []
        for name, strategy in pruning.STRATEGIES.items():
            if name == "full" or any(column not in table.columns for column in strategy.needs):
                continue
            priority = np.asarray(strategy.drop_first(table, rng), dtype=np.float64)
            low, high = scoring.bootstrap_auc(priority, harmful, rng)
            order = np.argsort(-priority, kind="stable")
            top = {f"{round(100 * f)}%": max(1, round(f * len(order))) for f in self.config.pruning.fractions}
            found.append(
                {
                    "method": name,
                    "auc": scoring.auc(priority, harmful),
                    "low": low,
                    "high": high,
                    "precision_at": {at: float(harmful[order[:k]].mean()) for at, k in top.items()},
                }
            )
        return found

    def _curves(self) -> dict[str, Any]:
        curves = {}
        for record in sorted((self.folder / "adapters").glob("*/training.json")):
            curves[record.parent.name] = json.loads(record.read_text(encoding="utf-8"))["result"]["loss_history"]
        return curves

    def _costs(self, cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
        n = len(self.splits.pool)
        tokens = sum(len(e["input_ids"]) for e in self.splits.tokenized.examples)
        cost = []
        for stage, seconds in self._once("scoring_seconds", dict).items():
            detail = f"{n} examples, {tokens} tokens" if stage == "training gradients" else ""
            cost.append({"stage": stage, "seconds": seconds, "detail": detail})
        if (self.folder / "own_answers.json").exists():
            detail = f"{len(self.splits.validation)} validation questions"
            cost.append({"stage": "own answers", "seconds": self.folder.seconds("own_answers"), "detail": detail})
        cost.append(
            {
                "stage": "fine-tuning",
                "seconds": sum(cell["seconds"] for cell in cells),
                "detail": f"{len(cells)} runs",
            }
        )
        evaluations = sorted((self.folder / "evaluations").glob("*.json"))
        seconds = sum(self.folder.seconds(f"evaluations/{path.stem}") for path in evaluations)
        cost.append({"stage": "evaluation", "seconds": seconds, "detail": f"{len(evaluations)} runs"})
        return cost


def run(config: RunConfig, *, progress: bool = True) -> dict[str, Any]:
    """Runs `config` from data to report; see `Pipeline`. Returns the results that the report shows."""
    return Pipeline(config, progress=progress).run()


def own_answers(
    model: Any,
    tokenizer: Any,
    validation: Sequence[Example],
    config: EvalConfig,
    transcripts: Path | None = None,
    *,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """The model's answers to the validation questions: `id`, `generation` (text), and whether it was `correct`."""
    result = evaluate(model, tokenizer, validation, config=config, transcripts=transcripts, progress=progress)
    return [{"id": item.id, "generation": item.generation, "correct": bool(item.correct)} for item in result.items]


def make_queries(
    validation: Sequence[Example], answers: Sequence[dict[str, Any]] | None, fallback: str | None
) -> Queries:
    """Queries from the model's own `answers`, or from the reference solutions where `answers` is None.

    Raises ConfigError when all own answers are correct, or all incorrect, and `fallback` does not cover it.
    """
    if answers is None:
        return Queries(list(validation), {"correct": list(range(len(validation)))}, [])
    by_id = {example.id: example for example in validation}
    asked: list[Example] = []
    groups: dict[str, list[int]] = {"correct": [], "incorrect": []}
    warnings = []
    silent = 0
    for answer in answers:
        if not answer["generation"].strip():
            silent += 1
            continue
        groups["correct" if answer["correct"] else "incorrect"].append(len(asked))
        asked.append(dataclasses.replace(by_id[answer["id"]], completion=answer["generation"]))
    if silent:
        warnings.append(f"{silent} validation questions got an empty answer, which has no gradient")
    if not groups["correct"] and fallback == "reference":
        warnings.append(
            "the model answered no validation question correctly: the reference solutions stand in for the correct "
            "group, as influence.fallback asks"
        )
        groups["correct"] = list(range(len(asked), len(asked) + len(validation)))
        asked += [dataclasses.replace(example, id=f"{example.id}/reference") for example in validation]
    scoring.check_groups(groups)
    return Queries(asked, groups, warnings)


def score_pool(
    model: Any,
    tokenizer: Any,
    pool: Sequence[dict[str, Any]],
    queries: Queries,
    store_path: Path,
    gradients: GradientConfig,
    influence: InfluenceConfig,
    *,
    progress: bool = True,
) -> tuple[ScoreTable, dict[str, float]]:
    """Gradients of the tokenized `pool` into a store, gradients of the queries, and the scores.

    Returns the table (with `loss` and `tokens` beside the scores) and the seconds of each step. Examples without a
    finite gradient are set aside by the store and have no row in the table.
    """
    seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def timed(name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        seconds[name] = time.perf_counter() - start

    options: dict[str, Any] = {
        "projection": gradients.projection,
        "loss_reduction": gradients.loss_reduction,
        "max_tokens": gradients.max_tokens,
    }
    with timed("training gradients"):
        store = build_store(
            store_path, model, None, pool, dtype=gradients.store_dtype, progress=progress or None, **options
        )
    with timed("query gradients"):
        rows = per_example_gradients(model, tokenize(queries.examples, tokenizer).examples, **options).cpu()
    moments = None
    if influence.optimizer is not None:
        moments = adam_moments(influence.optimizer, gradient_layout(model), projection=gradients.projection)
    with timed("inner products and ranks"):
        table = scoring.influence_scores(
            store,
            rows,
            queries.groups,
            preconditioner=influence.preconditioner,
            damping=influence.damping,
            moments=moments,
        )
    by_id = {example["id"]: example for example in pool}
    stored = [by_id[name] for name in table.ids]
    with timed("losses"):
        losses = per_example_losses(model, stored).double().numpy()
    tokens = np.array([int((example["labels"] != IGNORED).sum()) for example in stored], dtype=np.float64)
    return table.with_columns({"loss": losses, "tokens": tokens}), seconds


def _examples(source: Source) -> list[Example]:
    return load_examples(
        source.path,
        split=source.split,
        format=source.format,
        trace=source.trace,
        limit=source.limit,
        columns=source.columns,
    )


def _rank_agreement(table: ScoreTable) -> dict[str, Any]:
    names = [name for name in ("s_correct", "s_incorrect", "loss", "tokens") if name in table.columns]
    matrix = [[scoring.spearman(table.columns[a], table.columns[b]) for b in names] for a in names]
    return {"methods": names, "spearman": matrix}
