"""Adapters from disk or the hub, put on a base model: all that is stored is at work, or the adapter is refused.

peft itself loads what it can: factors that its configuration leaves out and factors that the file lacks go without a
word, and so does a base model other than the one that was trained on.
"""

from __future__ import annotations

import logging
import re
from typing import Any

import torch
from torch import nn

from influence_fast.data.adapter_names import is_adapter_parameter, plain_name
from influence_fast.errors import ModelError, one_line, truncated_list, warn_once
from influence_fast.gradients.model.trained_beside import beside_warning
from influence_fast.guards import reading
from influence_fast.training.adapter_bases import warnings_of
from influence_fast.training.adapter_checks import (
    check_base_stays,
    check_complete,
    check_fit,
    check_loaded,
    check_ranks,
    check_whole_modules,
    is_saved_whole,
    left_out,
    setting_without,
)
from influence_fast.training.adapter_files import (
    WRAPPERS,
    Shapes,
    adapter_folder,
    lora_config,
    split_key,
    stored_shapes,
    stored_tensors,
)
from influence_fast.training.adapter_settings import check_patterns, check_sizes
from influence_fast.training.files import ADAPTER_CONFIG
from influence_fast.training.listed_experts import ExpertFactors, is_listed
from influence_fast.training.vocabulary import OWN_ROWS, embedding_matrices, fit_to_adapter

logger = logging.getLogger(__name__)


def attach_adapter(model: nn.Module, adapter: str, source: str, *, trainable: bool = True) -> nn.Module:
    """Attach the LoRA adapter of a folder or hub id to `model` in place.

    `source` is where the model came from, for messages and to tell another base; empty where that is not known.
    A model with more or fewer embeddings than the adapter stores is resized first (`fit_vocabulary`), which stays when
    the adapter is taken off again.

    Returns the `PeftModel` around it. Warns, once, of an adapter of another base and of one that trains more than
    LoRA factors.

    Raises ModelError: not found, not a LoRA adapter, incomplete, one that does not fit (first mismatch, shapes), one
    with stored tensors that its own configuration leaves out.
    """
    with reading(f"the adapter {adapter}", ModelError):
        return _attached(model, adapter, source, trainable)


def _attached(model: nn.Module, adapter: str, source: str, trainable: bool) -> nn.Module:
    from peft import PeftModel

    folder = adapter_folder(adapter)
    config = lora_config(folder, adapter)
    shapes = stored_shapes(folder, adapter)
    check_patterns(model, config, f"the adapter {adapter}, {ADAPTER_CONFIG}")
    check_sizes(model, config, shapes, adapter)
    check_base_stays(config, adapter)
    check_whole_modules(model, shapes, config, adapter)
    named, source = source, source or "this model"
    for warning in warnings_of(config, adapter, model, named):
        warn_once(logger, warning)
    if replaced := _replaced_weights(model, folder, config, shapes):
        warn_once(logger, beside_warning(replaced))
    fit_to_adapter(model, shapes, config, adapter, source)
    check_fit(model, shapes, adapter, source)
    check_ranks(config, shapes, adapter)
    try:
        wrapped = PeftModel.from_pretrained(model, folder, is_trainable=trainable, config=config)  # type: ignore[arg-type]
    except Exception as error:  # peft trusts its settings, and raises whatever they lead to
        stored = {module for key in shapes for module, factor in [split_key(key)] if factor}
        for module in sorted(() if _listed(model, shapes) else stored):
            if setting := setting_without(config, module):
                raise ModelError(left_out(adapter, module, setting)) from error
        raise ModelError(
            f"the adapter {adapter} does not fit {source} ({one_line(error)}); load it over the model it was trained on"
        ) from error
    experts = ExpertFactors(wrapped, {split_key(key) for key in shapes}) if _listed(model, shapes) else None
    if experts is None:
        check_complete(wrapped, shapes, adapter, source)
    bad = [
        name for name, p in wrapped.named_parameters() if is_adapter_parameter(name) and not bool(p.isfinite().all())
    ]
    if bad:
        raise ModelError(
            f"the adapter {adapter} holds NaN or infinite numbers in {truncated_list(bad)}; train it again"
        )
    check_loaded(wrapped, folder, config, adapter, experts)
    return wrapped


def _listed(model: nn.Module, shapes: Shapes) -> bool:
    """Return whether an adapter has factors of experts in a list, and the model has experts in one parameter."""
    modules = {name for name, _ in model.named_modules()}
    return any(factor and is_listed(module, modules) for module, factor in map(split_key, shapes))


def _replaced_weights(model: nn.Module, folder: str, config: Any, shapes: Shapes) -> list[str]:
    """Find the base's own parameters that the adapter stores with other values.

    They were unfrozen by hand when it was trained. Those that the configuration names (modules_to_save, bias) are
    told by it. Embeddings may be stored only because the vocabulary was resized; so rows that the base has decide.
    """
    named = dict(model.named_parameters(remove_duplicate=False))
    biases = getattr(config, "bias", "none") != "none"
    matrices = {f"{module}.weight" for module, _ in embedding_matrices(model)}
    found = []
    candidates = {key: re.sub(WRAPPERS + r"(?=\.\w+$)", "", plain_name(key)) for key in shapes if "lora_" not in key}
    if not any(name in named for name in candidates.values()):
        return []
    for key, values in stored_tensors(folder):
        name = candidates.get(key, "")
        if name not in named or (biases and name.endswith(".bias")) or is_saved_whole(name, config):
            continue
        mine = named[name].detach()
        rows = min(len(mine), len(values))
        if name in matrices:
            rows = min(rows, OWN_ROWS.get(model, rows))
        if not torch.equal(mine[:rows].cpu(), values[:rows].to(mine.dtype)):
            found.append(name)
    return sorted(set(found))
