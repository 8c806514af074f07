"""The whole road: data -> fine-tuning -> gradients -> scores -> pruning -> fine-tuning again -> evaluation -> report.

Only this file knows the order. Every finished piece is kept in the run's folder under its own name and is not done
again when the run is repeated after an interruption.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import random
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from influence_fast import doctor, pruning, scoring
from influence_fast.adam import adam_moments
from influence_fast.building import build_store
from influence_fast.checkpoints import (
    checkpoint_scores,
    learning_rates,
    plot_ranking_over_training,
    ranking_over_training,
)
from influence_fast.config import GradientConfig, InfluenceConfig, ModelConfig, RunConfig, Source, to_dict
from influence_fast.data import Example, TokenizedSet, load_examples, load_rows, save_examples, tokenize
from influence_fast.decontamination import contaminated
from influence_fast.difficulty import check_answers, pass_rates
from influence_fast.diversity import near_duplicates
from influence_fast.embeddings import embedding_ranks
from influence_fast.errors import ConfigError, DataError, listing
from influence_fast.evaluation import EvalConfig, evaluate
from influence_fast.generation import CUT, ModelFiles, choose_engine
from influence_fast.gradients import per_example_gradients, per_example_losses
from influence_fast.grouping import row_groups
from influence_fast.lora import gradient_layout
from influence_fast.models import check_tokenizer, load_model, load_tokenizer
from influence_fast.packing import IGNORED
from influence_fast.projection import Projection
from influence_fast.report import save_results, write_report
from influence_fast.scores import ScoreTable
from influence_fast.sketch_fitting import fit_projection, resolved
from influence_fast.statistics import grid_statistics
from influence_fast.strategies import EMBEDDING_RANK, PASS_RATE, needed_columns
from influence_fast.training import TrainResult, finetune, finetuned, list_checkpoints
from influence_fast.workdir import RunFolder, write_text

HARMLESS = (None, "clean")  # labels that do not mark an example as known to be harmful


@dataclass(frozen=True)
class Splits:
    """The three sets of a run, as examples, and the pool tokenized."""

    pool: list[Example]
    validation: list[Example]
    test: list[Example]
    tokenized: TokenizedSet
    for_target: TokenizedSet  # the same pool in the target model's tokens; `tokenized` itself where there is one model


@dataclass(frozen=True)
class Queries:
    """What the training examples are scored against: texts, and their places by group."""

    examples: list[Example]
    groups: dict[str, list[int]]
    warnings: list[str]


class Pipeline:
    """One run of `config`. `run()` goes the whole road; each step can be called again and finds its result."""

    def __init__(self, config: RunConfig, *, progress: bool = True) -> None:
        choose_engine(config.evaluation.engine)  # an engine that is not installed is an error now, not after training
        self.config = config
        self.talks = progress
        self.progress = progress and sys.stderr.isatty()  # bars are for terminals; a log gets a line a piece of work
        self.started = time.perf_counter()
        self.folder = RunFolder(config)
        self.warnings: list[str] = []
        self.set_aside: list[dict[str, str]] = []
        self.needs = needed_columns(config.pruning.strategies)
        self.groups: dict[str, int] = {}
        self.tokenizer = _tokenizer(config.model)
        self.target_tokenizer = self.tokenizer if config.target_model is None else _tokenizer(config.target_model)
        self.base = _model(config.model)
        check_tokenizer(self.base, self.tokenizer)
        self.splits = self._load()

    def _once(self, name: str, work: Callable[[], Any]) -> Any:
        if self.talks and not self.folder.has(name):
            print(f"{time.perf_counter() - self.started:7.1f} s  {name}", file=sys.stderr, flush=True)
        return self.folder.once(name, work)

    def run(self) -> dict[str, Any]:
        """Everything, to `report.html` and `results.json`; returns what the report shows."""
        # scores first: with two models the one that scored makes room for the one that is fine-tuned
        reference = self.reference_adapter()
        table = self.scores(reference)
        before = self._evaluate("base", None)
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
        graded = [("test", test)]
        if self.config.influence.queries != "reference":  # whose questions nobody answers
            graded.insert(0, ("validation", validation))
        for name, part in graded:
            without = [example.id for example in part if example.answer is None]
            if without:
                raise DataError(
                    f"{name}: no final answer to grade against in {listing(without)}: add an 'answer' column, "
                    r"or solutions that end in \boxed{} or ####"
                )
        if data.decontaminate:
            kept = self._decontaminated(kept, test)
        if PASS_RATE in self.needs:
            check_answers(kept)
        tokenized = self._tokenize(kept, self.tokenizer)
        if self.config.target_model is None:
            target = tokenized
        else:
            target = self._tokenize(kept, self.target_tokenizer, " in the target model's tokens")
            # the pool is what both models can read
            both = {e["id"] for e in tokenized.examples} & {e["id"] for e in target.examples}
            for tokens in (tokenized, target):
                tokens.examples[:] = [e for e in tokens.examples if e["id"] in both]
        usable = {example["id"] for example in tokenized.examples}
        return Splits([e for e in kept if e.id in usable], validation, test, tokenized, target)

    def _decontaminated(self, pool: list[Example], test: list[Example]) -> list[Example]:
        """The pool without what shares words with the test set; what is set aside becomes a warning."""
        overlaps = contaminated(pool, {"test": test})
        if len(overlaps) == len(pool):
            raise DataError(
                "data.decontaminate: every pool example shares words with the test set; is it the same data?"
            )
        if overlaps:
            self.warnings.append(
                f"{len(overlaps)} of {len(pool)} pool examples share words with the test set and were set aside: "
                + listing(f"{found.id} ({found.item}: {found.ngram!r})" for found in overlaps)
            )
        self.set_aside += [{"id": found.id, "why": found.why} for found in overlaps]
        aside = {found.id for found in overlaps}
        return [example for example in pool if example.id not in aside]

    def _tokenize(self, examples: list[Example], tokenizer: Any, whose: str = "") -> TokenizedSet:
        """Token ids of the pool; what was left out or cut becomes a warning."""
        data = self.config.data
        tokenized = tokenize(examples, tokenizer, max_length=data.max_length, truncate=data.truncate)
        if tokenized.too_long:
            names = listing(f"{name} ({n} tokens)" for name, n in tokenized.too_long)
            self.warnings.append(
                f"{len(tokenized.too_long)} of {len(examples)} pool examples are longer than max_length "
                f"{data.max_length}{whose} and were left out: {names}"
            )
        if tokenized.truncated:
            self.warnings.append(
                f"{len(tokenized.truncated)} pool examples were cut to {data.max_length} tokens{whose}"
            )
        return tokenized

    @functools.cached_property
    def target(self) -> Any:
        """The model that is fine-tuned and evaluated: the base, or `target_model`, for which the base makes room."""
        if self.config.target_model is None:
            return self.base
        self.base.to("cpu")
        model = _model(self.config.target_model)
        check_tokenizer(model, self.target_tokenizer)
        return model

    # ---- the fine-tuned model that is asked ------------------------------------------------------------------

    def reference_adapter(self) -> str | Path:
        """The adapter whose answers and gradients the scores are made of: given, or trained on the whole pool."""
        return self.config.model.adapter or self._reference().path

    def _reference(self) -> TrainResult:
        seed, everything = self.config.pruning.seeds[0], range(len(self.splits.pool))
        if self.config.target_model is None:
            return self._train("full", seed, everything)  # the grid's own cell
        return self._train("reference", seed, everything, scorer=True)

    def epoch_seconds(self) -> float | None:
        """What one epoch of the fine-tuning behind `reference_adapter` took; None where the adapter was given."""
        if self.config.model.adapter is not None:
            return None
        tokens = sum(len(example["input_ids"]) for example in self.splits.tokenized.examples)
        result = self._reference()
        return result.seconds * tokens / max(1, result.tokens_seen)

    def _train(self, name: str, seed: int, rows: Sequence[int], *, scorer: bool = False) -> TrainResult:
        """Fine-tunes on some of the pool: the target model, or the one that scores."""
        pool = self.splits.tokenized if scorer else self.splits.for_target
        examples = [pool.examples[i] for i in rows]
        return finetune(
            self.base if scorer else self.target,
            self.tokenizer if scorer else self.target_tokenizer,
            examples,
            self.folder / "adapters" / f"{name}-seed{seed}",
            config=dataclasses.replace(self.config.training, seed=seed),
            lora=self.config.lora,
            progress=self.progress,
        )

    def _evaluate(self, name: str, adapter: str | Path | None) -> dict[str, Any]:
        """Accuracy on the test questions, with its interval; transcripts are kept."""

        def work() -> dict[str, Any]:
            files = self.config.target_model or self.config.model
            with _answering(self.target, adapter, files, self.config.evaluation.engine) as model:
                result = evaluate(
                    model,
                    self.target_tokenizer,
                    self.splits.test,
                    config=self.config.evaluation,
                    transcripts=self.folder / "transcripts" / f"{name}.jsonl",
                    progress=self.progress,
                )
            low, high = result.interval
            return {
                "accuracy": result.accuracy,
                "low": low,
                "high": high,
                "n": len(self.splits.test),
                "samples": self.config.evaluation.samples,
                "majority": result.majority,
                "pass_at": [dataclasses.asdict(found) for found in result.pass_at],
                "cut": result.truncated / len(result.items),
            }

        return self._once(f"evaluations/{name}", work)

    # ---- scores --------------------------------------------------------------------------------------------

    def queries(self, adapter: str | Path) -> Queries:
        """The texts whose gradients ask, and which of them form the correct and the incorrect group."""
        validation = self.splits.validation
        if self.config.influence.queries == "reference":
            return self._by_task(make_queries(validation, None, None))

        def work() -> list[dict[str, Any]]:
            with _answering(self.base, adapter, self.config.model, self.config.evaluation.engine) as model:
                transcripts = self.folder / "transcripts" / "validation.jsonl"
                return own_answers(
                    model, self.tokenizer, validation, self.config.evaluation, transcripts, progress=self.progress
                )

        answers = self._once("own_answers", work)
        reads_wrong = any(column.endswith("_incorrect") for column in self.needs)
        needed = ("correct", "incorrect") if reads_wrong else ("correct",)
        return self._by_task(make_queries(validation, answers, self.config.influence.fallback, needed))

    def _by_task(self, queries: Queries) -> Queries:
        column, source = self.config.influence.tasks, self.config.data.validation or self.config.data.pool
        if column is None:
            return queries
        return with_tasks(queries, row_groups(load_rows(source.path, split=source.split), column))

    def scores(self, adapter: str | Path) -> ScoreTable:
        """Scores of the pool, in `scores.parquet` and `scores.csv`."""
        queries = self.queries(adapter)
        self.warnings += queries.warnings
        self.groups = {name: len(members) for name, members in queries.groups.items()}
        path = self.folder / "scores.parquet"

        def work() -> dict[str, float]:
            if self.config.influence.checkpoints:
                table, seconds = self._over_checkpoints(Path(adapter), queries)
            else:
                table, seconds = self._score_under(adapter, queries, "store", self.config.influence)
            table, more = self._baselines(table, queries)
            table.save(self.folder / "scores.csv")
            table.save(path)
            return seconds | more

        self._once("scoring_seconds", work)
        return ScoreTable.load(path)

    def _score_under(
        self, adapter: str | Path, queries: Queries, store: str, influence: InfluenceConfig
    ) -> tuple[ScoreTable, dict[str, float]]:
        with self._finetuned(adapter) as model:
            return score_pool(
                model,
                self.tokenizer,
                self.splits.tokenized.examples,
                queries,
                self.folder / store,
                self.config.gradients,
                influence,
                progress=self.progress,
            )

    def _over_checkpoints(self, reference: Path, queries: Queries) -> tuple[ScoreTable, dict[str, float]]:
        """Scores summed over the reference's checkpoints, and how the ranking moved, as a table and a plot."""
        saved = list_checkpoints(reference)
        if not saved:
            raise ConfigError(f"influence.checkpoints: {reference} has no checkpoint-* folder; save them in training")
        seconds: dict[str, float] = {}

        def score(checkpoint: Path) -> ScoreTable:
            influence = self.config.influence
            if influence.preconditioner in ("adam", "less"):  # each checkpoint has moments of its own
                influence = dataclasses.replace(influence, optimizer=str(checkpoint))
            table, spent = self._score_under(checkpoint, queries, f"store-{checkpoint.name}", influence)
            for stage, value in spent.items():
                seconds[stage] = seconds.get(stage, 0.0) + value
            return table

        found = checkpoint_scores(list(zip(saved, learning_rates(saved, average=True), strict=True)), score)
        plot_ranking_over_training(found, self.folder / "ranking-over-training.svg")
        write_text(
            self.folder / "ranking-over-training.json", json.dumps(ranking_over_training(found), indent=1) + "\n"
        )
        return found.total, seconds

    def _baselines(self, table: ScoreTable, queries: Queries) -> tuple[ScoreTable, dict[str, float]]:
        """The table with the columns that only some baselines read, and the seconds they took."""
        by_id = {example.id: (example, self.splits.tokenized.examples[i]) for i, example in enumerate(self.splits.pool)}
        return baseline_columns(
            table,
            self.needs,
            self.base,
            self.tokenizer,
            [by_id[name] for name in table.ids],
            queries,
            self.config.pruning.pass_rate_config(self.config.evaluation),
            transcripts=self.folder / "transcripts" / "pool.jsonl",
            progress=self.progress,
        )

    def _finetuned(self, adapter: str | Path) -> contextlib.AbstractContextManager[Any]:
        return finetuned(self.base, adapter)

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
        name = _cell_name(strategy, fraction)
        place = {example.id: i for i, example in enumerate(self.splits.pool)}
        # another seed is another training run on the same traces; only what is drawn at random is drawn again
        draw = seed if strategy == "random" else self.config.pruning.seeds[0]
        selection = self._select(table, strategy, fraction, draw)
        rows = [place[table.ids[i]] for i in selection.keep]

        def work() -> dict[str, Any]:
            if strategy != "full":
                written = self._write_pruned(name if strategy != "random" else f"{name}-seed{seed}", rows)
                pruning.save_selection(table, selection, written)
            trained = self._train(name, seed, range(len(self.splits.pool)) if strategy == "full" else rows)
            cell = {"strategy": strategy, "fraction": fraction, "seed": seed, "seconds": trained.seconds}
            kept = len(self.splits.pool) if strategy == "full" else len(rows)
            cell |= {"kept": kept, "dropped": len(selection.drop)}
            cell |= self._harmful(table, selection.drop)
            return cell | self._evaluate(f"{name}-seed{seed}", trained.path)

        return self._once(f"cells/{name}-seed{seed}", work)

    def _select(self, table: ScoreTable, strategy: str, fraction: float, seed: int) -> pruning.Selection:
        clusters = None
        if self.config.pruning.max_similar is not None and strategy != "full":
            clusters = [self._clusters[name] for name in table.ids]
        return pruning.select(table, strategy, fraction=fraction, seed=seed, clusters=clusters)

    @functools.cached_property
    def _clusters(self) -> dict[str, int]:
        """The cluster of near-duplicates that each pool example's completion is in."""
        assert self.config.pruning.max_similar is not None
        clusters = near_duplicates([e.completion for e in self.splits.pool], self.config.pruning.max_similar)
        return {e.id: int(cluster) for e, cluster in zip(self.splits.pool, clusters, strict=True)}

    def _write_pruned(self, name: str, rows: Sequence[int]) -> Path:
        source = load_rows(self.config.data.pool.path, split=self.config.data.pool.split)
        kept = [self.splits.pool[i] for i in rows]
        path = self.folder / "pruned" / f"{name}{source.suffix}"
        save_examples(kept, path, source, self.config.data.pool.columns)
        return path

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
                "set_aside": self.set_aside + self._left_out(table),
            },
            "accuracy_before": {"name": "base model"} | before,
            "cells": cells,
            **grid_statistics(cells, [self.correct_answers(cell) for cell in cells], seed=self.config.seed),
            "detection": self._detection(table),
            "scores": self._trace_scores(table, pool),
            "rank_agreement": _rank_agreement(table),
            "curves": self._curves(),
            "cost": self._costs(cells),
            "queries": self.groups,
            "warnings": self.warnings,
        }

    def _left_out(self, table: ScoreTable) -> list[dict[str, str]]:
        """The examples that were too long for a model, or got no score."""
        whose = [(self.splits.tokenized, "")]
        if self.config.target_model is not None:
            whose.append((self.splits.for_target, " in the target model's tokens"))
        found = [
            {"id": name, "why": f"{n} tokens, longer than max_length{tokens}"}
            for part, tokens in whose
            for name, n in part.too_long
        ]
        scored = set(table.ids)
        return found + [
            {"id": e.id, "why": "no finite gradient, and so no score: in the full data alone"}
            for e in self.splits.pool
            if e.id not in scored
        ]

    def correct_answers(self, cell: dict[str, Any]) -> dict[str, float]:
        """Question id -> share of its answers that were right, from a cell's transcripts."""
        path = (
            self.folder / "transcripts" / f"{_cell_name(cell['strategy'], cell['fraction'])}-seed{cell['seed']}.jsonl"
        )
        answers: dict[str, list[bool]] = {}
        with path.open(encoding="utf-8") as lines:
            for item in map(json.loads, lines):
                answers.setdefault(item["id"], []).append(item["correct"])
        return {question: sum(right) / len(right) for question, right in answers.items()}

    def _trace_scores(self, table: ScoreTable, pool: dict[str, Example]) -> list[dict[str, Any]] | None:
        if "s_incorrect" not in table.columns:
            return None
        grid = self.config.pruning
        dropped: dict[int, list[str]] = {}
        for strategy in grid.strategies:
            for fraction in grid.fractions if strategy not in ("full", "random") else ():
                selection = self._select(table, strategy, fraction, grid.seeds[0])
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
        for record in sorted((self.folder / "adapters").glob("reference-seed*/training.json")):
            seconds = json.loads(record.read_text(encoding="utf-8"))["result"]["seconds"]
            cost.append({"stage": "fine-tuning the model that scores", "seconds": seconds, "detail": ""})
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
    """The model's answers to the validation questions: `id`, `generation` (text), whether it was `correct`, and
    whether it `ended` before it was cut."""
    result = evaluate(model, tokenizer, validation, config=config, transcripts=transcripts, progress=progress)
    return [
        {
            "id": item.id,
            "generation": item.generation,
            "correct": bool(item.correct),
            "ended": item.finish_reason != CUT,
        }
        for item in result.items
    ]


def make_queries(
    validation: Sequence[Example],
    answers: Sequence[dict[str, Any]] | None,
    fallback: str | None,
    needed: Collection[str] = ("correct", "incorrect"),
) -> Queries:
    """Queries from the model's own `answers`, or from the reference solutions where `answers` is None.

    Raises ConfigError when one of the groups `needed` is empty and `fallback` does not cover it; another one that is
    empty is left out, with a warning.
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
        asked.append(
            dataclasses.replace(by_id[answer["id"]], completion=answer["generation"], ended=answer.get("ended", True))
        )
    if silent == len(answers) and fallback is None:
        raise ConfigError(
            f"all {silent} answers of the model to the validation questions are empty: look at its chat template and "
            "training loss, set influence.fallback: reference, or use influence.queries: reference"
        )
    if silent:
        warnings.append(f"{silent} validation questions got an empty answer, which has no gradient")
    if not groups["correct"] and fallback == "reference":
        warnings.append(
            "the model answered no validation question correctly: the reference solutions stand in for the correct "
            "group, as influence.fallback asks"
        )
        groups["correct"] = list(range(len(asked), len(asked) + len(validation)))
        asked += [dataclasses.replace(example, id=f"{example.id}/reference") for example in validation]
    scoring.check_groups({name: groups[name] for name in needed}, silent=silent == len(answers))
    for name in [name for name, members in groups.items() if not members]:
        warnings.append(f"no own answer is {name}, so there are no scores of that group")
        del groups[name]
    return Queries(asked, groups, warnings)


def with_tasks(queries: Queries, tasks: Sequence[str]) -> Queries:
    """`queries` with a group for each task: its members of the correct group (see the strategy `less`).

    `tasks` has the task of each row of the validation data. Raises ConfigError for a task with a group's own name.
    """
    groups = dict(queries.groups)
    taken = sorted(set(tasks) & {"correct", "incorrect"})
    if taken:
        raise ConfigError(f"influence.tasks: a task cannot be called {taken[0]!r}, as one of the groups is; rename it")
    for place in queries.groups["correct"]:
        groups.setdefault(tasks[queries.examples[place].row], []).append(place)
    asked = {tasks[example.row] for example in queries.examples}
    silent = sorted(asked - groups.keys())
    warnings = [f"no correct answer to ask for the tasks {listing(silent)}"] if silent else []
    return Queries(queries.examples, groups, queries.warnings + warnings)


def baseline_columns(
    table: ScoreTable,
    needs: Collection[str],
    model: Any,
    tokenizer: Any,
    pool: Sequence[tuple[Example, dict[str, Any]]],
    queries: Queries,
    config: EvalConfig,
    *,
    transcripts: Path | None = None,
    progress: bool = True,
) -> tuple[ScoreTable, dict[str, float]]:
    """`table` with those columns of `needs` that only some baselines read, and the seconds of each.

    `embedding_rank` by the correct queries and `pass_rate` under `config`, both of the pretrained model. `pool` has the
    example and its tokens for each row of the table.
    """
    columns, seconds = {}, {}
    if EMBEDDING_RANK in needs:
        start = time.perf_counter()
        asked = tokenize([queries.examples[i] for i in queries.groups["correct"]], tokenizer).examples
        columns[EMBEDDING_RANK] = embedding_ranks(model, [tokens for _, tokens in pool], asked)
        seconds["embeddings"] = time.perf_counter() - start
    if PASS_RATE in needs:
        start = time.perf_counter()
        examples = [example for example, _ in pool]
        columns[PASS_RATE] = pass_rates(
            model, tokenizer, examples, config=config, transcripts=transcripts, progress=progress
        )
        seconds["pass rates"] = time.perf_counter() - start
    return table.with_columns(columns), seconds


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
        "loss_reduction": gradients.loss_reduction,
        "precision": gradients.precision,
        "max_tokens": gradients.max_tokens,
    }

    def fit(projection: Projection) -> Projection:
        with timed("fitting the sketch"):
            sizes: dict[str, Any] = {"examples": gradients.sketch_examples, "damping": influence.damping}
            return fit_projection(model, pool, projection=projection, folder=store_path, **sizes, **options)

    projection = resolved(gradients.projection, gradients.sketch, influence.preconditioner, model, fit)
    options["projection"] = projection
    with timed("training gradients"):
        store = build_store(store_path, model, None, pool, dtype=gradients.store_dtype, progress=progress, **options)
    with timed("query gradients"):
        rows = per_example_gradients(model, tokenize(queries.examples, tokenizer).examples, **options).cpu()
    moments = None
    if influence.optimizer is not None:
        moments = adam_moments(influence.optimizer, gradient_layout(model), projection=projection)
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
    tokens = np.array([int((example["labels"] != IGNORED).sum()) for example in stored], dtype=np.float64)
    losses = None if store.losses is None else store.losses.astype(np.float64)
    if losses is None:  # a store of another source, or made before stores had them
        with timed("losses"):
            losses = per_example_losses(model, stored).double().numpy()
    elif gradients.loss_reduction == "sum":
        losses /= [int((example["labels"][1:] != IGNORED).sum()) for example in stored]
    return table.with_columns({"loss": losses, "tokens": tokens}), seconds


def _cell_name(strategy: str, fraction: float) -> str:
    return "full" if strategy == "full" else f"{strategy}-{round(100 * fraction)}"


def _tokenizer(model: ModelConfig) -> Any:
    return load_tokenizer(model.path, trust_remote_code=model.trust_remote_code)


def _model(model: ModelConfig) -> Any:
    return load_model(model.path, dtype=model.dtype, device=model.device, trust_remote_code=model.trust_remote_code)


def _answering(
    base: Any, adapter: str | Path | None, files: ModelConfig, engine: str
) -> contextlib.AbstractContextManager[Any]:
    """What answers questions: the model in memory with its adapter, or for vLLM the files of both."""
    if engine == "vllm":
        folder = None if adapter is None else str(adapter)
        return contextlib.nullcontext(ModelFiles(files.path, folder, files.dtype, files.trust_remote_code))
    return contextlib.nullcontext(base) if adapter is None else finetuned(base, adapter)


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
