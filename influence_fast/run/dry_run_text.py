"""The outcome of `dry_run.plan` as text for a terminal."""

from __future__ import annotations

from influence_fast.config import RunConfig
from influence_fast.run.dry_run import ACTIVATION_BYTES, TRAINED_BYTES, Plan, row_bytes


def describe(config: RunConfig, found: Plan) -> str:
    """Write a line for each thing that is known, or said to be unknown, with how it comes about."""
    per = "" if found.pool is not None else " for each 1,000 examples of the pool"
    at_most = "at most (max_length) " if found.tokens_bound else ""
    lines: list[tuple[str, str]] = []

    def size(value: int | None) -> str:
        return "unknown (not on this machine)" if value is None else f"{value:,}"

    for reason in found.stops:
        lines.append(("warning", f"the run would stop at once: {reason}"))
    lines.append(("pool", size(found.pool)))
    lines.append(("validation, test", f"{size(found.validation)}, {size(found.test)}"))
    if found.tokens is None:
        lines.append(("pool tokens", "unknown: give --tokens-per-example, or data.max_length for an upper bound"))
    else:
        lines.append(("pool tokens", f"{at_most}{found.tokens:,}{per}"))
    if found.too_long:
        lines.append(("", f"{found.too_long:,} examples are longer than max_length and would be left out"))
    grid = config.pruning
    strategies = [s for s in grid.strategies if s != "full"]
    lines.append(
        (
            "cells",
            f"{found.cells} = {len(grid.seeds)} seeds x (1 full + {len(strategies)} strategies x "
            f"{len(grid.fractions)} fractions)",
        )
    )
    lines.append(("fine-tunings", f"{found.fine_tunings}"))
    if found.training_tokens is not None:
        lines.append(
            (
                "tokens trained on",
                f"{at_most}{found.training_tokens:,}{per} = pool tokens x {config.training.epochs:g} epochs x "
                "kept shares of all fine-tunings",
            )
        )
    elif config.training.max_steps > 0:
        steps = config.training.max_steps
        lines.append(("steps trained", f"{found.fine_tunings * steps:,} = fine-tunings x max_steps {steps}"))
    asked = config.evaluation.samples
    if found.test is not None:
        answers = (found.cells + 1) * found.test * asked
        lines.append(
            (
                "answers graded",
                f"{answers:,} = (cells + 1 before) x {found.test:,} test questions x {asked} samples, of at most "
                f"{config.evaluation.max_new_tokens:,} tokens each",
            )
        )
    dtype = config.gradients.dtype
    stores = f"{found.stores} checkpoints x " if found.stores > 1 else ""
    if found.row is None or found.store_bytes is None:
        lines.append(
            (
                "store",
                "unknown without the model's shape: a row has 2 r dim numbers for each LoRA module (one_sided), "
                "or gradients.width",
            )
        )
    else:
        lines.append(
            (
                "store",
                f"{_bytes(found.store_bytes)}{per} = {stores}{found.examples:,} rows x "
                f"{row_bytes(found.row, dtype):,} bytes ({found.row:,} numbers, {dtype})",
            )
        )
        if found.fitted_bytes:
            lines.append(
                (
                    "",
                    f"{_bytes(found.fitted_bytes)} = {stores}{found.fitted:,} rows x {row_bytes(found.row, 'fp32'):,} "
                    "bytes, of labels that the model draws (influence.fisher_examples)",
                )
            )
    for name, model, shape in (
        ("model", config.model, found.model),
        ("target model", config.target_model, found.target),
    ):
        if model is None:
            continue
        if shape is None:
            lines.append((name, f"{model.path}: shape unknown (neither a local folder nor in the hub's cache)"))
        else:
            lines.append(
                (
                    name,
                    f"{model.path}: {shape.parameters:,} parameters, {shape.layers} layers of {shape.hidden:,}; LoRA "
                    f"trains {shape.trained:,}; context {shape.context or 'unknown'}",
                )
            )
            if found.longest and shape.context and found.longest > shape.context:
                lines.append(("", f"warning: examples of up to {found.longest:,} tokens go beyond that context"))
    lines.append(("memory, training", ""))
    if found.memory:
        for what, amount in found.memory:
            lines.append(("", f"{_bytes(amount):>10}  {what}"))
        lines.append(("", f"{_bytes(sum(amount for _, amount in found.memory)):>10}  together, an estimate"))
    else:
        lines[-1] = (
            "memory, training",
            "unknown without the model's shape: weights (4 or 2 bytes a parameter) + "
            f"{TRAINED_BYTES} bytes a LoRA parameter + {ACTIVATION_BYTES} x hidden bytes a token and layer",
        )
    for again, memory in found.gradient_memory.items():
        how = "layers computed again" if again else "all activations kept"
        heading = f"a batch of {found.gradient_batch:,} tokens, {how}; fullest at {memory.fullest}"
        lines.append(("memory, gradients", heading))
        for what, amount in {**memory.throughout, **memory.moments[memory.fullest]}.items():
            if amount:
                lines.append(("", f"{_bytes(amount):>10}  {what}"))
        lines.append(("", f"{_bytes(memory.peak):>10}  together, without the CUDA context (docs/memory.md)"))
    if found.seconds:
        for name, seconds in found.seconds.items():
            lines.append((f"time, {name}", f"{at_most}{_time(seconds)}{per}"))
        lines.append(("", "= tokens / --tokens-per-second; answering the questions comes on top"))
    else:
        lines.append(("time", "unknown: give --tokens-per-second, as measured on a short fine-tuning"))
    return "\n".join(f"{name:<18} {text}".rstrip() for name, text in lines)


def _bytes(amount: int) -> str:
    value = float(amount)
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:,.0f} {unit}" if unit == "bytes" else f"{value:,.1f} {unit}"
        value /= 1024
    return f"{value:,.1f} TiB"


def _time(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:,.1f} h"
