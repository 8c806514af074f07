"""Rows that a preconditioner's Fisher information is fitted on, kept beside the store that it scores."""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from influence_fast.atomic import beside
from influence_fast.data.fingerprints import dataset_fingerprint
from influence_fast.data.held import Held
from influence_fast.data.packing import teaches
from influence_fast.errors import ConfigError, DataError, StoreError, truncated_list
from influence_fast.gradients.fisher_labels import sample_labels
from influence_fast.influence.preconditioners import FROM_DATA
from influence_fast.influence.sketch_fitting import drawn_unseen
from influence_fast.store.building import BuildOptions, build_rows
from influence_fast.store.planning import identity_of
from influence_fast.store.reader import Store, open_store
from influence_fast.store.shard_rows import AS_TOKENS, Texts, id_of, tokenized
from influence_fast.store.survey import held

_OF_DATA: dict[str, Any] = {"dataset_fingerprint": None, "tokenization": None, "tokenizer_hash": None}


def fisher_folders(store: str | Path) -> list[Path]:
    """Return where rows lie that the preconditioner of a store was fitted on: a folder for each set of draws."""
    first = beside(store, ".fisher-")
    return sorted(first.parent.glob(f"{glob.escape(first.name)}*"))


def check_fisher(store: Store, fisher: object) -> None:
    """Raise ConfigError or StoreError unless `fisher` is a store of rows made as those of `store` are."""
    if not isinstance(fisher, Store):
        raise ConfigError(f"fisher must be a store (of `build_store`), not a {type(fisher).__name__}")
    fisher.identity.check(replace(store.identity, **_OF_DATA), fisher.path)


def made_like(store: Store) -> dict[str, Any]:
    """Return the options of `per_example_gradients` that make rows as those of `store` were made."""
    spec = store.spec
    return {"projection": spec.projection(), "loss_reduction": spec.loss_reduction, "precision": spec.precision}


def fisher_rows(
    store: Store,
    model: Any,
    examples: Sequence[dict[str, Any]],
    *,
    count: int,
    seed: int,
    max_tokens: int | None = None,
) -> Store:
    """Return gradients of some of the examples with labels drawn from the model, made as the rows of `store` are.

    They lie beside the store, in a folder that is named by the draws and by how rows are made of them: a rounding on
    another machine can draw another label, and several processes may score one store at a time, each by settings of
    its own. What is there already is opened.

    Args:
        examples: tokens that the store's rows were made of (`{"id", "input_ids", "labels"}`).
        count: how many are drawn at most. seed: of the labels. max_tokens: as for `per_example_gradients`.

    Raises as `build_store`.
    """
    spec = replace(store.spec, dtype="fp32", max_tokens=max_tokens)
    live = [example for example in examples if teaches(example["labels"])]
    limits: dict[str, Any] = {"max_tokens": max_tokens, "precision": spec.precision}
    drawn = sample_labels(model, drawn_unseen(live, count), seed=seed, **limits)
    identity = identity_of(model, **made_like(store))
    digest = hashlib.sha256(
        f"{identity}{identity.projection_target or ''} {dataset_fingerprint(drawn)}".encode()
    ).hexdigest()[:12]
    folder = beside(store.path, f".fisher-{digest}")
    try:
        return build_rows(folder, model, held(drawn), spec, AS_TOKENS, BuildOptions(progress=False))
    except StoreError as error:
        raise StoreError(f"{error.marked} ({folder} is made of what is at hand: it may be deleted)") from error


def drawn_examples(store: Store, data: Held, count: int, texts: Texts = AS_TOKENS) -> list[dict[str, Any]]:
    """Return up to `count` of the examples that a store has rows of, drawn unseen, as tokens.

    data: what the store was built of. texts: how it becomes tokens.

    Raises DataError where the store has rows of other examples or tokens, or texts have no tokenizer.
    """
    stored = set(store.ids)
    found = {id_of(example): example for example in held(data) if id_of(example) in stored}
    if strangers := stored - found.keys():
        raise DataError(
            f"{store.path} has rows of {truncated_list(sorted(strangers))}, which are not among the examples: give the "
            "tokenized examples that it was built of"
        )
    live = [found[name] for name in store.ids]
    if texts == AS_TOKENS and live and isinstance(live[0], Mapping) and not store.is_of(live):
        raise DataError(
            f"{store.path} was built of other tokens than those of the examples with its ids: give the examples that "
            "it was built of, tokenized and cut as they were there"
        )
    return tokenized(drawn_unseen(live, count), texts)[0]


def kept_fisher_rows(store: Store, count: int) -> Store | None:
    """Return the rows that were made beside a store for `count` examples; None where there are none, or several."""
    found = []
    for folder in fisher_folders(store.path):
        try:
            rows = open_store(folder)
            check_fisher(store, rows)
        except StoreError:
            continue
        drawn = len(rows) + len(rows.set_aside)
        if min(count, len(store)) <= drawn <= min(count, len(store) + len(store.set_aside)):
            found.append(rows)
    return found[0] if len(found) == 1 else None


def fisher_store(store: Store, fisher: str | Store, count: int, model: Any, examples: Held | None) -> Store:
    """Return the rows that a preconditioner which reads a Fisher information is fitted on."""
    if fisher == FROM_DATA:
        return store
    if not isinstance(fisher, str):
        check_fisher(store, fisher)
        return fisher
    found = kept_fisher_rows(store, count) if examples is None else None
    data, texts = (examples, AS_TOKENS) if examples is not None else store.built_of or (None, AS_TOKENS)
    if found is None and model is not None and data is not None:
        drawn = drawn_examples(store, data, count, texts)
        return fisher_rows(store, model, drawn, count=count, seed=store.identity.projection_seed or 0)
    if found is None:
        others = "a store of such gradients as fisher=, or fisher='data' to fit on its own rows"
        whose = "which another process built: " if data is None else ""
        raise ConfigError(
            f"fisher: 'model' draws labels for the examples of {store.path}, {whose}give the model and the tokenized "
            "examples that it was built of once (model=, examples=inf.tokenize(...).examples), and their gradients are "
            f"kept beside it; or {others}"
        )
    return found
