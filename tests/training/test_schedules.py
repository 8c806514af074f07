"""The rates of every step, by running a checkpoint's scheduler again, against the rates that training had."""

from __future__ import annotations

import itertools
import json
import logging
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from influence_fast.errors import ModelError, warn_once
from influence_fast.influence.checkpoints import learning_rates
from influence_fast.training.files import list_checkpoints
from influence_fast.training.fine_tuning import finetune
from influence_fast.training.schedules import group_rates, read_arguments
from influence_fast.training.settings import LoraSettings, TrainConfig

Factory = Callable[..., Any]
SCHEDULES = ["constant", "constant_with_warmup", "cosine", "linear"]


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    warn_once.cache_clear()
    caplog.set_level(logging.WARNING, logger="influence_fast")
    return lambda: [record.getMessage() for record in caplog.records if record.name.startswith("influence_fast")]


def examples(count: int = 10) -> list[dict[str, Any]]:
    ids = torch.arange(100, 106)
    return [{"id": f"e{i}", "input_ids": ids + i, "labels": ids + i} for i in range(count)]


@pytest.fixture
def true_rates(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The rate of the optimizer at every step that is made while the test runs."""
    rates: list[float] = []
    step = torch.optim.AdamW.step

    def counted(self: Any, *args: Any, **more: Any) -> Any:
        rates.append(float(self.param_groups[0]["lr"]))
        return step(self, *args, **more)

    monkeypatch.setattr(torch.optim.AdamW, "step", counted)
    return rates


def expected(folder: Path, rates: list[float]) -> tuple[list[float], list[float]]:
    """(at each checkpoint, mean since the one before)."""
    steps = [0, *(int(path.name.rpartition("-")[2]) for path in list_checkpoints(folder))]
    spans = list(itertools.pairwise(steps))
    return [rates[end - 1] for _, end in spans], [float(np.mean(rates[a:b])) for a, b in spans]


def check(folder: Path, rates: list[float]) -> None:
    last, mean = expected(folder, rates)
    np.testing.assert_allclose(learning_rates(folder), last, rtol=1e-9, atol=1e-15)
    np.testing.assert_allclose(learning_rates(folder, average=True), mean, rtol=1e-9, atol=1e-15)


def train_plainly(model: Any, folder: Path, **options: Any) -> None:
    """transformers.Trainer with its own default of a logged rate each 500 steps."""
    import transformers

    settings: dict[str, Any] = {"num_train_epochs": 4, "save_steps": 3, "per_device_train_batch_size": 2} | options
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), use_cpu=True, report_to=[], disable_tqdm=True, learning_rate=1e-2, **settings
    )
    rows = [{key: e[key] for key in ("input_ids", "labels")} for e in examples()]
    transformers.Trainer(model=model, args=arguments, train_dataset=rows).train()  # type: ignore[arg-type]


@pytest.mark.parametrize("accumulation", [pytest.param(1, marks=pytest.mark.exhaustive), 2])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_rates_of_a_fine_tuning_are_those_of_its_steps(
    tiny_model: Factory,
    tiny_tokenizer: Factory,
    tmp_path: Path,
    true_rates: list[float],
    said: Any,
    schedule: str,
    accumulation: int,
) -> None:
    config = TrainConfig(
        epochs=3,
        learning_rate=1e-3,
        batch_size=2,
        gradient_accumulation_steps=accumulation,
        schedule=schedule,
        warmup_ratio=0.3,
        precision="fp32",
        save_checkpoints=2,
    )
    lora = LoraSettings(r=2, target_modules=("q_proj",))
    finetune(tiny_model(), tiny_tokenizer(), examples(), tmp_path / "o", config=config, lora=lora, progress=False)
    assert len(true_rates) == (15 if accumulation == 1 else 9)
    check(tmp_path / "o", true_rates)
    for checkpoint in list_checkpoints(tmp_path / "o"):  # the run's own record says it too
        (checkpoint / "training_args.bin").unlink()
    check(tmp_path / "o", true_rates)
    assert said() == []


@pytest.mark.parametrize(
    "options",
    [
        *({"lr_scheduler_type": name, "warmup_steps": 4} for name in SCHEDULES),
        {"lr_scheduler_type": "cosine", "warmup_steps": 0.3, "gradient_accumulation_steps": 2},
        {"lr_scheduler_type": "inverse_sqrt", "warmup_steps": 4},
        {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": 2.0}},
        {"lr_scheduler_type": "cosine_with_restarts", "lr_scheduler_kwargs": {"num_cycles": 3}},
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-3}, "warmup_steps": 2},
        {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 6}, "warmup_steps": 3},
    ],
    ids=lambda options: "-".join(str(value) for value in options.values()),
)
def test_rates_of_a_plain_trainer_are_those_of_its_steps(
    tiny_lora: Factory, tmp_path: Path, true_rates: list[float], said: Any, options: dict[str, Any]
) -> None:
    """No rate is logged but that of the last step, so that logged points would be of no use."""
    train_plainly(tiny_lora(), tmp_path, **options)
    check(tmp_path, true_rates)
    assert said() == []


def test_a_scheduler_of_ones_own_is_read_from_the_log_and_said(
    tiny_lora: Factory, tmp_path: Path, said: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    def create_scheduler(self: Any, num_training_steps: int, optimizer: Any = None) -> Any:
        self.lr_scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, step_size=5, gamma=0.5)
        return self.lr_scheduler

    monkeypatch.setattr(transformers.Trainer, "create_scheduler", create_scheduler)
    train_plainly(tiny_lora(), tmp_path, logging_steps=1, save_steps=5)
    rates = [1e-2 * 0.5 ** (step // 5) for step in range(20)]
    np.testing.assert_allclose(learning_rates(tmp_path), expected(tmp_path, rates)[0])
    np.testing.assert_allclose(learning_rates(tmp_path, average=True), expected(tmp_path, rates)[1])
    (line,) = said()
    assert str(tmp_path) in line
    assert "those that were logged" in line


def test_steps_that_were_skipped_are_read_from_the_log_and_said(tiny_lora: Factory, tmp_path: Path, said: Any) -> None:
    train_plainly(tiny_lora(), tmp_path, logging_steps=1, save_steps=20)
    path = tmp_path / "checkpoint-20" / "scheduler.pt"
    torch.save(torch.load(path, weights_only=True) | {"last_epoch": 18}, path)
    logged = json.loads((path.parent / "trainer_state.json").read_text())["log_history"]
    mean = np.mean([log["learning_rate"] for log in logged if "learning_rate" in log])
    np.testing.assert_allclose(learning_rates(tmp_path, average=True), [mean])
    assert len(said()) == 1


def test_a_log_by_older_transformers_is_of_the_next_step(
    tiny_lora: Factory, tmp_path: Path, true_rates: list[float], said: Any
) -> None:
    train_plainly(tiny_lora(), tmp_path, logging_steps=1)
    for checkpoint in list_checkpoints(tmp_path):
        path = checkpoint / "trainer_state.json"
        state = json.loads(path.read_text())
        for log in state["log_history"]:
            log["learning_rate"] = [*true_rates, 0.0][log["step"]]
        path.write_text(json.dumps(state))
    check(tmp_path, true_rates)
    assert said() == []


def test_nothing_in_a_pickle_is_run(tmp_path: Path) -> None:
    class Harm:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "harm"),)

    path = tmp_path / "training_args.bin"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("training_args/data.pkl", pickle.dumps(Harm()))
    assert read_arguments(path) == {}
    assert not (tmp_path / "harm").exists()
    for content in (b"", b"PK", b"\x80\x04."):
        path.write_bytes(content)
        assert read_arguments(path) == {}
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("training_args/data.pkl", b"\x80\x04K")
    assert read_arguments(path) == {}


def test_without_scheduler_and_log_the_rates_are_asked_for(tiny_lora: Factory, tmp_path: Path) -> None:
    train_plainly(tiny_lora(), tmp_path, save_steps=10)
    first = tmp_path / "checkpoint-10"
    (first / "training_args.bin").unlink()
    with pytest.raises(ModelError, match=r"logs no learning rate up to step 10, and its scheduler is not known"):
        learning_rates([first])


# ---- groups of parameters with rates of their own ----------------------------------------------------------


@pytest.mark.parametrize("kept", ["both", "optimizer.pt", "scheduler.pt"])
def test_groups_with_rates_of_their_own_are_refused(tiny_lora: Factory, tmp_path: Path, kept: str) -> None:
    """As LoRA+ trains, to the end of a schedule that comes to zero, where all groups have one rate."""
    import transformers
    from peft.optimizers import create_loraplus_optimizer

    model = tiny_lora()
    optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16.0)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, report_to=[], disable_tqdm=True, max_steps=4, save_steps=2
    )
    rows = [{key: e[key] for key in ("input_ids", "labels")} for e in examples()]
    transformers.Trainer(model=model, args=arguments, train_dataset=rows, optimizers=(optimizer, None)).train()  # type: ignore[arg-type]
    if kept != "both":
        for file in tmp_path.glob("checkpoint-*/*.pt"):
            if file.name != kept:
                file.unlink()
    for checkpoints in (tmp_path, [tmp_path / "checkpoint-4"]):
        for average in (False, True):
            with pytest.raises(ModelError, match=r"\d learning rates.*\(0\.001, .*0\.016\).*give the") as error:
                learning_rates(checkpoints, average=average)
            assert "\n" not in str(error.value)


def test_groups_without_parameters_have_no_rate(tmp_path: Path) -> None:
    groups = [{"params": [0], "lr": 1e-3}, {"params": [], "lr": 5.0}, {"params": [1], "lr": 1e-3}]
    torch.save({"state": {}, "param_groups": groups}, tmp_path / "optimizer.pt")
    torch.save(
        {"base_lrs": [1e-3, 5.0, 1e-3], "_last_lr": [1e-3, 5.0, 1e-3], "last_epoch": 1}, tmp_path / "scheduler.pt"
    )
    assert group_rates(tmp_path) == [1e-3]
    assert group_rates(tmp_path / "nothing") == []
