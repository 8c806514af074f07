"""What one step of the engine reads, as tensors that cross to the device in one copy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from influence_fast.data.packing import IGNORED, Pack
from influence_fast.gradients.model.backends import TORCH, Torch
from influence_fast.gradients.model.packed_attention import PackedTokens
from influence_fast.transfer import all_to_device, parted

if TYPE_CHECKING:
    from influence_fast.kernels.segments import Segments


@dataclass(frozen=True, slots=True)
class StepShape:
    """The sizes of a recorded step, into which every pack of up to these sizes fits; one example is always to spare.

    Padding costs what computing does: tokens are up to an eighth too many (none in packs as full as the token budget,
    for budgets that are powers of two), and so are the tokens that the loss counts. Rows are up to a quarter and one
    too many.
    """

    tokens: int  # T
    examples: int  # E
    counted: int  # n, tokens with a target
    longest: int  # tokens of an example

    @classmethod
    def of(cls, pack: Pack) -> StepShape:
        """Return the shape that the pack is padded to."""
        held = len(pack.input_ids)
        tokens = _rounded(held, 8, least=16)
        longest = max(*pack.lengths, tokens - held)
        return cls(
            tokens=tokens,
            examples=_rounded(len(pack.indices) + 1, 4),
            counted=_rounded(int((pack.targets != IGNORED).sum()), 8, least=16),
            longest=min(1 << (longest - 1).bit_length(), tokens),
        )


def _rounded(number: int, steps: int, least: int = 1) -> int:
    """Round `number` up to one of `steps` even steps between powers of two, in multiples of `least`."""
    step = max(least, (1 << (number.bit_length() - 1)) // steps)
    return -(-number // step) * step


@dataclass(frozen=True, slots=True)
class StepInputs:
    """A pack for one step, all on one device.

    `positions` are the tokens that have a target; `edges` say where each example's begin among them. `segments` are the
    Triton kernels' tables, where those run.
    """

    tokens: PackedTokens
    positions: torch.Tensor  # [n] int64
    targets: torch.Tensor  # [n] int64
    weights: torch.Tensor  # [n] fp32 (fp64 for an fp64 model)
    edges: torch.Tensor  # [E + 1] int64
    segments: Segments | None

    @classmethod
    def of(
        cls,
        pack: Pack,
        loss_reduction: str,
        dtype: torch.dtype,
        *,
        backend: Torch = TORCH,
        shape: StepShape | None = None,
    ) -> StepInputs:
        """Make the inputs on the host, weights in `dtype`; padded to `shape` if there is one.

        `backend` makes the tables of `segments`.

        Padding is token 0, in an example of its own after some of no tokens; its losses weigh nothing, so its rows are
        zeros.
        """
        positions = (pack.targets != IGNORED).nonzero().squeeze(1)
        tokens = PackedTokens.of(pack)
        targets = pack.targets[positions]
        weights = pack.token_weights(loss_reduction)[positions].to(dtype)
        edges = torch.searchsorted(positions, torch.tensor(pack.cu_seqlens))
        room = None
        if shape is not None:
            room = (shape.examples, shape.tokens)
            bounds = _filled(tokens.bounds, shape.examples, tokens.bounds[-1])
            tokens = PackedTokens(
                _filled(pack.input_ids, shape.tokens, 0)[None],
                _filled(pack.position_ids, shape.tokens, 0)[None],
                _filled(bounds, shape.examples + 1, shape.tokens),
                shape.longest,
                None,
            )
            edges = _filled(edges, shape.examples + 1, len(positions))
            positions = _filled(positions, shape.counted, shape.tokens - 1)
            targets, weights = _filled(targets, shape.counted, 0), _filled(weights, shape.counted, 0)
        segments = backend.segments(pack.lengths, room=room, longest=tokens.longest)
        return cls(tokens, positions, targets, weights, edges, segments)

    @property
    def tensors(self) -> list[torch.Tensor]:
        tables = [] if self.segments is None else self.segments.tables
        return [*self.tokens.tensors, self.positions, self.targets, self.weights, self.edges, *tables]

    def with_tensors(self, tensors: Sequence[torch.Tensor]) -> StepInputs:
        """Return these inputs with other tensors in that order."""
        positions, targets, weights, edges, *tables = tensors[3:]
        segments = None if self.segments is None else self.segments.with_tables(tables)
        return StepInputs(self.tokens.with_tensors(tensors[:3]), positions, targets, weights, edges, segments)

    def to(self, device: torch.device) -> StepInputs:
        """Copy from the host to `device` in one copy, which the host does not wait for."""
        return self.with_tensors(all_to_device(self.tensors, device))

    def within(self, flat: torch.Tensor) -> StepInputs:
        """Return views of `flat` [n] uint8, in which the `joined` tensors are."""
        return self.with_tensors(parted(flat, self.tensors))


def _filled(tensor: torch.Tensor, size: int, value: int | torch.Tensor) -> torch.Tensor:
    """Return `tensor` [n] with `value` after it up to [size]."""
    return torch.cat([tensor, tensor.new_full((size - len(tensor),), int(value))])
