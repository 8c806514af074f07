"""Reads a gradient store: rows memory-mapped from disk, in blocks or by index, and checked against their records.

The format is in `manifest`, the writing in `writer`; `build_store` and the importers make stores.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch

from influence_fast.data.fingerprints import dataset_fingerprint
from influence_fast.data.held import Held
from influence_fast.errors import StoreError, truncated_list
from influence_fast.gradients.rows.precision import AUTO
from influence_fast.gradients.rows.projection import Projection
from influence_fast.gradients.rows.row_spec import RowSpec
from influence_fast.row_codec import decoded_arrays
from influence_fast.store.checksums import file_damage, read_checked
from influence_fast.store.identity import StoreIdentity
from influence_fast.store.ids import check_unique, read_ids
from influence_fast.store.manifest import DTYPES, LOSS_DTYPE, REBUILD, SCALE_DTYPE, Manifest, ShardRecord, inside
from influence_fast.store.verification import fitted_sketch, verify_store, wrong_files

__all__ = ["Store", "StoreIdentity", "open_store", "verify_store"]

_CHECKED_AT_ONCE = 4  # shards whose rows are hashed at the same time, a thread each
_MAPPED_SHARDS = 64  # each mapping holds a file descriptor; a process has about 1000


class Store:
    """A finished gradient store, opened for reading. Row i is the gradient of the example `ids[i]`.

    path: its folder. manifest: what it says about itself. ids: the rows' example ids, in order.
    set_aside: (id, reason) of every example that was reported and not stored.

    `open_store` makes one, and says what is checked when.

    Example:
        >>> store = inf.open_store("store")  # doctest: +SKIP
        >>> store["q17"], len(store), store.rows([0, 1]).shape  # doctest: +SKIP
    """

    def __init__(
        self, path: Path, manifest: Manifest, records: Sequence[ShardRecord], *, check_rows: bool = True
    ) -> None:
        self.path = path
        self.manifest = manifest
        self._records = list(records)
        self._starts = list(accumulate((record.rows for record in records), initial=0))
        self.ids: list[str] = [i for record in records for i in read_ids(path, record)]
        if len(set(self.ids)) < len(self.ids):
            check_unique(self.ids, str(path))
        self._small = [_small_arrays(path, record) for record in records]
        self.set_aside: list[tuple[str, str]] = [item for record in records for item in record.set_aside]
        self._unread = set(range(len(self._records))) if check_rows else set()  # shards whose rows are to be checked
        #: The data that it was built of and how that became tokens, in the process that built it.
        self.built_of: tuple[Sequence[Any], Any] | None = None
        self._mapped = functools.lru_cache(maxsize=_MAPPED_SHARDS)(self._map)

    def __len__(self) -> int:
        return self._starts[-1]

    def __repr__(self) -> str:
        return f"Store({str(self.path)!r}, rows={len(self)}, width={self.width}, dtype={self.dtype!r})"

    def __getitem__(self, key: str | slice | int | Sequence[int] | Sequence[str] | np.ndarray) -> torch.Tensor:
        """Return the row of an id or a place, (width,) fp32; for a slice, a list of either or a mask, (n, width).

        Raises StoreError for an id or a place that the store does not have.
        """
        if isinstance(key, str):
            return self.rows(self.positions([key]))[0]
        if isinstance(key, Sequence | np.ndarray) and len(key) and all(isinstance(item, str) for item in key):
            return self.rows(self.positions([str(item) for item in key]))
        rows = self.rows(key)  # type: ignore[arg-type]  # no ids any more
        return rows[0] if isinstance(key, int | np.integer) else rows

    def __iter__(self) -> Iterator[torch.Tensor]:
        """Yield the rows in order, (width,) fp32 each, a block of them in memory at a time."""
        for _, raw, scales in self.blocks():
            yield from decoded_arrays(raw, scales)

    def __contains__(self, name: object) -> bool:
        """Return whether the store has a row for an id."""
        return name in self._place_of

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Return all rows, (N, width) float32 or `dtype`; always a copy (`blocks` gives them without one)."""
        if copy is False:
            raise ValueError(f"{self.path}: rows on disk become an array by a copy alone; leave copy=False out")
        rows = self.rows().numpy()
        return rows if dtype is None else rows.astype(dtype)

    def to_dataset(self) -> Any:
        """Return the rows as a `datasets.Dataset`: `id`, `gradient` (float32) and, where known, `loss`."""
        from influence_fast.store.exports import as_dataset

        return as_dataset(self)

    def to_safetensors(self, path: str | Path) -> None:
        """Write the rows as they are stored to a safetensors file: `rows`, `scales`, `losses`, and the ids (JSON) in
        its metadata."""
        from influence_fast.store.exports import save_safetensors

        save_safetensors(self, Path(path))

    @property
    def width(self) -> int:
        """Return how many numbers a row has."""
        return self.manifest.width

    @property
    def dtype(self) -> str:
        """Return how numbers are stored: "fp32", "bf16" or "int8"."""
        return self.manifest.dtype

    @property
    def identity(self) -> StoreIdentity:
        return self.manifest.identity

    @functools.cached_property
    def projection(self) -> Projection | None:
        """Return what query gradients must be projected with, a fitted sketch included.

        Raises StoreError: it is not known, or the sketch's file is missing, damaged or another's.
        """
        plain = self.identity.projection
        return None if plain is None else replace(plain, sketch=fitted_sketch(self.path, self.manifest))

    @functools.cached_property
    def spec(self) -> RowSpec:
        """Return how the rows were made: build another store by it, or queries.

        `sketch` is the fitted one, where there is one. Raises StoreError as `projection` does.
        """
        made = self.identity
        spec = RowSpec.of(
            self.projection,
            dtype=self.dtype,
            loss_reduction=made.loss_reduction or "mean",
            precision=made.precision or AUTO,
        )
        return spec if made.projection_dim is not None else replace(spec, dim=RowSpec.dim)

    def query_gradients(self, model: Any, queries: Held, *, max_tokens: int | None = None) -> torch.Tensor:
        """Return gradients of tokenized examples, [Q, k] fp32 on the host, made as the store's rows were.

        See `influence_fast.query_gradients`, of which this is the method.
        """
        from influence_fast.store.queries import query_gradients

        return query_gradients(self, model, queries, max_tokens=max_tokens)

    def rows(self, index: slice | int | Sequence[int] | np.ndarray | torch.Tensor = slice(None)) -> torch.Tensor:
        """Return rows as (n, width) fp32 on the CPU, bf16 and int8 turned back into numbers.

        `index` is a slice, a place (n = 1), places in any order, or a mask of `len(store)` booleans; negative
        places count from the end. Raises StoreError for a place outside the store, and for rows that were changed.
        """
        places = self._places(index)
        out = torch.empty(len(places), self.width)
        shard_of = np.searchsorted(self._starts, places, side="right") - 1
        self._check_rows(np.unique(shard_of).tolist())
        for shard in np.unique(shard_of):
            at = np.flatnonzero(shard_of == shard)
            raw, scales = self._mapped(int(shard))
            local = places[at] - self._starts[shard]
            out[torch.from_numpy(at)] = decoded_arrays(raw[local], None if scales is None else scales[local])
        return out

    @functools.cached_property
    def losses(self) -> np.ndarray | None:
        """Return the rows' losses, [N] float32, reduced by `identity.loss_reduction`; None where a shard has none."""
        if any("losses" not in record.files for record in self._records):
            return None
        return np.concatenate([np.zeros(0, LOSS_DTYPE), *(small["losses"] for small in self._small)])

    @functools.cached_property
    def tokens_hash(self) -> str | None:
        """Return the SHA-256 over the hashes of the tokens of each shard's rows; None where one is not known."""
        hashes = [record.tokens for record in self._records]
        return None if None in hashes else hashlib.sha256(json.dumps(hashes).encode()).hexdigest()

    def is_of(self, examples: Sequence[Mapping[str, Any]]) -> bool:
        """Return whether the rows are of these tokenized examples, one for each row in order, as far as it is known."""
        pieces = zip(self._records, self._starts, strict=False)
        return all(
            record.tokens in (None, dataset_fingerprint(examples[start : start + record.rows]))
            for record, start in pieces
        )

    def blocks(self, max_rows: int = 4096) -> Iterator[tuple[int, np.ndarray, np.ndarray | None]]:
        """Yield the rows as they lie on disk, in order: (place of the first row, raw rows, scales).

        raw: (n, width) with 1 <= n <= max_rows, memory-mapped and read-only: float32, uint16 (bf16 bits) or
        int8. scales: (n,) float32 for int8, else None. A block never spans two shards. Raises StoreError for rows that
        were changed.
        """
        if max_rows < 1:
            raise StoreError(f"max_rows must be at least 1, not {max_rows}")
        for shard, record in enumerate(self._records):
            if record.rows == 0:
                continue
            if shard in self._unread:
                self._check_rows(range(shard, min(shard + _CHECKED_AT_ONCE, len(self._records))))
            raw, scales = self._map(shard)
            for start in range(0, record.rows, max_rows):
                stop = min(start + max_rows, record.rows)
                yield self._starts[shard] + start, raw[start:stop], None if scales is None else scales[start:stop]

    def positions(self, ids: Sequence[str]) -> list[int]:
        """Return the place of each id. Raises StoreError naming those that are not in the store, and why if known."""
        missing = [i for i in ids if i not in self._place_of]
        if missing:
            reasons = dict(self.set_aside)
            names = [f"{i} (set aside: {reasons[i]})" if i in reasons else str(i) for i in missing]
            raise StoreError(f"{self.path} has no row for {truncated_list(names)}; build it over a dataset with them")
        return [self._place_of[i] for i in ids]

    def verify(self) -> None:
        """Read every byte and raises StoreError naming each missing, truncated, changed or foreign file."""
        problems = verify_store(self.path)
        if problems:
            raise StoreError("; ".join(problems))

    @functools.cached_property
    def _place_of(self) -> dict[str, int]:
        return {name: place for place, name in enumerate(self.ids)}

    def _places(self, index: slice | int | Sequence[int] | np.ndarray | torch.Tensor) -> np.ndarray:
        n = len(self)
        if isinstance(index, slice):
            return np.arange(*index.indices(n), dtype=np.int64)
        places = np.atleast_1d(np.asarray(index))
        if places.dtype == bool:
            if places.shape != (n,):
                raise StoreError(f"a mask over {self.path} needs {n} booleans, not shape {places.shape}")
            return np.flatnonzero(places)
        if places.size == 0:
            return np.zeros(0, dtype=np.int64)
        if places.ndim != 1 or not np.issubdtype(places.dtype, np.integer):
            raise StoreError(f"rows of a store are chosen by whole numbers in one dimension, not {places.dtype}")
        places = places.astype(np.int64)
        outside = places[(places < -n) | (places >= n)]
        if outside.size:
            raise StoreError(f"{self.path} has {n} rows; there is no row {truncated_list(map(str, outside.tolist()))}")
        return np.where(places < 0, places + n, places)

    def _check_rows(self, shards: Iterable[int]) -> None:
        """Raise StoreError naming the first of the files of rows that is not what was written; each is read once."""
        unread = [shard for shard in shards if shard in self._unread]
        if not unread:
            return
        with ThreadPoolExecutor(_CHECKED_AT_ONCE) as pool:
            problems = pool.map(lambda shard: file_damage(self.path, self._records[shard].files["rows"]), unread)
            for shard, problem in zip(unread, problems, strict=True):
                if problem:
                    raise StoreError(f"{problem}; {REBUILD}")
                self._unread.discard(shard)

    def _map(self, shard: int) -> tuple[np.ndarray, np.ndarray | None]:
        record = self._records[shard]
        raw = _map_file(self.path, record, "rows", DTYPES[self.dtype], (record.rows, self.width))
        if self.dtype != "int8":
            return raw, None
        return raw, self._small[shard]["scales"]


def open_store(
    path: str | Path, expect: StoreIdentity | Mapping[str, Any] | None = None, *, verify: bool | None = None
) -> Store:
    """Open a finished store: read its manifest, records, ids, scales and losses; rows stay on disk.

    What is checked when:

    - here, always: the checksums of the manifest, of every shard's record and of its ids, scales and losses; the sizes
      of all files; that everything belongs to this store and place, and that ids are distinct strings;
    - the rows of a shard against their checksum when they are first read, by `rows`, `blocks` or any score, which costs
      one more pass over them (measured: 1.4 GB/s a core, four shards at a time). A process does not repeat it for
      files that did not change since;
    - with `verify=True`, every byte here, a fitted sketch included, as `influence-fast verify` does;
    - with `verify=False`, never the rows: for a store that was verified, where that pass counts.

    Args:
        path: the store's folder.
        expect: what it must have been made with (fields of `StoreIdentity`, or "projection": Projection); fields
            that are None or left out are not checked.
        verify: whether rows are checked here (True), when they are read (None), or not at all (False).

    Raises:
        StoreError: not a store, unfinished, made with something else (the message names the field and both sides),
            or a file of it is missing, truncated, too long, changed or foreign.

    Returns:
        The store, of whose rows nothing is in memory yet.

    Example:
        >>> inf.open_store("store", verify=True).spec  # doctest: +SKIP
    """
    folder = Path(path)
    manifest = Manifest.load(folder)
    if expect is not None:
        manifest.identity.check(StoreIdentity.of(expect), folder)
    if not manifest.complete:
        done = len(list(folder.glob("shard-*.json")))
        raise StoreError(
            f"{folder} is not finished: {done} of {manifest.shard_count} shards are done; "
            "run the same build again to finish it"
        )
    records = []
    for index, fingerprint in enumerate(manifest.fingerprints()):
        record = ShardRecord.load(folder, index, manifest, fingerprint)
        problems = wrong_files(folder, manifest, record)
        if problems:
            raise StoreError(problems[0])
        records.append(record)
    store = Store(folder, manifest, records, check_rows=verify is None)
    if len(store) != manifest.row_count:
        raise StoreError(f"{folder}: the manifest says {manifest.row_count} rows, the shards hold {len(store)}")
    if verify:
        store.verify()
    return store


def _small_arrays(folder: Path, record: ShardRecord) -> dict[str, np.ndarray]:
    """Return the scales and losses of a shard, [rows] float32 each and read-only, checked as the ids are."""
    kinds = {"scales": SCALE_DTYPE, "losses": LOSS_DTYPE}
    return {
        kind: np.frombuffer(read_checked(folder, record.files[kind], REBUILD), dtype)
        for kind, dtype in kinds.items()
        if kind in record.files
    }


def _map_file(folder: Path, record: ShardRecord, kind: str, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    if record.rows == 0:
        return np.zeros(shape, dtype=dtype)  # an empty file cannot be mapped
    path = inside(folder, record.files[kind].name)
    try:
        return np.memmap(path, dtype=dtype, mode="r", shape=shape)
    except (OSError, ValueError) as error:
        raise StoreError(f"{path} cannot be mapped ({error}); {REBUILD}") from None
