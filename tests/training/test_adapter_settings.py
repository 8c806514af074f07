"""Settings of adapters and models that hang, fill memory or are of another kind: refused before anything is made."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from influence_fast.errors import ConfigError, ModelError
from influence_fast.training.fresh_adapter import attach_lora
from influence_fast.training.models import load_model
from influence_fast.training.settings import LoraSettings


@pytest.fixture
def saved(tmp_path: Path, tiny_model: Callable[..., Any]) -> tuple[Path, Path]:
    """The folders of a model and of an adapter of it."""
    from peft import LoraConfig, get_peft_model

    model = tiny_model()
    model.save_pretrained(tmp_path / "model")
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    return tmp_path / "model", tmp_path / "adapter"


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    ("values", "part"),
    [
        ({"target_modules": "(.*.*)*_(.*.*)*X"}, "target_modules '(.*.*)*_(.*.*)*X' does not end within"),
        ({"exclude_modules": "(.*.*)*_(.*.*)*X"}, "exclude_modules '(.*.*)*_(.*.*)*X' does not end within"),
        ({"rank_pattern": {"(.*.*)*_(.*.*)*X": 2}}, "rank_pattern"),
        ({"modules_to_save": ["(.*.*)*_(.*.*)*X"]}, "modules_to_save"),
        ({"layers_pattern": ["(.*.*)*_(.*.*)*X"], "layers_to_transform": [0]}, "layers_pattern"),
        ({"target_modules": "["}, "is no regular expression"),
        ({"layer_replication": [[0, 1]] * 1000}, "makes 1,000 layers of 2"),
        ({"layer_replication": [[0, 10**15]]}, "no range of the model's 2 layers"),
        ({"layer_replication": [["a", "b"]]}, "no range of the model's 2 layers"),
        ({"rank_pattern": {"up_proj": 10**9}, "target_modules": ["q_proj", "v_proj", "up_proj"]}, "no rank above"),
        ({"r": 10**9}, "no rank above"),
        ({"r": "8"}, "r in its adapter_config.json is '8', and must be a whole number"),
        ({"r": 0}, "must be a whole number of at least 1"),
        ({"lora_alpha": [16]}, "lora_alpha in its adapter_config.json is [16], and must be a number"),
        ({"rank_pattern": ["q_proj"]}, "must be ranks by module"),
        ({"target_modules": {"q_proj": 1}}, "must be a name or a list of names"),
        ({"bias": 7}, "must be none, all or lora_only"),
        ({"trainable_token_indices": [-5]}, "trains token -5"),
    ],
)
def test_adapter_settings_that_do_not_fit(saved: tuple[Path, Path], values: dict[str, Any], part: str) -> None:
    model, adapter = saved
    change(adapter / "adapter_config.json", **values)
    with pytest.raises(ModelError) as found:
        load_model(model, adapter=adapter, device="cpu")
    assert part in str(found.value)
    assert str(found.value).isprintable()


def test_regular_expressions_that_end_are_used(saved: tuple[Path, Path]) -> None:
    model, adapter = saved
    change(adapter / "adapter_config.json", target_modules=r".*\.(q|v)_proj")
    loaded = load_model(model, adapter=adapter, device="cpu")
    assert sum("lora_A" in name for name, _ in loaded.named_parameters()) == 4


@pytest.mark.parametrize(
    ("values", "part"),
    [
        ({"num_hidden_layers": 10**7}, "num_hidden_layers is 10000000"),
        ({"vocab_size": 10**12}, "vocab_size is 1000000000000"),
        ({"hidden_size": "x"}, "cannot be loaded"),
        ({"num_attention_heads": [4]}, "cannot be loaded"),
        ({"rope_parameters": 5}, "cannot be loaded"),
    ],
)
def test_configurations_that_are_not_the_weights(saved: tuple[Path, Path], values: dict[str, Any], part: str) -> None:
    change(saved[0] / "config.json", **values)
    with pytest.raises(ModelError) as found:
        load_model(saved[0], device="cpu")
    assert part in str(found.value)
    assert str(found.value).isprintable()


def test_a_rank_far_beyond_the_weights_is_refused(tiny_model: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match=r"lora\.r is 1000000000"):
        attach_lora(tiny_model(), LoraSettings(r=10**9), 0)


def test_target_modules_are_written_in_one_order(tmp_path: Path) -> None:
    """Sets of text are in another order in each process, as their hashes are."""
    script = (
        "import sys; from transformers import Qwen2Config, Qwen2ForCausalLM\n"
        "from influence_fast.training.fresh_adapter import LoraSettings, attach_lora\n"
        "sizes = dict(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)\n"
        "model = Qwen2ForCausalLM(Qwen2Config(**sizes, num_key_value_heads=1))\n"
        "attach_lora(model, LoraSettings(r=1), 0).save_pretrained(sys.argv[1])\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "a")]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    written = json.loads((tmp_path / "a" / "adapter_config.json").read_text())["target_modules"]
    assert len(written) == 7
    assert written == sorted(written)


def test_moments_that_are_no_dense_tensors_are_refused(tmp_path: Path) -> None:
    from influence_fast.training.optimizer_states import read_adam

    state = {"exp_avg": torch.ones(2), "exp_avg_sq": torch.ones(2).to_sparse(), "step": torch.tensor(1.0)}
    torch.save(
        {"state": {0: state}, "param_groups": [{"params": [0], "betas": (0.9, 0.99)}]}, tmp_path / "optimizer.pt"
    )
    with pytest.raises(ModelError, match="exp_avg_sq of parameter 0 is no dense tensor"):
        read_adam(tmp_path)
