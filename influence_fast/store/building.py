"""Builds a gradient store: one row for each training example, shard by shard, so that nothing done is done twice."""

from __future__ import annotations

import sys
import warnings
from array import array
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from torch import nn

import influence_fast
from influence_fast.data.fingerprints import dataset_fingerprint, tokenizer_hash, weight_hashes
from influence_fast.data.held import Held, as_examples
from influence_fast.errors import ConfigError, DataError, NumericError, did_you_mean, truncated_list
from influence_fast.gradients.fp8 import AUTO, check_precision
from influence_fast.gradients.projection import Projection
from influence_fast.progress import bar
from influence_fast.store.identity import StoreIdentity, projection_fields
from influence_fast.store.manifest import MANIFEST_NAME, Manifest, ModuleEntry, Part, joined_fingerprint
from influence_fast.store.reader import Store, check_dtype
from influence_fast.store.shard_rows import GradientSource, ShardWork, id_of, tokenized
from influence_fast.store.writer import StoreWriter, UniqueIds

if TYPE_CHECKING:
    from influence_fast.data.examples import Example

ON_NONFINITE = ("set_aside", "error")
_SHARD_ROWS = 1024
_SHARD_BYTES = 1 << 28  # in fp32, in memory, while a shard is computed


class Turns(Protocol):
    """Which shards this process computes, in which order, and who hears of it."""

    def shards(self, writer: StoreWriter, sizes: Sequence[tuple[int, int]]) -> Generator[int]:
        """The shards, one after the other; going on means that the last one is done. `sizes`: (examples, tokens or
        characters) of every shard of the store."""
        ...

    def owns(self, index: int) -> bool:
        """Whether shard `index`, computed, is this process's to write."""
        ...

    def advance(self, lengths: Sequence[int]) -> None:
        """Some examples are done, of so many tokens each (0: set aside). May raise KeyboardInterrupt to stop."""
        ...


class FixedTurns:
    """With part=(rank, world) the shards rank, rank + world, ... of those that are not done yet."""

    def __init__(self, part: tuple[int, int] = (0, 1), progress: bool | None = None) -> None:
        self.rank, self.world = part
        self.progress = progress
        self._bar: Callable[[int], None] = lambda count: None

    def shards(self, writer: StoreWriter, sizes: Sequence[tuple[int, int]]) -> Generator[int]:
        mine = [index for index in writer.pending() if index % self.world == self.rank]
        todo = sum(sizes[index][0] for index in mine)
        whole = sum(examples for examples, _ in sizes) if self.world == 1 else todo
        with _progress_bar(self.progress, todo, whole) as self._bar:
            for index in mine:
                if writer.is_done(index):  # by another process on the same folder
                    self._bar(sizes[index][0])
                else:
                    yield index

    def owns(self, index: int) -> bool:
        return True

    def advance(self, lengths: Sequence[int]) -> None:
        self._bar(len(lengths))


def build_store(
    path: str | Path,
    model: nn.Module,
    tokenizer: Any,
    dataset: Sequence[Example] | Held,
    *,
    projection: Projection | None,
    dtype: str = "bf16",
    loss_reduction: str = "mean",
    precision: str = AUTO,
    shard_rows: int | None = None,
    max_tokens: int | None = None,
    max_length: int | None = None,
    truncate: bool = False,
    resume: bool = True,
    progress: bool | None = None,
    on_nonfinite: str = "set_aside",
    gradients: GradientSource | None = None,
) -> Store:
    """Computes the gradient of every example of `dataset` and stores it in the folder `path`.

    Run again after any interruption (kill, full disk, Ctrl-C), it computes only the shards that are not yet
    recorded, and the store comes out bit for bit as if nothing had happened. Shards that were damaged since are
    computed again too, with a warning: every byte that is there is checked first.

    Args:
        path: a new or empty folder, or a store of the same work, finished or not: of this dataset, or joined (by
            `merge_stores`, `append_store`) of stores of its pieces, in its order.
        model: a LoRA model (peft).
        tokenizer: the model's own; None when `dataset` is tokenized already.
        dataset: `data.Example`s; or tokenized examples `{"id", "input_ids", "labels"}` in any form that
            `data.held.as_examples` takes. Ids must be unique; rows without one get their place.
        projection: how a gradient becomes a row; None for exact gradients. A sketch that was fitted is kept in the
            store.
        dtype: "fp32", "bf16" or "int8" (nearest rounding, an fp32 scale a row).
        loss_reduction: "mean" or "sum" over an example's completion tokens.
        precision: "auto" or "fp8", as in `per_example_gradients`; the store records it, and rows of one do not mix with
            rows of the other.
        shard_rows: examples in a shard; by default those of the store that is there, else 1024, or as many as fit 256
            MiB in fp32.
        max_tokens: tokens in one packed batch, as in `per_example_gradients`.
        max_length: longer examples are set aside, or cut when `truncate`.
        resume: go on with an unfinished store in `path`; False makes that an error.
        progress: a progress bar on stderr; by default only when that is a terminal.
        on_nonfinite: "set_aside" reports an example with a NaN or infinite gradient in `store.set_aside` and goes on;
            "error" stops.
        gradients: another source of rows, called as `gradients.iter_gradient_rows`, with `precision` left at "auto".
            Where it does not fill in `losses`, the store has none.

    Returns:
        The finished store, with the examples' losses (as `loss_reduction` has them) beside the rows. `store.set_aside`
        has (id, reason) of every example without a row; a warning sums it up.

    Raises:
        StoreError: `path` holds other work (model, data, projection, ...: the message names the field and both
            sides), ids come twice, or the disk fails; finished shards stay.
        NumericError: a gradient is not finite and `on_nonfinite` is "error".
        DataError, ModelError: as `per_example_gradients`.
        ConfigError: a setting that does not exist, or that does not fit the others or the device.
        KeyboardInterrupt: stopped with Ctrl-C; the message says how much is done.
    """
    writer = build_shards(
        path,
        model,
        tokenizer,
        dataset,
        projection=projection,
        dtype=dtype,
        loss_reduction=loss_reduction,
        precision=precision,
        shard_rows=shard_rows,
        max_tokens=max_tokens,
        max_length=max_length,
        truncate=truncate,
        resume=resume,
        progress=progress,
        on_nonfinite=on_nonfinite,
        gradients=gradients,
    )
    store = writer.finalize()
    warn_of_set_aside(store, sum(part.examples for part in writer.manifest.parts))
    return store


def build_shards(
    path: str | Path,
    model: nn.Module,
    tokenizer: Any,
    dataset: Sequence[Example] | Held,
    *,
    projection: Projection | None,
    dtype: str = "bf16",
    loss_reduction: str = "mean",
    precision: str = AUTO,
    shard_rows: int | None = None,
    max_tokens: int | None = None,
    max_length: int | None = None,
    truncate: bool = False,
    resume: bool = True,
    progress: bool | None = None,
    on_nonfinite: str = "set_aside",
    gradients: GradientSource | None = None,
    part: tuple[int, int] = (0, 1),
    turns: Turns | None = None,
) -> StoreWriter:
    """One process's share of `build_store`: with part=(rank, world), the shards rank, rank + world, ...

    All processes give the same arguments, and either one shared folder (then any of them calls `finalize()` of the
    writer returned, once all are done) or a folder each (then `merge_stores`). With `turns` that says which shards
    are this process's (`distributed.build_distributed` shares them out as they come). Raises as `build_store`.
    """
    rank, world = part
    if not 0 <= rank < world:
        raise ConfigError(f"part must be (rank, world) with 0 <= rank < world, not {part}")
    if on_nonfinite not in ON_NONFINITE:
        raise ConfigError(f"unknown on_nonfinite {on_nonfinite!r}; {did_you_mean(str(on_nonfinite), ON_NONFINITE)}")
    if shard_rows is not None and shard_rows < 1:
        raise ConfigError(f"shard_rows must be at least 1, not {shard_rows}")
    check_dtype(dtype)
    check_precision(precision)
    if gradients is not None and precision != AUTO:
        raise ConfigError(f"precision: {precision!r} is for rows made here, not for another source; leave it at 'auto'")
    dataset = _held(dataset)
    survey = Survey.of(dataset)
    if shard_rows is None and resume and (Path(path) / MANIFEST_NAME).exists():
        shard_rows = Manifest.load(Path(path)).parts[0].shard_rows  # how rows are cut changes none of them
    from influence_fast.gradients.per_example import KeptEngine, iter_gradient_rows

    ours = gradients is None
    if gradients is None:
        gradients = iter_gradient_rows
    manifest = _plan(
        model, tokenizer, survey, projection, dtype, loss_reduction, precision, shard_rows, max_length, truncate
    )
    if resume and (joined := _joined_there(Path(path), dataset)) is not None:
        identity = replace(manifest.identity, dataset_fingerprint=joined_fingerprint(joined))
        manifest = replace(manifest, identity=identity, parts=joined)
    writer = StoreWriter(path, manifest, resume=resume, sketch=None if projection is None else projection.sketch)
    if turns is None and world == 1 and (damaged := writer.drop_damaged()):  # alone on the folder
        warnings.warn(f"computed again: {'; '.join(damaged)}", stacklevel=3)
    ranges = manifest.ranges()
    options: dict[str, Any] = {"projection": projection, "loss_reduction": loss_reduction}
    engine = KeptEngine()
    if ours:
        options |= {"row_dtype": dtype, "precision": precision, "engine": engine}
    turns = FixedTurns(part, progress) if turns is None else turns
    with _interruptible(writer), engine, closing(turns.shards(writer, survey.shard_sizes(ranges))) as shards:
        for index in shards:
            offset, first, last = ranges[index]
            shard = [dataset[offset + i] for i in range(first, last)]
            ids = [id_of(example) for example in shard]
            examples, set_aside = tokenized(shard, tokenizer, max_length, truncate)
            turns.advance([0] * len(set_aside))
            found = writer.partial(index, len(examples)) if ours else None
            work = ShardWork.start(examples, manifest.width, found)
            try:
                work.compute(gradients, model, options, max_tokens, turns.advance)
            except KeyboardInterrupt:
                if ours and work.done and turns.owns(index):
                    writer.keep_partial(index, work.rows, work.losses, work.done)
                raise
            kept, bad = work.finite(gradients, model, options)
            if bad and on_nonfinite == "error":
                names = truncated_list(examples[i]["id"] for i in bad)
                raise NumericError(
                    f"the gradient is NaN or infinite for {names}: look at these examples and the adapter's weights, "
                    'or set them aside (on_nonfinite="set_aside")'
                )
            set_aside += [(examples[i]["id"], "the gradient is NaN or infinite") for i in bad]
            place = {name: i for i, name in enumerate(ids)}
            set_aside.sort(key=lambda item: place[item[0]])
            if turns.owns(index):
                stored = [examples[i]["id"] for i in kept]
                losses = work.losses[kept]
                writer.write_shard(
                    index,
                    stored,
                    work.rows[kept],
                    losses=losses if bool(losses.isfinite().all()) else None,
                    first=first,
                    last=last,
                    set_aside=set_aside,
                    tokens=dataset_fingerprint(examples[i] for i in kept),
                )
    return writer


def _held(dataset: Any) -> Sequence[Any]:
    """Return a dataset of texts as it is, tokenized examples in the one form."""
    if isinstance(dataset, Sequence) and len(dataset) > 0 and not isinstance(dataset[0], Mapping):
        return dataset
    return as_examples(dataset, numbered=True)


def warn_of_set_aside(store: Store, examples: int) -> None:
    """One warning that sums up which of the dataset's `examples` have no row, if any. Raises as `check_some`."""
    check_some(store, examples)
    if store.set_aside:
        warnings.warn(
            f"{len(store.set_aside)} of {examples} examples were set aside and have no row: {_without_row(store)}; "
            "store.set_aside lists them all",
            stacklevel=3,
        )


def check_some(store: Store, examples: int) -> None:
    """DataError where none of the dataset's `examples` has a row."""
    if len(store) == 0 and store.set_aside:
        raise DataError(f"{store.path}: none of {examples} examples has a row: {_without_row(store)}")


def _without_row(store: Store) -> str:
    return truncated_list(f"{name} ({reason})" for name, reason in store.set_aside)


def identity_of(
    model: nn.Module,
    tokenizer: Any = None,
    *,
    projection: Projection | None,
    loss_reduction: str = "mean",
    precision: str = AUTO,
) -> StoreIdentity:
    """What a store built with these carries; give it to `open_store(path, expect=...)` (data left unchecked)."""
    model_hash, adapter_hash = weight_hashes(model)
    return StoreIdentity(
        model_id=_model_id(model),
        model_hash=model_hash,
        adapter_hash=adapter_hash,
        tokenizer_hash=None if tokenizer is None else tokenizer_hash(tokenizer),
        loss_reduction=loss_reduction,
        precision=precision,
        **projection_fields(projection),
    )


def tokenization_of(tokenizer: Any, max_length: int | None, truncate: bool) -> str:
    """How a store's texts became tokens, as its identity has it; `tokenizer` None: they came as tokens."""
    how = f"max_length={max_length}, truncate={truncate}"
    if tokenizer is None:
        return f"as given, {how}"
    from influence_fast.data.tokens import tokenization_hash

    return f"text, {how}, tokens {tokenization_hash(tokenizer)[:16]}"


def _plan(
    model: nn.Module,
    tokenizer: Any,
    survey: Survey,
    projection: Projection | None,
    dtype: str,
    loss_reduction: str,
    precision: str,
    shard_rows: int | None,
    max_length: int | None,
    truncate: bool,
) -> Manifest:
    from influence_fast.gradients.layout import layout_width
    from influence_fast.gradients.targets import gradient_layout

    layout = gradient_layout(model, projection)
    if projection is not None and projection.sketch is not None:
        projection.sketch.check_layout(layout)
    width = layout_width(layout) if projection is None or projection.width is None else projection.width
    if shard_rows is None:
        shard_rows = max(1, min(_SHARD_ROWS, _SHARD_BYTES // (4 * width)))
    texts, fingerprint, examples = survey.texts, survey.fingerprint, len(survey.sizes)
    identity = replace(
        identity_of(
            model,
            tokenizer if texts else None,
            projection=projection,
            loss_reduction=loss_reduction,
            precision=precision,
        ),
        dataset_fingerprint=fingerprint,
        tokenization=tokenization_of(tokenizer if texts else None, max_length, truncate),
    )
    return Manifest(
        identity=identity,
        modules=tuple(ModuleEntry(e.module, e.factor, tuple(e.shape), e.offset) for e in layout),
        dtype=dtype,
        width=width,
        parts=(Part(fingerprint, examples, shard_rows, -(-examples // shard_rows)),),
        source="build_store",
        code_version=influence_fast.__version__,
    )


def _joined_there(folder: Path, dataset: Sequence[Any]) -> tuple[Part, ...] | None:
    """The parts of a store that was joined of stores of the dataset's pieces, in its order; None for any other."""
    if not (folder / MANIFEST_NAME).exists():
        return None
    parts = Manifest.load(folder).parts
    if len(parts) < 2 or sum(part.examples for part in parts) != len(dataset):
        return None
    offset = 0
    for part in parts:
        piece = range(offset, offset + part.examples)
        if dataset_fingerprint(dataset[i] for i in piece) != part.dataset_fingerprint:
            return None
        offset += part.examples
    return parts


@dataclass(frozen=True)
class Survey:
    """What one pass over a dataset finds out, in a few bytes an example."""

    fingerprint: str
    texts: bool  # examples as text, not as tokens
    sizes: np.ndarray  # [N] int64: tokens, or characters of texts

    @classmethod
    def of(cls, dataset: Sequence[Any]) -> Survey:
        """Raises DataError naming the place of an example without an id, or of another kind than the first;
        StoreError naming ids that come twice."""
        texts = len(dataset) > 0 and not isinstance(dataset[0], Mapping)
        sizes, seen = array("q"), UniqueIds()

        def checked() -> Iterator[Any]:
            for place, example in enumerate(dataset):
                check_example(example, place, texts)
                seen.add([id_of(example)])
                sizes.append(len(example.prompt) + len(example.completion) if texts else len(example["input_ids"]))
                yield example

        fingerprint = dataset_fingerprint(checked())
        seen.check(lambda: (id_of(example) for example in dataset), "the dataset")
        return cls(fingerprint, texts, np.array(sizes, dtype=np.int64))

    def shard_sizes(self, ranges: Sequence[tuple[int, int, int]]) -> list[tuple[int, int]]:
        """(examples, sum of their sizes) of each shard, of `Manifest.ranges`."""
        shards = [self.sizes[offset + first : offset + last] for offset, first, last in ranges]
        return [(len(sizes), int(sizes.sum())) for sizes in shards]


def check_example(example: Any, place: int, texts: bool) -> None:
    """Raises DataError for what is no example, or of another kind than the dataset's first."""
    if isinstance(example, Mapping) == texts:
        raise DataError(f"dataset[{place}]: texts and tokenized examples are mixed; give one kind")
    if not texts and not {"id", "input_ids", "labels"} <= example.keys():
        raise DataError(f"dataset[{place}]: a tokenized example is {{'id', 'input_ids', 'labels'}}")
    name = id_of(example)
    if not isinstance(name, str):
        raise DataError(f"dataset[{place}]: its id must be a string, not {name!r}")


def _model_id(model: nn.Module) -> str | None:
    config = getattr(model, "config", None)
    return getattr(config, "_name_or_path", None) or getattr(config, "model_type", None)


@contextmanager
def _interruptible(writer: StoreWriter) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt as stop:
        total = writer.manifest.shard_count
        done = total - len(writer.pending())
        raise type(stop)(f"{done} of {total} shards of {writer.path} are done; run the same again to go on") from None


@contextmanager
def _progress_bar(wanted: bool | None, todo: int, examples: int) -> Iterator[Callable[[int], None]]:
    if not (sys.stderr.isatty() if wanted is None else wanted) or todo == 0:
        yield lambda count: None
        return
    from rich.progress import ProgressColumn
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Any) -> Text:
            return Text("" if task.speed is None else f"{task.speed:.1f} examples/s")

    with bar("gradients", Rate()) as shown:
        task = shown.add_task("gradients", total=examples, completed=examples - todo)
        yield lambda count: shown.advance(task, count)
