"""Adapters from disk or the hub, put on a base model: all that is stored is at work, or the adapter is refused.

peft itself loads what it can: factors that its configuration leaves out and factors that the file lacks go without a
word, and so does a base model other than the one that was trained on.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import re
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from influence_fast.data.adapter_names import is_adapter_parameter, plain_name
from influence_fast.errors import ModelError, listing, one_line, say_once
from influence_fast.gradients.adapter_kinds import check_kind, kind_of
from influence_fast.gradients.trained_beside import beside_warning, trained_beside
from influence_fast.guards import reading
from influence_fast.training.adapter_settings import check_kinds, check_patterns, check_sizes
from influence_fast.training.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, cannot_load, check_folder
from influence_fast.training.listed_experts import ExpertFactors, is_listed

logger = logging.getLogger(__name__)

Shapes = Mapping[str, tuple[int, ...]]

#: Embeddings that a resized base had of its own; further rows are no weights to compare an adapter's with.
_OWN_ROWS: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()

_NAME = "default"  # what peft calls an adapter that it is given no name for
#: How factors begin (init_lora_weights) where the base stays as it is; the others take what they begin with out of it.
_PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")
# what peft puts between a module's name and the weight that it stores for it
_WRAPPERS = r"(?:\.(?:modules_to_save|original_module|base_layer|token_adapter))*"


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

    folder = _adapter_folder(adapter)
    config = _lora_config(folder, adapter)
    shapes = _stored_shapes(folder, adapter)
    check_patterns(model, config, f"the adapter {adapter}, {ADAPTER_CONFIG}")
    check_sizes(model, config, shapes, adapter)
    _check_base_stays(config, adapter)
    _check_whole_modules(model, shapes, config, adapter)
    named, source = source, source or "this model"
    for warning in _warnings(config, adapter, model, named):
        say_once(logger, warning)
    if replaced := _replaced_weights(model, folder, config, shapes):
        say_once(logger, beside_warning(replaced))
    _fit_vocabulary(model, shapes, config, adapter, source)
    _check_fit(model, shapes, adapter, source)
    _check_ranks(config, shapes, adapter)
    try:
        wrapped = PeftModel.from_pretrained(model, folder, is_trainable=trainable, config=config)  # type: ignore[arg-type]
    except Exception as error:  # peft trusts its settings, and raises whatever they lead to
        stored = {module for key in shapes for module, factor in [_split_key(key)] if factor}
        for module in sorted(() if _listed(model, shapes) else stored):
            if setting := _setting_without(config, module):
                raise ModelError(_left_out(adapter, module, setting)) from error
        raise ModelError(
            f"the adapter {adapter} does not fit {source} ({one_line(error)}); load it over the model it was trained on"
        ) from error
    experts = ExpertFactors(wrapped, {_split_key(key) for key in shapes}) if _listed(model, shapes) else None
    if experts is None:
        _check_complete(wrapped, shapes, adapter, source)
    bad = [
        name for name, p in wrapped.named_parameters() if is_adapter_parameter(name) and not bool(p.isfinite().all())
    ]
    if bad:
        raise ModelError(f"the adapter {adapter} holds NaN or infinite numbers in {listing(bad)}; train it again")
    _check_loaded(wrapped, folder, config, adapter, experts)
    return wrapped


def _listed(model: nn.Module, shapes: Shapes) -> bool:
    """Whether an adapter has factors of experts in a list, and the model has experts in one parameter."""
    modules = {name for name, _ in model.named_modules()}
    return any(factor and is_listed(module, modules) for module, factor in map(_split_key, shapes))


def adapter_warnings(adapter: str, model: nn.Module | None = None, source: str = "") -> list[str]:
    """Return what to know of the adapter in a folder or of a hub id, one line each.

    What it trains that scores do not cover and, with the base `model` loaded from `source`, that it was trained on
    another one. None for the folder of a whole fine-tuned model. Raises ModelError where there is no adapter.
    """
    folder = Path(adapter).expanduser()
    if (folder / "config.json").exists() and not (folder / ADAPTER_CONFIG).exists():
        return []
    with reading(f"the adapter {adapter}", ModelError):
        config = _lora_config(_adapter_folder(adapter), adapter)
        found = [] if model is None else _warnings(config, adapter, model, source)
        others = trained_beside(config)
        return found + ([beside_warning(others)] if others else [])


# ---- files -----------------------------------------------------------------------------------------------


def _adapter_folder(adapter: str) -> str:
    """The local folder of an adapter, fetched from the hub where it is not local."""
    check_folder(adapter, ADAPTER_CONFIG, "adapter")
    folder = Path(adapter).expanduser()
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(adapter, allow_patterns=[ADAPTER_CONFIG, ADAPTER_WEIGHTS]))
        except Exception as error:
            raise ModelError(cannot_load(adapter, "adapter", error)) from error
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (folder / name).is_file():
            raise ModelError(
                f"the adapter {adapter} has no {name}; save it with save_pretrained (safetensors, not .bin)"
            )
    return str(folder)


def _lora_config(folder: str, adapter: str) -> Any:
    from peft import PeftConfig

    try:  # first, as peft may not know the kind, or not its settings
        kind = kind_of(json.loads((Path(folder) / ADAPTER_CONFIG).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        kind = ""
    if kind:
        check_kind(f"the adapter {adapter}", kind)
    try:
        config = PeftConfig.from_pretrained(folder)
    except Exception as error:  # as many kinds as fields of the wrong kind
        raise ModelError(cannot_load(adapter, "adapter", error)) from error
    check_kind(f"the adapter {adapter}", kind_of(config))
    check_kinds(config, adapter)
    return config


def _stored_shapes(folder: str, adapter: str) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of the adapter, from the header alone."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(os.path.join(folder, ADAPTER_WEIGHTS), framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ModelError(f"the adapter {adapter} has a damaged {ADAPTER_WEIGHTS} ({error}); save it again") from error


def _stored(folder: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and tensor of everything in the adapter's file, one at a time."""
    from safetensors import safe_open

    with safe_open(os.path.join(folder, ADAPTER_WEIGHTS), framework="pt") as file:
        for name in sorted(file.keys()):
            yield name, file.get_tensor(name)


# ---- the vocabulary --------------------------------------------------------------------------------------


def fit_vocabulary(model: nn.Module, adapter: str, source: str) -> None:
    """Resize `model` in place to as many embeddings as the adapter stores, where it stores any.

    New rows are the mean of the old ones until the adapter brings its own, and again when it is taken off. That is
    said once. Nothing is done for the folder of a whole fine-tuned model.

    Raises ModelError where the adapter's embeddings contradict each other, or only one of two matrices is stored.
    """
    folder = Path(adapter).expanduser()
    if (folder / "config.json").exists() and not (folder / ADAPTER_CONFIG).exists():
        return
    with reading(f"the adapter {adapter}", ModelError):
        local = _adapter_folder(adapter)
        config = _lora_config(local, adapter)
        _fit_vocabulary(model, _stored_shapes(local, adapter), config, adapter, source or "this model")


@contextmanager
def kept_embeddings(model: nn.Module, adapter: str) -> Iterator[None]:
    """Put the embeddings of `model` back at the end, which an adapter that stores its own writes over.

    They are copied only where the adapter stores some. A resized vocabulary keeps its new size.
    """
    if Path(adapter).expanduser().is_dir() and not (Path(adapter).expanduser() / ADAPTER_WEIGHTS).is_file():
        yield
        return
    if stored := _stored_embeddings(model, _stored_shapes(_adapter_folder(adapter), adapter)):
        fit_vocabulary(model, adapter, name_of(model))  # now, as it makes other matrices
    matrices = dict(_embedding_matrices(model))
    before = {name: matrices[name].detach().clone() for name in stored}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, values in before.items():
                matrices[name].copy_(values)


def _embedding_matrices(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The input embeddings and the output head of a model without an adapter, by their modules' names."""
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]  # type: ignore[operator]
    for name, module in model.named_modules():
        if any(module is end for end in ends):
            yield name, module.weight  # type: ignore[misc]


def _stored_embeddings(model: nn.Module, shapes: Shapes) -> dict[str, set[int]]:
    """Rows of every embedding matrix that the adapter stores, by module; several where its tensors disagree."""
    found: dict[str, set[int]] = {}
    for name, _ in _embedding_matrices(model):
        whole = re.compile(rf"{re.escape(name)}{_WRAPPERS}\.weight")
        if rows := {shape[0] for key, shape in shapes.items() if whole.fullmatch(plain_name(key))}:
            found[name] = rows
    return found


def _fit_vocabulary(model: Any, shapes: Shapes, config: Any, adapter: str, source: str) -> None:
    matrices = dict(_embedding_matrices(model))
    stored = _stored_embeddings(model, shapes)
    size = model.get_input_embeddings().weight.shape[0]
    sizes = sorted(set().union(*stored.values()))
    if len(sizes) > 1:
        raise ModelError(
            f"the adapter {adapter} stores embeddings of {listing(map(str, sizes))} tokens in one; save it again from "
            "the model it was trained in"
        )
    if sizes and sizes[0] != size:
        tied = len({id(weight) for weight in matrices.values()}) == 1
        if missing := [name for name in matrices if name not in stored and not tied]:
            raise ModelError(
                f"the adapter {adapter} stores {sizes[0]} embeddings where {source} has {size}, and none for "
                f"{missing[0]}; save it again with save_pretrained(..., save_embedding_layers=True)"
            )
        _resize(model, sizes[0])
        say_once(
            logger,
            f"the adapter {adapter} was trained with {sizes[0]} embeddings: those of {source} ({size}) are resized; "
            "without the adapter the added ones are the mean of the others",
        )
    rows = sizes[0] if sizes else size
    if beyond := [index for index in _trained_tokens(config) if not 0 <= index < rows]:
        raise ModelError(
            f"the adapter {adapter} trains token {beyond[0]} (trainable_token_indices), and {source} has embeddings "
            f"for {rows}; save it again with save_pretrained(..., save_embedding_layers=True)"
        )


def _trained_tokens(config: Any) -> list[int]:
    indices = getattr(config, "trainable_token_indices", None) or []
    return sorted(index for one in indices.values() for index in one) if isinstance(indices, dict) else sorted(indices)


def _resize(model: Any, rows: int) -> None:
    """Resize input and output embeddings, with what is added the mean of what there was.

    transformers would draw the added rows at random, and a base that comes out otherwise each time has another hash.
    """
    from transformers.utils import logging as transformers_logging

    size = model.get_input_embeddings().weight.shape[0]
    _OWN_ROWS[model] = min(size, rows, _OWN_ROWS.get(model, size))
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        model.resize_token_embeddings(rows, mean_resizing=False)
    finally:
        transformers_logging.set_verbosity(verbosity)
    with torch.no_grad():
        for _, weight in _embedding_matrices(model):
            if rows > size:
                weight[size:] = weight[:size].double().mean(dim=0).to(weight.dtype)


# ---- the base --------------------------------------------------------------------------------------------


def _warnings(config: Any, adapter: str, model: nn.Module, source: str) -> list[str]:
    named = str(getattr(config, "base_model_name_or_path", None) or "")
    if not named or _same_base(named, source, model):
        return []
    return [
        f"the adapter {adapter} names another base model, {named}, than {source or 'this one'}, on which it is put: "
        "load the one it was trained on, or mend base_model_name_or_path in its adapter_config.json"
    ]


def _same_base(named: str, source: str, model: nn.Module) -> bool:
    """Whether `named`, as an adapter's configuration has it, is the model that was loaded from `source`."""
    places = [Path(place).expanduser() for place in (named, source)]
    if named == source or (source and os.path.realpath(places[0]) == os.path.realpath(places[1])):
        return True
    if places[0].is_dir() and sorted(places[0].glob("*.safetensors")):
        return _same_weights(model, places[0])
    return not source or _short_name(named) == _short_name(source)


def _short_name(place: str) -> str:
    """The last part of a hub id or path; of a folder in the hub's cache, the name of the repository."""
    cached = re.search(r"models--(?:[^/]*--)?([^/]+)/snapshots/", place + "/")
    return (cached[1] if cached else place.rstrip("/").rpartition("/")[2]).lower()


def _same_weights(model: nn.Module, folder: Path) -> bool:
    """Whether the weights in `folder` are the model's, but for rows that a resized vocabulary has more or less."""
    from safetensors import SafetensorError, safe_open

    held = dict(model.named_parameters(remove_duplicate=False))
    try:
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (not a dict)
                    if name not in held:
                        return False
                    mine, theirs = held[name], file.get_tensor(name)
                    if not mine.is_floating_point() and theirs.is_floating_point():
                        continue  # quantised as it was loaded
                    rows = min(mine.shape[0], theirs.shape[0]) if mine.dim() and theirs.dim() else None
                    if not torch.equal(mine.detach()[:rows].cpu(), theirs[:rows].to(mine.dtype)):
                        return False
    except (OSError, SafetensorError, IndexError):
        return False
    return True


def name_of(model: nn.Module) -> str:
    """Return where transformers loaded `model` from; empty where it was made by hand."""
    return str(getattr(getattr(model, "config", None), "name_or_path", "") or "")


def _replaced_weights(model: nn.Module, folder: str, config: Any, shapes: Shapes) -> list[str]:
    """The base's own parameters that the adapter stores with other values: unfrozen by hand when it was trained.

    Those that the configuration names (modules_to_save, bias) are told by it. Embeddings may be stored only because
    the vocabulary was resized; so rows that the base has decide.
    """
    named = dict(model.named_parameters(remove_duplicate=False))
    biases = getattr(config, "bias", "none") != "none"
    matrices = {f"{module}.weight" for module, _ in _embedding_matrices(model)}
    found = []
    candidates = {key: re.sub(_WRAPPERS + r"(?=\.\w+$)", "", plain_name(key)) for key in shapes if "lora_" not in key}
    if not any(name in named for name in candidates.values()):
        return []
    for key, values in _stored(folder):
        name = candidates.get(key, "")
        if name not in named or (biases and name.endswith(".bias")) or _is_saved_whole(name, config):
            continue
        mine = named[name].detach()
        rows = min(len(mine), len(values))
        if name in matrices:
            rows = min(rows, _OWN_ROWS.get(model, rows))
        if not torch.equal(mine[:rows].cpu(), values[:rows].to(mine.dtype)):
            found.append(name)
    return sorted(set(found))


# ---- what is stored against what is at work ----------------------------------------------------------------


def _check_base_stays(config: Any, adapter: str) -> None:
    """ModelError for settings by which peft changes the base model itself; it does not put it back again."""
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


def _check_whole_modules(model: nn.Module, shapes: Shapes, config: Any, adapter: str) -> None:
    """ModelError for a weight of the base's own that is stored although no setting trains it.

    peft would write it over the base's, where a tied embedding is two matrices at once. Embeddings may be stored
    because the vocabulary was resized or by save_embedding_layers, which stores all of them.
    """
    named = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    matrices = {name for name, _ in _embedding_matrices(model)}
    all_stored = matrices <= _stored_embeddings(model, shapes).keys()
    biases = getattr(config, "bias", "none") != "none"
    for key in sorted(key for key in shapes if "lora_" not in key):
        name = plain_name(key)
        plain = re.sub(_WRAPPERS + r"(?=\.\w+$)", "", name)
        module, _, kind = plain.rpartition(".")
        if plain not in named or _is_saved_whole(plain, config) or (module in matrices and all_stored):
            continue
        if kind == "bias" and not biases and module not in matrices:
            raise ModelError(_left_out(adapter, plain, "bias or modules_to_save"))
        if kind != "bias" and name == plain:
            raise ModelError(_left_out(adapter, module, "modules_to_save"))


def _is_saved_whole(name: str, config: Any) -> bool:
    """Whether modules_to_save names a module that the parameter is in, by the end of its name as peft compares it."""
    ends = tuple(getattr(config, "modules_to_save", None) or ())
    parts = f"base_model.model.{name}".split(".")
    return any(".".join(parts[:i]).endswith(ends) for i in range(1, len(parts)))


def _check_fit(model: nn.Module, shapes: Shapes, adapter: str, source: str) -> None:
    """Every stored factor against the module it names: `lora_A (r, d_in)`, `lora_B (d_out, r)`."""
    modules = dict(model.named_modules())
    for key in sorted(shapes):
        name, factor = _split_key(key)
        if factor is None:
            continue
        name = name.replace(".base_layer", "")  # of a module with two wrapped parameters (target_parameters)
        if is_listed(name, modules):
            continue  # `_check_loaded` looks for it among the experts of one parameter
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


def _split_key(key: str) -> tuple[str, str | None]:
    """`base_model.model.<module>.lora_A.weight` as (module, factor); factor None for other tensors."""
    for factor in ("lora_A", "lora_B"):
        name, found, _ = key.partition(f".{factor}.")
        if found:
            return plain_name(name), factor
    return key, None


def _linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """(d_out, d_in) of a linear module."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    if type(module).__name__ == "Conv1D":  # GPT-2's linear, its weight stored as (d_in, d_out)
        weight = module.weight
        assert isinstance(weight, torch.Tensor)
        return int(weight.shape[1]), int(weight.shape[0])
    return None


def _check_ranks(config: Any, shapes: Shapes, adapter: str) -> None:
    """ModelError where a stored factor has another rank than the configuration gives its module."""
    from peft.utils.other import get_pattern_key

    if getattr(config, "target_parameters", None):  # whose factors hold the ranks of all experts together
        return
    pattern = getattr(config, "rank_pattern", None) or {}
    for key in sorted(shapes):
        module, factor = _split_key(key)
        if factor != "lora_A" or not key.endswith(".weight"):
            continue
        rank = pattern.get(get_pattern_key(list(pattern), module), config.r)
        if rank != shapes[key][0]:
            raise ModelError(
                f"the adapter {adapter} stores factors of rank {shapes[key][0]} for {module}, and its "
                f"{ADAPTER_CONFIG} says {rank} (r, rank_pattern): put back the settings it was trained with"
            )


def _check_complete(wrapped: nn.Module, shapes: Shapes, adapter: str, source: str) -> None:
    """peft leaves a factor that the file lacks at its initial value, with a warning at most."""
    for name, _ in wrapped.named_parameters():
        if not is_adapter_parameter(name):
            continue
        stored_name = re.sub(rf"\.{_NAME}(?=\.|$)", "", name)
        if stored_name not in shapes and stored_name.removesuffix(".weight") not in shapes:
            module, mark, factor = plain_name(stored_name).rpartition(".lora_")
            factor = f"{mark}{factor}".removeprefix(".").removesuffix(".weight")
            raise ModelError(
                f"the adapter {adapter} does not fit {source}: it has no {factor} for the module {module!r}; "
                "load it over the model it was trained on"
            )


def _check_loaded(
    wrapped: nn.Module, folder: str, config: Any, adapter: str, experts: ExpertFactors | None = None
) -> None:
    """ModelError where a stored tensor is not in the model, or not with its values.

    experts: where those of experts in a list are, for a model that has them in one parameter.
    """
    loaded: dict[str, torch.Tensor] = {}
    for name, tensor in wrapped.state_dict().items():
        stored_name = re.sub(rf"\.{_NAME}(?=\.|$)", "", name)
        loaded[stored_name] = tensor
        if ".modules_to_save." in stored_name:
            loaded[stored_name.replace(".modules_to_save.", ".")] = tensor
        if stored_name.endswith(".lora_magnitude_vector.weight"):
            loaded[stored_name.removesuffix(".weight")] = tensor
    for key, values in _stored(folder):
        module, factor = _split_key(key)
        if key not in loaded and experts is not None and factor and experts.take(module, factor, values):
            continue
        if key not in loaded:
            if setting := _setting_without(config, module) if factor else _setting_of_key(key):
                raise ModelError(_left_out(adapter, module if factor else plain_name(key), setting))
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


def _left_out(adapter: str, module: str, setting: str) -> str:
    return (
        f"the adapter {adapter} stores numbers of {module}, which {setting} in its {ADAPTER_CONFIG} leaves out: put "
        "back the settings it was trained with"
    )


def _setting_without(config: Any, module: str) -> str:
    """The setting of an adapter's configuration that keeps `module` from having factors; empty where none does."""
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
    """The setting that a stored tensor which is no factor comes from; empty where it is not known."""
    for mark, setting in (("lora_magnitude_vector", "use_dora"), ("trainable_tokens", "trainable_token_indices")):
        if mark in key:
            return setting
    return "target_modules" if "lora_embedding_" in key else ""
