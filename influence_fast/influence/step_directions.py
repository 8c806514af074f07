"""Directions in the space of exact gradients, as parts of a model's adapter, and the loss of every token."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from influence_fast.check.differences import adapter_parameters, scored_parameters
from influence_fast.data.packing import IGNORED
from influence_fast.errors import DataError, ModelError, NumericError
from influence_fast.gradients.targets import gradient_layout

_MOST_TOKENS, _LOGITS_BYTES = 2048, 2**28


@dataclass(frozen=True)
class Directions:
    """Directions in a model's adapter, as parts of its parameters.

    Attributes:
        model: the LoRA model.
        names: the parameters that rows are of, in the row's order.
        rows: [Q, K] fp64.
        wide: the dtype of results.
    """

    model: Any
    names: list[str]
    rows: torch.Tensor
    wide: torch.dtype

    @classmethod
    def of(cls, model: Any, directions: torch.Tensor) -> Directions:
        """Match directions with the parameters of the active adapters.

        Raises DataError if they do not fit, NumericError if they are not finite, ModelError for factors that are no
        parameters of their own.
        """
        layout = gradient_layout(model)
        rows = torch.as_tensor(directions)
        width = layout[-1].columns.stop
        if rows.ndim != 2 or rows.shape[1] != width:
            raise DataError(
                f"directions of shape {tuple(rows.shape)} do not fit the {width} numbers of an exact gradient: give "
                "Scorer.apply(queries), fitted with model=, or exact query gradients"
            )
        if not bool(rows.isfinite().all()):
            raise NumericError("a direction holds NaN or infinite numbers; make the query gradients anew")
        try:
            names, _ = scored_parameters(layout, adapter_parameters(model))
        except KeyError as error:
            raise ModelError(f"{error.args[0]} is no parameter of its own, which steps need: train it alone") from None
        dtypes = {parameter.dtype for parameter in model.parameters()}
        wide = torch.float64 if torch.float64 in dtypes else torch.float32
        return cls(model, names, rows.detach().to("cpu", torch.float64), wide)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Return the parameters that rows are of."""
        by_name = dict(self.model.named_parameters(remove_duplicate=False))
        return [by_name[name] for name in self.names]

    def parts(self, direction: torch.Tensor) -> list[torch.Tensor]:
        """Split a direction [K] into tensors of the parameters' shapes, on their devices, in fp64."""
        parameters = self.parameters
        pieces = direction.split([parameter.numel() for parameter in parameters])
        return [
            piece.view(parameter.shape).to(parameter.device)
            for piece, parameter in zip(pieces, parameters, strict=True)
        ]

    @property
    def losses_dtype(self) -> torch.dtype:
        """Return the dtype that the model's losses are rounded to."""
        dtype: torch.dtype = self.model.get_input_embeddings().weight.dtype
        return dtype

    @property
    def tokens_at_once(self) -> int:
        """Return how many tokens a batch may have: logits of them, which the plain forward makes, within 256 MiB."""
        vocabulary = self.model.get_input_embeddings().weight.shape[0]
        return max(1, min(_MOST_TOKENS, _LOGITS_BYTES // (4 * vocabulary)))

    def token_losses(self, examples: Sequence[Mapping[str, Any]], forward: Callable[..., Any]) -> torch.Tensor:
        """Return the loss of every token by its place, [b, n] in fp32 or fp64; 0 where nothing is learnt.

        Shorter examples are padded at their end, where no token of theirs looks under a causal mask.
        """
        device = self.model.get_input_embeddings().weight.device
        rows = [torch.as_tensor(example["input_ids"]).to(device, torch.int64) for example in examples]
        ids = pad_sequence(rows, batch_first=True, padding_value=int(rows[0][0]))
        logits = forward(input_ids=ids, use_cache=False).logits[:, :-1]
        targets = [torch.as_tensor(example["labels"]).to(logits.device, torch.int64) for example in examples]
        labels = pad_sequence(targets, batch_first=True, padding_value=IGNORED)[:, 1:]
        row, place = (labels != IGNORED).nonzero(as_tuple=True)
        losses = logits.new_zeros(ids.shape, dtype=torch.promote_types(logits.dtype, torch.float32))
        found = cross_entropy(logits[row, place].to(losses.dtype), labels[row, place], reduction="none")
        return losses.index_put((row, place + 1), found)
