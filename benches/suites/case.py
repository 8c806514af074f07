"""What a suite is made of: cases, each a few ways of doing one thing, and the inputs that several suites share."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from benches.interleave import Variants

T = TypeVar("T")

#: The suites in the order in which they run: `benches/suites/test_<stage>.py`, each with a list CASES.
STAGES = (
    "kernels",
    "gradients",
    "store",
    "inner_products",
    "ranks",
    "preconditioners",
    "end_to_end",
    "scaling",
)
VOCABULARY = 2048


@dataclass(frozen=True)
class Scale:
    """quick: sizes that run in seconds, to see that a suite works; their times say nothing. folder: an empty one."""

    quick: bool
    threads: int
    folder: Path

    def __call__(self, full: T, quick: T) -> T:
        return quick if self.quick else full


@dataclass(frozen=True)
class Case:
    """One thing done in several ways.

    group: what is done; unique within its suite. names: the ways, ours first. build: makes the inputs and gives a
    function for each name. axis, at: of a scaling curve, what grows and how large it is.
    """

    group: str
    names: tuple[str, ...]
    build: Callable[[Scale], Variants]
    rounds: int = 9
    axis: str | None = None
    at: int | None = None

    def variants(self, scale: Scale) -> Variants:
        found = self.build(scale)
        if tuple(found) != self.names:
            raise ValueError(f"case {self.group!r} promises {self.names} and builds {tuple(found)}")
        return found


def cases_of(stage: str) -> list[Case]:
    """The cases of one suite."""
    return list(importlib.import_module(f"benches.suites.test_{stage}").CASES)


def ragged_examples(count: int, mean: int, seed: int = 0) -> list[dict[str, Any]]:
    """Token sequences of log-normal lengths around `mean`, the first quarter of each a prompt."""
    generator = torch.Generator().manual_seed(seed)
    lengths = (torch.randn(count, generator=generator) * 0.5).exp() * mean
    return [example(max(8, int(n)), generator) for n in lengths]


def example(tokens: int, generator: torch.Generator) -> dict[str, Any]:
    """One sequence of random tokens, its first quarter a prompt."""
    ids = torch.randint(5, VOCABULARY, (tokens,), generator=generator)
    labels = ids.clone()
    labels[: tokens // 4] = -100
    return {"input_ids": ids, "labels": labels}
