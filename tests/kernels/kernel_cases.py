"""The cases of every kernel, run in the interpreter and on a card alike: one list, one way to check.

A case makes its inputs from a seed, calls the launcher and returns what came out beside what float64 says.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from influence_fast.kernels import gated_silu as gated
from influence_fast.kernels import project_flat as flat
from influence_fast.kernels import rms_norm as norm
from influence_fast.kernels import rotary as rotate
from influence_fast.kernels import segment_bilinear as bilinear
from influence_fast.kernels import segment_outer as outer
from influence_fast.kernels import skinny_project as skinny
from influence_fast.kernels import token_loss as loss
from influence_fast.kernels.segments import Segments

Pair = tuple[Tensor, Tensor]

# Chunks of 32 keep the interpreter fast; 80 is longer than a block of tokens and no multiple of it.
RAGGED = {
    "one token": ([1], 32),
    "one prime": ([97], 32),
    "block and its neighbours": ([31, 32, 33, 1, 64, 65], 32),
    "primes": ([2, 101, 3, 53], 80),
    "all short": ([1, 1, 2, 7], 512),
}


@dataclass(frozen=True)
class Case:
    """`run(dtype, device)` -> (actual, float64 reference); `stored`: the dtype that decides the tolerance."""

    id: str
    dtype: torch.dtype
    stored: torch.dtype
    run: Callable[[torch.device], Pair]


def normal(*shape: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).to(device)


def unwritten(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.full(shape, float("nan"), dtype=dtype, device=device)


def short(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]


@dataclass(frozen=True)
class Skinny:
    tokens: int
    features: int
    columns: int
    column_major: bool = False
    split: bool | None = None
    out_dtype: torch.dtype | None = None

    def run(self, dtype: torch.dtype, device: torch.device) -> Pair:
        # A slice of wider rows, so that the row stride is not the row length.
        x = normal(self.tokens, self.features + 3, dtype=dtype, device=device)[:, : self.features]
        columns = self.columns
        if self.column_major:
            w = normal(columns, self.features, dtype=dtype, device=device, seed=1).T
        else:
            w = normal(self.features, columns, dtype=dtype, device=device, seed=1)
        wide = unwritten(self.tokens, columns + 5, dtype=self.out_dtype or dtype, device=device)
        out = skinny.skinny_project(x, w, split=self.split, out=wide[:, 2 : 2 + columns])
        assert wide[:, :2].isnan().all()
        assert wide[:, 2 + columns :].isnan().all()
        expected = skinny.reference(x.double(), w.double())
        return out, expected


SKINNY = {
    "one token, one column": Skinny(1, 7, 1),
    "A^T and signs": Skinny(65, 131, 32, column_major=True),
    "B, odd sizes": Skinny(63, 67, 5),
    "q k v share a pass": Skinny(33, 96, 96, column_major=True),
    "256 columns": Skinny(5, 70, 256),
    "64 columns, d of two tiles and one": Skinny(65, 257, 64),
    "33 columns": Skinny(17, 40, 33, column_major=True),
    "two chunks of d": Skinny(3, 1031, 20, column_major=True, split=False),
    "two chunks of d, split": Skinny(3, 1031, 20, column_major=True, split=True),
    "float32 out": Skinny(31, 129, 32, out_dtype=torch.float32),
}


def _outer_run(
    lengths: list[int],
    chunk: int,
    modules: int,
    a: int,
    b: int,
    row_dtype: torch.dtype,
    dtype: torch.dtype,
    device: torch.device,
) -> Pair:
    segments = Segments.from_lengths(lengths, device=device, chunk=chunk)
    # [h | z] of all modules in one buffer: both operands are strided views of it.
    both = normal(segments.tokens, modules, a + b + 1, dtype=dtype, device=device)
    left, right = both[:, :, :a], both[:, :, a : a + b]
    scale = 0.5 + torch.arange(modules, dtype=torch.float32, device=device)
    gap, size = 3, a * b
    # Later modules first, with gaps: an offset that is ignored shows.
    offsets = torch.tensor([(modules - 1 - m) * (size + gap) + 1 for m in range(modules)], device=device)
    rows = unwritten(len(lengths), modules * (size + gap) + 1, dtype=row_dtype, device=device)
    outer.segment_outer(left, right, segments, rows, offsets, scale=scale)
    expected = outer.reference(left.double(), right.double(), segments, scale=scale)
    blocks = [rows[:, o : o + size] for o in offsets.tolist()]
    written = sum(int((~block.isnan()).sum()) for block in blocks)
    assert written == int((~rows.isnan()).sum()), "numbers outside the blocks were written"
    return torch.stack(blocks, dim=1), expected.flatten(2)


def _bilinear_run(
    lengths: list[int],
    chunk: int,
    d: int,
    r: int,
    q: int,
    transposed: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> Pair:
    segments = Segments.from_lengths(lengths, device=device, chunk=chunk)
    g = normal(segments.tokens, d, dtype=dtype, device=device)
    h = normal(segments.tokens, r + 2, dtype=dtype, device=device, seed=1)[:, :r]
    if transposed:
        queries = normal(q, r, d, dtype=torch.float32, device=device, seed=2).transpose(1, 2)
    else:
        queries = normal(q, d, r, dtype=torch.float32, device=device, seed=2)
    first = normal(len(lengths), q, dtype=torch.float32, device=device, seed=3)
    out = bilinear.segment_bilinear(g, h, queries, segments, scale=0.25, out=first.clone(), accumulate=True)
    expected = bilinear.reference(g.double(), h.double(), queries.double(), segments, scale=0.25)
    return out, expected + first.double()


def _flat_run(
    kind: str,
    lengths: list[int],
    chunk: int,
    d: int,
    r: int,
    width: int,
    accumulate: bool,
    row_dtype: torch.dtype,
    dtype: torch.dtype,
    device: torch.device,
) -> Pair:
    segments = Segments.from_lengths(lengths, device=device, chunk=chunk)
    g = normal(segments.tokens, d, dtype=dtype, device=device)
    h = normal(segments.tokens, r, dtype=dtype, device=device, seed=1)
    sketch = flat.FlatSketch.of(kind, 3, "m/row", d, r, width, device=device)
    wide = unwritten(len(lengths), width + 4, dtype=row_dtype, device=device)
    rows = wide[:, 1 : 1 + width]
    expected = flat.reference(g.double(), h.double(), segments, sketch, scale=0.5)
    if accumulate:
        first = normal(len(lengths), width, dtype=row_dtype, device=device, seed=4)
        rows.copy_(first)
        expected = expected + first.double()
    flat.project_flat(g, h, segments, sketch, rows, scale=0.5, accumulate=accumulate)
    assert wide[:, 0].isnan().all()
    assert wide[:, 1 + width :].isnan().all()
    return rows, expected


def _loss_run(tokens: int, vocabulary: int, gradient: bool, dtype: torch.dtype, device: torch.device) -> Pair:
    """Losses alone, or the gradient; logits of any size, a slice of wider rows, and some tokens that weigh nothing."""
    size = 10.0 ** torch.linspace(-1, 2, tokens, dtype=torch.float64)
    wide = (normal(tokens, vocabulary + 3, dtype=torch.float64, device=torch.device("cpu")) * size[:, None]).to(dtype)
    wide = wide.to(device)
    logits = wide[:, 2 : 2 + vocabulary]
    targets = torch.arange(tokens, device=device) * 7919 % vocabulary
    weights = torch.arange(tokens, device=device) % 3 / 4 + (tokens == 1)
    expected = loss.reference(logits.double(), targets, weights.double())[gradient]
    before, losses = wide.clone(), unwritten(tokens, dtype=torch.float32, device=device)
    loss.token_loss(logits, targets, losses, weights=weights if gradient else None)
    around = [slice(None, 2), slice(2 + vocabulary, None)]
    assert all(torch.equal(wide[:, part], before[:, part]) for part in around)
    assert gradient or torch.equal(wide, before)
    return (logits, expected) if gradient else (losses, expected)


def _norm_run(
    count: int,
    features: int,
    offset: float,
    round_first: bool,
    backward: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> Pair:
    """y, or the gradient of x; rows from tiny (where eps counts) to large, slices of wider ones."""
    eps = 1e-5
    size = 10.0 ** torch.linspace(-4, 3, count, dtype=torch.float64)[:, None]
    wide = (normal(count, features + 5, dtype=torch.float64, device=torch.device("cpu")) * size).to(dtype).to(device)
    x = wide[:, 2 : 2 + features]
    w = normal(features, dtype=dtype, device=device, seed=1)
    exact = x.double().requires_grad_()
    expected = norm.reference(exact, w.double(), eps, offset=offset)
    if not backward:
        return norm.rms_norm(x, w, eps, offset=offset, round_first=round_first), expected.detach()
    g = normal(count, features + 1, dtype=dtype, device=device, seed=2)[:, :features]
    expected.backward(g.double())
    made = norm.rms_norm_backward(g, x, w, eps, offset=offset)
    assert exact.grad is not None
    scale = size.to(device)  # gradients are the larger the smaller the row: so each counts alike
    return (made * scale).to(dtype), exact.grad * scale


def _gated_run(size: int, backward: bool, dtype: torch.dtype, device: torch.device) -> Pair:
    """y, or both gradients; gates so large that their exponential is infinite too."""
    a = normal(size, dtype=torch.float64, device=torch.device("cpu")) * 3
    a[:3] = torch.tensor([200.0, -200.0, 0.0])[:size]
    a = a.to(dtype).to(device)
    b, g = (normal(size, dtype=dtype, device=device, seed=seed) for seed in (1, 2))
    exact = [a.double().requires_grad_(), b.double().requires_grad_()]
    expected = gated.reference(*exact)
    if not backward:
        return gated.gated_silu(a, b), expected.detach()
    return torch.stack(gated.gated_silu_backward(g, a, b)), torch.stack(
        torch.autograd.grad(expected, exact, g.double())
    )


def _rotary_run(tokens: int, heads: int, size: int, backward: bool, dtype: torch.dtype, device: torch.device) -> Pair:
    """Heads as a projection leaves them; the halves of the angles differ, as no model's do, so that a mix-up shows."""
    x = normal(1, tokens, heads + 2, size, dtype=dtype, device=device)[:, :, 1 : 1 + heads].transpose(1, 2)
    cos, sin = (normal(1, tokens, size, dtype=dtype, device=device, seed=seed) for seed in (1, 2))
    exact = x.double().requires_grad_()
    expected = rotate.reference(exact, cos.double(), sin.double())
    if backward:
        (expected,) = torch.autograd.grad(expected, exact, x.double())
    made = rotate.rotary(x, cos, sin, backward=backward)
    assert made.transpose(1, 2).is_contiguous()
    return made, expected.detach()


def cases() -> list[Case]:
    """Every kernel over ragged shapes, float32 and bfloat16, and where it stores another dtype than it reads."""
    found: list[Case] = []
    for dtype in (torch.float32, torch.bfloat16):
        kind = short(dtype)
        for name, each in SKINNY.items():
            found.append(
                Case(
                    f"skinny_project {kind} {name}",
                    dtype,
                    each.out_dtype or dtype,
                    lambda device, each=each, dtype=dtype: each.run(dtype, device),
                )
            )
        # Rows are bfloat16 or float32 whatever is read: a float32 row of bfloat16 operands must be exact to float32.
        for name, (lengths, chunk) in RAGGED.items():
            for modules, a, b, stored in (
                (3, 16, 16, torch.float32),
                (1, 67, 5, torch.float32),
                (2, 8, 16, torch.bfloat16),
            ):
                found.append(
                    Case(
                        f"segment_outer {kind} {modules}x{a}x{b} {short(stored)} rows, {name}",
                        dtype,
                        stored,
                        lambda device, arguments=(lengths, chunk, modules, a, b, stored, dtype): _outer_run(
                            *arguments, device
                        ),
                    )
                )
            for d, r, q, transposed in ((70, 16, 5, False), (33, 5, 1, True)):
                found.append(
                    Case(
                        f"segment_bilinear {kind} {d}x{r} q={q}, {name}",
                        dtype,
                        torch.float32,
                        lambda device, arguments=(lengths, chunk, d, r, q, transposed, dtype): _bilinear_run(
                            *arguments, device
                        ),
                    )
                )
        for tokens, vocabulary in ((1, 2), (5, 61), (3, 4096), (7, 4099), (2, 9001)):
            for gradient, stored in ((False, torch.float32), (True, dtype)):
                found.append(
                    Case(
                        f"token_loss {kind} {tokens}x{vocabulary} {'gradient' if gradient else 'losses'}",
                        dtype,
                        stored,
                        lambda device, arguments=(tokens, vocabulary, gradient, dtype): _loss_run(*arguments, device),
                    )
                )
        for count, features, offset, round_first in (
            (1, 1, 0.0, False),
            (5, 61, 1.0, False),
            (33, 128, 0.0, True),
            (3, 4096, 0.0, True),
            (2, 4099, 0.0, False),
        ):
            for backward in (False, True):
                found.append(
                    Case(
                        f"rms_norm {kind} {count}x{features} {'backward' if backward else 'forward'}",
                        dtype,
                        dtype,
                        lambda device, a=(count, features, offset, round_first, backward, dtype): _norm_run(*a, device),
                    )
                )
        for tokens, heads, size in ((1, 1, 2), (17, 9, 10), (33, 2, 64), (15, 8, 128)):
            for backward in (False, True):
                found.append(
                    Case(
                        f"rotary {kind} {tokens}x{heads}x{size} {'backward' if backward else 'forward'}",
                        dtype,
                        dtype,
                        lambda device, a=(tokens, heads, size, backward, dtype): _rotary_run(*a, device),
                    )
                )
        for size in (3, 61, 2048, 2049):
            for backward in (False, True):
                found.append(
                    Case(
                        f"gated_silu {kind} {size} {'backward' if backward else 'forward'}",
                        dtype,
                        dtype,
                        lambda device, a=(size, backward, dtype): _gated_run(*a, device),
                    )
                )
        flats = [
            ("sjlt", "block and its neighbours", 131, 16, 300, False, torch.float32),
            ("sjlt", "one prime", 16, 131, 4096, True, torch.float32),
            ("sjlt", "all short", 600, 16, 61, True, torch.bfloat16),
            ("sjlt", "one token", 3, 1, 1, False, torch.float32),
            ("rademacher", "block and its neighbours", 41, 5, 200, False, torch.float32),
            ("rademacher", "one prime", 300, 16, 130, True, torch.float32),
            ("rademacher", "one token", 7, 3, 5, True, torch.bfloat16),
        ]
        for form, name, d, r, width, accumulate, stored in flats:
            lengths, chunk = RAGGED[name]
            found.append(
                Case(
                    f"project_flat {kind} {form} {d}x{r} to {width} {short(stored)} rows, {name}",
                    dtype,
                    stored,
                    lambda device, a=(form, lengths, chunk, d, r, width, accumulate, stored, dtype): _flat_run(
                        *a, device
                    ),
                )
            )
    each = SKINNY["B, odd sizes"]
    found.append(
        Case(
            "skinny_project fp16 B, odd sizes",
            torch.float16,
            torch.float16,
            lambda device: each.run(torch.float16, device),
        )
    )
    return found
