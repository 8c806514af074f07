"""How packs are run on an opened model: padded, replayed as captured graphs, recomputed where memory is short.

The step itself is `step.step`; what computes it is the backend, and what captures it the recorder.
"""

from __future__ import annotations

import torch

from influence_fast.data.packing import Pack
from influence_fast.gradients.model.backends import Torch
from influence_fast.gradients.step.cuda_graphs import Recorder, StepGraphs
from influence_fast.gradients.step.opened import OpenedModel
from influence_fast.gradients.step.reduction import Reducer
from influence_fast.gradients.step.step import step
from influence_fast.gradients.step.step_inputs import StepInputs, StepShape

# The share of a GPU's free memory that kept activations may fill: gradients inside a layer, and fragments, need the
# rest.
_ROOM = 0.8


class Runner:
    """Run packs of one opened model.

    Attributes:
        opened: what is true of the model.
        reducer: sums the rows.
        loss_reduction: "mean" or "sum" over an example's completion tokens.
        backend: computes what kernels and PyTorch compute differently.
        graphs: steps captured by the recorder; None where each operation is launched by itself.
    """

    def __init__(
        self,
        opened: OpenedModel,
        reducer: Reducer,
        loss_reduction: str,
        backend: Torch,
        recorder: Recorder | None = None,
    ) -> None:
        self.opened = opened
        self.reducer = reducer
        self.loss_reduction = loss_reduction
        self.backend = backend
        self.graphs = None if recorder is None else StepGraphs(self.step, opened.device, recorder)

    def run(self, pack: Pack) -> tuple[torch.Tensor, torch.Tensor]:
        """Return rows [E, k] and losses [E] of a pack; on a GPU as soon as all of it is queued.

        A pack whose activations would not fit in the GPU's free memory has its layers recomputed in the backward.
        """
        device = self.opened.device
        if self.graphs is None:
            return self.step(self.inputs(pack).to(device), self.overflows(len(pack.input_ids)))
        shape, examples = StepShape.of(pack), len(pack.indices)
        inputs = self.inputs(pack, shape)
        # The memory of captured steps is theirs alone.
        if not self.overflows(2 * shape.tokens):
            return self.graphs.run(shape, inputs, examples)
        rows, losses = self.step(inputs.to(device), self.overflows(shape.tokens + self.graphs.most_tokens))
        return rows[:examples], losses[:examples]

    def inputs(self, pack: Pack, shape: StepShape | None = None) -> StepInputs:
        """Return what `step` needs of a pack, on the host, padded to `shape` if there is one."""
        return StepInputs.of(pack, self.loss_reduction, self.reducer.dtype, backend=self.backend, shape=shape)

    def step(self, inputs: StepInputs, recompute: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """Return rows [E, k] and losses [E] of inputs on the device; see `step.step`."""
        return step(self.opened, self.reducer, inputs, recompute)

    def overflows(self, tokens: int) -> bool:
        """Tell whether layers keep more of so many tokens than there is room for; unknown models are taken to fit."""
        kept, room = self.opened.kept_bytes(tokens), self.opened.room
        return kept is not None and room is not None and kept > _ROOM * room
