"""Rows of `width` numbers that keep `ekfac`'s H^-1: the leading coordinates of H^-1/2 g, fitted on a sample.

`ekfac` is Shampoo's eigenbasis with EK-FAC's corrected eigenvalues (`influence/ekfac.py`).

A random sketch mixes the blocks that `ekfac` needs, so nothing but plain cosines is left to score sketched rows with.
This one is fitted to the data before the store is built. With U_A, U_B, S and lambda of each LoRA factor's block G
(m, n) as in `ekfac`, from the projected rows of a few hundred training examples,

    w = (U_A^T G U_B) / sqrt(S + lambda)     a row: the `width` numbers of w with the largest E[w^2] = S / (S + lambda)

Inner products of two rows are q^T H^-1 g without the directions in which training gradients hardly go, and cosines are
those of `ekfac_cosine`. For the same width it is closer to the whole rows' scores than a sparse random sketch of them,
whose noise is as large as the cosines (`python -m benches.proof` compares both with retraining).
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from influence_fast.atomic import replacing
from influence_fast.errors import ConfigError, StoreError
from influence_fast.gradients.rows.layout import LayoutEntry, layout_width
from influence_fast.gradients.rows.projection import Projection

DEFAULT_EXAMPLES = 256  # LDS of 64 is that of 512 on both worlds of benches.proof, to 0.002
FILES = "sketch-*.safetensors"  # in a store's folder; `file_of` names them
MEND = "restore it, or run the same build again, which fits it again"

Shape = tuple[int, int]


@dataclass(frozen=True, eq=False, repr=False)
class EigenSketch:
    """A fitted map of unsketched rows [E, K] to rows [E, width]; `fit_projection` makes one.

    goes_with: the projection that it is a part of. layout: the K numbers that it reads. bases: for each shape (m, n)
    of a factor's block, U_A [M, m, m] and U_B [M, n, n] fp32 of its M blocks in order. chosen: [width] int64, the
    coordinates that are kept, as places in the K numbers, ascending. scale: [width] fp32, 1 / sqrt(S + lambda) there.
    share: of the sum of all E[w^2], what the chosen ones hold. purpose: what it was fitted on and for, plain values.
    """

    goes_with: Projection
    layout: tuple[LayoutEntry, ...]
    bases: Mapping[Shape, tuple[torch.Tensor, torch.Tensor]]
    chosen: torch.Tensor
    scale: torch.Tensor
    share: float = 1.0
    purpose: Mapping[str, Any] = field(default_factory=dict)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Return the SHA-256, in hex, of all that decides what it does to a row: a store's manifest names it."""
        found = hashlib.sha256(json.dumps(self._about(), sort_keys=True).encode())
        for name, tensor in sorted(self._tensors().items()):
            found.update(name.encode())
            found.update(tensor.contiguous().numpy().tobytes())
        return found.hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, EigenSketch) and other.fingerprint == self.fingerprint

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def __repr__(self) -> str:
        return f"EigenSketch({self.fingerprint[:12]}, {self.chosen.numel()} of {layout_width(self.layout)})"

    def check_layout(self, layout: Sequence[LayoutEntry]) -> None:
        """Raise ConfigError unless it was fitted for unsketched rows of this layout."""
        if tuple(layout) != self.layout:
            raise ConfigError("the sketch was fitted on another model's rows, of other modules or ranks; fit it anew")

    def save(self, folder: Path) -> None:
        """Write its file, whole or not at all, beside those of other sketches; raise StoreError if the disk refuses."""
        from safetensors.torch import save_file

        path = folder / file_of(self.fingerprint)
        # one entry: safetensors writes several in another order each time
        about = {"about": json.dumps(self._about() | {"purpose": dict(self.purpose), "share": self.share})}
        try:
            with replacing(path) as temporary:
                save_file(self._tensors(), temporary, about)
        except (OSError, SafetensorError) as error:
            raise StoreError(f"{path} cannot be written ({error}); mend that and run the same build again") from error

    @classmethod
    def load(cls, path: Path) -> EigenSketch:
        """Read what `save` wrote; raise StoreError if there is none, or it is damaged."""
        from safetensors import safe_open

        try:
            with safe_open(path, framework="pt") as file:
                about = json.loads(file.metadata()["about"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 -- no mapping
            layout = tuple(LayoutEntry(m, f, (a, b), offset) for m, f, (a, b), offset in about["layout"])
            shapes = dict.fromkeys(entry.shape for entry in layout)
            found = cls(
                goes_with=Projection(**about["projection"]),
                layout=layout,
                bases={s: (tensors[f"left {s[0]}x{s[1]}"], tensors[f"right {s[0]}x{s[1]}"]) for s in shapes},
                chosen=tensors["chosen"],
                scale=tensors["scale"],
                share=float(about["share"]),
                purpose=about["purpose"],
            )
        except FileNotFoundError:
            raise StoreError(f"{path} is missing; {MEND}") from None
        except Exception as error:  # as many kinds as fields of the wrong kind
            raise StoreError(f"{path} is damaged ({error!r}); {MEND}") from None
        if path.name != file_of(found.fingerprint):
            raise StoreError(f"{path} is not what was written (its checksum differs); {MEND}")
        return found

    def _tensors(self) -> dict[str, torch.Tensor]:
        sides = {}
        for (m, n), (left, right) in self.bases.items():
            sides[f"left {m}x{n}"], sides[f"right {m}x{n}"] = left.contiguous(), right.contiguous()
        return {"chosen": self.chosen, "scale": self.scale, **sides}

    def _about(self) -> dict[str, Any]:
        layout = [[entry.module, entry.factor, list(entry.shape), entry.offset] for entry in self.layout]
        plain = {name: getattr(self.goes_with, name) for name in ("kind", "dim", "seed", "width", "layers")}
        if self.goes_with.target is not None:  # else as before there was one
            plain["target"] = self.goes_with.target
        return {"projection": plain, "layout": layout}


def file_of(fingerprint: str) -> str:
    """Return the name of a sketch's file in a store's folder; it names the contents, so that none is overwritten."""
    return f"sketch-{fingerprint[:16]}.safetensors"


class EigenRows:
    """An `EigenSketch` on a device, ready for rows: [E, K] -> [E, width], two batched products a shape of blocks."""

    def __init__(self, sketch: EigenSketch, device: torch.device, dtype: torch.dtype) -> None:
        places = torch.arange(layout_width(sketch.layout))
        self._parts: list[tuple[Shape, torch.Tensor, torch.Tensor, torch.Tensor]] = []
        made = []  # the coordinates in the order of the products, which leave a block transposed
        for shape, (left, right) in sketch.bases.items():
            columns = torch.cat([places[entry.columns] for entry in sketch.layout if entry.shape == shape])
            self._parts.append((shape, columns.to(device), left.to(device, dtype), right.to(device, dtype)))
            made.append(columns.view(-1, *shape).transpose(1, 2).flatten())
        order = torch.cat(made).argsort()[sketch.chosen]
        self._order, self._scale = order.to(device), sketch.scale.to(device, dtype)

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        made = []
        for (m, n), columns, left, right in self._parts:
            count, examples = len(left), len(rows)
            blocks = rows.index_select(1, columns).view(examples, count, m, n).transpose(0, 1)  # [M, E, m, n]
            half = torch.bmm(blocks.reshape(count, -1, n), right)  # [M, E m, n]
            turned = half.view(count, examples, m, n).transpose(2, 3)  # [M, E, n, m]
            whole = torch.bmm(turned.reshape(count, -1, m), left)  # [M, E n, m]
            made.append(whole.view(count, examples, -1).transpose(0, 1).reshape(examples, -1))  # [E, M n m]
        together = made[0] if len(made) == 1 else torch.cat(made, dim=1)
        return together.index_select(1, self._order).mul_(self._scale)


def check_projection(projection: Projection | None) -> None:
    """Raise ConfigError unless rows of `projection` can be sketched by a fitted sketch."""
    if projection is None or projection.exact:
        raise ConfigError("exact rows have no sketch; give a projection with a width")
    if projection.flat:
        raise ConfigError(
            f"projection kind {projection.kind!r} is a random sketch itself; a fitted one needs 'one_sided'"
        )
    if projection.width is None:
        raise ConfigError("a fitted sketch needs the width that rows are to have, for example width=8192")
