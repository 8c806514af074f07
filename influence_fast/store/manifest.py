"""What a gradient store says about itself: its manifest, and one record for each finished shard.

    manifest.json        what the rows are (identity), how they are laid out, and, once finished, the shards
    rows-00000.bin       [rows, width] of fp32, bf16 (as uint16) or int8, C-contiguous from byte 0
    scales-00000.bin     [rows] fp32, int8 stores only: row = int8 * scale
    losses-00000.bin     [rows] fp32, where the source of the rows gave them: the examples' losses
    ids-00000.jsonl      one JSON string a line, in row order
    shard-00000.json     the shard's record: written last, so a shard without one does not exist
    sketch-*.safetensors where rows were made by a fitted sketch (`eigen_sketch`): that, written before all else

Everything here is deterministic (no dates, no host names): the same work gives the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import stat
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from influence_fast.errors import ConfigError, StoreError, did_you_mean, one_line
from influence_fast.store.identity import StoreIdentity, short

FORMAT = "influence-fast gradient store"
FORMAT_VERSION = 1
DTYPES: dict[str, np.dtype] = {
    "fp32": np.dtype("<f4"),
    "bf16": np.dtype("<u2"),
    "int8": np.dtype("i1"),
}
SCALE_DTYPE = LOSS_DTYPE = np.dtype("<f4")
MANIFEST_NAME = "manifest.json"
_MOST = 1 << 53  # counts stay exact in whatever reads JSON
_KINDS: dict[str, Any] = {"str | None": str, "int | None": int, "float | None": int | float}  # of an identity's fields


def row_bytes(row: int, dtype: str) -> int:
    """Return the bytes of one stored row of `row` numbers: `dtype` is a key of DTYPES; int8 has a scale a row."""
    return row * DTYPES[dtype].itemsize + (SCALE_DTYPE.itemsize if dtype == "int8" else 0)


class ForeignShardError(StoreError):
    """A shard that belongs to another store, or to another place in this one."""


@dataclass(frozen=True, slots=True)
class ModuleEntry:
    """One factor's place in a row before any sketch: `shape` numbers in C order, from `offset`."""

    module: str
    factor: str
    shape: tuple[int, ...]
    offset: int


@dataclass(frozen=True, slots=True)
class Part:
    """One dataset in a store: shard i of it covers examples i * shard_rows to (i + 1) * shard_rows.

    A built store has one part; merging and appending make more. The shards of an imported or merged part need
    not be of equal length, hence `shards`.
    """

    dataset_fingerprint: str | None
    examples: int
    shard_rows: int
    shards: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """The whole of manifest.json. `row_count` and `shards` (each record's checksum) are None until finished."""

    identity: StoreIdentity
    modules: tuple[ModuleEntry, ...]
    dtype: str
    width: int
    parts: tuple[Part, ...]
    source: str
    code_version: str
    row_count: int | None = None
    shards: tuple[str, ...] | None = None
    format_version: int = FORMAT_VERSION

    @property
    def complete(self) -> bool:
        return self.row_count is not None

    @property
    def shard_count(self) -> int:
        return sum(part.shards for part in self.parts)

    def fingerprints(self) -> list[str]:
        """Return for each shard the hash that its record must carry: what the rows are, but not the dataset's rest."""
        identity = self.identity.body() | {"model_id": None, "dataset_fingerprint": None}
        common = {
            "identity": identity,
            "modules": [asdict(entry) for entry in self.modules],
            "dtype": self.dtype,
            "width": self.width,
        }
        per_part = [
            digest({**common, "data": [part.dataset_fingerprint, part.examples, part.shard_rows]})
            for part in self.parts
        ]
        return [value for value, part in zip(per_part, self.parts, strict=True) for _ in range(part.shards)]

    def ranges(self) -> list[tuple[int, int, int]]:
        """Return for each shard (offset, first, last): examples [first, last) of its part, which begins at `offset`."""
        found = []
        offset = 0
        for part in self.parts:
            starts = [shard * part.shard_rows for shard in range(part.shards)]
            found += [(offset, start, min(start + part.shard_rows, part.examples)) for start in starts]
            offset += part.examples
        return found

    def to_json(self) -> bytes:
        body = asdict(self) | {"identity": self.identity.body()}
        return _signed({"format": FORMAT, **body})

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Read a store's manifest. Raises StoreError: not a store, a damaged manifest, or one of a newer format."""
        path = folder / MANIFEST_NAME
        body = _signed_body(path, _anew(path))
        if body is None:
            raise StoreError(f"{folder} is not a gradient store: it has no {MANIFEST_NAME}")
        try:
            if body["format"] != FORMAT:
                raise StoreError(
                    f"{path} is of the format {short(body['format'])}; give the folder of a gradient store"
                )
            if body["format_version"] != FORMAT_VERSION:
                raise StoreError(
                    f"{path}: format version {body['format_version']!r}, and this code reads {FORMAT_VERSION}; "
                    "install the version of influence-fast that wrote it"
                )
            manifest = cls(
                identity=StoreIdentity(**body["identity"]),
                modules=tuple(
                    ModuleEntry(e["module"], e["factor"], tuple(e["shape"]), e["offset"]) for e in body["modules"]
                ),
                parts=tuple(Part(**part) for part in body["parts"]),
                shards=None if body["shards"] is None else tuple(body["shards"]),
                **{k: body[k] for k in ("dtype", "width", "source", "code_version", "row_count")},
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise StoreError(f"{path} is damaged ({one_line(error)}); {_anew(path)}") from None
        problem = manifest._problem()
        if problem:
            raise StoreError(f"{path} is damaged ({problem}); {_anew(path)}")
        if manifest.dtype not in DTYPES:
            raise StoreError(f"{path}: unknown dtype {short(manifest.dtype)}; {did_you_mean(manifest.dtype, DTYPES)}")
        return manifest

    def _problem(self) -> str | None:
        """Return what is of no type or size that a store can have, if anything."""
        for name in ("dtype", "source", "code_version"):
            if not isinstance(getattr(self, name), str):
                return f"{name} is no text"
        for field_ in fields(self.identity):
            kind = _KINDS.get(str(field_.type))
            value = getattr(self.identity, field_.name)
            if kind and value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
                return f"{field_.name} is {short(value)}"
        if not is_count(self.width) or self.width < 1:
            return "width is not a whole number above 0"
        return self._part_problem() or self._shard_problem() or self._module_problem()

    def _part_problem(self) -> str | None:
        for part in self.parts:
            if not all(map(is_count, (part.examples, part.shard_rows, part.shards))) or part.shard_rows < 1:
                return "a count of its parts is not a whole number"
            if part.shards > part.examples:
                return f"{part.shards} shards of {part.examples} examples"
            if not isinstance(part.dataset_fingerprint, str | None):
                return "a dataset_fingerprint is no text"
        return None if self.parts else "it has no parts"

    def _shard_problem(self) -> str | None:
        if self.shards is not None and not all(isinstance(checksum, str) for checksum in self.shards):
            return "a shard's checksum is no text"
        if self.row_count is None:
            return None
        if not is_count(self.row_count):
            return "row_count is not a whole number"
        listed = self.shards is not None and len(self.shards) == self.shard_count
        return None if listed else "it does not list its shards"

    def _module_problem(self) -> str | None:
        for entry in self.modules:
            if not isinstance(entry.module, str) or not isinstance(entry.factor, str):
                return "the name of a module is no text"
            if len(entry.shape) != 2 or not all(map(is_count, (*entry.shape, entry.offset))) or 0 in entry.shape:
                return f"the shape or offset of {short(entry.module)} is none"
        return None

    def check_same_work(self, wanted: Manifest, where: Path) -> None:
        """Raise StoreError naming what differs, when `wanted` would give other rows or other shards."""
        self.identity.check(wanted.identity, where)
        mine = {"dtype": self.dtype, "width": self.width, "modules": self.modules, "parts": self.parts}
        for name, value in mine.items():
            other = getattr(wanted, name)
            if value == other:
                continue
            if name == "parts" and len(self.parts) == len(wanted.parts) == 1:
                a, b = self.parts[0], wanted.parts[0]
                name = next(f.name for f in fields(Part) if getattr(a, f.name) != getattr(b, f.name))
                value, other = getattr(a, name), getattr(b, name)
            raise StoreError(
                f"{where}: {name} is {short(value)} in the store and {short(other)} here; "
                "give the same value, or build a new store elsewhere"
            )


@dataclass(frozen=True, slots=True)
class FileRecord:
    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class ShardRecord:
    """Contents of shard-NNNNN.json: the shard's place, its files with checksums, and what was left out of it.

    `first` and `last` are the range of examples covered, in the order of its part's dataset; of these, `rows` are
    stored and the rest is in `set_aside` as (id, reason). `tokens`: SHA-256 of the token ids and labels that the rows
    were made from; None where that is not known.
    """

    index: int
    fingerprint: str
    first: int
    last: int
    rows: int
    files: dict[str, FileRecord]
    set_aside: tuple[tuple[str, str], ...] = field(default=())
    tokens: str | None = None

    @property
    def checksum(self) -> str:
        return digest(self._body())

    def _body(self) -> dict[str, Any]:
        body = {"format_version": FORMAT_VERSION, **asdict(self)}
        if self.tokens is None:
            del body["tokens"]  # records of earlier versions keep their checksums
        return body

    def to_json(self) -> bytes:
        return _signed(self._body())

    def moved(self, index: int) -> ShardRecord:
        """Return the same shard at another place in another store."""
        files = {k: replace(f, name=file_name(k, index)) for k, f in self.files.items()}
        return replace(self, index=index, files=files)

    @classmethod
    def load(cls, folder: Path, index: int, manifest: Manifest, fingerprint: str) -> ShardRecord:
        """Read a shard's record. Raises StoreError naming it: missing, damaged, another store's, pointing elsewhere."""
        path = folder / file_name("shard", index)
        body = _signed_body(path, REBUILD)
        if body is None:
            raise StoreError(f"{path} is missing; {REBUILD}")
        try:
            record = cls(
                files={kind: FileRecord(**entry) for kind, entry in body["files"].items()},
                set_aside=tuple((i, reason) for i, reason in body["set_aside"]),
                tokens=body.get("tokens"),
                **{k: body[k] for k in ("index", "fingerprint", "first", "last", "rows")},
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise StoreError(f"{path} is damaged ({one_line(error)}); {REBUILD}") from None
        for kind, entry in record.files.items():
            if entry.name != file_name(kind, index):
                raise ForeignShardError(
                    f"{path}: it points to {short(entry.name)}, which is not this shard's own file in the folder; "
                    f"{REBUILD}"
                )
        if record.index != index or record.fingerprint != fingerprint:
            raise ForeignShardError(f"{path} is foreign: it was written for another store or another place; {REBUILD}")
        problem = record._problem(manifest)
        if problem:
            raise StoreError(f"{path} is damaged ({problem}); {REBUILD}")
        return record

    def _problem(self, manifest: Manifest) -> str | None:
        """Return what does not fit together in a record of a store with this manifest, if anything."""
        if not all(map(is_count, (self.first, self.last, self.rows))) or not self.first <= self.last:
            return "a count is not a whole number"
        if not isinstance(self.tokens, str | None):
            return "tokens is no checksum"
        if any(not isinstance(text, str) for item in self.set_aside for text in item):
            return "an id or reason in set_aside is no text"
        if self.rows + len(self.set_aside) > self.last - self.first:
            return f"{self.rows} rows and {len(self.set_aside)} set aside of {self.last - self.first} examples"
        if not all(is_count(entry.bytes) and isinstance(entry.sha256, str) for entry in self.files.values()):
            return "the size or checksum of a file is none"
        expected = {"rows": self.rows * manifest.width * DTYPES[manifest.dtype].itemsize}
        if manifest.dtype == "int8":
            expected["scales"] = self.rows * SCALE_DTYPE.itemsize
        if "losses" in self.files:
            expected["losses"] = self.rows * LOSS_DTYPE.itemsize
        sizes = {kind: entry.bytes for kind, entry in self.files.items() if kind != "ids"}
        fits = sizes == expected and "ids" in self.files
        return None if fits else f"its sizes do not fit {self.rows} rows"


REBUILD = "delete it and build the store again, which keeps what is whole"


def _anew(path: Path) -> str:
    """Return the remedy for a manifest that says nothing: no shard counts without it."""
    return f"restore it, or delete the folder {path.parent} and build the store again"


def file_name(kind: str, index: int) -> str:
    """Return the only name that a shard's file may have: nothing in a record can lead out of the folder."""
    suffix = {"ids": "jsonl", "shard": "json"}.get(kind, "bin")
    return f"{kind}-{index:05d}.{suffix}"


def is_count(value: object) -> bool:
    """Return whether a value from a file is a whole number that can count bytes on a disk."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _MOST


def inside(folder: Path, name: str) -> Path:
    """Return `folder / name`, followed through links. Raises StoreError when that is outside the folder."""
    path = folder / name
    try:
        leads_to = path.resolve()
    except (OSError, RuntimeError):  # links in a circle, which Python 3.11 reports by a RuntimeError
        raise StoreError(f"{path} is a link that leads nowhere; put the file itself there") from None
    if leads_to.parent != folder.resolve():
        raise StoreError(f"{path} leads out of the store's folder; put the file itself there")
    return path


def _signed(body: dict[str, Any]) -> bytes:
    """Return a JSON file that carries its own checksum."""
    return (json.dumps({**body, "checksum": digest(body)}, indent=1) + "\n").encode()


def _signed_body(path: Path, remedy: str) -> dict[str, Any] | None:
    """Return what `_signed` wrote; None where there is no file. Raises StoreError when it was changed."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # reading a pipe would wait for ever
            raise StoreError(f"{path} is no file; {remedy}")
        body = json.loads(path.read_bytes())
        stated = body.pop("checksum")
        found = digest(body)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise StoreError(f"{path} cannot be read ({type(error).__name__}: {one_line(error)}); {remedy}") from None
    if found != stated:
        raise StoreError(f"{path} is damaged (its checksum does not fit); {remedy}")
    return body


def digest(value: Any) -> str:
    """Return the SHA-256 of the value's canonical JSON, in hex."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def joined_fingerprint(parts: Sequence[Part]) -> str | None:
    """Return the dataset fingerprint of a whole store: its only part's, or a hash over the parts in order."""
    values = [part.dataset_fingerprint for part in parts]
    if len(values) == 1:
        return values[0]
    return None if None in values else digest(values)


def check_dtype(dtype: str) -> None:
    """Raise ConfigError for a dtype that stores do not have."""
    if dtype not in DTYPES:
        raise ConfigError(f"unknown store dtype {dtype!r}; {did_you_mean(str(dtype), DTYPES)}")
