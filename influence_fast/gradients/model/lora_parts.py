"""What the active adapters of one layer are: one pair A, B or several side by side, biases of B, a magnitude vector.

    several adapters    y = W x + b + sum_i s_i B_i A_i x      one A [sum r, d_in] and one B [d_out, sum r]
    lora_bias           y = W x + b + s (B A x + b_B)          b_B is a factor: the sum of g
    DoRA                y = c v + b                            v = W x + s B A x, c = m / n, n = |W + s B A| by rows

peft takes n for a constant, so that with g' = c g the gradients of A and B are those of plain LoRA for v, and
dm = sum_t g_t v_t / n, entry by entry.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from influence_fast.errors import ModelError
from influence_fast.gradients.rows.factors import Columns, Factor, Side, make_factor
from influence_fast.gradients.rows.projection import Projection

LINEAR_FACTORS = ("lora_A", "lora_B")
EMBEDDING_FACTORS = ("lora_embedding_A", "lora_embedding_B")


class AdapterPart(NamedTuple):
    """One active adapter of a layer.

    suffix: of its factors' names, "" where no other adapter is active. columns: its own among the columns of A x and
    B^T g. scales: what its sums for A and for B are multiplied by. bias: whether its B has one. magnitude: whether it
    has a magnitude vector.
    """

    suffix: str
    columns: Columns
    scales: tuple[float, float]
    bias: bool
    magnitude: bool


class JoinedAdapters(NamedTuple):
    """All active adapters of a layer as one: y = W x + b + scaling B A x + added_bias.

    a: [sum r, d_in]. b: [d_out, sum r]. added_bias: [d_out], or None. parts: empty for a plain pair alone.
    """

    a: torch.Tensor
    b: torch.Tensor
    scaling: float
    added_bias: torch.Tensor | None
    parts: tuple[AdapterPart, ...]


def join_adapters(layer: Any, active: Sequence[str], named: bool) -> JoinedAdapters:
    """Join the adapters called `active` of a peft layer over a linear or an embedding.

    active: an adapter that is there twice is added twice, as peft does. named: whether factors are called by their
    adapter, as where several are active in the model.
    """
    times = Counter(active)
    is_embedding = bool(layer.lora_embedding_A)
    held = layer.lora_embedding_A if is_embedding else layer.lora_A
    names = [name for name in held if name in times]  # in the order of the model's parameters
    scales = [float(layer.scaling[name]) * times[name] for name in names]
    # of one scaling it is multiplied in as for one adapter, so that B stays as it is to the bit
    common = scales[0] if len(set(scales)) == 1 else 1.0
    if is_embedding:
        a, b = ([one[name].detach() for name in names] for one in (layer.lora_embedding_A, layer.lora_embedding_B))
    else:
        a, b = ([one[name].weight.detach() for name in names] for one in (layer.lora_A, layer.lora_B))
    added: torch.Tensor | None = None
    parts, start = [], 0
    for place, (name, scale) in enumerate(zip(names, scales, strict=True)):
        bias = None if is_embedding else layer.lora_B[name].bias
        if bias is not None:
            part = bias.detach() * scale
            added = part if added is None else added + part
        if scale != common:
            b[place] = b[place] * scale
        columns = Columns(start, start + len(a[place]))
        suffix = f".{name}" if named else ""
        parts.append(
            AdapterPart(suffix, columns, (common, scale), bias is not None, name in layer.lora_magnitude_vector)
        )
        start = columns.stop
    plain = not named and not is_embedding and not any(part.bias or part.magnitude for part in parts)
    return JoinedAdapters(
        a[0] if len(a) == 1 else torch.cat(a),
        b[0] if len(b) == 1 else torch.cat(b, dim=1),
        common,
        added,
        () if plain else tuple(parts),
    )


def part_factors(
    key: str,
    ends: tuple[int, int],
    rank: int,
    parts: Sequence[AdapterPart],
    projection: Projection | None,
    pair: tuple[str, str] = LINEAR_FACTORS,
) -> tuple[Factor, ...]:
    """Return the factors of a layer's adapters in the order of the model's parameters: every A, then every B and bias.

    Args:
        key: the module's name that seeds random matrices.
        ends: (d_out, d_in) of the module.
        rank: the sum of all ranks. The backward's columns are those of B^T g, of a magnitude, and the projected ones.
        pair: what the factors A and B are called.
    """
    magnitudes = [
        make_factor(f"lora_magnitude_vector{part.suffix}", ends, part.columns, projection, (rank, rank), 1.0, "")
        for part in parts
        if part.magnitude
    ]
    own = sum(factor.shape[0] for factor in magnitudes)
    firsts: list[Factor] = []
    seconds: list[Factor] = []
    for part in parts:
        seed = f"{key}/rank{part.suffix}"
        for kind in (*pair, "lora_bias") if part.bias else pair:
            name, scale = kind + part.suffix, part.scales[kind != pair[0]]
            made = make_factor(name, ends, part.columns, projection, (rank + own, rank), scale, seed)
            (firsts if kind == pair[0] else seconds).append(made)
    sums = [replace(one, left=Columns(rank, rank + own), right=Side.ONES) for one in magnitudes]
    return (*firsts, *seconds, *sums)


@dataclass(frozen=True, eq=False)
class Magnitude:
    """DoRA's vector over one linear.

    scale: [d_out], m / n. inverse_norm: [d_out], 1 / n. bias: the base's [d_out], or None.
    """

    scale: torch.Tensor
    inverse_norm: torch.Tensor
    bias: torch.Tensor | None

    @classmethod
    def of(
        cls,
        name: str,
        layer: Any,
        adapter: str,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        joined: JoinedAdapters,
    ) -> Magnitude:
        """Take the vector of one adapter of a layer called `name` over `weight` [d_out, d_in] and its bias.

        Raises ModelError for weights that are not held whole here.
        """
        if hasattr(weight, "full_tensor") or weight.dim() != 2:
            how = "quantised" if weight.dim() != 2 else "spread over processes (FSDP)"
            raise ModelError(
                f"{name}: DoRA (use_dora) needs the norms of base weights, which are {how} here: load the model whole "
                "and unquantised, or train the adapter without use_dora"
            )
        magnitude = layer.lora_magnitude_vector[adapter].weight.detach()
        held = torch.promote_types(weight.dtype, joined.a.dtype)  # peft takes the norm in the adapter's dtype
        both = weight.to(held) + joined.scaling * (joined.b @ joined.a).to(held)
        norm = torch.linalg.norm(both, dim=1)
        return cls((magnitude / norm).to(weight.dtype), (1 / norm).to(weight.dtype), bias)

    def outputs(self, v: torch.Tensor) -> torch.Tensor:
        """Return c v + b for v [T, d_out]."""
        return v * self.scale if self.bias is None else torch.addcmul(self.bias, v, self.scale)

    def gradients(self, g: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the gradient of v and what the magnitude's is summed from: both [T, d_out], as g."""
        return g * self.scale, g * v * self.inverse_norm
