"""What an adapter or a model trains beside LoRA factors, which no gradient row holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from influence_fast.data.adapter_names import is_adapter_parameter, plain_name
from influence_fast.data.fingerprints import active_adapters
from influence_fast.errors import truncated_list


def beside_warning(others: Sequence[str]) -> str:
    """Return what is said of an adapter that trains `others` (see `trained_beside`)."""
    return (
        f"the adapter trains more than LoRA factors ({truncated_list(others)}); gradients and scores here are of the "
        "factors alone: train without modules_to_save, trainable_token_indices and bias to have all of it scored"
    )


def unscored_in(model: nn.Module) -> list[str]:
    """Return what is trained but in no gradient row: what an adapter has beside LoRA factors, and unfrozen weights."""
    return [*_beside_in(model), *_unfrozen_in(model)]


def _beside_in(model: nn.Module) -> list[str]:
    """List what else an adapter has than LoRA factors: whole modules saved with it, rows of embeddings, and biases."""
    from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper

    saved = []
    for name, module in model.named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            saved.append(name)
        elif isinstance(module, TrainableTokensWrapper):
            saved.append(f"tokens of {name}")
    configs = getattr(model, "peft_config", {})
    kinds = {kind for name in active_adapters(model) or () for kind in _biases(configs.get(name))}
    return saved + sorted(kinds)


def _unfrozen_in(model: nn.Module) -> list[str]:
    """List parameters that ask for gradients and are no adapter's: unfrozen by hand, training moves them too."""
    from peft.utils.other import AuxiliaryTrainingWrapper

    configs = getattr(model, "peft_config", {})
    biases = any(_biases(configs.get(name)) for name in active_adapters(model) or ())
    wrapped = [f"{name}." for name, module in model.named_modules() if isinstance(module, AuxiliaryTrainingWrapper)]
    return [
        plain_name(name)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
        and not is_adapter_parameter(name)
        and not name.startswith(tuple(wrapped))
        and not (biases and name.endswith(".bias"))
    ]


def trained_beside(config: Any) -> list[str]:
    """Return what a peft configuration trains beside LoRA factors: whole modules by its names, tokens, and biases."""
    tokens = ["trainable_token_indices"] if getattr(config, "trainable_token_indices", None) else []
    return [*(getattr(config, "modules_to_save", None) or ()), *tokens, *_biases(config)]


def _biases(config: Any) -> list[str]:
    kind = getattr(config, "bias", "none")
    return [] if kind == "none" else [f"bias={kind!r}"]
