"""Preference pairs: a pair's gradient is a difference of two rows, weighted as a preference loss weighs it.

    DPO      L = -log sigmoid(m),   m = beta (log p(c) / p_ref(c) - log p(r) / p_ref(r))
             grad L = beta sigmoid(-m) (grad l(c) - grad l(r)),   l = -log p, summed over the completion

(Rafailov et al. 2023). So a pair is two examples with the token weights +w and -w, w = beta sigmoid(-m), whose rows (or
scores: everything here is linear) are added, with `loss_reduction="sum"`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from influence_fast.data.held import Held, as_examples
from influence_fast.data.packing import IGNORED, check_examples, example_name
from influence_fast.errors import ConfigError, DataError, ModelError
from influence_fast.gradients.model.frozen import frozen


def pair_examples(
    chosen: Held, rejected: Held, weights: Sequence[float] | torch.Tensor | None = None
) -> list[dict[str, Any]]:
    """Return each pair as two examples, chosen (+w) then rejected (-w), for `loss_reduction="sum"`.

    Args:
        chosen, rejected: N tokenized examples each, as for `per_example_gradients`; an id is the pair's.
        weights: N numbers, such as `dpo_weights`; by default 1, the difference of the log-likelihoods.

    Raises DataError where the two differ in length, an example is malformed, or a weight is NaN, infinite or 0.

        pairs = pair_examples(chosen, rejected, dpo_weights(model, chosen, rejected, beta=0.1))
        rows = pair_sums(inf.per_example_gradients(model, pairs, loss_reduction="sum"))  # [N, k]
    """
    better, worse = _pairs(chosen, rejected)
    factors = [1.0] * len(better) if weights is None else [float(weight) for weight in weights]
    if len(factors) != len(better):
        raise DataError(f"{len(factors)} weights for {len(better)} pairs; give one a pair")
    found = []
    for place, (one, other, factor) in enumerate(zip(better, worse, factors, strict=True)):
        name = str(one["id"]) if "id" in one else str(place)
        for side, row, sign in (("chosen", one, factor), ("rejected", other, -factor)):
            own = row.get("weights", torch.ones(len(row["labels"]), dtype=torch.float64))
            found.append({**row, "id": f"{name}/{side}", "weights": own * sign})
    check_examples(as_examples(found))
    return found


def pair_sums(of_examples: torch.Tensor) -> torch.Tensor:
    """Add the rows or scores [2 N, ...] of `pair_examples` up to those of the pairs [N, ...].

    Raises DataError for an odd number of rows.
    """
    if len(of_examples) % 2:
        raise DataError(f"{len(of_examples)} rows are no pairs: give those of pair_examples, in its order")
    return of_examples[0::2] + of_examples[1::2]


def dpo_weights(model: Any, chosen: Held, rejected: Held, *, beta: float = 0.1) -> torch.Tensor:
    """Return beta sigmoid(-m) [N] fp64 of each pair: what the gradient of its DPO loss is weighted by.

    The reference is the model with its adapter disabled, as in trl without a `ref_model`.

    Raises ConfigError (beta is not above 0), DataError (see `pair_examples`) and ModelError (no adapter to disable).
    """
    if not beta > 0:
        raise ConfigError(f"beta is {beta}; it must be above 0")
    if not hasattr(model, "disable_adapter"):
        raise ModelError("the reference of DPO is the model without its adapter, and this model has none (peft)")
    better, worse = _pairs(chosen, rejected)
    with frozen(model):
        policy = [log_likelihoods(model, side) for side in (better, worse)]
        with model.disable_adapter():
            reference = [log_likelihoods(model, side) for side in (better, worse)]
    margins = beta * ((policy[0] - reference[0]) - (policy[1] - reference[1]))
    return beta * torch.sigmoid(-margins)


def _pairs(chosen: Held, rejected: Held) -> tuple[Sequence[Mapping[str, Any]], Sequence[Mapping[str, Any]]]:
    better, worse = as_examples(chosen), as_examples(rejected)
    if len(better) != len(worse):
        raise DataError(f"{len(better)} chosen and {len(worse)} rejected examples: give one of each a pair")
    for side in (better, worse):
        check_examples(side)
    for place, (one, other) in enumerate(zip(better, worse, strict=True)):
        if "id" in one and "id" in other and one["id"] != other["id"]:
            names = f"{example_name(one, place)!r} and {example_name(other, place)!r}"
            raise DataError(f"pair {place} has the ids {names}; give both sides in one order")
    return better, worse


@torch.no_grad()
def log_likelihoods(model: Any, examples: Sequence[Mapping[str, Any]]) -> torch.Tensor:
    """Return the summed log-probabilities of the labels [E] fp64 on the host, by the model's own forward."""
    device = model.get_input_embeddings().weight.device
    found = []
    for example in examples:
        ids = example["input_ids"].to(device, torch.int64)
        logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
        labels = example["labels"].to(logits.device, torch.int64)[1:]
        kept = labels != IGNORED
        wide = logits[kept].to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
        found.append(wide.gather(1, labels[kept][:, None]).double().sum().cpu())
    return torch.stack(found) if found else torch.zeros(0, dtype=torch.float64)
