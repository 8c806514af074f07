"""A run's folder: finished pieces of work are kept by name, and found again when the run is repeated."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from influence_fast.atomic import write_text
from influence_fast.config import RunConfig
from influence_fast.errors import ConfigError
from influence_fast.settings import difference, from_dict, to_dict

CONFIG = "config.yaml"


def occupied(config: RunConfig) -> str:
    """Why a run of `config` cannot go into `config.output`, and what to do: what lies there, and the first setting that
    differs; empty where it can."""
    import yaml

    path = Path(config.output)
    record = path / CONFIG
    if path.is_file():
        return f"{path} is a file, and a run needs a folder: choose another output"
    if not record.exists():
        if path.exists() and any(path.iterdir()):
            return f"{path} is not empty and holds no run: choose another output folder"
        return ""
    recorded = yaml.safe_load(record.read_text(encoding="utf-8"))
    if not isinstance(recorded, dict):
        return f"{path} holds no run ({record.name} is empty or no mapping): choose another output folder"
    before, now = _with_defaults(recorded), _settings(config)
    _take_equal_paths(before, now, path)
    for part in (before, now):
        _leave_out_what_can_grow(part)
    if not (path / "scoring_seconds.json").exists():  # what follows the answers can still be decided otherwise
        for part in (before, now):
            part.get("influence", {}).pop("fallback", None)
    differs = difference(before, now)
    if not differs:
        return ""
    return f"{path} holds a run of another configuration ({differs}): choose another output folder, or delete this one"


class RunFolder:
    """Opens `config.output`, new or left by an earlier run of the same configuration.

    Raises ConfigError when the folder holds something else, naming the first setting that differs.
    """

    def __init__(self, config: RunConfig) -> None:
        import yaml

        self.path = Path(config.output)
        if why := occupied(config):
            raise ConfigError(why)
        write_text(self.path / CONFIG, yaml.safe_dump(_settings(config), sort_keys=False))

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """While the block runs, no other process works on the run. Raises ConfigError where one does.

        The lock goes with the process, however that ends; where the file system has none, nothing is kept out.
        """
        try:
            import fcntl
        except ImportError:  # no such locks on this system
            yield
            return
        with (self.path / ".lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError(
                    f"{self.path}: another process is at work on this run; wait for it, or give another output folder"
                ) from None
            except OSError:
                pass
            yield

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def has(self, name: str) -> bool:
        """Whether the piece `name` is finished."""
        return (self.path / f"{name}.json").exists()

    def once(self, name: str, work: Callable[[], Any]) -> Any:
        """The JSON value of `work()`, computed now or read from `<name>.json` if an earlier run finished it.

        The seconds it took are kept with it; see `seconds`.
        """
        path = self.path / f"{name}.json"
        if self.has(name):
            return json.loads(path.read_text(encoding="utf-8"))["value"]
        start = time.perf_counter()
        value = work()
        finished = {"seconds": time.perf_counter() - start, "value": value}
        write_text(path, json.dumps(finished) + "\n")
        return value

    def seconds(self, name: str) -> float:
        """How long the finished piece `name` took when it was computed."""
        return float(json.loads((self.path / f"{name}.json").read_text(encoding="utf-8"))["seconds"])


def _settings(config: RunConfig) -> dict[str, Any]:
    """What a run's folder records: not where it is, nor what only `validate` reads, of which there can be more."""
    settings = portable(to_dict(config), Path(config.output))
    settings.pop("output")
    settings.pop("validate")
    return settings


def portable(settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The plain settings with paths of what is on this machine relative to `folder`: they hold where both move."""
    found = copy.deepcopy(settings)
    for part, key in _paths(found).values():
        if os.path.exists(part[key]):
            part[key] = os.path.relpath(part[key], folder)
    return found


def _paths(settings: Any) -> dict[str, tuple[Any, str]]:
    """Dotted name -> (mapping, key) of everything in plain settings that may be a path and is given."""
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
    """Puts a path of `now` in the place of the recorded one that names the same: absolute, or from where an earlier
    version was started."""
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
    """What changes no finished piece: the title, and more or fewer cells. The first seed is the reference's."""
    settings.pop("title", None)
    settings.get("influence", {}).pop("explain", None)
    grid = settings.get("pruning", {})
    for name in ("strategies", "fractions"):
        grid.pop(name, None)
    grid["seeds"] = grid.get("seeds", [])[:1]


def _with_defaults(recorded: Any) -> Any:
    """A run's recorded settings, with those that did not exist then as they are by default."""
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
