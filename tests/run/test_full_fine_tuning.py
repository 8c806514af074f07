"""Scores of a fully fine-tuned model, from its training to the command line."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from worlds import write_model, write_rows

import influence_fast as inf
from influence_fast.cli import main
from influence_fast.config import load_config
from influence_fast.errors import ConfigError, ModelError
from influence_fast.gradients.rows.projection import Projection
from influence_fast.gradients.targets import gradient_layout
from influence_fast.influence.adam import adam_moments
from influence_fast.influence.checkpoints import checkpoint_scores, learning_rates
from influence_fast.store.queries import query_gradients
from influence_fast.training.fine_tuning import finetune, load_adam_states, load_finetuned
from influence_fast.training.settings import TrainConfig

ALL = "all-linear"
EXACT = Projection("none", target=ALL)


def make_gpt2() -> Any:
    from transformers import AutoModelForCausalLM, GPT2Config

    torch.manual_seed(0)
    sizes = {"vocab_size": 320, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    return AutoModelForCausalLM.from_config(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).eval()


def make_examples(count: int = 8) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(5, 300, (6 + n,), generator=generator) for n in range(count)]
    return [{"id": str(n), "input_ids": i, "labels": i} for n, i in enumerate(ids)]


@pytest.fixture(scope="module")
def trained(tiny_tokenizer: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of `finetune(lora=None)` with a checkpoint an epoch; `data.jsonl` beside it."""
    folder = tmp_path_factory.mktemp("full")
    config = TrainConfig(epochs=2, batch_size=4, learning_rate=1e-3, save_checkpoints=True, precision="fp32")
    finetune(make_gpt2(), tiny_tokenizer(), make_examples(), folder / "model", config=config, lora=None, progress=False)
    rows = [{"question": f"What is {n} + 1?", "solution": f"{n + 1}", "answer": f"{n + 1}"} for n in range(12)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_adam_moments_of_whole_weights_keep_their_orientation(trained: Path) -> None:
    """GPT-2's square Conv1D would fit the wrong way round too."""
    checkpoint = trained / "model" / "checkpoint-4"
    layout = gradient_layout(make_gpt2(), EXACT)
    states = load_adam_states(checkpoint)
    by_hand = [states[f"{entry.module}.weight"].unbiased.T for entry in layout]
    expected = torch.cat([block.flatten() for block in by_hand]).double()
    torch.testing.assert_close(adam_moments(checkpoint, layout), expected)
    kron = Projection("kron", dim=4, target=ALL)
    found = adam_moments(checkpoint, layout, projection=kron).view(len(layout), 16)
    means = torch.stack([block.double().sum() / 16 for block in by_hand])
    torch.testing.assert_close(found, means[:, None].expand(-1, 16))


def test_adam_moments_of_numbered_weights_are_refused(trained: Path, tmp_path: Path) -> None:
    import shutil

    from influence_fast.training.sft import NAMES

    shutil.copytree(trained / "model" / "checkpoint-4", tmp_path / "trainers")
    (tmp_path / "trainers" / NAMES).unlink()
    with pytest.raises(ModelError, match=r"which weight's cannot be told.*lora=None and save_checkpoints"):
        adam_moments(tmp_path / "trainers", gradient_layout(make_gpt2(), EXACT))


def test_scores_over_full_checkpoints_are_their_weighted_sum(trained: Path, tmp_path: Path) -> None:
    pool, base = make_examples(), make_gpt2()

    def gradients(path: Path) -> torch.Tensor:
        return inf.per_example_gradients(load_finetuned(base, path), pool, projection=EXACT)

    def score(path: Path) -> inf.ScoreTable:
        model = load_finetuned(base, path)
        store = inf.build_store(tmp_path / path.name, model, pool, inf.RowSpec.of(EXACT, dtype="fp32"))
        queries = query_gradients(store, model, pool[:2])
        return inf.Scorer.fit(store, preconditioner="none").scores(queries, {"correct": [0, 1]})

    folders = sorted((trained / "model").glob("checkpoint-*"))
    rates = learning_rates(folders, average=True)
    found = checkpoint_scores(list(zip(folders, rates, strict=True)), score)
    each = [gradients(path) for path in folders]
    expected = sum(rate * (rows @ rows[:2].mean(dim=0)) for rate, rows in zip(rates, each, strict=True))
    torch.testing.assert_close(torch.as_tensor(found.total.columns["s_correct"]).float(), expected, rtol=1e-4, atol=0)
    assert len(folders) == 2


def command(trained: Path, verb: str, *more: Any) -> list[str]:
    given = [verb, "--model", trained / "model", "--data", trained / "data.jsonl", "--device", "cpu", "--quiet", *more]
    return list(map(str, given))


def test_command_line_builds_and_scores_a_full_model(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = ["--target", "c_attn", "c_proj", "--dim", "4"]
    assert main(command(trained, "build", "--output", tmp_path / "s", *target)) == 0
    store = inf.open_store(tmp_path / "s")
    assert store.projection == Projection("kron", dim=4, target=("c_attn", "c_proj"))
    assert store.identity.adapter_hash is None
    asked = ["--validation", trained / "data.jsonl", "--validation-limit", 3, "--queries", "reference"]
    asked += ["--fisher-examples", 4]
    assert main(command(trained, "score", *asked, "--output", tmp_path / "s.csv", *target)) == 0
    assert len(inf.ScoreTable.load(tmp_path / "s.csv").ids) == 12
    moments = ["--preconditioner", "less", "--optimizer", trained / "model" / "checkpoint-4"]
    assert main(command(trained, "score", *asked[:-2], "--output", tmp_path / "l.csv", *target, *moments)) == 0
    capsys.readouterr()
    assert main(command(trained, "build", "--output", tmp_path / "s", "--target", ALL, "--dim", "4")) == 2
    assert "projection_target is" in capsys.readouterr().err


def test_command_line_wants_an_adapter_or_a_target(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(trained, "build", "--output", "o")) == 2
    assert "give --adapter" in capsys.readouterr().err
    assert main(command(trained, "build", "--output", "o", "--target", ALL, "--adapter", "a")) == 2
    assert "leave out --adapter" in capsys.readouterr().err


def test_a_run_that_trains_adapters_takes_no_target(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "output: o\nmodel: {path: m}\ndata: {pool: p.jsonl, holdout_validation: 2, holdout_test: 2}\n"
        "gradients: {target: [q_proj, v_proj]}\n"
    )
    with pytest.raises(ConfigError, match=r"gradients.target is of a fully fine-tuned model"):
        load_config(file)
    file.write_text(file.read_text().replace("{path: m}", "{path: m, adapter: a}"))
    assert load_config(file).gradients.projection() == Projection("kron", dim=64, target=("q_proj", "v_proj"))
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"gradients.target is of a fully fine-tuned model"):
        load_config(file)


def test_a_run_scores_a_full_model_that_it_is_given(tmp_path: Path) -> None:
    from influence_fast.run import dry_run
    from influence_fast.run.pipeline import Pipeline

    write_model(tmp_path / "full")
    for name, n in (("pool", 8), ("validation", 4), ("test", 2)):
        write_rows(tmp_path / f"{name}.jsonl", n, seed=n)
    file = tmp_path / "run.yaml"
    file.write_text(
        "output: o\nmodel: {path: full, adapter: full}\nlora: {r: 2}\ngradients: {dim: 4, target: all-linear}\n"
        "data: {pool: pool.jsonl, validation: validation.jsonl, test: test.jsonl}\ntraining: {max_steps: 1}\n"
        "influence: {queries: reference}\npruning: {strategies: [random]}\n"
    )
    config = dataclasses.replace(load_config(file), output=str(tmp_path / "o"))
    pipeline = Pipeline(config, progress=False)
    scores = pipeline.scores(pipeline.reference_adapter(), pipeline.queries(pipeline.reference_adapter()))
    store = inf.open_store(tmp_path / "o" / "store")
    assert store.projection == Projection("kron", dim=4, target=ALL)
    assert store.width == dry_run.plan(config).row
    assert len(scores.ids) == 8
