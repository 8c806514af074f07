"""Influence along a training by trl. Lines marked `# added` are all that it takes; `report_to` gets the summaries."""

from __future__ import annotations

from datasets import Dataset
from tiny import make_model, make_rows, make_tokenizer
from trl import SFTConfig, SFTTrainer

import influence_fast as inf  # added

train = Dataset.from_list([*make_rows(1, 9), *make_rows(1, 3, error=5)])
validation = Dataset.from_list(make_rows(9, 12))
model = make_model()
callback = inf.InfluenceCallback(validation, every=2, output="out/sft_trainer/scores")  # added
trainer = SFTTrainer(
    model,
    SFTConfig("out/sft_trainer", max_steps=3, learning_rate=1e-2, report_to=[], save_strategy="no", bf16=False),
    train_dataset=train,
    processing_class=make_tokenizer(),
    callbacks=[callback],  # added
)
trainer.train()
for step, table in callback.scores.items():  # added
    print(step, table.sort("s_validation", ascending=True).ids[:3])  # added
queries = inf.per_example_gradients(model, validation).mean(0, keepdim=True)  # added
scores = inf.stream_influence(model, trainer.train_dataset, queries)  # added
