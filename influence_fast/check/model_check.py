"""Check a model, adapter and data of any kind against the model's own plain forward, trusting neither."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from influence_fast.check.differences import adapter_parameters, fixed_norms, plain_losses, rounding, scored_parameters
from influence_fast.check.engine_numbers import EngineNumbers, engine_numbers, relative, rows_in_float32
from influence_fast.check.row_judge import NOISES, RowJudge
from influence_fast.check.verdicts import AGREES, REFUSED, UNJUDGED, Check, ModelCheck
from influence_fast.data.held import Held, as_examples
from influence_fast.data.packing import IGNORED, check_examples, example_name, teaches
from influence_fast.errors import ConfigError, DataError, ModelError, one_line, setting
from influence_fast.gradients.model.frozen import frozen
from influence_fast.gradients.model.layer_outputs import rounded_layers
from influence_fast.gradients.model.quantized import unrounded
from influence_fast.gradients.model.referee import decoder_of
from influence_fast.gradients.model.trained_beside import unscored_in
from influence_fast.gradients.step.opened import base_of
from influence_fast.settings import check_seed

# Rows of the data that examples are chosen from.
_CONSIDERED = 256
# Rows that differ from the same model's in fp32 by more than this are mostly rounding.
_MOST_NOISE = 0.3


# Relative errors of a row in a pack against the row alone that are rounding.
_PACKS = {torch.float64: 1e-8, torch.float32: 1e-4}
_PACKS_16 = 0.1


def check_model(
    model: nn.Module,
    examples: Held,
    *,
    count: int = 4,
    max_tokens: int = 1024,
    directions: int = 2,
    step: float | None = None,
    backend: str | None = None,
    seed: int = 0,
) -> ModelCheck:
    """Compare the engine with the model's own plain forward on a few of the user's examples.

    Losses are compared with `model(input_ids)`; exact gradient rows with central differences of that loss, the active
    adapter moved by +-step along directions in its parameters: sums of the rows with random signs, in which every
    derivative is large, and random ones, in which a part that rows lack shows; rows in a pack with rows alone; and in
    16 bits rows with those of the model in fp32. All parameters and modes are as before afterwards, to the bit.

    Args:
        model: a peft model (or one with LoRA layers injected), of any architecture.
        examples: tokenized, as `per_example_gradients` takes them; of the first 256, `count` of spread lengths are
            used, cut to their first `max_tokens` tokens.
        directions: of each kind. A direction costs two forwards an example.
        step: how far the adapter moves along rows; by default 0.01 (fp64: 1e-6, 16 bits: 0.1), and others
            where that one cannot tell.
        backend: as for `per_example_gradients`.
        seed: of the directions.

    Returns:
        A `ModelCheck`; what the engine refuses, or cannot run, is a verdict and no error.

    Raises:
        ConfigError: an option is out of range. DataError: an example is malformed or of another vocabulary.

    Example:
        >>> found = inf.check_model(model, inf.tokenize(examples, tokenizer).examples)  # doctest: +SKIP
        >>> found.ok, found["rows"].value  # doctest: +SKIP
        (True, 1.4e-05)
    """
    _check_options(count, max_tokens, directions, step)
    check_seed("seed", seed)
    began = time.perf_counter()
    chosen = _choose(as_examples(examples), count, max_tokens)
    not_scored = unscored_in(model)
    with frozen(model):
        checks, others = _checks(model, chosen, directions, step, backend, seed)
    first = next(model.parameters())
    return ModelCheck(
        model=str(getattr(getattr(model, "config", None), "model_type", type(model).__name__)),
        dtype=str(first.dtype).removeprefix("torch."),
        device=str(first.device),
        examples=tuple(example_name(example, index) for index, example in enumerate(chosen)),
        tokens=tuple(len(example["input_ids"]) for example in chosen),
        checks=tuple(checks),
        not_scored=(*not_scored, *others),
        seconds=time.perf_counter() - began,
    )


def _check_options(count: int, max_tokens: int, directions: int, step: float | None) -> None:
    for name, value, least in (("count", count, 1), ("max_tokens", max_tokens, 2), ("directions", directions, 1)):
        if value < least:
            raise ConfigError(f"is {value}; it must be at least {least}", key=name, value=value)
    if step is not None and not (math.isfinite(step) and step > 0):
        raise ConfigError(f"{setting('step')} is {step}; it must be a number above 0")


def _choose(examples: Sequence[Mapping[str, Any]], count: int, max_tokens: int) -> list[dict[str, Any]]:
    """Take examples of spread lengths, the longest first, cut to their first tokens."""
    considered = [{"id": example_name(e, i), **e} for i, e in enumerate(examples[:_CONSIDERED])]
    if not considered:
        raise DataError("no example to check with; give at least one")
    check_examples(considered)
    order = sorted(considered, key=lambda example: -len(example["input_ids"]))
    count = min(count, len(order))
    places = {round(i * (len(order) - 1) / max(1, count - 1)) for i in range(count)}
    return [_cut(order[place], max_tokens) for place in sorted(places)]


def _cut(example: dict[str, Any], max_tokens: int) -> dict[str, Any]:
    """Return the first tokens of an example; where none of them has a loss, all of them get one."""
    cut: dict[str, Any] = {
        name: example[name][:max_tokens] for name in ("input_ids", "labels", "weights") if name in example
    }
    taught = teaches(cut["labels"]) and (
        "weights" not in cut or bool((cut["weights"][1:][cut["labels"][1:] != IGNORED] != 0).any())
    )
    if not taught:
        cut = {"input_ids": cut["input_ids"], "labels": cut["input_ids"].clone()}
    return {"id": example["id"], **cut}


def _checks(
    model: Any, examples: list[dict[str, Any]], directions: int, step: float | None, backend: str | None, seed: int
) -> tuple[list[Check], list[str]]:
    """Run every check, and return them and the names of the adapter parameters that no row covers."""
    try:
        numbers = engine_numbers(model, examples, backend)
    except (ConfigError, DataError):
        raise
    except ModelError as error:
        return [Check("engine", REFUSED, None, None, one_line(error, None)), *_unjudged("the engine gives none")], []
    except torch.OutOfMemoryError as error:
        raise ModelError(
            f"the examples do not fit in the GPU's memory ({one_line(error, 100)}); take a smaller max_tokens"
        ) from error
    except Exception as error:
        # The model's own code may raise anything.
        what = f"{type(error).__name__}: {one_line(error)}"
        return [Check("engine", REFUSED, None, None, what), *_unjudged("the engine gives none")], []
    checks = [Check("engine", AGREES, None, None, numbers.how)]
    try:
        plain = plain_losses(model, examples)
    except Exception as error:
        # The model's own code may raise anything.
        why = f"the plain forward fails: {type(error).__name__}: {one_line(error)}"
        return [*checks, *_unjudged(why)], []
    parameters = adapter_parameters(model)
    noise = _noise(model, examples, plain, numbers, list(parameters.values()), seed)
    checks.append(_losses(numbers, plain, noise, examples))
    try:
        names, others = scored_parameters(numbers.layout, parameters)
    except KeyError as error:
        note = f"no parameter of the model is the rows' {error.args[0]}"
        checks += [Check(name, UNJUDGED, None, None, note) for name in ("rows", "random")]
        others = []
    else:
        judge = RowJudge(model, examples, numbers, [parameters[name] for name in names], noise, seed)
        checks += _rows(judge, directions, step, backend)
    checks.append(_packs(numbers))
    if numbers.noise is not None:
        checks.append(_rounding(model, examples, numbers, backend))
    return checks, others


def _rows(judge: RowJudge, directions: int, step: float | None, backend: str | None) -> list[Check]:
    """Judge the rows, of quantised layers without the rounding inside them, by which losses move in steps."""
    with unrounded(judge.model, judge.numbers.tolerance.dtype) as otherwise:
        if otherwise:
            numbers = engine_numbers(judge.model, judge.examples, backend)
            plain = plain_losses(judge.model, judge.examples)
            noise = _noise(judge.model, judge.examples, plain, numbers, judge.parameters, judge.seed)
            judge = replace(judge, numbers=numbers, noise=noise)
        with fixed_norms(judge.model, lambda: plain_losses(judge.model, judge.examples[:1])) as fixed:
            found = [judge.along_rows(directions, step), judge.along_random(directions)]
    more = ", quantised layers as their backward multiplies" if otherwise else ""
    more += ", DoRA's norms held" if fixed else ""
    return [replace(check, note=check.note + more) for check in found]


def _unjudged(why: str) -> list[Check]:
    return [Check(name, UNJUDGED, None, None, why) for name in ("losses", "rows")]


def _noise(
    model: Any,
    examples: Sequence[Mapping[str, Any]],
    plain: Sequence[float],
    numbers: EngineNumbers,
    parameters: Sequence[nn.Parameter],
    seed: int,
) -> float:
    """Estimate the standard deviation of a plain loss's rounding by rounding every layer's output once more."""
    with rounded_layers(decoder_of(base_of(model)), numbers.tolerance.unit):
        shaken = plain_losses(model, examples)
    noise = _root_mean_square([a - b for a, b in zip(shaken, plain, strict=True)])
    if numbers.tolerance.dtype != torch.float64:
        return noise
    # Models that are fp64 compute norms and softmax in fp32, which moving a number by its last bit does not show.
    return max(noise, _root_mean_square(rounding(lambda: plain_losses(model, examples), parameters, 1e-6, seed)))


def _root_mean_square(values: Sequence[float]) -> float:
    return math.sqrt(sum(value * value for value in values) / len(values))


def _losses(
    numbers: EngineNumbers, plain: Sequence[float], noise: float, examples: Sequence[Mapping[str, Any]]
) -> Check:
    """Compare losses relative to 1 + |loss|, and report the example that is worst by its own bound."""
    found = []
    for ours, theirs, example in zip(numbers.losses, plain, examples, strict=True):
        counted = int((example["labels"][1:] != IGNORED).sum())
        size = 1 + abs(theirs)
        found.append((abs(ours - theirs) / size, max(numbers.tolerance.of_loss(counted), NOISES * noise / size)))
    value, bound = max(found, key=lambda pair: pair[0] / pair[1] if math.isfinite(pair[0]) else math.inf)
    return Check.of("losses", value, bound, "the engine's losses with those of model(input_ids)")


def _packs(numbers: EngineNumbers) -> Check:
    """Compare rows in a pack with rows alone."""
    if numbers.apart is None:
        return Check("packs", AGREES, None, None, "each example is alone in its pack")
    floor = _PACKS.get(numbers.tolerance.dtype, _PACKS_16)
    bound = max(floor, numbers.tolerance.floor if numbers.tolerance.floor > 1e-4 else 0.0)
    bound = max(bound, min(_MOST_NOISE, 2 * (numbers.noise or 0.0)))
    return Check.of("packs", numbers.apart, bound, "rows in a pack with rows of each example alone")


def _rounding(model: Any, examples: Sequence[Mapping[str, Any]], numbers: EngineNumbers, backend: str | None) -> Check:
    """Compare 16-bit rows with the fp32 model's, or with themselves after one more rounding of layer outputs."""
    assert numbers.noise is not None
    try:
        wide = rows_in_float32(model, examples, backend)
    except Exception:
        # The model's own code or its size may raise anything.
        wide = None
    if wide is None:
        note = "rows with themselves, every layer's output rounded once more (fp32 does not fit)"
        return Check.of("rounding", numbers.noise, _MOST_NOISE, note)
    value = relative(numbers.rows.to(wide.dtype), wide)
    return Check.of("rounding", value, _MOST_NOISE, "rows with those of the same weights in fp32")
