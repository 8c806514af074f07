"""logix: whole gradients by its hooks, and its influence scores without a Hessian.

Runs in logix's own environment, on Python 3.10: it does not install on a later one. Logs are kept in memory. Its
projection (`add_lora`) puts modules in place of the factors that peft's forward cannot use, so there is none here.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
from worker import (
    Method,
    Run,
    Scoring,
    TokenizedExample,
    Work,
    by_length,
    completion_loss,
    load_model,
    main,
    padded,
    scratch_folder,
    unsorted,
)

TOKENS = 4096  # in a padded batch: it forms every token's outer product of a factor


def logged(work: Work) -> Scoring:
    """A log of each batch's gradients, `compute_influence` of all pairs of batches."""
    from logix import LogIX
    from logix.statistic import Log

    folder = scratch_folder()
    (folder / "config.yaml").write_text(json.dumps({"root_dir": str(folder)}))  # JSON is YAML
    model = load_model(work)
    logix = LogIX("peers", config=str(folder / "config.yaml"))
    logix.watch(model, name_filter=["lora_A", "lora_B"])
    logix.setup({"grad": [Log]})

    def logs_of(examples: Sequence[TokenizedExample]) -> tuple[list[int], list[Any]]:
        order, logs = [], []
        for places in by_length(examples, TOKENS):
            batch = [examples[i] for i in places]
            ids, labels = padded(batch)
            # its masks are for statistics that are not taken here: padding carries no loss, so no gradient
            with logix(data_id=[str(i) for i in places]):
                logits = model(input_ids=ids, use_cache=False).logits
                sum(completion_loss(o, t) for o, t in zip(logits, labels, strict=True)).backward()
            logs.append(logix.get_log(copy=True))
            model.zero_grad(set_to_none=True)
            order += places
        return order, logs

    def score(work: Work, run: Run) -> torch.Tensor:
        with run.stage("gradients"):
            (rows, pool), (columns, queries) = logs_of(work.pool), logs_of(work.queries)
        run.width = sum(module["grad"][0].numel() for module in pool[0][1].values())
        run.bytes_per_example = 4.0 * run.width
        with run.stage("scoring"):
            # src x tgt
            parts = [
                torch.cat([logix.compute_influence(q, d, precondition=False)["influence"] for q in queries])
                for d in pool
            ]
            scores = torch.cat(parts, dim=1).T.contiguous()
        return unsorted(scores, rows, columns)

    return score


METHODS = {"dot": Method(logged, "dot", "whole gradients by hooks, no Hessian")}

if __name__ == "__main__":
    main("logix", METHODS, packages=["logix-ai"])
