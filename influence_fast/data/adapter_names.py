"""Names of parameters and modules in a model that peft has wrapped."""

from __future__ import annotations

ADAPTER_MARK = "lora_"  # in the name of every parameter of an adapter
_WRAPPER = "base_model.model."


def plain_name(name: str) -> str:
    """Return a module's or parameter's name without peft's wrapper prefix, so that a wrapped model and its base agree.

    A base weight under a LoRA layer keeps the `base_layer` in its name.
    """
    return name.removeprefix(_WRAPPER)


def is_adapter_parameter(name: str) -> bool:
    """Return whether a parameter of that name belongs to the adapter and not to the base model."""
    return ADAPTER_MARK in name
