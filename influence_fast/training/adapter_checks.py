"""Refuse an adapter that does not fit a model, or of which some part would not be at work."""

from __future__ import annotations

import copy
import re
from typing import Any

import torch
from torch import nn

from influence_fast.data.adapter_names import is_adapter_parameter, plain_name
from influence_fast.errors import ModelError
from influence_fast.training.adapter_files import ADAPTER_NAME, WRAPPERS, Shapes, split_key, stored_tensors
from influence_fast.training.files import ADAPTER_CONFIG
from influence_fast.training.listed_experts import ExpertFactors, is_listed
from influence_fast.training.vocabulary import embedding_matrices, stored_embeddings

#: How factors begin (init_lora_weights) where the base stays as it is; the others take what they begin with out of it.
_PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")


def check_base_stays(config: Any, adapter: str) -> None:
    """Raise ModelError for settings by which peft changes the base model itself; it does not put it back again."""
    if getattr(config, "layer_replication", None):
        raise ModelError(
            f"the adapter {adapter} rearranges the base model's layers (layer_replication in its {ADAPTER_CONFIG}), "
            "which is not supported: put back the settings it was trained with, or save the model with those layers "
            "and train over it"
        )
    start = getattr(config, "init_lora_weights", True)
    if (start.lower() if isinstance(start, str) else start) not in _PLAIN_STARTS:
        raise ModelError(
            f"the adapter {adapter} takes its first factors out of the base weights (init_lora_weights {start!r} in "
            f"its {ADAPTER_CONFIG}): save it by save_pretrained(..., path_initial_model_for_weight_conversion=...), or "
            "put true there if its factors belong to this base as it is"
        )


def check_whole_modules(model: nn.Module, shapes: Shapes, config: Any, adapter: str) -> None:
    """Raise ModelError for a stored weight of the base's own that no setting trains.

    peft would write it over the base's, where a tied embedding is two matrices at once. Embeddings may be stored
    because the vocabulary was resized or by save_embedding_layers, which stores all of them.
    """
    named = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    matrices = {name for name, _ in embedding_matrices(model)}
    all_stored = matrices <= stored_embeddings(model, shapes).keys()
    biases = getattr(config, "bias", "none") != "none"
    for key in sorted(key for key in shapes if "lora_" not in key):
        name = plain_name(key)
        plain = re.sub(WRAPPERS + r"(?=\.\w+$)", "", name)
        module, _, kind = plain.rpartition(".")
        if plain not in named or is_saved_whole(plain, config) or (module in matrices and all_stored):
            continue
        if kind == "bias" and not biases and module not in matrices:
            raise ModelError(left_out(adapter, plain, "bias or modules_to_save"))
        if kind != "bias" and name == plain:
            raise ModelError(left_out(adapter, module, "modules_to_save"))


def is_saved_whole(name: str, config: Any) -> bool:
    """Return whether modules_to_save names a module that the parameter is in.

    Names are compared by their ends, as peft does.
    """
    ends = tuple(getattr(config, "modules_to_save", None) or ())
    parts = f"base_model.model.{name}".split(".")
    return any(".".join(parts[:i]).endswith(ends) for i in range(1, len(parts)))


def check_fit(model: nn.Module, shapes: Shapes, adapter: str, source: str) -> None:
    """Check every stored factor against the module it names: `lora_A (r, d_in)`, `lora_B (d_out, r)`."""
    modules = dict(model.named_modules())
    for key in sorted(shapes):
        name, factor = split_key(key)
        if factor is None:
            continue
        name = name.replace(".base_layer", "")  # of a module with two wrapped parameters (target_parameters)
        if is_listed(name, modules):
            continue  # `check_loaded` looks for it among the experts of one parameter
        if name not in modules:
            raise ModelError(
                f"the adapter {adapter} does not fit {source}: the model has no module {name!r}; "
                "load it over the model it was trained on"
            )
        base = _linear_shape(modules[name])
        if len(shapes[key]) not in (1, 2, 4, 5):  # of linear and embedding layers, and of convolutions
            raise ModelError(
                f"the adapter {adapter} stores {key} of shape {shapes[key]}, which is no factor; save it again"
            )
        if base is None or len(shapes[key]) < 2:  # a vector is the bias of a factor (lora_bias)
            continue
        d_out, d_in = base
        expected, found = (d_in, shapes[key][1]) if factor == "lora_A" else (d_out, shapes[key][0])
        if expected != found:
            side = "inputs" if factor == "lora_A" else "outputs"
            raise ModelError(
                f"the adapter {adapter} does not fit {source}: {name} has weight {base}, {factor} has shape "
                f"{shapes[key]}, so {found} {side} against {expected}; load it over the model it was trained on"
            )


def _linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """Return (d_out, d_in) of a linear module, None for another."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    if type(module).__name__ == "Conv1D":  # GPT-2's linear, its weight stored as (d_in, d_out)
        weight = module.weight
        assert isinstance(weight, torch.Tensor)
        return int(weight.shape[1]), int(weight.shape[0])
    return None


def check_ranks(config: Any, shapes: Shapes, adapter: str) -> None:
    """Raise ModelError if a stored factor has another rank than the configuration gives its module."""
    from peft.utils.other import get_pattern_key

    if getattr(config, "target_parameters", None):  # whose factors hold the ranks of all experts together
        return
    pattern = getattr(config, "rank_pattern", None) or {}
    for key in sorted(shapes):
        module, factor = split_key(key)
        if factor != "lora_A" or not key.endswith(".weight"):
            continue
        rank = pattern.get(get_pattern_key(list(pattern), module), config.r)
        if rank != shapes[key][0]:
            raise ModelError(
                f"the adapter {adapter} stores factors of rank {shapes[key][0]} for {module}, and its "
                f"{ADAPTER_CONFIG} says {rank} (r, rank_pattern): put back the settings it was trained with"
            )


def check_complete(wrapped: nn.Module, shapes: Shapes, adapter: str, source: str) -> None:
    """Raise ModelError for a factor that the file lacks, which peft would leave at its initial value."""
    for name, _ in wrapped.named_parameters():
        if not is_adapter_parameter(name):
            continue
        stored_name = re.sub(rf"\.{ADAPTER_NAME}(?=\.|$)", "", name)
        if stored_name not in shapes and stored_name.removesuffix(".weight") not in shapes:
            module, mark, factor = plain_name(stored_name).rpartition(".lora_")
            factor = f"{mark}{factor}".removeprefix(".").removesuffix(".weight")
            raise ModelError(
                f"the adapter {adapter} does not fit {source}: it has no {factor} for the module {module!r}; "
                "load it over the model it was trained on"
            )


def check_loaded(
    wrapped: nn.Module, folder: str, config: Any, adapter: str, experts: ExpertFactors | None = None
) -> None:
    """Raise ModelError if a stored tensor is not in the model, or not with its values.

    experts: where those of experts in a list are, for a model that has them in one parameter.
    """
    loaded: dict[str, torch.Tensor] = {}
    for name, tensor in wrapped.state_dict().items():
        stored_name = re.sub(rf"\.{ADAPTER_NAME}(?=\.|$)", "", name)
        loaded[stored_name] = tensor
        if ".modules_to_save." in stored_name:
            loaded[stored_name.replace(".modules_to_save.", ".")] = tensor
        if stored_name.endswith(".lora_magnitude_vector.weight"):
            loaded[stored_name.removesuffix(".weight")] = tensor
    for key, values in stored_tensors(folder):
        module, factor = split_key(key)
        if key not in loaded and experts is not None and factor and experts.take(module, factor, values):
            continue
        if key not in loaded:
            if setting := setting_without(config, module) if factor else _setting_of_key(key):
                raise ModelError(left_out(adapter, module if factor else plain_name(key), setting))
            raise ModelError(
                f"the adapter {adapter} stores {key}, which peft did not load: its {ADAPTER_CONFIG} is not of these "
                "weights, or this version of peft names them otherwise; save it again"
            )
        found = loaded[key]
        expected = values.to(found.device, found.dtype)
        if found.shape != expected.shape or not torch.allclose(found, expected, rtol=0, atol=0, equal_nan=True):
            raise ModelError(
                f"the adapter {adapter} stores other values of {key} than peft loaded; save it again with this version "
                "of peft"
            )
    if experts is not None and not experts.whole:
        raise ModelError(
            f"the adapter {adapter} does not store the factors of all experts and layers that its {ADAPTER_CONFIG} "
            "names: put back the settings it was trained with"
        )


def left_out(adapter: str, module: str, setting: str) -> str:
    return (
        f"the adapter {adapter} stores numbers of {module}, which {setting} in its {ADAPTER_CONFIG} leaves out: put "
        "back the settings it was trained with"
    )


def setting_without(config: Any, module: str) -> str:
    """Find the setting of an adapter's configuration that keeps `module` from having factors; empty if none does."""
    from peft.tuners.tuners_utils import check_target_module_exists

    def targeted(**changes: Any) -> bool:
        changed = copy.copy(config)
        for name, value in changes.items():
            setattr(changed, name, value)
        return changed.target_modules == "all-linear" or bool(check_target_module_exists(changed, module))

    if targeted():
        return ""
    for name in ("exclude_modules", "modules_to_save", "layers_pattern", "layers_to_transform"):
        if getattr(config, name, None) and targeted(**{name: None}):
            return name
    return "target_modules"


def _setting_of_key(key: str) -> str:
    """Return the setting that a stored tensor other than a factor comes from; empty if it is not known."""
    for mark, setting in (("lora_magnitude_vector", "use_dora"), ("trainable_tokens", "trainable_token_indices")):
        if mark in key:
            return setting
    return "target_modules" if "lora_embedding_" in key else ""
