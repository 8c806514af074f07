"""Influence of the steps of a training example: which part of it helps, which harms.

The influence of an example d in a direction v = H^-1 q is v . grad l(d). Its loss is a weighted sum of its tokens'
losses, l = sum_t w_t l_t, so that its influence is the sum of w_t v . grad l_t over its tokens, and a step's is the sum
over its own: what being taught this step does to the query. Three ways to the same numbers (the last to others):

    jvp         forward mode: one pass of dual numbers through the model's own forward gives all v . grad l_t, exactly
    difference  (l_t(theta + eps u) - l_t(theta - eps u)) / (2 eps) |v|, u = v / |v|: two plain forwards of the model
    position    sums over the positions of one backward pass, which also carry the losses of later tokens that look
                back at a position: another split of the same total, the one that bergson and kronfluence give
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.rnn import pad_sequence

from influence_fast.check.differences import fixed_norms, restored
from influence_fast.data.held import Held, as_examples
from influence_fast.data.packing import check_examples, example_name
from influence_fast.data.steps import LINES, Spans, Splitter, Step, learnt_places, split_all
from influence_fast.errors import ConfigError, ModelError, NumericError, did_you_mean, one_line, warn_once
from influence_fast.gradients.find_lora import find_lora_linears
from influence_fast.gradients.model.frozen import frozen
from influence_fast.influence.step_directions import Directions

logger = logging.getLogger(__name__)

AUTO, JVP, DIFFERENCE, POSITION = "auto", "jvp", "difference", "position"
METHODS = (AUTO, JVP, DIFFERENCE, POSITION)
# Steps of the differences by the dtype of the forward; measured on a 135M model: 1e-4 relative error at 0.01 in fp32,
# 0.056 at 0.1 in bf16, which is that of bf16 gradients.
_STEPS = {torch.float64: 1e-4, torch.float32: 0.01}
_STEP_16 = 0.1
_AHEAD = 64  # examples that are put into batches together
# relative, of an example in a batch to it alone; differences, which round, may be ten times as far
_BATCHED, _BATCHED_16 = {torch.float64: 1e-6, torch.float32: 2e-3}, 0.2
_SAME, _HALVINGS = 1e-3, 6  # relative change at half the step, and how often it is halved
_AGREE = 0.02  # relative, beyond the losses' rounding: another derivative differs by more


Found = tuple[torch.Tensor, torch.Tensor]  # influence [n, Q] and the tokens' losses [n], by place
Examples = Sequence[Mapping[str, Any]]
ByPlace = Callable[[Examples, Sequence[torch.Tensor]], list[Found]]  # of a batch and its weights, [n] each


@dataclass(frozen=True)
class StepInfluence:
    """Influence of the steps of one example.

    Attributes:
        id: the example's id.
        steps: its steps, in order; together they have every token that is learnt.
        influence: [S, Q] on each direction, fp32 (fp64 for an fp64 model).
        rest: [Q] of the method "position", the positions of the prompt; 0 for the others. The sum over steps and this
            is the example's influence.
        token_losses: [n] the model's loss on every token, by its place in `input_ids`; 0 where nothing is learnt.
    """

    id: str
    steps: list[Step]
    influence: torch.Tensor
    rest: torch.Tensor
    token_losses: torch.Tensor

    @property
    def losses(self) -> list[float]:
        """Return the mean loss of each step's tokens."""
        return [float(self.token_losses[list(step.tokens)].mean()) for step in self.steps]


def step_influence(
    model: nn.Module,
    examples: Held,
    directions: torch.Tensor,
    *,
    steps: str | Splitter | Spans = LINES,
    method: str = AUTO,
    tokenizer: Any = None,
    loss_reduction: str = "mean",
) -> list[StepInfluence]:
    """Compute the influence of every step of every example in every direction.

    Args:
        model: a LoRA model (peft).
        examples: `{"input_ids", "labels"}`, as for `per_example_gradients`; per-token `weights` count.
        directions: [Q, K] in the coordinates of exact gradients, laid out as `gradient_layout(model)`: `Scorer.apply`
            gives H^-1 q of queries, and plain query gradients serve as well.
        steps: "lines", "sentences", "tokens", a function from the completion's text to (start, end) characters, or for
            each example a list of (start, end) places in its `input_ids`.
        method: "jvp", "difference", "position" (see above), or "auto": jvp where it agrees with the difference on the
            first example, else the difference, which is said.
        tokenizer: the model's own, for steps that are found in the text.
        loss_reduction: "mean" over an example's learnt tokens, or "sum", as the directions' gradients have it.

    Returns:
        A `StepInfluence` for each example, in order. Positive: more of the step lowers the query's loss. Scores of the
        cosine preconditioners are these divided by the example's length (`Scorer.lengths`).

    Raises:
        ConfigError: an unknown method, kind of steps or reduction, or no tokenizer where one is needed.
        DataError: directions that do not fit the model, or malformed examples.
        ModelError: no LoRA adapter, or a model that the method asked for cannot take.
        NumericError: a direction or an influence is NaN or infinite.

    Example:
        >>> directions = scorer.apply(queries)  # doctest: +SKIP
        >>> found = inf.step_influence(model, tokens, directions, tokenizer=tokenizer)  # doctest: +SKIP
        >>> found[0].steps[0].text, found[0].influence[0]  # doctest: +SKIP
    """
    how: dict[str, Any] = {"steps": steps, "method": method, "tokenizer": tokenizer, "loss_reduction": loss_reduction}
    return list(each_step_influence(model, examples, directions, **how))


def each_step_influence(
    model: nn.Module,
    examples: Held,
    directions: torch.Tensor,
    *,
    steps: str | Splitter | Spans = LINES,
    method: str = AUTO,
    tokenizer: Any = None,
    loss_reduction: str = "mean",
) -> Iterator[StepInfluence]:
    """Yield what `step_influence` returns, example by example; the arguments are checked before the first."""
    if method not in METHODS:
        known = did_you_mean(method, METHODS)
        raise ConfigError(f": unknown value {method!r}", key="method", value=method, remedy=known)
    if loss_reduction not in ("mean", "sum"):
        raise ConfigError(f": unknown value {loss_reduction!r}; it is mean or sum", key="loss_reduction")
    held = as_examples(examples)
    check_examples(held)
    split = split_all(held, steps, tokenizer)
    moved = Directions.of(model, directions)
    weighted = [_weights(example, loss_reduction) for example in held]
    with frozen(model):
        by_place = _chosen(moved, held, weighted, method)
        limit = 0 if method == POSITION else _batch_tokens(moved, held, weighted, by_place)
        for start in range(0, len(held), _AHEAD):
            places = range(start, min(start + _AHEAD, len(held)))
            found: dict[int, Found] = {}
            for batch in _batches(held, places, limit):
                some = by_place([held[i] for i in batch], [weighted[i] for i in batch])
                found |= dict(zip(batch, some, strict=True))
            for i in places:
                yield _summed(found[i], example_name(held[i], i), split[i])


def _batches(examples: Examples, places: Iterable[int], limit: int) -> list[list[int]]:
    """Group examples of similar lengths, so that a batch has at most `limit` tokens with its padding."""
    batches: list[list[int]] = []
    for place in sorted(places, key=lambda place: len(examples[place]["input_ids"])):
        length = len(examples[place]["input_ids"])
        if batches and length * (len(batches[-1]) + 1) <= limit:
            batches[-1].append(place)
        else:
            batches.append([place])
    return batches


def _batch_tokens(moved: Directions, examples: Examples, weights: list[torch.Tensor], by_place: ByPlace) -> int:
    """Return how many tokens a batch may have, 0 where a batch changes what comes of its examples, which is said.

    Tried on one batch of the first examples: its shortest, which has the most padding, and its longest, alone.
    """
    limit = moved.tokens_at_once
    batch = max(_batches(examples, range(min(_AHEAD, len(examples))), limit), key=len, default=[])
    if len(batch) < 2:
        return limit
    ends = (0, len(batch) - 1)
    together = by_place([examples[i] for i in batch], [weights[i] for i in batch])
    for end in ends:
        (alone,) = by_place([examples[batch[end]]], [weights[batch[end]]])
        bound = _BATCHED.get(moved.losses_dtype, _BATCHED_16) * (10 if isinstance(by_place, _Differences) else 1)
        for one, other in zip(together[end], alone, strict=True):
            if float((one - other).double().norm()) > bound * float(other.double().norm()):
                warn_once(
                    logger,
                    f"{type(moved.model).__name__}: steps are scored one example at a time, since padding after it "
                    "changes what the model makes of it",
                )
                return 0
    return limit


def _summed(given: Found, name: str, steps: list[Step]) -> StepInfluence:
    """Sum influence by place [n, Q] over each step; what is at no step's tokens is the rest."""
    by_place, losses = given
    if not bool(by_place.isfinite().all()):
        raise NumericError(f"the influence of {name} is NaN or infinite: run the model in float32")
    found = by_place.new_zeros(len(steps), by_place.shape[1])
    others = torch.ones(len(by_place), dtype=torch.bool)
    for row, step in enumerate(steps):
        found[row] = by_place[list(step.tokens)].sum(dim=0)
        others[list(step.tokens)] = False
    return StepInfluence(name, steps, found, by_place[others].sum(dim=0), losses)


def _weights(example: Mapping[str, Any], loss_reduction: str) -> torch.Tensor:
    """Return what each token's loss is multiplied by in the example's, [n] fp64; 0 where nothing is learnt."""
    places = learnt_places(example)
    weights = torch.zeros(len(example["input_ids"]), dtype=torch.float64)
    weights[places] = 1.0
    if example.get("weights") is not None:
        weights *= torch.as_tensor(example["weights"]).to(torch.float64)
    return weights / len(places) if loss_reduction == "mean" and places else weights


def _chosen(
    moved: Directions, examples: Sequence[Mapping[str, Any]], weights: list[torch.Tensor], method: str
) -> ByPlace:
    """Return the function that gives influence by place, for "auto" after a trial on the first example."""
    ways: dict[str, ByPlace] = {JVP: _Jvp(moved), DIFFERENCE: _Differences(moved)}
    if method == POSITION:
        return _Positions(moved)
    if method != AUTO:
        return ways[method]
    if not examples:
        return ways[JVP]
    try:
        exact = ways[JVP](examples[:1], weights[:1])[0][0].sum(dim=0)
    except (RuntimeError, NotImplementedError, TypeError, ModelError) as error:
        why = f"its forward has no forward-mode derivative ({one_line(error, 120)})"
    else:
        differences = _Differences(moved)
        measured, noise = differences(examples[:1], weights[:1])[0][0].sum(dim=0), differences.noise
        if bool(((measured - exact).abs() <= _AGREE * exact.abs() + noise).all()):
            return ways[JVP]
        why = f"forward mode gives {exact[0]:.3g} where differences of its losses give {measured[0]:.3g}"
    warn_once(logger, f"{type(moved.model).__name__}: influence of steps is taken by central differences: {why}")
    return ways[DIFFERENCE]


def _apart(
    by_place: torch.Tensor, losses: torch.Tensor, weights: Sequence[torch.Tensor], wide: torch.dtype
) -> list[Found]:
    """Return v . grad l_t [b, n, Q] times the tokens' weights, and the losses [b, n], for each example of a batch."""
    return [
        ((rows[: len(mine)] * mine[:, None]).to(wide), of_tokens[: len(mine)])
        for rows, of_tokens, mine in zip(by_place, losses.detach().cpu(), weights, strict=True)
    ]


@dataclass(frozen=True)
class _Jvp:
    """Forward mode through the model's own forward: dual numbers in the adapter's parameters."""

    moved: Directions

    def __call__(self, examples: Examples, weights: Sequence[torch.Tensor]) -> list[Found]:
        """Return influence by place [n, Q], one pass a direction, and the losses, of each example."""
        moved = self.moved
        pairs = [self._tangents(examples, direction) for direction in moved.rows]
        columns = torch.stack([tangent for _, tangent in pairs], dim=2).double().cpu()
        return _apart(columns, pairs[0][0], weights, moved.wide)

    def _tangents(self, examples: Examples, direction: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return l_t and v . grad l_t of every token by its place, [b, n] each."""
        moved = self.moved
        # fused attention has no forward-mode derivative, and the plain products have
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level():
            dual = {
                name: forward_ad.make_dual(parameter.detach(), part.to(parameter.dtype))
                for name, parameter, part in zip(moved.names, moved.parameters, moved.parts(direction), strict=True)
            }
            losses = moved.token_losses(examples, lambda **given: functional_call(moved.model, dual, (), given))
            primal, tangent = forward_ad.unpack_dual(losses)
            if tangent is None:
                raise ModelError("the model's losses do not depend on its adapter's parameters in forward mode")
            return primal.clone(), tangent.clone()


class _Differences:
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


class _Positions:
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
