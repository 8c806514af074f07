"""Random projections as counter-based functions of (seed, name, row, column).

Every bit comes from Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011):
a block cipher applied to the coordinates, so an entry depends only on its own (seed, name, row, column).
The same bits therefore come out on a CPU, on any GPU and inside a kernel, and a matrix is prefix-stable: more
rows or more columns leave the ones already there unchanged.

    key        first 8 bytes of SHA-256("<seed>:<name>") as two little-endian uint32;
               name = "<module>/in", "<module>/out", "<module>/rank" (sides of a layer) or that of
               `row_name` (sketch of a row)
    signs      words = philox(counter = (row mod 2^32, row >> 32, column // 128, 0), key)
               entry = +1 where bit column % 128 of the 128 bits in `words` is 0, else -1
    SJLT       words = philox(counter = (i mod 2^32, i >> 32, 0, 1), key); bucket = words[0] * width >> 32;
               sign = +1 where bit 0 of words[1] is 0, else -1
               (one nonzero a column; Dasgupta, Kumar and Sarlós, STOC 2010)
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from influence_fast.data.adapter_names import plain_name
from influence_fast.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from influence_fast.gradients.eigen_sketch import EigenSketch

SIDED_KINDS = ("one_sided", "kron")  # of the sides of each factor
FLAT_KINDS = ("sjlt", "rademacher")  # of whole factors
KINDS = (*SIDED_KINDS, *FLAT_KINDS)
EXACT = "none"  # of a target's weights; for an adapter's factors there is None in the place of a projection
ALL_LINEAR = "all-linear"

_MULTIPLIER = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_U32 = 0xFFFFFFFF
_MAX_WIDTH = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Projection:
    """How a per-example gradient becomes a row of numbers; `None` in its place means the exact gradient.

    kind: "one_sided" (long side of each LoRA factor to `dim`, rank side kept), "kron" (both sides to `dim`),
        "sjlt" and "rademacher" (each factor flattened, then straight to `width` numbers).
    dim: columns of the side projections; unused by the flat kinds.
    seed: any integer; the same seed gives the same bits everywhere.
    width: length of the final row. Needed by the flat kinds; for the others, a second stage (one SJLT of the
        whole row to `width` numbers) or None for no second stage.
    layers: share of the decoder's layers, counted from the top, whose LoRA modules are in a row (rounded up to whole
        layers). The backward pass ends at the lowest of them.
    sketch: what makes rows of `width` numbers in place of the SJLT, where one was fitted (`fit_projection`).
    target: for a model without an adapter, as after full fine-tuning: the linears whose weights' gradients are in a
        row. "all-linear" (all but the output head), the end of their names ("q_proj"), a regular expression of whole
        names, or several of these. A weight has two long sides: "one_sided" becomes "kron", whose rows hold
        `R_out^T G R_in (dim, dim)`. With a target only, kind "none" is the exact gradient.

    Raises ConfigError for an unknown kind or a value out of range, or a sketch that was fitted for other ones.

        Projection(kind="kron", dim=32, target="all-linear")
    """

    kind: str = "one_sided"
    dim: int = 16
    seed: int = 0
    width: int | None = None
    layers: float = 1.0
    sketch: EigenSketch | None = None
    target: str | Sequence[str] | None = None

    def __post_init__(self) -> None:
        if self.target is not None:
            object.__setattr__(self, "target", _checked_target(self.target))
            if self.kind == "one_sided":
                object.__setattr__(self, "kind", "kron")
        if self.kind == EXACT and self.target is None:
            raise ConfigError(
                f"projection kind {EXACT!r} is of the weights that target names; for exact rows of an adapter give "
                "None in place of a projection"
            )
        if self.kind not in (*KINDS, EXACT):
            raise ConfigError(f"unknown projection kind {self.kind!r}; {did_you_mean(str(self.kind), KINDS)}")
        if self.exact and self.width is not None:
            raise ConfigError(
                f"projection kind {EXACT!r} has rows of whole gradients: leave out width, or choose 'kron'"
            )
        _check_integer("dim", self.dim, 1)
        if not 0 < self.layers <= 1:
            raise ConfigError(f"projection layers is {self.layers}; it is a share, above 0 and at most 1")
        _check_integer("seed", self.seed, None)
        if self.width is not None:
            _check_integer("width", self.width, 1)
            if self.width > _MAX_WIDTH:
                raise ConfigError(f"projection width {self.width} is above {_MAX_WIDTH}; choose a smaller one")
        elif self.kind in FLAT_KINDS:
            raise ConfigError(f"projection kind {self.kind!r} needs width=<length of a row>, for example width=8192")
        if self.sketch is not None and self.sketch.goes_with != self.plain:
            raise ConfigError(f"a sketch that was fitted for {self.sketch.goes_with} does not go with {self.plain}")

    @property
    def plain(self) -> Projection:
        """The same without a fitted sketch."""
        return self if self.sketch is None else replace(self, sketch=None)

    def __repr__(self) -> str:
        # Without a target as before there was one: what was fitted then is found by this text.
        names = [f.name for f in fields(self) if f.name != "target" or self.target is not None]
        return f"Projection({', '.join(f'{name}={getattr(self, name)!r}' for name in names)})"

    @property
    def exact(self) -> bool:
        """Whether rows are whole gradients, of the weights that `target` names."""
        return self.kind == EXACT

    @property
    def sided(self) -> bool:
        """Whether the sides of each factor are projected."""
        return self.kind in SIDED_KINDS

    @property
    def flat(self) -> bool:
        """Whether whole factors are flattened before they are projected."""
        return self.kind in FLAT_KINDS


def exact_rows(projection: Projection | None) -> Projection | None:
    """Return what gives the exact gradient of what rows of `projection` are of, all layers included."""
    return None if projection is None or projection.target is None else Projection(EXACT, target=projection.target)


def row_name(module: str, factor: str) -> str:
    """The name that seeds the sketch of one factor's block of a row; `module` with or without the peft wrapper."""
    return f"{plain_name(module)}/row/{factor}"


def key(seed: int, name: str) -> tuple[int, int]:
    """The Philox key of one random matrix: two uint32 out of SHA-256("<seed>:<name>")."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")


def philox4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 of int64 tensors holding uint32 values (broadcast together); returns four such."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # The 64-bit product wraps in int64, but its bits are those of the unsigned product.
        product0 = c0 * _MULTIPLIER[0]
        product1 = c2 * _MULTIPLIER[1]
        c0, c2 = _high(product1) ^ c1 ^ k0, _high(product0) ^ c3 ^ k1
        c1, c3 = product1.bitwise_and_(_U32), product0.bitwise_and_(_U32)
        k0, k1 = (k0 + _WEYL[0]) & _U32, (k1 + _WEYL[1]) & _U32
    return c0, c1, c2, c3


def sign_matrix(
    seed: int,
    name: str,
    rows: int,
    columns: int,
    *,
    row_start: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Entries (row_start ... row_start + rows, 0 ... columns) of the ±1 matrix of (seed, name), unscaled.

    Returns (rows, columns) of `dtype` on `device`.
    """
    row = torch.arange(row_start, row_start + rows, dtype=torch.int64, device=device)
    blocks = -(-columns // 128)
    block = torch.arange(blocks, dtype=torch.int64, device=device)
    low, high = (row & _U32)[:, None], (row >> 32)[:, None]
    zero = torch.zeros((), dtype=torch.int64, device=device)
    words = philox4x32((low, high, block[None, :], zero), key(seed, name))  # 4 x [rows, blocks]
    used = [word for i, word in enumerate(words) if i * 32 < columns]
    bits = torch.arange(min(32, columns), dtype=torch.int32, device=device)
    stacked = torch.stack([_as_int32(word) for word in used], dim=-1)  # [rows, blocks, words]
    # ±1 in int8 first: the expanded form is 32 times the words, so its passes are kept narrow.
    sign = 1 - 2 * ((stacked[..., None] >> bits) & 1).to(torch.int8)
    return sign.reshape(rows, -1)[:, :columns].to(dtype).contiguous()


def random_matrix(
    projection: Projection,
    name: str,
    rows: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """R (rows, dim) = signs / sqrt(dim), so that E[R R^T] = I and inner products are kept in the mean."""
    signs = sign_matrix(projection.seed, name, rows, projection.dim, dtype=dtype, device=device)
    return signs.mul_(entry_size(projection.dim, dtype))


def entry_size(dim: int, dtype: torch.dtype = torch.float32) -> float:
    """1 / sqrt(dim) as a number of `dtype`, taken on the CPU: a card divides by plain numbers in its own way."""
    return float(torch.ones((), dtype=dtype).div_(math.sqrt(dim)))


def sjlt_map(
    seed: int,
    name: str,
    n: int,
    width: int,
    *,
    start: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor]:
    """Where coordinates start ... start + n go in a sparse sketch of `width` numbers, and with what sign.

    Returns bucket (n,) int64 in [0, width) and sign (n,) ±1 of `dtype`: sketch[bucket[i]] += sign[i] * row[i]
    keeps inner products in the mean with no further scale.
    """
    if not 1 <= width <= _MAX_WIDTH:
        raise ConfigError(f"sketch width {width} is not between 1 and {_MAX_WIDTH}")
    index = torch.arange(start, start + n, dtype=torch.int64, device=device)
    zero = torch.zeros((), dtype=torch.int64, device=device)
    words = philox4x32((index & _U32, index >> 32, zero, zero + 1), key(seed, name))
    bucket = _high(words[0] * width)
    sign = (1 - 2 * (words[1] & 1)).to(dtype)
    return bucket, sign


def _high(product: Tensor) -> Tensor:
    return (product >> 32).bitwise_and_(_U32)


def _as_int32(word: Tensor) -> Tensor:
    """The same 32 bits as a signed number; a right shift then keeps the bit that `& 1` picks."""
    return (word - ((word >> 31) << 32)).to(torch.int32)


def target_text(target: str | Sequence[str] | None) -> str | None:
    """Return a target as one text, as files hold it; `target_of` reads it."""
    return target if target is None or isinstance(target, str) else json.dumps(list(target))


def target_of(text: str | None) -> str | Sequence[str] | None:
    """Return the target that `target_text` wrote."""
    return tuple(json.loads(text)) if text is not None and text.startswith('["') else text


def _checked_target(target: object) -> str | tuple[str, ...]:
    """Return a target in its one form: a text, or several in order. Raises ConfigError for anything else."""
    names = [target] if isinstance(target, str) else list(target) if isinstance(target, Sequence) else []
    if not names or not all(isinstance(name, str) and name.strip() and '"' not in name for name in names):
        raise ConfigError(
            f"projection target is {target!r}; give {ALL_LINEAR!r}, the end of a linear's name, a regular expression, "
            "or a list of these"
        )
    for name in names:
        try:
            re.compile(name)
        except re.error as error:
            raise ConfigError(f"projection target {name!r} is no regular expression ({error}); mend it") from None
    ordered = sorted(set(names))
    return ordered[0] if len(ordered) == 1 else tuple(ordered)


def _check_integer(name: str, value: object, least: int | None) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ConfigError(f"projection {name} must be an integer, not {value!r}")
    if least is not None and value < least:
        raise ConfigError(f"projection {name} must be at least {least}, not {value}")
