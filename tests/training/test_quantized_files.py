"""Quantised checkpoints, and bases quantised as they are loaded, through the command line and the dry run."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from worlds import write_model, write_rows

from influence_fast.cli import main
from influence_fast.config import DataConfig, EvalConfig, ModelConfig, RunConfig, Source
from influence_fast.errors import ConfigError, ModelError
from influence_fast.gradients.rows.row_spec import RowSpec
from influence_fast.run.dry_run import model_shape, plan
from influence_fast.store.reader import open_store
from influence_fast.training.models import adapter_warnings, load_model, load_tokenizer


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, the same saved in 4 bits, an adapter trained over that, and data."""
    folder = tmp_path_factory.mktemp("world")
    write_model(folder / "model", hidden=64)
    torch.manual_seed(0)
    model: Any = load_model(folder / "model", device="cpu", quantize="nf4")
    model.save_pretrained(folder / "nf4")
    load_tokenizer(folder / "model").save_pretrained(folder / "nf4")
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    tuned.save_pretrained(folder / "adapter")
    for name, n in (("pool", 6), ("validation", 2)):
        write_rows(folder / f"{name}.jsonl", n, seed=n)
    return folder


def verb(world: Path, name: str, *more: str) -> int:
    adapter = ["--adapter", str(world / "adapter"), "--device", "cpu", "--data", str(world / "pool.jsonl")]
    return main([name, *adapter, "--dim", "4", *more])


def test_build_and_score_of_a_saved_and_of_a_loaded_quantisation_agree(world: Path, tmp_path: Path) -> None:
    saved = ["--model", str(world / "nf4")]
    loaded = ["--model", str(world / "model"), "--quantize", "nf4"]
    for name, model in (("saved", saved), ("loaded", loaded)):
        assert verb(world, "build", *model, "--output", str(tmp_path / name)) == 0
    rows = [open_store(tmp_path / name).rows() for name in ("saved", "loaded")]
    assert (rows[0] == rows[1]).all()
    asked = ["--validation", str(world / "validation.jsonl"), "--queries", "reference"]
    asked += ["--output", str(tmp_path / "scores.csv")]
    assert verb(world, "score", *saved, "--store", str(tmp_path / "saved"), *asked) == 0
    assert len((tmp_path / "scores.csv").read_text().splitlines()) == 7


def test_a_store_of_a_quantised_base_refuses_the_plain_one(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ["--model", str(world / "model")]
    assert verb(world, "build", *model, "--quantize", "int8", "--output", str(tmp_path / "store")) == 0
    assert verb(world, "build", *model, "--output", str(tmp_path / "store")) == 2
    assert "4-bit weights are another model" in capsys.readouterr().err


def test_a_missing_package_is_named_with_its_remedy(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "bitsandbytes" else found(name, *a)
    )
    install = r"not installed: pip install 'influence-fast\[quantized\]'$"
    with pytest.raises(ModelError, match=rf"nf4 are quantised by bitsandbytes, which is {install}"):
        load_model(world / "nf4", device="cpu")
    with pytest.raises(ModelError, match=rf"quantize needs bitsandbytes, which is {install}"):
        load_model(world / "model", device="cpu", quantize="nf4")


def test_the_package_of_another_quantisation_is_named(world: Path, tmp_path: Path) -> None:
    settings = json.loads((world / "model" / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": "awq", "bits": 4, "group_size": 32}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ModelError, match=r"quantised by gptqmodel, which is not installed: pip install gptqmodel$"):
        load_model(tmp_path, device="cpu")


def test_quantisations_that_cannot_be_are_refused(world: Path) -> None:
    with pytest.raises(ConfigError, match=r"quantize: unknown value 'nf5'; did you mean 'nf4'"):
        load_model(world / "model", device="cpu", quantize="nf5")
    with pytest.raises(ModelError, match=r"nf4 are quantised already: leave quantize out"):
        load_model(world / "nf4", device="cpu", quantize="int8")
    quantised = ModelConfig(str(world / "model"), quantize="nf4")
    settings: dict[str, Any] = {"output": "o", "model": quantised, "data": DataConfig(Source("pool"))}
    with pytest.raises(ConfigError, match=r"gradients\.precision: fp8 .* use 'auto'"):
        RunConfig(**settings, gradients=RowSpec(precision="fp8"))
    with pytest.raises(ConfigError, match=r"evaluation\.engine: vllm .* use 'transformers'"):
        RunConfig(**settings, evaluation=EvalConfig(engine="vllm"))


def stored_bytes(model: Any) -> int:
    """What the quantised linears of a model hold."""
    total = 0
    for module in model.modules():
        weight = vars(module)["_parameters"].get("weight")
        if state := getattr(weight, "quant_state", None):
            parts = [weight, state.absmax, *([state.state2.absmax] if state.nested else [])]
        elif getattr(weight, "SCB", None) is not None:
            parts = [weight, weight.SCB]
        else:
            continue
        total += sum(part.numel() * part.element_size() for part in parts)
    return total


@pytest.mark.parametrize(("model", "quantize"), [("nf4", None), ("model", "nf4"), ("model", "int8")])
def test_the_dry_run_counts_weights_as_they_are_stored(world: Path, model: str, quantize: str | None) -> None:
    pool = Source(str(world / "pool.jsonl"))
    files = ModelConfig(str(world / model), quantize=quantize, device="cpu")
    config = RunConfig(output=str(world / "run"), model=files, data=DataConfig(pool, validation=pool, test=pool))
    shape = model_shape(files, config)
    assert shape is not None
    assert shape.quantized is not None
    loaded = load_model(world / model, device="cpu", quantize=quantize)
    linears = [m for m in loaded.model.modules() if isinstance(m, torch.nn.Linear)]
    sizes = [m.in_features * m.out_features for m in linears]
    assert shape.quantized.stored == pytest.approx(stored_bytes(loaded), rel=0.02)
    assert (shape.quantized.parameters, shape.quantized.largest) == (sum(sizes), max(sizes))
    memory = dict(plan(config).memory)
    assert sum(n for what, n in memory.items() if what.startswith("quantised weights")) == shape.quantized.stored
    again = plan(config).gradient_memory
    if again:
        assert again[True].moments["the backward of the top layer"]["one weight dequantised"] == 4 * max(sizes)
        rest = 4 * (shape.parameters - sum(sizes))
        assert again[True].throughout["weights"] == rest + shape.quantized.stored


def test_a_loaded_base_is_left_as_it_is_stored(world: Path) -> None:
    """Reordered for the CPU in a forward without gradients, it would have other scales, and another hash."""
    model = load_model(world / "nf4", device="cpu")
    flags = [vars(m)["support_avx512bf16_for_cpu"] for m in model.modules() if type(m).__name__ == "Linear4bit"]
    assert flags == [False] * 14


def test_a_copy_of_the_adapters_base_is_no_other_base(world: Path, tmp_path: Path) -> None:
    write_model(tmp_path / "copy", hidden=64)
    loaded = load_model(tmp_path / "copy", device="cpu", quantize="int8")
    config = json.loads((world / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(world / "model")
    assert adapter_warnings(str(world / "adapter"), loaded, str(tmp_path / "copy")) == []
    write_model(tmp_path / "other", hidden=32)
    other = load_model(tmp_path / "other", device="cpu", quantize="int8")
    assert "names another base model" in adapter_warnings(str(world / "adapter"), other, str(tmp_path / "other"))[0]
