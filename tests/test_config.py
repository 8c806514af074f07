"""Configurations: every mistake is one line that names the key."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from transformers import set_seed

from influence_fast.cli import main
from influence_fast.config import load_config
from influence_fast.errors import ConfigError
from influence_fast.settings import MAX_SEED, MAX_TRAINING_SEED, check_seed, difference, to_dict

GOOD = {
    "output": "out",
    "model": {"path": "some/model"},
    "data": {"pool": "pool.jsonl", "validation": {"path": "v.jsonl", "limit": 5}, "test": "t.jsonl"},
}


def write(folder: Path, changes: dict) -> Path:
    raw = yaml.safe_load(yaml.safe_dump(GOOD))
    for dotted, value in changes.items():
        *parents, last = dotted.split(".")
        place = raw
        for key in parents:
            place = place.setdefault(key, {})
        place[last] = value
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def test_paths_are_taken_from_the_files_own_folder(tmp_path: Path) -> None:
    for name in ("adapter", "scores.npz", "a-store"):
        (tmp_path / name).mkdir()
    (tmp_path / "a-store" / "manifest.json").touch()
    changes = {"model.adapter": "adapter", "validate.external": {"other": "scores.npz"}}
    changes |= {"gradients.sketch": "a-store", "gradients.width": 64}
    changes |= {"validate.methods": ["cosine", {"name": "small", "proxy": "adapter"}]}
    config = load_config(write(tmp_path, changes))
    assert config.model.adapter == str(tmp_path / "adapter")
    assert config.validate.external == {"other": str(tmp_path / "scores.npz")}
    assert config.validate.methods == ("cosine", {"name": "small", "proxy": str(tmp_path / "adapter")})
    assert config.gradients.sketch == str(tmp_path / "a-store")
    assert config.model.path == "some/model"


def test_merge_keys_are_read(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    common = "training: &t {epochs: 2, batch_size: 4}\nvalidate: {processes: 2}\n"
    path.write_text(yaml.safe_dump(GOOD) + common + "lora: {r: 4}\n")
    assert load_config(path).training.epochs == 2
    path.write_text(yaml.safe_dump(GOOD) + "evaluation: {<<: {samples: 2, temperature: 1.0}, seed: 3}\n")
    assert (load_config(path).evaluation.samples, load_config(path).evaluation.seed) == (2, 3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("output: {{ path }}\n", "is no key"),
        ("output: a\noutput: b\n", "the key 'output' comes twice"),
        ("output: caf\xe9\n", "not UTF-8"),
        ("training: {epochs: .nan}\n", "training.epochs: expected a finite number"),
        ("training: {learning_rate: .inf}\n", "training.learning_rate: expected a finite number"),
        ("pruning: {fractions: [.nan]}\n", "expected a finite number"),
        ("data: {pool: {path: x, columns: {prompt: 3}}}\n", "data.pool.columns.prompt: expected str, not 3"),
        ("validate: {external: {a: 3}}\n", "validate.external.a: expected str, not 3"),
        ("seed: -1\n", "seed: -1 is below 0"),
        (f"seed: {2**64}\n", "seed: 18446744073709551616 is above"),
        (f"pruning: {{seeds: [0, {2**32}]}}\n", "pruning.seeds: 4294967296 is above"),
        ("validate: {seeds: [-1]}\n", "validate.seeds: -1 is below 0"),
        (f"training: {{seed: {2**32}}}\n", "training.seed: 4294967296 is above"),
        (f"evaluation: {{seed: {2**64}}}\n", "evaluation.seed: 18446744073709551616 is above"),
        ("gradients: {max_tokens: 0}\n", "gradients.max_tokens is 0"),
        ("data: {pool: p, validation: v, test: t, holdout_test: 3}\n", "data.holdout_test: there is a test source"),
    ],
)
def test_mistakes_in_the_file(tmp_path: Path, text: str, message: str) -> None:
    rest = {key: value for key, value in GOOD.items() if f"{key}:" not in text}
    path = tmp_path / "config.yaml"
    path.write_bytes(text.encode("latin-1") + yaml.safe_dump(rest).encode())
    with pytest.raises(ConfigError, match=message):
        load_config(path)


def test_values_arrive_where_they_belong(tmp_path: Path) -> None:
    changes = {"training.learning_rate": "1e-4", "pruning.fractions": 0.2, "pruning.seeds": [3, 4], "gradients.dim": 8}
    config = load_config(write(tmp_path, changes))
    assert config.training.learning_rate == 1e-4
    assert config.pruning.fractions == (0.2,)
    assert config.pruning.seeds == (3, 4)
    assert config.gradients.dim == 8
    assert config.data.pool.path == "pool.jsonl"
    assert config.data.validation is not None
    assert config.data.validation.limit == 5


def test_files_beside_the_configuration_are_found(tmp_path: Path) -> None:
    (tmp_path / "pool.jsonl").write_text("{}")
    config = load_config(write(tmp_path, {}))
    assert config.data.pool.path == str(tmp_path / "pool.jsonl")
    assert config.data.test is not None
    assert config.data.test.path == "t.jsonl"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trainign": {}}, "unknown key 'trainign'; did you mean 'training'"),
        ({"training.epoch": 2}, "unknown key 'training.epoch'; did you mean 'epochs'"),
        ({"training.epochs": "many"}, "training.epochs: expected float, not 'many'"),
        ({"pruning.strategies": ["combine"]}, "unknown value 'combine'; did you mean 'combined'"),
        ({"pruning.fractions": [1.5]}, "1.5 is not between 0 and 1"),
        ({"pruning.seeds": ["a"]}, r"pruning.seeds\[0\]: expected int"),
        ({"pruning.max_similar": 1.5}, "max_similar 1.5 is not above 0 and at most 1"),
        ({"pruning.pass_rate_samples": 0}, "pass_rate_samples must be at least 1"),
        ({"influence.queries": "reference"}, "'high_harm' reads the model's wrong answers"),
        ({"influence.preconditioner": "fischer"}, "did you mean 'fisher'"),
        ({"gradients.kind": "onesided"}, "did you mean 'one_sided'"),
        ({"gradients.store_dtype": "fp8"}, "gradients.store_dtype"),
        ({"data.validation": None}, "holdout_validation"),
        ({"model": "x"}, "model: expected a mapping"),
        ({"model": {}}, "missing key 'model.path'"),
        ({"target_model": {"path": "m", "adapter": "a"}}, "target_model.adapter"),
        ({"pruning.seeds": [1, 1]}, "no different seeds"),
        ({"pruning.fractions": [0.101, 0.1]}, "a strategy or fraction comes twice"),
    ],
    ids=lambda value: str(value) if isinstance(value, str) else next(iter(value)),
)
def test_mistakes_are_named(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(write(tmp_path, changes))


def test_broken_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text("a: [1")
    with pytest.raises(ConfigError, match=r"broken\.yaml: not valid YAML"):
        load_config(path)
    path.write_text("- 1")
    with pytest.raises(ConfigError, match="mapping of keys, not list"):
        load_config(path)
    with pytest.raises(ConfigError, match="no such configuration"):
        load_config(tmp_path / "absent.yaml")


def test_difference_names_the_first_key_that_differs(tmp_path: Path) -> None:
    one = to_dict(load_config(write(tmp_path, {})))
    other = to_dict(load_config(write(tmp_path, {"training.epochs": 9})))
    assert difference(one, one) is None
    assert difference(one, other) == "training.epochs: 3.0 against 9.0"


def test_the_demo_recipe_is_the_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    from influence_fast.run import demo

    world = demo.DemoWorld(Path("demo-run-world"), Path("demo-run-world/model"), [], [], [])
    monkeypatch.setattr(demo, "make_world", lambda *_, **__: world)
    recipe, own = (
        to_dict(c)
        for c in (
            load_config(Path(__file__).parents[1] / "recipes/demo.yaml"),
            demo.demo_config("runs/demo", progress=False),
        )
    )
    assert difference(recipe, own) is None


@pytest.mark.parametrize("path", sorted(Path(__file__).parents[1].glob("recipes/*.yaml")), ids=lambda p: p.name)
def test_recipes_load(path: Path) -> None:
    config = load_config(path)
    assert config.pruning.strategies
    assert config.output.startswith("runs/")


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("title: 2024-13-45", "line 1"),
        ("seed: " + "9" * 5000, "is no int"),
        ("output: " + "[" * 100_000, "nested too deeply"),
        (
            "a: &a [x, x]\nb: &b [*a, *a]\n"
            + "\n".join(f"c{i}: &c{i} [*{'b' if i == 0 else f'c{i - 1}'}, *b]" for i in range(9)),
            "unknown key 'a'",
        ),
        ("output: &a [*a]", "an alias stands for what it is a part of"),
        ("title: x\n" * 30_000, "more than 200,000 bytes"),
        ("!!map [a]", "not valid YAML"),
        ("seed: 0x" + "f" * 5000, "is no int"),
    ],
    ids=["date", "digits", "deep", "few-aliases", "recursive", "large", "tag", "hex"],
)
def test_yaml_that_is_out_to_break_it_is_told_in_a_line(tmp_path: Path, text: str, part: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError) as error:
        load_config(tmp_path / "c.yaml")
    assert "c.yaml: " in str(error.value)
    assert part in str(error.value)


@pytest.mark.parametrize("merged", [False, True], ids=["lists", "merges"])
def test_aliases_are_counted_before_they_are_followed(tmp_path: Path, merged: bool) -> None:
    lines = ["l0: &l0 {a: 1}"]
    for i in range(1, 40):
        lines.append(f"l{i}: &l{i} " + (f"{{<<: [*l{i - 1}, *l{i - 1}]}}" if merged else f"[*l{i - 1}, *l{i - 1}]"))
    (tmp_path / "c.yaml").write_text("\n".join(lines))
    with pytest.raises(ConfigError, match="use fewer aliases"):
        load_config(tmp_path / "c.yaml")


def test_values_in_messages_are_cut(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(f"output: [{', '.join(['x' * 50] * 1000)}]")
    with pytest.raises(ConfigError) as error:
        load_config(tmp_path / "c.yaml")
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize(
    ("verb", "above"),
    [
        ("train --model m --data d --output o", 2**32),
        ("eval --model m --data d --output o", 2**64),
        ("check --model m --adapter a --data d", 2**64),
        ("prune --scores s --data d --fraction 0.1 --output o", 2**64),
        ("demo --output o", 2**64),
    ],
)
def test_a_seed_that_no_generator_takes_is_refused_at_once(
    verb: str, above: int, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed in (above, -1, "x"):
        with pytest.raises(SystemExit) as stopped:
            main([*verb.split(), "--seed", str(seed)])
        assert stopped.value.code == 2
        assert str(seed) in capsys.readouterr().err


def test_the_largest_seeds_are_taken() -> None:
    check_seed("seed", MAX_SEED)
    torch.manual_seed(MAX_SEED)
    set_seed(MAX_TRAINING_SEED)  # what a trainer calls


@pytest.mark.parametrize("name", ["\ud800", "a" * 300, "a\0b"], ids=["half a pair", "too long", "nul"])
def test_a_sketch_that_is_no_file_name_is_told(tmp_path: Path, name: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("output: o\ngradients: {width: 64, sketch: " + json.dumps(name) + "}\n")
    with pytest.raises(ConfigError, match="cannot be the name of a file or folder"):
        load_config(path)
