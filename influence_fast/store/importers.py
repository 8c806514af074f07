"""Gradients that people already have, as stores: LESS folders, TRAK memory maps, bergson indices, .npy, .safetensors.

What a foreign file does not record (model, tokenizer, projection) is "not recorded" in the store; say it with
`identity` where you know it. Rows are imported as they are: query gradients must be made by the same tool, with the
same projection.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import influence_fast
from influence_fast.errors import ConfigError, StoreError, did_you_mean, setting, shown
from influence_fast.guards import check_no_pipe, reading
from influence_fast.store.building import warn_of_set_aside
from influence_fast.store.identity import StoreIdentity
from influence_fast.store.ids import check_unique
from influence_fast.store.import_formats import FORMATS, Source, detect
from influence_fast.store.manifest import Manifest, Part, check_dtype, digest
from influence_fast.store.reader import Store
from influence_fast.store.writer import StoreWriter

__all__ = ["FORMATS", "import_gradients"]

_SHARD_BYTES = 1 << 28
_MAX_SHARD_ROWS = 4096


def import_gradients(
    source: str | Path,
    out: str | Path,
    *,
    format: str = "auto",
    ids: Sequence[str] | None = None,
    dtype: str = "fp32",
    identity: StoreIdentity | None = None,
    resume: bool = True,
    **options: Any,
) -> Store:
    """Copy gradients of another tool into a new store in `out`.

    Args:
        source: the file or folder, see `FORMATS`.
        format: a key of `FORMATS`; "auto" looks at what is there.
        ids: one for each row, in order; by default the row's number.
        dtype: of the store; "fp32" keeps fp32, fp16 and bf16 gradients exactly.
        identity: what you know of model, tokenizer and projection; later checks use it.
        resume: go on with an interrupted import into `out`.
        options: of the format. less: `file`; trak: `model_id`, `kind`; safetensors: `key`.

    Returns:
        The store; rows that are NaN, infinite or were never computed are in `store.set_aside`, and a warning sums them
        up.

    Raises:
        StoreError: not that format, truncated or inconsistent, ids that do not fit or come twice.
        DataError: not one row is finite.
        ConfigError: an unknown format or option.
    """
    path = Path(source)
    check_dtype(dtype)
    with reading(path, StoreError):
        return _imported(path, out, format, ids, dtype, identity, resume, options)


def _imported(
    path: Path,
    out: str | Path,
    format: str,
    ids: Sequence[str] | None,
    dtype: str,
    identity: StoreIdentity | None,
    resume: bool,
    options: dict[str, Any],
) -> Store:
    check_no_pipe(path, StoreError)
    if not path.exists():
        raise StoreError(f"{path} does not exist; give the gradients' file or folder")
    name = detect(path) if format == "auto" else format
    if not isinstance(name, str) or name not in FORMATS:
        raise ConfigError(f"unknown gradient format {shown(name)}; {did_you_mean(name, FORMATS)}")
    known = options_of(name)
    for option in options:
        if option not in known:
            hint = did_you_mean(option, known) if known else "it has none, leave it out"
            raise ConfigError(f"{setting('format')} {name!r} has no option {option!r}; {hint}")
    rows = FORMATS[name](path, **options)
    if ids is None:
        names = [str(i) for i in range(rows.rows)]
    elif isinstance(ids, str) or not isinstance(ids, Sequence) or not all(isinstance(i, str) for i in ids):
        raise StoreError(f"{path} has {rows.rows} rows; give as many ids, all strings (not {shown(ids)})")
    elif len(ids) != rows.rows:
        raise StoreError(f"{path} has {rows.rows} rows; give as many ids, all strings (there are {len(ids)})")
    else:
        names = list(ids)
    check_unique(names, "the ids given")
    return _copy(rows, names, out, dtype, identity or StoreIdentity(projection_kind="unknown"), resume)


def options_of(format: str) -> list[str]:
    """Return the names of the options that a key of `FORMATS` takes."""
    return [name for name in inspect.signature(FORMATS[format]).parameters if name != "path"]


def _copy(rows: Source, names: list[str], out: str | Path, dtype: str, identity: StoreIdentity, resume: bool) -> Store:
    if identity.projection_kind is None:
        identity = replace(identity, projection_kind="unknown")
    shard_rows = max(1, min(_MAX_SHARD_ROWS, _SHARD_BYTES // (4 * rows.width)))
    content = _content_hash(rows, names, shard_rows)
    if identity.dataset_fingerprint is None:
        identity = replace(identity, dataset_fingerprint=content)
    part = Part(content, rows.rows, shard_rows, -(-rows.rows // shard_rows))
    manifest = Manifest(
        identity=identity,
        modules=rows.modules,
        dtype=dtype,
        width=rows.width,
        parts=(part,),
        source=f"import of {rows.note}",
        code_version=influence_fast.__version__,
    )
    writer = StoreWriter(out, manifest, resume=resume)
    for index in writer.pending():
        first, last = index * shard_rows, min((index + 1) * shard_rows, rows.rows)
        values = rows.read(first, last).to(torch.float32)
        finite = torch.isfinite(values).all(dim=1).tolist()
        reasons = {i: "the gradient is NaN or infinite" for i in range(last - first) if not finite[i]}
        reasons |= {i - first: reason for i, reason in rows.absent.items() if first <= i < last}
        kept = [i for i in range(last - first) if i not in reasons]
        writer.write_shard(
            index,
            [names[first + i] for i in kept],
            values[kept],
            first=first,
            last=last,
            set_aside=[(names[first + i], reasons[i]) for i in sorted(reasons)],
        )
    store = writer.finalize()
    warn_of_set_aside(store, rows.rows)
    return store


def _content_hash(rows: Source, names: list[str], step: int) -> str:
    """Hash the source in one pass: a file of the same name and shape with other numbers is another dataset."""
    found = hashlib.sha256(digest([names, sorted(rows.absent.items())]).encode())
    for start in range(0, rows.rows, step):
        found.update(rows.read(start, min(start + step, rows.rows)).to(torch.float32).contiguous().numpy().data)
    return found.hexdigest()
