"""Builds a gradient store: one row for each training example, shard by shard, so that nothing done is done twice."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from influence_fast.data.fingerprints import dataset_fingerprint
from influence_fast.data.held import Held
from influence_fast.deprecation import OldCall, also_called_as, moved
from influence_fast.errors import ConfigError, DataError, ModelError, NumericError, did_you_mean, truncated_list
from influence_fast.gradients.per_example import KeptEngine
from influence_fast.gradients.rows.precision import AUTO
from influence_fast.gradients.rows.projection import Projection
from influence_fast.gradients.rows.row_spec import RowSpec
from influence_fast.store.manifest import MANIFEST_NAME, Manifest
from influence_fast.store.planning import plan, with_parts_there
from influence_fast.store.reader import Store
from influence_fast.store.shard_rows import GradientSource, RowMaker, ShardWork, Texts, id_of, tokenized
from influence_fast.store.survey import Survey, held
from influence_fast.store.turns import FixedTurns, Turns
from influence_fast.store.writer import StoreWriter

if TYPE_CHECKING:
    from influence_fast.data.examples import Example

ON_NONFINITE = ("set_aside", "error")


@dataclass(frozen=True)
class BuildOptions:
    """Say how a store is built, where that is not said by how its rows are made.

    shard_rows: examples in a shard; by default those of the store that is there, else 1024, or as many as fit 256 MiB
        in fp32.
    resume: go on with an unfinished store; False makes that an error.
    progress: a progress bar on stderr; by default only when that is a terminal.
    on_nonfinite: "set_aside" reports an example with a NaN or infinite gradient in `store.set_aside` and goes on;
        "error" stops.
    gradients: another source of rows, called as `iter_gradient_rows` is: (model, examples, spec=...), with the
        precision left at "auto". Where it does not fill in `losses`, the store has none.
    part: (rank, world): of `build_shards`, which computes the shards rank, rank + world, ...

    Raises ConfigError for values that do not exist.

    Example:
        >>> inf.BuildOptions(shard_rows=256, on_nonfinite="error").resume
        True
    """

    shard_rows: int | None = None
    resume: bool = True
    progress: bool | None = None
    on_nonfinite: str = "set_aside"
    gradients: GradientSource | None = None
    part: tuple[int, int] = (0, 1)

    def __post_init__(self) -> None:
        whole = isinstance(self.part, tuple) and all(isinstance(number, int) for number in self.part)
        if not whole or len(self.part) != 2 or not 0 <= self.part[0] < self.part[1]:
            raise ConfigError(f"part must be (rank, world) with 0 <= rank < world, not {self.part}")
        if self.on_nonfinite not in ON_NONFINITE:
            raise ConfigError(
                f"unknown on_nonfinite {self.on_nonfinite!r}; {did_you_mean(str(self.on_nonfinite), ON_NONFINITE)}"
            )
        rows = self.shard_rows
        if rows is not None and (not isinstance(rows, int) or isinstance(rows, bool) or rows < 1):
            raise ConfigError(f"shard_rows must be a whole number of at least 1, not {rows!r}")
        if self.gradients is not None and not callable(self.gradients):
            raise ConfigError(f"gradients must be a function as iter_gradient_rows is, not {self.gradients!r}")


DEFAULT_SPEC = RowSpec()
DEFAULT_OPTIONS = BuildOptions()


@dataclass(frozen=True)
class ShardBuild:
    """A store in the making: its writer, and all that its shards are computed from."""

    writer: StoreWriter
    dataset: Sequence[Any]
    survey: Survey
    texts: Texts
    rows: RowMaker
    on_nonfinite: str

    @classmethod
    def open(
        cls,
        path: str | Path,
        model: nn.Module,
        dataset: Sequence[Any],
        spec: RowSpec,
        texts: Texts,
        options: BuildOptions,
    ) -> ShardBuild:
        """Read over a dataset (of `survey.held`) and begin its store in `path`, or go on with it.

        Raises as `build_store`, and ConfigError for a spec whose sketch has yet to be fitted.
        """
        if not spec.is_settled:
            raise ConfigError(
                f"sketch: {spec.sketch!r} is fitted before shards are built: give "
                "spec.with_projection(fit_projection(model, data, spec)), or sketch='random'"
            )
        if options.gradients is not None and spec.precision != AUTO:
            raise ConfigError(
                f"precision: {spec.precision!r} is for rows made here, not for another source; leave it at 'auto'"
            )
        survey = Survey.of(dataset)
        folder, shard_rows = Path(path), options.shard_rows
        if shard_rows is None and options.resume and (folder / MANIFEST_NAME).exists():
            shard_rows = Manifest.load(folder).parts[0].shard_rows  # how rows are cut changes none of them
        manifest = plan(model, survey, spec, texts, shard_rows)
        if options.resume:
            manifest = with_parts_there(manifest, folder, dataset)
        projection = spec.projection()
        sketch = None if projection is None else projection.sketch
        writer = StoreWriter(path, manifest, resume=options.resume, sketch=sketch)
        rows = RowMaker.of(model, spec, options.gradients)
        return cls(writer, dataset, survey, texts, rows, options.on_nonfinite)

    @property
    def examples(self) -> int:
        """Return how many examples the dataset has."""
        return sum(part.examples for part in self.writer.manifest.parts)

    def run(self, turns: Turns) -> None:
        """Compute and write the shards that `turns` gives this process. Raises as `build_store`."""
        ranges = self.writer.manifest.ranges()
        with (
            _interruptible(self.writer),
            KeptEngine() as engine,
            closing(turns.shards(self.writer, self.survey.shard_sizes(ranges))) as shards,
        ):
            rows = self.rows.keeping(engine)
            for index in shards:
                self._compute(index, ranges[index], rows, turns)

    def _compute(self, index: int, place: tuple[int, int, int], rows: RowMaker, turns: Turns) -> None:
        """Compute one shard and write it, where it is this process's to write."""
        writer = self.writer
        offset, first, last = place
        shard = [self.dataset[offset + i] for i in range(first, last)]
        ids = [id_of(example) for example in shard]
        examples, set_aside = tokenized(shard, self.texts)
        turns.advance([0] * len(set_aside))
        found = writer.partial(index, len(examples)) if rows.ours else None
        work = ShardWork.start(examples, writer.manifest.width, found)
        try:
            work.compute(rows, turns.advance)
        except KeyboardInterrupt:
            if rows.ours and work.done and turns.owns(index):
                writer.keep_partial(index, work.rows, work.losses, work.done)
            raise
        kept, bad = work.finite(rows)
        if bad and self.on_nonfinite == "error":
            names = truncated_list(examples[i]["id"] for i in bad)
            raise NumericError(
                f"the gradient is NaN or infinite for {names}: look at these examples and the adapter's weights, "
                'or set them aside (on_nonfinite="set_aside")'
            )
        set_aside += [(examples[i]["id"], "the gradient is NaN or infinite") for i in bad]
        order = {name: i for i, name in enumerate(ids)}
        set_aside.sort(key=lambda item: order[item[0]])
        if not turns.owns(index):
            return
        losses = work.losses[kept]
        writer.write_shard(
            index,
            [examples[i]["id"] for i in kept],
            work.rows[kept],
            losses=losses if bool(losses.isfinite().all()) else None,
            first=first,
            last=last,
            set_aside=set_aside,
            tokens=dataset_fingerprint(examples[i] for i in kept),
        )


def check_call(model: Any, spec: Any, options: Any) -> None:
    """Raise ConfigError or ModelError for arguments in each other's place, as in the order of calls before."""
    if isinstance(spec, Projection):
        raise ConfigError("spec is a Projection: give RowSpec.of(projection, dtype=...)")
    for name, value, kind in (("spec", spec, RowSpec), ("options", options, BuildOptions)):
        if not isinstance(value, kind):
            raise ConfigError(
                f"{name} is a {type(value).__name__}, not a {kind.__name__}: the order is (path, model, data, spec, "
                "tokenizer=..., options=...)"
            )
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"the model is a {type(model).__name__}, not a torch module: give what inf.load_model returns, in the "
            "order (path, model, data, spec)"
        )


#: Keywords that say how rows are made or a store is built, before there were specs and options.
_OF_SPEC = ("dtype", "loss_reduction", "precision", "max_tokens")
_OF_OPTIONS = ("shard_rows", "resume", "progress", "on_nonfinite", "gradients", "part")


def old_build(instead: str, *more: str) -> OldCall:
    """Return how `build_store` and `build_shards` were called before.

    more: keywords beside those that both had.
    """
    return OldCall(
        positional=("path", "model", "tokenizer", "dataset"),
        keywords=("projection", "max_length", "truncate", *_OF_SPEC, *(k for k in _OF_OPTIONS if k != "part"), *more),
        marks=("projection",),
        translate=translated_build,
        instead=instead,
    )


def translated_build(values: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of an old call as `spec`, `options` and `data`."""
    if "dataset" not in values:
        raise TypeError("a store is built of a dataset; give it as `data`")
    spec = RowSpec.of(values.pop("projection"), **moved(values, _OF_SPEC))
    options = BuildOptions(**moved(values, _OF_OPTIONS))
    return {"data": values.pop("dataset"), "spec": spec, "options": options, **values}


@also_called_as(old_build("build_shards(path, model, data, spec, tokenizer=..., options=BuildOptions(...))", "part"))
def build_shards(
    path: str | Path,
    model: nn.Module,
    data: Sequence[Example] | Held,
    spec: RowSpec = DEFAULT_SPEC,
    *,
    tokenizer: Any = None,
    max_length: int | None = None,
    truncate: bool = False,
    options: BuildOptions = DEFAULT_OPTIONS,
) -> StoreWriter:
    """Compute one process's share of `build_store`.

    With `options.part` (rank, world) these are the shards rank, rank + world, ... All processes give the same
    arguments, and either one shared folder (then any of them calls `finalize()` of the writer returned, once all are
    done) or a folder each (then `merge_stores`). A sketch is fitted before, by one of them:
    `spec.with_projection(fit_projection(model, data, spec))`. Raises as `build_store`.
    """
    check_call(model, spec, options)
    build = _own_shards(path, model, held(data), spec, Texts(tokenizer, max_length, truncate), options)
    return build.writer


def build_rows(
    path: str | Path,
    model: nn.Module,
    dataset: Sequence[Any],
    spec: RowSpec,
    texts: Texts,
    options: BuildOptions = DEFAULT_OPTIONS,
) -> Store:
    """Build the store of a dataset (of `survey.held`) whose spec's sketch is settled. Raises as `build_store`."""
    build = _own_shards(path, model, dataset, spec, texts, options)
    store = build.writer.finalize()
    warn_of_set_aside(store, build.examples)
    store.built_of = dataset, texts
    return store


def _own_shards(
    path: str | Path, model: nn.Module, dataset: Sequence[Any], spec: RowSpec, texts: Texts, options: BuildOptions
) -> ShardBuild:
    build = ShardBuild.open(path, model, dataset, spec, texts, options)
    if options.part[1] == 1 and (damaged := build.writer.drop_damaged()):  # alone on the folder
        warnings.warn(f"computed again: {'; '.join(damaged)}", stacklevel=4)
    build.run(FixedTurns(options.part, options.progress))
    return build


def warn_of_set_aside(store: Store, examples: int) -> None:
    """Warn once with a sum of which of the dataset's `examples` have no row, if any. Raises as `check_some`."""
    check_some(store, examples)
    if store.set_aside:
        warnings.warn(
            f"{len(store.set_aside)} of {examples} examples were set aside and have no row: {_without_row(store)}; "
            "store.set_aside lists them all",
            stacklevel=3,
        )


def check_some(store: Store, examples: int) -> None:
    """Raise DataError where none of the dataset's `examples` has a row."""
    if len(store) == 0 and store.set_aside:
        raise DataError(f"{store.path}: none of {examples} examples has a row: {_without_row(store)}")


def _without_row(store: Store) -> str:
    return truncated_list(f"{name} ({reason})" for name, reason in store.set_aside)


@contextmanager
def _interruptible(writer: StoreWriter) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt as stop:
        total = writer.manifest.shard_count
        done = total - len(writer.pending())
        raise type(stop)(f"{done} of {total} shards of {writer.path} are done; run the same again to go on") from None
