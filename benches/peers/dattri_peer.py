"""dattri: per-example gradients with its random projection, TRAK, DataInf, and LoGra by hooks.

Runs in dattri's own environment. Its gradients are `vmap(grad)` of the adapter's factors over padded batches; examples
are sorted by length, so that there is little padding. `logra*` are its hook-based block-projected attributor, 16 x 16
a factor. Its SJLT and GraSS sketches are for CUDA only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader
from worker import (
    PROJECTION_DIM,
    PROJECTION_WIDTH,
    Method,
    Run,
    Scoring,
    TokenizedExample,
    Work,
    by_length,
    completion_loss,
    cosine_scores,
    dot_scores,
    even_batch,
    load_model,
    main,
    padded,
    trainable,
    unsorted,
)

TOKENS = 4096  # in a padded batch: vmap keeps every example's activations
HELD = 1 << 28  # numbers of unprojected gradients kept until they are projected
PROJECTION = "normal"  # on a CPU its Rademacher matrix takes 3.5 times as long to draw
TRAK_DIM = 512  # dattri's default; TRAK inverts a matrix of this width
DAMPING = 0.1  # share of the mean eigenvalue


class WithLoss(torch.nn.Module):
    """The model with the sum over examples of each one's mean completion loss as its output's `loss`."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> Any:
        logits = self.model(input_ids=input_ids, use_cache=False).logits
        return SimpleNamespace(loss=sum(completion_loss(o, t) for o, t in zip(logits, labels, strict=True)))


class Vmapped:
    """dattri's task over the peft model, and what makes batches of the examples."""

    def __init__(self, work: Work) -> None:
        from dattri.task import AttributionTask

        self.model = load_model(work)
        self.factors = trainable(self.model)
        # only the factors are differentiated: the frozen weights are taken from the model as they are
        self.task = AttributionTask(self.loss, self.model, self.model.state_dict())

    def loss(self, params: dict[str, torch.Tensor], data: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """One example's loss; dattri's attributors give a batch dimension of one, its bare gradients none."""
        ids, labels = (x.reshape(-1) for x in data)
        # a mask made ready keeps transformers from looking at values, which vmap forbids; padding is on the right
        # and carries no loss, so causal attention needs none;
        # and the flash kernel has no batching rule
        with sdpa_kernel(SDPBackend.MATH):
            output = torch.func.functional_call(
                self.model,
                params,
                kwargs={"input_ids": ids[None], "attention_mask": {"full_attention": None}, "use_cache": False},
            )
        return completion_loss(output.logits[0], labels)

    def probability(self, params: dict[str, torch.Tensor], data: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return torch.exp(-self.loss(params, data))

    def gradients(self, examples: Sequence[TokenizedExample]) -> Iterator[tuple[list[int], torch.Tensor]]:
        """(places, gradients [n, parameters]) of padded batches."""
        parameters, _ = self.task.get_param(0)
        gradient = self.task.get_grad_loss_func(in_dims=(None, 0))
        for places in by_length(examples, TOKENS):
            yield places, gradient(parameters, padded([examples[i] for i in places])).detach()


def loader(
    examples: Sequence[TokenizedExample],
    collate: Callable[[list[TokenizedExample]], Any] = padded,
    batch_size: int | None = None,
) -> tuple[Any, list[int]]:
    """(DataLoader of padded batches by length, the places in its order): batches of `TOKENS`, or of `batch_size`."""
    batches = by_length(examples, TOKENS)
    order = [i for batch in batches for i in batch]
    if batch_size is None:
        batches_of: dict[str, Any] = {"batch_sampler": batches}
    else:
        examples, batches_of = [examples[i] for i in order], {"batch_size": batch_size}
    return DataLoader(examples, collate_fn=collate, **batches_of), order


def projected(scorer: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Callable[[Work], Scoring]:
    """Per-example gradients, dattri's normal projection, inner products.

    The same numbers as its TracInAttributor gives, which computes the queries' gradients anew for every batch.
    """

    def prepare(work: Work) -> Scoring:
        vmapped = Vmapped(work)

        def project(gradients: list[torch.Tensor]) -> torch.Tensor:
            from dattri.func.projection import random_project

            features = torch.cat(gradients)
            options = {"proj_dim": PROJECTION_WIDTH, "proj_max_batch_size": 32, "proj_seed": work.seed}
            return random_project(features, len(features), **options, proj_type=PROJECTION)(features)

        def rows_of(examples: Sequence[TokenizedExample]) -> torch.Tensor:
            rows = torch.empty(len(examples), PROJECTION_WIDTH)
            held: list[torch.Tensor] = []
            places: list[int] = []
            done = 0
            for batch, gradients in vmapped.gradients(examples):
                held.append(gradients)
                places += batch
                done += len(batch)
                # each call makes the whole matrix anew, so many batches are projected at once
                if len(places) * gradients.shape[1] >= HELD or done == len(rows):
                    rows[places] = project(held)
                    held.clear()
                    places.clear()
            return rows

        def score(work: Work, run: Run) -> torch.Tensor:
            with run.stage("gradients"):
                # together, so that the matrix is drawn once
                rows, queries = rows_of([*work.pool, *work.queries]).split([len(work.pool), len(work.queries)])
            run.keeps(rows)
            with run.stage("scoring"):
                return scorer(rows, queries)

        return score

    return prepare


def trak(work: Work) -> Scoring:
    """dattri's TRAKAttributor with its own width, damped by a share of the mean eigenvalue."""
    vmapped = Vmapped(work)

    def score(work: Work, run: Run) -> torch.Tensor:
        from dattri.algorithm.trak import TRAKAttributor

        options = {"proj_dim": TRAK_DIM, "proj_max_batch_size": 32, "proj_seed": work.seed, "proj_type": PROJECTION}
        pool, rows = loader(work.pool)
        queries, columns = loader(work.queries)
        attributor = TRAKAttributor(
            vmapped.task,
            vmapped.probability,
            projector_kwargs=options,
            regularization=mean_eigenvalue(vmapped, work, options) * DAMPING,
        )
        with run.stage("gradients"):
            attributor.cache(pool)
            scores = attributor.attribute(queries)
        run.bytes_per_example, run.width = 4.0 * TRAK_DIM, TRAK_DIM
        run.notes.append(f"damping {DAMPING} of the mean eigenvalue; fit and scoring are inside gradients")
        return unsorted(scores, rows, columns)

    return score


def mean_eigenvalue(vmapped: Vmapped, work: Work, options: dict[str, Any]) -> float:
    """Of TRAK's kernel, X^T X [k, k], from a sample: dattri's regularization is absolute and zero by default."""
    from dattri.func.projection import random_project

    sample = work.pool[:: max(1, len(work.pool) // 16)]
    total = 0.0
    for _, gradients in vmapped.gradients(sample):
        features = gradients / gradients.shape[1] ** 0.5  # as TRAKAttributor scales them
        total += float(random_project(features, len(features), **options)(features).pow(2).sum())
    return total / len(sample) * len(work.pool) / options["proj_dim"]


def datainf(work: Work) -> Scoring:
    """dattri's IFAttributorDataInf over unprojected gradients."""
    vmapped = Vmapped(work)

    def score(work: Work, run: Run) -> torch.Tensor:
        from dattri.algorithm.influence_function import IFAttributorDataInf

        pool, order = loader(work.pool)
        attributor = IFAttributorDataInf(vmapped.task)
        with run.stage("gradients"):
            attributor.cache(pool)
            rows = attributor._cached_train_reps[0].detach()
            queries = torch.empty(len(work.queries), rows.shape[1])
            for places, gradients in vmapped.gradients(work.queries):
                queries[places] = gradients
        run.keeps(rows)
        attributor.regularization = DAMPING * float(rows.pow(2).mean())
        with run.stage("scoring"):
            # as attribute() does, with the queries transformed once instead of once a batch, 8 at a time
            for start in range(0, len(queries), 8):
                part = slice(start, start + 8)
                queries[part] = attributor.transform_test_rep(0, queries[part])
            scores = dot_scores(rows, queries)
        run.notes.append(f"one damping for all layers, {DAMPING} of the mean squared gradient; the fit is in scoring")
        return unsorted(scores, order, range(len(queries)))

    return score


def logra(hessian: str) -> Callable[[Work], Scoring]:
    """dattri's LoGraAttributor: hooks on the factors' linears, 16 x 16 a factor, the inverse by layer."""

    def prepare(work: Work) -> Scoring:
        from dattri.task import AttributionTask

        model = WithLoss(load_model(work))
        layers = [name.removesuffix(".weight") for name in trainable(model)]
        task = AttributionTask(lambda m, batch, device: m(**batch).loss, model, model.state_dict())

        def batch(examples: list[TokenizedExample]) -> dict[str, torch.Tensor]:
            ids, labels = padded(examples)
            return {"input_ids": ids, "labels": labels}

        def score(work: Work, run: Run) -> torch.Tensor:
            from dattri.algorithm.logra import LoGraAttributor

            attributor = LoGraAttributor(
                task,
                layers,
                hessian=hessian,
                damping=None,
                proj_dim=PROJECTION_DIM**2,
                cache_dir=str(run.temporary),
            )
            size = even_batch(work.pool, work.queries)
            pool, rows = loader(work.pool, batch, size)
            queries, columns = loader(work.queries, batch, size)
            with run.stage("gradients"):
                attributor.cache(pool)
                scores = attributor.attribute(pool, queries)
            run.width = attributor.total_proj_dim
            run.bytes_per_example = 4.0 * attributor.total_proj_dim
            run.notes.append("fit and scoring are inside gradients")
            return unsorted(scores, rows, columns)

        return score

    return prepare


METHODS = {
    "dot": Method(projected(dot_scores), "dot", f"vmap(grad), normal projection to {PROJECTION_WIDTH}"),
    "cosine": Method(projected(cosine_scores), "cosine", f"vmap(grad), normal projection to {PROJECTION_WIDTH}"),
    "trak": Method(trak, "preconditioned", f"TRAKAttributor, normal projection to {TRAK_DIM}"),
    "datainf": Method(datainf, "preconditioned", "IFAttributorDataInf, no projection"),
    "logra": Method(logra("eFIM"), "preconditioned", "LoGraAttributor, empirical Fisher by layer"),
    "logra_dot": Method(logra("Identity"), "dot", "LoGraAttributor without a Hessian"),
}

if __name__ == "__main__":
    main("dattri", METHODS, packages=["dattri"])
