"""SHA-256 of what a gradient depends on: base weights, adapter, tokenizer, dataset. Every byte counts; none is sampled.

Hashing is streamed in chunks, so a model on a GPU needs no copy of itself in host memory.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from influence_fast.data.adapter_names import ADAPTER_MARK, is_adapter_parameter, plain_name
from influence_fast.data.wrappers import unwrapped
from influence_fast.errors import ModelError

if TYPE_CHECKING:
    from hashlib import _Hash

    from influence_fast.data.schemas import Example

_CHUNK_BYTES = 1 << 26


def weight_hashes(model: nn.Module) -> tuple[str, str | None]:
    """Return (base, adapter): SHA-256 over name, dtype, shape and bytes of every parameter, in order of name.

    Of a quantised linear its codes, its scales and how they are to be read count. Parameters by `is_adapter_parameter`
    are the adapter's (see `adapter_hash`). Names are taken without peft's wrapping, so that the base hash is that of
    the model before the adapter was added.

    Raises ModelError for a parameter without data (on the meta device).
    """
    base, model = hashlib.sha256(), unwrapped(model)
    # bitsandbytes casts the biases of its layers in place to whatever dtype comes in
    cast = {id(module.bias) for module in model.modules() if _is_packed_linear(module) and hasattr(module, "bias")}
    for name, parameter in _by_base_name(model):
        if not is_adapter_parameter(name):
            _update(base, _base_name(name), parameter.float() if id(parameter) in cast else parameter)
    for name, part in sorted(_beside_parameters(model), key=lambda item: item[0]):
        _update(base, name, part)
    return base.hexdigest(), adapter_hash(model)


def _beside_parameters(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield what quantised linears hold beside parameters: scales, zero points, code books, packed buffers."""
    for name, module in model.named_modules():
        parameters = dict(module.named_parameters(recurse=False))
        state: Any = getattr(parameters.get("weight"), "quant_state", None)
        # Weights quantised by bitsandbytes to 4 bits.
        if hasattr(state, "as_dict"):
            held = {f"weight.{key}": part for key, part in state.as_dict(packed=True).items()}
        elif _is_packed_linear(module):
            held = {key: part for key, part in module.state_dict().items() if key not in parameters}
            # The threshold of LLM.int8()'s outliers changes the products.
            held["threshold"] = getattr(getattr(module, "state", None), "threshold", None)
        else:
            continue
        tensors = [(key, part) for key, part in held.items() if isinstance(part, torch.Tensor)]
        plain = {key: part for key, part in held.items() if isinstance(part, str | int | float | bool | list | tuple)}
        for key, part in tensors:
            yield _base_name(f"{name}.{key}"), part
        if plain:
            told = json.dumps(plain, sort_keys=True, default=str).encode()
            yield _base_name(f"{name}.settings"), torch.frombuffer(bytearray(told), dtype=torch.uint8)


def _is_packed_linear(module: Any) -> bool:
    """Return whether a module has a linear's sizes but no matrix of floating-point weights.

    Its numbers lie elsewhere, in codes or buffers.
    """
    # The base layer inside peft's wrapper is visited by itself.
    if "base_layer" in module._modules:
        return False
    weight = getattr(module, "weight", None)
    floating = isinstance(weight, torch.Tensor) and weight.is_floating_point()
    return any(hasattr(module, size) for size in ("in_features", "infeatures")) and not floating


def adapter_hash(model: nn.Module) -> str | None:
    """Return the SHA-256 over the adapter's parameters and its scaling alpha / r; None where there is no adapter.

    With peft only the parameters of the active adapters count. Which layer has which of them, in what order and how
    often, counts where that is not one adapter in all. Raises ModelError as `weight_hashes` does.
    """
    model = unwrapped(model)
    active = active_adapters(model)
    layers = _adapters_of_layers(model)
    if active is not None:
        active = active.union(*(names for _, names in layers))
    found = hashlib.sha256()
    has_adapter = False
    for name, parameter in _by_base_name(model):
        if not is_adapter_parameter(name):
            continue
        plain, owner = _adapter_name(name)
        if active is not None and owner is not None and owner not in active:
            continue
        has_adapter = True
        _update(found, plain, parameter)
    if not has_adapter:
        return None
    for name, module in model.named_modules():
        scaling = getattr(module, "scaling", None)
        if isinstance(scaling, Mapping):
            values = [float(v) for k, v in scaling.items() if active is None or k in active]
            found.update(json.dumps([_base_name(name), "scaling", values]).encode())
    if active is not None and any(names != [name for name in held if name in active] for held, names in layers):
        # Some layer has inactive adapters, or has one of them active twice.
        found.update(json.dumps(["active", layers]).encode())
    elif active is not None and len(active) > 1:
        # A row's factors come in the order and by the names of the adapters.
        found.update(json.dumps(["several", layers]).encode())
    return found.hexdigest()


def _adapters_of_layers(model: nn.Module) -> list[tuple[list[str], list[str]]]:
    """Return the adapters that each layer wrapped by peft holds factors of, and the active ones among them."""
    found = []
    for module in model.modules():
        active: Any = getattr(module, "active_adapters", None)
        if (held := held_adapters(module)) is not None and not callable(active):
            found.append((held, [name for name in active or () if name in held]))
    return found


def held_adapters(layer: Any) -> list[str] | None:
    """Return the names of the adapters whose LoRA factors a peft layer holds; None for another module."""
    kinds = [getattr(layer, kind, None) for kind in ("lora_A", "lora_embedding_A")]
    known: list[Any] = [kind for kind in kinds if isinstance(kind, nn.ModuleDict | nn.ParameterDict)]
    return [name for kind in known for name in kind.keys()] if known else None  # noqa: SIM118


def tokenizer_hash(tokenizer: Any) -> str:
    """Return the SHA-256 of all that turns text into tokens: rules, vocabulary, special tokens, chat template."""
    found = hashlib.sha256()
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None and hasattr(backend, "to_str"):
        rules = json.loads(backend.to_str())
        # state of the last call, not part of the tokenizer
        rules.pop("truncation", None)
        rules.pop("padding", None)
    else:
        rules = {"class": type(tokenizer).__name__}
    vocabulary = sorted(tokenizer.get_vocab().items()) if hasattr(tokenizer, "get_vocab") else []
    special = {k: str(v) for k, v in getattr(tokenizer, "special_tokens_map", {}).items()}
    template = getattr(tokenizer, "chat_template", None)
    for value in (rules, vocabulary, special, template):
        found.update(json.dumps(value, sort_keys=True).encode() + b"\n")
    return found.hexdigest()


def dataset_fingerprint(dataset: Iterable[Any]) -> str:
    """Return the SHA-256 over ids and contents in order.

    The contents are the texts of examples, or input_ids, labels and weights of tokenized ones.
    """
    found = hashlib.sha256()
    for example in dataset:
        if isinstance(example, Mapping):
            found.update(json.dumps([str(example["id"]), len(example["input_ids"])]).encode())
            for name in ("input_ids", "labels"):
                found.update(np.ascontiguousarray(np.asarray(example[name]), dtype="<i8").tobytes())
            if "weights" in example:
                found.update(b"weights")
                found.update(np.ascontiguousarray(np.asarray(example["weights"]), dtype="<f8").tobytes())
        else:
            text = [example.id, example.prompt, example.completion, getattr(example, "context", ())]
            # what most examples do not have, so that these keep the fingerprints that they have in stores
            more = {name: getattr(example, name, None) for name in ("between", "learnt", "reasoning", "token_ids")}
            text += [{name: value for name, value in more.items() if value}] if any(more.values()) else []
            text += [] if getattr(example, "ended", True) else ["cut"]
            found.update(json.dumps(text).encode() + b"\n")
    return found.hexdigest()


def text_fingerprint(example: Example) -> str:
    """Return `h` and the first 16 hex digits of the SHA-256 over an example's turns and completion, without its id.

    The letter keeps programs that read a table from taking it for a number.
    """
    found = hashlib.sha256()
    for role, text in (*example.turns, ("", example.completion)):
        piece = text.encode("utf-8", "surrogatepass")
        found.update(f"{role} {len(piece)}\n".encode())
        found.update(piece)
    return f"h{found.hexdigest()[:16]}"


def _update(found: _Hash, name: str, tensor: torch.Tensor) -> None:
    if tensor.is_meta:
        raise ModelError(f"{name} is on the meta device and has no data; load the model's weights first")
    found.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
    # FSDP2 shards it: all ranks together gather one parameter at a time.
    if hasattr(tensor, "full_tensor"):
        tensor = tensor.full_tensor()
    elif hasattr(tensor, "__tensor_flatten__"):
        # torchao quantised it: one tensor holds codes and scales.
        parts, settings = tensor.__tensor_flatten__()
        found.update(json.dumps([type(tensor).__name__, settings], sort_keys=True, default=str).encode())
        for part in parts:
            if (held := getattr(tensor, part)) is not None:
                _update(found, f"{name}.{part}", held)
        return
    flat = tensor.detach().reshape(-1)
    step = max(1, _CHUNK_BYTES // max(1, tensor.element_size()))
    for start in range(0, flat.numel(), step):
        chunk = flat[start : start + step].cpu().contiguous()
        found.update(chunk.view(torch.uint8).numpy().data)


def _by_base_name(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return sorted(model.named_parameters(), key=lambda item: _base_name(item[0]))


def _base_name(name: str) -> str:
    """Return a name without what peft puts around the base model's own names."""
    return plain_name(name).replace(".base_layer.", ".")


def _adapter_name(name: str) -> tuple[str, str | None]:
    """Return (parameter name without the adapter's name, the adapter's name or None).

    Example: "q.lora_A.default.weight" -> ("q.lora_A.weight", "default").
    """
    match = re.search(rf"({ADAPTER_MARK}\w+)\.([^.]+)(?=\.weight$|\.bias$|$)", name)
    if match is None:
        return _base_name(name), None
    return _base_name(name[: match.end(1)] + name[match.end(2) :]), match.group(2)


def active_adapters(model: nn.Module) -> set[str] | None:
    """Return the names of a peft model's active adapters; None where every adapter parameter counts.

    The latter is so of a model that peft has not wrapped.
    """
    active = getattr(model, "active_adapters", None)
    # transformers' own integration has a method here, which raises without an adapter.
    if callable(active):
        return None
    return None if active is None else set(active)
