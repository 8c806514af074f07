"""Influence from the padded batches of a `DataLoader`. Lines marked `# added` are all that it takes."""

from __future__ import annotations

import torch
from tiny import make_model, make_rows, make_tokenizer
from torch.utils.data import DataLoader
from transformers import DataCollatorForSeq2Seq

import influence_fast as inf  # added

collate = DataCollatorForSeq2Seq(make_tokenizer())
train = DataLoader([*make_rows(8, 14), *make_rows(8, 10, error=5)], batch_size=4, collate_fn=collate)
validation = DataLoader(make_rows(14, 16), batch_size=2, collate_fn=collate)
model = make_model()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
for batch in train:
    loss = model(**batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
queries = inf.per_example_gradients(model, validation).mean(0, keepdim=True)  # added
scores = inf.stream_influence(model, train, queries)[:, 0]  # added
print("most harmful:", scores.argsort()[:2].tolist())  # added
