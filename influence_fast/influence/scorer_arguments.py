"""Check what a scorer is given: an open store, queries that fit its rows, and groups of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch

from influence_fast.errors import ConfigError, DataError, shown
from influence_fast.store.reader import Store


def check_open(store: object) -> None:
    """Raise ConfigError unless `store` is an open one."""
    if not isinstance(store, Store):
        raise ConfigError(f"the store must be an open one (inf.open_store), not a {type(store).__name__}")


def check_queries(store: Store, queries: torch.Tensor | np.ndarray) -> torch.Tensor:
    """Return queries as a tensor [Q, k]. Raises DataError where they do not fit the store's rows."""
    try:
        queries = torch.as_tensor(queries)
    except (TypeError, ValueError, RuntimeError):
        raise DataError(f"queries are {shown(queries)}: give rows of numbers [Q, k] (store.query_gradients)") from None
    if queries.ndim == 1:
        raise DataError(f"queries of shape {tuple(queries.shape)} are one row: give [Q, k], such as queries[None]")
    if queries.ndim != 2 or queries.shape[1] != store.width:
        raise DataError(
            f"queries of shape {tuple(queries.shape)} do not fit rows of {store.width} numbers: "
            "project them as the store was"
        )
    return queries


def used_groups(groups: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
    """Return the groups that have members. Raises DataError: groups without names, or none has a member."""
    if not isinstance(groups, Mapping):
        raise DataError('groups are named, as {"correct": [0, 1]}, not a ' + type(groups).__name__)
    used: dict[str, list[int]] = {}
    for name, members in groups.items():
        if not isinstance(members, Iterable) or isinstance(members, str | bytes):
            raise DataError(f"group {name!r} is {shown(members)}; give a list of query numbers, such as [0, 1]")
        if str(name) in used:
            raise DataError(f"two groups are called {str(name)!r}; name them apart")
        used[str(name)] = list(members)
    used = {name: members for name, members in used.items() if members}
    if not used:
        raise DataError("there is no query to score against: every group is empty")
    return used
