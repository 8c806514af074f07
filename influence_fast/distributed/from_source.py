"""A store from a file of examples, by every process that torchrun and the like started: `influence-fast build`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from influence_fast.atomic import beside
from influence_fast.config import ModelConfig
from influence_fast.data import spooling
from influence_fast.distributed import builds as distributed
from influence_fast.distributed import metrics, processes
from influence_fast.distributed.claims import LEASE, check_lease
from influence_fast.distributed.processes import World
from influence_fast.gradients import sharded
from influence_fast.gradients.projection import Projection
from influence_fast.influence.pool_gradients import sketch_options
from influence_fast.influence.settings import GradientConfig, InfluenceConfig
from influence_fast.influence.sketch_fitting import resolved
from influence_fast.store.reader import Store
from influence_fast.store.writer import make_folder
from influence_fast.training.models import load_model, load_tokenizer


def build_from_source(
    folder: str | Path,
    model: ModelConfig,
    source: spooling.TokenSource,
    gradients: GradientConfig,
    influence: InfluenceConfig,
    *,
    world: World,
    fsdp: int = 1,
    time_limit: float = processes.TIME_LIMIT,
    lease: float = LEASE,
    told: Callable[[spooling.Tokens], None] = lambda tokens: None,
    peak_flops: float | None = None,
    **options: Any,
) -> Store:
    """Tokens spooled beside `folder` by one process, a sketch fitted where one is asked for, rows made by all.

    Args:
        model: device "auto" or "cuda" is each process's own card.
        fsdp: cards that share the base weights of one model (FSDP2).
        time_limit, lease: as `distributed.build_distributed`.
        told: is given the tokens on rank 0, before any gradient is computed.
        peak_flops: of one card, for the utilisation in the metrics; by default what is known of it.
        options: of `distributed.build_distributed` (`progress`, `profile`, `shard_rows`).

    Raises as the steps do; StoreError before any of them where `folder` holds something else; ConfigError for a
    precision that sharded weights cannot have.
    """
    check_lease(lease)
    if Path(folder).exists():
        make_folder(Path(folder))  # loading a model and reading the data take long, and leave tokens beside it
    cuda = model.device.partition(":")[0] == "cuda" or (model.device == "auto" and torch.cuda.is_available())
    device = f"cuda:{world.local_rank}" if cuda and ":" not in model.device else model.device
    mesh, group = None, None
    if fsdp != 1:
        mesh, group = processes.init_group(world, fsdp, "cuda" if cuda else "cpu")
    place = device if group is None else "cpu"
    trust: dict[str, Any] = {"trust_remote_code": model.trust_remote_code}
    loaded = processes.retried(
        lambda: load_model(
            model.path, adapter=model.adapter, dtype=model.dtype, device=place, quantize=model.quantize, **trust
        )
    )
    own: dict[str, Any] = {"adapter": model.adapter, "tokenizer": model.tokenizer}
    tokenizer = processes.retried(lambda: load_tokenizer(model.path, model=loaded, **own, **trust))
    if group is not None:
        loaded = sharded.shard_model(loaded, mesh)
    spool = beside(folder, ".tokens")
    processes.once(
        spool,
        world,
        lambda: spooling.is_spooled(spool, source, tokenizer),
        lambda heartbeat: processes.retried(lambda: spooling.spool(spool, source, tokenizer, heartbeat)),
        time_limit,
        lease,
    )
    tokens = spooling.Tokens(spool)
    if world.rank == 0:
        told(tokens)
    peak = peak_flops or metrics.peak_flops(torch.device(device if cuda else "cpu"))
    shared: dict[str, Any] = {"world": world, "group": group, "time_limit": time_limit, "lease": lease}
    shared |= {"precision": gradients.precision, "max_tokens": gradients.max_tokens}
    shared["loss_reduction"] = gradients.loss_reduction

    def fit(projection: Projection) -> Projection:
        how = sketch_options(gradients, influence)
        return distributed.fit_projection(folder, loaded, tokens, projection=projection, **how, **shared)

    projection = resolved(gradients.projection, gradients.sketch, influence.preconditioner, loaded, fit)
    store = distributed.build_distributed(
        folder,
        loaded,
        None,
        tokens,
        peak=None if peak is None else peak * fsdp,
        projection=projection,
        dtype=gradients.store_dtype,
        **shared,
        **options,
    )
    if group is not None:
        processes.close_group()
    return store
