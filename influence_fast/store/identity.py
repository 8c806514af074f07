"""What the rows of a store belong to, and what tells one store's rows from another's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from influence_fast.errors import StoreError, did_you_mean, setting
from influence_fast.gradients.rows.precision import AUTO
from influence_fast.gradients.rows.projection import EXACT, Projection, target_of, target_text
from influence_fast.philox import FLAT_KINDS

_LABELS = {
    "model_id": "model",
    "model_hash": "model",
    "adapter_hash": "adapter",
    "tokenizer_hash": "tokenizer",
    "dataset_fingerprint": "dataset",
    "tokenization": "tokenization",
    "loss_reduction": "loss reduction",
    "precision": "precision",
}


@dataclass(frozen=True, slots=True)
class StoreIdentity:
    """The model, data and settings that the rows of a store belong to.

    None stands for what is not known (in a store), or not checked (in an expectation).

    The hashes are SHA-256 in hex (see `influence_fast.data.fingerprints`). `model_id` is a label: where both sides
    know `model_hash`, that decides. `tokenization` says how text became tokens ("text, max_length=4096,
    truncate=False, tokens 0123456789abcdef", the hash of the tokens of a few fixed texts; "as given, ..." for examples
    that came as tokens). `projection_kind` is "none"
    for exact gradients and "unknown" for imported ones; `projection_dim` is None for the kinds that do not use it.
    `precision` is that of the products with the base weights: "fp8" or "auto", the model's own dtype, which is what
    None means in a store.
    """

    model_id: str | None = None
    model_hash: str | None = None
    adapter_hash: str | None = None
    tokenizer_hash: str | None = None
    dataset_fingerprint: str | None = None
    tokenization: str | None = None
    projection_kind: str | None = None
    projection_dim: int | None = None
    projection_width: int | None = None
    projection_seed: int | None = None
    projection_layers: float | None = None  # None: all of them
    projection_sketch: str | None = None  # fingerprint of a fitted sketch; None: a random one, or none
    loss_reduction: str | None = None
    precision: str | None = None
    # "all-linear", a name or a list of them as JSON; None: of an adapter. Not in the text of an identity, by which rows
    # to fit on are found.
    projection_target: str | None = field(default=None, repr=False)

    @classmethod
    def of(cls, expect: StoreIdentity | Mapping[str, Any]) -> StoreIdentity:
        """Make one from a mapping of the fields above.

        The key "projection" takes a `Projection` (None: exact gradients).

        Raises StoreError for a name that is no field.
        """
        if isinstance(expect, StoreIdentity):
            return expect
        values = dict(expect)
        known = [f.name for f in fields(cls)]
        if "projection" in values:
            values |= projection_fields(values.pop("projection"))
        for name in values:
            if name not in known:
                raise StoreError(
                    f"unknown field {name!r} to check a store against; "
                    f"{did_you_mean(str(name), [*known, 'projection'])}"
                )
        return cls(**values)

    def check(self, expect: StoreIdentity, where: Path) -> None:
        """Raise StoreError at the first field that `expect` knows and that differs, with both sides."""
        same_weights = self.model_hash is not None and self.model_hash == expect.model_hash
        for name in (f.name for f in fields(self)):
            mine, theirs = getattr(self, name), getattr(expect, name)
            mine = AUTO if name == "precision" and mine is None else mine
            checked = theirs is not None or (name.startswith("projection_") and expect.projection_kind is not None)
            if not checked or mine == theirs or (name == "model_id" and same_weights):
                continue
            label = _LABELS.get(name, "projection")
            if name == "projection_sketch":
                raise StoreError(
                    f"{where}: its rows were made by {_sketch(mine)}, and here they would be by {_sketch(theirs)}: "
                    f"take `store.projection` (--sketch and {setting('gradients.sketch', 'eigen')}, random, or a "
                    "store's folder), or "
                    "build a new store"
                )
            how = {
                "model_hash": " (dtype and quantisation count: bfloat16 or 4-bit weights are another model)",
                "dataset_fingerprint": " (max_length, truncate and limit too)",
            }.get(name, "")
            raise StoreError(
                f"{where}: made with another {label}: {name} is {short(mine)} in the store "
                f"and {short(theirs)} here; use the {label} that it was built with{how}, or build a new store"
            )

    def body(self) -> dict[str, Any]:
        """Return the fields as the files hold them.

        Precision "auto", no fitted sketch and no target are left out: stores that were made before there were others
        keep their hashes.
        """
        fields = asdict(self)
        if self.precision in (None, AUTO):
            del fields["precision"]
        if self.projection_sketch is None:
            del fields["projection_sketch"]
        if self.projection_target is None:
            del fields["projection_target"]
        return fields

    @property
    def projection(self) -> Projection | None:
        """Return the projection of the rows; None for exact gradients.

        A sketch that was fitted is not in it: `Store.projection` has that.

        Raises StoreError when it is not known (imported gradients).
        """
        if self.projection_kind == EXACT and self.projection_target is None:
            return None
        if self.projection_kind is None or self.projection_kind == "unknown":
            raise StoreError("the store does not record its projection; give query gradients made like its rows")
        values = {name: getattr(self, f"projection_{name}") for name in ("dim", "seed", "width", "layers")}
        values["target"] = target_of(self.projection_target)
        return Projection(self.projection_kind, **{k: v for k, v in values.items() if v is not None})


def projection_fields(projection: Projection | None) -> dict[str, Any]:
    """Return the `projection_*` fields of a StoreIdentity."""
    if projection is None:
        return {"projection_kind": EXACT}
    return {
        "projection_kind": projection.kind,
        "projection_dim": None if projection.kind in (*FLAT_KINDS, EXACT) else projection.dim,
        "projection_width": projection.width,
        "projection_seed": None if projection.exact else projection.seed,
        "projection_layers": None if projection.layers == 1 else projection.layers,
        "projection_sketch": None if projection.sketch is None else projection.sketch.fingerprint,
        "projection_target": target_text(projection.target),
    }


def _sketch(fingerprint: str | None) -> str:
    return "a random sketch or none" if fingerprint is None else f"the fitted sketch {fingerprint[:12]}"


def short(value: object) -> str:
    """Return `value` as a message shows it: hashes by their first 12 digits, anything else by 80 characters at most."""
    if isinstance(value, str) and len(value) == 64:
        return value[:12]
    text = repr(value)
    return "not recorded" if value is None else text if len(text) <= 80 else text[:77] + "..."
