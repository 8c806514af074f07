"""Pack ragged examples into one row of tokens, end to end and without padding."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from influence_fast.errors import DataError, truncated_list, warn_once

logger = logging.getLogger(__name__)

IGNORED = -100  # label of a token that the loss leaves out


@dataclass(frozen=True)
class Pack:
    """Several examples in one row of T tokens.

    `indices` are the examples' places in the caller's list; example i of the pack owns the tokens
    `cu_seqlens[i]:cu_seqlens[i + 1]`. `targets` is already shifted: `targets[t]` is what token t must predict,
    or -100; the last token of an example predicts nothing. `weights`, shifted alike, multiply the losses of the tokens.
    """

    indices: list[int]
    input_ids: torch.Tensor  # [T] int64
    position_ids: torch.Tensor  # [T] int64, restarting at 0 in each example
    targets: torch.Tensor  # [T] int64
    cu_seqlens: list[int]  # E + 1 ints, from 0 to T
    weights: torch.Tensor | None = None  # [T] float64; None: all are 1

    @property
    def lengths(self) -> list[int]:
        return [end - start for start, end in pairwise(self.cu_seqlens)]

    def token_weights(self, loss_reduction: str) -> torch.Tensor:
        """Return the weight of each token's loss, [T] float64, by which every example gets its own `mean` or `sum`.

        A mean divides by the number of tokens that count, whatever their own weights are: advantages may sum to 0.
        """
        counted = self.targets != IGNORED
        weights = counted.to(torch.float64)
        if self.weights is not None:
            weights = torch.where(counted, self.weights, 0.0)
        if loss_reduction == "mean":
            for start, end in pairwise(self.cu_seqlens):
                weights[start:end] /= counted[start:end].sum()
        return weights


def example_name(example: Mapping[str, Any], index: int) -> str:
    """Return the example's id, or its place in the list where it has none."""
    return str(example["id"]) if "id" in example else f"examples[{index}]"


def text_config(config: Any) -> Any:
    """Return the language model's part of a transformers configuration: nested in a multimodal one, else itself."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def context_of(config: Any) -> int | None:
    """Return the model's context length in tokens by its configuration; None where that does not say."""
    limit = getattr(text_config(config), "max_position_embeddings", None)
    return limit if isinstance(limit, int) else None


def say_if_beyond(context: int | None, examples: Sequence[Mapping[str, Any]]) -> None:
    """Log a warning, once, where examples are longer than the model's context."""
    if context is not None and any(len(example["input_ids"]) > context for example in examples):
        warn_once(
            logger,
            f"examples are longer than the model's context of {context} tokens, and so at positions that it has not "
            "learned: leave them out or cut them by max_length",
        )


def teaches(labels: torch.Tensor) -> bool:
    """Return whether a token of labels [n] counts; the first has no token before it that could predict it."""
    return bool((labels[1:] != IGNORED).any())


def check_examples(examples: Sequence[Mapping[str, Any]]) -> None:
    """Raise DataError naming every example that has no gradient: malformed, empty, or all labels ignored."""
    ignored = []
    for index, example in enumerate(examples):
        if not isinstance(example, Mapping):
            raise DataError(
                f"examples[{index}] is a {type(example).__name__}, not tokens: give inf.tokenize(examples, "
                "tokenizer).examples"
            )
        name = example_name(example, index)
        for field in ("input_ids", "labels"):
            if field not in example:
                raise DataError(f"{name}: no {field!r}; an example is {{'input_ids', 'labels'}}, 1-D int tensors")
            if not isinstance(example[field], torch.Tensor):
                raise DataError(f"{name}: {field} is a {type(example[field]).__name__}; give a 1-D int tensor")
        ids, labels = example["input_ids"], example["labels"]
        if ids.ndim != 1 or labels.shape != ids.shape:
            raise DataError(
                f"{name}: input_ids and labels must be 1-D and of one length, "
                f"not {tuple(ids.shape)} and {tuple(labels.shape)}"
            )
        if not teaches(labels):
            ignored.append(name)
        elif "weights" in example and not bool((example["weights"][1:][labels[1:] != IGNORED] != 0).any()):
            raise DataError(f"{name}: the weights of all its learned tokens are 0; leave it out")
    if ignored:
        raise DataError(
            f"no completion token to learn from (every label is -100) in {truncated_list(ignored)}: "
            "drop these examples or unmask their completions"
        )


def pack_examples(examples: Sequence[Mapping[str, Any]], max_tokens: int) -> list[Pack]:
    """Pack examples into rows of at most `max_tokens` tokens; a longer example gets a pack of its own.

    First-fit decreasing over lengths, stable in the examples' order, so the same list is always packed the same way.
    """
    lengths = [int(example["input_ids"].shape[0]) for example in examples]
    order = sorted(range(len(examples)), key=lambda i: (-lengths[i], i))
    groups: list[list[int]] = []
    room: list[int] = []
    first_open = 0
    for i in order:
        while first_open < len(groups) and room[first_open] == 0:
            first_open += 1
        for g in range(first_open, len(groups)):
            if room[g] >= lengths[i]:
                groups[g].append(i)
                room[g] -= lengths[i]
                break
        else:
            groups.append([i])
            room.append(max(0, max_tokens - lengths[i]))
    return [_pack(examples, members) for members in groups]


def _pack(examples: Sequence[Mapping[str, Any]], members: list[int]) -> Pack:
    cu_seqlens = [0]
    targets = []
    positions = []
    for i in members:
        n = int(examples[i]["input_ids"].shape[0])
        cu_seqlens.append(cu_seqlens[-1] + n)
        shifted = torch.full((n,), IGNORED, dtype=torch.int64)
        shifted[:-1] = examples[i]["labels"][1:]
        targets.append(shifted)
        positions.append(torch.arange(n))
    return Pack(
        indices=members,
        input_ids=torch.cat([examples[i]["input_ids"].to(torch.int64) for i in members]),
        position_ids=torch.cat(positions),
        targets=torch.cat(targets),
        cu_seqlens=cu_seqlens,
        weights=_weights(examples, members),
    )


def _weights(examples: Sequence[Mapping[str, Any]], members: list[int]) -> torch.Tensor | None:
    """Return the weights [T] of a pack's tokens, each at the token that predicts it; None where all are 1."""
    if not any("weights" in examples[i] for i in members):
        return None
    parts = []
    for i in members:
        part = torch.ones(len(examples[i]["input_ids"]), dtype=torch.float64)
        if "weights" in examples[i]:
            part[:-1] = examples[i]["weights"][1:]
        parts.append(part)
    return torch.cat(parts)
