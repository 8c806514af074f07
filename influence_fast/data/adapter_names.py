"""Names of parameters and modules in a model that peft has wrapped."""

from __future__ import annotations

ADAPTER_MARK = "lora_"  # in the name of every parameter of an adapter
_WRAPPER = "base_model.model."


def plain_name(name: str) -> str:
    """A module's or parameter's name without the wrapper around the model: the same for a wrapped model and its base.

    A base weight under a LoRA layer keeps the `base_layer` in its name.
    """
    return name.removeprefix(_WRAPPER)


def is_adapter_parameter(name: str) -> bool:
    """Whether a parameter of that name is the adapter's and not the base model's."""
    return ADAPTER_MARK in name
