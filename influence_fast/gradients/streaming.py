"""Stream mode: exact influence on a few queries while the training data passes by, with no projection and no store.

For one LoRA linear, a query's gradient M (H^-1 folded in, if wanted) and the tokens t of a training example:

    <M, grad> = s sum_t g_t^T M_B h_t + u_t^T M_A x_t        M_B (d_out, r), M_A (r, d_in)

so a query costs two more products of r columns a module, and no gradient of an example need be formed. That is 2 q T
r (d_in + d_out) operations for q queries; summing one factor's gradients of a few examples first and multiplying those
takes 2 (T + q E) r (d_in + d_out), less from a few queries on. Both ways are here, and neither keeps a gradient.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from influence_fast.data.packing import example_name
from influence_fast.errors import DataError, NumericError, listing
from influence_fast.gradients.engine import GradientEngine
from influence_fast.gradients.lora import LayoutEntry, LoraLinear, layout_width
from influence_fast.gradients.per_example import compare_once, packs_for
from influence_fast.gradients.reduction import Reducer, pack_segments
from influence_fast.gradients.transfer import to_device
from influence_fast.progress import track

if TYPE_CHECKING:
    from influence_fast.kernels.segments import Segments

# Numbers in one chunk of formed gradients [E, r d] or of the kernel's partial sums: 64 MiB in fp32.
_CHUNK = 1 << 24
# Columns (queries times rank) that the kernel multiplies x by before its arithmetic outweighs reading x: 2 q r
# operations for the 2 bytes of a bf16 number, where cards do some 200 to 300 a byte.
_KERNEL_COLUMNS = 256
# Queries whose columns cost no more than forming gradients, on a 256-wide model; riding keeps less memory.
_RIDING = 4


def stream_influence(
    model: nn.Module,
    examples: Sequence[Mapping[str, Any]],
    query_gradients: torch.Tensor,
    *,
    loss_reduction: str = "mean",
    max_tokens: int | None = None,
    backend: str | None = None,
    precision: str = "auto",
    progress: bool = False,
) -> torch.Tensor:
    """Inner products of every example's exact LoRA gradient with every query gradient, in one pass over the data.

    Args:
        model: a peft model, as for `per_example_gradients`.
        examples: `{"input_ids", "labels"}`, as for `per_example_gradients`.
        query_gradients: (q, k) exact rows, laid out as `gradient_layout(model)`: those of `per_example_gradients`
            with `projection=None`, their mean over a group of queries, or what a preconditioner's `apply` made of them.
        loss_reduction: `"mean"` over the example's completion tokens, or `"sum"`.
        max_tokens: tokens in one packed batch; changes speed and memory, not the numbers.
        backend: "auto", "triton" (kernel `segment_bilinear`) or "torch" (see `backends`).
        precision: as in `per_example_gradients`; give query gradients of the same one.
        progress: a progress bar on stderr.

    Returns:
        (E, q) scores on the model's device: fp32, or fp64 for an fp64 model. Positive: more of the example lowers
        the query's loss.

    Raises:
        DataError: the queries do not fit the model, or an example is malformed (see `per_example_gradients`).
        ModelError: the model has no LoRA layer, or one this package cannot differentiate.
        NumericError: a query or a score is NaN or infinite; the message names the examples.
    """

    def reducer(linears: list[LoraLinear], layout: list[LayoutEntry]) -> Reducer:
        return StreamReducer(linears, layout, query_gradients)

    with GradientEngine(model, None, loss_reduction, backend, reducer=reducer, precision=precision) as engine:
        scores = torch.empty(len(examples), engine.width, dtype=engine.reducer.dtype, device=engine.device)
        places = list(range(len(examples)))
        _score(engine, examples, places, scores, max_tokens, progress)
        # A NaN may come from a neighbour in the pack (0 * NaN in masked attention): suspects go once more, alone.
        suspects = _not_finite(scores)
        if suspects:
            _score(engine, examples, suspects, scores, 1, False)
            suspects = _not_finite(scores)
    if suspects:
        names = listing(example_name(examples[i], i) for i in suspects)
        raise NumericError(
            f"the influence is NaN or infinite for {names}: look at these examples and the adapter's weights, "
            "or run the model in float32"
        )
    return scores


def _score(
    engine: GradientEngine,
    examples: Sequence[Mapping[str, Any]],
    places: list[int],
    scores: torch.Tensor,  # [E, q]
    max_tokens: int | None,
    progress: bool,
) -> None:
    chosen_examples = [examples[i] for i in places]
    packs = packs_for(engine, chosen_examples, max_tokens)
    for pack in track(packs, "influence", shown=progress):
        found, losses = engine.run(pack)
        compare_once(engine, pack, losses, chosen_examples)
        chosen = to_device(torch.tensor([places[i] for i in pack.indices]), scores.device)
        scores.index_copy_(0, chosen, found)


def _not_finite(scores: torch.Tensor) -> list[int]:
    return scores.isfinite().all(dim=1).logical_not().nonzero().flatten().tolist()


class StreamReducer(Reducer):
    """Scores [E, q] against exact query gradients [q, k], in place of gradient rows.

    ride    up to four queries of fp32 or fp64 models: M_A^T and M_B become columns beside A^T and B, so that x and g
            are read once and x need not be kept for the backward
    kernel  a few queries on the Triton backend: `segment_bilinear` in the backward
    form    else: the gradients of one factor, for some examples at a time, times all queries at once
    """

    def __init__(self, linears: list[LoraLinear], layout: list[LayoutEntry], queries: torch.Tensor) -> None:
        super().__init__(linears, layout, None)
        k = layout_width(layout)
        if queries.ndim != 2 or queries.shape[0] == 0 or queries.shape[1] != k:
            raise DataError(
                f"query gradients of shape {tuple(queries.shape)} do not fit this model's exact rows (q, {k}): "
                "make them by per_example_gradients with projection=None"
            )
        self.queries = queries.detach().to(self.device, self.dtype)  # [q, k]
        bad = _not_finite(self.queries)
        if bad:
            raise NumericError(
                f"query gradients: NaN or infinite numbers in row {listing(map(str, bad))}; leave these queries out"
            )
        self._wide = linears[0].weight.dtype in (torch.float32, torch.float64)
        self._rank = max(linear.r for linear in linears)
        self._token_scores = torch.empty(0)  # [T, q], while queries ride
        self._scores = torch.empty(0)  # [E, q], of all else
        self._some_segments: dict[tuple[int, int], Segments] = {}

    @property
    def width(self) -> int:
        return len(self.queries)

    @property
    def way(self) -> str:
        """How the queries are multiplied: "ride", "kernel" or "form"."""
        if self.triton:
            return "kernel" if self.width * self._rank <= _KERNEL_COLUMNS else "form"
        return "ride" if self._wide and self.width <= _RIDING else "form"

    @property
    def needs_input(self) -> bool:
        return self.way != "ride"

    @property
    def recordable(self) -> bool:
        return self.way == "kernel"

    def columns(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        if self.way != "ride":
            return super().columns(number)
        m_a, m_b = (self._side(number, side).flatten(0, 1).T for side in (0, 1))
        return m_a, m_b  # [d_in, q r], [d_out, q r]

    def begin(self, cu_seqlens: list[int] | None, segments: Segments | None = None) -> None:
        super().begin(cu_seqlens, segments)
        self._some_segments = {}
        self._scores = torch.zeros(self.examples, self.width, dtype=self.dtype, device=self.device)
        if not self.needs_input:
            self._token_scores = torch.zeros(self.cu_seqlens[-1], self.width, dtype=self.dtype, device=self.device)

    def add(
        self,
        number: int,
        kept: torch.Tensor,
        out_of: torch.Tensor,
        g: torch.Tensor,
        tokens: torch.Tensor | None,
    ) -> None:
        r, scaling = self.linears[number].r, self.linears[number].scaling
        h, u = kept[:, :r], out_of[:, :r]
        if self.triton and tokens is not None:
            tokens, g = tokens.contiguous(), g.contiguous()
        if tokens is None:
            self._contract(u, kept[:, r:], scaling)
            self._contract(h, out_of[:, r:], scaling)
        elif self.way == "kernel":
            self._launch(tokens, u, self._side(number, 0), scaling)
            self._launch(g, h, self._side(number, 1), scaling)
        else:
            self._form(u, tokens, self._block(number, 0), scaling)
            self._form(g, h, self._block(number, 1), scaling)

    def add_factors(self, number: int, first: int, grad_a: torch.Tensor, grad_b: torch.Tensor) -> None:
        scores = self._scores[first : first + len(grad_a)]
        for side, grads in enumerate((grad_a, grad_b)):
            scores += grads.flatten(1) @ self._block(number, side).T

    def finish(self) -> torch.Tensor:
        if self.needs_input:
            return self._scores
        riding = [self._token_scores[start:end].sum(dim=0) for start, end in pairwise(self.cu_seqlens)]
        return torch.stack(riding).add_(self._scores)

    def _block(self, number: int, side: int) -> torch.Tensor:
        """One factor of every query as it lies in their rows: [q, r d], a view."""
        return self.queries[:, self.layout[2 * number + side].columns]

    def _side(self, number: int, side: int) -> torch.Tensor:
        """A factor of every query with its long side last: [q, r, d], a view."""
        factor = self._block(number, side).unflatten(1, self.layout[2 * number + side].shape)
        return factor if side == 0 else factor.transpose(1, 2)

    def _segments_of(self, first: int, stop: int) -> Segments:
        """What the kernels need to know of examples `first` to `stop`; most modules of a pack share it."""
        if self.segments is not None and (first, stop) == (0, self.examples):
            return self.segments
        if (first, stop) not in self._some_segments:
            self._some_segments[first, stop] = pack_segments(self.cu_seqlens[first : stop + 1], self.device)
        return self._some_segments[first, stop]

    def _contract(self, short: torch.Tensor, long: torch.Tensor, scaling: float) -> None:
        """Token scores += s sum_r short [T, r] long [T, q r]."""
        products = long.unflatten(1, (-1, short.shape[1]))  # [T, q, r]
        self._token_scores.add_(torch.bmm(products, short.unsqueeze(2)).squeeze(2), alpha=scaling)

    def _form(self, left: torch.Tensor, right: torch.Tensor, block: torch.Tensor, scaling: float) -> None:
        """Scores += s <left^T right of the example, query>: left [T, a], right [T, b], block [q, a b]."""
        size = block.shape[1]
        step = max(1, _CHUNK // size)
        for first in range(0, self.examples, step):
            stop = min(first + step, self.examples)
            grads = left.new_empty(stop - first, size, dtype=self.dtype)
            self._sum(left, right, grads, first, stop)
            self._scores[first:stop].addmm_(grads, block.T, alpha=scaling)

    def _sum(self, left: torch.Tensor, right: torch.Tensor, grads: torch.Tensor, first: int, stop: int) -> None:
        """grads [stop - first, a b] = left^T right of examples `first` to `stop`."""
        tokens = slice(self.cu_seqlens[first], self.cu_seqlens[stop])
        if self.triton:
            self.launch_outer(left[tokens], right[tokens], self._segments_of(first, stop), grads)
            return
        for e, (start, end) in enumerate(pairwise(self.cu_seqlens[first : stop + 1])):
            one, other = left[start:end].to(self.dtype), right[start:end].to(self.dtype)
            torch.mm(one.T, other, out=grads[e].view(one.shape[1], other.shape[1]))

    def _launch(self, wide: torch.Tensor, short: torch.Tensor, side: torch.Tensor, scaling: float) -> None:
        """Scores += s sum_t short_t^T side wide_t; wide [T, d] and side [q, r, d] are read once a chunk of queries."""
        from influence_fast.kernels.segment_bilinear import segment_bilinear

        segments = self._segments_of(0, self.examples)
        step = max(1, _CHUNK // (segments.chunks * -(-wide.shape[1] // 64)))
        for first in range(0, len(side), step):
            segment_bilinear(
                wide,
                short,
                side[first : first + step].transpose(1, 2),
                segments,
                scale=scaling,
                out=self._scores[:, first : first + step],
                accumulate=True,
            )
