"""Which rows of a Hugging Face dataset help on the validation rows. Lines marked `# added` are all that it takes."""

from __future__ import annotations

from datasets import Dataset
from tiny import make_model, make_rows, make_tokenizer
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

import influence_fast as inf  # added

train = Dataset.from_list([*make_rows(1, 9), *make_rows(1, 3, error=5)])
validation = Dataset.from_list(make_rows(9, 12))
model = make_model()
trainer = Trainer(
    model,
    TrainingArguments("out/hf_dataset", max_steps=2, learning_rate=1e-2, report_to=[], save_strategy="no"),
    DataCollatorForSeq2Seq(make_tokenizer()),
    train_dataset=train,
)
trainer.train()
queries = inf.per_example_gradients(model, validation).mean(0, keepdim=True)  # added
scores = inf.stream_influence(model, train, queries)[:, 0]  # added
train = train.add_column("influence", scores.tolist())  # added
print(train.sort("influence")[:3])  # added
