"""Tell whether an adapter is put on the base that it was trained on, and name what is different."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from influence_fast.errors import ModelError
from influence_fast.gradients.model.trained_beside import beside_warning, trained_beside
from influence_fast.guards import reading
from influence_fast.training.adapter_files import adapter_folder, lora_config
from influence_fast.training.files import ADAPTER_CONFIG


def adapter_warnings(adapter: str, model: nn.Module | None = None, source: str = "") -> list[str]:
    """Return what to know of the adapter in a folder or of a hub id, one line each.

    What it trains that scores do not cover and, with the base `model` loaded from `source`, that it was trained on
    another one. None for the folder of a whole fine-tuned model. Raises ModelError where there is no adapter.
    """
    folder = Path(adapter).expanduser()
    if (folder / "config.json").exists() and not (folder / ADAPTER_CONFIG).exists():
        return []
    with reading(f"the adapter {adapter}", ModelError):
        config = lora_config(adapter_folder(adapter), adapter)
        found = [] if model is None else warnings_of(config, adapter, model, source)
        others = trained_beside(config)
        return found + ([beside_warning(others)] if others else [])


def warnings_of(config: Any, adapter: str, model: nn.Module, source: str) -> list[str]:
    named = str(getattr(config, "base_model_name_or_path", None) or "")
    if not named or _same_base(named, source, model):
        return []
    return [
        f"the adapter {adapter} names another base model, {named}, than {source or 'this one'}, on which it is put: "
        "load the one it was trained on, or mend base_model_name_or_path in its adapter_config.json"
    ]


def _same_base(named: str, source: str, model: nn.Module) -> bool:
    """Return whether `named`, as an adapter's configuration has it, is the model that was loaded from `source`."""
    places = [Path(place).expanduser() for place in (named, source)]
    if named == source or (source and os.path.realpath(places[0]) == os.path.realpath(places[1])):
        return True
    if places[0].is_dir() and sorted(places[0].glob("*.safetensors")):
        return _same_weights(model, places[0])
    return not source or _short_name(named) == _short_name(source)


def _short_name(place: str) -> str:
    """Return the last part of a hub id or path; of a folder in the hub's cache, the name of the repository."""
    cached = re.search(r"models--(?:[^/]*--)?([^/]+)/snapshots/", place + "/")
    return (cached[1] if cached else place.rstrip("/").rpartition("/")[2]).lower()


def _same_weights(model: nn.Module, folder: Path) -> bool:
    """Return whether the weights in `folder` are the model's, but for rows that a resized vocabulary added."""
    from safetensors import SafetensorError, safe_open

    held = dict(model.named_parameters(remove_duplicate=False))
    try:
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (not a dict)
                    if name not in held:
                        return False
                    mine, theirs = held[name], file.get_tensor(name)
                    if not mine.is_floating_point() and theirs.is_floating_point():
                        continue  # quantised as it was loaded
                    rows = min(mine.shape[0], theirs.shape[0]) if mine.dim() and theirs.dim() else None
                    if not torch.equal(mine.detach()[:rows].cpu(), theirs[:rows].to(mine.dtype)):
                        return False
    except (OSError, SafetensorError, IndexError):
        return False
    return True


def name_of(model: nn.Module) -> str:
    """Return where transformers loaded `model` from; empty where it was made by hand."""
    return str(getattr(getattr(model, "config", None), "name_or_path", "") or "")
