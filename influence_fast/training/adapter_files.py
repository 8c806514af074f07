"""What an adapter's folder holds: its configuration and the shapes of its stored tensors."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from influence_fast.data.adapter_names import plain_name
from influence_fast.errors import ModelError
from influence_fast.gradients.model.adapter_kinds import check_kind, kind_of
from influence_fast.training.adapter_settings import check_kinds
from influence_fast.training.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, cannot_load, check_folder

Shapes = Mapping[str, tuple[int, ...]]

# What peft calls an adapter that it is given no name for.
ADAPTER_NAME = "default"
# What peft puts between a module's name and the weight that it stores for it.
WRAPPERS = r"(?:\.(?:modules_to_save|original_module|base_layer|token_adapter))*"


def adapter_folder(adapter: str) -> str:
    """Return the local folder of an adapter, fetched from the hub if it is not local."""
    check_folder(adapter, ADAPTER_CONFIG, "adapter")
    folder = Path(adapter).expanduser()
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(adapter, allow_patterns=[ADAPTER_CONFIG, ADAPTER_WEIGHTS]))
        except Exception as error:
            raise ModelError(cannot_load(adapter, "adapter", error)) from error
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (folder / name).is_file():
            raise ModelError(
                f"the adapter {adapter} has no {name}; save it with save_pretrained (safetensors, not .bin)"
            )
    return str(folder)


def lora_config(folder: str, adapter: str) -> Any:
    from peft import PeftConfig

    try:  # first, as peft may not know the kind, or not its settings
        kind = kind_of(json.loads((Path(folder) / ADAPTER_CONFIG).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        kind = ""
    if kind:
        check_kind(f"the adapter {adapter}", kind)
    try:
        config = PeftConfig.from_pretrained(folder)
    except Exception as error:  # as many kinds as fields of the wrong kind
        raise ModelError(cannot_load(adapter, "adapter", error)) from error
    check_kind(f"the adapter {adapter}", kind_of(config))
    check_kinds(config, adapter)
    return config


def stored_shapes(folder: str, adapter: str) -> dict[str, tuple[int, ...]]:
    """Read the shape of every tensor of the adapter, from the header alone."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(os.path.join(folder, ADAPTER_WEIGHTS), framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ModelError(f"the adapter {adapter} has a damaged {ADAPTER_WEIGHTS} ({error}); save it again") from error


def stored_tensors(folder: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield name and tensor of everything in the adapter's file, one at a time."""
    from safetensors import safe_open

    with safe_open(os.path.join(folder, ADAPTER_WEIGHTS), framework="pt") as file:
        for name in sorted(file.keys()):
            yield name, file.get_tensor(name)


def split_key(key: str) -> tuple[str, str | None]:
    """Split `base_model.model.<module>.lora_A.weight` into (module, factor); factor is None for other tensors."""
    for factor in ("lora_A", "lora_B"):
        name, found, _ = key.partition(f".{factor}.")
        if found:
            return plain_name(name), factor
    return key, None
