"""The rows of one shard: its examples tokenized, their gradients computed pack by pack, and who has none."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from influence_fast.data.packing import teaches
from influence_fast.errors import DataError, ModelError, truncated_list
from influence_fast.gradients.per_example import KeptEngine
from influence_fast.gradients.rows.row_spec import RowSpec

#: As `gradients.per_example.iter_gradient_rows`: (model, examples, spec=...) -> batches of (places in `examples`, rows
#: [n, width]). Ours also take `skip`, places that need no row, and any may take `losses`, which it fills in.
GradientSource = Callable[..., Iterator[tuple[list[int], torch.Tensor]]]
#: Told of the examples that are now done: the tokens of each, 0 for one that was set aside.
Advance = Callable[[Sequence[int]], None]


@dataclass(frozen=True)
class Texts:
    """The way texts become tokens; examples that came as tokens are cut or set aside by the same limit.

    tokenizer: the model's own; None where examples are tokens. max_length: longer examples are set aside, or cut when
    `truncate`. Raises DataError for a `max_length` below 2.
    """

    tokenizer: Any = None
    max_length: int | None = None
    truncate: bool = False

    def __post_init__(self) -> None:
        if self.max_length is None:
            return
        if not isinstance(self.max_length, int) or isinstance(self.max_length, bool) or self.max_length < 2:
            raise DataError(
                f"max_length is {self.max_length!r}; it must be a whole number of at least 2, one token to predict "
                "another from"
            )


AS_TOKENS = Texts()


@dataclass(frozen=True)
class RowMaker:
    """A source of rows, with the model and the spec that it is called with.

    ours: whether it is `iter_gradient_rows`, which takes an engine and places to skip.
    """

    source: GradientSource
    model: nn.Module
    spec: RowSpec
    ours: bool
    takes_losses: bool
    engine: KeptEngine | None = None

    @classmethod
    def of(cls, model: nn.Module, spec: RowSpec, source: GradientSource | None) -> RowMaker:
        """Return the maker of rows by `source`, by default our own."""
        from influence_fast.gradients.per_example import iter_gradient_rows

        if source is None:
            return cls(iter_gradient_rows, model, spec, True, _takes_losses(iter_gradient_rows))
        return cls(called_with_spec(source), model, spec, False, _takes_losses(source))

    def keeping(self, engine: KeptEngine) -> RowMaker:
        """Return the same with an engine that its calls share, where the source takes one."""
        return replace(self, engine=engine if self.ours else None)

    def batches(
        self, examples: list[dict[str, Any]], done: Collection[int], losses: torch.Tensor
    ) -> Iterator[tuple[list[int], torch.Tensor]]:
        """Yield the rows of examples that are not `done`, some at a time; `losses` [E] are filled in."""
        more: dict[str, Any] = {"skip": frozenset(done)} if done else {}
        if self.takes_losses:
            more["losses"] = losses
        if self.engine is not None:
            more["engine"] = self.engine
        return self.source(self.model, examples, spec=self.spec, **more)

    def alone(self) -> RowMaker:
        """Return the same with every example in a pack of its own."""
        return replace(self, spec=replace(self.spec, max_tokens=1))


def called_with_spec(source: GradientSource) -> GradientSource:
    """Return a source that is called with `spec`; one of loose keywords is adapted, with a warning."""
    if "spec" in inspect.signature(source).parameters:
        return source
    warnings.warn(
        "a source of gradients is called with spec=RowSpec(...) in place of projection, loss_reduction and max_tokens; "
        "give it a parameter `spec`",
        DeprecationWarning,
        stacklevel=2,
    )

    def adapted(model: nn.Module, examples: Any, *, spec: RowSpec, **more: Any) -> Any:
        made = {"loss_reduction": spec.loss_reduction, "max_tokens": spec.max_tokens}
        return source(model, examples, projection=spec.projection(), **made, **more)

    return adapted


@dataclass
class ShardWork:
    """A shard in the making: its examples that have a gradient, their rows [E, width] and losses [E], both fp32, and
    which are done. The losses stay NaN where the source gives none."""

    examples: list[dict[str, Any]]
    rows: torch.Tensor
    losses: torch.Tensor
    done: set[int] = field(default_factory=set)

    @classmethod
    def start(
        cls,
        examples: list[dict[str, Any]],
        width: int,
        found: tuple[torch.Tensor, torch.Tensor, list[int]] | None = None,
    ) -> ShardWork:
        """Return work with nothing done yet but `found`: rows [n, width], losses [n] and their places."""
        count = len(examples)
        work = cls(examples, torch.full((count, width), torch.nan), torch.full((count,), torch.nan))
        if found is not None:
            rows, losses, places = found
            work.rows[places], work.losses[places] = rows, losses
            work.done.update(places)
        return work

    def compute(self, maker: RowMaker, advance: Advance) -> None:
        """Fill in what is not done. After an interruption, `rows` holds every pack that `done` names.

        Raises ModelError: the source leaves an example out, or gives rows of another width.
        """
        if not self.examples:
            return
        if self.done:
            advance([0] * len(self.done))  # their tokens were counted when they were computed
        width = self.rows.shape[1]
        for places, batch in maker.batches(self.examples, self.done.copy(), self.losses):
            if batch.shape != (len(places), width):
                raise ModelError(
                    f"the gradient source gave rows {tuple(batch.shape)} for {len(places)} examples of width {width}; "
                    "its layout must be gradient_layout(model, projection)"
                )
            self.rows[places] = batch.to("cpu", torch.float32)
            new = [i for i in places if i not in self.done]
            self.done.update(places)
            advance(self._lengths(new))
        missing = [i for i in range(len(self.examples)) if i not in self.done]
        if missing:
            names = truncated_list(self.examples[i]["id"] for i in missing)
            raise ModelError(f"the gradient source gave no row for {names}; it must give one for each example")

    def finite(self, maker: RowMaker) -> tuple[list[int], list[int]]:
        """Return the places of finite and of other rows. A NaN may come from a neighbour in the pack (0 * NaN in masked
        attention), so each suspect is computed once more, in a pack of its own, and `rows` is mended in place."""
        suspects = (~torch.isfinite(self.rows).all(dim=1)).nonzero().flatten().tolist()
        if suspects:
            alone = ShardWork.start([self.examples[i] for i in suspects], self.rows.shape[1])
            alone.compute(maker.alone(), lambda _: None)
            self.rows[suspects], self.losses[suspects] = alone.rows, alone.losses
        finite = torch.isfinite(self.rows).all(dim=1)
        return finite.nonzero().flatten().tolist(), (~finite).nonzero().flatten().tolist()

    def _lengths(self, places: Collection[int]) -> list[int]:
        return [len(self.examples[i]["input_ids"]) for i in places]


def _takes_losses(gradients: GradientSource) -> bool:
    """Return whether a source can be called with `losses`; one that takes it and leaves it alone gives none."""
    parameters = inspect.signature(gradients).parameters.values()
    return any(p.name == "losses" or p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)


def id_of(example: Any) -> Any:
    """Return the id of a tokenized example or a text; None where it has none."""
    return example["id"] if isinstance(example, Mapping) else getattr(example, "id", None)


def tokenized(shard: list[Any], texts: Texts) -> tuple[list[dict[str, Any]], list[tuple[str, str]]]:
    """Return the shard's examples that have a gradient, tokenized, and (id, reason) of the others."""
    set_aside: dict[str, str] = {}
    tokenizer, max_length, truncate = texts.tokenizer, texts.max_length, texts.truncate
    if shard and not isinstance(shard[0], Mapping):
        from influence_fast.data.examples import tokenize

        if tokenizer is None:
            raise DataError("a dataset of texts needs the model's tokenizer; give it, or tokenized examples")
        empty = {example.id: "empty completion" for example in shard if not example.completion.strip()}
        live = [example for example in shard if example.id not in empty]
        done = tokenize(live, tokenizer, max_length=max_length, truncate=truncate)
        too_long = {i: f"too long: {n} tokens, the limit is {max_length}" for i, n in done.too_long}
        set_aside = {**empty, **too_long}
        examples = [dict(example) for example in done.examples]
    else:
        examples = []
        for example in shard:
            tokens = len(example["input_ids"])
            if max_length is not None and tokens > max_length and not truncate:
                set_aside[example["id"]] = f"too long: {tokens} tokens, the limit is {max_length}"
                continue
            aligned = [name for name in ("input_ids", "labels", "weights") if name in example]
            cut = {name: torch.as_tensor(example[name])[:max_length] for name in aligned}
            examples.append({**example, **cut})
    for example in examples:
        if not teaches(example["labels"]):
            set_aside[example["id"]] = "no completion token to learn from"
    kept = [example for example in examples if example["id"] not in set_aside]
    found = {example["id"] for example in kept}
    for name in map(id_of, shard):
        if name not in found:
            set_aside.setdefault(name, "not tokenized")
    return kept, list(set_aside.items())
