"""Fine-tuning: the loss falls, results are whole, resumed and reused, and bad input is named."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from influence_fast.errors import ConfigError, DataError, ModelError, NumericError, warn_once
from influence_fast.gradients.model import packed_attention as attention
from influence_fast.run.demo import make_tokenizer
from influence_fast.training import sft
from influence_fast.training.files import list_checkpoints
from influence_fast.training.fine_tuning import finetune, load_adam_moments, load_finetuned
from influence_fast.training.fresh_adapter import attach_lora
from influence_fast.training.settings import LoraSettings, TrainConfig

LORA = LoraSettings(r=4, alpha=8)
CONFIG = TrainConfig(epochs=3, learning_rate=3e-2, batch_size=4, precision="fp32")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()


@pytest.fixture
def model(tokenizer: Any) -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=True,
            max_position_embeddings=128,
            initializer_range=0.1,  # at 0.02 so narrow a model hardly hears its adapter
        )
    ).eval()


@pytest.fixture(scope="module")
def examples() -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    made = []
    for i in range(14):
        n = int(torch.randint(6, 20, (1,), generator=generator))
        ids = torch.randint(100, 140, (n,), generator=generator)
        labels = ids.clone()
        labels[: n // 2] = -100
        made.append({"id": f"e{i}", "input_ids": ids, "labels": labels})
    return made


def loss_of(model: torch.nn.Module, examples: list[dict[str, Any]]) -> float:
    with torch.no_grad():
        return sum(float(model(e["input_ids"][None], labels=e["labels"][None]).loss) for e in examples) / len(examples)


def run(model: Any, tokenizer: Any, examples: Any, path: Path, config: TrainConfig = CONFIG, **options: Any) -> Any:
    options = {"lora": LORA, "progress": False} | options
    return finetune(model, tokenizer, examples, path, config=config, **options)


def test_lora_lowers_the_loss_and_gives_the_base_back(
    model: Any, tokenizer: Any, examples: Any, tmp_path: Path
) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    loss = loss_of(model, examples)
    result = run(model, tokenizer, examples, tmp_path / "out")
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not model.training
    assert result.tokens_seen == 3 * sum(len(e["input_ids"]) for e in examples)
    tuned = load_finetuned(model, result.path)
    assert loss_of(tuned, examples) < loss - 0.3
    assert result.loss_history[-1][0] == 12
    assert result.loss_history[-1][1] < result.loss_history[0][1]
    assert (result.path / "adapter_model.safetensors").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_first_logged_loss_is_the_mean_over_completion_tokens(
    model: Any, tokenizer: Any, examples: Any, tmp_path: Path
) -> None:
    config = TrainConfig(max_steps=1, learning_rate=1e-9, batch_size=len(examples), precision="fp32")
    result = run(model, tokenizer, examples, tmp_path / "out", config)
    reference = model.double()
    total, count = 0.0, 0
    for e in examples:
        with torch.no_grad():
            logits = reference(e["input_ids"][None]).logits[0, :-1]
        total += float(torch.nn.functional.cross_entropy(logits, e["labels"][1:], ignore_index=-100, reduction="sum"))
        count += int((e["labels"][1:] != -100).sum())
    assert abs(result.loss_history[0][1] - total / count) < 1e-4


def test_same_seed_same_adapter_other_seed_another(model: Any, tokenizer: Any, examples: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    def adapter(name: str, seed: int) -> dict[str, torch.Tensor]:
        config = TrainConfig(epochs=1, learning_rate=3e-2, batch_size=4, precision="fp32", seed=seed)
        return load_file(run(model, tokenizer, examples, tmp_path / name, config).path / "adapter_model.safetensors")

    first, second, third = adapter("a", 0), adapter("b", 0), adapter("c", 1)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], third[name]) for name in first)


def test_finished_result_is_reused_only_for_the_same_work(
    model: Any, tokenizer: Any, examples: Any, tmp_path: Path
) -> None:
    first = run(model, tokenizer, examples, tmp_path / "out")
    again = run(model, tokenizer, examples, tmp_path / "out")
    assert not first.reused
    assert again.reused
    assert (again.loss_history, again.tokens_seen) == (first.loss_history, first.tokens_seen)
    with pytest.raises(ConfigError, match=r"holds a result of other data or settings"):
        run(model, tokenizer, examples[:-1], tmp_path / "out")
    other = run(model, tokenizer, examples[:-1], tmp_path / "out", overwrite=True)
    assert not other.reused
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(ConfigError, match=r"mine is not empty and holds no fine-tuning .* another output folder$"):
        run(model, tokenizer, examples, tmp_path / "mine")


@pytest.mark.parametrize("killed", [False, True], ids=["stopped", "killed while it wrote a checkpoint"])
def test_interrupted_run_leaves_nothing_in_place_and_goes_on_from_its_checkpoint(
    model: Any, tokenizer: Any, examples: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed: bool
) -> None:
    from safetensors.torch import load_file

    config = TrainConfig(epochs=3, learning_rate=3e-2, batch_size=4, precision="fp32", save_checkpoints=True)
    whole = run(model, tokenizer, examples, tmp_path / "whole", config)
    assert [p.name for p in whole.checkpoints] == ["checkpoint-4", "checkpoint-8", "checkpoint-12"]

    collate = sft.Collator.__call__
    calls = []

    def failing(self: Any, batch: Any) -> Any:
        calls.append(1)
        if len(calls) == 11:
            raise KeyboardInterrupt
        return collate(self, batch)

    monkeypatch.setattr(sft.Collator, "__call__", failing)
    with pytest.raises(KeyboardInterrupt):
        run(model, tokenizer, examples, tmp_path / "out", config)
    assert not (tmp_path / "out").exists()
    if killed:
        (last,) = tmp_path.glob(".out.partial-*/checkpoint-8")
        (last / "optimizer_names.json").unlink()
        (last / "optimizer.pt").write_bytes((last / "optimizer.pt").read_bytes()[:100])
    (last,) = tmp_path.glob(".out.partial-*/checkpoint-4")
    (last / "seconds.json").write_text("1000.0")
    if not killed:
        (last.parent / "checkpoint-8" / "seconds.json").write_text("1000.0")
    resumed = run(model, tokenizer, examples, tmp_path / "out", config)
    assert 1000 < resumed.seconds < 1000 + 300  # those of before count
    assert len(calls) == 11 + (8 if killed else 4)  # it did not start over
    one, other = (load_file(r.path / "adapter_model.safetensors") for r in (whole, resumed))
    assert all(torch.allclose(one[name], other[name], atol=1e-6) for name in one)
    assert resumed.tokens_seen == whole.tokens_seen


def test_adam_moments_are_found_by_parameter_name(model: Any, tokenizer: Any, examples: Any, tmp_path: Path) -> None:
    config = TrainConfig(max_steps=2, batch_size=4, precision="fp32", save_checkpoints=2)
    result = run(model, tokenizer, examples, tmp_path / "out", config)
    (checkpoint,) = list_checkpoints(result.path)
    moments = load_adam_moments(checkpoint)
    tuned = load_finetuned(model, checkpoint, trainable=True)
    expected = {name: p.shape for name, p in tuned.named_parameters() if p.requires_grad}
    assert {name: state["exp_avg_sq"].shape for name, state in moments.items()} == expected
    assert all(bool((state["exp_avg_sq"] >= 0).all()) and float(state["step"]) == 2 for state in moments.values())
    # lora_B starts at zero, so the first gradient of lora_A is zero and that of lora_B is not
    assert all(float(s["exp_avg_sq"].max()) > 0 for name, s in moments.items() if "lora_B" in name)
    with pytest.raises(ModelError, match=r"has no optimizer_names.json"):
        load_adam_moments(result.path)


def test_checkpoints_are_the_folders_that_have_a_step(tmp_path: Path) -> None:
    for name in ("checkpoint-10", "checkpoint-5", "checkpoint-best", "checkpoint-", "checkpoint-3-old"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-7").write_text("a file")
    assert [p.name for p in list_checkpoints(tmp_path)] == ["checkpoint-5", "checkpoint-10"]


def test_full_training_moves_every_weight(model: Any, tokenizer: Any, examples: Any, tmp_path: Path) -> None:
    before = [p.detach().clone() for p in model.parameters()]
    loss = loss_of(model, examples)
    config = TrainConfig(epochs=3, learning_rate=3e-3, batch_size=4, precision="fp32")
    result = run(model, tokenizer, examples, tmp_path / "out", config, lora=None)
    assert not result.is_adapter
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    loaded = load_finetuned(model, result.path)
    assert loss_of(loaded, examples) < loss - 0.3
    assert abs(loss_of(loaded, examples) - loss_of(model, examples)) < 1e-6


def test_an_adapter_at_hand_is_trained_further(model: Any, tokenizer: Any, examples: Any, tmp_path: Path) -> None:
    first = run(model, tokenizer, examples, tmp_path / "one")
    tuned = load_finetuned(model, first.path, trainable=True)
    loss = loss_of(tuned, examples)
    with pytest.raises(ModelError, match="already carries a LoRA adapter"):
        run(tuned, tokenizer, examples, tmp_path / "two")
    second = run(tuned, tokenizer, examples, tmp_path / "two", lora=None)
    assert second.is_adapter
    assert loss_of(tuned, examples) < loss


def test_record_names_what_made_the_result(model: Any, tokenizer: Any, examples: Any, tmp_path: Path) -> None:
    result = run(model, tokenizer, examples, tmp_path / "out")
    record = json.loads((result.path / "training.json").read_text())
    assert record["train"]["seed"] == 0
    assert record["lora"]["target_modules"] == "all-linear"
    assert {"torch", "transformers", "peft", "trl"} <= record["result"]["versions"].keys()


def test_training_is_quiet(model: Any, tokenizer: Any, examples: Any, tmp_path: Path, capfd: Any) -> None:
    run(model, tokenizer, examples, tmp_path / "out")
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("packing", [None, 40], ids=["padded", "packed"])
def test_trl_takes_our_labels_and_its_loss_and_gradient_are_those_by_hand(
    model: Any, tokenizer: Any, examples: Any, tmp_path: Path, packing: int | None, recompute: bool
) -> None:
    """All examples in one step: mean over completion tokens, each example seeing itself alone, in float64 by hand."""
    config = TrainConfig(
        max_steps=1, batch_size=len(examples), precision="fp32", packing=packing, gradient_checkpointing=recompute
    )
    reference = copy.deepcopy(model).double()
    counted = sum(int((e["labels"][1:] != -100).sum()) for e in examples)
    loss = torch.zeros((), dtype=torch.float64)
    for e in examples:
        logits = reference(e["input_ids"][None]).logits[0, :-1]
        loss = loss + torch.nn.functional.cross_entropy(logits, e["labels"][1:], reduction="sum") / counted
    loss.backward()
    with sft._packs_apart(model, config):
        trainer = sft.make_trainer(model, tokenizer, examples, tmp_path, config)
        (batch,) = trainer.get_train_dataloader()
        assert ("seq_idx" in batch) == (packing is not None)
        if recompute:
            trainer.model.gradient_checkpointing_enable()  # as trainer.train() does
        trainer.model.train()
        got = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=None)
        got.backward()
    assert abs(got.item() - loss.item()) < 1e-6
    for (name, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert (p.grad - q.grad).norm() < 1e-5 * q.grad.norm(), name


def test_packed_training_learns_and_goes_on_like_padded_training(
    model: Any, tokenizer: Any, examples: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import load_file
    from trl import SFTTrainer

    config = TrainConfig(
        epochs=6, learning_rate=3e-2, batch_size=2, precision="fp32", packing=48, save_checkpoints=True
    )
    loss, before = loss_of(model, examples), model.config._attn_implementation
    whole = run(model, tokenizer, examples, tmp_path / "whole", config)
    assert model.config._attn_implementation == before
    assert whole.tokens_seen == 6 * sum(len(e["input_ids"]) for e in examples)
    tuned = load_finetuned(model, whole.path)
    assert loss_of(tuned, examples) < loss - 0.3
    tuned.unload()
    assert load_adam_moments(whole.checkpoints[-1])

    step, calls = SFTTrainer.training_step, []

    def failing(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(SFTTrainer, "training_step", failing)
    with pytest.raises(KeyboardInterrupt):
        run(model, tokenizer, examples, tmp_path / "out", config)
    resumed = run(model, tokenizer, examples, tmp_path / "out", config)
    one, other = (load_file(r.path / "adapter_model.safetensors") for r in (whole, resumed))
    assert all(torch.allclose(one[name], other[name], atol=1e-6) for name in one)


def test_orders_follow_from_seed_and_epoch_alone() -> None:
    lengths = [5 + 7 * i % 11 for i in range(40)]

    def order(seed: int, epoch: int, grouped: bool = False) -> list[int]:
        return list(sft.EpochOrder(40, lambda: epoch, seed, lengths if grouped else None, group=4))

    made = [tuple(order(seed, epoch, grouped)) for seed in (0, 1) for epoch in (0, 1, 2) for grouped in (False, True)]
    assert len(set(made)) == len(made)
    assert all(sorted(one) == list(range(40)) for one in made)
    torch.manual_seed(5)
    assert tuple(order(0, 0)) == made[0]

    def spread(one: list[int]) -> int:
        parts = [[lengths[i] for i in one[at : at + 4]] for at in range(0, 40, 4)]
        return sum(max(part) - min(part) for part in parts)

    assert spread(order(0, 1, grouped=True)) < spread(order(0, 1)) / 1.5


def counts_of(checkpoint: Path) -> list[Any]:
    """The tokens that a checkpoint's log counts at every step, as trl and as transformers do."""
    log = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    return [(entry["num_tokens"], entry["num_input_tokens_seen"]) for entry in log]


@pytest.mark.parametrize(
    ("accumulation", "packing"),
    [
        pytest.param(1, None, marks=pytest.mark.exhaustive, id="1-padded"),
        pytest.param(1, 48, marks=pytest.mark.exhaustive, id="1-packed"),
        pytest.param(2, None, marks=pytest.mark.exhaustive, id="2-padded"),
        pytest.param(2, 48, id="2-packed"),
    ],
)
def test_a_run_killed_in_any_epoch_goes_on_to_the_very_adapter(
    model: Any,
    tokenizer: Any,
    examples: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    packing: int | None,
    accumulation: int,
) -> None:
    from safetensors.torch import load_file
    from trl import SFTTrainer

    config = TrainConfig(
        max_steps=20,
        learning_rate=3e-2,
        batch_size=2 // accumulation if packing is None else 1,
        gradient_accumulation_steps=accumulation,
        precision="fp32",
        packing=packing,
        save_checkpoints=1,
    )
    lora = LoraSettings(r=4, alpha=8, dropout=0.3)
    step, last = SFTTrainer.training_step, [-1]

    def failing(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == last[0]:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(SFTTrainer, "training_step", failing)
    whole, again = (run(model, tokenizer, examples, tmp_path / name, config, lora=lora) for name in ("one", "two"))
    wanted = load_file(whole.path / "adapter_model.safetensors")
    epochs = [json.loads((c / "trainer_state.json").read_text())["epoch"] for c in whole.checkpoints]
    stops = [max(i + 1 for i, epoch in enumerate(epochs[:-1]) if n < epoch < n + 1) for n in (0, 1, 2)]
    for found in (again, *stops):
        if isinstance(found, int):
            last[0] = found
            with pytest.raises(KeyboardInterrupt):
                run(model, tokenizer, examples, tmp_path / f"to{found}", config, lora=lora)
            last[0] = -1
            found = run(model, tokenizer, examples, tmp_path / f"to{found}", config, lora=lora)
        adapter = load_file(found.path / "adapter_model.safetensors")
        assert [name for name, value in wanted.items() if not torch.equal(value, adapter[name])] == []
        assert counts_of(found.checkpoints[-1]) == counts_of(whole.checkpoints[-1])


def test_packs_whose_examples_see_each_other_are_refused(
    model: Any, tokenizer: Any, examples: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TrainConfig(max_steps=1, packing=40)
    with pytest.raises(ConfigError, match=r"training.packing is 10 tokens, and longer are e\d"):
        run(model, tokenizer, examples, tmp_path / "out", TrainConfig(max_steps=1, packing=10))
    apart = attention.packed_attention
    without = lambda *args, cu_seq_lens_q=None, **kwargs: apart(*args, **kwargs)  # noqa: E731
    monkeypatch.setattr(attention, "packed_attention", without)
    with pytest.raises(ConfigError, match=r"^training.packing: in a pack .* see each other"):
        run(model, tokenizer, examples, tmp_path / "out", config)
    assert model.config._attn_implementation == "sdpa"
    assert list(tmp_path.glob(".out*")) == []


def test_packs_of_a_model_that_keeps_its_own_mask_are_refused(
    model: Any, tokenizer: Any, examples: Any, tmp_path: Path
) -> None:
    """Packed attention has no softcap; trained with it, the model would be another one."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    sizes = {"vocab_size": model.config.vocab_size, "hidden_size": 32, "intermediate_size": 48, "head_dim": 8}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 8}
    capped = Gemma2ForCausalLM(Gemma2Config(**sizes, **heads))
    before = capped.config._attn_implementation
    with pytest.raises(ConfigError, match=r"^training.packing: .*gemma2.*leave packing out"):
        run(capped, tokenizer, examples, tmp_path / "out", TrainConfig(max_steps=1, packing=64))
    assert capped.config._attn_implementation == before


def test_the_model_comes_back_without_trls_patches(model: Any, tokenizer: Any, examples: Any, tmp_path: Path) -> None:
    model.config.eos_token_id, model.generation_config.eos_token_id = 7, [7, 9]
    config = TrainConfig(max_steps=2, batch_size=4, precision="fp32", gradient_checkpointing=True)
    logits = model(examples[0]["input_ids"][None]).logits
    run(model, tokenizer, examples, tmp_path / "out", config)
    assert "forward" not in model.__dict__
    assert (model.config.eos_token_id, model.generation_config.eos_token_id) == (7, [7, 9])
    assert torch.equal(model(examples[0]["input_ids"][None]).logits, logits)
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    model.requires_grad_(False)
    assert not model(examples[0]["input_ids"][None]).logits.requires_grad


@pytest.mark.parametrize("steps", [2, 30])
def test_a_training_that_diverges_leaves_nothing_behind(
    model: Any, tokenizer: Any, examples: Any, tmp_path: Path, steps: int
) -> None:
    """Whether a loss shows it or only the last step's weights; transformers would log the NaN as 0."""
    # The product of two factors of this size is beyond fp32 on every processor.
    config = TrainConfig(max_steps=steps, learning_rate=1e25, batch_size=2, save_checkpoints=1)
    with pytest.raises(NumericError, match=r"lower training\.learning_rate"):
        run(model, tokenizer, examples, tmp_path / "out", config=config)
    assert not list(tmp_path.iterdir())


def test_examples_beyond_the_models_context_are_said(
    model: Any, tokenizer: Any, examples: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    warn_once.cache_clear()
    context = max(len(example["input_ids"]) for example in examples)
    before = model.config.max_position_embeddings
    try:
        model.config.max_position_embeddings = context
        run(model, tokenizer, examples, tmp_path / "fits", config=TrainConfig(max_steps=1))
        assert "context" not in caplog.text
        model.config.max_position_embeddings = context - 1
        run(model, tokenizer, examples, tmp_path / "long", config=TrainConfig(max_steps=1))
        assert f"longer than the model's context of {context - 1} tokens" in caplog.text
    finally:
        model.config.max_position_embeddings = before


def test_bad_input_is_named(model: Any, tokenizer: Any, examples: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no training examples"):
        run(model, tokenizer, [], tmp_path / "out")
    masked = {"id": "mute", "input_ids": torch.arange(5), "labels": torch.full((5,), -100)}
    with pytest.raises(DataError, match="mute"):
        run(model, tokenizer, [*examples, masked], tmp_path / "out")
    with pytest.raises(DataError, match=r"e0.*'labels'"):
        run(model, tokenizer, [{"id": "e0", "input_ids": torch.arange(5)}], tmp_path / "out")
    with pytest.raises(ModelError, match=r"lora\.target_modules"):
        run(model, tokenizer, examples, tmp_path / "out", lora=LoraSettings(target_modules=("nowhere",)))
    with pytest.raises(ModelError, match=r"no adapter_config\.json"):
        load_finetuned(model, tmp_path)
    assert not (tmp_path / "out").exists()
    for bad in (
        {"precision": "fp8"},
        {"schedule": "cosin"},
        {"learning_rate": 0},
        {"epochs": 0},
        {"warmup_ratio": 1},
        {"packing": 1},
    ):
        with pytest.raises(ConfigError):
            TrainConfig(**bad)  # type: ignore[arg-type]
    with pytest.raises(ConfigError):
        LoraSettings(r=0)


def test_a_fresh_adapter(model: Any) -> None:
    ids = torch.tensor([[5, 9, 100, 42, 7, 30]])
    before = model(ids).logits
    loaded: Any = attach_lora(model, LoraSettings(r=3, alpha=12, target_modules=("q_proj", "down_proj")), 0)
    names = {n for n, m in loaded.named_modules() if hasattr(m, "lora_A") and n.endswith("_proj")}
    assert names == {
        f"base_model.model.model.layers.{i}.{n}" for i in (0, 1) for n in ("self_attn.q_proj", "mlp.down_proj")
    }
    module = loaded.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    assert module.scaling["default"] == 4.0
    assert module.lora_A["default"].weight.shape == (3, 32)
    torch.testing.assert_close(loaded(ids).logits, before)  # B is zero: nothing changes yet


def test_a_fresh_adapter_is_the_same_for_the_same_seed(model: Any) -> None:
    factors = []
    for seed in (11, 11, 12):
        loaded = attach_lora(copy.deepcopy(model), LORA, seed)
        factors.append({n: p.clone() for n, p in loaded.named_parameters() if "lora_A" in n})
    assert len(factors[0]) == 2 * 7
    for name, value in factors[0].items():
        assert torch.equal(value, factors[1][name]), name
        assert not torch.equal(value, factors[2][name]), name


@pytest.mark.parametrize(
    ("order", "place"),
    [
        (("model", "examples", "tokenizer"), "the second is a list, which is no tokenizer"),
        (("tokenizer", "model", "examples"), "the first is a .*, which is no model"),
        (("model", "model", "examples"), "the second is a .*, which is no tokenizer"),
        (("model", "tokenizer", "tokenizer"), "the third is a .*, which is no list of examples"),
        (("model", "tokenizer", "nothing"), "the third is a NoneType"),
    ],
)
def test_arguments_in_another_order_are_named(
    model: Any, tokenizer: Any, examples: Any, tmp_path: Path, order: tuple[str, ...], place: str
) -> None:
    given = {"model": model, "tokenizer": tokenizer, "examples": examples, "nothing": None}
    with pytest.raises(ConfigError, match=rf"takes \(model, tokenizer, examples, output_dir\), and {place}") as error:
        run(*(given[name] for name in order), tmp_path / "out")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()
