"""Three ways to the influence of every token of a batch: forward mode, central differences, and sums by position."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.func import functional_call, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.rnn import pad_sequence

from influence_fast.check.differences import fixed_norms, restored
from influence_fast.errors import ModelError
from influence_fast.gradients.find_lora import find_lora_linears
from influence_fast.influence.step_directions import Directions

Found = tuple[torch.Tensor, torch.Tensor]  # influence [n, Q] and the tokens' losses [n], by place
Examples = Sequence[Mapping[str, Any]]
ByPlace = Callable[[Examples, Sequence[torch.Tensor]], list[Found]]  # of a batch and its weights, [n] each
# Steps of the differences by the dtype of the forward; measured on a 135M model: 1e-4 relative error at 0.01 in fp32,
# 0.056 at 0.1 in bf16, which is that of bf16 gradients.
_STEPS = {torch.float64: 1e-4, torch.float32: 0.01}
_STEP_16 = 0.1
_SAME, _HALVINGS = 1e-3, 6  # relative change at half the step, and how often it is halved
_TANGENTS = 4  # directions in one pass of forward mode


def _apart(
    by_place: torch.Tensor, losses: torch.Tensor, weights: Sequence[torch.Tensor], wide: torch.dtype
) -> list[Found]:
    """Return v . grad l_t [b, n, Q] times the tokens' weights, and the losses [b, n], for each example of a batch."""
    return [
        ((rows[: len(mine)] * mine[:, None]).to(wide), of_tokens[: len(mine)])
        for rows, of_tokens, mine in zip(by_place, losses.detach().cpu(), weights, strict=True)
    ]


class Jvp:
    """Forward mode through the model's own forward: dual numbers in the adapter's parameters."""

    def __init__(self, moved: Directions) -> None:
        self.moved = moved
        self.at_once = _TANGENTS

    def __call__(self, examples: Examples, weights: Sequence[torch.Tensor]) -> list[Found]:
        """Return influence by place [n, Q] and the losses, of each example.

        Directions share one pass, whose plain numbers are the same for all: two cost 1.3 times the pass of one. A model
        whose forward cannot be mapped over directions takes a pass for each, which gives the same numbers.
        """
        try:
            losses, columns = self._tangents(examples)
        except (RuntimeError, ValueError, NotImplementedError, TypeError):
            if self.at_once == 1:
                raise
            self.at_once = 1
            losses, columns = self._tangents(examples)
        return _apart(columns.double().cpu(), losses, weights, self.moved.wide)

    def _tangents(self, examples: Examples) -> tuple[torch.Tensor, torch.Tensor]:
        """Return l_t [b, n] and v . grad l_t [b, n, Q] of every token by its place."""
        moved = self.moved
        primal = {name: parameter.detach() for name, parameter in zip(moved.names, moved.parameters, strict=True)}

        def losses_at(values: dict[str, torch.Tensor]) -> torch.Tensor:
            return moved.token_losses(examples, lambda **given: functional_call(moved.model, values, (), given))

        def along(tangents: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
            losses, tangent = jvp(losses_at, (primal,), (tangents,))[:2]
            return losses, tangent

        losses, columns = torch.zeros(0), []
        # fused attention has no forward-mode derivative, and the plain products have
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            for rows in moved.rows.split(self.at_once):
                parts = [
                    {
                        name: part.to(primal[name].dtype)
                        for name, part in zip(moved.names, moved.parts(row), strict=True)
                    }
                    for row in rows
                ]
                if len(parts) == 1:
                    losses, tangent = along(parts[0])
                    columns.append(tangent[None])
                    continue
                stacked = {name: torch.stack([part[name] for part in parts]) for name in moved.names}
                losses, tangents = vmap(along, out_dims=(None, 0))(stacked)  # type: ignore[arg-type]
                columns.append(tangents)
        return losses, torch.cat(columns).permute(1, 2, 0)


class Differences:
    """Central differences of every token's loss, by the model's own forward.

    step: how far the adapter is moved each way, chosen on the first batch. noise: [Q], what the losses' rounding makes
    of a batch's influence, of the last batch that was asked for.
    """

    def __init__(self, moved: Directions) -> None:
        self.moved = moved
        self.noise = torch.zeros(len(moved.rows))
        self.step = 0.0

    @torch.no_grad()
    def __call__(self, examples: Examples, weights: Sequence[torch.Tensor]) -> list[Found]:
        """Return influence by place [n, Q], two forwards a direction, and the losses, of each example.

        The adapter is put back to the bit.
        """
        moved, padded = self.moved, pad_sequence(list(weights), batch_first=True)
        losses = moved.token_losses(examples, moved.model)
        # the gradients of DoRA take its norms for constants, and so must these
        with fixed_norms(moved.model, lambda: moved.token_losses(examples, moved.model)):
            found = self._columns(examples, padded) if self.step else self._fitting(examples, padded)
        return _apart(found, losses, weights, moved.wide)

    def _fitting(self, examples: Examples, weights: torch.Tensor) -> torch.Tensor:
        """Return v . grad l_t by place [b, n, Q] by a step so small that half of it gives the same, and keep that step.

        Of a small model, or one whose adapter has small weights, the losses bend within the usual step: the error is
        that of the third derivative, a quarter at half the step. Rounding doubles there, so that it ends the search.
        """
        self.step = _STEPS.get(self.moved.losses_dtype, _STEP_16)
        found = self._columns(examples, weights)
        for _ in range(_HALVINGS):
            self.step /= 2
            finer = self._columns(examples, weights)
            sums = [(each * weights[:, :, None]).sum(dim=(0, 1)) for each in (finer, finer - found)]
            if bool((sums[1].abs() <= _SAME * sums[0].abs() + self.noise).all()):
                self.step *= 2
                return found
            found = finer
        return found

    def _columns(self, examples: Examples, weights: torch.Tensor) -> torch.Tensor:
        """Return v . grad l_t of every token by its place, [b, n, Q] fp64, with the step as it is."""
        columns = [self._column(examples, weights, number) for number in range(len(self.moved.rows))]
        return torch.stack(columns, dim=2)

    def _column(self, examples: Examples, weights: torch.Tensor, number: int) -> torch.Tensor:
        """Return v . grad l_t in one direction by place, [b, n] fp64, and note its rounding."""
        moved, direction = self.moved, self.moved.rows[number]
        length = float(direction.norm())
        if not length:
            self.noise[number] = 0.0
            return torch.zeros_like(weights)
        parts, sides = moved.parts(direction / length), []
        with restored(moved.parameters) as start:
            for sign in (1.0, -1.0):
                for parameter, before, part in zip(moved.parameters, start, parts, strict=True):
                    parameter.copy_((before.double() + sign * self.step * part).to(parameter.dtype))
                sides.append(moved.token_losses(examples, moved.model).double().cpu())
        scale = length / (2 * self.step)
        self.noise[number] = 8 * float((sides[0] * weights).abs().sum()) * torch.finfo(moved.losses_dtype).eps * scale
        return (sides[0] - sides[1]) * scale


class Positions:
    """Sums by position of one backward pass: g_t (B A x_t)' parts of the inner product, of plain LoRA linears."""

    def __init__(self, moved: Directions) -> None:
        self.moved = moved
        self.linears = find_lora_linears(moved.model)
        odd = [linear.name for linear in self.linears if linear.parts or not linear.r or linear.quantized]
        if odd or 2 * len(self.linears) != len(moved.names):
            raise ModelError(f"method 'position' is for plain LoRA on linears, and not for {odd[:1] or 'this adapter'}")

    def __call__(self, examples: Examples, weights: Sequence[torch.Tensor]) -> list[Found]:
        """Return influence by place [n, Q] and the losses, of each example: a token's place has the sum at the position
        that predicts it."""
        return [self._of_one(example, mine) for example, mine in zip(examples, weights, strict=True)]

    def _of_one(self, example: Mapping[str, Any], weights: torch.Tensor) -> Found:
        moved, held = self.moved, {}

        def keep(number: int, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            leaf = y.detach().requires_grad_() if not y.requires_grad else y
            leaf.retain_grad()
            held[number] = (x.detach(), leaf)
            return leaf

        with contextlib.ExitStack() as stack:
            for number, linear in enumerate(self.linears):
                handle = linear.layer.register_forward_hook(
                    lambda _, given, y, number=number: keep(number, given[0], y)  # type: ignore[misc]
                )
                stack.callback(handle.remove)
            with torch.enable_grad():
                losses = moved.token_losses([example], moved.model)[0]
                (losses * weights.to(losses)).sum().backward()
        directions = [moved.parts(row) for row in moved.rows]
        out = torch.zeros(len(weights), len(moved.rows), dtype=torch.float64)
        for number, linear in enumerate(self.linears):
            x, y = held[number]
            if y.grad is None:
                continue
            x, g = x[0].double(), y.grad[0].double()
            for q, parts in enumerate(directions):
                da, db = parts[2 * number], parts[2 * number + 1]
                h, back = x @ linear.a.double().T, g @ linear.b.double()
                found = (back * (x @ da.T)).sum(dim=1) + ((g @ db) * h).sum(dim=1)
                # the loss of token t is made at position t - 1
                out[1:, q] += linear.scaling * found[:-1].cpu()
        return out.to(moved.wide), losses.detach().cpu()
