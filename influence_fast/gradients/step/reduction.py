"""Ragged sums over tokens: from what a module's forward and backward left to each example's piece of a row.

The segment sums use fp32 (fp64 for an fp64 model) whatever the products' dtype was.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import torch

from influence_fast.errors import ConfigError
from influence_fast.gradients.model.backends import TORCH, Torch
from influence_fast.gradients.model.lora import LoraLinear
from influence_fast.gradients.rows.eigen_sketch import EigenRows
from influence_fast.gradients.rows.factors import Block, Columns, Factor, blocks_of, tokens_of
from influence_fast.gradients.rows.layout import LayoutEntry, layout_width
from influence_fast.gradients.rows.projection import Projection, entry_size, random_matrix
from influence_fast.gradients.rows.row_sketch import RowSketch
from influence_fast.transfer import to_device

if TYPE_CHECKING:
    from influence_fast.kernels.project_flat import FlatSketch
    from influence_fast.kernels.segments import Segments

# Numbers of a random matrix that is kept from one engine to the next.
_KEPT_NUMBERS = 1 << 15


def random_columns(
    projection: Projection | None, linear: LoraLinear, backend: Torch
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return R_in [d_in, p] and R_out [d_out, p] of one module, in fp32, on the CPU or on its GPU.

    They are empty, p = 0, if the kind needs none.
    """
    if projection is None or not projection.sided:
        empty = torch.zeros(0, device=linear.device)
        return empty.view(linear.d_in, 0), empty.view(linear.d_out, 0)
    device = linear.device
    return (
        _matrix(projection, f"{linear.key}/in", linear.d_in, device, backend),
        _matrix(projection, f"{linear.key}/out", linear.d_out, device, backend),
    )


def _matrix(projection: Projection, name: str, rows: int, device: torch.device, backend: Torch) -> torch.Tensor:
    """Return `random_matrix`, made where it is used.

    For the CPU small ones are kept: drawing them is half of what opening an engine of a small model takes.
    """
    plain = projection.plain
    signs = backend.sign_matrix(plain.seed, name, rows, plain.dim, device)
    if signs is not None:
        return signs.mul_(entry_size(plain.dim))
    if device.type == "cuda":
        return random_matrix(plain, name, rows, device=device)
    return (_kept_matrix if rows * plain.dim <= _KEPT_NUMBERS else random_matrix)(plain, name, rows)


@functools.lru_cache(maxsize=512)  # 64 MiB at most
def _kept_matrix(projection: Projection, name: str, rows: int) -> torch.Tensor:
    return random_matrix(projection, name, rows)


def pack_segments(cu_seqlens: list[int], device: torch.device) -> Segments:
    """Return what the kernels need to know of a pack's examples."""
    from influence_fast.kernels.segments import Segments

    return Segments.from_lengths([end - start for start, end in pairwise(cu_seqlens)], device=device)


class Reducer:
    """Collects a pack's modules during the backward; `finish` gives the rows [E, width]."""

    @property
    def needs_input(self) -> bool:
        """Return whether x itself must be kept for the backward."""
        return False

    @property
    def projected(self) -> bool:
        """Return whether `add_factors` takes gradients whose wide sides `columns` have multiplied, not whole ones."""
        return False

    backend: Torch = TORCH
    bf16_rows = False  # whether rows that are final once summed may be bf16

    def __init__(self, linears: list[LoraLinear], layout: list[LayoutEntry], projection: Projection | None) -> None:
        self.linears = linears
        self.layout = layout
        self.projection = projection
        self.blocks = blocks_of(linears, layout, projection)  # of each module
        self.dtype = torch.float64 if linears[0].dtype == torch.float64 else torch.float32
        self.device = linears[0].device
        self.examples = 0
        self.segments: Segments | None = None  # the pack's, on the Triton backend
        self._bounds: list[int] | None = None
        self._start = torch.zeros(1, dtype=torch.int64, device=self.device)

    @property
    def width(self) -> int:
        """Return the count of numbers in a finished row."""
        sketched = None if self.projection is None else self.projection.width
        return layout_width(self.layout) if sketched is None else sketched

    def columns(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the matrices beside A^T and B that multiply one module's input [d_in, p] and output gradient [d_out,
        p].
        """
        return random_columns(self.projection, self.linears[number], self.backend)

    @property
    def cu_seqlens(self) -> list[int]:
        """Return the pack's bounds; raise ConfigError in a step that is to be recorded: it must not depend on them."""
        if self._bounds is None:
            raise ConfigError(
                "these gradients need each pack's bounds on the host, and a CUDA graph has none; leave CUDA graphs off"
            )
        return self._bounds

    @property
    def recordable(self) -> bool:
        """Return whether a step can be a CUDA graph: what it launches depends on the sizes of `segments` alone."""
        return self.backend.launches_kernels

    def begin(self, cu_seqlens: list[int] | None, segments: Segments | None = None) -> None:
        """Start a pack of the bounds `cu_seqlens`; `segments` are the same for the kernels, where already made."""
        if segments is None and self.backend.launches_kernels and cu_seqlens is not None:
            segments = pack_segments(cu_seqlens, self.device)
        self.segments, self._bounds = segments, cu_seqlens
        self.examples = len(self.cu_seqlens) - 1 if segments is None else segments.examples

    def add(
        self,
        number: int,
        kept: torch.Tensor,  # [T, c_in] forward columns: h, or [h | z]
        out_of: torch.Tensor,  # [T, c_out] backward columns: u, or [u | y]
        g: torch.Tensor,  # [T, d_out]
        tokens: torch.Tensor | None,  # [T, d_in], only if needs_input
    ) -> None:
        raise NotImplementedError

    def add_factors(self, number: int, first: int, grads: Sequence[torch.Tensor]) -> None:
        """Add gradients of module `number`'s factors, already summed, for the examples from `first` on.

        grads: for each factor [n, a, b] in `dtype`, scaled; with `projected` its wide sides are p columns each.
        """
        raise NotImplementedError

    def finish(self) -> torch.Tensor:
        raise NotImplementedError

    def launch_outer(
        self, left: torch.Tensor, right: torch.Tensor, segments: Segments, rows: torch.Tensor, scaling: float = 1.0
    ) -> None:
        """Compute rows [E, a b] = s left^T right of each example by one launch: left [T, a], right [T, b]."""
        from influence_fast.kernels.segment_outer import segment_outer

        segment_outer(left[:, None], right[:, None], segments, rows, self._start, scale=scaling)


class ProjectedReducer(Reducer):
    """Reducer of `one_sided` and `kron`: small outer products of all modules at the end of the pack, then the row
    sketch.
    """

    def __init__(self, linears: list[LoraLinear], layout: list[LayoutEntry], projection: Projection | None) -> None:
        super().__init__(linears, layout, projection)
        assert projection is not None
        self._pending: list[tuple[int, torch.Tensor, torch.Tensor]] = []
        self._summed: list[tuple[Block, int, torch.Tensor]] = []
        self._rank_sides: dict[str, torch.Tensor] = {}  # [r, p], of "kron" by the name that seeds it
        for _, factor, _ in itertools.chain.from_iterable(self.blocks):
            for name, side in ((factor.left_rank, factor.left), (factor.right_rank, factor.right)):
                if name is not None and isinstance(side, Columns):
                    matrix = random_matrix(projection, name, side.width)
                    self._rank_sides[name] = matrix.to(self.device, self.dtype)
        self._sketch: Callable[[torch.Tensor], torch.Tensor] | None = None
        if projection.sketch is not None:
            projection.sketch.check_layout(layout)
            self._sketch = EigenRows(projection.sketch, self.device, self.dtype)
        elif projection.width is not None:
            self._sketch = RowSketch(layout, projection, self.device)
        self._tables: dict[tuple[int, ...], list[tuple[torch.Tensor, torch.Tensor]]] = {}

    @property
    def projected(self) -> bool:
        return True

    @property
    def recordable(self) -> bool:
        return self.backend.launches_kernels and not self._rank_sides

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

    def add_factors(self, number: int, first: int, grads: Sequence[torch.Tensor]) -> None:
        self._summed += [(block, first, grad) for block, grad in zip(self.blocks[number], grads, strict=True)]

    def finish(self) -> torch.Tensor:
        pending = [number for number, _, _ in self._pending]
        once = len(set(pending)) == len(pending)  # else a module is called twice, and its parts are added
        launched = self.backend.launches_kernels and not self._rank_sides and once
        bf16 = launched and self.bf16_rows and self._sketch is None and not self._summed
        final = torch.bfloat16 if bf16 else self.dtype
        rows = torch.zeros(self.examples, layout_width(self.layout), dtype=final, device=self.device)
        for chosen in self._alike():
            left = torch.stack([out_of for _, _, out_of in chosen])  # [M, T, c_out]
            right = torch.stack([kept for _, kept, _ in chosen])  # [M, T, c_in]
            numbers = [number for number, _, _ in chosen]
            if launched:
                self._launch(rows, numbers, left, right)
            else:
                self._sum(rows, numbers, left.to(self.dtype), right.to(self.dtype))
        for block, first, grad in self._summed:
            rows[first : first + len(grad), block.columns] += self._in_rank_sides(block.factor, grad).flatten(1)
        self._pending, self._summed = [], []
        return rows if self._sketch is None else self._sketch(rows)

    def _alike(self) -> list[list[tuple[int, torch.Tensor, torch.Tensor]]]:
        """Return what is pending by modules whose factors have the same shapes and the same places in the columns."""
        groups: dict[tuple[object, ...], list[tuple[int, torch.Tensor, torch.Tensor]]] = {}
        for number, kept, out_of in self._pending:
            factors = tuple((f.left, f.right, f.shape) for _, f, _ in self.blocks[number])
            groups.setdefault((factors, kept.shape[1], out_of.shape[1]), []).append((number, kept, out_of))
        return list(groups.values())

    def _factors(self, numbers: list[int]) -> list[tuple[Block, ...]]:
        """Return the factors of modules that are alike: for each factor, that of every module."""
        return list(zip(*(self.blocks[number] for number in numbers), strict=True))

    def _launch(self, rows: torch.Tensor, numbers: list[int], left: torch.Tensor, right: torch.Tensor) -> None:
        """Sum modules that are alike by one kernel launch a factor for all of them, straight into the rows."""
        from influence_fast.kernels.segment_outer import segment_outer

        assert self.segments is not None
        u_y, h_z = left.transpose(0, 1), right.transpose(0, 1)  # [T, M, c_out], [T, M, c_in]
        factors = self._factors(numbers)
        if tuple(numbers) not in self._tables:  # the same in every pack
            self._tables[tuple(numbers)] = [
                (
                    to_device(torch.tensor([block.columns.start for block in blocks]), self.device),
                    to_device(torch.tensor([block.factor.scale for block in blocks], dtype=torch.float32), self.device),
                )
                for blocks in factors
            ]
        for blocks, (offsets, scales) in zip(factors, self._tables[tuple(numbers)], strict=True):
            a, b = tokens_of(blocks[0].factor.left, u_y), tokens_of(blocks[0].factor.right, h_z)
            segment_outer(a, b, self.segments, rows, offsets, scale=scales)

    def _sum(self, rows: torch.Tensor, numbers: list[int], left: torch.Tensor, right: torch.Tensor) -> None:
        """Sum modules that are alike by one batched product an example and a factor."""
        for blocks in self._factors(numbers):
            a, b = tokens_of(blocks[0].factor.left, left), tokens_of(blocks[0].factor.right, right)
            grads = left.new_empty(len(numbers), rows.shape[0], a.shape[2], b.shape[2])
            for e, (start, end) in enumerate(pairwise(self.cu_seqlens)):
                torch.bmm(a[:, start:end].transpose(1, 2), b[:, start:end], out=grads[:, e])
            for block, grad in zip(blocks, grads, strict=True):
                # added, not set: a module that the forward calls twice contributes twice
                rows[:, block.columns].add_(
                    self._in_rank_sides(block.factor, grad).flatten(1), alpha=block.factor.scale
                )

    def _in_rank_sides(self, factor: Factor, grad: torch.Tensor) -> torch.Tensor:
        """Multiply the rank's side of a factor's sums [E, a, b] by its random columns, where "kron" has any."""
        if factor.left_rank is not None:
            grad = self._rank_sides[factor.left_rank].T @ grad
        return grad if factor.right_rank is None else grad @ self._rank_sides[factor.right_rank]


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
        self._sketch = None
        if projection is not None and projection.flat:
            self._sketch = RowSketch(layout, projection, self.device)
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
        if not self.backend.launches_kernels:
            add = self._sum
            out_of, tokens, g, kept = (tensor.to(self.dtype) for tensor in (out_of, tokens, g, kept))
        else:
            add = self._launch if self._sketch is None else self._launch_sketch
            tokens, g = tokens.contiguous(), g.contiguous()
        for block, factor, _ in self.blocks[number]:
            add(block, tokens_of(factor.left, out_of, g), tokens_of(factor.right, kept, tokens), factor.scale)

    def add_factors(self, number: int, first: int, grads: Sequence[torch.Tensor]) -> None:
        for block, grad in zip(self.blocks[number], grads, strict=True):
            for example, flat in enumerate(grad.flatten(1), start=first):
                if self._sketch is None:
                    self._rows[example, block.columns] += flat
                else:
                    self._sketch.add(self._rows[example], block.number, flat)

    def finish(self) -> torch.Tensor:
        rows, self._rows = self._rows, torch.empty(0)
        return rows

    def _sum(self, block: int, left: torch.Tensor, right: torch.Tensor, scaling: float) -> None:
        """Add s sum_t left_t right_t^T, or its sketch, to rows[e]: left [T, a], right [T, b] of the factor a x b."""
        for e, (start, end) in enumerate(pairwise(self.cu_seqlens)):
            flat = (left[start:end].T @ right[start:end]).reshape(-1) * scaling
            if self._sketch is None:
                self._rows[e, self.layout[block].columns] += flat
            else:
                self._sketch.add(self._rows[e], block, flat)

    def _launch(self, block: int, left: torch.Tensor, right: torch.Tensor, scaling: float) -> None:
        """Add the sums to exact rows by the kernel, which writes: a module's second call goes through a copy."""
        assert self.segments is not None
        rows = self._rows[:, self.layout[block].columns]
        again = block in self._written
        target = torch.empty_like(rows) if again else rows
        self.launch_outer(left, right, self.segments, target, scaling)
        if again:
            rows += target
        self._written.add(block)

    def _launch_sketch(self, block: int, left: torch.Tensor, right: torch.Tensor, scaling: float) -> None:
        """Add the sums to sketched rows, by the kernel."""
        from influence_fast.kernels.project_flat import project_flat

        assert self._sketch is not None
        assert self.segments is not None
        if block not in self._flat:  # the same in every pack
            self._flat[block] = self._sketch.flat(block)
        project_flat(left, right, self.segments, self._flat[block], self._rows, scale=scaling, accumulate=True)
