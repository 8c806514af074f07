"""Validate scores: how well do they predict the outcome of retraining?

For every method, with 95 % bootstrap intervals over subsets and seeds (or examples, or queries):

    LDS             rank correlation of summed influence and outcome over random halves of the pool (`lds`)
    leave-k-out     the same over the pool without k random examples
    removal         query loss and accuracy without the most helpful, the most harmful, or as many random examples
    detection       AUC and precision at k of finding the examples whose label marks them as corrupted

Everything lies in the run's folder under `validate/` and `retrained/`, piece by piece, and is found again when the
same command is repeated.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from influence_fast import doctor
from influence_fast.atomic import replacing
from influence_fast.config import RunConfig
from influence_fast.data.examples import tokenize
from influence_fast.errors import ConfigError, DataError, one_line, setting, truncated_list
from influence_fast.guards import check_no_pipe
from influence_fast.influence.checkpoints import learning_rates
from influence_fast.influence.methods import Method, Scored, method_of, score_by
from influence_fast.influence.queries import Queries
from influence_fast.run.inputs import checkpoint_hashes, model_hashes
from influence_fast.run.pipeline import Pipeline
from influence_fast.run.results import known_harmful
from influence_fast.settings import to_dict
from influence_fast.statistics.ranks import auc, average_ranks, bootstrap_auc, spearman
from influence_fast.training.files import list_checkpoints
from influence_fast.training.fine_tuning import finetune
from influence_fast.training.models import load_model, load_tokenizer
from influence_fast.validation.plan import Plan
from influence_fast.validation.retraining import UNREADABLE, retrain

FOLDER = "validate"
RESULTS = "validation.json"
EXACT_OF = {"exact-dot": "none", "exact-cosine": "cosine", "exact-ekfac-cosine": "ekfac_cosine"}


def validate(config: RunConfig, *, progress: bool = True) -> dict[str, Any]:
    """Validate the methods of `config.validate` by retraining; write and return the content of `validation.json`.

    Args:
        config: the run; its `validate` section names the methods and the number of retrainings. Everything is written
            to its `output` folder, and finished pieces are used again.
        progress: show bars and messages on stderr.
    Returns:
        A JSON-compatible dictionary with `lds`, `leave_out`, `removal`, `detection`, `cost` and what they were measured
        on.
    Raises:
        ConfigError: methods that the run's settings cannot serve, or another process at work in the run's folder.
        DataError: external scores of other shapes.
    Example:
        >>> results = inf.validate(load_config("run.yaml"))  # doctest: +SKIP
        >>> results["lds"]["rows"][0]["value"]  # doctest: +SKIP
        0.31
    """
    methods = [method_of(given) for given in config.validate.methods]
    _check(config, methods)
    pipeline = Pipeline(config, progress=progress)
    with pipeline.folder.alone():
        return _proved(pipeline, methods, progress)


def _proved(pipeline: Pipeline, methods: list[Method], progress: bool) -> dict[str, Any]:
    """Compute all of `validate` in a folder that no other process works in."""
    config, settings = pipeline.config, pipeline.config.validate
    reference = Path(pipeline.reference_adapter())
    queries = pipeline.queries(reference)
    scored = {m.name: _scored(pipeline, m, reference, queries, progress) for m in methods}
    shape = (len(pipeline.splits.pool), len(queries.examples))
    scores = {name: found.matrix for name, found in scored.items()} | _external(settings.external, shape)

    plan = Plan(config, shape[0], scores, queries)
    outcomes = retrain(
        config, queries.examples, plan.work, processes=settings.processes, verbose=progress, pipeline=pipeline
    )
    results: dict[str, Any] = {
        "config": to_dict(config),
        "versions": doctor.versions(),
        "environment": doctor.environment(),
        "pool": shape[0],
        "queries": {name: len(members) for name, members in queries.groups.items()},
        "references": queries.of_references,
        "default": settings.default,
        "lds": plan.lds(outcomes, "half"),
        "leave_out": plan.lds(outcomes, "out"),
        "removal": plan.removal(outcomes),
        "detection": _detection(pipeline, scores, queries, settings.draws),
        "cost": _cost(pipeline, scored, scores, methods, queries),
        "retraining_seconds": float(sum(outcome.seconds for outcome in outcomes.values())),
    }
    with replacing(pipeline.folder / RESULTS) as partial:
        partial.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return results


def _check(config: RunConfig, methods: Sequence[Method]) -> None:
    """Raise ConfigError before any work is done for settings that would fail after it."""
    names = [*[method.name for method in methods], *config.validate.external]
    if len(set(names)) < len(names):
        raise ConfigError(f"validate.methods: a name comes twice in {', '.join(names)}")
    for name in (config.validate.default, *config.validate.removal_methods):
        if name not in names:
            raise ConfigError(f"validate: {name!r} is not among the methods ({', '.join(names)})")
    needy = [method.name for method in methods if method.moments or method.checkpoints]
    if needy and not config.training.save_checkpoints and config.model.adapter is None:
        raise ConfigError(
            f"validate: {', '.join(needy)} read checkpoints with optimizer state: set "
            f"{setting('training.save_checkpoints')} in a "
            "new output folder, or leave them out of validate.methods"
        )


# ---- scores ----------------------------------------------------------------------------------------------


def _scored(pipeline: Pipeline, method: Method, reference: Path, queries: Queries, verbose: bool) -> Scored:
    """Return the method's scores, computed once; they are computed anew under other settings or another adapter."""
    texts = [[q.id, q.completion] for q in queries.examples]
    config = to_dict(pipeline.config)
    settings = [dataclasses.asdict(method), config["training"], config["gradients"], config["model"]]
    if method.proxy:
        settings.append(model_hashes(method.proxy))
    if pipeline.config.model.adapter is not None and (method.checkpoints or method.moments):
        # The run itself may not have read these checkpoints.
        settings.append(checkpoint_hashes(reference))
    record = json.dumps([settings, texts], sort_keys=True)
    digest = hashlib.sha256(record.encode()).hexdigest()
    path = pipeline.folder / FOLDER / f"{method.name}.npz"
    if (found := _read(path, digest)) is not None:
        return found
    if verbose:
        print(f"scores by {method.name}", file=sys.stderr, flush=True)
    scorer = _proxy(pipeline, method.proxy) if method.proxy else _reference(pipeline, method, reference)
    asked = tokenize(queries.examples, scorer.tokenizer).examples
    scratch = pipeline.folder / FOLDER / f".{method.name}.store"
    gradients = pipeline.config.gradients
    scored = score_by(method, scorer.base, scorer.adapters, scorer.pool, asked, scratch, gradients)
    scored = dataclasses.replace(scored, seconds=scorer.seconds | scored.seconds)
    with replacing(path) as partial, partial.open("wb") as file:
        np.savez(
            file,
            digest=digest,
            matrix=scored.matrix,
            seconds=json.dumps(scored.seconds),
            bytes_per_example=scored.bytes_per_example,
        )
    return scored


def _read(path: Path, digest: str) -> Scored | None:
    """Return the stored scores; None where they are missing, damaged or of other settings."""
    try:
        with np.load(path) as found:
            if str(found["digest"]) != digest:
                return None
            return Scored(found["matrix"], json.loads(str(found["seconds"])), int(found["bytes_per_example"]))
    except FileNotFoundError:
        return None
    except UNREADABLE:
        warnings.warn(f"{path} is damaged, and is made again", stacklevel=2)
        return None


@dataclass(frozen=True)
class _Scorer:
    """The model whose gradients a method takes, and the pool in its tokens."""

    base: Any
    tokenizer: Any
    pool: list[dict[str, Any]]
    adapters: list[tuple[Path, float]]
    # Seconds it took to prepare, beyond those of the reference.
    seconds: dict[str, float]


def _reference(pipeline: Pipeline, method: Method, reference: Path) -> _Scorer:
    pool = pipeline.splits.tokenized.examples
    return _Scorer(pipeline.base, pipeline.tokenizer, pool, _adapters(method, reference), {})


def _proxy(pipeline: Pipeline, path: str) -> _Scorer:
    """Return the model at `path`, fine-tuned on the pool as the reference was.

    Raises DataError where examples are longer than max_length in its tokens.
    """
    config = pipeline.config
    trust = config.model.trust_remote_code
    base = load_model(
        path,
        dtype=config.model.dtype,
        device=config.model.device,
        trust_remote_code=trust,
        quantize=config.model.quantize,
    )
    tokenizer = load_tokenizer(path, model=base, trust_remote_code=trust)
    tokens = tokenize(pipeline.splits.pool, tokenizer, max_length=config.data.max_length, truncate=config.data.truncate)
    if tokens.too_long:
        names = truncated_list(name for name, _ in tokens.too_long)
        raise DataError(
            f"{path}: in this proxy's tokens {names} are longer than {setting('data.max_length')}; raise it, or set "
            f"{setting('data.truncate')}"
        )
    training = dataclasses.replace(config.training, seed=config.pruning.seeds[0], save_checkpoints=False)
    name = hashlib.sha256(json.dumps([path, model_hashes(path)]).encode()).hexdigest()[:12]
    folder = pipeline.folder / FOLDER / f"proxy-{name}"
    trained = finetune(
        base, tokenizer, tokens.examples, folder, config=training, lora=config.lora, progress=pipeline.progress
    )
    return _Scorer(base, tokenizer, tokens.examples, [(trained.path, 1.0)], {"fine-tuning the proxy": trained.seconds})


def _adapters(method: Method, reference: Path) -> list[tuple[Path, float]]:
    if not (method.checkpoints or method.moments):
        return [(reference, 1.0)]
    saved = list_checkpoints(reference)
    if not saved:
        raise ConfigError(f"method {method.name} reads checkpoints, and {reference} has none: save them in training")
    if not method.checkpoints:
        return [(saved[-1], 1.0)]
    return list(zip(saved, learning_rates(saved, average=True), strict=True))


def _external(files: Mapping[str, str], shape: tuple[int, int]) -> dict[str, np.ndarray]:
    matrices = {}
    for name, path in files.items():
        check_no_pipe(path)
        try:
            with np.load(path) as found:
                matrix = np.asarray(found["scores"], np.float32)
        except Exception as error:
            # numpy, zipfile and zlib raise errors of their own for damaged files.
            raise DataError(
                f"{path}: no scores of another tool (an .npz file with 'scores' [N, Q]): {one_line(error)}"
            ) from error
        if matrix.shape != shape:
            raise DataError(f"{path}: scores of shape {matrix.shape}, this pool and these queries make {shape}")
        matrices[name] = matrix
    return matrices


# ---- detection and cost ----------------------------------------------------------------------------------


def drop_priority(matrix: np.ndarray, groups: Mapping[str, Sequence[int]]) -> np.ndarray:
    """Return the order in which a method drops examples, [N], higher = sooner.

    It is the paper's combined rank, or low benefit where there are no wrong answers.
    """
    benefit = average_ranks(matrix[:, list(groups["correct"])].mean(axis=1))
    wrong = list(groups.get("incorrect", ()))
    return average_ranks(matrix[:, wrong].mean(axis=1)) - benefit if wrong else -benefit


def _detection(
    pipeline: Pipeline, scores: Mapping[str, np.ndarray], queries: Queries, draws: int
) -> list[dict[str, Any]] | None:
    pool = pipeline.splits.pool
    harmful = known_harmful(pool, [example.id for example in pool])
    if harmful is None:
        return None
    rows = []
    for name, matrix in scores.items():
        # a baseline that is the same for all queries has no two groups to set against one another
        constant = bool((matrix == matrix[:, :1]).all())
        priority = -matrix[:, 0].astype(np.float64) if constant else drop_priority(matrix, queries.groups)
        # Every method gets the same draws.
        rng = np.random.default_rng(pipeline.config.seed)
        low, high = bootstrap_auc(priority, harmful, rng, draws)
        order = np.argsort(-priority, kind="stable")
        precision = {}
        for share in (0.1, 0.25, 0.5):
            top = harmful[order[: max(1, round(share * len(order)))]]
            precision[f"{round(100 * share)}%"] = float(top.mean())
        rows.append(
            {"method": name, "auc": auc(priority, harmful), "low": low, "high": high, "precision_at": precision}
        )
    return sorted(rows, key=lambda row: -row["auc"])


def _cost(
    pipeline: Pipeline,
    scored: Mapping[str, Scored],
    scores: Mapping[str, np.ndarray],
    methods: Sequence[Method],
    queries: Queries,
) -> dict[str, Any]:
    """Return the cost of every method, and its Spearman correlation with the same scores from exact gradients.

    The cost is seconds, bytes an example, and seconds over those of one epoch; the correlation is the mean over single
    queries, and that of each group's mean.
    """
    epoch = pipeline.epoch_seconds()
    exact = {EXACT_OF[name]: matrix for name, matrix in scores.items() if name in EXACT_OF}
    rows = []
    for method in methods:
        found = scored[method.name]
        seconds = sum(found.seconds.values())
        alike = exact.get(method.preconditioner)
        agreement = None
        if alike is not None and not method.loss and not method.checkpoints:
            groups = {name: list(members) for name, members in queries.groups.items() if len(members)}
            agreement = {
                "queries": float(np.mean([spearman(a, b) for a, b in zip(found.matrix.T, alike.T, strict=True)]))
            }
            agreement |= {
                g: spearman(found.matrix[:, m].mean(axis=1), alike[:, m].mean(axis=1)) for g, m in groups.items()
            }
        rows.append(
            {
                "method": method.name,
                "settings": dataclasses.asdict(method),
                "seconds": found.seconds,
                "epochs": None if epoch is None else seconds / epoch,
                "bytes_per_example": found.bytes_per_example,
                "spearman_to_exact": agreement,
            }
        )
    return {"epoch_seconds": epoch, "rows": rows}
