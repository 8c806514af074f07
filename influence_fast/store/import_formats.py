"""Read the gradients of other tools' files: LESS, TRAK, bergson, plain numpy arrays and safetensors."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np
import torch

from influence_fast.errors import ConfigError, StoreError, did_you_mean, one_line, setting, shown, truncated_list
from influence_fast.guards import check_no_pipe
from influence_fast.row_codec import bf16_of_bits
from influence_fast.store.manifest import ModuleEntry

_MOST_TIMES = 100  # the size of a file that its tensor may have: the zip format packs nothing


@dataclass(frozen=True)
class Source:
    """Rows somewhere else. `read(start, stop)` gives [stop - start, width] of any float dtype.

    `absent`: why some rows hold nothing, by place. `note` tells where the rows come from, in the manifest.
    """

    rows: int
    width: int
    note: str
    read: Callable[[int, int], torch.Tensor]
    modules: tuple[ModuleEntry, ...] = ()
    absent: dict[int, str] = field(default_factory=dict)


# ---- LESS: <output>/dim8192/{grads-160.pt, grads-320.pt, ..., all_orig.pt, all_unormalized.pt} ---------------------


def less(path: Path, *, file: str | None = None) -> Source:
    """Read a LESS gradient folder, or one of its .pt files: fp16 or fp32 tensors [rows, dim] of projected gradients.

    Unless `file` names one: `all_unormalized.pt` (the gradients), else the pieces `grads-N.pt` (N: rows up to its
    end), else `all_orig.pt` (each row scaled to unit norm, so only its direction is left).
    """
    folder = path.parent if path.is_file() else path
    if path.is_file() and file is not None and file != path.name:
        raise ConfigError(f"file={file!r} beside the file {path}: give the folder, or leave one of the two out")
    wanted = path.name if path.is_file() else file
    pieces = sorted(folder.glob("grads-*.pt"), key=_piece_end)
    if wanted is not None:
        files = [folder / wanted]
    elif (folder / "all_unormalized.pt").exists():
        files = [folder / "all_unormalized.pt"]
    elif pieces:
        files = pieces
    else:
        files = [folder / "all_orig.pt"]
    if not files[0].exists():
        dims = sorted(p.name for p in folder.glob("dim*"))
        hint = (
            f"give one of its folders: {truncated_list(dims)}"
            if dims
            else "give a folder with all_orig.pt or grads-*.pt"
        )
        raise StoreError(f"{files[0]} does not exist; {hint}")
    tensors = [_load_tensor(name) for name in files]
    if files == pieces and wanted is None:
        end = 0
        for name, tensor in zip(files, tensors, strict=True):
            end += tensor.shape[0]
            if end != _piece_end(name):
                raise StoreError(f"{name} should end at row {_piece_end(name)}, it ends at {end}: a piece is missing")
    what = f"{files[0].name} to {files[-1].name}" if len(files) > 1 else files[0].name
    unit = ", rows of unit norm" if files[0].name == "all_orig.pt" else ""
    return _concatenated(tensors, folder, f"LESS {what}{unit}")


def _piece_end(path: Path) -> int:
    match = re.fullmatch(r"grads-(\d+)\.pt", path.name)
    if match is None:
        raise StoreError(f"{path} is not named as LESS names pieces (grads-160.pt); rename or remove it")
    return int(match.group(1))


def _load_tensor(path: Path) -> torch.Tensor:
    check_no_pipe(path, StoreError)
    try:
        try:
            tensor = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # files of before the zip format cannot be mapped
            tensor = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many kinds, for damage and for unsafe pickles
        raise StoreError(f"{path} cannot be read as a tensor ({_line(error)}); save it again") from None
    if not isinstance(tensor, torch.Tensor):
        raise StoreError(f"{path} holds a {type(tensor).__name__}, not one tensor [rows, width]; convert it first")
    if tensor.layout != torch.strided or tensor.is_nested or tensor.is_quantized or tensor.is_meta:
        kind = "meta" if tensor.is_meta else "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")
        kind = "quantized" if tensor.is_quantized else kind
        raise StoreError(f"{path} holds a {kind} tensor, not a dense one [rows, width]; convert it first")
    if tensor.numel() * tensor.element_size() > _MOST_TIMES * path.stat().st_size:  # an expanded tensor
        raise StoreError(
            f"{path} says that it is {list(tensor.shape)}, which its bytes do not hold; save it contiguous"
        )
    return tensor.detach()


def _concatenated(tensors: list[torch.Tensor], where: Path, note: str) -> Source:
    for tensor in tensors:
        _check_matrix(tuple(tensor.shape), tensor.dtype.is_floating_point, str(tensor.dtype), where)
        if tensor.shape[1] != tensors[0].shape[1]:
            raise StoreError(
                f"{where}: pieces of width {tensors[0].shape[1]} and {tensor.shape[1]} do not fit together"
            )
    starts = np.cumsum([0] + [tensor.shape[0] for tensor in tensors])

    def read(start: int, stop: int) -> torch.Tensor:
        inside = [
            tensor[max(0, start - first) : stop - first].to(torch.float32)
            for tensor, first in zip(tensors, starts.tolist(), strict=False)
            if first < stop and first + tensor.shape[0] > start
        ]
        return torch.cat(inside)

    return Source(int(starts[-1]), tensors[0].shape[1], note, read)


# ---- TRAK: <save_dir>/metadata.json, <save_dir>/<model id>/{grads,features,_is_featurized}.mmap (npy files) --------


def trak(path: Path, *, model_id: int | str | None = None, kind: str = "grads") -> Source:
    """Read a TRAK save_dir: for one checkpoint the projected gradients ("grads") or features ("features",
    `grads (grads^T grads)^-1`); TRAK's default deletes neither, but `del_grads=True` does the first."""
    if kind not in ("grads", "features"):
        raise ConfigError(f"unknown kind {kind!r} of TRAK rows; {did_you_mean(kind, ('grads', 'features'))}")
    if not path.is_dir():
        raise StoreError(f"{path} is a file, and TRAK's save_dir is a folder; give that, or another format")
    metadata = _json(path / "metadata.json") if (path / "metadata.json").exists() else {}
    found = sorted(int(p.name) for p in path.iterdir() if p.is_dir() and p.name.isdigit())
    if model_id is None and len(found) != 1:
        raise StoreError(
            f"{path} has checkpoints {truncated_list(map(str, found)) or 'none'}; choose one with "
            f"{setting('model_id', '...')}"
        )
    if model_id is not None and str(model_id) not in map(str, found):
        raise StoreError(f"{path} has no checkpoint {model_id!r}, but {truncated_list(map(str, found)) or 'none'}")
    folder = path / str(found[0] if model_id is None else model_id)
    array = _load_npy(folder / f"{kind}.mmap")
    for axis, field_name in enumerate(("train set size", "JL dimension")):
        if field_name in metadata and (array.ndim != 2 or array.shape[axis] != metadata[field_name]):
            raise StoreError(
                f"{folder / kind}.mmap is {list(array.shape)}, and metadata.json has {field_name} "
                f"{shown(metadata[field_name])}; they do not belong together"
            )
    source = _from_array(array, folder, f"TRAK {kind}, checkpoint {folder.name}")
    flags = folder / "_is_featurized.mmap"
    if not flags.exists():  # before traker 0.3
        return source
    done = np.asarray(_load_npy(flags)).reshape(-1)
    if done.shape[0] != source.rows:
        raise StoreError(f"{flags} has {done.shape[0]} flags for {source.rows} rows; they do not belong together")
    absent = {int(i): "TRAK did not featurize it" for i in np.flatnonzero(done == 0)}
    return replace(source, absent=absent)


# ---- bergson: {info.json, gradients.bin}, or one folder with these for each shard ----------------------------------


def bergson(path: Path) -> Source:
    """Read a bergson index: a flat [rows, sum of module sizes] of one dtype, modules in the order of `grad_sizes`."""
    folders = [path] if (path / "info.json").exists() else sorted(p.parent for p in path.glob("*/info.json"))
    if not folders:
        raise StoreError(f"{path} is no bergson index: neither it nor a folder in it has an info.json")
    tensors, layouts = [], []
    for folder in folders:
        tensor, sizes = _bergson_piece(folder)
        tensors.append(tensor)
        layouts.append(sizes)
        if sizes != layouts[0]:
            raise StoreError(f"{folder} has other modules than {folders[0]}; import them one by one")
    modules, offset = [], 0
    for module, size in layouts[0].items():
        modules.append(ModuleEntry(module, "gradient", (1, size), offset))
        offset += size
    return replace(_concatenated(tensors, path, "bergson index"), modules=tuple(modules))


def _bergson_piece(folder: Path) -> tuple[torch.Tensor, dict[str, int]]:
    info = _json(folder / "info.json")
    if info.get("attribute_tokens"):
        raise StoreError(f"{folder} has a row a token, not a row an example; build it without attribute_tokens")
    try:
        sizes = {str(name): int(size) for name, size in info["grad_sizes"].items()}
        rows = int(info["num_grads"])
        # before base_dtype there was only a structured dtype, with formats such as "(256,)<f2"
        stated = str(info["base_dtype"] if "base_dtype" in info else info["dtype"]["formats"][0]).split(")")[-1]
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError) as error:
        raise StoreError(f"{folder / 'info.json'} is not bergson's ({error!r}); give a bergson index") from None
    is_bf16 = stated == "bfloat16" or stated[1:] == "V2"  # as numpy calls bf16 with and without ml_dtypes
    try:
        dtype = np.dtype("<u2") if is_bf16 else np.dtype(stated)
    except (TypeError, ValueError, SyntaxError):
        dtype = np.dtype("O")
    if dtype.kind not in "fu":
        raise StoreError(f"{folder / 'info.json'}: unknown dtype {shown(stated)}; build the index in float32") from None
    if rows < 0 or any(size < 0 for size in sizes.values()):
        raise StoreError(f"{folder / 'info.json'} has numbers below 0 for rows or sizes; give a bergson index")
    width = sum(sizes.values())
    path = folder / "gradients.bin"
    size = path.stat().st_size if path.exists() else 0
    if size != rows * width * dtype.itemsize or width == 0:
        raise StoreError(f"{path} has {size} bytes, info.json says {rows} rows of {width} {stated}; build it again")
    if rows == 0:
        return torch.zeros(0, width), sizes
    # "c": torch wants memory it may write to; nothing is written, and nothing could reach the file
    array = np.memmap(path, dtype=dtype, mode="c", shape=(rows, width))
    if is_bf16:
        return bf16_of_bits(array), sizes
    return torch.from_numpy(array), sizes


# ---- plain files ---------------------------------------------------------------------------------------------------


def npy(path: Path) -> Source:
    """Read a numpy file of one float array [rows, width]."""
    return _from_array(_load_npy(path), path, f"{path.name}")


def safetensors(path: Path, *, key: str | None = None) -> Source:
    """Read a safetensors file; `key` names the tensor [rows, width] where there are several."""
    from safetensors import SafetensorError, safe_open

    try:
        handle = safe_open(path, framework="pt")
        keys = sorted(handle.keys())
    except (SafetensorError, OSError) as error:
        raise StoreError(f"{path} cannot be read as safetensors ({_line(error)}); save it again") from None
    if key is None and len(keys) != 1:
        raise StoreError(
            f"{path} holds {len(keys)} tensors ({truncated_list(keys)}); choose one with {setting('key', '...')}"
        )
    name = keys[0] if key is None else key
    if name not in keys:
        raise StoreError(f"{path} has no tensor {shown(name)}; {did_you_mean(name, keys)}")
    part = handle.get_slice(name)
    shape = tuple(part.get_shape())
    _check_matrix(shape, part.get_dtype() in ("F64", "F32", "F16", "BF16"), part.get_dtype(), path)
    return Source(shape[0], shape[1], f"{path.name}: {name}", lambda start, stop: part[start:stop])


def detect(path: Path) -> str:
    if path.is_file():
        kinds = {".npy": "npy", ".safetensors": "safetensors", ".pt": "less"}
        if path.suffix in kinds:
            return kinds[path.suffix]
    elif (path / "metadata.json").exists() and "JL dimension" in _json(path / "metadata.json"):
        return "trak"
    elif (path / "info.json").exists() or any(path.glob("*/info.json")):
        return "bergson"
    elif any(path.glob("*.pt")) or any(path.glob("dim*")):
        return "less"
    raise StoreError(f"{path}: no known gradients found; say which format it is: {', '.join(FORMATS)}")


def _from_array(array: np.ndarray, where: Path, note: str) -> Source:
    shape = tuple(array.shape)
    _check_matrix(shape, np.issubdtype(array.dtype, np.floating), str(array.dtype), where)
    return Source(
        shape[0], shape[1], note, lambda start, stop: torch.from_numpy(np.array(array[start:stop], dtype=np.float32))
    )


def _load_npy(path: Path) -> np.ndarray:
    try:
        check_no_pipe(path, StoreError)
        loaded = np.load(path, mmap_mode="r", allow_pickle=False)
    except (
        OSError,
        ValueError,
        EOFError,
        OverflowError,
        SyntaxError,
        RecursionError,
        MemoryError,
        TokenError,
    ) as error:
        raise StoreError(f"{path} cannot be read as a numpy file ({_line(error)}); give one that can") from None
    if not isinstance(loaded, np.ndarray):
        raise StoreError(f"{path} holds several arrays (.npz); save the one of the gradients as .npy")
    return loaded


def _check_matrix(shape: tuple[int, ...], is_float: bool, dtype: str, where: Path) -> None:
    if len(shape) != 2 or shape[1] == 0 or not is_float:
        raise StoreError(
            f"{where}: gradients are floats [rows, width], this is {dtype} {list(shape)}; convert it first"
        )


def _json(path: Path) -> dict[str, Any]:
    try:
        body = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise StoreError(f"{path} cannot be read ({_line(error)}); give a whole folder") from None
    if not isinstance(body, dict):
        raise StoreError(f"{path} does not hold a JSON object; give a whole folder")
    return body


def _line(error: BaseException) -> str:
    return one_line(error)


FORMATS: dict[str, Callable[..., Source]] = {
    "less": less,
    "trak": trak,
    "bergson": bergson,
    "npy": npy,
    "safetensors": safetensors,
}
