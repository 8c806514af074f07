"""Detect whether the examples of a pack see each other, on the model itself and without trusting its configuration.

Of two examples in one pack, the second's outputs are differentiated with respect to the first's embeddings. Where the
examples are apart there is no path, and every number of that gradient is exactly zero, in any dtype; attention that
never learned of the bounds, a convolution, a state space or a linear attention beside it leaves some other number. And
the second's outputs are compared with those that it has alone, which positions that count through the pack change.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from influence_fast.data.packing import Pack
from influence_fast.errors import ModelError
from influence_fast.gradients.model.packed_attention import REPLACED, PackedTokens, call

_HALF = 6  # tokens of each of the two: more than the convolutions of hybrid models are wide
_ROUNDING = {torch.float64: 1e-6, torch.float32: 1e-3}  # of outputs; 16-bit ones round in every layer
_ROUNDING_16 = 0.1


class StatefulModelError(ModelError):
    """A model whose outputs depend on what it was asked before."""


@dataclass(frozen=True, slots=True)
class Separation:
    """Say how a model is called.

    apart: whether the examples of a pack do not see each other. takes_bounds: whether the model takes the bounds of
    one example; those that cannot keep examples apart may refuse even that. masked: apart by a mask over the whole
    pack, as for an attention that could not be replaced. own_attention: whether it is called one example at a time,
    with its own attention and mask, and makes its own positions. why: what keeps it from packs, where
    anything does.
    """

    apart: bool
    takes_bounds: bool = True
    masked: bool = field(default=False, compare=False)  # of what packs cost, not of what they are
    own_attention: bool = False
    why: str = field(default="", compare=False)

    @property
    def packs_pay(self) -> bool:
        """Return whether to pack; else an example alone is right, or cheaper than a mask of the pack, and in its
        context.
        """
        return self.apart and not self.masked


def separation(module: Any, implementation: str | None, device: torch.device) -> Separation:
    """Detect how `module`, a decoder or a whole causal LM in evaluation mode, treats packs.

    implementation: of its attention, by transformers' name. Costs a forward and a backward of 12 tokens, and two
    forwards of 6; on the meta device nothing, and the attention is believed.

    Raises StatefulModelError where the same tokens have other outputs whenever they are asked for: the model keeps a
    state between calls, and no batch has gradients of its own.
    """
    if device.type == "meta":  # a model without numbers, of which nothing but shapes is asked
        return Separation(implementation not in REPLACED)
    embeddings = _embeddings(module)
    vocabulary = 1 if embeddings is None else len(embeddings.weight)

    def outputs(*firsts: int, with_bounds: bool = True) -> torch.Tensor:
        """Compute outputs [T, d] of as many examples as there are numbers; the last one is the same in each pack."""
        # from the middle of the vocabulary: the first and last tokens can be padding, whose embedding is all zeros
        ids = torch.cat([torch.arange(_HALF) % 2 + first + vocabulary // 2 for first in firsts]) % vocabulary
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
        if not bool(alone.isfinite().all()):
            # nothing can be told from NaN; examples go one at a time, and their gradients name the weights' fault
            return Separation(False, takes_bounds, masked=implementation in REPLACED)
        # thrice at most: in 16 bits a token can be routed to another expert by how a sum was rounded
        if not any(agree(alone, outputs(1, with_bounds=takes_bounds)) for _ in range(2)):
            raise StatefulModelError(
                f"{type(module).__name__}: the same tokens have other outputs when they are asked for again; the model "
                "keeps a state between calls, and its gradients would depend on what came before"
            )
    if not takes_bounds or embeddings is None:
        return Separation(False, takes_bounds)
    together, reached = _reached(embeddings, lambda: outputs(0, 1))
    if reached is None:
        with torch.no_grad():
            reached = not agree(outputs(2, 1)[_HALF:], together)
    return Separation(not reached and agree(together, alone), masked=implementation in REPLACED)


def _embeddings(module: Any) -> Any:
    """Return the module of the token embeddings; None if the model does not name one."""
    try:
        found = module.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    return found if isinstance(getattr(found, "weight", None), torch.Tensor) else None


def _reached(embeddings: Any, outputs: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, bool | None]:
    """Return the second example's outputs [_HALF, d], and whether the first's embeddings have a part in them.

    The latter is None where their gradient is no number.
    """
    leaves: list[torch.Tensor] = []

    def from_a_leaf(_: Any, __: Any, embedded: torch.Tensor) -> torch.Tensor:
        leaves.append(embedded.detach().requires_grad_())
        return leaves[-1].clone()  # which a model may scale in place

    handle = embeddings.register_forward_hook(from_a_leaf)
    try:
        with torch.enable_grad():
            second = outputs()[_HALF:]
            if len(leaves) != 1 or not second.requires_grad:  # not called as a module, and nothing can be told
                return second.detach(), True
            # other weights for every number: a norm at the end has a constant sum of squares
            weights = torch.arange(second.numel(), device=second.device).cos().view(second.shape)
            (gradient,) = torch.autograd.grad((second * weights.to(second.dtype)).sum(), leaves)
    finally:
        handle.remove()
    found = gradient[0, :_HALF]
    return second.detach(), bool(found.ne(0).any()) if bool(found.isfinite().all()) else None


def agree(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether outputs differ by their dtype's rounding alone; NaN and other shapes differ from everything."""
    most = _ROUNDING.get(one.dtype, _ROUNDING_16)
    return one.shape == other.shape and bool((one - other).double().norm() <= most * other.double().norm())
