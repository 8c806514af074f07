"""A run's folder: finished pieces of work are kept by name, and found again when the run is repeated."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from influence_fast.atomic import write_text
from influence_fast.config import RunConfig, Source
from influence_fast.errors import ConfigError, InfluenceFastError
from influence_fast.influence.settings import REFERENCE
from influence_fast.run.inputs import CONTENTS, INPUTS, Input, Recorded, changed, examples_hash, read_source, replaced
from influence_fast.run.pieces import EVERYTHING, finished, kind_of_setting, way_out
from influence_fast.settings import difference, from_dict, parse_yaml, to_dict

CONFIG = "config.yaml"
STORES = "stores.json"
LOCK = ".lock"
# Seconds to wait for another process that writes a record, as processes that begin on one run together do.
PATIENCE = 2.0


def occupied(config: RunConfig) -> str:
    """Return why a run of `config` cannot go into `config.output`, and what to do: what lies there, and the first
    setting that differs and that finished pieces depend on. Empty where it can."""
    path = Path(config.output)
    record = path / CONFIG
    if path.is_file():
        return f"{path} is a file, and a run needs a folder: choose another output"
    if not record.exists():
        if path.exists() and any(found.name != LOCK for found in path.iterdir()):
            return f"{path} is not empty and holds no run: choose another output folder"
        return ""
    recorded = _recorded(record)
    if not isinstance(recorded, dict):
        return f"{path} holds no run ({record.name} is {recorded}): choose another output folder"
    before, now = _with_defaults(recorded), _settings(config)
    _take_equal_paths(before, now, path)
    for part in (before, now):
        _leave_out_what_can_grow(part)
        _leave_out_what_changes_nothing(part)
    dependence = {
        "own_answers": _asks_for_answers(before.get("influence", {})),
        "decontaminated": bool(before.get("data", {}).get("decontaminate")),
    }
    while found := difference(before, now):
        key = found.partition(":")[0]
        kind = kind_of_setting(key, **dependence)
        if finished(path, kind) and (source := _same_examples(key, config, path)):
            for part in (before, now):
                _leave_out(part, source)
        elif finished(path, kind):
            remedy = way_out(path, {kind}) or ", or delete this one"
            return f"{path} holds a run of another configuration ({found}): choose another output folder{remedy}"
        for part in (before, now):
            _leave_out(part, key)
    return ""


class RunFolder:
    """Opens `config.output`, new or left by an earlier run of the same configuration.

    `warnings`: what is to be known of the folder. Raises ConfigError when the folder holds something else, naming the
    first setting that differs, or when its record has to change and another process is at work on the run.
    """

    def __init__(self, config: RunConfig) -> None:
        self.path = Path(config.output)
        self.warnings: list[str] = []
        self._config = config
        self._inputs: dict[str, Input] = {}
        self._unchecked = False
        self._locked = False
        self._claim()

    def _claim(self) -> None:
        import yaml

        if why := occupied(self._config):
            raise ConfigError(why)
        self._save(CONFIG, yaml.safe_dump(_settings(self._config), sort_keys=False))

    def _save(self, name: str, text: str) -> None:
        """Write a record if it says something else; no other process may be at work."""
        path = self.path / name
        if path.exists() and path.read_bytes() == text.encode():
            return
        self.path.mkdir(parents=True, exist_ok=True)
        with self._lock(PATIENCE):
            write_text(path, text)

    def check(self, inputs: Mapping[str, Input]) -> None:
        """Raise ConfigError naming each of `inputs` that changed since a piece was made of it."""
        if why := changed(self.path, inputs):
            raise ConfigError(why)

    def take(self, inputs: Mapping[str, Input]) -> None:
        """Record `inputs`, all that there are, as what the run's pieces are made of. Raises as `check`."""
        self.check(inputs)
        before = Recorded.load(self.path)
        unchecked = before.unchecked if before is not None else bool(finished(self.path, EVERYTHING))
        self._inputs = dict(inputs)
        self.warnings += replaced(self.path, inputs)
        self._save(INPUTS, Recorded(self._inputs, unchecked).to_text(self.path))
        if unchecked and not self._unchecked:
            self._unchecked = True
            self.warnings += [
                f"{self.path} was begun without a record of its inputs, or that was deleted: whether its data, "
                f"models and adapter were the same before {INPUTS} was written cannot be checked"
            ]

    def store(self, name: str, made_with: Any) -> Path:
        """Return the folder of the gradient store `name`: another one where rows of other settings are in the first.

        made_with: all settings that the rows depend on, as JSON can hold them.
        """
        text = json.dumps([name, made_with], sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:12]
        path = self.path / STORES
        try:
            places = dict(json.loads(path.read_text(encoding="utf-8")))
        except (FileNotFoundError, ValueError, TypeError):
            places = {}
        for place, made in places.items():
            if made == digest:
                return self.path / place
        place = f"{name}-{digest}" if name in places else name
        write_text(path, json.dumps(places | {place: digest}, indent=1) + "\n")
        return self.path / place

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Keep other processes off the run while the block runs; raise ConfigError if one is at work.

        The lock goes with the process, however that ends; where the file system has none, nothing is kept out.
        """
        with self._lock():
            self._claim()  # another process may have come and gone since the folder was opened
            if self._inputs:
                self.take(self._inputs)
            yield

    @contextlib.contextmanager
    def _lock(self, patience: float = 0.0) -> Iterator[None]:
        """Hold the run's lock while the block runs; where another process has it, wait `patience` seconds for it."""
        try:
            import fcntl
        except ImportError:  # no such locks on this system
            yield
            return
        if self._locked:
            yield
            return
        with (self.path / LOCK).open("w") as file:
            end = time.monotonic() + patience
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() < end:
                        time.sleep(0.01)
                        continue
                    raise ConfigError(
                        f"{self.path}: another process is at work on this run; wait for it, or give another output "
                        "folder"
                    ) from None
                except OSError:
                    break
            self._locked = True
            try:
                yield
            finally:
                self._locked = False

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def has(self, name: str) -> bool:
        """Return whether the piece `name` is finished; one that can no longer be read is not."""
        return self._read(name) is not None

    def once(self, name: str, work: Callable[[], Any], of: str | None = None) -> Any:
        """Return the JSON value of `work()`, computed now or read from `<name>.json` if an earlier run finished it.

        The seconds it took are kept with it; see `seconds`. A damaged file is made again, with a warning. of: a digest
        of what the value is made of, kept with it too; see `forget_other`.
        """
        if (found := self._read(name)) is not None:
            return found["value"]
        path = self.path / f"{name}.json"
        if path.exists():
            warnings.warn(f"{path} is damaged, and is made again", stacklevel=2)
        start = time.perf_counter()
        value = work()
        done = {"seconds": time.perf_counter() - start, "value": value} | ({} if of is None else {"of": of})
        write_text(path, json.dumps(done) + "\n")
        return value

    def forget(self, name: str) -> None:
        """Remove the piece `name`, so that it is made again."""
        (self.path / f"{name}.json").unlink(missing_ok=True)

    def forget_other(self, name: str, of: str, *, unsaid: bool) -> None:
        """Remove the piece `name`, with a warning, if it was made of something else than `of`.

        unsaid: whether one that does not say of what, from an earlier version, is taken as it is.
        """
        found = self._read(name)
        if found is None or found["of"] == of or (unsaid and found["of"] is None):
            return
        warnings.warn(f"{self.path / name}.json was made of something else, and is made again", stacklevel=2)
        self.forget(name)

    def value(self, name: str, default: Any = None) -> Any:
        """Return the value of the finished piece `name`; the default where there is none."""
        found = self._read(name)
        return default if found is None else found["value"]

    def seconds(self, name: str) -> float:
        """Return the seconds that the piece `name` took to compute; 0 if it is not finished."""
        found = self._read(name)
        return 0.0 if found is None else float(found["seconds"])

    def _read(self, name: str) -> dict[str, Any] | None:
        try:
            found = json.loads((self.path / f"{name}.json").read_text(encoding="utf-8"))
            return {"value": found["value"], "seconds": float(found["seconds"]), "of": found.get("of")}
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None


def _asks_for_answers(influence: dict[str, Any]) -> bool:
    """Return whether the recorded settings of scores have the model answer the validation questions."""
    return influence.get("queries") != REFERENCE and influence.get("verdicts") is None


def _recorded(record: Path) -> Any:
    """Read the mapping of a run's recorded settings, or return in words why there is none."""
    try:
        text = record.read_text(encoding="utf-8")
        found = parse_yaml(text)
    except (UnicodeDecodeError, ConfigError):
        return "damaged"
    if not isinstance(found, dict):
        return "empty or no mapping"
    # as it is written it ends with a line; one that was cut would have defaults in the place of what it lost
    return found if text.endswith("\n") else "damaged"


def _leave_out(settings: dict[str, Any], key: str) -> None:
    """Remove a dotted key."""
    *parents, last = key.split(".")
    part: Any = settings
    for parent in parents:
        part = part.get(parent) if isinstance(part, dict) else None
    if isinstance(part, dict):
        part.pop(last, None)


def _settings(config: RunConfig) -> dict[str, Any]:
    """Return what a run's folder records.

    Without where it is, and without what only `validate` reads, of which there can be more.
    """
    settings = portable(to_dict(config), Path(config.output))
    settings.pop("output")
    settings.pop("validate")
    return settings


def portable(settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return the plain settings with paths on this machine relative to `folder`, so that they hold if both move."""
    found = copy.deepcopy(settings)
    for part, key in _paths(found).values():
        if os.path.exists(part[key]):
            part[key] = os.path.relpath(part[key], folder)
    return found


def _paths(settings: Any) -> dict[str, tuple[Any, str]]:
    """Find everything in plain settings that may be a path and is given: dotted name -> (mapping, key)."""
    names = [f"{model}.{key}" for model in ("model", "target_model") for key in ("path", "adapter", "tokenizer")]
    names += [f"data.{part}.path" for part in ("pool", "validation", "test")]
    found = {}
    for name in [*names, "influence.optimizer", "gradients.sketch"]:
        *parents, key = name.split(".")
        part = settings
        for parent in parents:
            part = part.get(parent) or {}
        if isinstance(part.get(key), str):
            found[name] = part, key
    return found


def _take_equal_paths(before: Any, now: Any, folder: Path) -> None:
    """Replace a recorded path by that of `now` which names the same file.

    Recorded paths are absolute, or relative to where an earlier version was started.
    """
    recorded = _paths(before)
    for name, (part, key) in _paths(now).items():
        if name not in recorded:
            continue
        old, _ = recorded[name]
        here = os.path.abspath(folder / part[key])
        tail = os.sep + os.path.join(*[p for p in Path(old[key]).parts if p not in ("..", ".")] or ["."])
        if (os.path.isabs(old[key]) and old[key] == here) or (not os.path.isabs(old[key]) and here.endswith(tail)):
            old[key] = part[key]


def _leave_out_what_can_grow(settings: Any) -> None:
    """Remove what changes no finished piece: the title, and more or fewer cells.

    The first seed stays: it is the reference's.
    """
    settings.pop("title", None)
    settings.get("influence", {}).pop("explain", None)
    grid = settings.get("pruning", {})
    for name in ("strategies", "fractions"):
        grid.pop(name, None)
    grid["seeds"] = grid.get("seeds", [])[:1]


def _leave_out_what_changes_nothing(settings: Any) -> None:
    """Remove the device, and a model's own tokenizer where it is named."""
    for name in ("model", "target_model"):
        model = settings.get(name)
        if isinstance(model, dict):
            model.pop("device", None)
            if model.get("adapter") is None and model.get("tokenizer") == model.get("path"):
                model["tokenizer"] = None


def _same_examples(key: str, config: RunConfig, folder: Path) -> str:
    """Return the source ("data.pool") of the setting `key` if it reads the examples that are recorded; else "".

    What a run is made of are the examples, however they are stored, read and named.
    """
    recorded = Recorded.load(folder)
    name = ".".join(key.split(".")[:2])
    source = getattr(config.data, name.removeprefix("data."), None) if key.startswith(f"{name}.") else None
    if not isinstance(source, Source) or recorded is None or name not in recorded.inputs:
        return ""
    try:
        read = examples_hash(read_source(source))
    except (InfluenceFastError, OSError):  # reading it says what is wrong with it, where nothing else is
        return ""
    return name if recorded.inputs[name].hashes == {CONTENTS: read} else ""


def _with_defaults(recorded: Any) -> Any:
    """Return a run's recorded settings, with settings that did not exist then at their defaults."""
    gradients = recorded.get("gradients") if isinstance(recorded, dict) else None
    if isinstance(gradients, dict) and "sketch" not in gradients and gradients.get("width") is not None:
        gradients["sketch"] = "random"  # there was no other
    influence = recorded.get("influence") if isinstance(recorded, dict) else None
    if isinstance(influence, dict) and "fisher" not in influence:
        influence["fisher"] = "data"  # nor were there labels of the model's
    try:
        filled = to_dict(from_dict(RunConfig, {"output": "", **recorded}))
    except (ConfigError, TypeError):
        return recorded  # of a later version: the difference says in what
    return {name: value for name, value in filled.items() if name not in ("output", "validate")}
