"""Builds a gradient store: one row for each training example, shard by shard, so that nothing done is done twice."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import influence_fast
from influence_fast.errors import ConfigError, DataError, ModelError, NumericError, did_you_mean, listing
from influence_fast.fingerprints import dataset_fingerprint, tokenizer_hash, weight_hashes
from influence_fast.projection import Projection
from influence_fast.store import Store, check_dtype
from influence_fast.store_manifest import Manifest, ModuleEntry, Part, StoreIdentity, projection_fields
from influence_fast.store_writer import StoreWriter, check_unique

if TYPE_CHECKING:
    from influence_fast.data import Example

#: As `influence_fast.gradients.iter_gradient_rows`: (model, examples, *, projection, loss_reduction, max_tokens) ->
#: batches of (places in `examples`, rows [n, width]).
GradientSource = Callable[..., Iterator[tuple[list[int], torch.Tensor]]]
#: Told how many examples are now done.
Advance = Callable[[int], None]

ON_NONFINITE = ("set_aside", "error")
_SHARD_ROWS = 1024
_SHARD_BYTES = 1 << 28  # in fp32, in memory, while a shard is computed


def build_store(
    path: str | Path,
    model: nn.Module,
    tokenizer: Any,
    dataset: Sequence[Example | Mapping[str, Any]],
    *,
    projection: Projection | None,
    dtype: str = "bf16",
    loss_reduction: str = "mean",
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
    recorded, and the store comes out bit for bit as if nothing had happened.

    Args:
        path: a new or empty folder, or an unfinished store of the same work.
        model: a LoRA model (peft).
        tokenizer: the model's own; None when `dataset` is tokenized already.
        dataset: `data.Example`s, or tokenized examples `{"id", "input_ids", "labels"}`; ids must be unique.
        projection: how a gradient becomes a row; None for exact gradients.
        dtype: "fp32", "bf16" or "int8" (nearest rounding, an fp32 scale a row).
        loss_reduction: "mean" or "sum" over an example's completion tokens.
        shard_rows: examples in a shard; by default 1024, or as many as fit 256 MiB in fp32.
        max_tokens: tokens in one packed batch, as in `per_example_gradients`.
        max_length: longer examples are set aside, or cut when `truncate`.
        resume: go on with an unfinished store in `path`; False makes that an error.
        progress: a progress bar on stderr; by default only when that is a terminal.
        on_nonfinite: "set_aside" reports an example with a NaN or infinite gradient in `store.set_aside` and goes on;
            "error" stops.
        gradients: another source of rows, called as `gradients.iter_gradient_rows`.

    Returns:
        The finished store. `store.set_aside` has (id, reason) of every example without a row; a warning sums it up.

    Raises:
        StoreError: `path` holds other work (model, data, projection, ...: the message names the field and both
            sides), ids come twice, or the disk fails; finished shards stay.
        NumericError: a gradient is not finite and `on_nonfinite` is "error".
        DataError, ModelError: as `per_example_gradients`.
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
    if store.set_aside:
        names = listing(f"{name} ({reason})" for name, reason in store.set_aside)
        warnings.warn(
            f"{len(store.set_aside)} of {len(dataset)} examples were set aside and have no row: {names}; "
            "store.set_aside lists them all",
            stacklevel=2,
        )
    return store


def build_shards(
    path: str | Path,
    model: nn.Module,
    tokenizer: Any,
    dataset: Sequence[Example | Mapping[str, Any]],
    *,
    projection: Projection | None,
    dtype: str = "bf16",
    loss_reduction: str = "mean",
    shard_rows: int | None = None,
    max_tokens: int | None = None,
    max_length: int | None = None,
    truncate: bool = False,
    resume: bool = True,
    progress: bool | None = None,
    on_nonfinite: str = "set_aside",
    gradients: GradientSource | None = None,
    part: tuple[int, int] = (0, 1),
) -> StoreWriter:
    """One process's share of `build_store`: with part=(rank, world), the shards rank, rank + world, ...

    All processes give the same arguments, and either one shared folder (then any of them calls `finalize()` of the
    writer returned, once all are done) or a folder each (then `merge_stores`). Raises as `build_store`.
    """
    rank, world = part
    if not 0 <= rank < world:
        raise ConfigError(f"part must be (rank, world) with 0 <= rank < world, not {part}")
    if on_nonfinite not in ON_NONFINITE:
        raise ConfigError(f"unknown on_nonfinite {on_nonfinite!r}; {did_you_mean(str(on_nonfinite), ON_NONFINITE)}")
    if shard_rows is not None and shard_rows < 1:
        raise ConfigError(f"shard_rows must be at least 1, not {shard_rows}")
    check_dtype(dtype)
    ids = _ids_of(dataset)
    check_unique(ids, "the dataset")
    if gradients is None:
        from influence_fast.gradients import iter_gradient_rows

        gradients = iter_gradient_rows
    manifest = _plan(model, tokenizer, dataset, projection, dtype, loss_reduction, shard_rows, max_length, truncate)
    writer = StoreWriter(path, manifest, resume=resume)
    shard_rows = manifest.parts[0].shard_rows
    mine = [index for index in writer.pending() if index % world == rank]
    options = {"projection": projection, "loss_reduction": loss_reduction}
    total = sum(_range(index, shard_rows, len(dataset))[2] for index in mine)
    with _interruptible(writer), _progress_bar(progress, total, len(dataset) if world == 1 else total) as advance:
        for index in mine:
            first, last, count = _range(index, shard_rows, len(dataset))
            if writer.is_done(index):  # by another process on the same folder
                advance(count)
                continue
            shard = [dataset[i] for i in range(first, last)]
            examples, set_aside = _tokenized(shard, ids[first:last], tokenizer, max_length, truncate)
            advance(len(set_aside))
            rows = _rows(gradients, model, examples, manifest.width, options, max_tokens, advance)
            kept, bad = _finite(gradients, model, examples, rows, options)
            if bad and on_nonfinite == "error":
                names = listing(examples[i]["id"] for i in bad)
                raise NumericError(
                    f"the gradient is NaN or infinite for {names}: look at these examples and the adapter's weights, "
                    'or set them aside (on_nonfinite="set_aside")'
                )
            set_aside += [(examples[i]["id"], "the gradient is NaN or infinite") for i in bad]
            place = {name: i for i, name in enumerate(ids[first:last])}
            set_aside.sort(key=lambda item: place[item[0]])
            stored = [examples[i]["id"] for i in kept]
            writer.write_shard(index, stored, rows[kept], first=first, last=last, set_aside=set_aside)
    return writer


def identity_of(
    model: nn.Module,
    tokenizer: Any = None,
    *,
    projection: Projection | None,
    loss_reduction: str = "mean",
) -> StoreIdentity:
    """What a store built with these carries; give it to `open_store(path, expect=...)` (data left unchecked)."""
    model_hash, adapter_hash = weight_hashes(model)
    return StoreIdentity(
        model_id=_model_id(model),
        model_hash=model_hash,
        adapter_hash=adapter_hash,
        tokenizer_hash=None if tokenizer is None else tokenizer_hash(tokenizer),
        loss_reduction=loss_reduction,
        **projection_fields(projection),
    )


def _plan(
    model: nn.Module,
    tokenizer: Any,
    dataset: Sequence[Any],
    projection: Projection | None,
    dtype: str,
    loss_reduction: str,
    shard_rows: int | None,
    max_length: int | None,
    truncate: bool,
) -> Manifest:
    from influence_fast.lora import gradient_layout, layout_width

    layout = gradient_layout(model, projection)
    width = layout_width(layout) if projection is None or projection.width is None else projection.width
    if shard_rows is None:
        shard_rows = max(1, min(_SHARD_ROWS, _SHARD_BYTES // (4 * width)))
    texts = len(dataset) > 0 and not isinstance(dataset[0], Mapping)
    fingerprint = dataset_fingerprint(dataset)
    identity = replace(
        identity_of(model, tokenizer if texts else None, projection=projection, loss_reduction=loss_reduction),
        dataset_fingerprint=fingerprint,
        tokenization=f"{'text' if texts else 'as given'}, max_length={max_length}, truncate={truncate}",
    )
    return Manifest(
        identity=identity,
        modules=tuple(ModuleEntry(e.module, e.factor, tuple(e.shape), e.offset) for e in layout),
        dtype=dtype,
        width=width,
        parts=(Part(fingerprint, len(dataset), shard_rows, -(-len(dataset) // shard_rows)),),
        source="build_store",
        code_version=influence_fast.__version__,
    )


def _ids_of(dataset: Sequence[Any]) -> list[str]:
    ids = []
    for place, example in enumerate(dataset):
        if isinstance(example, Mapping) != isinstance(dataset[0], Mapping):
            raise DataError(f"dataset[{place}]: texts and tokenized examples are mixed; give one kind")
        if isinstance(example, Mapping) and not {"id", "input_ids", "labels"} <= example.keys():
            raise DataError(f"dataset[{place}]: a tokenized example is {{'id', 'input_ids', 'labels'}}")
        name = example["id"] if isinstance(example, Mapping) else getattr(example, "id", None)
        if not isinstance(name, str):
            raise DataError(f"dataset[{place}]: its id must be a string, not {name!r}")
        ids.append(name)
    return ids


def _range(index: int, shard_rows: int, examples: int) -> tuple[int, int, int]:
    first, last = index * shard_rows, min((index + 1) * shard_rows, examples)
    return first, last, last - first


def _tokenized(
    shard: list[Any], ids: list[str], tokenizer: Any, max_length: int | None, truncate: bool
) -> tuple[list[dict[str, Any]], list[tuple[str, str]]]:
    """The shard's examples that have a gradient, tokenized, and (id, reason) of the others."""
    set_aside: dict[str, str] = {}
    if shard and not isinstance(shard[0], Mapping):
        from influence_fast.data import tokenize

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
            cut = {name: torch.as_tensor(example[name])[:max_length] for name in ("input_ids", "labels")}
            examples.append({**example, **cut})
    for example in examples:
        if not bool((example["labels"][1:] != -100).any()):
            set_aside[example["id"]] = "no completion token to learn from"
    kept = [example for example in examples if example["id"] not in set_aside]
    found = {example["id"] for example in kept}
    for name in ids:
        if name not in found:
            set_aside.setdefault(name, "not tokenized")
    return kept, list(set_aside.items())


def _rows(
    gradients: GradientSource,
    model: nn.Module,
    examples: list[dict[str, Any]],
    width: int,
    options: dict[str, Any],
    max_tokens: int | None,
    advance: Advance,
) -> torch.Tensor:
    """(E, width) fp32, in the examples' order."""
    rows = torch.full((len(examples), width), torch.nan)
    missing = set(range(len(examples)))
    if examples:
        for places, batch in gradients(model, examples, **options, max_tokens=max_tokens):
            if batch.shape != (len(places), width):
                raise ModelError(
                    f"the gradient source gave rows {tuple(batch.shape)} for {len(places)} examples of width {width}; "
                    "its layout must be gradient_layout(model, projection)"
                )
            rows[places] = batch.to("cpu", torch.float32)
            missing.difference_update(places)
            advance(len(places))
    if missing:
        names = listing(examples[i]["id"] for i in sorted(missing))
        raise ModelError(f"the gradient source gave no row for {names}; it must give one for each example")
    return rows


def _finite(
    gradients: GradientSource,
    model: nn.Module,
    examples: list[dict[str, Any]],
    rows: torch.Tensor,
    options: dict[str, Any],
) -> tuple[list[int], list[int]]:
    """Places of finite and of other rows. A NaN may come from a neighbour in the pack (0 * NaN in masked attention),
    so each suspect is computed once more, in a pack of its own, and `rows` is mended in place."""
    suspects = (~torch.isfinite(rows).all(dim=1)).nonzero().flatten().tolist()
    if suspects:
        alone = _rows(gradients, model, [examples[i] for i in suspects], rows.shape[1], options, 1, lambda _: None)
        rows[suspects] = alone
    finite = torch.isfinite(rows).all(dim=1)
    return finite.nonzero().flatten().tolist(), (~finite).nonzero().flatten().tolist()


def _model_id(model: nn.Module) -> str | None:
    config = getattr(model, "config", None)
    return getattr(config, "_name_or_path", None) or getattr(config, "model_type", None)


@contextmanager
def _interruptible(writer: StoreWriter) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        total = writer.manifest.shard_count
        done = total - len(writer.pending())
        raise KeyboardInterrupt(
            f"stopped: {done} of {total} shards of {writer.path} are done; run the same build again to go on"
        ) from None


@contextmanager
def _progress_bar(wanted: bool | None, todo: int, examples: int) -> Iterator[Advance]:
    if not (sys.stderr.isatty() if wanted is None else wanted) or todo == 0:
        yield lambda count: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Any) -> Text:
            return Text("" if task.speed is None else f"{task.speed:.1f} examples/s")

    columns = (TextColumn("gradients"), BarColumn(), MofNCompleteColumn(), Rate(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("gradients", total=examples, completed=examples - todo)
        yield lambda count: bar.advance(task, count)
