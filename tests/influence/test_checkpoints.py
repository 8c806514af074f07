"""Weighted sums over the checkpoints of a real fine-tuning, and the ranking on the way, against plain numpy."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

import influence_fast as inf
from influence_fast.errors import ConfigError, DataError, ModelError
from influence_fast.gradients.rows.projection import Projection
from influence_fast.gradients.streaming import stream_influence
from influence_fast.gradients.targets import gradient_layout
from influence_fast.influence.adam import adam_moments
from influence_fast.influence.checkpoints import (
    CheckpointScores,
    checkpoint_scores,
    learning_rates,
    ranking_over_training,
)
from influence_fast.influence.scores import ScoreTable
from influence_fast.report.ranking_plot import plot_ranking_over_training
from influence_fast.statistics.ranks import average_ranks
from influence_fast.training.files import list_checkpoints
from influence_fast.training.fine_tuning import (
    TrainResult,
    finetune,
    load_adam_moments,
    load_finetuned,
)
from influence_fast.training.settings import LoraSettings, TrainConfig

RATE, EPOCHS, BATCH = 3e-2, 3, 4


def make_examples(count: int, seed: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for i in range(count):
        ids = torch.randint(100, 140, (6 + i % 5,), generator=generator)
        labels = ids.clone()
        labels[:2] = -100
        made.append({"id": f"e{i}", "input_ids": ids, "labels": labels})
    return made


POOL, QUERIES = make_examples(14, seed=0), make_examples(3, seed=1)


@pytest.fixture(scope="module")
def base(tiny_model: Any) -> Any:
    return tiny_model("qwen2", initializer_range=0.1)


@pytest.fixture(scope="module")
def trained(base: Any, tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    config = TrainConfig(
        epochs=EPOCHS, learning_rate=RATE, batch_size=BATCH, precision="fp32", warmup_ratio=0.0, save_checkpoints=True
    )
    path = tmp_path_factory.mktemp("run") / "adapter"
    lora = LoraSettings(r=4, alpha=8)
    return finetune(base, tiny_tokenizer(), POOL, path, config=config, lora=lora, progress=False)


def gradients(base: Any, path: Path, examples: list[dict[str, Any]]) -> torch.Tensor:
    model: Any = load_finetuned(base, path)
    try:
        return inf.per_example_gradients(model, examples).double()
    finally:
        model.unload()


@pytest.fixture(scope="module")
def scores(base: Any, trained: TrainResult) -> CheckpointScores:
    def score(path: Path) -> ScoreTable:
        """Streamed, with ids in another order at every checkpoint."""
        model: Any = load_finetuned(base, path)
        try:
            queries = inf.per_example_gradients(model, QUERIES).mean(dim=0, keepdim=True)
            shift = int(path.name.rpartition("-")[2])
            examples = POOL[shift:] + POOL[:shift]
            values = stream_influence(model, examples, queries)[:, 0].double().numpy()
        finally:
            model.unload()
        columns = {"s_correct": values, "rank_correct": average_ranks(values), "mean_rank_correct": values**2}
        columns["tokens"] = np.array([float(len(e["input_ids"])) for e in examples])
        columns["loss"] = values + shift
        return ScoreTable([e["id"] for e in examples], columns)

    return checkpoint_scores(list(zip(trained.checkpoints, learning_rates(trained.checkpoints), strict=True)), score)


def test_rates_are_those_of_the_schedule(trained: TrainResult) -> None:
    steps = EPOCHS * math.ceil(len(POOL) / BATCH)
    schedule = [RATE * (1 + math.cos(math.pi * done / steps)) / 2 for done in range(steps)]  # of steps 1, 2, ...
    at = [int(path.name.rpartition("-")[2]) for path in trained.checkpoints]
    assert at == [4, 8, 12]
    np.testing.assert_allclose(learning_rates(trained.checkpoints), [schedule[step - 1] for step in at], rtol=1e-12)
    mean = [np.mean(schedule[step - 4 : step]) for step in at]
    np.testing.assert_allclose(learning_rates(trained.checkpoints, average=True), mean, rtol=1e-12)
    assert learning_rates(str(trained.path)) == learning_rates(trained.path) == learning_rates(trained.checkpoints)
    assert learning_rates(trained.checkpoints[1]) == learning_rates(trained.checkpoints[1:2])
    # a checkpoint left out belongs to the next one's share
    np.testing.assert_allclose(learning_rates(trained.checkpoints[1:], average=True)[0], np.mean(schedule[:8]))


def test_the_sum_is_weighted_by_the_rates(base: Any, trained: TrainResult, scores: CheckpointScores) -> None:
    assert scores.steps == [4, 8, 12]
    assert scores.total.ids == scores.tables[1].ids == scores.tables[0].ids
    place = {e["id"]: i for i, e in enumerate(POOL)}
    order = [place[name] for name in scores.total.ids]
    expected = np.zeros(len(POOL))
    for path, rate, table in zip(trained.checkpoints, scores.rates, scores.tables, strict=True):
        rows = gradients(base, path, POOL)
        single = (rows @ gradients(base, path, QUERIES).mean(dim=0)).numpy()[order]
        assert np.linalg.norm(table.columns["s_correct"] - single) < 1e-4 * np.linalg.norm(single)
        expected += rate * single
    total = scores.total.columns
    assert np.linalg.norm(total["s_correct"] - expected) < 1e-4 * np.linalg.norm(expected)
    np.testing.assert_array_equal(total["rank_correct"], stats.rankdata(total["s_correct"]))
    weights = np.array(scores.rates) / sum(scores.rates)
    means = sum(w * t.columns["s_correct"] ** 2 for w, t in zip(weights, scores.tables, strict=True))
    np.testing.assert_allclose(total["mean_rank_correct"], means)
    np.testing.assert_array_equal(total["tokens"], [len(POOL[i]["input_ids"]) for i in order])
    np.testing.assert_allclose(total["loss"], scores.tables[-1].columns["s_correct"] + 12)


def test_correlations_are_scipys(scores: CheckpointScores) -> None:
    rows = ranking_over_training(scores)
    assert json.loads(json.dumps(rows)) == rows
    assert [row["checkpoint"] for row in rows] == ["checkpoint-4", "checkpoint-8", "checkpoint-12"]
    values = [table.columns["s_correct"] for table in scores.tables]
    final = scores.total.columns["s_correct"]
    for i, row in enumerate(rows):
        assert row["learning_rate"] == scores.rates[i]
        np.testing.assert_allclose(row["with_sum"], stats.spearmanr(values[i], final).statistic)
        np.testing.assert_allclose(row["with_last"], stats.spearmanr(values[i], values[-1]).statistic)
        if i:
            np.testing.assert_allclose(row["with_previous"], stats.spearmanr(values[i], values[i - 1]).statistic)
    assert rows[0]["with_previous"] is None
    assert rows[0]["with_last"] < 0.999  # the fixture's ranking does move


@pytest.mark.parametrize("suffix", [".svg", ".png"])
def test_the_plot_shows_every_checkpoint(scores: CheckpointScores, tmp_path: Path, suffix: str) -> None:
    path = plot_ranking_over_training(scores, tmp_path / f"plots/ranking{suffix}")
    again = plot_ranking_over_training(scores, tmp_path / f"again{suffix}")
    assert path.read_bytes() == again.read_bytes()
    assert sorted(p.name for p in path.parent.iterdir()) == [path.name]
    if suffix == ".svg":
        text = path.read_text()
        for label in ("optimizer step", "rank correlation", "weighted sum", "highest 5 in the end", "rank of 14"):
            assert label in text
    else:
        from matplotlib.image import imread

        image = imread(path)[..., :3]
        assert image.std() > 0.05


def test_adams_moments_come_from_the_same_checkpoint(base: Any, trained: TrainResult) -> None:
    checkpoint = trained.checkpoints[-1]
    model: Any = load_finetuned(base, checkpoint)
    try:
        layout = gradient_layout(model)
    finally:
        model.unload()
    moments = adam_moments(checkpoint, layout)
    state = load_adam_moments(checkpoint)
    for entry in layout:
        (name,) = [n for n in state if f"{entry.module}.{entry.factor}." in n]
        v = state[name]["exp_avg_sq"].double().flatten() / (1 - 0.999**12)
        torch.testing.assert_close(moments[entry.offset : entry.offset + v.numel()], v, rtol=1e-12, atol=0)


def train_plainly(model: Any, folder: Path, **options: Any) -> Any:
    """A transformers.Trainer over POOL after 4 steps, with a checkpoint of each second one in `folder`."""
    import transformers

    settings = {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 1, "learning_rate": 1e-2}
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), use_cpu=True, report_to=[], disable_tqdm=True, weight_decay=0.1, **(settings | options)
    )
    rows = [{"input_ids": e["input_ids"], "labels": e["labels"]} for e in POOL]
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=rows)  # type: ignore[arg-type]
    trainer.train()
    return trainer


def test_adams_moments_of_a_plain_trainer_are_those_of_its_optimizer(tiny_model: Any, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    targets = ["q_proj", "k_proj", "v_proj", "down_proj"]
    model: Any = get_peft_model(tiny_model("qwen2"), LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM"))
    trainer = train_plainly(model, tmp_path)
    live = {name: trainer.optimizer.state[p]["exp_avg_sq"] for name, p in model.named_parameters() if p.requires_grad}
    layout = gradient_layout(model)
    moments = adam_moments(tmp_path / "checkpoint-4", layout)
    assert len(layout) == len(live) == 16
    for entry in layout:
        v = live[f"{entry.module}.{entry.factor}.default.weight"].double().flatten() / (1 - 0.999**4)
        torch.testing.assert_close(moments[entry.columns], v, rtol=1e-12, atol=0)
        assert float(v.max()) > 0
    top = Projection(dim=3, layers=0.5)
    assert len(adam_moments(tmp_path / "checkpoint-4", layout, projection=top)) == 4 * 2 * 2 * 3


@pytest.mark.parametrize("kind", ["two adapters and a bias", "DoRA", "an embedding"])
def test_a_plain_trainers_moments_of_other_factors(kind: str, tiny_model: Any, tmp_path: Path) -> None:
    """Biases are in a group of their own, without weight decay."""
    from peft import LoraConfig, get_peft_model

    settings: dict[str, Any] = {
        "two adapters and a bias": {"target_modules": ["q_proj", "down_proj"], "lora_bias": True},
        "DoRA": {"target_modules": ["q_proj", "down_proj"], "use_dora": True},
        "an embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    }
    model: Any = get_peft_model(tiny_model("qwen2", num_hidden_layers=1), LoraConfig(r=2, **settings[kind]))
    if kind == "two adapters and a bias":
        model.add_adapter("b", LoraConfig(r=3, target_modules=["q_proj", "v_proj"]))
        model.base_model.set_adapter(["default", "b"])
    trainer = train_plainly(model, tmp_path)
    live = [trainer.optimizer.state[p]["exp_avg_sq"] for p in model.parameters() if p.requires_grad]
    expected = torch.cat([v.double().flatten() for v in live]) / (1 - 0.999**4)
    moments = adam_moments(tmp_path / "checkpoint-4", gradient_layout(model))
    torch.testing.assert_close(moments, expected, rtol=1e-12, atol=0)


def test_moments_that_may_be_of_other_factors_are_refused(tiny_model: Any, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from peft.optimizers import create_loraplus_optimizer

    def adapter(**options: Any) -> Any:
        settings = {"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"} | options
        return get_peft_model(tiny_model("qwen2"), LoraConfig(**settings))

    plain = adapter()
    layout = gradient_layout(plain)
    train_plainly(plain, tmp_path / "sgd", optim="sgd")
    train_plainly(plain, tmp_path / "good")
    good = tmp_path / "good" / "checkpoint-4"
    with pytest.raises(ModelError, match=r"optimizer\.pt is not Adam's: the optimizer is SGD without momentum"):
        adam_moments(tmp_path / "sgd" / "checkpoint-4", layout)
    train_plainly(adapter(bias="all"), tmp_path / "bias")
    with pytest.raises(ModelError, match=r"holds \d+ \+ \d+ parameters in groups, and the adapter is 4 factors in one"):
        adam_moments(tmp_path / "bias" / "checkpoint-4", layout)
    # o_proj has q_proj's shapes here, and only its name tells
    with pytest.raises(ModelError, match="have another adapter's factors than the model"):
        adam_moments(good, gradient_layout(adapter(target_modules=["o_proj"])))
    optimizer = create_loraplus_optimizer(plain, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=4.0)
    sum(p.sum() for p in plain.parameters() if p.requires_grad).backward()
    optimizer.step()
    torch.save(optimizer.state_dict(), good / "optimizer.pt")
    with pytest.raises(ModelError, match="holds 2 \\+ 2 parameters in groups"):
        adam_moments(good, layout)
    (good / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelError, match="cannot be read"):
        adam_moments(good, layout)


def table(ids: str = "abc", **columns: list[float]) -> ScoreTable:
    return ScoreTable(list(ids), {name: np.array(values) for name, values in columns.items()})


def test_mistakes_are_named(scores: CheckpointScores, trained: TrainResult, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no checkpoints"):
        checkpoint_scores([], lambda path: table())
    for rates in ([0.0, 0.0], [1.0, -1.0], [1.0, float("nan")]):
        with pytest.raises(ConfigError, match=r"at least 0, and not all 0: .*b"):
            checkpoint_scores(list(zip("ab", rates, strict=True)), lambda path: table(s_correct=[1, 2, 3]))

    def pair(first: ScoreTable, second: ScoreTable) -> None:
        checkpoint_scores([("one", 1.0), ("two", 1.0)], lambda path: first if path.name == "one" else second)

    with pytest.raises(DataError, match=r"two: .*not of the same examples: c, d"):
        pair(table(s_correct=[1, 2, 3]), table("abd", s_correct=[1, 2, 3]))
    with pytest.raises(DataError, match=r"two: .*differ in column 's_incorrect'"):
        pair(table(s_correct=[1, 2, 3]), table(s_correct=[1, 2, 3], s_incorrect=[1, 2, 3]))
    with pytest.raises(DataError, match="no column 's_incorrect'"):
        ranking_over_training(scores, "s_incorrect")
    with pytest.raises(ConfigError, match=r"written as \.svg, \.png"):
        plot_ranking_over_training(scores, tmp_path / "plot.gif")
    with pytest.raises(ModelError, match=r"has no trainer_state\.json"):
        learning_rates([tmp_path])
    (tmp_path / "checkpoint-best").mkdir()
    with pytest.raises(ModelError, match="has no checkpoint-N folders: name the training's folder"):
        learning_rates(str(tmp_path))
    with pytest.raises(ConfigError, match="checkpoint-4 is of step 4, after step 12: list checkpoints in training"):
        learning_rates(list_checkpoints(trained.path)[::-2])
    (tmp_path / "trainer_state.json").write_text(json.dumps({"global_step": 3, "log_history": [{"step": 5}]}))
    with pytest.raises(ModelError, match="logs no learning rate up to step 3"):
        learning_rates([tmp_path])
    (tmp_path / "trainer_state.json").write_text("[]")
    with pytest.raises(ModelError, match="not a Trainer's state"):
        learning_rates([tmp_path])


@pytest.mark.parametrize("beta2", [0.95, 0.999])
def test_moments_are_corrected_by_the_optimizers_own_beta(tiny_lora: Any, tmp_path: Path, beta2: float) -> None:
    model = tiny_lora()
    trainer = train_plainly(model, tmp_path, adam_beta2=beta2)
    layout = gradient_layout(model)
    live = {name: trainer.optimizer.state[p]["exp_avg_sq"] for name, p in model.named_parameters() if p.requires_grad}
    moments = adam_moments(tmp_path / "checkpoint-4", layout)
    for entry in layout:
        v = live[f"{entry.module}.{entry.factor}.default.weight"].double().flatten() / (1 - beta2**4)
        torch.testing.assert_close(moments[entry.columns], v, rtol=1e-12, atol=0)


def test_moments_that_accelerate_saved_are_read(tiny_lora: Any, tmp_path: Path) -> None:
    """Its save_state writes optimizer.bin beside the whole model, whose factors keep the adapter's name."""
    from safetensors.torch import save_file

    model = tiny_lora()
    train_plainly(model, tmp_path)
    checkpoint, saved = tmp_path / "checkpoint-4", tmp_path / "accelerate"
    layout = gradient_layout(model)
    expected = adam_moments(checkpoint, layout)
    saved.mkdir()
    (checkpoint / "optimizer.pt").rename(saved / "optimizer.bin")
    save_file({name: p.detach().clone() for name, p in model.named_parameters()}, saved / "model.safetensors")
    torch.testing.assert_close(adam_moments(saved, layout), expected, rtol=0, atol=0)


def test_moments_that_fsdp_gathered_are_read_by_name(tiny_lora: Any, tmp_path: Path) -> None:
    model = tiny_lora()
    train_plainly(model, tmp_path)
    checkpoint = tmp_path / "checkpoint-4"
    layout = gradient_layout(model)
    expected = adam_moments(checkpoint, layout)
    loaded = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    groups = [group for group in loaded["param_groups"] if group["params"]]
    groups[0]["params"] = names[::-1]
    state = {name: loaded["state"][i] for i, name in enumerate(names)}
    torch.save({"state": state, "param_groups": groups}, checkpoint / "optimizer.bin")
    (checkpoint / "optimizer.pt").unlink()
    torch.testing.assert_close(adam_moments(checkpoint, layout), expected, rtol=0, atol=0)
