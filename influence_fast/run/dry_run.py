"""What a run would do and cost, from its configuration alone: no network, no GPU, no weights.

Sizes come from local data, a local or cached tokenizer, and the shapes of a local or cached model, built without
memory for its weights. What cannot be known that way is said to be unknown, and what depends on it is given for each
1,000 examples, or as a formula, or not at all.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from influence_fast.config import ModelConfig, RunConfig, Source
from influence_fast.errors import ConfigError, DataError, ModelError, one_line
from influence_fast.gradients.rows.projection import SIDED_KINDS
from influence_fast.gradients.step.memory import (
    BaseWeights,
    GradientMemory,
    PackSize,
    QuantizedWeights,
    gradient_memory,
)
from influence_fast.guards import reading
from influence_fast.influence.recipe import Recipe
from influence_fast.run.inputs import changed, examples_hash, source_inputs
from influence_fast.run.workdir import occupied
from influence_fast.store.manifest import row_bytes
from influence_fast.training.model_sizes import check_model_sizes
from influence_fast.training.quantized_files import quantized_weights

THOUSAND = 1000
WEIGHT_BYTES = {"float32": 4, "bfloat16": 2}
# fp32 factor, its gradient, and Adam's two moments
TRAINED_BYTES = 16
# Korthikanti et al. (2022), section 4: what a transformer layer keeps for its backward, in units of hidden numbers of
# 16 bits and without the attention matrix, which SDPA and flash-attention do not keep
ACTIVATION_BYTES = 34


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Sizes that a model's configuration gives. `row`: numbers in a row of the store under the run's LoRA and
    projection.
    """

    parameters: int
    hidden: int
    layers: int
    context: int | None
    trained: int  # LoRA parameters
    row: int
    config: Any = field(default=None, repr=False, compare=False)  # of transformers, for the memory of a batch
    quantized: QuantizedWeights | None = None  # those of `parameters` that are stored in fewer bits


@dataclass(frozen=True, slots=True)
class Plan:
    """The outcome of `plan`; None is unknown. Tokens are those of whole examples, prompt and completion.

    Where `pool` is None, `examples` is 1,000 and everything that grows with the pool is for 1,000 examples.
    `tokens` is the pool's total; `tokens_bound` says that it is an upper bound, from `max_length`. `too_long` of the
    source's examples go beyond that and would be left out.
    """

    pool: int | None
    validation: int | None
    test: int | None
    examples: int
    tokens: int | None
    tokens_bound: bool
    longest: int | None
    too_long: int
    cells: int
    fine_tunings: int
    training_tokens: int | None
    stores: int  # one for each checkpoint that is scored
    row: int | None
    store_bytes: int | None
    fitted: int  # examples beside the pool's, that a sketch or a preconditioner is fitted on, for each store
    fitted_bytes: int | None  # of their rows, where these are kept
    model: ModelShape | None
    target: ModelShape | None
    memory: list[tuple[str, int]] = field(default_factory=list)
    gradient_memory: dict[bool, GradientMemory] = field(default_factory=dict)  # with layers computed again, or not
    gradient_batch: int = 0  # tokens
    seconds: dict[str, float] = field(default_factory=dict)
    stops: list[str] = field(default_factory=list)  # what would stop the run at once


def plan(
    config: RunConfig,
    *,
    rows: int | None = None,
    tokens_per_example: float | None = None,
    tokens_per_second: float | None = None,
) -> Plan:
    """Compute the sizes, memory and time that a run of `config` will take.

    rows: examples of the pool source, where it is not local. tokens_per_example: their mean length, likewise.
    tokens_per_second: measured speed of training; gradients are given the same time a token.

    Raises ConfigError for values not above 0, DataError or ModelError where something local cannot be read.
    """
    options = {"rows": rows, "tokens-per-example": tokens_per_example, "tokens-per-second": tokens_per_second}
    for name, value in options.items():
        if value is not None and not value > 0:
            raise ConfigError(f"--{name} is {value}; it must be above 0")
    with _offline():
        shape = model_shape(config.model, config)
        target = shape if config.target_model is None else model_shape(config.target_model, config)
        data = config.data
        sources = {"pool": data.pool, "validation": data.validation, "test": data.test}
        local = {name: _local_examples(source) for name, source in sources.items() if source is not None}
        found = local["pool"]
        if found is not None and rows is not None:
            raise ConfigError(f"--rows: the pool is on this machine ({len(found)} examples); leave the option out")
        total = len(found) if found is not None else rows
        if total is not None and found is None and data.pool.limit is not None:
            total = min(total, data.pool.limit)
        held = {
            "validation": (data.validation, data.holdout_validation),
            "test": (data.test, data.holdout_test),
        }
        sizes = {name: _size(source, count, local.get(name)) for name, (source, count) in held.items()}
        out = sum(count for source, count in held.values() if source is None)
        pool = None if total is None else total - out
        if pool is not None and pool < 1:
            raise ConfigError(f"data: holding out {out} of the pool's {total} examples would leave none")
        lengths = None if found is None else _lengths(found, config.target_model or config.model, data.max_length)
    examples = THOUSAND if pool is None else pool
    bound = False
    longest = data.max_length
    too_long = 0
    tokens: int | None
    if lengths and tokens_per_example is not None:
        raise ConfigError("--tokens-per-example: the pool and its tokenizer are on this machine; leave the option out")
    if lengths:
        too_long = len(found or ()) - len(lengths)
        tokens, longest = round(sum(lengths) / len(lengths) * examples), max(lengths)
    elif tokens_per_example is not None:
        tokens = round(tokens_per_example * examples)
    else:
        tokens = None if data.max_length is None else data.max_length * examples
        bound = tokens is not None
    grid, epochs = config.pruning, config.training.epochs
    strategies = [s for s in grid.strategies if s != "full"]
    kept = 1 + sum(1 - fraction for _ in strategies for fraction in grid.fractions)  # in pools, for one seed
    cells = len(grid.seeds) * (1 + len(strategies) * len(grid.fractions))
    own = config.target_model is not None and config.model.adapter is None  # a reference that is no cell of the grid
    training = None
    if tokens is not None and config.training.max_steps <= 0:
        training = round(tokens * epochs * (kept * len(grid.seeds) + own))
    row = shape.row if shape else config.gradients.width
    stores = _stores(config, examples)
    recipe = Recipe.of(config.gradients, config.influence)
    fitted, kept = (min(examples, count) for count in (recipe.fitted_examples, recipe.fisher_examples))
    gradients = None if tokens is None else stores * (tokens + tokens * fitted // max(1, examples))
    return Plan(
        pool=pool,
        validation=sizes["validation"],
        test=sizes["test"],
        examples=examples,
        tokens=tokens,
        tokens_bound=bound,
        longest=longest,
        too_long=too_long,
        cells=cells,
        fine_tunings=cells + own,
        training_tokens=training,
        stores=stores,
        row=row,
        store_bytes=None if row is None else stores * examples * row_bytes(row, config.gradients.dtype),
        fitted=fitted,
        fitted_bytes=None if row is None else stores * kept * row_bytes(row, "fp32"),
        model=shape,
        target=target,
        memory=_memory(config, target, longest),
        gradient_memory=_gradient_memory(config, shape, _gradient_batch(config, longest)),
        gradient_batch=_gradient_batch(config, longest),
        seconds=_seconds(training, gradients, tokens_per_second),
        stops=_stops(config, {name: part for name, part in local.items() if part is not None}),
    )


def _stores(config: RunConfig, examples: int) -> int:
    """Count the gradient stores of a run: one, or one for each checkpoint that the scores are summed over."""
    training = config.training
    if not config.influence.checkpoints or config.model.adapter is not None:
        return 1
    batch = training.batch_size * training.gradient_accumulation_steps
    steps = training.max_steps if training.max_steps > 0 else math.ceil(examples / batch) * training.epochs
    every = training.save_checkpoints
    return max(1, math.ceil(steps / every if every is not True else steps / math.ceil(examples / batch)))


def model_shape(model: ModelConfig, config: RunConfig) -> ModelShape | None:
    """Return the shape of a local or cached model, from its configuration on the meta device; None if there is none.

    Raises ModelError where a local model's configuration cannot be read, or LoRA does not fit it.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from influence_fast.influence.sketch_fitting import width_of
    from influence_fast.training.fine_tuning import quiet_libraries
    from influence_fast.training.fresh_adapter import attach_lora

    def row_of(scored: Any) -> int:
        return width_of(config.gradients, config.influence.preconditioner, scored)

    check_model_sizes(model.path)
    try:
        settings = AutoConfig.from_pretrained(
            model.path, trust_remote_code=model.trust_remote_code, local_files_only=True
        )
    except Exception as error:  # of strict configurations, and whatever a wrong setting leads to
        if os.path.isdir(model.path):
            raise ModelError(f"{model.path}: {one_line(error)}") from error
        return None
    with reading(f"the model {model.path}", ModelError), quiet_libraries(), torch.device("meta"):
        base = AutoModelForCausalLM.from_config(settings, trust_remote_code=model.trust_remote_code)
        parameters = sum(p.numel() for p in base.parameters())
        quantized = quantized_weights(settings, base, model.quantize)
        row = row_of(base) if config.gradients.target is not None else None
        tuned = attach_lora(base, config.lora, 0)
        trained = sum(p.numel() for p in tuned.parameters() if p.requires_grad)
    row = row_of(tuned) if row is None else row
    text = settings.get_text_config()
    return ModelShape(
        parameters=parameters,
        hidden=int(text.hidden_size),
        layers=int(text.num_hidden_layers),
        context=getattr(text, "max_position_embeddings", None),
        trained=trained,
        row=row,
        config=text,
        quantized=quantized,
    )


def _memory(config: RunConfig, shape: ModelShape | None, longest: int | None) -> list[tuple[str, int]]:
    """Return (formula with its inputs, bytes) of each thing that training holds on the device at a time."""
    if shape is None:
        return []
    dtype = (config.target_model or config.model).dtype
    weights = WEIGHT_BYTES.get(dtype, 4)
    plain = shape.parameters - (shape.quantized.parameters if shape.quantized else 0)
    parts = [(f"weights: {plain:,} x {weights} bytes ({dtype})", plain * weights)]
    if packed := shape.quantized:
        parts.append((f"quantised weights: {packed.parameters:,}, with their scales", packed.stored))
        parts.append((f"one of them dequantised: {packed.largest:,} x {weights} bytes", packed.largest * weights))
    parts += [
        (
            f"LoRA factors, gradients, Adam: {shape.trained:,} x {TRAINED_BYTES} bytes",
            shape.trained * TRAINED_BYTES,
        ),
    ]
    width = config.training.packing or longest
    if width is not None:
        tokens = width * config.training.batch_size
        layer = ACTIVATION_BYTES * shape.hidden * weights // 2
        if config.training.gradient_checkpointing:
            # the input of each layer, and one layer's activations while it is computed again
            amount = tokens * (shape.layers * shape.hidden * weights + layer)
            how = f"({shape.layers} layers x {shape.hidden} x {weights} + {layer}) bytes, recomputed"
        else:
            amount = tokens * shape.layers * layer
            how = f"{shape.layers} layers x {layer} bytes ({ACTIVATION_BYTES} x hidden in 16 bits)"
        parts.append((f"activations: {config.training.batch_size} x {width:,} tokens x {how}", amount))
    return parts


def _gradient_batch(config: RunConfig, longest: int | None) -> int:
    """Return the tokens of the gradient pass's largest batch on a GPU.

    An example longer than the budget has a batch of its own.
    """
    from influence_fast.gradients.per_example import DEFAULT_MAX_TOKENS

    return max(config.gradients.max_tokens or DEFAULT_MAX_TOKENS["cuda"], longest or 0)


def _gradient_memory(config: RunConfig, shape: ModelShape | None, tokens: int) -> dict[bool, GradientMemory]:
    """Compute the memory of such a batch of one example, with activations kept and with layers recomputed.

    Empty for models, modules or rows that the estimate does not describe.
    """
    gradients = config.gradients
    described = gradients.kind in SIDED_KINDS and gradients.layers == 1.0 and gradients.target is None
    if shape is None or not described or config.lora.target_modules != "all-linear":
        return {}
    weights = BaseWeights(shape.parameters, WEIGHT_BYTES.get(config.model.dtype, 4), shape.quantized)
    options: dict[str, Any] = {"rank": config.lora.r, "row": shape.row}
    try:
        return {
            again: gradient_memory(shape.config, PackSize(tokens), weights, gradients, checkpointing=again, **options)
            for again in (False, True)
        }
    except ConfigError:  # another kind of model
        return {}


def _seconds(training: int | None, gradients: int | None, speed: float | None) -> dict[str, float]:
    if speed is None:
        return {}
    known = {"fine-tunings": training, "gradients": gradients}
    return {name: tokens / speed for name, tokens in known.items() if tokens is not None}


def _local_examples(source: Source) -> list[Any] | None:
    """Read the examples of a source on this machine; return None for one on the hub."""
    from influence_fast.run.inputs import read_source

    return read_source(source) if os.path.exists(Path(source.path).expanduser()) else None


def _stops(config: RunConfig, local: dict[str, list[Any]]) -> list[str]:
    """Return what would stop the run at once: an output folder that holds something else or was made of other inputs,
    data that is nowhere. local: the examples of the sources on this machine."""
    from influence_fast.data.rows import check_hub_id

    found = [occupied(config)]
    if not found[0]:
        read = {f"data.{name}": examples_hash(examples) for name, examples in local.items()}
        found.append(changed(Path(config.output), source_inputs(config, read)))
    for source in (config.data.pool, config.data.validation, config.data.test):
        if source is not None and not os.path.exists(Path(source.path).expanduser()):
            try:
                check_hub_id(source.path)
            except DataError as error:
                found.append(str(error))
    return [reason for reason in found if reason]


def _size(source: Source | None, held_out: int, found: list[Any] | None) -> int | None:
    if source is None:
        return held_out
    # a limit on a source of unknown size is what was asked for, if not what there is
    return len(found) if found is not None else source.limit


def _lengths(examples: list[Any], model: ModelConfig, max_length: int | None) -> list[int] | None:
    """Count the tokens of each example that is short enough; return None if the tokenizer is not on this machine."""
    from influence_fast.data.examples import tokenize
    from influence_fast.training.models import load_tokenizer

    try:
        tokenizer = load_tokenizer(
            model.path,
            adapter=model.adapter,
            tokenizer=model.tokenizer,
            trust_remote_code=model.trust_remote_code,
        )
    except ModelError:
        if all(os.path.isdir(place) for place in (model.path, model.adapter, model.tokenizer) if place is not None):
            raise
        return None
    return [len(e["input_ids"]) for e in tokenize(examples, tokenizer, max_length=max_length).examples]


@contextmanager
def _offline() -> Iterator[None]:
    """Keep what runs inside from asking the hub; its cache is read."""
    from huggingface_hub import constants

    before, variable = constants.HF_HUB_OFFLINE, os.environ.get("HF_HUB_OFFLINE")
    constants.HF_HUB_OFFLINE = True
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
        if variable is None:
            del os.environ["HF_HUB_OFFLINE"]
        else:
            os.environ["HF_HUB_OFFLINE"] = variable
