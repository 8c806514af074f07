"""What a run has to show: everything in `results.json` and the report, collected from the finished pieces."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from influence_fast import doctor
from influence_fast.data.examples import Example
from influence_fast.errors import DataError
from influence_fast.influence.queries import Queries
from influence_fast.influence.scores import ScoreTable
from influence_fast.report.explain import EXPLAINED
from influence_fast.report.grid_statistics import grid_statistics
from influence_fast.run.splits import Splits
from influence_fast.run.workdir import RunFolder
from influence_fast.selection import pruning
from influence_fast.settings import to_dict
from influence_fast.statistics import ranks

if TYPE_CHECKING:
    from influence_fast.run.pipeline import Pipeline

HARMLESS = (None, "clean")  # labels that do not mark an example as known to be harmful


@dataclass(frozen=True, slots=True)
class DataCounts:
    """Sizes of a run's data: examples by kind of label (None: no labels), and examples that were left out, and why."""

    pool: int
    validation: int
    test: int
    labels: dict[str, int] | None
    set_aside: list[dict[str, str]]


@dataclass(frozen=True, slots=True)
class TraceScores:
    """Scores of one trace, its texts, and the selections that drop it."""

    id: str
    s_correct: float
    s_incorrect: float
    rank_correct: float
    rank_incorrect: float
    label: str | None
    prompt: str
    completion: str
    loss: float
    dropped_by: list[str]


@dataclass(frozen=True, slots=True)
class Detection:
    """Measures of how a strategy finds the known harmful traces: AUC, its 95 % interval, precision at the top."""

    method: str
    auc: float
    low: float
    high: float
    precision_at: dict[str, float]


@dataclass(frozen=True, slots=True)
class Cost:
    """Seconds of one stage (None: not known), and what they were for."""

    stage: str
    seconds: float | None
    detail: str


@dataclass(frozen=True, slots=True)
class RunResults:
    """Everything that a run has to show; `to_dict` gives what `results.json` and the report hold (see `report.page`).

    `accuracy_before` and `cells` are as the run's finished pieces have them.
    """

    title: str | None
    created: str
    config: dict[str, Any]
    versions: dict[str, str]
    environment: dict[str, Any]
    data: DataCounts
    accuracy_before: dict[str, Any]
    cells: list[dict[str, Any]]
    settings: list[dict[str, Any]]
    comparisons: list[dict[str, Any]]
    detection: list[Detection] | None
    scores: list[TraceScores] | None
    rank_agreement: dict[str, Any]
    curves: dict[str, Any]
    cost: list[Cost]
    queries: dict[str, int]
    references: list[str]
    explained: str | None
    warnings: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Return the results as plain values, in the order of the fields."""
        return dataclasses.asdict(self)


def collect(
    run: Pipeline, table: ScoreTable, before: dict[str, Any], cells: list[dict[str, Any]], queries: Queries
) -> RunResults:
    """Collect the results of a finished `run`; `before` is the base model's accuracy."""
    config, splits, folder = run.config, run.splits, run.folder
    labels: dict[str, int] = {}
    for example in splits.pool:
        if example.label is not None:
            labels[example.label] = labels.get(example.label, 0) + 1
    answers = [correct_answers(folder, cell) for cell in cells]
    return RunResults(
        title=config.title,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        config=to_dict(config),
        versions=doctor.versions(),
        environment=doctor.environment(),
        data=DataCounts(
            len(splits.pool),
            len(splits.validation),
            len(splits.test),
            labels or None,
            splits.set_aside + _left_out(splits, table),
        ),
        accuracy_before={"name": "base model"} | before,
        cells=cells,
        **grid_statistics(cells, answers, seed=config.seed),
        detection=_detection(splits.pool, table, config.pruning.fractions, config.seed),
        scores=_trace_scores(run, table),
        rank_agreement=_rank_agreement(table),
        curves=_curves(folder),
        cost=_costs(folder, splits, cells),
        queries={name: len(members) for name, members in queries.groups.items()},
        references=queries.of_references,
        explained=f"{EXPLAINED}.html" if (folder / f"{EXPLAINED}.html").exists() else None,
        warnings=run.warnings,
    )


def cell_name(strategy: str, fraction: float) -> str:
    """Return the name of a cell's files."""
    return "full" if strategy == "full" else f"{strategy}-{round(100 * fraction)}"


def correct_answers(folder: RunFolder, cell: dict[str, Any]) -> dict[str, float]:
    """Return question id -> share of its answers that were right, from a cell's transcripts.

    Raises DataError where these are not all of the cell's answers.
    """
    name = f"{cell_name(cell['strategy'], cell['fraction'])}-seed{cell['seed']}"
    path = folder / "transcripts" / f"{name}.jsonl"
    answers: dict[str, list[bool]] = {}
    try:
        with path.open(encoding="utf-8") as lines:
            for item in map(json.loads, lines):
                answers.setdefault(item["id"], []).append(item["correct"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        answers = {}
    if len(answers) != cell["n"] or any(len(right) != cell.get("samples", 1) for right in answers.values()):
        raise DataError(
            f"{path} is damaged or missing: delete evaluations/{name}.json and cells/{name}.json in {folder.path} to "
            "have the questions asked again"
        )
    return {question: sum(right) / len(right) for question, right in answers.items()}


def known_harmful(pool: Sequence[Example], ids: Sequence[str]) -> np.ndarray | None:
    """Return which of the examples called `ids` have a label that marks them as harmful, [N] bool.

    None if none has, or all have: there is nothing to be told apart.
    """
    labels = {example.id: example.label for example in pool}
    harmful = np.array([labels[i] not in HARMLESS for i in ids])
    return harmful if harmful.any() and not harmful.all() else None


def _left_out(splits: Splits, table: ScoreTable) -> list[dict[str, str]]:
    """List the examples that were too long for a model, or got no score."""
    whose = [(splits.tokenized, "")]
    if splits.for_target is not splits.tokenized:
        whose.append((splits.for_target, " in the target model's tokens"))
    found = [
        {"id": name, "why": f"{n} tokens, longer than max_length{tokens}"}
        for part, tokens in whose
        for name, n in part.too_long
    ]
    scored = set(table.ids)
    why = "no finite gradient, and so no score: in the full data alone"
    return found + [{"id": e.id, "why": why} for e in splits.pool if e.id not in scored]


def _trace_scores(run: Pipeline, table: ScoreTable) -> list[TraceScores] | None:
    if "s_incorrect" not in table.columns or "s_correct" not in table.columns:
        return None
    pool = {example.id: example for example in run.splits.pool}
    grid = run.config.pruning
    dropped: dict[int, list[str]] = {}
    for strategy in grid.strategies:
        for fraction in grid.fractions if strategy not in ("full", "random") else ():
            selection = run.select(table, strategy, fraction, grid.seeds[0])
            for i in selection.drop:
                dropped.setdefault(int(i), []).append(f"{strategy} {round(100 * fraction)} %")
    c = table.columns
    return [
        TraceScores(
            id=name,
            s_correct=float(c["s_correct"][i]),
            s_incorrect=float(c["s_incorrect"][i]),
            rank_correct=float(c["rank_correct"][i]),
            rank_incorrect=float(c["rank_incorrect"][i]),
            label=pool[name].label,
            prompt=pool[name].prompt,
            completion=pool[name].completion,
            loss=float(c["loss"][i]),
            dropped_by=dropped.get(i, []),
        )
        for i, name in enumerate(table.ids)
    ]


def _detection(
    pool: Sequence[Example], table: ScoreTable, fractions: Sequence[float], seed: int
) -> list[Detection] | None:
    harmful = known_harmful(pool, table.ids)
    if harmful is None:
        return None
    rng = np.random.default_rng(seed)
    found = []
    for name, strategy in pruning.STRATEGIES.items():
        if name == "full" or any(column not in table.columns for column in strategy.needs):
            continue
        priority = np.asarray(strategy.drop_first(table, rng), dtype=np.float64)
        low, high = ranks.bootstrap_auc(priority, harmful, rng)
        order = np.argsort(-priority, kind="stable")
        top = {f"{round(100 * f)}%": max(1, round(f * len(order))) for f in fractions}
        precision = {at: float(harmful[order[:k]].mean()) for at, k in top.items()}
        found.append(Detection(name, ranks.auc(priority, harmful), low, high, precision))
    return found


def _curves(folder: RunFolder) -> dict[str, Any]:
    found = {path.parent.name: _training(path) for path in sorted((folder / "adapters").glob("*/training.json"))}
    return {name: result["loss_history"] for name, result in found.items() if result is not None}


def _training(record: Path) -> dict[str, Any] | None:
    """Read the result that a fine-tuning recorded; return None if the record is damaged."""
    try:
        result = json.loads(record.read_text(encoding="utf-8"))["result"]
        return {"loss_history": result["loss_history"], "seconds": float(result["seconds"])}
    except (ValueError, KeyError, TypeError):
        return None


def _costs(folder: RunFolder, splits: Splits, cells: list[dict[str, Any]]) -> list[Cost]:
    n = len(splits.pool)
    tokens = sum(len(e["input_ids"]) for e in splits.tokenized.examples)
    cost: list[Cost] = []
    baselines = [folder.value(f"baselines/{path.stem}", {}) for path in sorted((folder / "baselines").glob("*.json"))]
    parts = [folder.value("scoring_seconds", {}), *baselines]
    for stage, seconds in [item for part in parts for item in part.items()]:
        detail = f"{n} examples, {tokens} tokens" if stage == "training gradients" else ""
        cost.append(Cost(stage, seconds, detail))
    if folder.has("own_answers"):
        detail = f"{len(splits.validation)} validation questions"
        cost.append(Cost("own answers", folder.seconds("own_answers"), detail))
    for record in sorted((folder / "adapters").glob("reference-seed*/training.json")):
        seconds = (_training(record) or {}).get("seconds")
        cost.append(Cost("fine-tuning the model that scores", seconds, ""))
    cost.append(Cost("fine-tuning", sum(cell["seconds"] for cell in cells), f"{len(cells)} runs"))
    evaluations = sorted((folder / "evaluations").glob("*.json"))
    seconds = sum(folder.seconds(f"evaluations/{path.stem}") for path in evaluations)
    cost.append(Cost("evaluation", seconds, f"{len(evaluations)} runs"))
    return cost


def _rank_agreement(table: ScoreTable) -> dict[str, Any]:
    names = [name for name in ("s_correct", "s_incorrect", "loss", "tokens") if name in table.columns]
    matrix = [[ranks.spearman(table.columns[a], table.columns[b]) for b in names] for a in names]
    return {"methods": names, "spearman": matrix}
