"""The whole road: data -> fine-tuning -> gradients -> scores -> pruning -> fine-tuning again -> evaluation -> report.

Only this file knows the order. Every finished piece is kept in the run's folder under its own name and is not done
again when the run is repeated after an interruption.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from influence_fast.atomic import write_text
from influence_fast.config import RunConfig
from influence_fast.data.diversity import near_duplicates
from influence_fast.data.examples import load_rows, save_examples
from influence_fast.errors import ConfigError, DataError
from influence_fast.evaluation.evaluate import EvalConfig, evaluate
from influence_fast.evaluation.generation import choose_engine
from influence_fast.influence.checkpoints import (
    checkpoint_scores,
    learning_rates,
    ranking_over_training,
)
from influence_fast.influence.queries import Queries, own_answers
from influence_fast.influence.recipe import Recipe
from influence_fast.influence.scores import ScoreTable
from influence_fast.influence.settings import InfluenceConfig
from influence_fast.report.explain import EXPLAINED
from influence_fast.report.page import save_results, write_report
from influence_fast.report.ranking_plot import plot_ranking_over_training
from influence_fast.run.inputs import adapter_hashes, hash_files, model_inputs, split_inputs, tokenizer_inputs
from influence_fast.run.results import RunResults, cell_name, collect, known_harmful
from influence_fast.run.run_models import answering_model, evaluation_record, model_of, tokenizer_of, tokens_of
from influence_fast.run.scorable import check_scorable
from influence_fast.run.score_files import EXPLAINED_COUNT, SCORES, damaged_table, explained_count, made_with
from influence_fast.run.scoring import explained_scores
from influence_fast.run.splits import load_splits
from influence_fast.run.validation_queries import validation_queries
from influence_fast.run.workdir import RunFolder
from influence_fast.selection import pruning
from influence_fast.selection.pool_scores import PoolScores, ScoredPool, baseline_columns
from influence_fast.selection.strategies import BASELINE_COLUMNS, needed_columns
from influence_fast.training.files import list_checkpoints
from influence_fast.training.fine_tuning import RECORD, TrainResult, finetune, finetuned
from influence_fast.training.models import adapter_warnings, check_tokenizer


class Pipeline:
    """One run of `config`. `run()` goes the whole road; each step can be called again and finds its result."""

    def __init__(self, config: RunConfig, *, progress: bool = True) -> None:
        choose_engine(config.evaluation.engine)  # an engine that is not installed is an error now, not after training
        self.config = config
        self.verbose = progress
        self.progress = progress and sys.stderr.isatty()  # bars are for terminals; a log gets a line a piece of work
        self.started = time.perf_counter()
        self.folder = RunFolder(config)
        inputs = model_inputs(config)
        self.folder.check(inputs)  # before any of them is loaded, which a changed one may not let happen
        self.needs = needed_columns(config.pruning.strategies)
        self.tokenizer = tokenizer_of(config.model)
        self.target_tokenizer = self.tokenizer if config.target_model is None else tokenizer_of(config.target_model)
        inputs |= tokenizer_inputs(config, self.tokenizer, self.target_tokenizer)
        self.folder.check(inputs)
        self.base = model_of(config.model)
        check_tokenizer(self.base, self.tokenizer, adapter=tokens_of(config.model))
        self.splits = load_splits(config, self.tokenizer, self.target_tokenizer)
        self.folder.take(inputs | split_inputs(config, self.splits))
        self.warnings = [*self.folder.warnings, *self.splits.warnings]
        self.inputs = inputs

    def _once(self, name: str, work: Callable[[], Any], of: Any = None, *, unsaid: bool = True) -> Any:
        """Run a piece once, as `RunFolder.once` does, and again if it was made of other JSON than `of`.

        `unsaid` False: also if the finished piece does not say what it was made of.
        """
        digest = None
        if of is not None:
            digest = hashlib.sha256(json.dumps(of, sort_keys=True).encode()).hexdigest()
            self.folder.forget_other(name, digest, unsaid=unsaid)
        if self.verbose and not self.folder.has(name):
            print(f"{time.perf_counter() - self.started:7.1f} s  {name}", file=sys.stderr, flush=True)
        return self.folder.once(name, work, digest)

    def run(self) -> RunResults:
        """Run everything, to `report.html` and `results.json`; return what the report shows."""
        if not self._has_reference():
            check_scorable(self.base, self.config)
        # scores first: with two models the one that scored makes room for the one that is fine-tuned
        reference = self.reference_adapter()
        self.warnings += self._once(
            "adapter",
            lambda: adapter_warnings(str(reference), self.base, self.config.model.path),
            adapter_hashes(str(reference), self.config.model),
        )
        queries = self.queries(reference)
        self.warnings += queries.warnings
        table = self.scores(reference, queries)
        before = self._evaluate("base", None)
        cells = self.cells(table)
        results = collect(self, table, before, cells, queries)
        plain = results.to_dict()
        save_results(plain, self.folder / "results.json")
        write_report(plain, self.folder / "report.html")
        return results

    # ---- data ----------------------------------------------------------------------------------------------

    @functools.cached_property
    def target(self) -> Any:
        """Return the model that is fine-tuned and evaluated: the base, or `target_model`, for which the base makes
        room.
        """
        if self.config.target_model is None:
            return self.base
        self.base.to("cpu")
        model = model_of(self.config.target_model)
        check_tokenizer(model, self.target_tokenizer)
        return model

    # ---- the fine-tuned model that is asked ------------------------------------------------------------------

    def reference_adapter(self) -> str | Path:
        """Return the adapter whose answers and gradients make the scores: given, or trained on the whole pool."""
        return self.config.model.adapter or self._reference().path

    def _reference(self) -> TrainResult:
        seed, everything = self.config.pruning.seeds[0], range(len(self.splits.pool))
        return self._train(self._reference_name, seed, everything, scorer=self.config.target_model is not None)

    @property
    def _reference_name(self) -> str:
        return "full" if self.config.target_model is None else "reference"  # "full" is the grid's own cell

    def _has_reference(self) -> bool:
        """Return whether the adapter to score is trained, or what it was given for is done."""
        if self.config.model.adapter is not None:
            return (self.folder / SCORES).exists()
        return (self._adapter_folder(self._reference_name, self.config.pruning.seeds[0]) / RECORD).exists()

    def _adapter_folder(self, name: str, seed: int) -> Path:
        return self.folder / "adapters" / f"{name}-seed{seed}"

    def epoch_seconds(self) -> float | None:
        """Return the seconds of one epoch of the reference adapter's fine-tuning; None if the adapter was given."""
        if self.config.model.adapter is not None:
            return None
        tokens = sum(len(example["input_ids"]) for example in self.splits.tokenized.examples)
        result = self._reference()
        return result.seconds * tokens / max(1, result.tokens_seen)

    def _train(self, name: str, seed: int, rows: Sequence[int], *, scorer: bool = False) -> TrainResult:
        """Fine-tune on some of the pool: the target model, or (`scorer`) the one that scores."""
        pool = self.splits.tokenized if scorer else self.splits.for_target
        examples = [pool.examples[i] for i in rows]
        return finetune(
            self.base if scorer else self.target,
            self.tokenizer if scorer else self.target_tokenizer,
            examples,
            self._adapter_folder(name, seed),
            config=dataclasses.replace(self.config.training, seed=seed),
            lora=self.config.lora,
            progress=self.progress,
        )

    def _evaluate(self, name: str, adapter: str | Path | None) -> dict[str, Any]:
        """Evaluate on the test questions: accuracy with its interval; transcripts are kept."""

        def work() -> dict[str, Any]:
            files = self.config.target_model or self.config.model
            with answering_model(self.target, adapter, files, self.config.evaluation.engine) as model:
                result = evaluate(
                    model,
                    self.target_tokenizer,
                    self.splits.test,
                    config=self.config.evaluation,
                    transcripts=self.folder / "transcripts" / f"{name}.jsonl",
                    progress=self.progress,
                )
            return evaluation_record(result, len(self.splits.test), self.config.evaluation.samples)

        # A process may have ended after the evaluation and before its cell, and the selection have become another. The
        # weights alone tell: peft writes the lists of an adapter's settings in any order.
        judged = None if adapter is None else hash_files(Path(adapter).glob("*.safetensors"))
        return self._once(f"evaluations/{name}", work, judged, unsaid=False)

    # ---- scores --------------------------------------------------------------------------------------------

    def queries(self, adapter: str | Path) -> Queries:
        """Return the texts whose gradients are the queries, and which of them are correct and which incorrect."""

        def answers(how: EvalConfig) -> list[dict[str, Any]]:
            def work() -> list[dict[str, Any]]:
                with answering_model(self.base, adapter, self.config.model, self.config.evaluation.engine) as model:
                    transcripts = self.folder / "transcripts" / "validation.jsonl"
                    validation = self.splits.validation
                    return own_answers(model, self.tokenizer, validation, how, transcripts, progress=self.progress)

            found: list[dict[str, Any]] = self._once("own_answers", work)
            return found

        return validation_queries(self.config, self.splits.validation, answers, self.needs)

    def scores(self, adapter: str | Path, queries: Queries) -> ScoreTable:
        """Score the pool by `queries`; the table goes to `scores.parquet` and `scores.csv`."""

        def work() -> dict[str, float]:
            for column in BASELINE_COLUMNS:
                self.folder.forget(f"baselines/{column}")  # of a table that is replaced
            self.folder.forget(EXPLAINED_COUNT)
            if self.config.influence.checkpoints:
                table, seconds = self._over_checkpoints(Path(adapter), queries)
            else:
                scored = self._score_under(adapter, queries, "store", self.config.influence)
                table, seconds = scored.table, scored.seconds
            self._save(pruning.with_fingerprints(table, self.splits.pool))
            return seconds

        if self.folder.has("scoring_seconds") and (damage := damaged_table(self.folder, self.splits.pool)):
            if any(self.folder.path.glob("cells/*-*-seed*.json")):
                raise DataError(
                    f"{damage}: delete it, scoring_seconds.json and baselines in {self.folder.path} to have the pool "
                    "scored again, or restore it"
                )
            self.folder.forget("scoring_seconds")  # nothing was selected by it yet
        self._once("scoring_seconds", work)
        self._explain(adapter, queries)
        for column in sorted(self.needs.intersection(BASELINE_COLUMNS)):
            self._once(f"baselines/{column}", functools.partial(self._add_baseline, column, queries))
        table = ScoreTable.load(self.folder / SCORES)
        table.save(self.folder / "scores.csv")  # for people, who may have changed it
        return table

    def _explain(self, adapter: str | Path, queries: Queries) -> None:
        """Score again from the kept gradients where the lists of single answers are not those of `influence.explain`.

        Where they are missing or of another count, the pool is scored again from the gradients that are kept.
        """
        influence = self.config.influence
        wanted = 0 if influence.checkpoints else influence.explain
        files = [self.folder / f"{EXPLAINED}{suffix}" for suffix in (".jsonl", ".html")]
        if wanted == 0:
            for file in files:
                file.unlink(missing_ok=True)
        elif not all(file.exists() for file in files) or explained_count(self.folder) != wanted:
            self.folder.forget(EXPLAINED_COUNT)
            self._score_under(adapter, queries, "store", influence)
        self.folder.forget_other(EXPLAINED_COUNT, str(wanted), unsaid=False)
        self.folder.once(EXPLAINED_COUNT, lambda: wanted, str(wanted))

    def _save(self, table: ScoreTable) -> None:
        table.save(self.folder / "scores.csv")
        table.save(self.folder / SCORES)

    def _score_under(self, adapter: str | Path, queries: Queries, store: str, influence: InfluenceConfig) -> PoolScores:
        with finetuned(self.base, adapter) as model:
            scored, _ = explained_scores(
                self._scored_pool(model, queries),
                self.folder.store(store, made_with(self.config.gradients, influence, self.inputs)),
                self.config.gradients,
                influence,
                self.folder / EXPLAINED,
                top=0 if influence.checkpoints else influence.explain,
                title=self.config.title,
                progress=self.progress,
            )
        return scored

    def _scored_pool(self, model: Any, queries: Queries) -> ScoredPool:
        return ScoredPool(model, self.tokenizer, self.splits.pool, self.splits.tokenized.examples, queries)

    def _over_checkpoints(self, reference: Path, queries: Queries) -> tuple[ScoreTable, dict[str, float]]:
        """Sum scores over the reference's checkpoints; write how the ranking moved, as a table and a plot."""
        saved = list_checkpoints(reference)
        if not saved:
            raise ConfigError(f": {reference} has no checkpoint-* folder; save them", key="influence.checkpoints")
        seconds: dict[str, float] = {}

        def score(checkpoint: Path) -> ScoreTable:
            influence = self.config.influence
            if Recipe.of(self.config.gradients, influence).reads_moments:  # each checkpoint has moments of its own
                influence = dataclasses.replace(influence, optimizer=str(checkpoint))
            scored = self._score_under(checkpoint, queries, f"store-{checkpoint.name}", influence)
            for stage, value in scored.seconds.items():
                seconds[stage] = seconds.get(stage, 0.0) + value
            return scored.table

        found = checkpoint_scores(list(zip(saved, learning_rates(saved, average=True), strict=True)), score)
        plot_ranking_over_training(found, self.folder / "ranking-over-training.svg")
        write_text(
            self.folder / "ranking-over-training.json", json.dumps(ranking_over_training(found), indent=1) + "\n"
        )
        return found.total, seconds

    def _add_baseline(self, column: str, queries: Queries) -> dict[str, float]:
        """Add a column that only some baselines read to the score table; return the seconds it took."""
        table = ScoreTable.load(self.folder / SCORES)
        table, seconds = baseline_columns(
            table,
            [column],
            self._scored_pool(self.base, queries),
            self.config.pruning.pass_rate_config(self.config.evaluation),
            transcripts=self.folder / "transcripts" / "pool.jsonl",
            progress=self.progress,
        )
        self._save(table)
        return seconds

    # ---- the grid ------------------------------------------------------------------------------------------

    def cells(self, table: ScoreTable) -> list[dict[str, Any]]:
        """Fine-tune and evaluate once for each strategy, fraction and seed; what is done already is read."""
        grid = self.config.pruning
        cells = []
        strategies = [s for s in grid.strategies if s != "full"]
        for seed in grid.seeds:
            cells.append(self._cell(table, "full", 0.0, seed))
            for strategy in strategies:
                cells += [self._cell(table, strategy, fraction, seed) for fraction in grid.fractions]
        return cells

    def _cell(self, table: ScoreTable, strategy: str, fraction: float, seed: int) -> dict[str, Any]:
        name = cell_name(strategy, fraction)
        place = {example.id: i for i, example in enumerate(self.splits.pool)}
        # another seed is another training run on the same traces; only what is drawn at random is drawn again
        draw = seed if strategy == "random" else self.config.pruning.seeds[0]
        selection = self.select(table, strategy, fraction, draw)
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

        kept_ids = None if strategy == "full" else [table.ids[i] for i in selection.keep]
        return self._once(f"cells/{name}-seed{seed}", work, kept_ids)

    def select(self, table: ScoreTable, strategy: str, fraction: float, seed: int) -> pruning.Selection:
        """Return what a strategy keeps of the scored pool and what it drops, near-duplicates included."""
        clusters = None
        if self.config.pruning.max_similar is not None and strategy != "full":
            clusters = [self._clusters[name] for name in table.ids]
        return pruning.select(table, strategy, fraction=fraction, seed=seed, clusters=clusters)

    @functools.cached_property
    def _clusters(self) -> dict[str, int]:
        """Find the cluster of near-duplicates that each pool example's completion is in."""
        assert self.config.pruning.max_similar is not None
        completions = [e.completion for e in self.splits.pool]
        clusters = near_duplicates(completions, self.config.pruning.max_similar, progress=self.verbose)
        return {e.id: int(cluster) for e, cluster in zip(self.splits.pool, clusters, strict=True)}

    def _write_pruned(self, name: str, rows: Sequence[int]) -> Path:
        source = load_rows(self.config.data.pool.path, split=self.config.data.pool.split)
        kept = [self.splits.pool[i] for i in rows]
        path = self.folder / "pruned" / f"{name}{source.suffix}"
        save_examples(kept, path, source, self.config.data.pool.columns)
        return path

    def _harmful(self, table: ScoreTable, dropped: np.ndarray) -> dict[str, Any]:
        """Count the known harmful examples that were dropped, and those that chance would drop."""
        harmful = known_harmful(self.splits.pool, table.ids)
        if harmful is None:
            return {}
        total = int(harmful.sum())
        return {
            "harmful_dropped": int(harmful[dropped].sum()),
            "harmful_total": total,
            "expected_by_chance": total * len(dropped) / len(table.ids),
        }


def run(config: RunConfig, *, progress: bool = True) -> dict[str, Any]:
    """Run `config` from data to report (see `Pipeline`); return the results that the report shows."""
    pipeline = Pipeline(config, progress=progress)
    with pipeline.folder.alone():
        return pipeline.run().to_dict()
