"""Remove wrappers around a whole model: torch.compile's and those of data parallel training."""

from __future__ import annotations

from typing import Any

from torch import nn

from influence_fast.errors import ModelError


def unwrapped(model: Any) -> Any:
    """Return the model inside torch.compile, DistributedDataParallel and DataParallel, as they and accelerate wrap it.

    Modules have the same names in it as they had before they were wrapped, and so gradients the same rows.

    Raises ModelError for no torch module, and FullyShardedDataParallel, whose weights are pieces of one flat vector.
    """
    from torch.nn.parallel import DataParallel, DistributedDataParallel

    if not isinstance(model, nn.Module):
        raise ModelError(f"the model is a {type(model).__name__}, not a torch module: give what inf.load_model returns")
    while True:
        if isinstance(model, DistributedDataParallel | DataParallel):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod
        else:
            break
    for name, module in model.named_modules():
        if type(module).__name__ == "FullyShardedDataParallel":
            raise ModelError(
                f"{name or 'the model'} is wrapped by FullyShardedDataParallel, whose weights are pieces of one flat "
                "vector: give the model as it was before, or shard it by torch.distributed.fsdp.fully_shard"
            )
    return model
