"""Ways of making influence scores, by name: what `validate` compares and `plan` chooses from.

A method is a preconditioner together with everything that makes it cheaper: how gradients are projected and stored,
which layers and how much of a trace they see, one adapter or all saved checkpoints, the model itself or a smaller one.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from influence_fast.data.packing import IGNORED
from influence_fast.errors import ConfigError, DataError, did_you_mean, truncated_list
from influence_fast.gradients.per_example import per_example_losses
from influence_fast.gradients.rows.row_spec import RowSpec
from influence_fast.influence.damping import Damping
from influence_fast.influence.fisher_rows import fisher_folders
from influence_fast.influence.pool_gradients import pool_gradients
from influence_fast.influence.preconditioners import FROM_DATA, PRECONDITIONERS
from influence_fast.influence.recipe import Recipe
from influence_fast.influence.settings import WHOLE, InfluenceConfig
from influence_fast.settings import in_section
from influence_fast.timing import timed
from influence_fast.training.fine_tuning import finetuned


@dataclass(frozen=True)
class Method:
    """One way of scoring. What it does not say is as in `RowSpec` and `InfluenceConfig`.

    fisher, fisher_examples: what the preconditioner is fitted on (see `InfluenceConfig`).
    projection: kind, or "none" for exact gradients; dim, width, layers: see `Projection`. sketch, sketch_examples: how
    rows get to that width (see `RowSpec`). store_dtype: fp32, bf16 or int8. tokens: share of each trace's
    completion tokens that is kept, from its start. checkpoints: sum over the reference's saved checkpoints, weighted by
    learning rate (TracIn), in place of its final adapter alone. moments: second moments of the reference's optimizer,
    for "adam" and "less". proxy: folder or hub id of a smaller model that is fine-tuned on the same pool, as the
    reference was, and scores in its place. loss: no influence at all, the example's loss under the reference (the
    perplexity baseline).
    """

    name: str
    preconditioner: str = "ekfac_cosine"
    damping: Damping = InfluenceConfig.damping
    fisher: str = InfluenceConfig.fisher
    fisher_examples: int = InfluenceConfig.fisher_examples
    projection: str = RowSpec.kind
    dim: int = RowSpec.dim
    width: int | None = RowSpec.width
    layers: float = RowSpec.layers
    sketch: str = "auto"
    sketch_examples: int = RowSpec.sketch_examples
    store_dtype: str = RowSpec.dtype
    tokens: float = 1.0
    checkpoints: bool = False
    moments: bool = False
    proxy: str | None = None
    loss: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.tokens <= 1:
            raise ConfigError(f"method {self.name}: tokens is {self.tokens}; it is a share, above 0 and at most 1")
        if self.moments and self.preconditioner in PRECONDITIONERS and not self.recipe().reads_moments:
            raise ConfigError(f"method {self.name}: moments are read by 'adam' and 'less' only")
        if self.proxy is not None and (self.moments or self.checkpoints):
            raise ConfigError(f"method {self.name}: a proxy has one adapter, and neither checkpoints nor moments")
        try:
            self.recipe().check()
        except ConfigError as error:
            own = in_section(error, RowSpec, "")
            text = own.render(lambda named: str(dataclasses.replace(named, key=named.key.rpartition(".")[2])))
            raise ConfigError(f"method {self.name}: {text}") from None

    def gradients(self, shared: RowSpec | None = None) -> RowSpec:
        """Return how its rows are made; seed, loss reduction, precision and max_tokens are those of `shared`."""
        return dataclasses.replace(
            shared or RowSpec(),
            kind=self.projection,
            dim=self.dim,
            width=self.width,
            layers=self.layers,
            sketch=self.sketch,
            sketch_examples=self.sketch_examples,
            dtype=self.store_dtype,
        )

    def recipe(self) -> Recipe:
        """Return what goes together in this method."""
        return Recipe.of(self.gradients(), self.influence())

    def influence(self, adapter: Path | None = None) -> InfluenceConfig:
        """Return what its scores under one adapter are made of."""
        optimizer = str(adapter) if self.moments else None
        return InfluenceConfig(
            self.preconditioner, self.damping, self.fisher, self.fisher_examples, optimizer=optimizer
        )


#: What can be named in a configuration; anything else is spelt out as a mapping. "ekfac" is Shampoo's eigenbasis with
#: EK-FAC's corrected eigenvalues, as everywhere here.
METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("ekfac-cosine"),
        Method("cosine", "cosine"),
        Method("dot", "none"),
        Method("exact-dot", "none", projection=WHOLE, store_dtype="fp32"),
        Method("exact-cosine", "cosine", projection=WHOLE, store_dtype="fp32"),
        Method("exact-ekfac-cosine", projection=WHOLE, store_dtype="fp32"),
        Method("fisher", "fisher"),
        Method("fisher-auto", "fisher", damping="auto"),
        Method("fisher-cosine", "fisher_cosine"),
        Method("fisher-cosine-auto", "fisher_cosine", damping="auto"),
        Method("ekfac", "ekfac"),
        Method("datainf", "datainf"),
        Method("adam", "adam", moments=True),
        Method("less", "less", moments=True),
        Method("tracin", "none", checkpoints=True),
        Method("less-checkpoints", "less", moments=True, checkpoints=True),
        Method("cosine-checkpoints", "cosine", checkpoints=True),
        Method("trak", "fisher", fisher=FROM_DATA, projection="sjlt", width=2048, store_dtype="fp32"),
        Method("loss", loss=True),
    )
}


@dataclass(frozen=True)
class Scored:
    """Influence `matrix` [N, Q] fp32, positive = lowers the query's loss; seconds by stage; stored bytes an example."""

    matrix: np.ndarray
    seconds: dict[str, float]
    bytes_per_example: int


def method_of(given: str | Mapping[str, Any]) -> Method:
    """Return a method by its name, or from a mapping of `Method`'s fields; raise ConfigError naming what is unknown."""
    if isinstance(given, str):
        if given not in METHODS:
            raise ConfigError(f"unknown method {given!r}; {did_you_mean(given, METHODS)}")
        return METHODS[given]
    known = [field.name for field in dataclasses.fields(Method)]
    for key in given:
        if key not in known:
            raise ConfigError(f"method: unknown key {key!r}; {did_you_mean(str(key), known)}")
    if "name" not in given:
        raise ConfigError(f"a method that is spelt out needs a name: {dict(given)}")
    return Method(**given)


def score_by(
    method: Method,
    base: Any,
    adapters: Sequence[tuple[Path, float]],
    pool: Sequence[dict[str, Any]],
    queries: Sequence[dict[str, Any]],
    scratch: Path,
    gradients: RowSpec | None = None,
) -> Scored:
    """Score the tokenized `pool` on the tokenized `queries`, from start to end and with nothing reused.

    adapters: (folder, weight); more than one only for a method of `checkpoints`. scratch: a folder for the store,
    removed afterwards. gradients: of these the seed, loss_reduction, precision and max_tokens, which methods share.

    Raises DataError where an example has no finite gradient: a comparison of methods needs all rows.
    """
    seconds: dict[str, float] = {}
    shortened = [shorten(example, method.tokens) for example in pool]
    total = np.zeros((len(pool), len(queries)), np.float32)
    bytes_per_example = 0
    for path, weight in adapters:
        with finetuned(base, path) as model:
            if method.loss:
                with timed(seconds, "losses"):
                    losses = per_example_losses(model, shortened).numpy().astype(np.float32)
                return Scored(np.repeat(-losses[:, None], len(queries), axis=1), seconds, 4)
            _clear(scratch)
            influence = method.influence(path)
            settings = (method.gradients(gradients), influence)
            made = pool_gradients(model, shortened, queries, scratch, *settings, seconds, progress=False)
            if made.store.set_aside:
                names = truncated_list(name for name, _ in made.store.set_aside)
                raise DataError(f"method {method.name}: no gradient for {names}; leave these examples out of the pool")
            with timed(seconds, "scores"):
                matrix = made.scorer(influence).matrix(made.queries)
            total += np.float32(weight) * matrix
            size = sum(file.stat().st_size for file in scratch.glob("rows-*"))
            bytes_per_example += size // max(1, len(made.store))
    _clear(scratch)
    return Scored(total, seconds, bytes_per_example)


def _clear(scratch: Path) -> None:
    for folder in (scratch, *fisher_folders(scratch)):
        shutil.rmtree(folder, ignore_errors=True)


def shorten(example: Mapping[str, Any], share: float) -> dict[str, Any]:
    """Return the example up to `share` of its completion tokens (at least one), its prompt whole."""
    labels = torch.as_tensor(example["labels"])
    places = (labels != IGNORED).nonzero().flatten()
    kept = max(1, round(share * len(places)))
    if share == 1 or len(places) == 0:
        return dict(example)
    end = int(places[kept - 1]) + 1
    return {**example, "input_ids": torch.as_tensor(example["input_ids"])[:end], "labels": labels[:end]}
