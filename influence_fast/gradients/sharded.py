"""Gradients of a model whose base weights are spread over several processes (FSDP2), for models that fit no one card.

The processes of a group walk in lockstep: each round, every one of them takes a pack of its own, so that all run the
same layers at the same time, and the rows are exchanged afterwards. The adapter is small and stays whole everywhere,
and so do the embedding and the head.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from influence_fast.data.adapter_names import is_adapter_parameter
from influence_fast.errors import ModelError
from influence_fast.gradients.engine import GradientEngine
from influence_fast.gradients.model.quantized import kind_of
from influence_fast.gradients.per_example import EXACT_ROWS, compare_once, packs_for
from influence_fast.gradients.rows.row_spec import RowSpec


def shard_model(model: Any, mesh: Any = None) -> Any:
    """Split the frozen base weights of a peft model over `mesh` in place, decoder layer by decoder layer.

    Args:
        model: on the device it is to run on, or on the CPU: each layer moves to the mesh's device as it is sharded.
        mesh: a one-dimensional `DeviceMesh`; by default one of all processes.

    Returns `model`. Raises ModelError: no list of decoder layers is found in it, or its weights are quantised.
    """
    from torch.distributed.fsdp import fully_shard

    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    decoder = base.get_decoder()
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise ModelError(
            f"{type(decoder).__name__} has no list of decoder layers (`layers`) to shard one by one; "
            "run it whole, one process a card"
        )
    if any(kind_of(module) is not None for module in layers.modules() if "base_layer" not in module._modules):
        raise ModelError(
            f"{type(decoder).__name__}: quantised weights cannot be spread over processes (FSDP): run it whole, one "
            "process a card (without --fsdp), or load it unquantised"
        )
    whole = {parameter for name, parameter in model.named_parameters() if is_adapter_parameter(name)}
    whole |= set(base.get_input_embeddings().parameters())
    for layer in layers:
        fully_shard(layer, mesh=mesh, ignored_params=whole)
    fully_shard(decoder, mesh=mesh, ignored_params=whole)
    if mesh is not None and mesh.device_type != "cpu":
        device = torch.device(mesh.device_type, torch.cuda.current_device())
        for module in model.modules():  # what is left whole: adapter, embedding, head, buffers
            for parameter in module.parameters(recurse=False):
                if not hasattr(parameter, "full_tensor"):
                    parameter.data = parameter.data.to(device)
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = buffer.to(device)
    return model


class LockstepRows:
    """The rows of `iter_gradient_rows` for a sharded model: every process of `group` yields those of all examples.

    All of them must be called with the same examples. Each round of packs is computed side by side, one pack a
    process; one that has none left runs a pack of the round once more, for its part of the weights is needed.
    """

    def __init__(self, group: Any = None) -> None:
        self.group = group

    def __call__(
        self,
        model: nn.Module,
        examples: Sequence[Mapping[str, Any]],
        spec: RowSpec = EXACT_ROWS,
        *,
        skip: Collection[int] = (),
        losses: torch.Tensor | None = None,
    ) -> Iterator[tuple[list[int], torch.Tensor]]:
        """Yield (indices into `examples`, CPU rows [n, k]); raises as `per_example_gradients` does."""
        import torch.distributed as dist

        rank, world = dist.get_rank(self.group), dist.get_world_size(self.group)
        with GradientEngine(model, spec.projection(), spec.loss_reduction) as engine:
            packs = [p for p in packs_for(engine, examples, spec.max_tokens) if not set(p.indices) <= set(skip)]
            for start in range(0, len(packs), world):
                turn = packs[start : start + world]
                rows, own_losses = engine.run(turn[rank % len(turn)])
                sizes = [len(turn[r % len(turn)].indices) for r in range(world)]
                padded = rows.new_zeros(max(sizes), rows.shape[1] + 1)
                padded[: len(rows), :-1] = rows
                padded[: len(rows), -1] = own_losses
                gathered = [torch.empty_like(padded) for _ in range(world)]
                dist.all_gather(gathered, padded, group=self.group)
                # The same pack on every process, so that all of them make the same forwards, and raise together.
                if not engine.compared:
                    compare_once(engine, turn[0], gathered[0][: sizes[0], -1], examples)
                    _reshard(engine.base)
                for pack, found in zip(turn, gathered, strict=False):
                    mine = found[: len(pack.indices)].cpu()
                    if losses is not None:
                        losses[pack.indices] = mine[:, -1].to(losses.dtype)
                    yield pack.indices, mine[:, :-1]


def _reshard(model: nn.Module) -> None:
    """Spread the weights again that a forward without a backward leaves whole: a hash would be taken of these."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
