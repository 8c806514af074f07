"""A base model spread over processes (FSDP2): the same gradients and the same store, by torchrun and gloo on a CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from influence_fast.cli import main
from influence_fast.distributed.processes import World, init_group
from influence_fast.errors import ConfigError, ModelError
from influence_fast.gradients.rows.eigen_sketch import FILES
from influence_fast.gradients.sharded import shard_model
from influence_fast.store.reader import open_store
from influence_fast.store.verification import verify_store

WORKER = """
import gc, json, sys
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, {kind}Config
from influence_fast.cli import main
from influence_fast.distributed.processes import World, close_group, init_group
from influence_fast.data.fingerprints import weight_hashes
from influence_fast.errors import ModelError
from influence_fast.gradients.per_example import per_example_gradients, per_example_losses
from influence_fast.gradients.rows.projection import Projection
from influence_fast.gradients.rows.row_spec import RowSpec
from influence_fast.gradients.sharded import LockstepRows, shard_model

def make():
    torch.manual_seed(0)
    config = {kind}Config(vocab_size=320, hidden_size=32, intermediate_size=56, num_hidden_layers=3,
                          num_attention_heads=4, num_key_value_heads=2)
    base = AutoModelForCausalLM.from_config(config)
    for name, parameter in base.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.2)
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()

generator = torch.Generator().manual_seed(1)
examples = []
for i in range(13):
    ids = torch.randint(5, 300, (int(torch.randint(3, 40, (), generator=generator)),), generator=generator)
    examples.append(dict(id=f"e{{i}}", input_ids=ids, labels=ids.clone()))
world = World.from_environment()
mesh, group = init_group(world, 2, "cpu")
found = {{}}
for name, projection in dict(exact=None, projected=Projection(dim=4), sketched=Projection(dim=4, width=64)).items():
    model = make()
    expected = per_example_gradients(model, examples, projection=projection)
    own_losses, losses = per_example_losses(model, examples), torch.full((len(examples),), torch.nan)
    hashes = weight_hashes(model)
    whole = sum(p.numel() for n, p in model.named_parameters() if ".layers." in n and "lora_" not in n)
    shard_model(model, mesh)
    held = sum(p.to_local().numel() for p in model.parameters() if hasattr(p, "to_local"))
    rows = torch.full_like(expected, torch.nan)
    spec = RowSpec.of(projection, max_tokens=50)
    for places, batch in LockstepRows(group)(model, examples, spec, skip=[0], losses=losses):
        rows[places] = batch
    again = per_example_gradients(model, examples, projection=projection)
    found[name] = dict(lockstep=float((rows - expected).norm() / expected.norm()),
                       losses=float((losses - own_losses).norm() / own_losses.norm()),
                       alone=float((again - expected).norm() / expected.norm()),
                       hashes=weight_hashes(model) == hashes, held=held / whole)
model = shard_model(make(), mesh)
mlp = model.get_base_model().model.layers[1].mlp
mlp.register_forward_hook(lambda _, __, output: output * 2 if output.shape[1] > 40 else output)
try:
    list(LockstepRows(group)(model, examples, RowSpec("none", max_tokens=50)))
    found["fault"] = "none was found"
except ModelError as error:
    found["fault"] = str(error)
if world.rank == 0:
    print(json.dumps(found))
del model, mlp, mesh, group
gc.collect()
close_group()
"""


def python(*command: str, cwd: Path | None = None) -> str:
    # one thread each, as torchrun has it: products of small matrices round otherwise with two
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment, cwd=cwd)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def torchrun(processes: int, *command: str, cwd: Path | None = None) -> str:
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return python(*start, *command, cwd=cwd)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [pytest.param("Qwen2", marks=pytest.mark.exhaustive), "Llama"])
def test_gradients_of_a_sharded_model_are_those_of_the_whole(tmp_path: Path, kind: str) -> None:
    script = tmp_path / "worker.py"
    script.write_text(WORKER.format(kind=kind))
    found = json.loads(torchrun(2, str(script)).splitlines()[-1])
    assert "not those of the model's own forward for e" in found.pop("fault")  # on both processes, which then end
    assert found.keys() == {"exact", "projected", "sketched"}
    for values in found.values():
        assert values["lockstep"] < 1e-5
        assert values["losses"] < 1e-5
        assert values["alone"] < 1e-5
        assert values["hashes"]  # the store's identity does not know of the sharding
        assert 0.45 < values["held"] < 0.6  # each process really holds half of the layers' weights


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_lora: Callable[..., Any], tiny_tokenizer: Any) -> Path:
    """A folder with a model, an adapter and data."""
    folder = tmp_path_factory.mktemp("world")
    tokenizer = tiny_tokenizer()
    model = tiny_lora("qwen2")
    model.save_pretrained(folder / "adapter")
    model.unload().save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = [{"id": f"q{i}", "prompt": f"{i}+{i}?", "completion": f"It is {2 * i}. " * (1 + i % 7)} for i in range(40)]
    (folder / "data.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return folder


@pytest.fixture
def in_the_world(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands run in the world's folder, and by no launcher."""
    monkeypatch.chdir(world)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


def test_the_command_builds_a_store_and_says_what_was_left_out(
    world: Path, in_the_world: None, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["build", "--model", "model", "--adapter", "adapter", "--data", "data.jsonl", "--dim", "4", "--quiet"]
    assert main([*command, "--output", "short", "--max-length", "25", "--store-dtype", "int8"]) == 0
    said = capsys.readouterr().out
    store = open_store(world / "short")
    assert 0 < len(store) < 40
    assert f"longer than 25 tokens: {40 - len(store)} examples" in said
    assert f"store: short ({len(store)} rows" in said
    assert store.dtype == "int8"
    assert main([*command, "--output", "short", "--store-dtype", "int8"]) == 2  # other data
    assert "another dataset" in capsys.readouterr().err
    assert main([*command, "--output", "other", "--fsdp", "2"]) == 2
    assert "1 processes cannot be divided into groups of 2" in capsys.readouterr().err
    for taken in ("model", "data.jsonl"):
        assert main([*command, "--output", taken]) == 2
        assert f"error: {taken} " in capsys.readouterr().err
        assert not Path(f"{taken}.tokens").exists()


@pytest.mark.slow
@pytest.mark.exhaustive
def test_torchrun_builds_the_store_of_one_process(world: Path, in_the_world: None) -> None:
    settings = ["--model", "model", "--adapter", "adapter", "--data", "data.jsonl", "--width", "64", "--dim", "4"]
    command = ["-m", "influence_fast", "build", *settings, "--shard-rows", "4", "--store-dtype", "fp32", "--quiet"]
    assert "store: one (40 rows" in python(*command, "--output", "one", cwd=world)
    assert "store: two (40 rows" in torchrun(2, *command, "--output", "two", cwd=world)
    names = sorted(p.name for p in (world / "one").iterdir())
    assert names == sorted(p.name for p in (world / "two").iterdir())
    assert all((world / "one" / name).read_bytes() == (world / "two" / name).read_bytes() for name in names)
    assert main([*command[2:], "--sketch", "random", "--output", "random"]) == 0
    torchrun(2, *command, "--sketch", "random", "--output", "sharded", "--fsdp", "2", cwd=world)
    assert verify_store(world / "sharded") == []
    whole, sharded = open_store(world / "random"), open_store(world / "sharded")
    assert sharded.ids == whole.ids
    assert sharded.identity == whole.identity
    assert float((sharded.rows() - whole.rows()).norm() / whole.rows().norm()) < 1e-5


@pytest.mark.slow
@pytest.mark.exhaustive
def test_processes_that_hold_one_model_together_fit_one_sketch(world: Path) -> None:
    settings = ["--model", "model", "--adapter", "adapter", "--data", "data.jsonl", "--dim", "4", "--width", "447"]
    command = ["-m", "influence_fast", "build", *settings, "--shard-rows", "4", "--store-dtype", "fp32", "--quiet"]
    python(*command, "--output", "alone", cwd=world)
    torchrun(4, *command, "--output", "together", "--fsdp", "2", cwd=world)
    made = sorted((path, path.stat().st_mtime_ns) for path in (world / "together").glob(FILES))
    assert len(made) == 1
    torchrun(2, *command, "--output", "together", "--fsdp", "2", cwd=world)  # finds it
    assert sorted((path, path.stat().st_mtime_ns) for path in (world / "together").glob(FILES)) == made
    assert verify_store(world / "together") == []
    # eigenvectors are given up to their sign, so of two fits the inner products are what can be compared
    grams = [rows @ rows.T for rows in (open_store(world / name).rows() for name in ("alone", "together"))]
    assert float((grams[1] - grams[0]).norm() / grams[0].norm()) < 1e-4


def test_scores_are_made_of_a_store_that_was_built_before(
    world: Path, in_the_world: None, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--model", "model", "--adapter", "adapter", "--data", "data.jsonl", "--dim", "4", "--width", "64"]
    assert main(["build", *command, "--output", "before", "--quiet"]) == 0
    made = [(path, path.stat().st_mtime_ns) for path in (world / "before").glob(FILES)]
    assert len(made) == 1
    score = ["score", *command, "--validation", "data.jsonl", "--queries", "reference", "--store", "before", "--quiet"]
    assert main([*score, "--output", "scores.csv"]) == 0
    capsys.readouterr()
    assert main(["inspect", "before"]) == 0
    assert "fitted sketch        64 of 448 coordinates" in capsys.readouterr().out
    assert [(path, path.stat().st_mtime_ns) for path in (world / "before").glob(FILES)] == made
    capsys.readouterr()
    assert main([*score, "--output", "scores.csv", "--damping", "0.5"]) == 2
    assert "its sketch was fitted with another setting of damping (--damping" in capsys.readouterr().err
    assert main([*score, "--output", "scores.csv", "--sketch", "random"]) == 2
    assert "by a random sketch or none: take `store.projection`" in capsys.readouterr().err
    more = ["build", *command, "--limit", "9", "--sketch", "before", "--output", "more", "--quiet"]
    assert main(more) == 0
    assert open_store(world / "more").projection == open_store(world / "before").projection


def test_what_cannot_be_sharded_is_named() -> None:
    class Strange(torch.nn.Module):
        def get_decoder(self) -> torch.nn.Module:
            return torch.nn.Linear(2, 2)

    with pytest.raises(ModelError, match="Linear has no list of decoder layers"):
        shard_model(Strange())
    with pytest.raises(ConfigError, match="4 processes cannot be divided into groups of 3"):
        init_group(World(0, 4, 0), 3, "cpu")
