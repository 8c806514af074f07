"""Where models, adapters and tokenizers are read from: a folder, or a repository of the hub."""

from __future__ import annotations

import os
import re
from itertools import islice
from pathlib import Path

from influence_fast.errors import ModelError, one_line, truncated_list
from influence_fast.guards import check_no_pipe

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
_MOST_FILES = 10_000  # of a folder that are looked at; models have some hundred
_HUB_ID = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?")


def check_folder(source: str, needed: str, what: str) -> None:
    """Tell a wrong path from a hub id before the hub is asked, and an adapter's folder from a model's.

    Raises ModelError for a folder without the file `needed`, for a file, and for a path that leads nowhere.
    """
    path = Path(source).expanduser()
    if os.path.isdir(path):
        check_no_pipes(path)
        if not (path / needed).is_file():
            remedy = f"give a folder made by save_pretrained that holds {needed}"
            if what == "model" and (path / ADAPTER_CONFIG).is_file():
                remedy = f"it holds a peft adapter: give its base model, and adapter={source!r}"
            if what == "adapter" and (named := sorted(path.glob(f"*/{ADAPTER_CONFIG}"))):
                # what save_pretrained makes of adapters that are not called "default"; a training's checkpoints too
                remedy = f"it holds several adapters: give one of {truncated_list(str(file.parent) for file in named)}"
            raise ModelError(f"{source} is no {what} folder (no {needed}); {remedy}")
    else:
        check_place(source, what)


def check_no_pipes(folder: Path) -> None:
    """Raise ModelError for a pipe or a device among a folder's files: whoever opens it may wait for ever."""
    with os.scandir(folder) as entries:
        for entry in islice(entries, _MOST_FILES):
            if not entry.is_dir():
                check_no_pipe(entry.path, ModelError)


def check_place(source: str, what: str) -> None:
    """Raise ModelError where `source` is neither a folder nor what may be a hub id."""
    path = Path(source).expanduser()
    if os.path.isdir(path):
        return
    if os.path.exists(path):
        raise ModelError(f"{source} is a file; give the {what}'s folder or a hub id")
    if source.startswith((".", "/", "~")) or source.count("/") > 1 or not _HUB_ID.fullmatch(source):
        raise ModelError(f"no {what} at {source}; check the path (from {Path.cwd()})")


def cannot_load(source: str, what: str, error: BaseException) -> str:
    """Return the message for a library's `error` on loading `what` from `source`."""
    reason = one_line(error)
    if os.path.isdir(source):
        if "safetensors" in reason:
            return (
                f"{source} has no safetensors weights; convert them: load the model in transformers and "
                "save_pretrained it again"
            )
        return f"the {what} in {source} cannot be loaded ({type(error).__name__}: {reason}); check the folder"
    return (
        f"the {what} {source} is no local folder, and could not be loaded from the hub "
        f"({type(error).__name__}: {reason}); check the id and the network, or give a local folder"
    )


def list_checkpoints(path: str | Path) -> list[Path]:
    """Return the checkpoints kept in a result's folder, `checkpoint-<step>`, in the order of training."""
    saved = [p for p in Path(path).glob("checkpoint-*") if re.fullmatch(r"checkpoint-[0-9]+", p.name) and p.is_dir()]
    return sorted(saved, key=lambda p: int(p.name.rpartition("-")[2]))
