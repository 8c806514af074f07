"""Models, adapters and tokenizers from disk or the hub, checked to fit each other before any work starts.

Weights are read from safetensors only, and a repository's own code runs only with `trust_remote_code=True`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from influence_fast.data.adapter_names import is_adapter_parameter, plain_name
from influence_fast.errors import ConfigError, ModelError, did_you_mean, listing, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
GENERIC_TOKENIZERS = ("PreTrainedTokenizerFast", "TokenizersBackend")

_ADAPTER_CONFIG = "adapter_config.json"
_ADAPTER_WEIGHTS = "adapter_model.safetensors"


# ---- models ----------------------------------------------------------------------------------------------


def load_model(
    model_id_or_path: str | os.PathLike[str],
    *,
    adapter: str | os.PathLike[str] | None = None,
    dtype: str | torch.dtype = "float32",
    device: str = "auto",
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """A causal LM in evaluation mode, with a LoRA adapter where one is asked for.

    `adapter`: folder or hub id of a peft LoRA adapter, loaded trainable; without one, the plain model (a
    fresh adapter comes by `fine_tuning.attach_lora`). `dtype`: `"float32"` or `"bfloat16"` for the base weights; peft
    keeps adapter factors in float32. `device`: `"auto"` is the first CUDA device, else the CPU.

    Returns a `PreTrainedModel`, or a `PeftModel` around it.

    Raises ModelError: model or adapter not found or not loadable, weights missing in the checkpoint, an adapter
    that does not fit (first mismatching module, both shapes). ConfigError: unknown dtype or device.
    """
    dtype = str(dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r} is not known; {did_you_mean(str(dtype), DTYPES)}")
    target = _device(device)
    source = os.fspath(model_id_or_path)
    model = _load_base(source, DTYPES[dtype], attn_implementation, trust_remote_code)
    if adapter is not None:
        model = attach_adapter(model, os.fspath(adapter), source)
    return model.to(target).eval()


def _device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        target = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"device {device!r} is not known; use 'auto', 'cpu', 'cuda' or 'cuda:0'") from error
    if target.type == "cuda" and (target.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"device {device!r} is not there ({torch.cuda.device_count()} CUDA devices); use 'auto' or 'cpu'"
        )
    return target


def _load_base(source: str, dtype: torch.dtype, attn_implementation: str | None, trust_remote_code: bool) -> nn.Module:
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    _check_folder(source, "config.json", "model")
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=dtype,
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, ImportError, RuntimeError, KeyError, SafetensorError) as error:
        raise ModelError(_cannot_load(source, "model", error)) from error
    model, info = loaded
    missing = sorted(info["missing_keys"])
    if missing:  # transformers fills them with random numbers and goes on
        raise ModelError(
            f"the weights of {source} have none for {listing(missing, 3)}; the checkpoint is incomplete or of "
            "another architecture: save it again with save_pretrained"
        )
    return model


def _check_folder(source: str, needed: str, what: str) -> None:
    """Tell a wrong path from a hub id before the hub is asked, and an adapter's folder from a model's."""
    path = Path(source).expanduser()
    if path.is_dir():
        if not (path / needed).is_file():
            remedy = f"give a folder made by save_pretrained that holds {needed}"
            if what == "model" and (path / _ADAPTER_CONFIG).is_file():
                remedy = f"it holds a peft adapter: give its base model, and adapter={source!r}"
            if what == "adapter" and (named := sorted(path.glob(f"*/{_ADAPTER_CONFIG}"))):
                # what save_pretrained makes of adapters that are not called "default"; a training's checkpoints too
                remedy = f"it holds several adapters: give one of {listing(str(file.parent) for file in named)}"
            raise ModelError(f"{source} is no {what} folder (no {needed}); {remedy}")
    elif path.exists():
        raise ModelError(f"{source} is a file; give the {what}'s folder or a hub id")
    elif source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise ModelError(f"no {what} at {source}; check the path (from {Path.cwd()})")


def _cannot_load(source: str, what: str, error: BaseException) -> str:
    reason = one_line(error)
    if os.path.isdir(source):
        if "safetensors" in reason:
            return (
                f"{source} has no safetensors weights; convert them: load the model in transformers and "
                "save_pretrained it again"
            )
        return f"the {what} in {source} cannot be loaded ({type(error).__name__}: {reason}); check the folder"
    return (
        f"the {what} {source} is no local folder, and could not be loaded from the hub "
        f"({type(error).__name__}: {reason}); check the id and the network, or give a local folder"
    )


# ---- adapters --------------------------------------------------------------------------------------------


def attach_adapter(model: nn.Module, adapter: str, source: str, *, trainable: bool = True) -> nn.Module:
    """`model` with the LoRA adapter of a folder or hub id attached in place; `source` names the model in messages.

    Raises ModelError: not found, not a LoRA adapter, incomplete, or one that does not fit (first mismatch, shapes).
    """
    from peft import PeftConfig, PeftModel

    folder = _adapter_folder(adapter)
    try:
        config = PeftConfig.from_pretrained(folder)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ModelError(_cannot_load(adapter, "adapter", error)) from error
    if str(getattr(config.peft_type, "value", config.peft_type)) != "LORA":
        raise ModelError(f"the adapter {adapter} is of kind {config.peft_type}; only LoRA adapters are supported")
    shapes = _stored_shapes(folder, adapter)
    _check_fit(model, shapes, adapter, source)
    try:
        wrapped = PeftModel.from_pretrained(model, folder, is_trainable=trainable, config=config)  # type: ignore[arg-type]
    except (RuntimeError, ValueError, KeyError) as error:
        raise ModelError(
            f"the adapter {adapter} does not fit {source} ({one_line(error)}); load it over the model it was trained on"
        ) from error
    _check_complete(wrapped, shapes, adapter, source)
    bad = [
        name for name, p in wrapped.named_parameters() if is_adapter_parameter(name) and not bool(p.isfinite().all())
    ]
    if bad:
        raise ModelError(f"the adapter {adapter} holds NaN or infinite numbers in {listing(bad)}; train it again")
    return wrapped


def adapter_warnings(adapter: str) -> list[str]:
    """What to know of the adapter in a folder or of a hub id: what it trains that scores do not cover.

    None for the folder of a whole fine-tuned model. Raises ModelError where there is no adapter.
    """
    from peft import PeftConfig

    from influence_fast.gradients.lora import beside_warning, trained_beside

    folder = Path(adapter).expanduser()
    if (folder / "config.json").exists() and not (folder / _ADAPTER_CONFIG).exists():
        return []
    try:
        others = trained_beside(PeftConfig.from_pretrained(_adapter_folder(adapter)))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ModelError(_cannot_load(adapter, "adapter", error)) from error
    return [beside_warning(others)] if others else []


def _adapter_folder(adapter: str) -> str:
    """The local folder of an adapter, fetched from the hub where it is not local."""
    _check_folder(adapter, _ADAPTER_CONFIG, "adapter")
    folder = Path(adapter).expanduser()
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(adapter, allow_patterns=[_ADAPTER_CONFIG, _ADAPTER_WEIGHTS]))
        except Exception as error:
            raise ModelError(_cannot_load(adapter, "adapter", error)) from error
    for name in (_ADAPTER_CONFIG, _ADAPTER_WEIGHTS):
        if not (folder / name).is_file():
            raise ModelError(
                f"the adapter {adapter} has no {name}; save it with save_pretrained (safetensors, not .bin)"
            )
    return str(folder)


def _stored_shapes(folder: str, adapter: str) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of the adapter, from the header alone."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(os.path.join(folder, _ADAPTER_WEIGHTS), framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ModelError(f"the adapter {adapter} has a damaged {_ADAPTER_WEIGHTS} ({error}); save it again") from error


def _check_fit(model: nn.Module, shapes: Mapping[str, tuple[int, ...]], adapter: str, source: str) -> None:
    """Every stored factor against the module it names: `lora_A (r, d_in)`, `lora_B (d_out, r)`."""
    modules = dict(model.named_modules())
    for key in sorted(shapes):
        name, factor = _split_key(key)
        if factor is None:
            continue
        if name not in modules:
            raise ModelError(
                f"the adapter {adapter} does not fit {source}: the model has no module {name!r}; "
                "load it over the model it was trained on"
            )
        base = _linear_shape(modules[name])
        if base is None:
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


def _check_complete(wrapped: nn.Module, shapes: Mapping[str, tuple[int, ...]], adapter: str, source: str) -> None:
    """peft leaves a factor that the file lacks at its initial value, with a warning at most."""
    stored = {_split_key(key) for key in shapes}
    for name, _ in wrapped.named_parameters():
        module, factor = _split_key(name)
        if factor is not None and (module, factor) not in stored:
            raise ModelError(
                f"the adapter {adapter} does not fit {source}: it has no {factor} for the module {module!r}; "
                "load it over the model it was trained on"
            )


# ---- tokenizers ------------------------------------------------------------------------------------------


def load_tokenizer(
    model_id_or_path: str | os.PathLike[str], *, model: nn.Module | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, from a folder or the hub; one without a padding token pads with EOS.

    With `model` the two are checked to fit (`check_tokenizer`).

    Raises ModelError: not found, no EOS token, more tokens than the model has embeddings.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    source = os.fspath(model_id_or_path)
    if not os.path.isdir(source):
        _check_folder(source, "tokenizer.json", "tokenizer")
    try:
        declared = get_tokenizer_config(source, trust_remote_code=trust_remote_code).get("tokenizer_class")
        # A generic class means that tokenizer.json says everything. AutoTokenizer would go by the model's type
        # instead, and put (for example) Qwen2's own splitting in the place of the file's.
        generic = declared in GENERIC_TOKENIZERS
        loader = PreTrainedTokenizerFast if generic else AutoTokenizer
        tokenizer = loader.from_pretrained(source, trust_remote_code=trust_remote_code)
    except Exception as error:  # the tokenizers library raises bare Exception
        raise ModelError(_cannot_load(source, "tokenizer", error)) from error
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"the tokenizer {source} has no EOS token; set tokenizer.eos_token to the model's end-of-text token "
            "and save it again"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if model is not None:
        check_tokenizer(model, tokenizer)
    return tokenizer


def check_tokenizer(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises ModelError when `tokenizer` has a token that `model` has no embedding for: it is another model's."""
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    size = embedding.weight.shape[0]
    token, highest = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if highest >= size:
        raise ModelError(
            f"the tokenizer {tokenizer.name_or_path or type(tokenizer).__name__} has token {token!r} with id "
            f"{highest}, the model has embeddings for {size}; use the model's own tokenizer"
        )
