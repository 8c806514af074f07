"""Influence along a training: the training is unchanged to the bit, and the scores are those of the model then."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments
from trl import SFTConfig, SFTTrainer

import influence_fast as inf
from influence_fast.errors import ConfigError, DataError, InfluenceFastError, ModelError
from influence_fast.influence.callback import InfluenceCallback
from influence_fast.influence.scores import ScoreTable


def make_examples(count: int, seed: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for i in range(count):
        ids = torch.randint(4, 300, (5 + i % 4,), generator=generator)
        labels = ids.clone()
        labels[: 1 + i % 2] = -100
        made.append({"input_ids": ids.tolist(), "labels": labels.tolist()})
    return made


POOL, QUERIES = make_examples(6, seed=0), make_examples(3, seed=1)


class Recorder(TrainerCallback):
    """What is reported, and the adapter after each step."""

    def __init__(self) -> None:
        self.logs: list[dict[str, float]] = []
        self.adapters: dict[int, dict[str, torch.Tensor]] = {}
        self.draws: list[tuple[float, ...]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.logs.append(dict(logs))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = kwargs["model"]
        self.adapters[state.global_step] = {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}
        numpy_state = np.random.get_state()  # noqa: NPY002
        self.draws.append((hash(random.getstate()), hash(numpy_state[1].tobytes()), int(torch.get_rng_state().sum())))


def train(
    kind: str,
    base: Any,
    tokenizer: Any,
    folder: Path,
    callbacks: list[Any],
    data: Any = None,
    resume: Any = None,
    **settings: Any,
) -> tuple[Any, Any, Recorder]:
    """Train a LoRA adapter with dropout, accumulation and gradient checkpointing."""
    torch.manual_seed(0)
    model = get_peft_model(base, LoraConfig(r=2, lora_dropout=0.3, target_modules="all-linear", task_type="CAUSAL_LM"))
    recorder = Recorder()
    options: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 2,
        "gradient_checkpointing": True,
        "learning_rate": 1e-2,
        "num_train_epochs": 1,
        "max_steps": 2,
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "bf16": False,
    }
    dataset = Dataset.from_list(POOL) if data is None else data
    common = {"model": model, "train_dataset": dataset, "callbacks": [*callbacks, recorder]}
    if kind == "trl":
        arguments = SFTConfig(**{**options, "max_length": None, "pad_to_multiple_of": 8, **settings})
        trainer: Any = SFTTrainer(args=arguments, processing_class=tokenizer, **common)
    else:
        collate = DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=8)
        trainer = Trainer(args=TrainingArguments(**{**options, **settings}), data_collator=collate, **common)
    trainer.train(resume_from_checkpoint=None if resume is None else str(folder / resume))
    return trainer, model, recorder


@pytest.fixture
def base(tiny_model: Any) -> Any:
    return tiny(tiny_model)


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer: Any) -> Any:
    made = tiny_tokenizer()
    made.pad_token = made.eos_token
    return made


def tiny(tiny_model: Any) -> Any:
    return tiny_model("qwen2", initializer_range=0.1, attention_dropout=0.2, num_hidden_layers=1)


@pytest.mark.parametrize("kind", ["transformers", "trl"])
def test_training_is_unchanged_and_scores_are_of_each_step(
    kind: str, tiny_model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    # a shuffled loader draws a random number when it is read
    good = torch.utils.data.DataLoader(QUERIES[:2], shuffle=True, collate_fn=lambda rows: rows[0])  # type: ignore[arg-type]
    callback = InfluenceCallback({"good": good, "bad": QUERIES[2:]}, every=1)
    plain, model, without = train(kind, tiny(tiny_model), tokenizer, tmp_path / "without", [])
    scored, other, along = train(kind, tiny(tiny_model), tokenizer, tmp_path / "with", [callback])

    skipped = ("runtime", "per_second", "influence")

    def trained(logs: list[dict[str, float]]) -> list[dict[str, float]]:
        kept = [{k: v for k, v in log.items() if not any(word in k for word in skipped)} for log in logs]
        return [log for log in kept if set(log) - {"epoch", "step"}]

    assert trained(plain.state.log_history) == trained(scored.state.log_history)
    assert trained(without.logs) == trained(along.logs)
    assert without.draws == along.draws
    for step, adapter in without.adapters.items():
        assert all(torch.equal(tensor, along.adapters[step][name]) for name, tensor in adapter.items())
    for (name, one), (_, two) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(one, two), name
        assert one.requires_grad == two.requires_grad
    assert [m.training for m in model.modules()] == [m.training for m in other.modules()]
    assert [len(m._forward_hooks) for m in model.modules()] == [len(m._forward_hooks) for m in other.modules()]

    assert sorted(callback.scores) == [1, 2]
    check_scores(callback, along, tiny(tiny_model), step=2)
    assert [log["step"] for log in scored.state.log_history if "influence_good_mean" in log] == [1, 2]
    saved = ScoreTable.load(tmp_path / "with" / "influence" / "step-000002.parquet")
    assert saved.ids == callback.scores[2].ids
    assert (saved["s_good"] == callback.scores[2]["s_good"]).all()


def check_scores(callback: InfluenceCallback, recorder: Recorder, base: Any, step: int) -> None:
    """Compare scores and what was logged of them with products of exact rows under a copy of the adapter."""
    fresh = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in fresh.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(recorder.adapters[step][name])
    rows, queries = (inf.per_example_gradients(fresh, held).double() for held in (POOL, QUERIES))
    table = callback.scores[step]
    assert table.ids == [str(i) for i in range(len(POOL))]
    for name, wanted in (("good", rows @ queries[:2].mean(0)), ("bad", rows @ queries[2])):
        found = table[f"s_{name}"]
        assert (torch.from_numpy(found) - wanted).norm() < 1e-5 * wanted.norm()
        logged = [log for log in recorder.logs if f"influence_{name}_mean" in log][step - 1]
        assert logged[f"influence_{name}_mean"] == found.mean()
        assert logged[f"influence_{name}_harmful"] == (found < 0).mean()


def test_a_store_a_moment_holds_what_scores_are_made_of(base: Any, tokenizer: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    kept = tmp_path / "stores"
    callback = InfluenceCallback(QUERIES, every=None, store=kept, spec=inf.RowSpec(dim=4, dtype="fp32"))
    train("transformers", base, tokenizer, tmp_path / "out", [callback], max_steps=1)
    assert list(callback.stores.values()) == [kept / "step-000001"]
    store = inf.open_store(kept / "step-000001")
    rows = load_file(kept / "step-000001.queries.safetensors")["rows"]
    assert rows.shape == (len(QUERIES), store.width)
    table = inf.Scorer.fit(store, preconditioner="none").scores(rows, {"validation": range(3)})
    assert np.allclose(table["s_validation"], callback.scores[1]["s_validation"], rtol=1e-4, atol=1e-9)
    with pytest.raises(ConfigError, match=r"stores holds step-000001 of another training: delete it"):
        callback._make_room(0)


def test_moments_at_epochs_and_scores_of_a_pool_of_ones_own(base: Any, tokenizer: Any, tmp_path: Path) -> None:
    pool = [{"id": f"p{i}", **row} for i, row in enumerate(make_examples(4, seed=3))]
    pool.insert(2, {"id": "silent", "input_ids": [5, 6, 7], "labels": [-100] * 3})  # has no gradient, and no score
    folder = tmp_path / "scores"
    callback = InfluenceCallback(QUERIES, examples=pool, output=folder, apply=lambda groups: 2 * groups)
    train("transformers", base, tokenizer, tmp_path / "out", [callback], data=Dataset.from_list(POOL[:2]))
    assert sorted(callback.scores) == [1, 2]
    assert callback.scores[2].ids == ["p0", "p1", "p2", "p3"]
    assert sorted(path.name for path in folder.glob("step-*")) == ["step-000001.parquet", "step-000002.parquet"]


class Stream(torch.utils.data.IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(POOL)


@pytest.mark.parametrize(
    ("case", "error", "message"),
    [
        ("iterable", DataError, r"is a Stream, whose examples cannot be read again: give what is to be scored"),
        ("no adapter", ModelError, r"LoRA|adapter"),
        ("several processes", ConfigError, r"scores in one process, and this training has several"),
        ("every", ConfigError, r"every is 0: give optimizer steps"),
        ("no examples", DataError, r"validation group 'validation' has no example"),
        ("twice", DataError, r"the id 'a' comes twice"),
    ],
)
def test_what_cannot_be_scored_is_said_before_training(
    case: str,
    error: type[InfluenceFastError],
    message: str,
    base: Any,
    tokenizer: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data: Any = Stream() if case == "iterable" else None
    if case == "several processes":
        monkeypatch.setattr(TrainingArguments, "world_size", 2)
    if case == "twice":
        data = [{"id": "a", **row} for row in POOL]
    with pytest.raises(error, match=message) as raised:  # noqa: PT012
        callback = InfluenceCallback([] if case == "no examples" else QUERIES, every=0 if case == "every" else 1)
        if case == "no adapter":
            arguments = TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True, max_steps=1)
            collate = DataCollatorForSeq2Seq(tokenizer)
            Trainer(base, arguments, collate, Dataset.from_list(POOL), callbacks=[callback]).train()
        elif case == "twice":
            callback.on_train_begin(
                TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True),
                None,
                None,
                model=base,
                train_dataloader=torch.utils.data.DataLoader(data, collate_fn=lambda rows: rows[0]),
            )
        else:
            train("transformers", base, tokenizer, tmp_path, [callback], data=data, max_steps=1)
    assert "\n" not in str(raised.value)


def test_a_resumed_training_takes_up_its_scores(tiny_model: Any, tokenizer: Any, tmp_path: Path) -> None:
    whole, resumed = (InfluenceCallback(QUERIES, every=1, spec=inf.RowSpec(dim=2), store=tmp_path / "s") for _ in "ab")
    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1}
    train("transformers", tiny(tiny_model), tokenizer, tmp_path, [whole], **settings)
    changed = ScoreTable(["x"], {"s_validation": np.zeros(1)})
    changed.save(tmp_path / "influence" / "step-000002.parquet")  # of a step that is made again
    settings["resume"] = "checkpoint-1"
    trainer, _, _ = train("transformers", tiny(tiny_model), tokenizer, tmp_path, [resumed], **settings)
    assert list(resumed.scores) == list(resumed.stores) == [1, 2]
    for step in (1, 2):
        assert (resumed.scores[step]["s_validation"] == whole.scores[step]["s_validation"]).all()
    assert [log["step"] for log in trainer.state.log_history if "influence_validation_mean" in log] == [1, 2]


def test_scores_of_other_validation_examples_are_not_taken_up(tiny_model: Any, tokenizer: Any, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1}
    train("transformers", tiny(tiny_model), tokenizer, tmp_path, [InfluenceCallback(QUERIES, every=1)], **settings)
    other = InfluenceCallback(QUERIES[:2], every=1)
    with pytest.raises(ConfigError, match="made with other validation examples: give another output"):
        train("transformers", tiny(tiny_model), tokenizer, tmp_path, [other], resume="checkpoint-1", **settings)


def test_what_a_callback_cannot_take_is_said_before_training(base: Any, tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="spec is a dict"):
        InfluenceCallback(QUERIES, spec={"dim": 2})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="apply is a int"):
        InfluenceCallback(QUERIES, apply=3)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="two validation groups are called '1'"):
        InfluenceCallback({1: QUERIES, "1": QUERIES})  # type: ignore[dict-item]
    fewer = InfluenceCallback({"a": QUERIES[:1], "b": QUERIES[1:]}, apply=lambda groups: groups[:1])
    with pytest.raises(DataError, match="it must keep their shape"):
        train("transformers", base, tokenizer, tmp_path, [fewer])
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="file is a file, and scores are kept in a folder"):
        train("transformers", base, tokenizer, tmp_path, [InfluenceCallback(QUERIES, output=tmp_path / "file")])
