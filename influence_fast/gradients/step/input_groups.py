"""LoRA linears that read one tensor, computed in one pass over it: their outputs, and what gradients are summed from.

forward    [h | z] = x [A^T | R_in]      and y = W x + s B h of every member
backward   [u | y] = g [B | R_out]       and dx = sum of g W + s u A

A member with a magnitude vector (DoRA) has these for v and g' in the place of y and g (see `lora_parts`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn.functional import linear as dense

from influence_fast.errors import ModelError
from influence_fast.gradients.model.backends import Torch
from influence_fast.gradients.model.fused_layers import overridden
from influence_fast.gradients.model.lora import LoraLinear
from influence_fast.gradients.step.reduction import Reducer


class Product(Protocol):
    """A product with a frozen weight that is no plain matrix product in its own dtype."""

    def operand(self, matrix: torch.Tensor, backend: Torch) -> Any:
        """Return what the products take for a matrix; members of a group share that of their input."""

    def forward(self, x: Any, bias: torch.Tensor | None) -> torch.Tensor:
        """Return x W^T + bias as a new tensor [T, d_out]."""
        ...

    def backward(self, g: Any) -> torch.Tensor:
        """Return g W as a new tensor [T, d_in]."""
        ...


@dataclass(eq=False)
class InputGroup:
    """LoRA linears that read one tensor (q/k/v, gate/up), computed in one pass over it."""

    members: list[LoraLinear]
    numbers: list[int]  # each member's place among all LoRA linears
    reducer: Reducer
    fused: bool
    backend: Torch
    products: Sequence[Product | None]  # each member's, None where its own dtype multiplies
    dtype: torch.dtype  # of what is computed
    forward_weight: torch.Tensor = field(init=False)  # fused: [sum d_out + sum c, d_in], else [sum c, d_in]
    forward_bias: torch.Tensor | None = field(init=False)
    backward_weights: list[torch.Tensor] = field(init=False)  # fused: [d_out, d_in + c], else [d_out, c]
    columns: list[int] = field(init=False)  # c of the forward: r, or r + p with a projection
    factors_a: torch.Tensor = field(init=False)  # not fused: every member's A, [sum r, d_in]
    # Asks for a gradient, and never gets one: it has the backward reach the lowest of the groups. One for each step: a
    # leaf that lives on would hold the stream of the step that made it, which no recording may meet.
    anchor: torch.Tensor | None = None
    tokens: int | None = None  # of the step's pack
    pending: dict[int, torch.Tensor] = field(default_factory=dict)
    pending_input: torch.Tensor | None = None

    def __post_init__(self) -> None:
        dtype, device = self.dtype, self.members[0].device
        skinny, self.backward_weights, self.columns, merged = [], [], [], []
        for number, member in zip(self.numbers, self.members, strict=True):
            r_in, r_out = self.reducer.columns(number)
            into = torch.cat([member.a.to(dtype), r_in.T.to(device, dtype)])
            out_of = torch.cat([member.b.to(dtype), r_out.to(device, dtype)], dim=1)
            skinny.append(into)
            self.columns.append(into.shape[0])
            if self.fused:
                folded = torch.addmm(member.weight, member.b.to(dtype), member.a.to(dtype), alpha=member.scaling)
                merged.append(folded)
                out_of = torch.cat([folded, out_of], dim=1)
            self.backward_weights.append(out_of)
        self.forward_weight = torch.cat(merged + skinny)
        self.factors_a = self.forward_weight.new_empty(0)
        if not self.fused:
            self.factors_a = self.factor_a(0)
            if len(self.members) > 1:
                self.factors_a = torch.cat([self.factor_a(place) for place in range(len(self.members))])
        self.forward_bias = None
        if self.fused and any(member.bias is not None for member in self.members):
            biases = [
                member.weight.new_zeros(member.d_out) if member.bias is None else member.bias for member in self.members
            ]
            self.forward_bias = torch.cat([*biases, self.members[0].weight.new_zeros(sum(self.columns))])

    def factor_a(self, place: int) -> torch.Tensor:
        """Return member `place`'s A [r, d_in] in the weights' dtype; not for fused groups."""
        start = sum(self.columns[:place])
        return self.forward_weight[start : start + self.members[place].r]

    def factor_b(self, place: int) -> torch.Tensor:
        """Return member `place`'s B [d_out, r] in the weights' dtype; not for fused groups."""
        return self.backward_weights[place][:, : self.members[place].r]

    def skinny(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Return x [T, d] @ weight [d, c] for a small c."""
        return self.backend.skinny_product(x, weight)

    def outputs(self, x: torch.Tensor, h: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
        """Yield each member's W x + bias + s B h, [T, d_out]; x [T, d_in], h [T, r] of each.

        The adapter's part is written first and the base product, which is bound by arithmetic, adds to it: added
        afterwards, it would read and write all outputs once more. 8-bit and quantised products cannot add; 8-bit ones
        share one rounding of x.
        """
        operand = None
        for place, (member, product) in enumerate(zip(self.members, self.products, strict=True)):
            b, s = self.factor_b(place).T, member.scaling
            if product is not None:
                operand = product.operand(x, self.backend) if operand is None else operand
                y = product.forward(operand, member.bias).addmm_(h[place], b, alpha=s)
                # a quantised base adds its own bias and no other
                yield y.add_(member.added_bias) if member.quantized and member.added_bias is not None else y
                continue
            bias = member.live_bias
            if bias is None:
                y = x.new_empty(x.shape[0], member.d_out).addmm_(h[place], b, beta=0, alpha=s)
            else:
                y = torch.addmm(bias, h[place], b, alpha=s)
            yield y.addmm_(x, member.live_weight.T)

    def input_gradient(
        self, grads: Sequence[torch.Tensor | None], u: Sequence[torch.Tensor | None]
    ) -> torch.Tensor | None:
        """Return dx [T, d_in] = sum over members of g W + s u A, in the same order; g [T, d_out], u [T, r].

        8-bit and quantised products cannot add, so they come first, and all else is added to them.
        """
        dx: torch.Tensor | None = None
        for product, g in zip(self.products, grads, strict=True):
            if product is not None and g is not None:
                part = product.backward(product.operand(g, self.backend))
                dx = part if dx is None else dx.add_(part)
        dx = self._with_adapters_part(dx, u)
        for member, product, g in zip(self.members, self.products, grads, strict=True):
            if product is None and g is not None and dx is not None:
                dx.addmm_(g, member.live_weight)
        return dx

    def _with_adapters_part(self, dx: torch.Tensor | None, u: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
        """Return dx + sum of s u A, in place of dx if there is one.

        It is one product if all members have a gradient and one scaling.
        """
        scalings = {member.scaling for member in self.members}
        given = [part for part in u if part is not None]
        if not given:
            return dx
        beta = 1
        if dx is None:
            dx, beta = given[0].new_empty(given[0].shape[0], self.members[0].d_in), 0
        if len(given) == len(u) and len(scalings) == 1:
            together = given[0] if len(given) == 1 else torch.cat(given, dim=1)
            return dx.addmm_(together, self.factors_a, beta=beta, alpha=scalings.pop())
        for place, part in enumerate(u):
            if part is not None:
                dx.addmm_(part, self.factor_a(place), beta=beta, alpha=self.members[place].scaling)
                beta = 1
        return dx

    def call(self, place: int, x: torch.Tensor) -> torch.Tensor:
        """Return member `place`'s output; the first member called with a tensor computes them all."""
        if self.pending_input is not x or place not in self.pending:
            outputs = _GroupedLora.apply(x, self.anchor, self)
            self.pending = dict(enumerate(outputs))
            self.pending_input = x
        output = self.pending.pop(place)
        if not self.pending:
            self.pending_input = None
        return output

    def with_magnitude(self, place: int, out_of: torch.Tensor, of_magnitude: torch.Tensor) -> torch.Tensor:
        """Return [u | m | y] of [u | y]: member `place`'s columns [T, d_out] of its magnitude, projected as g is."""
        r, projection = self.members[place].r, self.reducer.projection
        if projection is not None and not projection.flat:
            of_magnitude = self.skinny(of_magnitude, self.backward_weights[place][:, -projection.dim :])
        return torch.cat([out_of[:, :r], of_magnitude, out_of[:, r:]], dim=1)

    @property
    def kept_outputs(self) -> int:
        """Return the most numbers a token that a member with a magnitude vector keeps beside its columns."""
        return max((member.d_out for member in self.members if member.magnitude is not None), default=0)

    def add(
        self,
        place: int,
        kept: torch.Tensor,  # [n, c]
        out_of: torch.Tensor,  # [n, c]
        g: torch.Tensor,  # [n, d_out]
        x: torch.Tensor | None,  # [n, d_in]
    ) -> None:
        """Give member `place`'s tokens to the reducer, which sums them by the bounds of the step's pack.

        A layer that sees n tokens of an example alone, and not the pack's T, has them summed here, or handed over T at
        a time, the rest filled up with zeros: of one example all sums are over all tokens, in any order.

        Raises ModelError where that happens in a pack of several examples, whose tokens cannot be told apart.
        """
        n, length = len(g), self.tokens
        if length is None or n == length:
            self.reducer.add(self.numbers[place], kept, out_of, g, x)
            return
        if self.reducer.examples != 1:
            raise ModelError(
                f"{self.members[place].name}: sees {n} tokens of a pack of {length}, and whose they are is not known: "
                "take one example at a time (max_tokens=1)"
            )
        if x is not None or self.reducer.projected:  # of many experts little is kept so
            blocks = self.reducer.blocks[self.numbers[place]]
            grads = [block.factor.sum(kept, out_of, g, x, self.reducer.dtype)[None] for block in blocks]
            self.reducer.add_factors(self.numbers[place], 0, grads)
            return
        for start in range(0, n, length):
            rest = None if x is None else _padded(x, start, length)
            self.reducer.add(
                self.numbers[place],
                _padded(kept, start, length),
                _padded(out_of, start, length),
                _padded(g, start, length),
                rest,
            )

    def forget(self) -> None:
        """Drop cached outputs that no member consumed."""
        self.pending, self.pending_input = {}, None


class _GroupedLora(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, anchor: torch.Tensor | None, group: InputGroup) -> tuple[torch.Tensor, ...]:
        tokens = x.reshape(-1, x.shape[-1])  # [T, d_in]
        outputs = []
        if group.fused:
            wide = dense(tokens, group.forward_weight, group.forward_bias)  # [T, sum d_out + sum c]
            splits = wide.split([m.d_out for m in group.members] + [sum(group.columns)], dim=1)
            outputs = [_shaped(y, x) for y in splits[:-1]]
            kept = splits[-1].contiguous()  # a copy, so that `wide` itself need not stay
        else:
            kept = group.skinny(tokens, group.forward_weight.T)  # [T, sum c]
            parts = kept.split(group.columns, dim=1)
            h = [part[:, : member.r] for member, part in zip(group.members, parts, strict=True)]
            outputs = [_shaped(y, x) for y in group.outputs(tokens, h)]
        inner = [y.reshape(-1, m.d_out) for m, y in zip(group.members, outputs, strict=True) if m.magnitude is not None]
        outputs = [
            y if m.magnitude is None else m.magnitude.outputs(y) for m, y in zip(group.members, outputs, strict=True)
        ]
        ctx.save_for_backward(kept, *inner, *([tokens] if group.reducer.needs_input else []))
        ctx.group = group
        ctx.x_shape = x.shape
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> Any:
        group: InputGroup = ctx.group
        kept, *rest = ctx.saved_tensors
        tokens = rest[-1] if group.reducer.needs_input else None
        inner = iter(rest)  # v of each member with a magnitude vector
        wants_dx = ctx.needs_input_grad[0]
        dx: torch.Tensor | None = None
        parts = kept.split(group.columns, dim=1)
        flat: list[torch.Tensor | None] = [None] * len(group.members)
        u: list[torch.Tensor | None] = [None] * len(group.members)
        for i, (member, grad) in enumerate(zip(group.members, grads, strict=True)):
            v = None if member.magnitude is None else next(inner)
            if grad is None:
                continue
            g = grad.reshape(-1, member.d_out)  # [T, d_out]
            weight, of_magnitude = group.backward_weights[i], None
            if member.magnitude is not None and v is not None:
                g, of_magnitude = member.magnitude.gradients(g, v)
            if group.fused:
                both = g @ (weight if wants_dx else weight[:, member.d_in :])
                out_of = both[:, member.d_in :] if wants_dx else both
                if wants_dx:
                    term = both[:, : member.d_in]
                    dx = term if dx is None else dx + term
            else:
                out_of = group.skinny(g, weight)
                flat[i], u[i] = g, out_of[:, : member.r]
            if of_magnitude is not None:
                out_of = group.with_magnitude(i, out_of, of_magnitude)
            group.add(i, parts[i], out_of, g, tokens)
        if wants_dx and not group.fused:
            dx = group.input_gradient(flat, u)
        return None if dx is None else dx.view(ctx.x_shape), None, None


def _padded(rows: torch.Tensor, start: int, length: int) -> torch.Tensor:
    """Return rows[start : start + length] of rows [n, d], with zeros below where n ends before: [length, d]."""
    part = rows[start : start + length]
    return torch.nn.functional.pad(part, (0, 0, 0, length - len(part)))


def _shaped(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Give outputs [T, d_out] the leading dimensions of x, as no view in autograd's eyes.

    Some models change a linear's output in place, which autograd forbids on views that a function returns. No two
    outputs share a number, and the backward reads none.
    """
    return torch.ops.aten._unsafe_view(y, [*x.shape[:-1], y.shape[-1]])


@contextlib.contextmanager
def replaced_forward(layer: nn.Module, group: InputGroup, place: int) -> Iterator[None]:
    def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return group.call(place, x)

    with overridden(layer, "forward", forward):
        yield
