"""Influence along a training by transformers' `Trainer` or trl's `SFTTrainer`, which goes on as if it were alone.

At each moment the gradients of the validation examples are taken with the adapter as it is then, averaged over each
group, and multiplied with the gradient of every training example (`stream_influence`). Nothing of the training is
changed: see `training.undisturbed`.
"""

from __future__ import annotations

import json
import logging
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback, TrainerControl
from transformers.trainer_callback import CallbackHandler

from influence_fast.atomic import replacing
from influence_fast.data.held import Held, as_examples
from influence_fast.data.packing import check_examples, example_name, teaches
from influence_fast.errors import ConfigError, DataError, NumericError, shown, truncated_list, warn_once
from influence_fast.gradients.per_example import iter_gradient_rows
from influence_fast.gradients.rows.projection import EXACT
from influence_fast.gradients.rows.row_spec import RowSpec
from influence_fast.gradients.streaming import stream_influence
from influence_fast.influence.building import build_store
from influence_fast.influence.moment_record import check_record, keep_record, record_of
from influence_fast.influence.scores import ScoreTable
from influence_fast.influence.trained_rows import TrainedRows
from influence_fast.products.inner_products import inner_products
from influence_fast.statistics.ranks import average_ranks
from influence_fast.store.building import BuildOptions
from influence_fast.training.undisturbed import random_states_kept, undisturbed

logger = logging.getLogger(__name__)

EPOCH = "epoch"
FOLDER = "influence"
_GROUP = "validation"


class InfluenceCallback(TrainerCallback):
    """Score the training examples by their influence on validation examples, every so often along a training.

    Give it to transformers' `Trainer`, trl's `SFTTrainer` or `finetune` among its `callbacks`. The training itself is
    unchanged to the bit. Scores are of the cross entropy of the labels, without dropout, label smoothing or embedding
    noise. Positive: more of the example lowers the loss of the validation group.

    Args:
        validation: tokenized examples in any form that `data.held.as_examples` takes, or a mapping of groups' names to
            such examples; a single group is called "validation".
        every: optimizer steps from one moment to the next, or "epoch" for the end of each epoch. The end of the
            training is a moment in any case; None makes it the only one.
        store: a folder in which each moment keeps a gradient store `step-N` of the training examples, and beside it
            the gradients of the validation examples, to be scored with any preconditioner afterwards. The scores are
            then products of these rows; by default they are exact, and no gradient is kept.
        examples: what is scored, as `validation`; by default what the trainer trains on, as its collator makes it.
        output: folder for the scores, a file `step-N.parquet` a moment (see `ScoreTable.load`); by default `influence`
            in the trainer's `output_dir`.
        spec: how rows are made (see `RowSpec`): `loss_reduction`, `precision`, `max_tokens` and `target` count always,
            the others for a store.
        apply: what is done to the group gradients [G, k] before the products, such as a preconditioner's `apply`.

    Attributes:
        scores: `ScoreTable` by optimizer step, with columns `s_<group>` and `rank_<group>` (1 = lowest).
        stores: folder by optimizer step, where `store` was given.

    Of each group the mean score and the share of harmful examples (below 0) are logged, as
    `influence_<group>_mean` and `influence_<group>_harmful`, to wherever the trainer reports.

    Raises, when the training begins: ConfigError (several processes, DeepSpeed or FSDP; a setting that does not exist),
    DataError (training examples that cannot be read again, or malformed ones), ModelError (no LoRA adapter).

    Example:
        >>> callback = inf.InfluenceCallback(validation, every=100)  # doctest: +SKIP
        >>> trainer = SFTTrainer(model, args, train_dataset=data, callbacks=[callback])  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP
        >>> callback.scores[100].sort("s_validation", ascending=True)  # doctest: +SKIP
    """

    def __init__(
        self,
        validation: Held | Mapping[str, Held],
        *,
        every: int | str | None = EPOCH,
        store: str | Path | None = None,
        examples: Held | None = None,
        output: str | Path | None = None,
        spec: RowSpec | None = None,
        apply: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        steps = isinstance(every, int) and not isinstance(every, bool) and every > 0
        if not (every is None or every == EPOCH or steps):
            raise ConfigError(
                f'every is {shown(every)}: give optimizer steps (1 or more), "epoch", or None for the end'
            )
        if apply is not None and store is not None:
            raise ConfigError(
                "apply is of no use with store=, whose rows are scored with any preconditioner afterwards"
            )
        if spec is not None and not isinstance(spec, RowSpec):
            raise ConfigError(f"spec is a {type(spec).__name__}; give inf.RowSpec(...)")
        if apply is not None and not callable(apply):
            raise ConfigError(f"apply is a {type(apply).__name__}; give a function of group gradients [G, k]")
        self.every = every
        self.spec = spec or RowSpec()
        self.apply = apply
        self.output = None if output is None else Path(output)
        self.store = None if store is None else Path(store)
        # reading a shuffled DataLoader draws a random number, and the training would get another one
        with random_states_kept():
            self._queries, self._groups = _queries_of(validation)
            self._given = None if examples is None else as_examples(examples, numbered=True)
        self.scores: dict[int, ScoreTable] = {}
        self.stores: dict[int, Path] = {}
        self._examples: Sequence[dict[str, Any]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check all that can go wrong, before hours of training."""
        _check_one_process(args)
        if self.output is None:
            self.output = Path(args.output_dir) / FOLDER
        self.scores, self.stores = {}, {}
        with undisturbed(kwargs["model"]):
            rows = TrainedRows.of(kwargs["train_dataloader"]) if self._given is None else self._given
            self._examples = _scorable(rows)
            ((_, first),) = self._batches(kwargs["model"], self._queries[:1], self._exact)
            groups = self._applied(first.expand(len(self._groups), -1))
            self._stream(kwargs["model"], self._examples[:1], groups)
        self._make_room(int(state.global_step))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Score where the step is one of every so many."""
        if isinstance(self.every, int) and state.global_step % self.every == 0:
            self._score(args, state, kwargs["model"])

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Score at the end of an epoch, or of the training: afterwards another checkpoint may be loaded."""
        if self.every == EPOCH or control.should_training_stop or state.global_step >= state.max_steps:
            self._score(args, state, kwargs["model"])

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Score what the training has ended with, where an evaluation ended it after the epoch."""
        if not args.load_best_model_at_end:
            self._score(args, state, kwargs["model"])

    @property
    def _exact(self) -> RowSpec:
        """Return how whole gradients are made, with the settings of `spec` that count for them."""
        kept = {n: getattr(self.spec, n) for n in ("loss_reduction", "precision", "max_tokens", "target")}
        return RowSpec(EXACT, dtype="fp32", **kept)

    def _score(self, args: Any, state: Any, model: Any) -> None:
        """Score the training examples with the model as it is, unless this step has been scored."""
        step = int(state.global_step)
        if step in self.scores or step == 0:
            return
        with undisturbed(model):
            products, ids = self._products(model, step)
        columns: dict[str, np.ndarray] = {}
        for g, name in enumerate(self._groups):
            columns[f"s_{name}"] = products[:, g]
            columns[f"rank_{name}"] = average_ranks(products[:, g])
        table = ScoreTable(ids, columns)
        assert self.output is not None
        table.save(self.output / f"step-{step:06d}.parquet")
        self.scores[step] = table
        logs: dict[str, float] = {}
        for name in self._groups:
            logs[f"influence_{name}_mean"] = float(table[f"s_{name}"].mean())
            logs[f"influence_{name}_harmful"] = float((table[f"s_{name}"] < 0).mean())
        _log(args, state, logs)

    def _products(self, model: Any, step: int) -> tuple[np.ndarray, list[str]]:
        """Return float64 scores [N, G] and the ids of their rows."""
        if self.store is not None:
            return self._stored(model, self.store / f"step-{step:06d}")
        groups = self._applied(self._group_gradients(model))
        scores = self._stream(model, self._examples, groups)
        return scores.double().cpu().numpy(), [str(example["id"]) for example in self._examples]

    def _applied(self, groups: torch.Tensor) -> torch.Tensor:
        """Return what `apply` makes of the group gradients [G, k]. Raises DataError where it is of another shape."""
        found = groups if self.apply is None else self.apply(groups)
        shape = tuple(getattr(found, "shape", ()))
        if shape != tuple(groups.shape):
            raise DataError(f"apply made {shape} of group gradients {tuple(groups.shape)}; it must keep their shape")
        return found

    def _stored(self, model: Any, folder: Path) -> tuple[np.ndarray, list[str]]:
        """Keep the rows of all training examples in `folder`, and those of the queries beside it."""
        from safetensors.torch import save_file

        store = build_store(folder, model, self._examples, self.spec, options=BuildOptions(progress=False))
        rows = torch.empty(len(self._queries), store.width)
        for places, found in self._batches(model, self._queries, replace(store.spec, dtype="fp32")):
            rows[places] = found.float()
        with replacing(folder.with_name(f"{folder.name}.queries.safetensors")) as temporary:
            save_file({"rows": rows}, temporary, {"groups": json.dumps(self._groups)})
        self.stores[_step_of(folder)] = folder
        groups = torch.stack([rows[members].mean(0) for members in self._groups.values()])
        return np.asarray(inner_products(store, groups), np.float64), list(store.ids)

    def _batches(
        self, model: Any, queries: Sequence[dict[str, Any]], spec: RowSpec
    ) -> Iterator[tuple[list[int], torch.Tensor]]:
        """Yield gradients of `queries`, a pack at a time: places, rows [n, k] on the host. Raises NumericError."""
        for places, rows in iter_gradient_rows(model, queries, spec):
            finite = rows.isfinite().all(dim=1).tolist()
            strange = [example_name(queries[i], i) for i, ok in zip(places, finite, strict=True) if not ok]
            if strange:
                raise NumericError(
                    f"the gradient is NaN or infinite for the validation examples {truncated_list(strange)}: lower the "
                    "learning rate, or leave them out"
                )
            yield places, rows

    def _group_gradients(self, model: Any) -> torch.Tensor:
        """Return the mean exact gradient of each group [G, k] on the host.

        Summed up pack by pack in fp64: exact rows of hundreds of validation examples would be gigabytes.
        """
        shares = torch.zeros(len(self._groups), len(self._queries), dtype=torch.float64)
        for g, members in enumerate(self._groups.values()):
            shares[g, members] = 1 / len(members)
        total, dtype = torch.zeros(()), torch.float32
        for places, rows in self._batches(model, self._queries, self._exact):
            total, dtype = total + shares[:, places] @ rows.double(), rows.dtype
        return total.to(dtype)

    def _stream(self, model: Any, examples: Sequence[dict[str, Any]], queries: torch.Tensor) -> torch.Tensor:
        return stream_influence(model, examples, queries, self._exact)

    def _make_room(self, begun: int) -> None:
        """Take up the moments of a training that goes on at step `begun`; later ones are of steps that it makes again.

        A training from its beginning replaces the scores of another one, and not its stores.
        """
        assert self.output is not None
        for folder in (self.output, self.store):
            if folder is not None and folder.exists() and not folder.is_dir():
                raise ConfigError(f"{folder} is a file, and scores are kept in a folder: give another one")
        if begun > 0 and any(_step_of(path) <= begun for path in self.output.glob("step-*.parquet")):
            self.check_kept(self.output, "give another output, or delete it")
        if begun == 0 and self.store is not None and (there := sorted(self.store.glob("step-*"))):
            raise ConfigError(
                f"{self.store} holds {there[0].name} of another training: delete it, or give another folder as store"
            )
        for path in self.output.glob("step-*.parquet"):
            if (step := _step_of(path)) > begun:
                path.unlink()
            else:
                self.scores[step] = ScoreTable.load(path)
        for path in sorted(self.store.glob("step-*")) if self.store is not None else []:
            if path.is_dir() and _step_of(path) <= begun:
                self.stores[_step_of(path)] = path
            elif path.is_dir():
                shutil.rmtree(path)
            elif _step_of(path) > begun:
                path.unlink()
        self.scores = dict(sorted(self.scores.items()))
        keep_record(self.output, self._record)

    def check_kept(self, folder: Path, remedy: str) -> None:
        """Raise ConfigError, with a remedy, where the scores kept in `folder` are by other validation examples."""
        check_record(folder, self._record, remedy)

    @property
    def _record(self) -> dict[str, Any]:
        spec = self._exact if self.store is None else self.spec
        return record_of(self._queries, self._groups, spec, applied=self.apply is not None)


def _step_of(path: Path) -> int:
    """Return the optimizer step in the name of a moment's file or folder. Raises DataError for another name."""
    number = path.name.partition(".")[0].removeprefix("step-")
    if not number.isdecimal():
        raise DataError(f"{path} is named as a moment of an influence callback, and is none: move it away")
    return int(number)


def _queries_of(validation: Any) -> tuple[list[dict[str, Any]], dict[str, list[int]]]:
    """Return the validation examples, and the places of each group in them. Raises DataError."""
    named = isinstance(validation, Mapping) and "input_ids" not in validation
    groups = dict(validation) if named else {_GROUP: validation}
    queries: list[dict[str, Any]] = []
    places: dict[str, list[int]] = {}
    for name, held in groups.items():
        found = list(as_examples(held))
        if not found:
            raise DataError(f"the validation group {name!r} has no example")
        if str(name) in places:
            raise DataError(f"two validation groups are called {str(name)!r}; name them apart")
        places[str(name)] = list(range(len(queries), len(queries) + len(found)))
        queries += found
    if not queries:
        raise DataError("there is no validation example to score against")
    check_examples(queries)
    return queries, places


def _scorable(rows: Sequence[dict[str, Any]]) -> Sequence[dict[str, Any]]:
    """Return the training examples that have a gradient; the others are said. Raises DataError."""
    names: set[str] = set()
    without: list[str] = []
    live: list[int] = []
    for place, row in enumerate(rows):
        name = str(row["id"])
        if name in names:
            raise DataError(f"the id {name!r} comes twice among the training examples; make ids unique")
        names.add(name)
        if teaches(row["labels"]):
            live.append(place)
        else:
            without.append(name)
    if without:
        warn_once(
            logger,
            f"training examples without a token to learn from have no influence score: {truncated_list(without)}",
        )
    if not live:
        raise DataError("no training example has a token to learn from (every label is -100)")
    chosen = rows if not without else Chosen(rows, live)
    check_examples(chosen)
    return chosen


class Chosen(Sequence[dict[str, Any]]):
    """Some rows of a sequence, read when they are asked for."""

    def __init__(self, rows: Sequence[dict[str, Any]], places: list[int]) -> None:
        self._rows = rows
        self._places = places

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return [self._rows[i] for i in self._places[place]]
        return self._rows[self._places[place]]


def _check_one_process(args: Any) -> None:
    """Raise ConfigError where the model is spread over processes, or others wait for this one."""
    if args.world_size > 1 or getattr(args, "deepspeed", None) or getattr(args, "fsdp", None):
        raise ConfigError(
            "InfluenceCallback scores in one process, and this training has several, DeepSpeed or FSDP: save "
            "checkpoints (save_steps), and score each with inf.stream_influence, or by influence-fast build in as many "
            "processes"
        )


def _log(args: Any, state: Any, logs: dict[str, float]) -> None:
    """Write numbers to wherever the trainer reports.

    Not by `Trainer.log`: trl's averages and empties what has been measured since the last log, so that the training's
    own numbers would change, and the trainer would then leave out its own log of this step.
    """
    logs = {**logs, "epoch": float(state.epoch or 0.0)}
    state.log_history.append({**logs, "step": state.global_step})
    handler = _handler()
    if handler is not None:
        handler.call_event("on_log", args, state, TrainerControl(), logs=logs)


def _handler() -> CallbackHandler | None:
    """Return the handler whose event this is: it is not among what a callback is given."""
    frame = sys._getframe(1)
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, CallbackHandler):
            return caller
        frame = frame.f_back  # type: ignore[assignment]
    return None
