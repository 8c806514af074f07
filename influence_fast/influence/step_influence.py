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

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from influence_fast.data.held import Held, as_examples
from influence_fast.data.packing import check_examples, example_name
from influence_fast.data.steps import LINES, Spans, Splitter, Step, learnt_places, split_all
from influence_fast.errors import ConfigError, ModelError, NumericError, did_you_mean, one_line, warn_once
from influence_fast.gradients.model.frozen import frozen
from influence_fast.influence.step_directions import Directions
from influence_fast.influence.step_methods import ByPlace, Differences, Examples, Found, Jvp, Positions

logger = logging.getLogger(__name__)

AUTO, JVP, DIFFERENCE, POSITION = "auto", "jvp", "difference", "position"
METHODS = (AUTO, JVP, DIFFERENCE, POSITION)
_AHEAD = 64  # examples that are put into batches together
# relative, of an example in a batch to it alone; differences, which round, may be ten times as far
_BATCHED, _BATCHED_16 = {torch.float64: 1e-6, torch.float32: 2e-3}, 0.2
_AGREE = 0.02  # relative, beyond the losses' rounding: another derivative differs by more


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
        bound = _BATCHED.get(moved.losses_dtype, _BATCHED_16) * (10 if isinstance(by_place, Differences) else 1)
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
    ways: dict[str, ByPlace] = {JVP: Jvp(moved), DIFFERENCE: Differences(moved)}
    if method == POSITION:
        return Positions(moved)
    if method != AUTO:
        return ways[method]
    if not examples:
        return ways[JVP]
    try:
        exact = ways[JVP](examples[:1], weights[:1])[0][0].sum(dim=0)
    except (RuntimeError, NotImplementedError, TypeError, ModelError) as error:
        why = f"its forward has no forward-mode derivative ({one_line(error, 120)})"
    else:
        differences = Differences(moved)
        measured, noise = differences(examples[:1], weights[:1])[0][0].sum(dim=0), differences.noise
        if bool(((measured - exact).abs() <= _AGREE * exact.abs() + noise).all()):
            return ways[JVP]
        why = f"forward mode gives {exact[0]:.3g} where differences of its losses give {measured[0]:.3g}"
    warn_once(logger, f"{type(moved.model).__name__}: influence of steps is taken by central differences: {why}")
    return ways[DIFFERENCE]
