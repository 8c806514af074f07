"""Experts in fused parameters with LoRA (`target_parameters`), computed on the tokens that are routed to each.

transformers' experts [E, d_out, d_in] have one interface, whatever the model: a gated or plain MLP for each expert, its
outputs weighted by the router and added up for each token. Here tokens are sorted by expert, and each expert's product
is W x + s B (A x) on its own tokens, so the update of an expert, as large as its weight, never exists:

    forward    [h | z] = x [A_e^T | R_in]      y = W_e x + s B_e h
    backward   [u | y'] = g [B_e | R_out]      dx = g W_e + s u A_e

for the tokens of expert e. Routing has no gradient; that of its weights goes on through the router as ever.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch.nn.functional import linear

from influence_fast.errors import ModelError
from influence_fast.gradients.model.fused_layers import overridden
from influence_fast.gradients.model.lora_parameters import LoraParameter, outermost
from influence_fast.gradients.step.reduction import Reducer
from influence_fast.gradients.step.routed_sums import Pairs, add_routed

_TRIED = 8  # tokens that a module is tried with
# Relative errors of the outputs of one module that are rounding, by dtype.
_ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4}
_ROUNDING_16 = 0.05


@dataclass(eq=False)
class Routing:
    """The tokens of a call in the order of their experts: `tokens` [S] int64, `counts` of each expert.

    order: [S] int64, each one's place among the T k choices. choices: T k.
    """

    order: torch.Tensor
    tokens: torch.Tensor
    counts: list[int]
    choices: int
    positions: int  # T
    _pairs: Pairs | None = None

    @classmethod
    def of(cls, top_k_index: torch.Tensor, experts: int) -> Routing:
        """Group choices [T, k] of experts; a number that is no expert's, by which some models mark none, is dropped."""
        positions, k = top_k_index.shape
        chosen = top_k_index.reshape(-1)
        order = chosen.argsort(stable=True)
        edges = torch.searchsorted(chosen[order], torch.arange(experts + 1, device=chosen.device, dtype=chosen.dtype))
        bounds = edges.tolist()
        order = order[bounds[0] : bounds[-1]]
        counts = [end - start for start, end in pairwise(bounds)]
        return cls(order, order // k, counts, positions * k, positions)

    def pairs(self, reducer: Reducer) -> Pairs:
        """Return the experts and examples of the pack that `reducer` sums; the modules of one call share them."""
        if self.positions != reducer.cu_seqlens[-1]:
            raise ModelError(
                f"routed experts were called with {self.positions} tokens of a pack of {reducer.cu_seqlens[-1]}; leave "
                "them out of target_parameters"
            )
        if self._pairs is None:
            self._pairs = Pairs.of(self.counts, self.tokens, reducer.cu_seqlens)
        return self._pairs


class RoutedLinear:
    """One fused parameter's products, with LoRA."""

    def __init__(self, number: int, lora: LoraParameter, reducer: Reducer, transposed: bool) -> None:
        self.number, self.lora, self.reducer = number, lora, reducer
        dtype = lora.weight.dtype
        self.weight = lora.weight.transpose(1, 2) if transposed else lora.weight  # [E, d_out, d_in]
        experts, rank = lora.experts, lora.rank
        self.a = lora.a.to(dtype).view(experts, rank, lora.d_in)
        self.b = lora.b.to(dtype).view(lora.d_out, rank, experts).permute(2, 0, 1).contiguous()  # [E, d_out, r]
        self.r_in, self.r_out = (
            lora.a.new_empty(lora.d_in, 0, dtype=dtype),
            lora.a.new_empty(lora.d_out, 0, dtype=dtype),
        )
        if reducer.projected:
            self.r_in, self.r_out = (one.to(dtype=dtype, device=lora.a.device) for one in reducer.columns(number))

    def forward(self, x: torch.Tensor, counts: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return y [S, d_out] and h [S, r] of routed tokens x [S, d_in]."""
        y, h = x.new_empty(len(x), self.lora.d_out), x.new_empty(len(x), self.lora.rank)
        for expert, rows in _slices(counts):
            torch.mm(x[rows], self.a[expert].T, out=h[rows])
            own = torch.mm(x[rows], self.weight[expert].T)
            torch.addmm(own, h[rows], self.b[expert].T, alpha=self.lora.scaling, out=y[rows])
        return y, h

    def backward(self, g: torch.Tensor, counts: Sequence[int], wants_dx: bool) -> tuple[torch.Tensor, Any]:
        """Return u [S, r] and dx [S, d_in], or None if it is not wanted, of gradients g [S, d_out]."""
        u = g.new_empty(len(g), self.lora.rank)
        dx = g.new_empty(len(g), self.lora.d_in) if wants_dx else None
        for expert, rows in _slices(counts):
            torch.mm(g[rows], self.b[expert], out=u[rows])
            if dx is not None:
                own = torch.mm(g[rows], self.weight[expert])
                torch.addmm(own, u[rows], self.a[expert], alpha=self.lora.scaling, out=dx[rows])
        return u, dx


class _RoutedProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, anchor: torch.Tensor | None, part: RoutedLinear, routing: Routing
    ) -> torch.Tensor:
        y, h = part.forward(x, routing.counts)
        ctx.save_for_backward(h, x @ part.r_in if part.reducer.projected else x)
        ctx.part, ctx.routing = part, routing
        return y

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> Any:
        h, right = ctx.saved_tensors
        part, routing = ctx.part, ctx.routing
        u, dx = part.backward(g, routing.counts, ctx.needs_input_grad[0])
        left = g @ part.r_out if part.reducer.projected else g
        add_routed(part.reducer, part.number, routing.pairs(part.reducer), (u, right), (left, h))
        return dx, None, None, None


class RoutedExperts:
    """An experts module whose fused parameters have LoRA; stands in for the forward of its outermost wrapper."""

    packs = True  # whether it takes packs of several examples

    def __init__(self, numbers: Sequence[int], members: Sequence[LoraParameter], reducer: Reducer) -> None:
        self.module: Any = members[0].module
        self.layer: Any = outermost(members)
        self.experts = members[0].experts
        self.parts = {
            member.parameter: RoutedLinear(number, member, reducer, bool(self.module.is_transposed))
            for number, member in zip(numbers, members, strict=True)
        }
        self.anchor: torch.Tensor | None = None  # of a step, as that of `InputGroup`

    def begin(self, anchor: torch.Tensor) -> None:
        """Start a step of that anchor."""
        self.anchor = anchor

    def finish(self) -> None:
        """End the step; its backward has added all to the reducer."""
        self.anchor = None

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """Replace the module's forward by this one while the block runs."""
        with overridden(self.layer, "forward", self.forward):
            yield

    def forward(self, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        """Return outputs [T, d] of hidden states [T, d] with their experts [T, k] and the weights of these [T, k]."""
        module, routing = self.module, Routing.of(top_k_index, self.experts)
        up = self._product("gate_up_proj" if module.has_gate else "up_proj", hidden[routing.tokens], routing)
        inner = module._apply_gate(up) if module.has_gate else module.act_fn(up)
        out = self._product("down_proj", inner, routing)
        if getattr(module, "has_post_expert_norm", False):
            out = module.post_expert_norm(out)
        out = out * top_k_weights.reshape(-1)[routing.order, None]
        # not index_add_, which on a GPU adds in another order every time
        choices = out.new_zeros(routing.choices, out.shape[1]).index_copy(0, routing.order, out)
        return choices.view(*top_k_index.shape, -1).sum(dim=1).to(hidden.dtype)

    def _product(self, name: str, x: torch.Tensor, routing: Routing) -> torch.Tensor:
        if name in self.parts:
            y = _RoutedProduct.apply(x, self.anchor, self.parts[name], routing)
        else:
            weight = getattr(self.module, name).detach()
            weight = weight.transpose(1, 2) if self.module.is_transposed else weight
            parts = [linear(part, weight[e]) for e, part in enumerate(x.split(routing.counts)) if len(part)]
            y = torch.cat(parts) if parts else x.new_empty(0, weight.shape[1])
        if not self.module.has_bias:
            return y
        bias = getattr(self.module, f"{name}_bias").detach()
        return y + torch.cat([bias[e].expand(count, -1) for e, count in enumerate(routing.counts)])

    @torch.no_grad()
    def agrees(self, called: tuple[Any, ...]) -> bool:
        """Tell whether the module, called as in `called`, computes what this does; tried on random tokens."""
        if len(called) != 3 or not all(isinstance(one, torch.Tensor) and one.dim() == 2 for one in called):
            return False
        hidden, index, weights = called
        if not hidden.is_floating_point() or index.is_floating_point() or weights.shape != index.shape:
            return False
        if hidden.device.type == "meta":
            return True
        generator = torch.Generator().manual_seed(0)
        scores = torch.rand(_TRIED, self.experts, generator=generator)
        chosen = scores.topk(min(index.shape[1], self.experts)).indices.to(index.device, index.dtype)
        x = torch.randn(_TRIED, hidden.shape[1], generator=generator).to(hidden.device, hidden.dtype)
        weighted = torch.rand(chosen.shape, generator=generator).to(weights.device, weights.dtype)
        try:
            ours, wanted = self.forward(x, chosen, weighted), self.layer(x, chosen, weighted)
        except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
            return False
        # some modules add up in the dtype of the weights
        most = max(_ROUNDING.get(one.dtype, _ROUNDING_16) for one in (x, weighted))
        return ours.shape == wanted.shape and bool((ours - wanted).norm() <= most * wanted.norm())


def _slices(counts: Sequence[int]) -> Iterator[tuple[int, slice]]:
    """Yield each expert that has tokens, and where these are."""
    start = 0
    for expert, count in enumerate(counts):
        if count:
            yield expert, slice(start, start + count)
        start += count


def is_experts(members: Sequence[LoraParameter]) -> bool:
    """Tell whether the parameters are those of a module with transformers' experts interface, all on one device."""
    module: Any = members[0].module
    if not all(isinstance(getattr(module, name, None), bool) for name in ("has_gate", "has_bias", "is_transposed")):
        return False
    if getattr(module, "_is_expert_parallel", False) or not hasattr(module, "_apply_gate"):
        return False
    names = {"gate_up_proj" if module.has_gate else "up_proj", "down_proj"}
    dtypes = {member.weight.dtype for member in members}
    plain = all(m.parameter in names and m.weight.dim() == 3 and m.experts > 1 for m in members)
    return plain and dtypes <= {torch.float64, torch.float32, torch.bfloat16, torch.float16}
