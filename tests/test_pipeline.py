"""The whole road on a tiny model: every piece is there, the run can be taken up again, mistakes are one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from influence_fast import pipeline
from influence_fast.cli import main
from influence_fast.config import load_config
from influence_fast.data import load_examples
from influence_fast.errors import ConfigError
from influence_fast.scores import ScoreTable

WORDS = ["<pad>", "<eos>", "<unk>", "what", "is", "plus", "The", "answer", "#", *map(str, range(20))]


def write_model(folder: Path) -> None:
    vocabulary = {word: i for i, word in enumerate(WORDS)}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
        eos_token_id=1,
        pad_token_id=0,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)


def write_rows(path: Path, n: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    lines = []
    for i in range(n):
        a, b = (int(v) for v in rng.integers(0, 3, 2))
        wrong = i % 4 == 0
        answer = a + b + wrong
        row = {"id": f"{path.stem}-{i}", "prompt": f"what is {a} plus {b}", "completion": f"The answer is {answer}"}
        lines.append(json.dumps(row | {"answer": str(a + b), "label": "wrong_answer" if wrong else "clean"}))
    path.write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_model(folder / "model")
    for name, n in (("pool", 40), ("validation", 24), ("test", 10)):
        write_rows(folder / f"{name}.jsonl", n, seed=n)
    settings = {
        "output": str(folder / "run"),
        "model": {"path": "model"},
        "data": {"pool": "pool.jsonl", "validation": "validation.jsonl", "test": "test.jsonl"},
        "training": {"epochs": 20, "learning_rate": 5e-3, "batch_size": 8},
        "lora": {"r": 4, "alpha": 8},
        "gradients": {"dim": 4},
        "influence": {"preconditioner": "fisher"},
        "pruning": {"strategies": ["random", "combined", "perplexity_high"], "fractions": [0.25]},
        "evaluation": {"max_new_tokens": 6},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    return folder


@pytest.fixture(scope="module")
def results(world: Path) -> dict[str, Any]:
    return pipeline.run(load_config(world / "config.yaml"), progress=False)


def test_every_piece_is_there(world: Path, results: dict[str, Any]) -> None:
    run = world / "run"
    assert [cell["strategy"] for cell in results["cells"]] == ["full", "random", "combined", "perplexity_high"]
    assert [cell["dropped"] for cell in results["cells"]] == [0, 10, 10, 10]
    assert all(0 <= cell["low"] <= cell["accuracy"] <= cell["high"] <= 1 for cell in results["cells"])
    assert results["cells"][1]["harmful_total"] == 10
    assert results["cells"][1]["expected_by_chance"] == 2.5
    assert results["queries"]["correct"] > 0
    assert results["queries"]["incorrect"] > 0
    table = ScoreTable.load(run / "scores.csv")
    assert table.ids == [f"pool-{i}" for i in range(40)]
    assert {"s_correct", "s_incorrect", "rank_correct", "mean_rank_incorrect", "loss", "tokens"} <= set(table.columns)
    page = (run / "report.html").read_text()
    assert "<html" in page
    assert "perplexity_high" in page
    assert json.loads((run / "results.json").read_text())["cells"] == results["cells"]
    assert yaml.safe_load((run / "config.yaml").read_text())["gradients"]["dim"] == 4
    assert len((run / "transcripts" / "base.jsonl").read_text().splitlines()) == 10


def test_pruned_data_keeps_the_inputs_own_rows(world: Path, results: dict[str, Any]) -> None:
    kept = [json.loads(line) for line in (world / "run/pruned/combined-25.jsonl").read_text().splitlines()]
    original = [json.loads(line) for line in (world / "pool.jsonl").read_text().splitlines()]
    assert len(kept) == 30
    assert all(row in original for row in kept)


def test_scores_are_inner_products_of_exact_pieces(world: Path, results: dict[str, Any]) -> None:
    """The table against a float64 computation from scratch: gradients, damped Fisher, mean over the groups."""
    import influence_fast as inf
    from influence_fast.data import tokenize
    from influence_fast.models import load_model, load_tokenizer
    from influence_fast.scoring import module_blocks
    from influence_fast.training import load_finetuned

    run = world / "run"
    model = load_finetuned(load_model(world / "model"), run / "adapters" / "full-seed0").double()
    tokenizer = load_tokenizer(world / "model")
    projection = inf.Projection(dim=4)
    pool = tokenize(load_examples(world / "pool.jsonl"), tokenizer).examples
    rows = inf.per_example_gradients(model, pool, projection=projection)
    answers = json.loads((run / "own_answers.json").read_text())["value"]
    queries = pipeline.make_queries(load_examples(world / "validation.jsonl"), answers, None)
    asked = inf.per_example_gradients(model, tokenize(queries.examples, tokenizer).examples, projection=projection)
    scores = torch.zeros(len(pool), len(queries.examples), dtype=torch.float64)
    for start, end in module_blocks(inf.gradient_layout(model, projection)):
        block = rows[:, start:end]
        fisher = block.T @ block / len(rows)
        damped = fisher + 0.1 * fisher.diagonal().mean() * torch.eye(end - start)
        scores += block @ torch.linalg.solve(damped, asked[:, start:end].T)
    table = ScoreTable.load(run / "scores.parquet")
    for group, members in queries.groups.items():
        expected = scores[:, members].mean(dim=1).numpy()
        got = table.columns[f"s_{group}"]
        # the store holds bf16: 2^-9 a number, averaged over a row
        assert np.linalg.norm(got - expected) < 2e-2 * np.linalg.norm(expected)


def test_a_second_run_computes_nothing_again(
    world: Path, results: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("computed again")

    for name in ("build_store", "evaluate", "per_example_gradients", "score_pool"):
        monkeypatch.setattr(pipeline, name, refuse)
    again = pipeline.run(load_config(world / "config.yaml"), progress=False)
    assert again["cells"] == results["cells"]
    assert again["queries"] == results["queries"]


def test_an_interrupted_run_goes_on(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped at its second cell, then run again: the finished pieces stay and the outcome is that of one run."""
    import dataclasses

    config = dataclasses.replace(load_config(world / "config.yaml"), output=str(tmp_path / "run"))
    finetune, calls = pipeline.finetune, []

    def stops(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return finetune(*args, **kwargs)

    monkeypatch.setattr(pipeline, "finetune", stops)
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(config, progress=False)
    assert not (tmp_path / "run" / "report.html").exists()
    monkeypatch.setattr(pipeline, "finetune", finetune)
    resumed = pipeline.run(config, progress=False)
    reference = json.loads((world / "run" / "results.json").read_text())
    strip = lambda cells: [{k: v for k, v in cell.items() if k != "seconds"} for cell in cells]  # noqa: E731
    assert strip(resumed["cells"]) == strip(reference["cells"])


def test_another_configuration_does_not_overwrite_a_run(world: Path, results: dict[str, Any]) -> None:
    raw = yaml.safe_load((world / "config.yaml").read_text())
    raw["gradients"]["dim"] = 8
    (world / "other.yaml").write_text(yaml.safe_dump(raw))
    with pytest.raises(ConfigError, match=r"another configuration \(gradients.dim: 4 against 8\)"):
        pipeline.run(load_config(world / "other.yaml"), progress=False)


@pytest.mark.parametrize("empty", ["correct", "incorrect"])
def test_an_empty_group_is_said_by_name(world: Path, empty: str) -> None:
    validation = load_examples(world / "validation.jsonl")
    answers = [{"id": e.id, "generation": "The answer", "correct": empty == "incorrect"} for e in validation]
    with pytest.raises(ConfigError, match=f"there is no {empty} group"):
        pipeline.make_queries(validation, answers, None)
    if empty == "correct":
        queries = pipeline.make_queries(validation, answers, "reference")
        assert len(queries.groups["correct"]) == len(queries.groups["incorrect"]) == len(validation)
        assert queries.warnings


def test_the_verbs_one_by_one(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*arguments: Any) -> str:
        code = main([str(a) for a in arguments])
        captured = capsys.readouterr()
        assert code == 0, captured.err
        return captured.out

    model, pool, validation = world / "model", world / "pool.jsonl", world / "validation.jsonl"
    adapter, scores, kept = tmp_path / "adapter", tmp_path / "scores.csv", tmp_path / "kept.jsonl"
    run("train", "--model", model, "--data", pool, "--output", adapter, "--epochs", 2, "--rank", 4, "--quiet")
    out = run(
        "score", "--model", model, "--adapter", adapter, "--data", pool, "--validation", validation,
        "--queries", "reference", "--output", scores, "--dim", 4, "--quiet",
    )  # fmt: skip
    assert "40 examples against 24 correct answers" in out
    assert "rows=40" in run("inspect", f"{scores}.store")
    assert "every checksum holds" in run("verify", f"{scores}.store")
    out = run("prune", "--data", pool, "--scores", scores, "--strategy", "low_benefit", "--count", 7, "--output", kept)
    assert "kept 33 and dropped 7 of 40" in out
    assert len(kept.read_text().splitlines()) == 33
    table = ScoreTable.load(f"{kept}.table.csv")
    assert table.columns["kept"].sum() == 33
    out = run(
        "eval", "--model", model, "--adapter", adapter, "--data", world / "test.jsonl",
        "--output", tmp_path / "t.jsonl", "--max-new-tokens", 6, "--quiet",
    )  # fmt: skip
    assert "accuracy 0." in out
    assert "gradients: torch" in run("doctor")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "absent.yaml"], "no such configuration file"),
        (["prune", "--data", "{pool}", "--scores", "absent.csv", "--strategy", "combined", "--fraction", "0.1",
          "--output", "x.jsonl"], "no such score table"),
        (["score", "--model", "{model}", "--adapter", "x", "--data", "{pool}", "--validation", "{pool}",
          "--output", "s.csv", "--preconditioner", "fischer"], "did you mean 'fisher'"),
        (["eval", "--model", "{world}/absent/model", "--data", "{pool}", "--output", "x.jsonl"], "absent/model"),
        (["train", "--model", "{model}", "--data", "{world}/absent.jsonl", "--output", "x"], "absent.jsonl"),
        (["report", "{world}/absent"], "absent"),
        (["inspect", "{world}/absent"], "absent"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line_and_exit_code_2(
    world: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    fill = {"world": world, "model": world / "model", "pool": world / "pool.jsonl"}
    code = main([argument.format(**fill) for argument in arguments])
    error = capsys.readouterr().err
    assert code == 2
    assert message in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
