"""Preference pairs as differences of rows, against autograd of the DPO loss in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import influence_fast as inf
from influence_fast.errors import DataError, ModelError
from influence_fast.gradients.pairs import dpo_weights, pair_examples, pair_sums
from influence_fast.gradients.targets import gradient_layout

BETA = 0.5


def completions(seed: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for i in range(3):
        ids = torch.randint(4, 300, (6 + (i + seed) % 3,), generator=generator)
        made.append({"id": f"p{i}", "input_ids": ids, "labels": torch.where(torch.arange(len(ids)) < 2, -100, ids)})
    return made


CHOSEN, REJECTED = completions(0), completions(1)


def log_likelihood(model: Any, example: dict[str, Any]) -> torch.Tensor:
    logs = model(input_ids=example["input_ids"][None]).logits[0, :-1].log_softmax(-1)
    labels = example["labels"][1:]
    kept = labels != -100
    return logs[kept].gather(1, labels[kept][:, None]).sum()


def test_rows_of_pairs_are_the_gradients_of_the_dpo_loss(tiny_lora: Any) -> None:
    model = tiny_lora(dtype=torch.float64, num_hidden_layers=1)
    weights = dpo_weights(model, CHOSEN, REJECTED, beta=BETA)
    pairs = pair_examples(CHOSEN, REJECTED, weights)
    rows = pair_sums(inf.per_example_gradients(model, pairs, loss_reduction="sum"))
    query = torch.randn(1, rows.shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    streamed = pair_sums(inf.stream_influence(model, pairs, query, inf.RowSpec("none", loss_reduction="sum")))
    layout = gradient_layout(model)
    parameters = dict(model.named_parameters())
    for place, (one, other) in enumerate(zip(CHOSEN, REJECTED, strict=True)):
        with torch.no_grad(), model.disable_adapter():
            reference = log_likelihood(model, one) - log_likelihood(model, other)
        margin = BETA * (log_likelihood(model, one) - log_likelihood(model, other) - reference)
        assert abs(float(margin)) > 1e-3  # else the coefficient is beta / 2 whatever the reference
        model.zero_grad()
        (-torch.nn.functional.logsigmoid(margin)).backward()
        for entry in layout:
            (name,) = [n for n in parameters if n.startswith(f"{entry.module}.") and f"lora_{entry.factor[-1]}." in n]
            wanted = parameters[name].grad
            assert wanted is not None
            found = rows[place, entry.offset : entry.offset + wanted.numel()]
            assert (found.view_as(wanted) - wanted).norm() < 1e-10 * wanted.norm()
        assert torch.allclose(streamed[place], rows[place] @ query[0], rtol=1e-10)
    assert model.peft_config
    assert any(parameter.requires_grad for parameter in model.parameters())


def test_pairs_that_do_not_fit_are_named(tiny_model: Any) -> None:
    with pytest.raises(DataError, match="3 chosen and 2 rejected examples"):
        pair_examples(CHOSEN, REJECTED[:2])
    with pytest.raises(DataError, match="2 weights for 3 pairs"):
        pair_examples(CHOSEN, REJECTED, [1.0, 2.0])
    with pytest.raises(DataError, match="pair 0 has the ids 'p0' and 'p2'"):
        pair_examples(CHOSEN, REJECTED[::-1])
    with pytest.raises(DataError, match="NaN or infinite"):
        pair_examples(CHOSEN, REJECTED, [1.0, float("nan"), 1.0])
    with pytest.raises(DataError, match="5 rows are no pairs"):
        pair_sums(torch.zeros(5))
    with pytest.raises(ModelError, match="without its adapter, and this model has none"):
        dpo_weights(tiny_model(), CHOSEN, REJECTED)
