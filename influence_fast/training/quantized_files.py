"""Quantised weights before they are loaded: how to ask for them, the package they need, and the bytes they take."""

from __future__ import annotations

import importlib.util
import logging
from typing import Any

import torch
from torch import nn

from influence_fast.errors import ConfigError, ModelError, did_you_mean
from influence_fast.gradients.step.memory import QuantizedWeights

#: How weights can be quantised while they are loaded, by bitsandbytes; what that library calls it.
QUANTIZATIONS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}
#: What is imported for a `quant_method` of a configuration, where that is called otherwise.
_PACKAGES = {
    "gptq": "gptqmodel",
    "awq": "gptqmodel",
    "quanto": "optimum.quanto",
    "compressed-tensors": "compressed_tensors",
}
_WITHOUT_PACKAGE = ("fp8", "mxfp4", "bitnet")  # which transformers does itself
# Bytes of bitsandbytes' scales: fp32 for 64 weights, or one byte and an fp32 for 256 of these (double quantisation).
_BLOCK, _SCALE, _DOUBLE_SCALE = 64, 4, 1 + 4 / 256


def check_quantization(name: str | None, source: str = "quantize") -> None:
    """Raise ConfigError for a quantisation that does not exist; None is none."""
    if name is not None and name not in QUANTIZATIONS:
        raise ConfigError(f"{source}: unknown value {name!r}; {did_you_mean(str(name), QUANTIZATIONS)}")


def quantizing(config: Any, name: str, dtype: torch.dtype, source: str) -> Any:
    """Return transformers' settings that quantise the weights of `source` by a name of `QUANTIZATIONS`.

    dtype: of the products with 4-bit weights. Raises ModelError where bitsandbytes is not installed, or the weights are
    quantised already.
    """
    from transformers import BitsAndBytesConfig

    check_quantization(name)
    if quantization_of(config) is not None:
        raise ModelError(f"the weights of {source} are quantised already: leave quantize out")
    check_installed("bitsandbytes", source, "quantize needs bitsandbytes")
    return BitsAndBytesConfig(**QUANTIZATIONS[name], bnb_4bit_compute_dtype=dtype)


def quantization_of(config: Any) -> dict[str, Any] | None:
    """Return the `quantization_config` of a transformers configuration as a dict; None where it has none."""
    found = getattr(config, "quantization_config", None)
    return found if found is None or isinstance(found, dict) else dict(found.to_dict())


def quantizing_package(config: Any) -> str | None:
    """Return the package that a configuration's quantised weights need; None where they need none or are plain."""
    settings = quantization_of(config)
    if settings is None:
        return None
    method = settings.get("quant_method") or "bitsandbytes"  # which early checkpoints do not name
    name = str(getattr(method, "value", method))
    return None if name in _WITHOUT_PACKAGE else _PACKAGES.get(name, name)


def check_installed(package: str, source: str, why: str = "") -> None:
    """Raise ModelError where the weights of `source` need a package that is not installed; `why` says who needs it."""
    try:
        found = importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # of the package that it is in
        found = False
    if not found:
        name = "'influence-fast[quantized]'" if package == "bitsandbytes" else package.replace(".", "-")
        why = why or f"the weights of {source} are quantised by {package}"
        raise ModelError(f"{why}, which is not installed: pip install {name}")


def keep_as_stored(model: Any) -> None:
    """Keep bitsandbytes from changing the codes and scales of a loaded model, and silence its note on each product.

    On CPUs with bf16 arithmetic it reorders 4-bit weights in the first forward and rounds their scales, after which the
    model would have another hash.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)


def quantized_weights(config: Any, base: Any, quantize: str | None = None) -> QuantizedWeights | None:
    """Return what the quantised linears of `base`, a model without weights made from `config`, take as stored.

    None where neither the configuration nor `quantize` (of `QUANTIZATIONS`) quantises. The head stays as it is, as all
    libraries leave it by default.
    """
    settings = quantization_of(config) or QUANTIZATIONS.get(quantize or "")
    if settings is None:
        return None
    skipped = {"lm_head", *(settings.get("llm_int8_skip_modules") or settings.get("modules_to_not_convert") or ())}
    head = base.get_output_embeddings()
    shapes = [
        (module.out_features, module.in_features)
        for name, module in base.named_modules()
        if isinstance(module, nn.Linear) and module is not head and not skipped & {name, name.rpartition(".")[2]}
    ]
    counts = [d_out * d_in for d_out, d_in in shapes]
    stored = sum(_stored_bytes(settings, d_out, d_in) for d_out, d_in in shapes)
    return QuantizedWeights(sum(counts), round(stored), max(counts, default=0))


def _stored_bytes(settings: dict[str, Any], d_out: int, d_in: int) -> float:
    """Return the bytes of one weight: its codes, and the scales of its rows, blocks or groups."""
    count = d_out * d_in
    if settings.get("load_in_8bit"):
        return count + 4 * d_out
    if settings.get("load_in_4bit"):
        return count / 2 + count / _BLOCK * (_DOUBLE_SCALE if settings.get("bnb_4bit_use_double_quant") else _SCALE)
    bits = settings.get("bits") or settings.get("nbits") or 8
    group = settings.get("group_size") or 0
    groups = count / group if isinstance(group, int) and group > 0 else d_out
    return count * bits / 8 + groups * (2 + bits / 8)  # a scale in 16 bits and a zero point
