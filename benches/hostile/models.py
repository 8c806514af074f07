"""Hostile models, adapters and tokenizers: odd settings, weights that do not fit, patterns that never end."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benches.hostile.case import Case
from benches.hostile.values import DEEP, ODD, PATTERNS, Raw, damaged, dumped
from influence_fast.training.models import load_model, load_tokenizer

_CONFIG_KEYS = (
    "architectures",
    "model_type",
    "hidden_size",
    "num_hidden_layers",
    "vocab_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "rope_parameters",
    "hidden_act",
    "dtype",
    "tie_word_embeddings",
    "rms_norm_eps",
    "max_position_embeddings",
    "layer_types",
    "quantization_config",
    "auto_map",
    "eos_token_id",
    "sliding_window",
    "attention_dropout",
)
_ADAPTER_KEYS = (
    "peft_type",
    "task_type",
    "r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "exclude_modules",
    "rank_pattern",
    "alpha_pattern",
    "layers_to_transform",
    "layers_pattern",
    "modules_to_save",
    "bias",
    "fan_in_fan_out",
    "use_dora",
    "use_rslora",
    "init_lora_weights",
    "layer_replication",
    "trainable_token_indices",
    "target_parameters",
    "base_model_name_or_path",
    "inference_mode",
    "revision",
    "auto_mapping",
    "lora_bias",
    "loftq_config",
    "megatron_config",
    "eva_config",
    "corda_config",
    "nothing",
)
_TOKENIZER_KEYS = (
    "tokenizer_class",
    "eos_token",
    "pad_token",
    "bos_token",
    "chat_template",
    "model_max_length",
    "added_tokens_decoder",
    "additional_special_tokens",
    "extra_special_tokens",
    "auto_map",
    "padding_side",
)


def build(folder: Path) -> None:
    """Write a small model, an adapter of it and a tokenizer into `folder`."""
    from peft import LoraConfig, get_peft_model
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    sizes = {
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
    }
    model = Qwen2ForCausalLM(Qwen2Config(**sizes))
    model.save_pretrained(folder / "model")
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    get_peft_model(model, config).save_pretrained(folder / "adapter")
    inner = Tokenizer(models.WordLevel({"<eos>": 0, "a": 1, "b": 2, "<unk>": 3}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", unk_token="<unk>").save_pretrained(
        folder / "model"
    )


def cases(rng: random.Random, shared: Path) -> Iterator[Case]:
    """Yield every case of the room."""
    if not (shared / "model").exists():
        build(shared)
    yield from _settings(rng, shared)
    yield from _patterns(shared)
    yield from _weights(rng, shared)
    yield from _places(shared)


def _read(folder: Path) -> Callable[[], Any]:
    def call() -> None:
        adapter = folder / "adapter"
        model = load_model(folder / "model", adapter=adapter, device="cpu")
        load_tokenizer(folder / "model", adapter=adapter, model=model)

    return call


def _copied(shared: Path, change: Callable[[Path], None]) -> Callable[[Path], Callable[[], Any]]:
    def make(folder: Path) -> Callable[[], Any]:
        for name in ("model", "adapter"):
            shutil.copytree(shared / name, folder / name)
        change(folder)
        return _read(folder)

    return make


def _with(file: str, **values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / file
        before = json.loads(path.read_text()) if path.exists() else {}
        path.write_bytes(dumped(before | values).encode("utf-8", "surrogatepass"))

    return change


def _replaced(file: str, body: bytes) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / file).write_bytes(body)

    return change


def _settings(rng: random.Random, shared: Path) -> Iterator[Case]:
    files = (
        ("model/config.json", _CONFIG_KEYS, 6),
        ("adapter/adapter_config.json", _ADAPTER_KEYS, 7),
        ("model/tokenizer_config.json", _TOKENIZER_KEYS, 6),
    )
    for file, keys, count in files:
        for key in keys:
            for number in rng.sample(range(len(ODD)), count):
                yield Case(f"{file}/{key}/{number}", _copied(shared, _with(file, **{key: ODD[number]})))
        for number, value in enumerate(ODD):
            body = dumped(value).encode("utf-8", "surrogatepass")
            yield Case(f"{file}/whole/{number}", _copied(shared, _replaced(file, body)))
    for key in (
        "num_hidden_layers",
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "max_position_embeddings",
    ):
        for value in (10**5, 10**7, 10**9, 10**12):
            yield Case(f"model/config.json/{key}={value}", _copied(shared, _with("model/config.json", **{key: value})))
    for kind in ("gpt2", "llama", "bert", "t5", "mamba", "x", "whisper"):
        yield Case(f"model/config.json/{kind}", _copied(shared, _with("model/config.json", model_type=kind)))
        wide = {"n_positions": 10**6, "n_layer": 10**6, "num_layers": 10**6, "architectures": None}
        yield Case(
            f"model/config.json/{kind} wide", _copied(shared, _with("model/config.json", model_type=kind, **wide))
        )
    for file in (
        "model/generation_config.json",
        "model/tokenizer.json",
        "adapter/tokenizer.json",
        "adapter/tokenizer_config.json",
        "adapter/chat_template.json",
        "adapter/chat_template.jinja",
        "model/added_tokens.json",
        "model/special_tokens_map.json",
        "model/chat_template.jinja",
        "model/model.safetensors.index.json",
    ):
        for number in rng.sample(range(len(ODD)), 8):
            yield Case(
                f"{file}/whole/{number}",
                _copied(shared, _replaced(file, dumped(ODD[number]).encode("utf-8", "surrogatepass"))),
            )
    inner = (shared / "model" / "tokenizer.json").read_bytes()
    for number in range(20):
        yield Case(
            f"model/tokenizer.json/damaged {number}",
            _copied(shared, _replaced("model/tokenizer.json", damaged(rng, inner))),
        )
    for number, value in enumerate(
        (
            {"vocab": {"a": 10**12}},
            {"vocab": {"a": -1}},
            {"vocab": 5},
            {"type": "BPE", "vocab": {}, "merges": [["a", "b"]]},
            {"type": "Unigram", "vocab": [["a", Raw("1e999")]]},
            {"type": "X"},
            5,
            None,
        )
    ):
        yield Case(f"model/tokenizer.json/model {number}", _copied(shared, _with("model/tokenizer.json", model=value)))


def _patterns(shared: Path) -> Iterator[Case]:
    file = "adapter/adapter_config.json"
    for number, pattern in enumerate(PATTERNS):
        for values in (
            {"target_modules": pattern},
            {"exclude_modules": pattern},
            {"rank_pattern": {pattern: 2}},
            {"alpha_pattern": {pattern: 2}},
            {"layers_pattern": pattern, "layers_to_transform": [0]},
            {"target_modules": [pattern]},
            {"modules_to_save": [pattern]},
        ):
            yield Case(f"pattern/{number}/{values}"[:90], _copied(shared, _with(file, **values)))
    for number, layers in enumerate(
        (
            [[0, 10**6]],
            [[0, 2]] * 100_000,
            [[0, 10**15]],
            [[2, 0]],
            [[0]],
            [0, 1],
            [[-5, 5]],
            [["a", "b"]],
            [[0, 1], [0, 1]],
        )
    ):
        yield Case(f"replication/{number}", _copied(shared, _with(file, layer_replication=layers)))
    for rank in (3, 10**4, 10**6, 10**9, 10**12, 0, -1):
        yield Case(f"rank/{rank}", _copied(shared, _with(file, r=rank)))
        yield Case(
            f"rank/only {rank}",
            _copied(
                shared,
                _with(
                    file,
                    r=rank,
                    rank_pattern={"q_proj": 2, "v_proj": 2},
                    target_modules=["q_proj", "v_proj", "up_proj"],
                ),
            ),
        )
        yield Case(
            f"rank/pattern {rank}",
            _copied(
                shared, _with(file, rank_pattern={"up_proj": rank}, target_modules=["q_proj", "v_proj", "up_proj"])
            ),
        )
        yield Case(f"rank/alpha {rank}", _copied(shared, _with(file, lora_alpha=rank)))
    for tokens in ([10**9], [-5], list(range(3000)), ["a"], {"embed_tokens": [1]}, {"x": [1]}, {"x": 5}, [[1]], [1.5]):
        yield Case(f"tokens/{str(tokens)[:30]}", _copied(shared, _with(file, trainable_token_indices=tokens)))


def _weights(rng: random.Random, shared: Path) -> Iterator[Case]:
    from safetensors.torch import load_file, save_file

    for file in ("model/model.safetensors", "adapter/adapter_model.safetensors"):
        body = (shared / file).read_bytes()
        for number in range(15):
            yield Case(f"{file}/damaged {number}", _copied(shared, _replaced(file, damaged(rng, body))))
        tensors = load_file(shared / file)
        names = sorted(tensors)
        first = names[0]
        changes: dict[str, dict[str, torch.Tensor]] = {
            "none": {},
            "one": {first: tensors[first]},
            "further": tensors | {"x": torch.ones(2)},
            "scalar": tensors | {first: torch.tensor(1.0)},
            "int": tensors | {first: tensors[first].int()},
            "complex": tensors | {first: tensors[first].cfloat()},
            "bool": tensors | {first: tensors[first].bool()},
            "empty": tensors | {first: torch.empty(0, 0)},
            "cube": tensors | {first: tensors[first][None].clone()},
            "vector": tensors | {first: tensors[first].flatten()},
            "nan": {name: value * float("nan") for name, value in tensors.items()},
            "rank": tensors | {first: torch.ones(99, 16)},
            "turned": {name: value.t().contiguous() for name, value in tensors.items() if value.dim() == 2},
            "renamed": {f"x.{name}": value for name, value in tensors.items()},
            "named ..": {f"../{name}": value for name, value in tensors.items()},
            "fp8": {name: value.to(torch.float8_e4m3fn) for name, value in tensors.items()},
        }
        for name, changed in changes.items():
            yield Case(
                f"{file}/{name}",
                _copied(shared, lambda folder, changed=changed, file=file: save_file(changed, folder / file)),
            )


def _places(shared: Path) -> Iterator[Case]:
    def pipe(file: str) -> Callable[[Path], None]:
        def change(folder: Path) -> None:
            (folder / file).unlink(missing_ok=True)
            os.mkfifo(folder / file)

        return change

    def linked(file: str) -> Callable[[Path], None]:
        def change(folder: Path) -> None:
            (folder / file).unlink(missing_ok=True)
            (folder / file).symlink_to("/dev/zero")

        return change

    for file in (
        "model/config.json",
        "model/model.safetensors",
        "model/tokenizer.json",
        "model/tokenizer_config.json",
        "model/generation_config.json",
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "adapter/tokenizer_config.json",
        "adapter/chat_template.jinja",
    ):
        yield Case(f"pipe/{file}", _copied(shared, pipe(file)))
        yield Case(f"device/{file}", _copied(shared, linked(file)))
        yield Case(
            f"missing/{file}", _copied(shared, lambda folder, file=file: (folder / file).unlink(missing_ok=True))
        )
        yield Case(f"deep/{file}", _copied(shared, _replaced(file, b"[" * DEEP)))
    for path in ("/", "/dev", "/proc", "/dev/null", "a\nb", "../..", "x" * 300, "\0", "owner/name/x", "~nobody/x"):
        yield Case(f"place/model {path!r}", lambda folder, path=path: lambda: load_model(path))
        yield Case(f"place/tokenizer {path!r}", lambda folder, path=path: lambda: load_tokenizer(path))
        yield Case(
            f"place/adapter {path!r}", lambda folder, path=path: lambda: load_model(shared / "model", adapter=path)
        )
