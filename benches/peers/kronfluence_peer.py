"""kronfluence: pairwise scores with EK-FAC or without a Hessian, over whole gradients.

Runs in kronfluence's own environment. All queries' gradients are held at once, so that the pool is passed once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from worker import (
    Method,
    Run,
    Scoring,
    TokenizedExample,
    Work,
    completion_loss,
    even_batch,
    load_model,
    main,
    padded,
    trainable,
    unsorted,
)


def pairwise(strategy: str) -> Callable[[Work], Scoring]:
    """`fit_all_factors` of the pool, then `compute_pairwise_scores`."""

    def prepare(work: Work) -> Scoring:
        from kronfluence.analyzer import Analyzer, prepare_model
        from kronfluence.arguments import FactorArguments, ScoreArguments
        from kronfluence.task import Task
        from kronfluence.utils.dataset import DataLoaderKwargs

        model = load_model(work)
        modules = [name.removesuffix(".weight") for name in trainable(model)]

        class CompletionTask(Task):
            def compute_train_loss(self, batch: Any, model: Any, sample: bool = False) -> torch.Tensor:
                if sample:
                    raise NotImplementedError("the empirical Fisher is used: labels are not sampled")
                logits = model(input_ids=batch["input_ids"], use_cache=False).logits
                losses = [completion_loss(o, t) for o, t in zip(logits, batch["labels"], strict=True)]
                return torch.stack(losses).sum()

            def compute_measurement(self, batch: Any, model: Any) -> torch.Tensor:
                return self.compute_train_loss(batch, model)

            def get_influence_tracked_modules(self) -> list[str]:
                return modules

            def get_attention_mask(self, batch: Any) -> torch.Tensor:
                return batch["attention_mask"]

        task = CompletionTask()
        model = prepare_model(model, task)

        def collate(examples: list[TokenizedExample]) -> dict[str, torch.Tensor]:
            ids, labels = padded(examples)
            lengths = torch.tensor([len(e["input_ids"]) for e in examples])
            mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
            return {"input_ids": ids, "labels": labels, "attention_mask": mask}

        def score(work: Work, run: Run) -> torch.Tensor:
            # one size of batch: sorted by length, so that there is little padding
            order = [sorted(range(len(s)), key=lambda i: -len(s[i]["input_ids"])) for s in (work.pool, work.queries)]
            pool, queries = [work.pool[i] for i in order[0]], [work.queries[i] for i in order[1]]
            size = even_batch(pool, queries)
            folder = str(run.temporary)
            analyzer = Analyzer("peers", model, task, cpu=True, disable_tqdm=True, output_dir=folder)
            analyzer.set_dataloader_kwargs(DataLoaderKwargs(collate_fn=collate))
            with run.stage("fit"):
                analyzer.fit_all_factors(
                    "factors",
                    pool,
                    per_device_batch_size=size,
                    factor_args=FactorArguments(strategy=strategy, use_empirical_fisher=True),
                )
            with run.stage("gradients"):
                analyzer.compute_pairwise_scores(
                    "scores",
                    "factors",
                    query_dataset=queries,
                    train_dataset=pool,
                    per_device_query_batch_size=min(size, len(queries)),
                    per_device_train_batch_size=size,
                    score_args=ScoreArguments(
                        damping_factor=None, query_gradient_accumulation_steps=-(-len(queries) // size)
                    ),
                )
                scores = analyzer.load_pairwise_scores("scores")["all_modules"]
            run.bytes_per_example = 0.0
            run.notes.append("one pass: scoring is inside gradients; damping 0.1 of the mean eigenvalue")
            return unsorted(scores.T.contiguous(), *order)

        return score

    return prepare


METHODS = {
    "dot": Method(pairwise("identity"), "dot", "pairwise scores, identity strategy"),
    "ekfac": Method(pairwise("ekfac"), "preconditioned", "pairwise scores, EK-FAC with the empirical Fisher"),
}

if __name__ == "__main__":
    main("kronfluence", METHODS, packages=["kronfluence"])
