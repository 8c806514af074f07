"""Directions in the space of exact gradients, as parts of a model's adapter, and the loss of every token."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from influence_fast.check.differences import adapter_parameters, scored_parameters
from influence_fast.data.packing import IGNORED
from influence_fast.errors import DataError, ModelError, NumericError
from influence_fast.gradients.targets import gradient_layout


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

    def token_losses(self, example: Mapping[str, Any], forward: Callable[..., Any]) -> torch.Tensor:
        """Return the loss of every token by its place, [n] in fp32 or fp64; 0 where nothing is learnt."""
        device = self.model.get_input_embeddings().weight.device
        ids = torch.as_tensor(example["input_ids"]).to(device, torch.int64)
        logits = forward(input_ids=ids[None], use_cache=False).logits[0, :-1]
        labels = torch.as_tensor(example["labels"]).to(logits.device, torch.int64)[1:]
        kept = labels != IGNORED
        losses = logits.new_zeros(len(ids), dtype=torch.promote_types(logits.dtype, torch.float32))
        found = cross_entropy(logits[kept].to(losses.dtype), labels[kept], reduction="none")
        places = kept.nonzero().squeeze(1) + 1
        return losses.index_put((places,), found)
