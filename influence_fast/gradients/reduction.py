"""Ragged sums over tokens: from what a module's forward and backward left to each example's piece of a row.

The segment sums use fp32 (fp64 for an fp64 model) whatever the products' dtype was.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING

import torch

from influence_fast.errors import ConfigError
from influence_fast.gradients.eigen_sketch import EigenRows
from influence_fast.gradients.lora import LayoutEntry, LoraLinear, layout_width
from influence_fast.gradients.projection import Projection, entry_size, random_matrix
from influence_fast.gradients.row_sketch import RowSketch
from influence_fast.gradients.transfer import to_device

if TYPE_CHECKING:
    from influence_fast.kernels.project_flat import FlatSketch
    from influence_fast.kernels.segments import Segments

# Numbers of a random matrix that is kept from one engine to the next.
_KEPT_NUMBERS = 1 << 15


def random_columns(
    projection: Projection | None, linear: LoraLinear, triton: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """R_in [d_in, p] and R_out [d_out, p] of one module, on the CPU or on its card: fp32, or empty with p = 0 where the
    kind needs none."""
    if projection is None or projection.flat:
        return linear.a.new_zeros(linear.d_in, 0), linear.b.new_zeros(linear.d_out, 0)
    device = linear.a.device
    return (
        _matrix(projection, f"{linear.key}/in", linear.d_in, device, triton),
        _matrix(projection, f"{linear.key}/out", linear.d_out, device, triton),
    )


def _matrix(projection: Projection, name: str, rows: int, device: torch.device, triton: bool) -> torch.Tensor:
    """`random_matrix`, made where it is used.

    For the CPU small ones are kept: drawing them is half of what opening an engine of a small model takes.
    """
    plain = projection.plain
    if device.type == "cuda" and triton:
        from influence_fast.kernels.counter import fill_signs

        return fill_signs(plain.seed, name, rows, plain.dim, device=device).mul_(entry_size(plain.dim))
    if device.type == "cuda":
        return random_matrix(plain, name, rows, device=device)
    return (_kept_matrix if rows * plain.dim <= _KEPT_NUMBERS else random_matrix)(plain, name, rows)


@functools.lru_cache(maxsize=512)  # 64 MiB at most
def _kept_matrix(projection: Projection, name: str, rows: int) -> torch.Tensor:
    return random_matrix(projection, name, rows)


def pack_segments(cu_seqlens: list[int], device: torch.device) -> Segments:
    """What the kernels need to know of a pack's examples."""
    from influence_fast.kernels.segments import Segments

    return Segments.from_lengths([end - start for start, end in pairwise(cu_seqlens)], device=device)


class Reducer:
    """Collects a pack's modules during the backward; `finish` gives the rows [E, width]."""

    @property
    def needs_input(self) -> bool:
        """Whether x itself must be kept for the backward."""
        return False

    @property
    def projected(self) -> bool:
        """Whether `add_factors` takes gradients that `columns` have multiplied, and not those of the whole factors."""
        return False

    triton = False  # whether the Triton kernels do the sums
    bf16_rows = False  # whether rows that are final once summed may be bf16

    def __init__(self, linears: list[LoraLinear], layout: list[LayoutEntry], projection: Projection | None) -> None:
        self.linears = linears
        self.layout = layout
        self.projection = projection
        self.dtype = torch.float64 if linears[0].weight.dtype == torch.float64 else torch.float32
        self.device = linears[0].weight.device
        self.examples = 0
        self.segments: Segments | None = None  # the pack's, on the Triton backend
        self._bounds: list[int] | None = None
        self._start = torch.zeros(1, dtype=torch.int64, device=self.device)

    @property
    def width(self) -> int:
        """Numbers in a finished row."""
        sketched = None if self.projection is None else self.projection.width
        return layout_width(self.layout) if sketched is None else sketched

    def columns(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What one module's input [d_in, p] and output gradient [d_out, p] are multiplied by beside A^T and B."""
        return random_columns(self.projection, self.linears[number], self.triton)

    @property
    def cu_seqlens(self) -> list[int]:
        """The pack's bounds; ConfigError in a step that is to be recorded, which must not depend on them."""
        if self._bounds is None:
            raise ConfigError(
                "these gradients need each pack's bounds on the host, and a CUDA graph has none; leave CUDA graphs off"
            )
        return self._bounds

    @property
    def recordable(self) -> bool:
        """Whether a step can be a CUDA graph: what it launches depends on nothing but the sizes of `segments`."""
        return self.triton

    def begin(self, cu_seqlens: list[int] | None, segments: Segments | None = None) -> None:
        """A pack of the bounds `cu_seqlens` comes; `segments` are the same for the kernels, where already made."""
        if segments is None and self.triton and cu_seqlens is not None:
            segments = pack_segments(cu_seqlens, self.device)
        self.segments, self._bounds = segments, cu_seqlens
        self.examples = len(self.cu_seqlens) - 1 if segments is None else segments.examples

    @property
    def tokens(self) -> int:
        """Tokens of the pack."""
        return self.cu_seqlens[-1] if self.segments is None else self.segments.tokens

    def add(
        self,
        number: int,
        kept: torch.Tensor,  # [T, c] forward columns: h, or [h | z]
        out_of: torch.Tensor,  # [T, c] backward columns: u, or [u | y]
        g: torch.Tensor,  # [T, d_out]
        tokens: torch.Tensor | None,  # [T, d_in], only if needs_input
    ) -> None:
        raise NotImplementedError

    def add_factors(self, number: int, first: int, grad_a: torch.Tensor, grad_b: torch.Tensor) -> None:
        """Add gradients of module `number`'s factors, already summed, for the examples from `first` on.

        grad_a: [n, r, d_in] of lora_A, grad_b: [n, d_out, r] of lora_B, in `dtype` and scaled; with `projected`
        dA R_in [n, r, p] and R_out^T dB [n, p, r].
        """
        raise NotImplementedError

    def finish(self) -> torch.Tensor:
        raise NotImplementedError

    def launch_outer(
        self, left: torch.Tensor, right: torch.Tensor, segments: Segments, rows: torch.Tensor, scaling: float = 1.0
    ) -> None:
        """rows [E, a b] = s left^T right of each example, one factor in one launch: left [T, a], right [T, b]."""
        from influence_fast.kernels.segment_outer import segment_outer

        segment_outer(left[:, None], right[:, None], segments, rows, self._start, scale=scaling)


class ProjectedReducer(Reducer):
    """`one_sided` and `kron`: small outer products of all modules at the end of the pack, then the row sketch."""

    def __init__(self, linears: list[LoraLinear], layout: list[LayoutEntry], projection: Projection | None) -> None:
        super().__init__(linears, layout, projection)
        assert projection is not None
        self._pending: list[tuple[int, torch.Tensor, torch.Tensor]] = []
        self._summed: list[tuple[int, int, torch.Tensor, torch.Tensor]] = []
        self._rank_side: list[torch.Tensor] = []
        if projection.kind == "kron":
            self._rank_side = [
                random_matrix(projection, f"{linear.key}/rank", linear.r).to(self.device, self.dtype)
                for linear in linears
            ]
        self._sketch: Callable[[torch.Tensor], torch.Tensor] | None = None
        if projection.sketch is not None:
            projection.sketch.check_layout(layout)
            self._sketch = EigenRows(projection.sketch, self.device, self.dtype)
        elif projection.width is not None:
            self._sketch = RowSketch(layout, projection, self.device)
        self._tables: dict[tuple[int, ...], tuple[torch.Tensor, list[torch.Tensor]]] = {}

    @property
    def projected(self) -> bool:
        return True

    @property
    def recordable(self) -> bool:
        return self.triton and not self._rank_side

    def begin(self, cu_seqlens: list[int] | None, segments: Segments | None = None) -> None:
        super().begin(cu_seqlens, segments)
        self._pending, self._summed = [], []

    def add(
        self,
        number: int,
        kept: torch.Tensor,
        out_of: torch.Tensor,
        g: torch.Tensor,
        tokens: torch.Tensor | None,
    ) -> None:
        self._pending.append((number, kept, out_of))

    def add_factors(self, number: int, first: int, grad_a: torch.Tensor, grad_b: torch.Tensor) -> None:
        self._summed.append((number, first, grad_a, grad_b))

    def finish(self) -> torch.Tensor:
        pending = [number for number, _, _ in self._pending]
        once = len(set(pending)) == len(pending)  # else a module is called twice, and its parts are added
        launched = self.triton and not self._rank_side and once
        bf16 = launched and self.bf16_rows and self._sketch is None and not self._summed
        final = torch.bfloat16 if bf16 else self.dtype
        rows = torch.zeros(self.examples, layout_width(self.layout), dtype=final, device=self.device)
        ranks = {self.linears[number].r for number in pending}
        for r in sorted(ranks):
            chosen = [entry for entry in self._pending if self.linears[entry[0]].r == r]
            left = torch.stack([out_of for _, _, out_of in chosen])  # [M, T, r + p]
            right = torch.stack([kept for _, kept, _ in chosen])  # [M, T, r + p]
            numbers = [number for number, _, _ in chosen]
            if launched:
                self._launch(rows, numbers, r, left, right)
            else:
                self._sum(rows, numbers, r, left.to(self.dtype), right.to(self.dtype))
        for number, first, grad_a, grad_b in self._summed:
            self._write(rows[first : first + len(grad_a)], number, grad_a, grad_b, 1.0)
        self._pending, self._summed = [], []
        return rows if self._sketch is None else self._sketch(rows)

    def _launch(self, rows: torch.Tensor, numbers: list[int], r: int, left: torch.Tensor, right: torch.Tensor) -> None:
        """One kernel launch a side for all modules of one rank, straight into the rows."""
        from influence_fast.kernels.segment_outer import segment_outer

        assert self.segments is not None
        u_y, h_z = left.transpose(0, 1), right.transpose(0, 1)  # [T, M, r + p]
        if tuple(numbers) not in self._tables:  # the same in every pack
            scales = torch.tensor([self.linears[n].scaling for n in numbers], dtype=torch.float32)
            places = [torch.tensor([self.layout[2 * n + side].offset for n in numbers]) for side in (0, 1)]
            self._tables[tuple(numbers)] = (
                to_device(scales, self.device),
                [to_device(place, self.device) for place in places],
            )
        scales, offsets = self._tables[tuple(numbers)]
        for side, (a, b) in enumerate(((u_y[..., :r], h_z[..., r:]), (u_y[..., r:], h_z[..., :r]))):
            segment_outer(a, b, self.segments, rows, offsets[side], scale=scales)

    def _sum(self, rows: torch.Tensor, numbers: list[int], r: int, left: torch.Tensor, right: torch.Tensor) -> None:
        """The same by one batched product an example over all modules of one rank."""
        examples = rows.shape[0]
        grad_a = left.new_empty(len(numbers), examples, r, left.shape[2] - r)
        grad_b = left.new_empty(len(numbers), examples, left.shape[2] - r, r)
        for e, (start, end) in enumerate(pairwise(self.cu_seqlens)):
            u_y, h_z = left[:, start:end].transpose(1, 2), right[:, start:end]
            torch.bmm(u_y[:, :r], h_z[:, :, r:], out=grad_a[:, e])
            torch.bmm(u_y[:, r:], h_z[:, :, :r], out=grad_b[:, e])
        for m, number in enumerate(numbers):
            self._write(rows, number, grad_a[m], grad_b[m], self.linears[number].scaling)

    def _write(
        self, rows: torch.Tensor, number: int, grad_a: torch.Tensor, grad_b: torch.Tensor, scaling: float
    ) -> None:
        if self._rank_side:
            rank_side = self._rank_side[number]
            grad_a = rank_side.T @ grad_a  # [E, p, p]
            grad_b = grad_b @ rank_side  # [E, p, p]
        for entry, grad in zip(self.layout[2 * number : 2 * number + 2], (grad_a, grad_b), strict=True):
            # added, not set: a module that the forward calls twice contributes twice
            rows[:, entry.columns].add_(grad.flatten(1), alpha=scaling)


class FullReducer(Reducer):
    """Exact factors, one module at a time; kept whole, or sketched at once by the flat kinds.

    PyTorch sums one example at a time. The Triton kernels sum a factor of all examples straight into the rows:
    `segment_outer` where they are exact, else `project_flat`, so that an example's exact gradient is never in memory.
    Rows are fp32 (fp64 for an fp64 model), `bf16_rows` or not: they are added to while the backward runs.
    """

    @property
    def needs_input(self) -> bool:
        return True

    def __init__(self, linears: list[LoraLinear], layout: list[LayoutEntry], projection: Projection | None) -> None:
        super().__init__(linears, layout, projection)
        self._rows = torch.empty(0)
        self._sketch = None if projection is None else RowSketch(layout, projection, self.device)
        self._flat: dict[int, FlatSketch] = {}
        self._written: set[int] = set()  # blocks of this pack's exact rows that a kernel has written

    def begin(self, cu_seqlens: list[int] | None, segments: Segments | None = None) -> None:
        super().begin(cu_seqlens, segments)
        self._rows = torch.zeros(self.examples, self.width, dtype=self.dtype, device=self.device)
        self._written = set()

    def add(
        self,
        number: int,
        kept: torch.Tensor,
        out_of: torch.Tensor,
        g: torch.Tensor,
        tokens: torch.Tensor | None,
    ) -> None:
        assert tokens is not None
        if not self.triton:
            add = self._sum
            out_of, tokens, g, kept = (tensor.to(self.dtype) for tensor in (out_of, tokens, g, kept))
        else:
            add = self._launch if self._sketch is None else self._launch_sketch
            tokens, g = tokens.contiguous(), g.contiguous()
        scaling = self.linears[number].scaling
        add(2 * number, out_of, tokens, scaling)
        add(2 * number + 1, g, kept, scaling)

    def add_factors(self, number: int, first: int, grad_a: torch.Tensor, grad_b: torch.Tensor) -> None:
        for side, grads in enumerate((grad_a, grad_b)):
            block = 2 * number + side
            for e, flat in enumerate(grads.flatten(1), start=first):
                if self._sketch is None:
                    self._rows[e, self.layout[block].columns] += flat
                else:
                    self._sketch.add(self._rows[e], block, flat)

    def finish(self) -> torch.Tensor:
        rows, self._rows = self._rows, torch.empty(0)
        return rows

    def _sum(self, block: int, left: torch.Tensor, right: torch.Tensor, scaling: float) -> None:
        """rows[e] += s sum_t left_t right_t^T, or its sketch: left [T, a], right [T, b] of the factor a x b."""
        for e, (start, end) in enumerate(pairwise(self.cu_seqlens)):
            flat = (left[start:end].T @ right[start:end]).reshape(-1) * scaling
            if self._sketch is None:
                self._rows[e, self.layout[block].columns] += flat
            else:
                self._sketch.add(self._rows[e], block, flat)

    def _launch(self, block: int, left: torch.Tensor, right: torch.Tensor, scaling: float) -> None:
        """The same into exact rows, by the kernel, which writes: a module's second call goes through a copy."""
        assert self.segments is not None
        rows = self._rows[:, self.layout[block].columns]
        again = block in self._written
        target = torch.empty_like(rows) if again else rows
        self.launch_outer(left, right, self.segments, target, scaling)
        if again:
            rows += target
        self._written.add(block)

    def _launch_sketch(self, block: int, left: torch.Tensor, right: torch.Tensor, scaling: float) -> None:
        """The same into sketched rows, by the kernel."""
        from influence_fast.kernels.project_flat import project_flat

        assert self._sketch is not None
        assert self.segments is not None
        if block not in self._flat:  # the same in every pack
            self._flat[block] = self._sketch.flat(block)
        project_flat(left, right, self.segments, self._flat[block], self._rows, scale=scaling, accumulate=True)
