"""A fitted preconditioner in a file: its tensors, what it was fitted for, and a checksum over both."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from influence_fast.atomic import beside, replacing
from influence_fast.errors import ConfigError, StoreError, one_line, shown
from influence_fast.gradients.rows.layout import LayoutEntry
from influence_fast.influence.preconditioners import (
    Adam,
    DataInf,
    Ekfac,
    Fisher,
    Identity,
    Preconditioner,
    UnitNorm,
)
from influence_fast.influence.recipe import Recipe
from influence_fast.influence.row_access import blocks_of, factors_of, row_blocks
from influence_fast.influence.settings import InfluenceConfig
from influence_fast.store.manifest import MANIFEST_NAME
from influence_fast.store.reader import Store, open_store

FILE = "scorer.safetensors"
FORMAT = 1
AGAIN = "fit it again (Scorer.fit)"


@dataclass(frozen=True)
class Parts:
    """Parts of a scorer beside its store and recipe.

    fitted: the preconditioner. source: the store that it was fitted on. layout: of the model's exact rows, where it is
    known. lengths: [N] what each row's scores are divided by, where they were made.
    """

    fitted: Preconditioner
    source: Store
    layout: list[LayoutEntry] | None = None
    lengths: np.ndarray | None = None

    def with_lengths(self, lengths: np.ndarray | None) -> Parts:
        """Return the same with lengths of the rows."""
        return replace(self, lengths=lengths)

    def with_layout(self, layout: list[LayoutEntry] | None) -> Parts:
        """Return the same with the layout of the model's exact rows."""
        return replace(self, layout=layout)


def store_digest(store: Store) -> str:
    """Return a SHA-256 of what the rows of a store are: its identity, shape, and the checksums of its shards."""
    manifest = store.manifest
    body = [manifest.identity.body(), manifest.dtype, manifest.width, len(store), list(manifest.shards or ())]
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def save_parts(store: Store, recipe: Recipe, parts: Parts, folder: str | Path | None) -> Path:
    """Write a scorer to `folder`, by default beside its store.

    Raises StoreError: the disk refuses; ConfigError for a preconditioner of one's own that has no form in a file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    target = beside(store.path, ".scorer") if folder is None else Path(folder)
    tensors, numbers = _taken_apart(parts.fitted)
    if parts.lengths is not None:
        tensors["row lengths"] = torch.from_numpy(parts.lengths)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    influence = recipe.influence
    about: dict[str, Any] = {
        "format": FORMAT,
        "store": _named(store, target),
        "source": _named(parts.source, target),
        "settings": {
            "preconditioner": recipe.name,
            "damping": influence.damping,
            "fisher": influence.fisher,
            "fisher_examples": influence.fisher_examples,
        },
        "applied": recipe.applied,
        "numbers": numbers,
        "layout": None if parts.layout is None else [list(entry) for entry in parts.layout],
    }
    about["checksum"] = _checksum(about, tensors)
    path = target / FILE
    try:
        target.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            save_file(tensors, temporary, {"about": json.dumps(about)})
    except (OSError, SafetensorError) as error:
        raise StoreError(f"{path} cannot be written ({one_line(error)}); mend that and save it again") from error
    return target


def load_parts(
    source: Store | str | Path, store: Store | None, wanted: Mapping[str, Any]
) -> tuple[Store, Recipe, Parts]:
    """Return what `save_parts` wrote, its store open.

    Raises StoreError: there is none, it is damaged, or it was made for another store or settings than are wanted.
    """
    folder = _folder_of(source)
    path = folder / FILE
    about, tensors = _read(path)
    mine = source if isinstance(source, Store) else store
    if mine is None and (Path(source) / MANIFEST_NAME).exists():  # type: ignore[arg-type]  # no Store
        mine = open_store(Path(source))  # type: ignore[arg-type]
    mine = _found(mine, about["store"], path)
    recipe = Recipe.of_store(mine, InfluenceConfig(**about["settings"]))
    _check_settings(recipe, wanted, path)
    fitted_on = mine if about["source"] == about["store"] else _found(None, about["source"], path)
    lengths = tensors.pop("row lengths", None)
    parts = Parts(
        fitted=_put_together(about["applied"], tensors, about["numbers"], mine, fitted_on),
        source=fitted_on,
        layout=_layout(about["layout"]),
        lengths=None if lengths is None else lengths.numpy(),
    )
    return mine, recipe, parts


def _layout(saved: list[Any] | None) -> list[LayoutEntry] | None:
    return None if saved is None else [LayoutEntry(m, f, (rows, columns), at) for m, f, (rows, columns), at in saved]


def _folder_of(source: Store | str | Path) -> Path:
    """Return where a scorer lies: beside a store, or in the folder itself."""
    if isinstance(source, Store):
        return beside(source.path, ".scorer")
    folder = Path(source)
    return beside(folder, ".scorer") if (folder / MANIFEST_NAME).exists() else folder


def _named(store: Store, folder: Path) -> dict[str, str]:
    """Return how a store is found again: its place seen from the scorer's folder, and its digest."""
    try:
        place = os.path.relpath(Path(store.path).absolute(), folder.absolute())
    except ValueError:  # on another drive
        place = str(Path(store.path).absolute())
    return {"path": place, "digest": store_digest(store)}


def _found(store: Store | None, named: Mapping[str, str], path: Path) -> Store:
    """Open the store that a scorer names; raise StoreError if it is another one, or gone."""
    if store is None:
        place = Path(os.path.normpath(path.parent.absolute() / named["path"]))
        if not (place / MANIFEST_NAME).exists():
            raise StoreError(f"{path} was fitted with the store {place}, which is not there: restore it, or {AGAIN}")
        store = open_store(place)
    if store_digest(store) != named["digest"]:
        raise StoreError(
            f"{path} was fitted for another store than {store.path} is (its rows, model or projection changed): {AGAIN}"
        )
    return store


def _check_settings(recipe: Recipe, wanted: Mapping[str, Any], path: Path) -> None:
    """Raise StoreError where something else is wanted of a setting that the preconditioner reads."""
    made = recipe.influence
    if (name := wanted["preconditioner"]) is not None:
        asked = replace(recipe, influence=replace(made, preconditioner=name)).name
        if asked != recipe.name:
            raise StoreError(f"{path} was fitted with preconditioner {recipe.name!r}, not {shown(asked)}: {AGAIN}")
    for name, read in (("damping", recipe.inverts), ("fisher", recipe.reads_fisher)):
        value, fitted = wanted[name], getattr(made, name)
        if read and value is not None and value != fitted:
            raise StoreError(f"{path} was fitted with {name} {fitted!r}, not {shown(value)}: {AGAIN}")


def _checksum(about: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> str:
    body = {name: value for name, value in about.items() if name != "checksum"}
    found = hashlib.sha256(json.dumps(body, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        found.update(tensor.contiguous().numpy().tobytes())
    return found.hexdigest()


def _read(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Read the record and the tensors of a scorer's file; raise StoreError if there is none, or it is damaged."""
    from safetensors import safe_open

    if not path.is_file():
        raise StoreError(f"{path} is missing: there is no scorer; fit one and save it (Scorer.fit, save)")
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads(file.metadata()["about"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 -- no mapping
        whole = about["checksum"] == _checksum(about, tensors)
    except Exception as error:  # as many kinds as fields of the wrong kind
        raise StoreError(f"{path} is damaged ({one_line(error)}); {AGAIN}") from None
    if not whole:
        raise StoreError(f"{path} is not what was written (its checksum differs); {AGAIN}")
    if about["format"] != FORMAT:
        raise StoreError(f"{path} is of format {about['format']}, and this version reads {FORMAT}; {AGAIN}")
    return about, tensors


def _taken_apart(fitted: Preconditioner) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return the tensors and the plain numbers of a fitted preconditioner."""
    if isinstance(fitted, UnitNorm):
        tensors, numbers = _taken_apart(fitted.inner)  # type: ignore[arg-type]  # it has `normalize` too
        return tensors, numbers | {"plain_queries": fitted.plain_queries, "row_power": fitted.row_power}
    if isinstance(fitted, Adam):
        return {"scale": fitted.scale}, {"damping": fitted.damping}
    if isinstance(fitted, Fisher):
        return {f"factor {i}": factor for i, factor in enumerate(fitted.factors)}, {"damping": fitted.damping}
    if isinstance(fitted, Ekfac):
        tensors = {f"eigenvalues {i}": values for i, values in enumerate(fitted.eigenvalues)}
        for i, (left, right) in enumerate(fitted.bases):
            tensors |= {f"left {i}": left, f"right {i}": right}
        return tensors, {"damping": fitted.damping, "ridges": fitted.ridges}
    if isinstance(fitted, DataInf):
        return {}, {"damping": fitted.damping, "ridges": fitted.ridges}
    if not isinstance(fitted, Identity):
        raise ConfigError(
            f"a {type(fitted).__name__} has no form in a file (scorer_files): fit it again in each process"
        )
    return {}, asdict(fitted)


def _put_together(
    name: str, tensors: Mapping[str, torch.Tensor], numbers: Mapping[str, Any], store: Store, source: Store
) -> Preconditioner:
    """Make the preconditioner that `_taken_apart` took apart, for the rows of `store`."""
    if "row_power" in numbers:
        left = {key: value for key, value in numbers.items() if key not in ("plain_queries", "row_power")}
        inner: Any = _put_together(name, tensors, left, store, source)
        return UnitNorm(inner, plain_queries=numbers["plain_queries"], row_power=numbers["row_power"])
    if "normalize" in numbers:
        return Identity(numbers["normalize"])
    damping = numbers["damping"]
    if "scale" in tensors:
        return Adam(tensors["scale"], damping=damping)
    blocks, factors = blocks_of(store), factors_of(store)
    if "factor 0" in tensors:
        return Fisher(blocks, [tensors[f"factor {i}"] for i in range(len(blocks))], damping=damping)
    if factors is not None and "left 0" in tensors:
        places = range(len(factors))
        bases = [(_by_columns(tensors[f"left {i}"]), _by_columns(tensors[f"right {i}"])) for i in places]
        eigenvalues = [tensors[f"eigenvalues {i}"] for i in places]
        return Ekfac(factors, bases, eigenvalues, list(numbers["ridges"]), damping=damping)
    return DataInf(lambda: row_blocks(source), blocks, list(numbers["ridges"]), damping=damping)


def _by_columns(basis: torch.Tensor) -> torch.Tensor:
    """Return a basis as `torch.linalg.eigh` lays it out in memory: products of another layout round otherwise."""
    return basis.T.contiguous().T
