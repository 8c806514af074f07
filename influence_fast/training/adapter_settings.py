"""The settings of an adapter as its file has them: kinds and sizes are checked before peft works with any of them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from influence_fast.errors import ModelError, shown
from influence_fast.isolation import limited
from influence_fast.training.files import ADAPTER_CONFIG

_SECONDS = 1  # of processor time for the regular expressions; those in use need some milliseconds
_MEMORY = 1 << 30
_PLAIN = re.compile(r"[\w.-]*")  # a module's name, which cannot take long to match

_Check = tuple[Any, str]
_TEXTS: _Check = (lambda value: isinstance(value, str) or _all(value, str), "a name or a list of names")
_COUNTS: _Check = (lambda value: _is_count(value) or _all(value, int), "a whole number or a list of them")
_FLAG: _Check = (lambda value: isinstance(value, bool), "true or false")
_NUMBER: _Check = (lambda value: _is_number(value), "a number")


def _all(value: Any, kind: type) -> bool:
    return isinstance(value, list | tuple | set) and all(
        isinstance(one, kind) and type(one) is not bool for one in value
    )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e15


def _is_mapping_to(value: Any, check: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(key, str) and check(one) for key, one in value.items())


def _is_tokens(value: Any) -> bool:
    return _all(value, int) or _is_mapping_to(value, lambda one: _all(one, int))


#: What each setting that is read may hold, beside null.
_KINDS: dict[str, _Check] = {
    "r": (lambda value: _is_count(value) and value > 0, "a whole number of at least 1"),
    "lora_alpha": _NUMBER,
    "lora_dropout": _NUMBER,
    "target_modules": _TEXTS,
    "exclude_modules": _TEXTS,
    "modules_to_save": _TEXTS,
    "layers_pattern": _TEXTS,
    "target_parameters": _TEXTS,
    "layers_to_transform": _COUNTS,
    "rank_pattern": (lambda value: _is_mapping_to(value, lambda n: _is_count(n) and n > 0), "ranks by module"),
    "alpha_pattern": (lambda value: _is_mapping_to(value, _is_number), "numbers by module"),
    "bias": (lambda value: value in ("none", "all", "lora_only"), "none, all or lora_only"),
    "use_dora": _FLAG,
    "use_rslora": _FLAG,
    "fan_in_fan_out": _FLAG,
    "lora_bias": _FLAG,
    "trainable_token_indices": (_is_tokens, "a list of tokens, or one by module"),
    "layer_replication": (lambda value: isinstance(value, list), "a list of ranges"),
    "base_model_name_or_path": (lambda value: isinstance(value, str), "text"),
}
_REQUIRED = ("r", "lora_alpha", "lora_dropout", "bias")


def check_kinds(config: Any, adapter: str) -> None:
    """Raise ModelError, naming the setting, where one is of another kind than peft works with."""
    for name, (fits, kind) in _KINDS.items():
        value = getattr(config, name, None)
        if value is None and name not in _REQUIRED:
            continue
        if value is None and not hasattr(config, name):
            continue
        if not fits(value):
            raise ModelError(
                f"the adapter {adapter}: {name} in its {ADAPTER_CONFIG} is {shown(value)}, and must be {kind}; put "
                "back the settings it was trained with"
            )


def check_sizes(model: nn.Module, config: Any, stored: Mapping[str, Sequence[int]], adapter: str) -> None:
    """Raise ModelError for ranks and replications that would make far more numbers than the model and the file have.

    stored: shapes of the adapter's tensors.
    """
    widths = [min(m.weight.shape) for m in model.modules() if isinstance(m, nn.Linear) and m.weight.dim() == 2]
    ranks = [shape[0] for name, shape in stored.items() if "lora_A" in name and shape]
    most = max([2 * max(widths, default=0), *ranks, 1])
    for name, rank in {
        "r": config.r,
        **{f"rank_pattern of {key}": n for key, n in (config.rank_pattern or {}).items()},
    }.items():
        if rank > most:
            raise ModelError(
                f"the adapter {adapter}: {name} in its {ADAPTER_CONFIG} is {shown(rank)}, and no rank above {most} "
                "fits this model and the stored factors; put back the settings it was trained with"
            )
    ranges = getattr(config, "layer_replication", None) or []
    own = getattr(getattr(model, "config", None), "num_hidden_layers", None)
    total = 0
    for one in ranges:
        fits = isinstance(one, list | tuple) and len(one) == 2 and all(map(_is_count, one)) and 0 <= one[0] < one[1]
        if not fits or (own is not None and one[1] > own):
            raise ModelError(
                f"the adapter {adapter}: layer_replication in its {ADAPTER_CONFIG} has {shown(one)}, which is no range "
                f"of the model's {own} layers; put back the settings it was trained with"
            )
        total += one[1] - one[0]
    if total > max(8 * (own or 0), 64):
        raise ModelError(
            f"the adapter {adapter}: layer_replication in its {ADAPTER_CONFIG} makes {total:,} layers of {own}; put "
            "back the settings it was trained with"
        )


def check_patterns(model: nn.Module, config: Any, what: str) -> None:
    """Raise ModelError for a regular expression in the settings that is none, or that does not end on a module's name.

    `what` names the settings in messages. Settings of plain names, as nearly all are, cost nothing.
    """
    patterns = list(_patterns(config))
    if not patterns:
        return
    names = [name for name, _ in model.named_modules() if name]
    work = {"task": "patterns", "patterns": [pattern for _, pattern in patterns], "names": names}
    done = limited(work, seconds=_SECONDS, memory=_MEMORY)
    last = done.errors.split()
    number = int(last[-1]) if last and last[-1].isdigit() else 0
    if done.stopped:
        why = f"does not end within {_SECONDS} s" if done.stopped == "time" else "takes more memory than it may"
    else:
        try:
            place, why = json.loads(done.output)
        except ValueError:  # the interpreter cannot start in isolation: nothing is known of them
            return
        if place is None:
            return
        number, why = place, f"is no regular expression ({why})"
    name, pattern = patterns[number]
    raise ModelError(f"{what}: {name} {shown(pattern)} {why}; name the modules in a list, or write a simpler one")


#: How peft puts a setting's text into the regular expression that it matches with the names of modules.
_FORMS = {
    "target_modules": "{}",
    "exclude_modules": "{}",
    "rank_pattern": r"(.*\.)?({})$",
    "alpha_pattern": r"(.*\.)?({})$",
    "layers_pattern": r"(?:^|.*?\.){}\.(?P<idx>\d+)\.",
    "modules_to_save": r"(^|.*\.){}($|\..*)",
}


def _patterns(config: Any) -> Iterator[tuple[str, str]]:
    """Yield every text that peft matches as a regular expression, by the setting that it stands in; no plain names."""
    for name, form in _FORMS.items():
        value = getattr(config, name, None) or []
        if name in ("target_modules", "exclude_modules") and not isinstance(value, str):
            continue  # names in a list are compared, and not matched
        for text in [value] if isinstance(value, str) else value:
            if not _PLAIN.fullmatch(text):
                yield name, form.replace("{}", text)
