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

from influence_fast.data.held import Held, as_examples
from influence_fast.data.packing import example_name
from influence_fast.deprecation import OldCall, also_called_as, moved
from influence_fast.errors import ConfigError, DataError, NumericError, truncated_list
from influence_fast.gradients.engine import GradientEngine
from influence_fast.gradients.model.lora import LoraLinear
from influence_fast.gradients.per_example import EXACT_ROWS, compare_once, packs_for
from influence_fast.gradients.rows.factors import Block, Side, tokens_of
from influence_fast.gradients.rows.layout import LayoutEntry, layout_width
from influence_fast.gradients.rows.projection import EXACT
from influence_fast.gradients.rows.row_spec import RowSpec
from influence_fast.gradients.step.reduction import Reducer, pack_segments
from influence_fast.progress import track
from influence_fast.transfer import to_device

if TYPE_CHECKING:
    from influence_fast.kernels.segments import Segments

# Numbers in one chunk of formed gradients [E, r d] or of the kernel's partial sums: 64 MiB in fp32.
_CHUNK = 1 << 24
# Columns (queries times rank) that the kernel multiplies x by before its arithmetic outweighs reading x: 2 q r
# operations for the 2 bytes of a bf16 number, where cards do some 200 to 300 a byte.
_KERNEL_COLUMNS = 256
# Queries whose columns cost no more than forming gradients, on a 256-wide model; riding keeps less memory.
_RIDING = 4
_OF_SPEC = ("loss_reduction", "max_tokens", "precision", "target")  # keywords before there were specs


def _spec_of_old_call(values: dict[str, Any]) -> dict[str, Any]:
    """Translate `stream_influence(model, examples, queries, loss_reduction=..., target=..., ...)`."""
    return values | {"spec": RowSpec(EXACT, dtype="fp32", **moved(values, _OF_SPEC))}


@also_called_as(
    OldCall(
        positional=("model", "examples", "query_gradients"),
        keywords=(*_OF_SPEC, "backend", "progress"),
        marks=_OF_SPEC,
        translate=_spec_of_old_call,
        instead="stream_influence(model, examples, query_gradients, RowSpec('none', ...))",
    )
)
def stream_influence(
    model: nn.Module,
    examples: Held,
    query_gradients: torch.Tensor,
    spec: RowSpec = EXACT_ROWS,
    *,
    backend: str | None = None,
    progress: bool = False,
) -> torch.Tensor:
    """Return inner products of every example's exact gradient with every query gradient, in one pass over the data.

    Args:
        model: a peft model, as for `per_example_gradients`.
        examples: `{"input_ids", "labels"}`, as for `per_example_gradients`.
        query_gradients: (q, k) exact rows, laid out as `gradient_layout(model)`: those of `per_example_gradients`
            with `projection=None`, their mean over a group of queries, or what a preconditioner's `apply` made of them.
            With a target: those of `Projection("none", target=target)`.
        spec: of kind "none": its loss reduction and precision, which the query gradients have too, and for a model
            without an adapter the target, the linears that the gradients are of.
        backend: "auto", "triton" (kernel `segment_bilinear`) or "torch" (see `backends`).
        progress: a progress bar on stderr.

    Returns:
        (E, q) scores on the model's device: fp32, or fp64 for an fp64 model. Positive: more of the example lowers
        the query's loss.

    Raises:
        ConfigError: a spec of other than exact rows.
        DataError: the queries do not fit the model, or an example is malformed (see `per_example_gradients`).
        ModelError: the model has no LoRA layer, or one this package cannot differentiate.
        NumericError: a query or a score is NaN or infinite; the message names the examples.

    Example:
        >>> queries = inf.per_example_gradients(model, validation).mean(dim=0, keepdim=True)  # doctest: +SKIP
        >>> scores = inf.stream_influence(model, tokens, queries)  # doctest: +SKIP
    """
    if spec.kind != EXACT:
        raise ConfigError(
            f"stream_influence: the products are of whole gradients, not of rows of kind {spec.kind!r}; give "
            f"RowSpec({EXACT!r}) and exact query gradients"
        )

    queries = torch.as_tensor(query_gradients)

    def reducer(linears: list[LoraLinear], layout: list[LayoutEntry]) -> Reducer:
        return StreamReducer(linears, layout, queries)

    examples = as_examples(examples)
    with GradientEngine(
        model, spec.projection(), spec.loss_reduction, backend, reducer=reducer, precision=spec.precision
    ) as engine:
        scores = torch.empty(len(examples), engine.width, dtype=engine.reducer.dtype, device=engine.device)
        places = list(range(len(examples)))
        _score(engine, examples, places, scores, spec.max_tokens, progress)
        # A NaN may come from a neighbour in the pack (0 * NaN in masked attention): suspects go once more, alone.
        suspects = _not_finite(scores)
        if suspects:
            _score(engine, examples, suspects, scores, 1, False)
            suspects = _not_finite(scores)
    if suspects:
        names = truncated_list(example_name(examples[i], i) for i in suspects)
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
                "make them by per_example_gradients with projection=None, or Projection('none', target=...) where "
                "there is a target"
            )
        self.queries = queries.detach().to(self.device, self.dtype)  # [q, k]
        bad = _not_finite(self.queries)
        if bad:
            raise NumericError(
                f"query gradients: NaN or infinite numbers in row {truncated_list(map(str, bad))}; "
                "leave these queries out"
            )
        self._wide = linears[0].dtype in (torch.float32, torch.float64)
        factors = [block.factor for blocks in self.blocks for block in blocks]
        self._rank = max(factor.short for factor in factors)
        # A factor of no short side has nothing to ride on: its columns would be q times the layer's own product.
        self._formed = any(factor.whole for factor in factors)
        self._token_scores = torch.empty(0)  # [T, q], while queries ride
        self._scores = torch.empty(0)  # [E, q], of all else
        self._some_segments: dict[tuple[int, int], Segments] = {}

    @property
    def width(self) -> int:
        return len(self.queries)

    @property
    def way(self) -> str:
        """Return how the queries are multiplied: "ride", "kernel" or "form"."""
        if self._formed:
            return "form"
        if self.backend.launches_kernels:
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
        linear = self.linears[number]
        into, out_of = [self.queries.new_empty(linear.d_in, 0)], [self.queries.new_empty(linear.d_out, 0)]
        for block in self.blocks[number]:
            if block.factor.right is Side.WIDE:
                into.append(self._long_last(block).flatten(0, 1).T)
            elif block.factor.left is Side.WIDE:
                out_of.append(self._long_last(block).flatten(0, 1).T)
        return torch.cat(into, dim=1), torch.cat(out_of, dim=1)  # of LoRA: [d_in, q r], [d_out, q r]

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
        if self.way == "ride":
            self._ride(self.blocks[number], kept, out_of)
            return
        if self.backend.launches_kernels and tokens is not None:
            tokens, g = tokens.contiguous(), g.contiguous()
        for block in self.blocks[number]:
            factor = block.factor
            left, right = tokens_of(factor.left, out_of, g), tokens_of(factor.right, kept, tokens)
            if self.way == "form":
                self._form(left, right, self.queries[:, block.columns], factor.scale)
                continue
            long, short = (left, right) if factor.left_is_long else (right, left)
            self._launch(long, short, self._long_last(block), factor.scale)

    def add_factors(self, number: int, first: int, grads: Sequence[torch.Tensor]) -> None:
        for block, grad in zip(self.blocks[number], grads, strict=True):
            self._scores[first : first + len(grad)] += grad.flatten(1) @ self.queries[:, block.columns].T

    def finish(self) -> torch.Tensor:
        if self.needs_input:
            return self._scores
        riding = [self._token_scores[start:end].sum(dim=0) for start, end in pairwise(self.cu_seqlens)]
        return torch.stack(riding).add_(self._scores)

    def _long_last(self, block: Block) -> torch.Tensor:
        """Return a factor of every query with its long side last: [q, r, d], a view."""
        factor = self.queries[:, block.columns].unflatten(1, block.factor.shape)
        return factor.transpose(1, 2) if block.factor.left_is_long else factor

    def _ride(self, blocks: list[Block], kept: torch.Tensor, out_of: torch.Tensor) -> None:
        """Add a module's token scores; the columns that `columns` gave are the last of `kept` and of `out_of`."""
        q = self.width
        before = kept.shape[1] - q * sum(b.factor.short for b in blocks if b.factor.right is Side.WIDE)
        behind = out_of.shape[1] - q * sum(b.factor.short for b in blocks if b.factor.left is Side.WIDE)
        for block in blocks:
            factor = block.factor
            if factor.right is Side.WIDE:
                short, long = tokens_of(factor.left, out_of), kept[:, before : before + q * factor.short]
                before += q * factor.short
            elif factor.left is Side.WIDE:
                short, long = tokens_of(factor.right, kept), out_of[:, behind : behind + q * factor.short]
                behind += q * factor.short
            else:
                left, right = tokens_of(factor.left, out_of), tokens_of(factor.right, kept)
                short, long = (right, left) if factor.left_is_long else (left, right)
                long = long @ self._long_last(block).flatten(0, 1).T
            self._contract(short, long, factor.scale)

    def _segments_of(self, first: int, stop: int) -> Segments:
        """Return what the kernels need to know of examples `first` to `stop`; most modules of a pack share it."""
        if self.segments is not None and (first, stop) == (0, self.examples):
            return self.segments
        if (first, stop) not in self._some_segments:
            self._some_segments[first, stop] = pack_segments(self.cu_seqlens[first : stop + 1], self.device)
        return self._some_segments[first, stop]

    def _contract(self, short: torch.Tensor, long: torch.Tensor, scaling: float) -> None:
        """Add s sum_r short [T, r] long [T, q r] to the token scores."""
        products = long.unflatten(1, (-1, short.shape[1]))  # [T, q, r]
        self._token_scores.add_(torch.bmm(products, short.unsqueeze(2)).squeeze(2), alpha=scaling)

    def _form(self, left: torch.Tensor, right: torch.Tensor, block: torch.Tensor, scaling: float) -> None:
        """Add s <left^T right of the example, query> to the scores: left [T, a], right [T, b], block [q, a b]."""
        size = block.shape[1]
        step = max(1, _CHUNK // size)
        for first in range(0, self.examples, step):
            stop = min(first + step, self.examples)
            grads = left.new_empty(stop - first, size, dtype=self.dtype)
            self._sum(left, right, grads, first, stop)
            self._scores[first:stop].addmm_(grads, block.T, alpha=scaling)

    def _sum(self, left: torch.Tensor, right: torch.Tensor, grads: torch.Tensor, first: int, stop: int) -> None:
        """Fill grads [stop - first, a b] with left^T right of examples `first` to `stop`."""
        tokens = slice(self.cu_seqlens[first], self.cu_seqlens[stop])
        if self.backend.launches_kernels:
            self.launch_outer(left[tokens], right[tokens], self._segments_of(first, stop), grads)
            return
        for e, (start, end) in enumerate(pairwise(self.cu_seqlens[first : stop + 1])):
            one, other = left[start:end].to(self.dtype), right[start:end].to(self.dtype)
            torch.mm(one.T, other, out=grads[e].view(one.shape[1], other.shape[1]))

    def _launch(self, wide: torch.Tensor, short: torch.Tensor, side: torch.Tensor, scaling: float) -> None:
        """Add s sum_t short_t^T side wide_t to the scores.

        wide [T, d] and side [q, r, d] are read once a chunk of queries.
        """
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
