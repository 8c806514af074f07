"""The memory that a fine-tuning is expected to take, and what is said where it does not fit."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from influence_fast.errors import ConfigError
from influence_fast.training import memory
from influence_fast.training.fine_tuning import finetune
from influence_fast.training.fresh_adapter import attach_lora
from influence_fast.training.memory import IGNORE, TrainingMemory, check_memory, training_memory
from influence_fast.training.settings import LoraSettings, TrainConfig


def examples(count: int, length: int) -> list[dict[str, Any]]:
    return [
        {"id": str(i), "input_ids": torch.arange(length) % 300, "labels": torch.arange(length)} for i in range(count)
    ]


def estimate(model: Any, count: int = 8, length: int = 64, **settings: Any) -> TrainingMemory:
    found = training_memory(model, examples(count, length), TrainConfig(**{"batch_size": 8, **settings}))
    assert found is not None
    return found


@pytest.fixture
def model(tiny_model: Any) -> Any:
    return attach_lora(tiny_model(), LoraSettings(r=2), 0)


def test_estimates_grow_with_what_is_held(model: Any) -> None:
    before = copy.deepcopy(model.state_dict())
    draw = torch.get_rng_state()
    whole = estimate(model)
    assert whole.tokens == 8 * 64
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert whole.needed["gradients and optimizer"] == 12 * trained
    assert estimate(model, batch_size=4).needed["activations"] == pytest.approx(
        whole.needed["activations"] / 2, rel=0.01
    )
    assert estimate(model, length=128).needed["logits"] == 2 * whole.needed["logits"]
    assert estimate(model, count=3).tokens == 3 * 64  # no batch is larger than the data
    assert estimate(model, packing=32).tokens == 8 * 32
    few = estimate(model, gradient_checkpointing=True)
    assert few.needed["activations"] < 0.8 * whole.needed["activations"]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(draw, torch.get_rng_state())


def test_written_out_attention_grows_with_the_square(tiny_model: Any) -> None:
    model = attach_lora(tiny_model(attn_implementation="eager"), LoraSettings(r=2), 0)
    one, four = (estimate(model, count=1, length=n).needed["activations"] for n in (256, 1024))
    assert four > 8 * one


def test_what_clearly_does_not_fit_is_refused_with_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    big = TrainingMemory(10**9, {"activations": 14 * 10**9}, 16, 8192, 8 * 10**9)
    with pytest.raises(ConfigError) as raised:
        check_memory(big)
    message = str(raised.value)
    for word in ("14.0 GB", "8.0 GB", "batch_size 16", "gradient_accumulation_steps", "gradient_checkpointing", IGNORE):
        assert word in message
    monkeypatch.setenv(IGNORE, "1")
    check_memory(big)


def test_what_may_not_fit_is_said_and_begun(caplog: pytest.LogCaptureFixture) -> None:
    check_memory(TrainingMemory(10**9, {"activations": 7 * 10**9}, 16, 8192, 71 * 10**8))
    assert "training.batch_size 16" in caplog.text
    caplog.clear()
    check_memory(TrainingMemory(10**9, {"activations": 7 * 10**9}, 16, 8192, 9 * 10**9))
    check_memory(TrainingMemory(10**9, {"activations": 7 * 10**9}, 16, 8192, None))
    assert caplog.text == ""


def test_a_refused_training_leaves_model_and_folder(
    tiny_model: Any, tiny_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "_free", lambda device: 1000)
    base = tiny_model()
    with pytest.raises(ConfigError, match=r"needs about .* and 0.0 MB are free: lower training.batch_size 16"):
        finetune(
            base, tiny_tokenizer(), examples(4, 16), tmp_path / "out", config=TrainConfig(), lora=LoraSettings(r=2)
        )
    assert list(tmp_path.iterdir()) == []
    assert not [name for name, _ in base.named_parameters() if "lora" in name]


def test_accumulated_batches_give_the_update_of_the_whole(tiny_model: Any, tiny_tokenizer: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    generator = torch.Generator().manual_seed(0)
    rows = []
    for i in range(8):
        ids = torch.randint(4, 300, (4 + 3 * i,), generator=generator)
        labels = ids.clone()
        labels[: 1 + i % 3] = -100  # unequal numbers of tokens that count
        rows.append({"id": str(i), "input_ids": ids, "labels": labels})
    found = {}
    for batch, steps in ((8, 1), (3, 3)):
        config = TrainConfig(max_steps=2, batch_size=batch, gradient_accumulation_steps=steps, precision="fp32")
        lora, folder = LoraSettings(r=2), tmp_path / f"{batch}"
        result = finetune(tiny_model(), tiny_tokenizer(), rows, folder, config=config, lora=lora, progress=False)
        found[batch] = (load_file(result.path / "adapter_model.safetensors"), result.loss_history)
    whole, history = found[8]
    adapter, losses = found[3]
    assert [loss for _, loss in losses] == pytest.approx([loss for _, loss in history], rel=1e-5)
    for name, tensor in whole.items():
        assert torch.allclose(adapter[name], tensor, rtol=1e-3, atol=1e-7), name
