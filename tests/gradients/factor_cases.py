"""Modules of one, two and four factors, what their passes leave for a reducer, and their rows by explicit matrices."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any

import torch

from influence_fast.gradients.model.lora import LoraLinear
from influence_fast.gradients.rows.factors import Columns, Factor, Side, make_factor
from influence_fast.gradients.rows.layout import layout_of
from influence_fast.gradients.rows.projection import Projection, random_matrix
from influence_fast.gradients.rows.row_sketch import RowSketch
from influence_fast.gradients.step.reduction import Reducer

LENGTHS = (5, 1, 9)
CALLS = (3, 0, 2, 4, 1, 0)  # in the order of a backward; module 0 is called twice
EXTRA = 3  # backward columns of a factor that is their plain sum, so that c_out != c_in
PROJECTIONS = {
    "exact": None,
    "one_sided": Projection(dim=6),
    "one_sided to a width": Projection(dim=6, width=40),
    "kron": Projection("kron", dim=5),
    "sjlt": Projection("sjlt", width=40),
    "rademacher": Projection("rademacher", width=40),
}


@dataclass(frozen=True, eq=False)
class FourFactors(LoraLinear):
    """A LoRA linear with a bias, and a factor without a wide side: sums of columns between u and y."""

    def factors(self, projection: Projection | None = None) -> tuple[Factor, ...]:
        narrow, ends = (self.r + EXTRA, self.r), (self.d_out, self.d_in)
        rank = Columns(0, self.r)
        a, b = (
            make_factor(name, ends, rank, projection, narrow, self.scaling, f"{self.key}/rank")
            for name in ("lora_A", "lora_B")
        )
        bias = make_factor("bias.default", ends, rank, projection, narrow, 1.0, "")
        return a, b, bias, Factor("sums", (EXTRA, 1), Columns(self.r, self.r + EXTRA), Side.ONES, 2.0)


def make_modules(dtype: torch.dtype = torch.float64) -> list[LoraLinear]:
    """Two LoRA linears of four factors, one plain one, one of two factors, and a second plain one of that shape."""
    shapes: list[tuple[type[LoraLinear], int, int, int]] = [
        (FourFactors, 7, 9, 4),
        (FourFactors, 7, 9, 4),
        (LoraLinear, 7, 11, 0),
        (LoraLinear, 8, 7, 2),
        (LoraLinear, 7, 11, 0),
    ]
    return [
        kind(
            name=f"model.layers.{i}.proj",
            layer=torch.nn.Identity(),
            weight=torch.zeros(d_out, d_in, dtype=dtype),
            bias=None,
            a=torch.zeros(r, d_in, dtype=dtype),
            b=torch.zeros(d_out, r, dtype=dtype),
            scaling=0.5 + i if r else 1.0,
        )
        for i, (kind, d_in, d_out, r) in enumerate(shapes)
    ]


def make_calls(modules: list[LoraLinear], dtype: torch.dtype = torch.float64) -> list[tuple[int, torch.Tensor, ...]]:
    """(number, h [T, r], narrow backward columns [T, c], g [T, d_out], x [T, d_in]) of each call."""
    generator = torch.Generator().manual_seed(0)

    def normal(columns: int) -> torch.Tensor:
        return torch.randn(sum(LENGTHS), columns, generator=generator).to(dtype)

    calls = []
    for number in CALLS:
        m = modules[number]
        extra = EXTRA if isinstance(m, FourFactors) else 0
        calls.append((number, normal(m.r), normal(m.r + extra), normal(m.d_out), normal(m.d_in)))
    return calls


def run(reducer: Reducer, calls: list[tuple[Any, ...]]) -> torch.Tensor:
    """The reducer's rows of one pack of `LENGTHS` with these calls."""
    reducer.begin([0, *accumulate(LENGTHS)])
    for number, h, narrow, g, x in calls:
        r_in, r_out = (matrix.to(x.dtype) for matrix in reducer.columns(number))
        kept, out_of = torch.cat([h, x @ r_in], dim=1), torch.cat([narrow, g @ r_out], dim=1)
        reducer.add(number, kept, out_of, g, x if reducer.needs_input else None)
    return reducer.finish()


def exact_rows(modules: list[LoraLinear], calls: list[tuple[Any, ...]]) -> torch.Tensor:
    """[E, k] fp64, each factor by its formula."""
    rows = torch.zeros(len(LENGTHS), layout_of(modules)[-1].columns.stop, dtype=torch.float64)
    columns = {(entry.module, entry.factor): entry.columns for entry in layout_of(modules)}
    for number, h, narrow, g, x in calls:
        m = modules[number]
        h, narrow, g, x = (part.double() for part in (h, narrow, g, x))
        for e, (start, end) in enumerate(pairwise([0, *accumulate(LENGTHS)])):
            t = slice(start, end)
            found = {
                "lora_A": m.scaling * narrow[t, : m.r].T @ x[t],
                "lora_B": m.scaling * g[t].T @ h[t],
                "weight": g[t].T @ x[t],
                "bias.default": g[t].sum(dim=0),
                "sums": 2.0 * narrow[t, m.r :].sum(dim=0),
            }
            for name, grad in found.items():
                if (m.name, name) in columns:
                    rows[e, columns[m.name, name]] += grad.flatten()
    return rows


def projected_rows(modules: list[LoraLinear], exact: torch.Tensor, projection: Projection | None) -> torch.Tensor:
    """What `projection` makes of exact rows, by its matrices written out."""
    if projection is None:
        return exact
    if projection.flat:
        return _sketched(modules, exact, projection)
    blocks = []
    for m, entry in ((m, entry) for m in modules for entry in layout_of(modules) if entry.module == m.name):
        draw = {
            "in": lambda m=m: random_matrix(projection, f"{m.key}/in", m.d_in),
            "out": lambda m=m: random_matrix(projection, f"{m.key}/out", m.d_out),
            "rank": lambda m=m: random_matrix(projection, f"{m.key}/rank", m.r),
            "": lambda: None,
        }
        sides = {"lora_A": ("rank", "in"), "lora_B": ("out", "rank"), "weight": ("out", "in"), "sums": ("", "")}
        left, right = (
            None if side == "rank" and projection.kind != "kron" else draw[side]()
            for side in sides.get(entry.factor, ("out", ""))
        )
        block = exact[:, entry.columns].unflatten(1, entry.shape)
        block = block if left is None else left.double().T @ block
        block = block if right is None else block @ right.double()
        blocks.append(block.flatten(1))
    rows = torch.cat(blocks, dim=1)
    if projection.width is None:
        return rows
    return RowSketch(layout_of(modules, replace(projection, width=None)), projection, rows.device)(rows)


def _sketched(modules: list[LoraLinear], exact: torch.Tensor, projection: Projection) -> torch.Tensor:
    assert projection.width is not None
    layout = layout_of(modules, projection)
    sketch = RowSketch(layout, projection, exact.device)
    out = torch.zeros(len(exact), projection.width, dtype=torch.float64)
    for row, whole in zip(out, exact, strict=True):
        for number, entry in enumerate(layout):
            sketch.add(row, number, whole[entry.columns])
    return out
