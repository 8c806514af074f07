"""Fingerprints of all that a run is made of: data, models, tokenizers, adapters; kept in its folder as `inputs.json`.

A configuration names files, and the files behind one name change. What is finished in a folder was made of the files
of its time, so a run that finds others there stops and names them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from influence_fast.config import ModelConfig, RunConfig, Source
from influence_fast.data.examples import Example, load_examples, load_rows
from influence_fast.data.fingerprints import tokenizer_hash
from influence_fast.data.grouping import row_groups
from influence_fast.errors import ConfigError
from influence_fast.gradients.rows.eigen_sketch import FILES as SKETCH_FILES
from influence_fast.gradients.rows.row_spec import names_store
from influence_fast.run.pieces import EVERYTHING, QUESTIONS, SCORES, TARGET, TEST, finished, way_out
from influence_fast.store.checksums import checksum

if TYPE_CHECKING:
    from influence_fast.run.splits import Splits

INPUTS = "inputs.json"
CONTENTS = "contents"  # the only name among the hashes of what is not compared file by file
POOL_IN_USE = "the examples in use of data.pool"


@dataclass(frozen=True)
class Input:
    """One input: where it is, SHA-256 by file name (or of `CONTENTS`), and the kind of pieces that depend on it."""

    path: str
    hashes: Mapping[str, str]
    kind: str = EVERYTHING


@dataclass(frozen=True)
class Recorded:
    """Hashes of a run's inputs, as `inputs.json` holds them.

    `unchecked`: the file was written after the first piece, of which it can say nothing.
    """

    inputs: dict[str, Input]
    unchecked: bool = False

    @classmethod
    def load(cls, folder: Path) -> Recorded | None:
        """Return the record of a run's folder; None where there is none. Raises ConfigError for a damaged one."""
        path = folder / INPUTS
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            found = {name: Input(str(one["path"]), dict(one["hashes"])) for name, one in raw["inputs"].items()}
            return cls(found, bool(raw["unchecked"]))
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"{path} is damaged ({type(error).__name__}): restore it, or delete it to go on without knowing "
                "whether the run's data and models are those that it began with"
            ) from None

    def to_text(self, folder: Path) -> str:
        """Return the file's text for a run's `folder`."""
        inputs = {
            name: {"path": _seen(one.path, folder), "hashes": dict(one.hashes)} for name, one in self.inputs.items()
        }
        return json.dumps({"inputs": inputs, "unchecked": self.unchecked}, indent=1) + "\n"


def changed(folder: Path, inputs: Mapping[str, Input]) -> str:
    """Return why finished pieces in `folder` do not go with `inputs`: what changed, and what to do; empty if they do.

    What lies in another place now was changed on purpose, and may be until a finished piece depends on it. Other
    contents in the same place are a change from the first piece on. Raises ConfigError where the folder's record is
    damaged.
    """
    differing, found = _differing(folder, inputs), {}
    for name, (_, moved) in differing.items():
        kind = inputs[name].kind
        if finished(folder, kind if moved else EVERYTHING):
            found[name] = finished(folder, kind)
    if len(found) > 1:
        found.pop(POOL_IN_USE, None)  # the consequence of another change
    if not found:
        return ""
    if any(found.values()):
        remedy = way_out(folder, {inputs[name].kind for name in found}, also=(INPUTS,))
    else:
        remedy = f", or delete {INPUTS} to go on with what is there now, on which nothing finished depends"
    has, it = ("has", "it") if len(found) == 1 else ("have", "them")
    return (
        f"{', '.join(differing[name][0] for name in found)} {has} changed since this run began: choose another output "
        f"folder, or put {it} back{remedy} (in {folder})"
    )


def replaced(folder: Path, inputs: Mapping[str, Input]) -> list[str]:
    """Return warnings that name what changed while finished pieces in `folder` depend on other inputs alone."""
    if not finished(folder, EVERYTHING):
        return []
    return [
        f"{label} has changed since this run began; nothing finished depends on it, so the run goes on with the new one"
        for name, (label, moved) in _differing(folder, inputs).items()
        if moved and not finished(folder, inputs[name].kind)
    ]


def _differing(folder: Path, inputs: Mapping[str, Input]) -> dict[str, tuple[str, bool]]:
    """Find the inputs that differ from what is recorded.

    Returns for each how a message names it, and whether it lies in another place now.
    """
    recorded = Recorded.load(folder)
    if recorded is None:
        return {}
    both = {name: (recorded.inputs[name], now) for name, now in inputs.items() if name in recorded.inputs}
    return {
        name: (f"{name} ({now.path}{_in_what(before.hashes, now.hashes)})", before.path != _seen(now.path, folder))
        for name, (before, now) in both.items()
        if before.hashes != now.hashes
    }


def _seen(path: str, folder: Path) -> str:
    """Return a path relative to the run's folder, so that it holds where both move; hub ids as they are."""
    return os.path.relpath(path, folder) if os.path.exists(path) else path


def _in_what(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    if not now:
        return ": missing"
    names = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    return "" if names == [CONTENTS] else f": {', '.join(names)}"


# ---- data ------------------------------------------------------------------------------------------------


def examples_hash(examples: Iterable[Example]) -> str:
    """Return the SHA-256 over all fields of `examples`, in order, but for the number of their source row.

    Fields at their defaults are left out, so that one that a later version adds changes no hash.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(Example)}
    found = hashlib.sha256()
    for example in examples:
        values = {name: getattr(example, name) for name in defaults if name != "row"}
        told = {name: value for name, value in values.items() if value != defaults[name]}
        found.update(json.dumps(told, sort_keys=True).encode() + b"\n")
    return found.hexdigest()


def read_source(source: Source) -> list[Example]:
    """Return the examples of a source, read as its settings say. Raises as `load_examples`."""
    return load_examples(
        source.path,
        split=source.split,
        format=source.format,
        trace=source.trace,
        limit=source.limit,
        columns=source.columns,
        turns=source.turns,
    )


def source_inputs(config: RunConfig, read: Mapping[str, str]) -> dict[str, Input]:
    """Return the inputs `data.pool`, `data.validation`, `data.test` of which `read` has the examples' hash."""
    data = config.data
    kinds = {"data.pool": EVERYTHING, "data.validation": QUESTIONS, "data.test": TEST}
    if data.decontaminate:
        kinds["data.test"] = EVERYTHING  # it decides which examples are in the pool
    sources: dict[str, Source | None] = {
        "data.pool": data.pool,
        "data.validation": data.validation,
        "data.test": data.test,
    }
    return {
        name: Input(source.path, {CONTENTS: read[name]}, kinds[name])
        for name, source in sources.items()
        if source is not None and name in read
    }


def split_inputs(config: RunConfig, splits: Splits) -> dict[str, Input]:
    """Return the inputs that are data: the sources as they were read, and which of their examples are used for what."""
    data = config.data
    inputs = source_inputs(config, splits.read)
    inputs[POOL_IN_USE] = _ids(data.pool, splits.pool, EVERYTHING)
    if data.validation is None:
        inputs["data.holdout_validation"] = _ids(data.pool, splits.validation, QUESTIONS)
    if data.test is None:
        inputs["data.holdout_test"] = _ids(data.pool, splits.test, EVERYTHING if data.decontaminate else TEST)
    if config.influence.tasks is not None:
        source = data.validation or data.pool
        tasks = row_groups(load_rows(source.path, split=source.split), config.influence.tasks)
        asked = [[example.id, tasks[example.row]] for example in splits.validation]
        inputs["influence.tasks"] = Input(source.path, {CONTENTS: _json_hash(asked)}, SCORES)
    return inputs


def _ids(source: Source, examples: Iterable[Example], kind: str) -> Input:
    return Input(source.path, {CONTENTS: _json_hash([example.id for example in examples])}, kind)


def _json_hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


# ---- models ----------------------------------------------------------------------------------------------


def model_inputs(config: RunConfig) -> dict[str, Input]:
    """Return the inputs that are weights and their settings, from the files alone: no model has to be loaded for it.

    Every byte is read once, at the speed of SHA-256 (measured: 1.1 GiB/s a core), the files of a model in parallel.
    """
    inputs = {"model.path": Input(config.model.path, _model_hashes(config.model.path, config.model))}
    if config.model.adapter is not None:
        inputs["model.adapter"] = Input(config.model.adapter, adapter_hashes(config.model.adapter, config.model))
        if config.influence.checkpoints:
            hashes = checkpoint_hashes(config.model.adapter)
            inputs["the checkpoints of model.adapter"] = Input(config.model.adapter, hashes, SCORES)
    if config.target_model is not None:
        path = config.target_model.path
        inputs["target_model.path"] = Input(path, _model_hashes(path, config.target_model), TARGET)
    if config.influence.optimizer is not None:
        path = config.influence.optimizer
        inputs["influence.optimizer"] = Input(path, hash_files(Path(path).expanduser().glob("*")), SCORES)
    if names_store(config.gradients.sketch):
        path = str(config.gradients.sketch)
        inputs["gradients.sketch"] = Input(path, hash_files(Path(path).expanduser().glob(SKETCH_FILES)), SCORES)
    return inputs


def tokenizer_inputs(config: RunConfig, tokenizer: Any, target_tokenizer: Any) -> dict[str, Input]:
    """Return the inputs that are tokenizers, with their templates, wherever they came from."""
    inputs = {"the tokenizer of model.path": _tokenizer(config.model, tokenizer, EVERYTHING)}
    if config.target_model is not None:
        inputs["the tokenizer of target_model.path"] = _tokenizer(config.target_model, target_tokenizer, TARGET)
    return inputs


def _tokenizer(model: ModelConfig, tokenizer: Any, kind: str) -> Input:
    return Input(str(tokenizer.name_or_path or model.path), {CONTENTS: tokenizer_hash(tokenizer)}, kind)


def model_hashes(path: str, trust_remote_code: bool = False) -> dict[str, str]:
    """Return SHA-256 by file name of a model's weights, of its configurations, and of its own code where that runs.

    path: a folder or a hub id. Empty where there is no such model on this machine.
    """
    names = ["config.json", "generation_config.json"]
    single, index = "model.safetensors", "model.safetensors.index.json"
    if _file(path, single) is not None:
        names.append(single)
    elif (found := _file(path, index)) is not None:
        names += [index, *_shards(found)]
    files = [file for name in names if (file := _file(path, name)) is not None]
    folder = Path(path).expanduser()
    return hash_files([*files, *(folder.glob("*.py") if trust_remote_code and folder.is_dir() else ())])


def _model_hashes(path: str, model: ModelConfig) -> dict[str, str]:
    return model_hashes(path, model.trust_remote_code)


def adapter_hashes(path: str, model: ModelConfig) -> dict[str, str]:
    """Return SHA-256 by file name of a peft adapter, or of the whole fine-tuned model that the folder holds instead."""
    if _file(path, "adapter_config.json") is None:
        return _model_hashes(path, model)
    names = ("adapter_config.json", "adapter_model.safetensors")
    return hash_files(file for name in names if (file := _file(path, name)) is not None)


def checkpoint_hashes(adapter: str | Path) -> dict[str, str]:
    """Return SHA-256 by name of every file in the `checkpoint-*` folders of a local adapter."""
    return hash_files(Path(adapter).expanduser().glob("checkpoint-*/*"))


def _shards(index: Path) -> list[str]:
    try:
        return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        return []  # damaged, which loading the model will say


def _file(source: str, name: str) -> Path | None:
    """Find a file of a model in a folder, or of a hub id's (fetched if it is not cached)."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder / name if (folder / name).is_file() else None
    if source.startswith((".", "/", "~")) or source.count("/") > 1:
        return None  # no hub id
    from transformers.utils.hub import cached_file

    quiet = {f"_raise_exceptions_for_{what}": False for what in ("missing_entries", "connection_errors", "gated_repo")}
    try:
        found = cached_file(source, name, **quiet)
    except (OSError, ValueError):
        return None  # loading it says why
    return None if found is None else Path(found)


# ---- files -----------------------------------------------------------------------------------------------


def hash_files(paths: Iterable[Path]) -> dict[str, str]:
    """Return SHA-256 by file name (with its folder's where several folders are given); folders are left out."""
    files = sorted(path for path in paths if path.is_file())
    single = len({path.parent for path in files}) < 2
    names = [path.name if single else f"{path.parent.name}/{path.name}" for path in files]
    with ThreadPoolExecutor() as pool:  # hashing large buffers lets go of the interpreter
        return dict(zip(names, pool.map(checksum, files), strict=True))
