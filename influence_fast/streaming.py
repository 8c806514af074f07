"""Stream mode: exact influence on a few queries while the training data passes by, with no projection and no store.

For one LoRA linear, a query's gradient M (H^-1 folded in, if wanted) and the tokens t of a training example:

    <M, grad> = s sum_t g_t^T M_B h_t + u_t^T M_A x_t        M_B (d_out, r), M_A (r, d_in)

so each query costs two more products of r columns a module, and no gradient of an example is ever formed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from influence_fast.engine import GradientEngine
from influence_fast.errors import DataError, NumericError, listing
from influence_fast.gradients import packs_for
from influence_fast.lora import LayoutEntry, LoraLinear, layout_width
from influence_fast.packing import example_name
from influence_fast.reduction import Reducer

# Numbers in one chunk of products [T, c r] (torch) or of partial sums (triton): 64 MiB in fp32.
_CHUNK = 1 << 24


def stream_influence(
    model: nn.Module,
    examples: Sequence[Mapping[str, Any]],
    query_gradients: torch.Tensor,
    *,
    loss_reduction: str = "mean",
    max_tokens: int | None = None,
    backend: str | None = None,
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

    with GradientEngine(model, None, loss_reduction, backend, reducer=reducer) as engine:
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
    from rich.console import Console
    from rich.progress import track

    packs = packs_for(engine, [examples[i] for i in places], max_tokens)
    for pack in track(packs, "influence", console=Console(stderr=True), disable=not progress):
        found, _ = engine.run(pack)
        scores[[places[i] for i in pack.indices]] = found


def _not_finite(scores: torch.Tensor) -> list[int]:
    return scores.isfinite().all(dim=1).logical_not().nonzero().flatten().tolist()


class StreamReducer(Reducer):
    """Scores [E, q] against exact query gradients [q, k], in place of gradient rows.

    A few queries ride along: M_A^T and M_B become columns beside A^T and B, so that x and g are read once and x need
    not be kept for the backward. Where the queries' columns would outweigh x itself, or for 16-bit models and for
    the Triton kernel, x is kept and the queries are multiplied in the backward, chunk by chunk.
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
        # kept per module and token: q r numbers, or the d_in of x, which modules may share
        narrowest = min(min(linear.d_in, linear.d_out) for linear in linears)
        few = 2 * len(queries) * max(linear.r for linear in linears) <= narrowest
        self._may_ride = few and linears[0].weight.dtype in (torch.float32, torch.float64)
        self._token_scores = torch.empty(0)  # [T, q], PyTorch's sums
        self._scores = torch.empty(0)  # [E, q], the kernel's sums
        self._segments: Any = None

    @property
    def width(self) -> int:
        return len(self.queries)

    @property
    def _rides(self) -> bool:
        return self._may_ride and not self.triton

    def columns(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        if not self._rides:
            return super().columns(number)
        m_a, m_b = (self._side(number, side).flatten(0, 1).T for side in (0, 1))
        return m_a, m_b  # [d_in, q r], [d_out, q r]

    def begin(self, cu_seqlens: list[int]) -> None:
        super().begin(cu_seqlens)
        self.needs_input = not self._rides
        if self.triton:
            from influence_fast.kernels.segments import Segments

            lengths = [end - start for start, end in pairwise(cu_seqlens)]
            self._segments = Segments.from_lengths(lengths, device=self.device)
            self._scores = torch.zeros(len(lengths), self.width, dtype=self.dtype, device=self.device)
        else:
            self._token_scores = torch.zeros(cu_seqlens[-1], self.width, dtype=self.dtype, device=self.device)

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
        if tokens is None:
            self._contract(u, kept[:, r:], 0, scaling)
            self._contract(h, out_of[:, r:], 0, scaling)
        elif self.triton:
            self._launch(tokens, u, self._side(number, 0), scaling)
            self._launch(g, h, self._side(number, 1), scaling)
        else:
            self._multiply(tokens, u, self._side(number, 0), scaling)
            self._multiply(g, h, self._side(number, 1), scaling)

    def finish(self) -> torch.Tensor:
        if self.triton:
            return self._scores
        return torch.stack([self._token_scores[start:end].sum(dim=0) for start, end in pairwise(self.cu_seqlens)])

    def _side(self, number: int, side: int) -> torch.Tensor:
        """A factor of every query with its long side last: [q, r, d], a view."""
        entry = self.layout[2 * number + side]
        rows = self.queries[:, entry.offset : entry.offset + entry.shape[0] * entry.shape[1]]
        factor = rows.unflatten(1, entry.shape)
        return factor if side == 0 else factor.transpose(1, 2)

    def _contract(self, short: torch.Tensor, long: torch.Tensor, first: int, scaling: float) -> None:
        """Token scores of queries `first` on += s sum_r short [T, r] long [T, c r]."""
        products = long.unflatten(1, (-1, short.shape[1]))  # [T, c, r]
        part = self._token_scores[:, first : first + products.shape[1]]
        part.add_(torch.bmm(products, short.unsqueeze(2)).squeeze(2), alpha=scaling)

    def _multiply(self, wide: torch.Tensor, short: torch.Tensor, side: torch.Tensor, scaling: float) -> None:
        """The products of wide [T, d] with the queries' side [q, r, d], and what they add to the token scores."""
        wide, short = wide.to(self.dtype), short.to(self.dtype)
        step = max(1, _CHUNK // (wide.shape[0] * short.shape[1]))
        for first in range(0, len(side), step):
            self._contract(short, wide @ side[first : first + step].flatten(0, 1).T, first, scaling)

    def _launch(self, wide: torch.Tensor, short: torch.Tensor, side: torch.Tensor, scaling: float) -> None:
        """The same, summed over examples, by the kernel: wide and side are read once for all queries of a chunk."""
        from influence_fast.kernels.segment_bilinear import segment_bilinear

        step = max(1, _CHUNK // (self._segments.chunks * -(-wide.shape[1] // 64)))
        for first in range(0, len(side), step):
            segment_bilinear(
                wide.contiguous(),
                short,
                side[first : first + step].transpose(1, 2),
                self._segments,
                scale=scaling,
                out=self._scores[:, first : first + step],
                accumulate=True,
            )
