"""`adam`: the optimizer's own diagonal (LESS, Xia et al. 2024, arXiv 2402.04333): H = diag(sqrt(v) + eps).

Where v comes from:

    moments given    the bias-corrected second moments of a checkpoint's Adam state (`adam_moments`): for exact rows
                     as they are; for projected rows, v'_c = sum_j P_cj^2 v_j, which is what the projection P makes
                     of them if coordinates of the gradient are uncorrelated (one_sided: one number a rank index)
    none given       the mean square of each coordinate of the stored rows. That is of single examples' gradients
                     at this checkpoint; Adam averages those of batches, over the last 1 / (1 - beta2) steps

eps is `damping` times the mean of sqrt(v) in a module, as for the other preconditioners, where Adam has an absolute
1e-8: a coordinate that training never moved would otherwise outweigh all others. Scores are plain inner products; for
LESS's cosines see `whitened`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from safetensors import SafetensorError, safe_open

from influence_fast.data.adapter_names import plain_name
from influence_fast.errors import ConfigError, ModelError, one_line
from influence_fast.gradients.rows.factors import projected_axes
from influence_fast.gradients.rows.layout import LayoutEntry, in_top_layers
from influence_fast.gradients.rows.projection import Projection, row_name
from influence_fast.gradients.targets import TRANSPOSED, WEIGHT
from influence_fast.guards import reading
from influence_fast.influence.damping import GRID, Damping, RowBlocks, check_damping, ridge, split_rows
from influence_fast.philox import sjlt_map

if TYPE_CHECKING:
    from influence_fast.training.optimizer_states import AdamState

_Value = TypeVar("_Value")

# of an adapter that was saved alone, and of accelerate's save_state, which saves the whole model
WEIGHTS = ("adapter_model.safetensors", "model.safetensors")


@dataclass(frozen=True)
class Adam:
    """Divides queries by sqrt(v) + eps, coordinate by coordinate."""

    scale: torch.Tensor  # [k] fp64, sqrt(v) + eps
    damping: float  # as it was used: with "auto", the share that was picked
    normalize: bool = False

    def apply(self, queries: torch.Tensor) -> torch.Tensor:
        return (queries / self.scale.to(queries.device)).to(queries.dtype)

    def whiten(self, rows: torch.Tensor) -> torch.Tensor:
        """Divide rows [n, k] by the root of the scale, in fp64."""
        return rows.to(self.scale) / self.scale.sqrt()


def fit_adam(
    row_blocks: RowBlocks, blocks: list[tuple[int, int]], damping: Damping, moments: torch.Tensor | None = None
) -> Adam:
    """Fit `Adam` in one pass over the rows; in none if `moments` [k] are given.

    "auto" is for moments of the rows: held-out rows, as draws from N(0, H^2), are to be likeliest (see `damping`; of
    its form only the variance (sqrt(v) + eps)^2 differs).
    """
    check_damping(damping)
    if moments is not None:
        if isinstance(damping, str):
            raise ConfigError("damping='auto' cannot be picked for an optimizer's own moments; give a number")
        if moments.shape != (blocks[-1][1],):
            raise ConfigError(f"moments of shape {tuple(moments.shape)} do not fit rows of {blocks[-1][1]} numbers")
        if not bool((moments >= 0).all()):
            raise ConfigError("second moments cannot be negative or NaN; read them by adam_moments from a checkpoint")
        return Adam(_scale(moments.to(torch.float64).cpu(), blocks, damping), damping=damping)
    fitted = torch.zeros(blocks[-1][1], dtype=torch.float64)
    held = torch.zeros_like(fitted)
    counts = [0, 0]
    for rows, others in split_rows("adam", row_blocks, damping):
        counts[0] += len(rows)
        counts[1] += len(others)
        fitted += rows.square().sum(dim=0).cpu()
        held += others.square().sum(dim=0).cpu()
    if isinstance(damping, str):
        means = fitted / counts[0], held / counts[1]
        damping = max(GRID, key=lambda share: _log_likelihood(_scale(means[0], blocks, share), means[1]))
    return Adam(_scale((fitted + held) / sum(counts), blocks, damping), damping=damping)


def adam_moments(
    checkpoint: str | Path,
    layout: Sequence[LayoutEntry],
    *,
    projection: Projection | None = None,
    beta2: float | None = None,
) -> torch.Tensor:
    """Read second moments v / (1 - beta2^step) from a checkpoint's Adam state: (k,) fp64, in a gradient row's order.

    checkpoint: a folder of `inf.finetune`, or of a transformers' Trainer that trained the LoRA factors alone.
    layout: `gradient_layout(model)`, exact; of a fully trained model's weights
        `gradient_layout(model, Projection("none", target=...))`.
    projection: as the rows were projected (see the top of this file).
    beta2: the optimizer's, for states that do not hold their own betas; by default 0.999, which is then said.

    Raises ModelError when the checkpoint holds no optimizer state, another optimizer's (named), or none for a factor of
    the layout, or one that is not usable (step 0, NaN, infinite or negative moments).
    """
    from influence_fast.training.fine_tuning import load_adam_states
    from influence_fast.training.optimizer_states import optimizer_file
    from influence_fast.training.sft import NAMES

    folder = Path(checkpoint)
    if optimizer_file(folder) is not None and not (folder / NAMES).exists():
        by_factor = _in_the_models_order(folder, layout, beta2)
    else:
        by_factor = _by_factor(load_adam_states(folder, beta2))
    layout = in_top_layers(layout, projection)
    pieces = []
    for entry in layout:
        turned = entry.factor == TRANSPOSED
        name = f"{plain_name(entry.module)}.{WEIGHT if turned else entry.factor}"
        state = by_factor.get(name)
        shape = entry.shape[::-1] if turned else entry.shape
        if state is None or _block_shape(state.second.shape) != tuple(shape):
            found = "none" if state is None else f"one of shape {tuple(state.second.shape)}"
            raise ModelError(
                f"{checkpoint}: needs Adam's state of {name} {tuple(shape)}, holds {found}; "
                f"take a checkpoint of this very {'model' if _of_weights(layout) else 'adapter'}"
            )
        if fault := state.fault:
            raise ModelError(
                f"{checkpoint}: Adam's state of {name} has {fault}: take another checkpoint, or score without the "
                "optimizer's moments"
            )
        moment = state.unbiased.T if turned else state.unbiased.view(entry.shape)
        pieces.append(moment if projection is None else _projected(moment, entry, projection))
    if projection is None or projection.width is None:
        return torch.cat([piece.flatten() for piece in pieces])
    return _sketched(pieces, layout, projection, projection.width)


def _of_weights(layout: Sequence[LayoutEntry]) -> bool:
    return any(entry.factor in (WEIGHT, TRANSPOSED) for entry in layout)


_FACTOR = re.compile(r"(.*\.)(lora_\w+)(?:\.((?!weight$|bias$)[^.]+))?(\.weight|\.bias|)$")


def _factor_name(name: str) -> str:
    """Return `base_model.model.<module>.lora_A.<adapter>.weight` as `<module>.lora_A.<adapter>`, or both without a
    name.

    The bias of B is `<module>.lora_bias`, as in a row's layout; names of other parameters stay.
    """
    found = _FACTOR.match(plain_name(name))
    if found is None:
        return plain_name(name)
    module, kind, adapter, end = found.groups()
    return module + ("lora_bias" if end == ".bias" else kind) + (f".{adapter}" if adapter else "")


def _by_factor(values: Mapping[str, _Value]) -> dict[str, _Value]:
    """Return values of parameters by factor: with the adapter's name, and without it where a module has but one."""
    found = {_factor_name(name): value for name, value in values.items()}
    short = {name: re.sub(r"(\.lora_\w+)\.[^.]+$", r"\1", name) for name in found}
    counts = Counter(short.values())
    return found | {short[name]: value for name, value in found.items() if counts[short[name]] == 1}


def _block_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """Return a parameter's shape as its block in a row has it: a vector is one column."""
    return tuple(shape) if len(shape) != 1 else (shape[0], 1)


def _in_the_models_order(folder: Path, layout: Sequence[LayoutEntry], beta2: float | None) -> dict[str, AdamState]:
    """Return Adam's states that a trainer numbered, by factor; those that FSDP gathered have names of their own.

    transformers puts parameters into the optimizer in the model's order, those with weight decay first, which biases
    have not; where all are LoRA factors the numbers follow the layout. Raises ModelError where they need not: the
    adapter saved beside them has other factors, more is trained, or two groups share them otherwise.
    """
    from influence_fast.training.optimizer_states import read_adam

    optimizer = read_adam(folder, beta2)
    if all(isinstance(member, str) for group in optimizer.groups for member in group):
        return _by_factor({str(name): state for name, state in optimizer.states.items()})
    if _of_weights(layout):
        raise ModelError(
            f"{folder}: which Adam state is which weight's cannot be told, as transformers' Trainer numbers them: "
            "train by influence_fast.finetune with lora=None and save_checkpoints set, or score without the "
            "optimizer's moments"
        )
    groups = [group for group in optimizer.groups if group]
    biases = [entry for entry in layout if entry.factor.startswith("lora_bias")]
    grouped = [[entry for entry in layout if entry not in biases], biases] if biases and len(groups) == 2 else [layout]
    ordered = [entry for group in grouped for entry in group]
    names = [f"{plain_name(entry.module)}.{entry.factor}" for entry in ordered]
    shapes = [tuple(entry.shape) for entry in ordered]
    try:
        saved = _saved_factors(folder)
    except (OSError, SafetensorError) as error:
        reason = f"{' or '.join(WEIGHTS)} cannot be read ({one_line(error, 200)})"
    else:
        named = _by_factor(saved)
        if len(saved) != len(layout) or [named.get(name) for name in names] != shapes:
            reason = "the weights saved beside it have another adapter's factors than the model"
        elif [len(group) for group in groups] != [len(group) for group in grouped]:
            sizes = " + ".join(str(len(group)) for group in groups) or "none"
            reason = (
                f"the optimizer holds {sizes} parameters in groups, and the adapter is {len(layout)} factors in one"
            )
        else:
            states = [optimizer.states.get(member) for group in groups for member in group]
            if [None if state is None else _block_shape(state.second.shape) for state in states] == shapes:
                return {name: state for name, state in zip(names, states, strict=True) if state is not None}
            reason = "its states are not of these factors in the model's order"
    raise ModelError(
        f"{folder}: which Adam state is which factor's cannot be told, as {reason}: give a checkpoint in which "
        "transformers' Trainer trained this adapter's LoRA factors alone, or train by influence_fast.finetune with "
        "save_checkpoints set"
    )


def _saved_factors(folder: Path) -> dict[str, tuple[int, ...]]:
    """Read the shapes of the LoRA parameters in the weights beside an optimizer's state, as their blocks have them.

    peft saves adapters of other names than "default" in folders of their names beside that one, and none by its name.
    """
    path = next((folder / name for name in WEIGHTS if (folder / name).is_file()), folder / WEIGHTS[0])
    others = sorted(folder.glob(f"*/{WEIGHTS[0]}")) if path.name == WEIGHTS[0] else []
    found = {}
    for one in (path, *others):
        adapter = one.parent.name if one is not path else "default" if others else ""
        with reading(one, ModelError), safe_open(one, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (not a dict)
                if ".lora_" in key:
                    name = _factor_name(key) + (f".{adapter}" if adapter else "")
                    found[name] = _block_shape(file.get_slice(key).get_shape())
    return found


def _projected(moment: torch.Tensor, entry: LayoutEntry, projection: Projection) -> torch.Tensor:
    """Return v' of one factor after the side projections, whose entries all have the square 1 / p."""
    axes = [axis for axis, projected in enumerate(projected_axes(entry.factor, projection)) if projected]
    if not axes:
        return moment
    shape = [projection.dim if axis in axes else -1 for axis in range(moment.dim())]
    return moment.sum(dim=axes, keepdim=True).div(projection.dim ** len(axes)).expand(shape)


def _sketched(
    pieces: list[torch.Tensor], layout: Sequence[LayoutEntry], projection: Projection, width: int
) -> torch.Tensor:
    """Return v' after the sketch of the whole row: sums over buckets, or the mean over all for dense signs."""
    if projection.kind == "rademacher":
        return torch.stack([piece.sum() for piece in pieces]).sum().div(width).expand(width)
    out = torch.zeros(width, dtype=torch.float64)
    for piece, entry in zip(pieces, layout, strict=True):
        name = row_name(entry.module, entry.factor)
        bucket, _ = sjlt_map(projection.seed, name, piece.numel(), width)
        out.index_add_(0, bucket, piece.flatten())
    return out


def _scale(moments: torch.Tensor, blocks: list[tuple[int, int]], damping: float) -> torch.Tensor:
    scale = moments.sqrt()
    for start, end in blocks:
        scale[start:end] += ridge(damping, float(scale[start:end].mean()))
    return scale


def _log_likelihood(scale: torch.Tensor, held: torch.Tensor) -> float:
    return -0.5 * float((2 * scale.log() + held / scale.square()).sum())
