"""Do the examples of a pack see each other? Tried on the model itself, which is asked nothing and believed nothing.

Of two examples in one pack, the second's outputs are differentiated with respect to the first's embeddings. Where the
examples are apart there is no path, and every number of that gradient is exactly zero, in any dtype; attention that
never learned of the bounds, a convolution, a state space or a linear attention beside it leaves some other number. And
the second's outputs are compared with those that it has alone, which positions that count through the pack change.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from influence_fast.data.packing import Pack
from influence_fast.errors import ModelError
from influence_fast.gradients.attention import REPLACED, PackedTokens, call

_HALF = 6  # tokens of each of the two: more than the convolutions of hybrid models are wide
_ROUNDING = {torch.float64: 1e-6, torch.float32: 1e-3}  # of outputs; 16-bit ones round in every layer
_ROUNDING_16 = 0.1


@dataclass(frozen=True, slots=True)
class Separation:
    """apart: whether the examples of a pack do not see each other. takes_bounds: whether the model takes the bounds of
    one example; those that cannot keep examples apart may refuse even that."""

    apart: bool
    takes_bounds: bool = True


def separation(module: Any, implementation: str | None, device: torch.device) -> Separation:
    """How `module`, a decoder or a whole causal LM in evaluation mode, treats packs.

    implementation: of its attention, by transformers' name. Costs a forward and a backward of 12 tokens, and two
    forwards of 6; on the meta device nothing, and the attention is believed.

    Raises ModelError where the same tokens have other outputs when they are asked for again: the model keeps a state
    between calls, and no batch has gradients of its own.
    """

    if device.type == "meta":  # a model without numbers, of which nothing but shapes is asked
        return Separation(implementation not in REPLACED)

    def outputs(*firsts: int, with_bounds: bool = True) -> torch.Tensor:
        """Of as many examples as there are numbers; the last one is the same in each pack. [T, d]"""
        ids = torch.cat([torch.arange(_HALF) % 2 + first for first in firsts])
        count = len(firsts)
        positions, bounds = torch.arange(_HALF).repeat(count), [i * _HALF for i in range(count + 1)]
        pack = Pack(list(range(count)), ids, positions, ids, bounds)
        found = call(module, implementation, PackedTokens.of(pack).to(device), with_bounds=with_bounds)
        hidden = getattr(found, "last_hidden_state", None)
        return (found.logits if hidden is None else hidden)[0]

    with torch.no_grad():
        try:
            alone, takes_bounds = outputs(1), True
        except ValueError:
            alone, takes_bounds = outputs(1, with_bounds=False), False
        again = outputs(1, with_bounds=takes_bounds)
    if not agree(alone, again):
        raise ModelError(
            f"{type(module).__name__}: the same tokens have other outputs when they are asked for again; the model "
            "keeps a state between calls, and its gradients would depend on what came before"
        )
    # an attention that could not be replaced masks the whole pack, if it knows of it: an example alone is cheaper
    if not takes_bounds or implementation in REPLACED:
        return Separation(False, takes_bounds)
    together, reached = _reached(module, lambda: outputs(0, 1))
    return Separation(not reached and agree(together, alone))


def _reached(module: Any, outputs: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, bool]:
    """The second example's outputs [_HALF, d], and whether the first's embeddings have a part in them."""
    leaves: list[torch.Tensor] = []

    def from_a_leaf(_: Any, __: Any, embedded: torch.Tensor) -> torch.Tensor:
        leaves.append(embedded.detach().requires_grad_())
        return leaves[0].clone()  # which a model may scale in place

    handle = module.get_input_embeddings().register_forward_hook(from_a_leaf)
    try:
        with torch.enable_grad():
            second = outputs()[_HALF:]
            # other weights for every number: a norm at the end has a constant sum of squares
            weights = torch.arange(second.numel(), device=second.device).cos().view(second.shape)
            (gradient,) = torch.autograd.grad((second * weights.to(second.dtype)).sum(), leaves[0])
    finally:
        handle.remove()
    return second.detach(), bool(gradient[0, :_HALF].ne(0).any())  # NaN is not 0 either


def agree(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether outputs differ by their dtype's rounding alone; NaN differs from everything."""
    most = _ROUNDING.get(one.dtype, _ROUNDING_16)
    return bool((one - other).double().norm() <= most * other.double().norm())
