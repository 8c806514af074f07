"""bergson: an index on disk and its Attributor, or its one-pass `score`; TrackStar and EK-FAC by its own pipelines.

Runs in bergson's own environment. Gradients are of the adapter's factors, each a module to bergson, projected to
16 x 16 on both sides (its TrackStar default) with the mean loss of an example's completion tokens.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from worker import PROJECTION_DIM, Method, Run, Scoring, TokenizedExample, Work, main, scratch_folder

PRECISIONS = {torch.float32: "fp32", torch.bfloat16: "bf16"}
# bergson's default budget of a batch; a longer example must fit whole, and the model's context bounds both
TOKENS = 2048


def adapter_with_base(work: Work) -> str:
    """A copy of the adapter whose configuration names the work's own base model: bergson finds the base by it."""
    folder = scratch_folder()
    shutil.copytree(work.adapter_folder, folder, dirs_exist_ok=True)
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(work.model_folder)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    for file in work.model_folder.glob("*token*"):  # the tokenizer is looked for beside the adapter
        shutil.copy(file, folder)
    return str(folder)


def dataset(examples: list[TokenizedExample], path: Path | None = None) -> Any:
    """The tokenized examples as bergson wants them; with `path`, saved there too."""
    from datasets import Dataset

    ids = [e["input_ids"].tolist() for e in examples]
    data = Dataset.from_dict(
        {"input_ids": ids, "labels": [e["labels"].tolist() for e in examples], "length": [len(i) for i in ids]}
    )
    if path is not None:
        data.save_to_disk(str(path))
    return data


def index_config(work: Work, run_path: Path, adapter: str, **options: Any) -> Any:
    from bergson import IndexConfig

    longest = max(len(e["input_ids"]) for e in [*work.pool, *work.queries])
    context = json.loads((work.model_folder / "config.json").read_text()).get("max_position_embeddings", TOKENS)
    config = IndexConfig(
        **{
            "run_path": str(run_path),
            "model": adapter,
            "tokenizer": str(work.model_folder),
            "precision": PRECISIONS[work.dtype],
            "projection_dim": PROJECTION_DIM,
            "loss_reduction": "mean",
            "token_batch_size": min(max(TOKENS, longest), context),
            **options,
        }
    )
    config.partial_run_path.mkdir(parents=True, exist_ok=True)
    return config


class Warm:
    """The model, loaded once by bergson's own loader, and gradient collection over it."""

    def __init__(self, work: Work) -> None:
        from bergson.utils.worker_utils import setup_model_and_peft

        self.adapter = adapter_with_base(work)
        config = index_config(work, scratch_folder() / "none", self.adapter)
        self.model, self.targets = setup_model_and_peft(config)

    def collect(self, work: Work, examples: list[TokenizedExample], path: Path, scorer: Any = None) -> Path:
        """Gradients of `examples` into an index at `path`, or straight into `scorer`; returns where they are."""
        from bergson import collect_gradients
        from bergson.data import allocate_batches
        from bergson.utils.worker_utils import create_processor

        config = index_config(work, path, self.adapter)
        data = dataset(examples)
        collect_gradients(
            model=self.model,
            data=data,
            processor=create_processor(self.model, config, self.targets),
            cfg=config,
            target_modules=self.targets,
            batches=allocate_batches(data["length"][:], config.token_batch_size),
            scorer=scorer,
        )
        return Path(config.partial_run_path)


def modules_of(index: Path) -> dict[str, torch.Tensor]:
    """An index's gradients by module, [n, d] float32 each.

    Copies: the Attributor scales its queries in place, which on the read-only map of the file is a crash.
    """
    from bergson.data import column_offsets, load_gradients
    from bergson.utils.utils import numpy_to_tensor

    rows = load_gradients(index)
    sizes = json.loads((index / "info.json").read_text())["grad_sizes"]
    return {name: numpy_to_tensor(rows[:, lo:hi].copy()).float() for name, (lo, hi) in column_offsets(sizes).items()}


def attributor(unit_norm: bool) -> Callable[[Work], Scoring]:
    """`bergson build` of pool and queries, then its Attributor over the index, asked for every example."""

    def prepare(work: Work) -> Scoring:
        warm = Warm(work)

        def score(work: Work, run: Run) -> torch.Tensor:
            from bergson import Attributor
            from bergson.data import load_gradients

            with run.stage("gradients"):
                pool = warm.collect(work, work.pool, run.temporary / "pool")
                queries = warm.collect(work, work.queries, run.temporary / "queries")
            run.keeps(load_gradients(pool))
            with run.stage("scoring"):
                found, places = Attributor(pool, unit_norm=unit_norm).search(modules_of(queries), k=None)
                scores = torch.empty_like(found).scatter_(1, places, found).T  # search gives them sorted
            run.notes.append("scoring: Attributor, the index in memory and every score sorted")
            return scores

        return score

    return prepare


def one_pass(unit_norm: bool) -> Callable[[Work], Scoring]:
    """`bergson score`: query gradients first, then one pass over the pool that scores and keeps nothing."""

    def prepare(work: Work) -> Scoring:
        warm = Warm(work)

        def score(work: Work, run: Run) -> torch.Tensor:
            from bergson import PreprocessConfig, ScoreConfig
            from bergson.score.score import create_scorer
            from bergson.score.score_writer import MemmapSequenceScoreWriter

            with run.stage("gradients"):
                queries = warm.collect(work, work.queries, run.temporary / "queries")
                modules = list(modules_of(queries))
                path = run.temporary / "scores"
                path.mkdir()
                scorer = create_scorer(
                    path,
                    dataset(work.pool),
                    ScoreConfig(query_path=str(queries), modules=modules),
                    PreprocessConfig(unit_normalize=unit_norm),
                    device=torch.device("cpu"),
                    dtype=torch.float32,
                )
                warm.collect(work, work.pool, run.temporary / "pool", scorer)
                scorer.writer.flush()
            assert isinstance(scorer.writer, MemmapSequenceScoreWriter)
            run.bytes_per_example = 0.0
            run.notes.append("one pass: scoring is inside gradients")
            return read_scores(path, len(work.queries))

        return score

    return prepare


def read_scores(path: Path, queries: int) -> torch.Tensor:
    """[N, Q] of a folder that bergson's score wrote."""
    from bergson.data import load_scores

    scores = load_scores(path)
    values = scores[:] if not hasattr(scores, "scores") else scores.scores
    table = torch.as_tensor(values).float()
    assert table.shape[1] == queries
    return table


def trackstar(work: Work) -> Scoring:
    """bergson's TrackStar pipeline: autocorrelation Hessians, mixed; both sides by the root; unit norm."""
    adapter = adapter_with_base(work)

    def score(work: Work, run: Run) -> torch.Tensor:
        from bergson.cli.trackstar import trackstar as pipeline
        from bergson.config.config import DataConfig, PreprocessConfig, QuerySetConfig, ScoreConfig, TrackstarConfig

        dataset(work.pool, run.temporary / "pool.hf")
        dataset(work.queries, run.temporary / "queries.hf")
        config = index_config(work, run.temporary / "run", adapter, data=DataConfig(str(run.temporary / "pool.hf")))
        # its default of 1000 of 65k components, at the width there is here
        width = 2 * PROJECTION_DIM**2 * len(list_targets(adapter))
        with run.stage("gradients"):
            pipeline(
                config,
                TrackstarConfig(
                    query=QuerySetConfig(str(run.temporary / "queries.hf")),
                    preprocess_cfg=PreprocessConfig(unit_normalize=True),
                    score_cfg=ScoreConfig(),
                    target_downweight_components=max(1, math.ceil(width * 1000 / 65536)),
                ),
            )
        run.notes.append("the whole pipeline, its two loads of the model and the Hessians included, is in gradients")
        return read_scores(run.temporary / "run" / "scores", len(work.queries))

    return score


def list_targets(adapter: str) -> list[str]:
    """Modules that carry an adapter, by its weights' names."""
    from safetensors import safe_open

    with safe_open(f"{adapter}/adapter_model.safetensors", framework="pt") as file:
        return [name for name in file.keys() if ".lora_A." in name]  # noqa: SIM118


def ekfac(work: Work) -> Scoring:
    """bergson's EK-FAC pipeline over unprojected gradients: factors of the pool, corrected eigenvalues."""
    adapter = adapter_with_base(work)

    def score(work: Work, run: Run) -> torch.Tensor:
        from bergson.config.config import (
            DataConfig,
            HessianConfig,
            HessianPipelineConfig,
            PreprocessConfig,
            QuerySetConfig,
            ScoreConfig,
        )
        from bergson.hessians.pipeline import hessian_pipeline

        dataset(work.pool, run.temporary / "pool.hf")
        dataset(work.queries, run.temporary / "queries.hf")
        data = DataConfig(str(run.temporary / "pool.hf"))
        config = index_config(work, run.temporary / "run", adapter, data=data, projection_dim=0)
        with run.stage("gradients"):
            hessian_pipeline(
                config,
                HessianConfig(method="kfac", ev_correction=True, use_dataset_labels=True),
                ScoreConfig(),
                PreprocessConfig(),
                HessianPipelineConfig(query=QuerySetConfig(str(run.temporary / "queries.hf"))),
            )
        run.notes.append("the whole pipeline, its loads of the model and the factors included, is in gradients")
        return read_scores(run.temporary / "run" / "scores", len(work.queries))

    return score


METHODS = {
    "dot": Method(attributor(unit_norm=False), "dot", "build an index, Attributor"),
    "cosine": Method(attributor(unit_norm=True), "cosine", "build an index, Attributor with unit norm"),
    "score_dot": Method(one_pass(unit_norm=False), "dot", "one-pass score"),
    "score_cosine": Method(one_pass(unit_norm=True), "cosine", "one-pass score with unit norm"),
    "trackstar": Method(trackstar, "preconditioned", "TrackStar: mixed autocorrelation Hessian, unit norm"),
    "ekfac": Method(ekfac, "preconditioned", "EK-FAC of the whole factors, empirical Fisher, no projection"),
}

if __name__ == "__main__":
    main("bergson", METHODS, packages=["bergson"])
