"""Wrappers around a whole model change neither its rows nor its hashes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import influence_fast as inf
from benches.model_zoo import examples_for, tiny, with_adapter
from influence_fast.data.fingerprints import weight_hashes
from influence_fast.data.wrappers import unwrapped
from influence_fast.errors import ModelError
from influence_fast.gradients.rows.projection import Projection
from influence_fast.gradients.targets import gradient_layout


class OptimizedModule(nn.Module):
    """As torch.compile wraps a model; to import its own class takes seconds."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._orig_mod = module


WRAPPERS = {"DataParallel": nn.DataParallel, "torch.compile": OptimizedModule}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapped_model_has_the_rows_of_the_model_inside(wrapper: str) -> None:
    model = with_adapter(tiny("llama"))
    examples, projection = examples_for(model), Projection(kind="one_sided", dim=4)
    wrapped: Any = WRAPPERS[wrapper](model)
    assert [name for name, _ in wrapped.named_modules()] != [name for name, _ in model.named_modules()]
    assert unwrapped(wrapped) is model
    assert weight_hashes(wrapped) == weight_hashes(model)
    assert gradient_layout(wrapped) == gradient_layout(model)
    # projected, since modules of other names would have other random matrices
    rows, wanted = (inf.per_example_gradients(m, examples, projection=projection) for m in (wrapped, model))
    assert torch.equal(rows, wanted)


def test_distributed_data_parallel_is_unwrapped(tmp_path: Any) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        model = nn.Linear(2, 2)
        assert unwrapped(nn.parallel.DistributedDataParallel(OptimizedModule(model))) is model
    finally:
        dist.destroy_process_group()


class FullyShardedDataParallel(nn.Module):
    """As FSDP1 names its wrapper."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.inner = module


def test_flat_shards_are_refused_with_what_to_do() -> None:
    model = nn.Sequential(FullyShardedDataParallel(nn.Linear(2, 2)))
    with pytest.raises(ModelError, match=r"0 is wrapped by FullyShardedDataParallel.*fully_shard"):
        unwrapped(model)
