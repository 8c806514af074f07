"""Which kinds of adapters are LoRA, and what the others are called where they are refused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from influence_fast.errors import ModelError, truncated_list

_LORA = "LORA"
_PROMPTS = "it trains numbers that are put before the text and no weight of a layer"
_SCALES = "it trains factors by which a layer's numbers are multiplied"
_WEIGHTS = "its change of a weight is no product of two trained matrices"

#: What the kinds of peft.PeftType are called, and why they have no rows; others are called as peft does.
_OTHERS: dict[str, tuple[str, str]] = {
    "PROMPT_TUNING": ("prompt tuning", _PROMPTS),
    "MULTITASK_PROMPT_TUNING": ("multitask prompt tuning", _PROMPTS),
    "P_TUNING": ("P-tuning", _PROMPTS),
    "PREFIX_TUNING": ("prefix tuning", _PROMPTS),
    "CPT": ("context-aware prompt tuning", _PROMPTS),
    "CARTRIDGE": ("a cartridge of keys and values", _PROMPTS),
    "ADAPTION_PROMPT": ("LLaMA-Adapter", _PROMPTS),
    "IA3": ("IA3", _SCALES),
    "LN_TUNING": ("LN tuning", "it trains the norms' own weights"),
    "TRAINABLE_TOKENS": ("trainable tokens alone", "it trains rows of the embedding"),
    "ADALORA": ("AdaLoRA", "B diag(E) A, of ranks that change while it trains; LoRA has rank_pattern"),
    "XLORA": (
        "X-LoRA",
        "it mixes several LoRA adapters by a network of its own: score one of these adapters alone, or",
    ),
    "POLY": ("Polytropon", "it mixes several LoRA adapters by the task"),
    "VERA": ("VeRA", "it trains two vectors beside random matrices that all layers share"),
    "LOHA": ("LoHa", _WEIGHTS),
    "LOKR": ("LoKr", _WEIGHTS),
    "OFT": ("OFT", _WEIGHTS),
    "BOFT": ("BOFT", _WEIGHTS),
    "HRA": ("HRA", _WEIGHTS),
    "FOURIERFT": ("FourierFT", _WEIGHTS),
    "VBLORA": ("VB-LoRA", _WEIGHTS),
    "RANDLORA": ("RandLoRA", _WEIGHTS),
    "SHIRA": ("SHiRA", "it trains single entries of the weights"),
    "MISS": ("MiSS", _WEIGHTS),
    "WAVEFT": ("WaveFT", _WEIGHTS),
    "DELORA": ("DeLoRA", _WEIGHTS),
    "GRALORA": ("GraLoRA", _WEIGHTS),
    "TINYLORA": ("TinyLoRA", _WEIGHTS),
    "UNILORA": ("Uni-LoRA", _WEIGHTS),
}

#: Variants of LoRA by the first letters of peft's class of them: what they are, and the setting that asks for them.
_VARIANTS: dict[str, tuple[str, str]] = {
    "ALora": ("aLoRA (at work only after its invocation tokens)", "alora_invocation_tokens"),
    "Arrow": ("Arrow (routes each token to some of several adapters)", "arrow_config"),
    "QALora": ("QA-LoRA (its A reads groups of inputs)", "use_qalora"),
    "BdLora": ("BD-LoRA (its factors are block-diagonal)", "use_bdlora"),
    "Velora": ("VeLoRA (its own gradients are approximate)", "velora_config"),
    "Monteclora": ("MonteCLoRA (its factors are drawn at random)", "monteclora_config"),
    "MiCA": ("MiCA (trains A alone)", "init_lora_weights='mica'"),
    "Kasa": ("KaSA (takes components out of the base weight)", "kasa_config"),
}


def kind_of(config: Any) -> str:
    """Return the name in `peft.PeftType` of an adapter's configuration."""
    kind = config.get("peft_type", "") if isinstance(config, dict) else getattr(config, "peft_type", "")
    return str(getattr(kind, "value", kind))


def check_kind(what: str, kind: str) -> None:
    """Raise ModelError for an adapter, called `what` in the message, whose `kind` of `peft.PeftType` is not LoRA."""
    if kind == _LORA:
        return
    name, why = _OTHERS.get(kind, (kind or "of no kind that is named", ""))
    reason = f" ({why})" if why else ""
    raise ModelError(
        f"{what} is {name}{reason}, and only gradients of LoRA adapters are computed: train a LoRA adapter "
        "(peft.LoraConfig) and score that"
    )


def check_active_kinds(model: nn.Module) -> None:
    """Raise ModelError where an active adapter of `model` is not LoRA, or the layers of one are another kind's."""
    for name, config in _active_configs(model).items():
        check_kind(f"the model's adapter {name!r}", kind_of(config))
    from peft.tuners.adalora.layer import AdaLoraLayer
    from peft.tuners.lora import LoraLayer
    from peft.tuners.trainable_tokens import TrainableTokensLayer
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in model.named_modules():  # put there without a configuration that is still the model's
        plain = isinstance(module, LoraLayer | TrainableTokensLayer) and not isinstance(module, AdaLoraLayer)
        if isinstance(module, BaseTunerLayer) and not plain and _is_at_work(module):
            check_kind(f"the adapter of {name}", type(module).__module__.split(".")[2].upper())


def _is_at_work(layer: Any) -> bool:
    """Tell whether an active adapter has parameters in `layer`."""
    held = {key for name in layer.adapter_layer_names for key in getattr(layer, name, None) or ()}
    return not held or bool(held & set(layer.active_adapters))


def _active_configs(model: Any) -> dict[str, Any]:
    """Return the configurations of active adapters by name; of all if it is not known which are active."""
    configs = getattr(model, "peft_config", None)
    if not isinstance(configs, dict):
        return {}
    active = getattr(model, "active_adapters", None)
    if callable(active):  # transformers' own integration, and peft's wrapper of prompts around such a model
        try:
            active = active()
        except (AttributeError, ValueError):
            active = getattr(model, "active_adapter", None)
    names = [active] if isinstance(active, str) else list(active or configs)
    return {name: configs[name] for name in names if name in configs}


def check_together(name: str, layer: Any, active: Sequence[str]) -> None:
    """Raise ModelError where the adapters `active` of a LoRA layer `name` are no sum of products, DoRA alone aside."""
    dora = [adapter for adapter in active if adapter in layer.lora_magnitude_vector]
    for adapter in active:
        if adapter in layer.lora_variant and adapter not in dora:
            _refuse_variant(name, type(layer.lora_variant[adapter]).__name__)
    if dora and len(active) > 1:
        raise ModelError(
            f"{name}: the adapters {truncated_list(active)} are active together, and {dora[0]!r} (DoRA) would scale "
            "the others' outputs too: activate one at a time by set_adapter"
        )


def _refuse_variant(name: str, kind: str) -> None:
    found = next((text for start, text in _VARIANTS.items() if kind.startswith(start)), None)
    called, setting = found or (kind, f"the setting that asks for {kind}")
    raise ModelError(f"{name}: {called} is no plain LoRA, and not supported: train the adapter without {setting}")
