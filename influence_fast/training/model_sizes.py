"""The sizes in a model's configuration against its weights, before a module of these sizes is made."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from influence_fast.errors import ModelError, shown

_SIZE = re.compile(
    r"(\w+_)?(vocab_size|hidden_size|intermediate_size|ffn_dim|head_dim|heads?|experts|embd|inner|layers?|positions)"
    r"|d_(model|ff|kv)"
)
_LAYERS = re.compile(r"(num_(\w+_)?layers|n_layers?)")
_WIDER = 8  # a size may be so many times the longest side of any weight: packed weights, fused heads, contexts
_LARGEST_HEADER = 100_000_000  # bytes, as in the safetensors library


def check_model_sizes(source: str) -> None:
    """Raise ModelError where the configuration in a local folder has sizes that no weight there comes near.

    A file of one kB may ask for a billion layers, and making these takes hours and all memory. Hub ids, and folders
    whose files cannot be read, pass: loading them says what is wrong.
    """
    folder = Path(source).expanduser()
    try:
        settings = json.loads((folder / "config.json").read_bytes())
        shapes = [shape for path in folder.glob("*.safetensors") for shape in _shapes(path)]
        longest = max((side for shape in shapes for side in shape), default=0)
    except (OSError, ValueError, RecursionError, TypeError, AttributeError, KeyError, struct.error):
        return
    if not shapes:
        return
    for name, value in _sizes(settings):
        last = name.rpartition(".")[2]
        most = len(shapes) if _LAYERS.fullmatch(last) else _WIDER * max(longest, len(shapes))
        if value <= most:
            continue
        raise ModelError(
            f"{folder / 'config.json'}: {name} is {shown(value)}, and the weights beside it have {len(shapes):,} "
            f"tensors of at most {longest:,} numbers a side; put back the configuration that belongs to them"
        )


def _sizes(settings: Any, where: str = "", level: int = 0) -> Iterator[tuple[str, int]]:
    if not isinstance(settings, dict) or level > 5:
        return
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _sizes(value, f"{where}{name}.", level + 1)
        elif isinstance(value, int) and _SIZE.fullmatch(str(name)):
            yield f"{where}{name}", value


def _shapes(path: Path) -> Iterator[list[int]]:
    """Yield the shapes in the header of a safetensors file."""
    with path.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(min(size, _LARGEST_HEADER)))
    yield from (entry["shape"] for name, entry in header.items() if name != "__metadata__")
