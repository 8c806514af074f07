"""Models, adapters and tokenizers from disk or the hub, checked to fit each other before any work starts.

Weights are read from safetensors only, and a repository's own code runs only with `trust_remote_code=True`.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn

from influence_fast.errors import ConfigError, ModelError, did_you_mean, setting, truncated_list
from influence_fast.guards import reading
from influence_fast.training.adapter_bases import adapter_warnings
from influence_fast.training.adapters import attach_adapter
from influence_fast.training.files import cannot_load, check_folder
from influence_fast.training.model_sizes import check_model_sizes
from influence_fast.training.quantized_files import (
    check_installed,
    check_quantization,
    keep_as_stored,
    quantization_of,
    quantizing,
    quantizing_package,
)
from influence_fast.training.tokenizers import check_tokenizer, load_tokenizer
from influence_fast.training.vocabulary import fit_vocabulary

__all__ = [
    "DTYPES",
    "adapter_warnings",
    "attach_adapter",
    "check_tokenizer",
    "fit_vocabulary",
    "load_model",
    "load_tokenizer",
]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load_model(
    model_id_or_path: str | os.PathLike[str],
    *,
    adapter: str | os.PathLike[str] | None = None,
    dtype: str | torch.dtype = "float32",
    device: str = "auto",
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    quantize: str | None = None,
) -> Any:
    """Load a causal LM in evaluation mode, with a LoRA adapter if one is named.

    Args:
        model_id_or_path: folder or hub id of the model.
        adapter: folder or hub id of a peft LoRA adapter, loaded trainable; without one, the plain model (a fresh
            adapter comes by `fine_tuning.attach_lora`).
        dtype: `"float32"` or `"bfloat16"` for the base weights; peft keeps adapter factors in float32.
        device: `"auto"` is the first CUDA device, else the CPU.
        attn_implementation: as transformers takes it.
        trust_remote_code: run code of the repository.
        quantize: `"nf4"`, `"fp4"` or `"int8"` quantises the base weights as they are loaded (QLoRA), by bitsandbytes; a
            folder whose configuration says how it is quantised needs none.

    Returns:
        A `PreTrainedModel`, or a `PeftModel` around it.

    Raises:
        ModelError: model or adapter not found or not loadable, weights missing in the checkpoint, an adapter that does
            not fit (first mismatching module, both shapes).
        ConfigError: unknown dtype, quantisation or device.

    Example:
        >>> model = inf.load_model("Qwen/Qwen2.5-0.5B", adapter="my-adapter", dtype="bfloat16")  # doctest: +SKIP
    """
    dtype = str(dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise ConfigError(f"{setting('dtype')} {dtype!r} is not known; {did_you_mean(str(dtype), DTYPES)}")
    check_quantization(quantize)
    target = _device(device)
    source = os.fspath(model_id_or_path)
    with reading(f"the model {source}", ModelError):
        options = _placed(source, DTYPES[dtype], trust_remote_code, target, quantize)
        model = _load_base(source, DTYPES[dtype], attn_implementation, options)
        if adapter is not None:
            model = attach_adapter(model, os.fspath(adapter), source)
        if quantization_of(model.config) is None:
            model = model.to(target)
        else:  # it was loaded to where it belongs: not all such layers can be moved
            keep_as_stored(model)
        return model.eval()


def _device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        target = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(
            f"{setting('device')} {device!r} is not known; use 'auto', 'cpu', 'cuda' or 'cuda:0'"
        ) from error
    if target.type == "cuda" and (target.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"{setting('device')} {device!r} is not there ({torch.cuda.device_count()} CUDA devices); use 'auto' or "
            "'cpu'"
        )
    return target


def _placed(
    source: str, dtype: torch.dtype, trust_remote_code: bool, target: torch.device, quantize: str | None
) -> dict[str, Any]:
    """Return what `from_pretrained` is told of a repository's code, of quantised weights, and of where these go."""
    from transformers import AutoConfig

    check_folder(source, "config.json", "model")
    check_model_sizes(source)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(source, **options)
    except Exception as error:
        raise ModelError(cannot_load(source, "model", error)) from error
    if package := quantizing_package(config):
        check_installed(package, source)
    if quantize is not None:
        options["quantization_config"] = quantizing(config, quantize, dtype, source)
    if (package or quantize) and target.type != "cpu":
        options["device_map"] = {"": str(target)}
    return options


def _load_base(source: str, dtype: torch.dtype, attn_implementation: str | None, options: dict[str, Any]) -> nn.Module:
    from transformers import AutoModelForCausalLM

    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=dtype,
            attn_implementation=attn_implementation,
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
    except Exception as error:  # of strict configurations, of weights, and whatever a wrong setting leads to
        raise ModelError(cannot_load(source, "model", error)) from error
    model, info = loaded
    missing = sorted(info["missing_keys"])
    if missing:  # transformers fills them with random numbers and goes on
        raise ModelError(
            f"the weights of {source} have none for {truncated_list(missing, 3)}; the checkpoint is incomplete or of "
            "another architecture: save it again with save_pretrained"
        )
    return model
