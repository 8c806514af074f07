"""Run by test_reduction.py with TRITON_INTERPRET=1: exact and flat rows by the kernels against PyTorch's sums."""

from __future__ import annotations

import json
from itertools import accumulate
from typing import Any

import factor_cases
import torch
from interpreted_rounding import round_as_cards_do
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from influence_fast.gradients.model.backends import TORCH, TRITON
from influence_fast.gradients.model.lora import LoraLinear
from influence_fast.gradients.rows.layout import layout_of
from influence_fast.gradients.rows.projection import Projection
from influence_fast.gradients.step.reduction import FullReducer, ProjectedReducer
from influence_fast.gradients.streaming import StreamReducer
from influence_fast.kernels import sign_product, sjlt_scatter

SHAPES = ((50, 40, 20), (24, 70, 4), (7, 5, 1))  # (d_in, d_out, r)
SLAB = 512  # in the place of 32,768: factors this small then have several, in both directions
PACKS = ((5, 1, 530), (7, 2))  # the long one is cut in chunks
CALLS = (2, 0, 1, 0)  # in the order of a backward; module 0 is called twice
PROJECTIONS = {
    "exact": None,
    "sjlt": Projection("sjlt", seed=3, width=70),
    "rademacher": Projection("rademacher", seed=3, width=70),
}


def linears_of(dtype: torch.dtype) -> list[LoraLinear]:
    return [
        LoraLinear(
            name=f"base_model.model.layers.{i}.proj",
            layer=torch.nn.Identity(),
            weight=torch.zeros(d_out, d_in, dtype=dtype),
            bias=None,
            a=torch.zeros(r, d_in, dtype=dtype),
            b=torch.zeros(d_out, r, dtype=dtype),
            scaling=0.5 + i,
        )
        for i, (d_in, d_out, r) in enumerate(SHAPES)
    ]


def calls_of(tokens: int, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    """What the backward gives `add`: h a slice of a wider tensor, g not contiguous."""
    generator = torch.Generator().manual_seed(tokens)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    calls = []
    for number in CALLS:
        d_in, d_out, r = SHAPES[number]
        h, u = normal(tokens, r + 3)[:, 3:], normal(tokens, r)
        calls.append((number, h, u, normal(d_out, tokens).T, normal(tokens, d_in)))
    return calls


def reducer_of(projection: Projection | None, dtype: torch.dtype, triton: bool) -> FullReducer:
    linears = linears_of(dtype)
    reducer = FullReducer(linears, layout_of(linears, projection), projection)
    reducer.backend, reducer.bf16_rows = TRITON if triton else TORCH, triton
    return reducer


def rows_of(reducer: FullReducer, lengths: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    reducer.begin([0, *accumulate(lengths)])
    for call in calls_of(sum(lengths), dtype):
        reducer.add(*call)
    return reducer.finish()


class Largest(TorchDispatchMode):
    """Numbers in the largest tensor of floats that an operation within this context has given."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        found = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]
        self.numbers = max(self.numbers, *(leaf.numel() for leaf in found), 0)
        return out


def largest(projection: Projection, triton: bool) -> int:
    """Numbers in the largest tensor there is while the factors of module 0 are summed for one token."""
    reducer = reducer_of(projection, torch.float32, triton)
    reducer.begin([0, 1])
    call = next(call for call in calls_of(1, torch.float32) if call[0] == 0)
    reducer.add(*call)  # makes the maps, which are as long as the factors
    with Largest() as seen:
        reducer.add(*call)
    return seen.numbers


def other_factors() -> dict[str, float]:
    """Errors of modules of one and four factors by the kernels, each called once, against explicit matrices."""
    errors = {}

    def compare(case: str, kept: list[int], make: Any, projection: Projection | None = None) -> None:
        modules = factor_cases.make_modules(torch.float32)
        calls = factor_cases.make_calls(modules, torch.float32)[:-1]
        calls = [(kept.index(n), *rest) for n, *rest in calls if n in kept]
        modules = [modules[n] for n in kept]
        expected = factor_cases.projected_rows(modules, factor_cases.exact_rows(modules, calls), projection)
        reducer = make(modules, layout_of(modules, projection), projection)
        reducer.backend = TRITON
        if isinstance(reducer, StreamReducer):
            assert reducer.way == "kernel"
            expected = expected @ reducer.queries.double().T
        found = factor_cases.run(reducer, calls)
        errors[case] = float((found - expected).norm() / expected.norm())

    def streamed(modules: Any, layout: Any, projection: None) -> StreamReducer:
        generator = torch.Generator().manual_seed(1)
        return StreamReducer(modules, layout, torch.randn(2, layout[-1].columns.stop, generator=generator))

    compare("one_sided", [0, 2, 4], ProjectedReducer, factor_cases.PROJECTIONS["one_sided"])  # two of one shape
    compare("exact", [0, 2], FullReducer)
    compare("sjlt", [0, 2], FullReducer, factor_cases.PROJECTIONS["sjlt"])
    compare("stream", [0], streamed)
    return errors


def main() -> None:
    round_as_cards_do()
    sign_product.SLAB = SLAB
    sjlt_scatter.TILES_A_PROGRAM, sjlt_scatter.MOST_SPLITS = 1, 2  # so that a program has several tiles
    errors = {}
    for name, projection in PROJECTIONS.items():
        for dtype in (torch.float32, torch.bfloat16):
            ours, theirs = (reducer_of(projection, dtype, triton) for triton in (True, False))
            for lengths in PACKS:
                found, expected = (rows_of(reducer, lengths, dtype) for reducer in (ours, theirs))
                assert found.dtype == expected.dtype == torch.float32
                error = (found - expected).norm(dim=1) / expected.norm(dim=1)
                case = f"{name} {str(dtype).removeprefix('torch.')} {lengths}"
                errors[case] = float(error.max())
    flat = {name: projection for name, projection in PROJECTIONS.items() if projection is not None}
    held = {name: [largest(projection, triton) for triton in (True, False)] for name, projection in flat.items()}
    d_in, d_out, r = SHAPES[0]
    print(json.dumps({"errors": errors, "held": held, "factor": r * min(d_in, d_out), "others": other_factors()}))


if __name__ == "__main__":
    main()
