"""Influence of preference pairs under DPO. Lines marked `# added` are all that it takes."""

from __future__ import annotations

import torch
from tiny import make_model, make_rows

import influence_fast as inf  # added
from influence_fast.gradients.pairs import dpo_weights, pair_examples, pair_sums  # added

BETA = 0.5


def log_likelihood(row: dict[str, list[int]]) -> torch.Tensor:
    """Log-probability of a completion."""
    out = model(torch.tensor([row["input_ids"]]), labels=torch.tensor([row["labels"]]))
    return -out.loss * sum(label != -100 for label in row["labels"][1:])


chosen, rejected = make_rows(1, 6), make_rows(1, 6, error=5)
validation = make_rows(6, 9), make_rows(6, 9, error=5)
model = make_model()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
for one, other in zip(chosen, rejected, strict=True):
    with torch.no_grad(), model.disable_adapter():
        reference = log_likelihood(one) - log_likelihood(other)
    margin = BETA * (log_likelihood(one) - log_likelihood(other) - reference)
    (-torch.nn.functional.logsigmoid(margin)).backward()
    optimizer.step()
    optimizer.zero_grad()
pairs = pair_examples(chosen, rejected, dpo_weights(model, chosen, rejected, beta=BETA))  # added
asked = pair_examples(*validation, dpo_weights(model, *validation, beta=BETA))  # added
rows = pair_sums(inf.per_example_gradients(model, asked, loss_reduction="sum"))  # added
spec = inf.RowSpec("none", loss_reduction="sum")  # added
found = inf.stream_influence(model, pairs, rows.mean(0, keepdim=True), spec)  # added
scores = pair_sums(found)[:, 0]  # added
print("pairs that help least:", scores.argsort()[:2].tolist())  # added
