"""Per-example LoRA gradients of a packed batch, exact or projected, at less than the price of a training step."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from influence_fast.data.held import Held, as_examples
from influence_fast.data.packing import (
    IGNORED,
    Pack,
    check_examples,
    context_of,
    example_name,
    pack_examples,
    say_if_beyond,
)
from influence_fast.deprecation import OldCall, also_called_as, moved
from influence_fast.errors import ConfigError, DataError, NumericError, setting, truncated_list
from influence_fast.gradients.engine import GradientEngine, LossEngine
from influence_fast.gradients.model.probe_texts import vocabulary_of
from influence_fast.gradients.rows.precision import AUTO
from influence_fast.gradients.rows.projection import EXACT, Projection
from influence_fast.gradients.rows.row_spec import RowSpec
from influence_fast.gradients.targets import gradient_layout
from influence_fast.row_codec import decoded, encoded
from influence_fast.transfer import WriteBehind, to_device

__all__ = ["Projection", "gradient_layout", "iter_gradient_rows", "per_example_gradients"]

# Measured on a 2-core CPU at 256 wide: packs of 1k to 4k tokens differ by a few per cent; GPUs want more.
DEFAULT_MAX_TOKENS = {"cpu": 2048, "cuda": 16384}
EXACT_ROWS = RowSpec(EXACT, dtype="fp32")
_OF_SPEC = ("projection", "loss_reduction", "max_tokens", "row_dtype", "precision")  # keywords before there were specs


def per_example_gradients(
    model: nn.Module,
    examples: Held,
    *,
    projection: Projection | None = None,
    loss_reduction: str = "mean",
    max_tokens: int | None = None,
    backend: str | None = None,
    precision: str = AUTO,
    cuda_graphs: bool | None = None,
) -> torch.Tensor:
    """Return the gradient of each example's own loss by LoRA factors or named weights, one row an example.

    Args:
        model: a peft model (or a model with LoRA layers injected) that transformers can run; one without an adapter
            where `projection.target` names the linears whose weights' gradients are wanted.
        examples: `{"input_ids", "labels"}`, 1-D whole numbers of one length, labels -100 where ignored and aligned
            with input_ids (the shift by one happens here); `"id"` is optional and used in messages. Optional
            `"weights"`, a float a token, multiply the tokens' losses (a mean still divides by the number of labels).
            A list of these, a padded batch, a `datasets.Dataset`, a `DataLoader`, ...: see `data.held.as_examples`.
        projection: None for the exact gradient, laid out as `gradient_layout(model)` says; else a `Projection`. For
            queries take `store.projection`, which has the store's own sketch where one was fitted.
        loss_reduction: `"mean"` over the example's completion tokens, or `"sum"`.
        max_tokens: tokens in one packed batch; changes speed and memory, not the numbers.
        backend: "auto", "triton" or "torch" (see `backends`); by default what INFLUENCE_FAST_BACKEND says, or "auto".
        precision: "auto", the model's own dtype throughout, or "fp8": the LoRA linears' products with their frozen
            weights in 8 bits (see `fp8`). That changes the numbers: compare with rows of the same precision alone.
        cuda_graphs: replay captured steps on a GPU (see `cuda_graphs`); by default wherever they can be, unless
            INFLUENCE_FAST_CUDA_GRAPHS is 0.

    Returns:
        (E, k) tensor on the model's device: fp32, or fp64 for an fp64 model.

    Raises:
        ConfigError: an unknown loss_reduction, precision or backend, or one (or CUDA graphs) that this device or model
            cannot have; a sketch that was fitted on another model.
        DataError: an example is malformed, has no token to learn from or a token the model does not have.
        ModelError: the model has no LoRA layer, or one this package cannot differentiate.
        NumericError: a gradient is NaN or infinite; the message names the examples.

    Example:
        >>> rows = inf.per_example_gradients(model, tokens)  # doctest: +SKIP
    """
    examples = as_examples(examples)
    with GradientEngine(
        model, projection, loss_reduction, backend, precision=precision, cuda_graphs=cuda_graphs
    ) as engine:
        dtype, device = engine.reducer.dtype, engine.device
        out = torch.empty(len(examples), engine.width, dtype=dtype, device=device)
        for pack in packs_for(engine, examples, max_tokens):
            rows, losses = engine.run(pack)
            compare_once(engine, pack, losses, examples)
            out.index_copy_(0, to_device(torch.tensor(pack.indices), device), rows)
    bad = out.isfinite().all(dim=1).logical_not().nonzero().flatten().tolist()
    if bad:
        names = truncated_list(example_name(examples[i], i) for i in bad)
        raise NumericError(
            f"the gradient is NaN or infinite for {names}: look at these examples and the adapter's weights, "
            "or run the model in float32"
        )
    return out


class KeptEngine:
    """An engine that several calls share: opened by the first of them, closed at the end of the `with` block.

    Opening one draws the random columns, copies weights for 8-bit products and forgets recorded steps, which a store of
    many shards need not do for each.
    """

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()
        self._opened: tuple[nn.Module, dict[str, Any], GradientEngine] | None = None

    def __enter__(self) -> KeptEngine:
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self._opened = None
        self._stack.close()

    def open(self, model: nn.Module, settings: dict[str, Any]) -> GradientEngine:
        """Return the engine for `model`, opened with `settings` (of `GradientEngine`); ValueError for others later."""
        if self._opened is None:
            self._opened = (model, settings, self._stack.enter_context(GradientEngine(model, **settings)))
        served, held, engine = self._opened
        if served is not model or held != settings:
            raise ValueError("a kept engine serves one model and one set of settings; use another for these")
        return engine


def _spec_of_old_call(values: dict[str, Any]) -> dict[str, Any]:
    """Translate `iter_gradient_rows(model, examples, projection=..., loss_reduction=..., ...)`."""
    made = moved(values, ("loss_reduction", "max_tokens", "precision"))
    dtype = values.pop("row_dtype", "fp32")
    return values | {"spec": RowSpec.of(values.pop("projection", None), dtype=dtype, **made)}


@also_called_as(
    OldCall(
        positional=("model", "examples"),
        keywords=(*_OF_SPEC, "backend", "skip", "losses", "engine"),
        marks=_OF_SPEC,
        translate=_spec_of_old_call,
        instead="iter_gradient_rows(model, examples, RowSpec.of(projection, ...))",
    )
)
def iter_gradient_rows(
    model: nn.Module,
    examples: Sequence[Mapping[str, Any]],
    spec: RowSpec = EXACT_ROWS,
    *,
    backend: str | None = None,
    skip: Collection[int] = (),
    losses: torch.Tensor | None = None,
    engine: KeptEngine | None = None,
) -> Iterator[tuple[list[int], torch.Tensor]]:
    """Yield the rows of one packed batch after the other: (indices into `examples`, CPU rows [n, k]).

    Rows come in packing order and may hold NaN or infinite numbers; the caller decides what to do with those. Raises
    as `per_example_gradients`.

    Args:
        spec: how rows are made. From a card they come in its `dtype`, and are fp32 again here: rounded, but the same
            bits in a store of that dtype. A batch then comes once the next one has been launched.
        backend: as in `per_example_gradients`.
        skip: places whose rows are not needed. Batches of none but these are left out, and the others are what they
            would have been.
        losses: fp32 [E] on the CPU, in which the completion losses of a batch's examples are when it comes.
        engine: what keeps the engine open from one call to the next.
    """
    settings: dict[str, Any] = {
        "projection": spec.projection(),
        "loss_reduction": spec.loss_reduction,
        "backend": backend,
        "bf16_rows": spec.dtype == "bf16",
        "precision": spec.precision,
    }
    with KeptEngine() if engine is None else contextlib.nullcontext(engine) as kept:
        opened = kept.open(model, settings)
        behind = WriteBehind(opened.device)
        for pack in packs_for(opened, examples, spec.max_tokens):
            if skip and set(pack.indices) <= set(skip):
                continue
            rows, found = opened.run(pack)
            compare_once(opened, pack, found, examples)
            sent = encoded(rows, spec.dtype, opened.backend.int8_rows) if behind.crosses else [rows]
            for batch in behind.push(pack.indices, [*sent, found]):
                yield _received(batch, losses)
        for batch in behind.flush():
            yield _received(batch, losses)


def compare_once(
    engine: GradientEngine, pack: Pack, losses: torch.Tensor, examples: Sequence[Mapping[str, Any]]
) -> None:
    """Compare the first pack of an engine with plain forwards of the model; raise ModelError naming what differs.

    losses: [E] of the pack, whose indices are places in `examples`.
    """
    if engine.compared:
        return
    engine.compared = True
    engine.compare_losses(pack, losses, [example_name(examples[i], i) for i in pack.indices])


def _received(
    batch: tuple[list[int], list[torch.Tensor]], losses: torch.Tensor | None
) -> tuple[list[int], torch.Tensor]:
    """Return the places and decoded rows of a batch's tensors; its losses are written into `losses`."""
    places, (*rows, found) = batch
    if losses is not None:
        losses[places] = found.to(losses.dtype)
    return places, decoded(rows)


def per_example_losses(model: nn.Module, examples: Held, *, loss_reduction: str = "mean") -> torch.Tensor:
    """Return each example's completion loss under `model`, with no backward pass: (E,) fp32, fp64 for an fp64 model.

    `examples` as for `per_example_gradients`. Raises DataError as that does.
    """
    examples = as_examples(examples)
    with LossEngine(model, loss_reduction) as engine:
        out = torch.empty(len(examples), dtype=engine.reducer.dtype)
        for pack in packs_for(engine, examples, None):
            losses = engine.losses(pack)
            compare_once(engine, pack, losses, examples)
            out[pack.indices] = losses.cpu()
    return out


def packs_for(engine: GradientEngine, examples: Sequence[Mapping[str, Any]], max_tokens: int | None) -> list[Pack]:
    """Pack the examples for the engine's model, after checking them; raises as `per_example_gradients`."""
    check_examples(examples)
    if max_tokens is not None and max_tokens < 1:
        raise ConfigError(f"{setting('max_tokens')} is {max_tokens}; it must be at least 1, or None")
    vocab = vocabulary_of(engine.base)
    for index, example in enumerate(examples):
        ids = example["input_ids"]
        if int(ids.max()) >= vocab or int(ids.min()) < 0:
            raise DataError(
                f"{example_name(example, index)}: token id outside the model's vocabulary of {vocab}; "
                "tokenize with this model's own tokenizer"
            )
        labels = example["labels"]
        strange = (labels != IGNORED) & ((labels < 0) | (labels >= vocab))
        if bool(strange.any()):
            raise DataError(
                f"{example_name(example, index)}: label {int(labels[strange][0])} is neither {IGNORED} (ignored) nor a "
                f"token of the model's vocabulary of {vocab}"
            )
    say_if_beyond(context_of(engine.base.config), examples)
    if not engine.packs_are_separate:
        max_tokens = 1  # one example a pack: in this model they would see each other
    elif max_tokens is None:
        max_tokens = DEFAULT_MAX_TOKENS.get(engine.device.type, 4096)
    return pack_examples(examples, max_tokens)
