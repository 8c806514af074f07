"""Settings for a budget: what the scores of this model and data would cost, and what fidelity was measured for them.

Cost comes from this machine: a small sample's gradients are timed, and multiplied by the whole set's tokens and by the
method's measured cost over the default one's. Fidelity comes from `fidelity.json`, which `python -m benches.proof`
writes from its results: LDS on worlds where every method was put to the proof by retraining. It was measured on small
models; on another model the order of the methods is what can be expected to carry over, not the numbers.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from influence_fast.errors import ConfigError, DataError
from influence_fast.gradients.per_example import iter_gradient_rows
from influence_fast.influence.methods import Method, method_of
from influence_fast.influence.preconditioners import FROM_MODEL
from influence_fast.influence.sketch_fitting import width_of
from influence_fast.store.manifest import row_bytes

TABLE = Path(__file__).with_name("fidelity.json")
SAMPLE_TOKENS = 8192  # timed, after as many again to warm up


@dataclass(frozen=True)
class Proposal:
    """One way of scoring, and what to expect of it.

    seconds: one pass over the data on this machine, and what a sketch or a preconditioner is fitted on (the inner
    products come on top and are small). bytes: of the store, and of the rows beside it. lds: world -> (value, low,
    high) as measured there.
    """

    method: Method
    seconds: float
    bytes: int
    lds: dict[str, tuple[float, float, float]]
    agreement: dict[str, float | None]

    @property
    def expected(self) -> float:
        """Return the mean LDS over the synthetic tasks."""
        return float(np.mean([value for value, _, _ in self.lds.values()]))


def plan(
    model: nn.Module,
    dataset: Sequence[Mapping[str, Any]],
    *,
    seconds: float | None = None,
    bytes: int | None = None,
    tokens_per_second: float | None = None,
) -> list[Proposal]:
    """Plan ways of scoring `dataset` within the budget, best expected fidelity first, the cheaper first among equals.

    Args:
        model: a LoRA model (peft), where it is going to run.
        dataset: tokenized examples `{"id", "input_ids", "labels"}`.
        seconds, bytes: the budget; None is no limit.
        tokens_per_second: of the default method's gradients; measured on a sample of `dataset` where it is not given.

    Raises ConfigError where nothing fits the budget, saying what the cheapest would take; DataError for no examples.
    """
    for name, value in (("seconds", seconds), ("bytes", bytes)):
        if value is not None and not value > 0:
            raise ConfigError(f"a budget of {value} {name} is none; it must be above 0")
    if not len(dataset):
        raise DataError("no examples to plan for")
    tokens = sum(len(example["input_ids"]) for example in dataset)
    rate = tokens_per_second or measure(model, dataset)
    proposals = []
    for row in fidelity_table():
        method = method_of(row["settings"])
        gradients = method.gradients()
        width = width_of(gradients, method.preconditioner, model)
        size = row_bytes(width, gradients.dtype)
        # once, and with labels that the model draws: a forward pass is a third of a gradient
        recipe = method.recipe()
        extra = min(len(dataset), recipe.fitted_examples)
        passes = row["cost"] + extra / len(dataset) * (4 / 3 if method.fisher == FROM_MODEL else 1)
        beside = min(extra, recipe.fisher_examples) * row_bytes(width, "fp32")
        proposals.append(
            Proposal(
                method,
                seconds=tokens / rate * passes,
                bytes=size * len(dataset) + beside,
                lds={world: (found["lds"], found["low"], found["high"]) for world, found in row["worlds"].items()},
                agreement={world: found["agreement"] for world, found in row["worlds"].items()},
            )
        )
    fits = [p for p in proposals if (seconds is None or p.seconds <= seconds) and (bytes is None or p.bytes <= bytes)]
    if not fits:
        fastest, smallest = min(p.seconds for p in proposals), min(p.bytes for p in proposals)
        raise ConfigError(
            f"nothing fits the budget: the fastest way takes about {fastest:.0f} s, the smallest store "
            f"{smallest / 1e9:.3f} GB; raise the budget, or score fewer or shorter examples"
        )
    return sorted(fits, key=lambda p: (-round(p.expected, 2), p.seconds))


def measure(model: nn.Module, dataset: Sequence[Mapping[str, Any]]) -> float:
    """Measure the tokens a second of the default method's gradients on a sample of `dataset`, evenly spaced over it."""
    order = np.random.default_rng(0).permutation(len(dataset))
    sample, tokens = [], 0
    for place in order:
        sample.append(dataset[int(place)])
        tokens += len(sample[-1]["input_ids"])
        if tokens >= SAMPLE_TOKENS:
            break
    spec = method_of("ekfac-cosine").gradients()
    elapsed = []
    for _ in range(2):
        start = time.perf_counter()
        for _ in iter_gradient_rows(model, sample, spec):
            pass
        elapsed.append(time.perf_counter() - start)
    return tokens / min(elapsed)


@functools.cache
def fidelity_table() -> list[dict[str, Any]]:
    """Read the rows of `fidelity.json`.

    "settings" are those of a `Method`, "cost" is over the default method's without what is made once for any pool, and
    "worlds" holds the LDS on each synthetic task.
    """
    return json.loads(TABLE.read_text(encoding="utf-8"))["rows"]


def describe(proposals: Sequence[Proposal], count: int = 8) -> str:
    """Format the first proposals as a text table."""
    worlds = list(proposals[0].lds)
    lines = [f"{'method':<34} {'seconds':>9} {'store':>10}  " + "  ".join(f"LDS on {world:<18}" for world in worlds)]
    for p in proposals[:count]:
        spans = "  ".join(f"{v:.3f} ({low:.3f} to {high:.3f})   " for v, low, high in p.lds.values())
        lines.append(f"{p.method.name:<34} {p.seconds:>9.1f} {_size(p.bytes):>10}  {spans}")
    return "\n".join(lines)


def _size(count: int) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count / 1e3:.1f} kB"
