"""A store from a file of examples, by every process that torchrun and the like started: `influence-fast build`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from influence_fast.atomic import beside
from influence_fast.config import ModelConfig
from influence_fast.data import spooling
from influence_fast.distributed import builds as distributed
from influence_fast.distributed import metrics, processes
from influence_fast.distributed.builds import DistributedOptions
from influence_fast.gradients import sharded
from influence_fast.gradients.rows.projection import Projection
from influence_fast.gradients.rows.row_spec import RowSpec
from influence_fast.influence.settings import InfluenceConfig
from influence_fast.influence.sketch_fitting import SketchFit, resolved
from influence_fast.store.reader import Store
from influence_fast.store.shard_rows import AS_TOKENS
from influence_fast.store.survey import held
from influence_fast.store.writer import make_folder
from influence_fast.training.models import load_model, load_tokenizer


def build_from_source(
    folder: str | Path,
    model: ModelConfig,
    source: spooling.TokenSource,
    spec: RowSpec,
    influence: InfluenceConfig,
    *,
    options: DistributedOptions,
    fsdp: int = 1,
    told: Callable[[spooling.Tokens], None] = lambda tokens: None,
) -> Store:
    """Build a store of files: one process spools the tokens beside `folder`, all make rows.

    Args:
        model: device "auto" or "cuda" is each process's own card.
        spec: how rows are made; the sketch that it asks for is fitted with the damping and labels of `influence`.
        options: who works together, and how; `peak` is of one card, by default what is known of it.
        fsdp: cards that share the base weights of one model (FSDP2).
        told: is given the tokens on rank 0, before any gradient is computed.

    Raises as the steps do; StoreError before any of them where `folder` holds something else; ConfigError for a
    precision that sharded weights cannot have.
    """
    world = options.of_world()
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
        options.time_limit,
        options.lease,
    )
    tokens = spooling.Tokens(spool)
    if world.rank == 0:
        told(tokens)
    peak = options.peak or metrics.peak_flops(torch.device(device if cuda else "cpu"))
    options = replace(options, world=world, group=group, peak=None if peak is None else peak * fsdp)

    def fit(asked: RowSpec) -> Projection:
        how = SketchFit(influence.damping, influence.fisher)
        return distributed.fit_projection(folder, loaded, tokens, asked, fit=how, options=options)

    spec = resolved(spec, influence.preconditioner, loaded, fit)
    store = distributed.build_by_claims(folder, loaded, held(tokens), spec, AS_TOKENS, options)
    if group is not None:
        processes.close_group()
    return store
