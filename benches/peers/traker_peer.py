"""traker: TRAK's features and scores, by its FunctionalGradientComputer kept to the adapter's factors.

Runs in traker's own environment. On a CPU it projects by its BasicProjector, whose matrix is drawn anew for each batch.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from worker import (
    Method,
    Run,
    Scoring,
    Work,
    by_length,
    completion_loss,
    load_model,
    main,
    padded,
    trainable,
    unsorted,
)

TOKENS = 4096  # in a padded batch: vmap keeps every example's activations
TRAK_DIM = 512  # as in the other TRAK row; traker's default is 2048
DAMPING = 0.1  # share of the mean eigenvalue; traker's default is none


def trak(work: Work) -> Scoring:
    """Model output: the mean log-probability of the completion; its loss has gradient -1, so Q is one."""
    from trak import TRAKer
    from trak.gradient_computers import FunctionalGradientComputer
    from trak.modelout_functions import AbstractModelOutput

    model = load_model(work)
    names = list(trainable(model))

    class MeanLogProbability(AbstractModelOutput):
        def __init__(self) -> None:
            pass

        @staticmethod
        def get_output(model: Any, weights: Any, buffers: Any, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            # a mask made ready keeps transformers from looking at values, which vmap forbids; the flash kernel has
            # no batching rule
            options = {"attention_mask": {"full_attention": None}, "use_cache": False}
            with sdpa_kernel(SDPBackend.MATH):
                call = {"input_ids": ids[None], **options}
                output = torch.func.functional_call(model, (weights, buffers), kwargs=call)
            return -completion_loss(output.logits[0], labels)

        def get_out_to_loss_grad(self, model: Any, weights: Any, buffers: Any, batch: Any) -> torch.Tensor:
            return torch.ones(len(batch[0]), 1)

    class OfFactors(FunctionalGradientComputer):
        """traker's own differentiates every parameter and throws away those that are not asked for."""

        def load_model_params(self, model: Any) -> None:
            parameters = dict(model.named_parameters())
            self.func_weights = {name: parameters[name].detach() for name in names}
            self.func_buffers = dict(model.named_buffers())

    def batches(examples: list[Any]) -> Iterable[tuple[list[int], tuple[torch.Tensor, torch.Tensor]]]:
        return [(places, padded([examples[i] for i in places])) for places in by_length(examples, TOKENS)]

    def score(work: Work, run: Run) -> torch.Tensor:
        traker = TRAKer(
            model,
            MeanLogProbability(),
            train_set_size=len(work.pool),
            save_dir=str(run.temporary),
            device="cpu",
            gradient_computer=OfFactors,
            proj_dim=TRAK_DIM,
            projector_seed=work.seed,
            use_half_precision=False,
            grad_wrt=names,
            logging_level=40,
        )
        state = model.state_dict()
        traker.load_checkpoint(state, model_id=0)
        order: list[int] = []
        asked: list[int] = []
        with run.stage("gradients"):
            for places, batch in batches(work.pool):
                traker.featurize(batch, num_samples=len(places))
                order += places
        rows = torch.as_tensor(traker.saver.current_store["grads"][:])
        traker.score_computer.lambda_reg = DAMPING * float(rows.pow(2).sum()) / TRAK_DIM
        with run.stage("fit"):
            traker.finalize_features()
        run.keeps(rows)
        with run.stage("gradients"):
            traker.start_scoring_checkpoint("queries", state, model_id=0, num_targets=len(work.queries))
            for places, batch in batches(work.queries):
                traker.score(batch, num_samples=len(places))
                asked += places
        with run.stage("scoring"):
            scores = torch.as_tensor(traker.finalize_scores("queries"))
        run.notes.append(f"damping {DAMPING} of the mean eigenvalue")
        return unsorted(scores.float(), order, asked)

    return score


METHODS = {"trak": Method(trak, "preconditioned", f"TRAKer, normal projection to {TRAK_DIM}")}

if __name__ == "__main__":
    main("traker", METHODS, packages=["traker"])
