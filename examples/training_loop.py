"""Influence inside a training loop of one's own, which goes on unchanged. Lines marked `# added` are all it takes."""

from __future__ import annotations

import torch
from tiny import make_model, make_rows

import influence_fast as inf  # added
from influence_fast.training.undisturbed import undisturbed  # added

train = [*make_rows(1, 9), *make_rows(1, 3, error=5)]
validation = make_rows(9, 12)
model = make_model()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
scores = {}  # added
for step in range(4):
    row = train[int(torch.randint(len(train), ()))]
    loss = model(torch.tensor([row["input_ids"]]), labels=torch.tensor([row["labels"]])).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 2 == 1:  # added
        with undisturbed(model):  # added
            query = inf.per_example_gradients(model, validation).mean(0, keepdim=True)  # added
            scores[step] = inf.stream_influence(model, train, query)[:, 0]  # added
print({step: found.argsort()[:2].tolist() for step, found in scores.items()})  # added
