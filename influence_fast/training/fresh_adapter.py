"""A fresh LoRA adapter on a model that is to be fine-tuned."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from influence_fast.errors import ConfigError, ModelError, setting, truncated_list, warn_once
from influence_fast.gradients.model.scorable import unscorable_layers
from influence_fast.training.adapter_settings import check_patterns
from influence_fast.training.settings import LoraSettings

logger = logging.getLogger(__name__)

_WIDEST = 8  # times the rank of a weight that an adapter's may have: more than any use has


def attach_lora(model: torch.nn.Module, lora: LoraSettings, seed: int) -> torch.nn.Module:
    """Return `model` with a fresh adapter, its A factors drawn from `seed`; of "all-linear" those that can be scored.

    Raises ModelError where LoRA does not fit.
    """
    wrapped = _wrapped(model, lora, seed)
    if lora.target_modules != "all-linear":
        return wrapped
    if not (left_out := unscorable_layers(wrapped)):
        return wrapped
    name, why = next(iter(left_out.items()))
    warn_once(
        logger,
        f"lora.target_modules: all-linear leaves out layers that cannot be scored: {truncated_list(left_out)} "
        f"({name}: {why})",
    )
    wrapped.unload()  # type: ignore[operator]
    return _wrapped(model, lora, seed, exclude=list(left_out))


def _wrapped(model: torch.nn.Module, lora: LoraSettings, seed: int, exclude: Sequence[str] = ()) -> torch.nn.Module:
    from peft import LoraConfig, get_peft_model

    targets = lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules)
    settings = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]
        lora_dropout=lora.dropout,
        target_modules=targets,
        target_parameters=list(lora.target_parameters) or None,
        exclude_modules=list(exclude) or None,
        task_type="CAUSAL_LM",
    )
    check_patterns(model, settings, "lora")
    check_rank(model, lora.r)
    torch.manual_seed(seed)
    try:
        wrapped = get_peft_model(model, settings)  # type: ignore[arg-type]
        for one in wrapped.peft_config.values():
            for name in ("target_modules", "exclude_modules", "target_parameters"):
                names = getattr(one, name, None)
                if isinstance(names, set):  # its order, which is written, is another in each process
                    setattr(one, name, sorted(names))
        return wrapped
    except ValueError as error:
        reason = str(error).strip().splitlines()[0]
        names = ["lora.target_modules", *(["lora.target_parameters"] if lora.target_parameters else [])]
        remedy = f"Mend {' or '.join(map(setting, names))}."
        if "lora_dropout" in reason:  # peft turns names of expert linears into those of their fused parameters
            remedy = f"Set {setting('lora.dropout')} to 0, or leave experts out of {setting('lora.target_modules')}."
        raise ModelError(f"LoRA does not fit this model: {reason} {remedy}") from error


def check_rank(model: torch.nn.Module, rank: int) -> None:
    """Raise ConfigError for a rank far beyond every weight of the model, whose factors would fill the memory."""
    widths = [min(m.weight.shape) for m in model.modules() if isinstance(m, torch.nn.Linear)]
    if widths and rank > _WIDEST * max(widths):
        raise ConfigError(
            f"{setting('lora.r')} is {rank}, and no weight of the model has a rank above {max(widths)}: choose a "
            "lower one"
        )
