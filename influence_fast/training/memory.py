"""What a fine-tuning will hold in memory, by a short text that the model reads before it, and whether that fits."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from influence_fast.data.packing import text_config
from influence_fast.errors import ConfigError, plain, setting, warn_once
from influence_fast.gradients.model.referee import decoder_of
from influence_fast.gradients.step.opened import base_of, free_bytes
from influence_fast.training.settings import TrainConfig
from influence_fast.training.undisturbed import undisturbed

logger = logging.getLogger(__name__)

#: Set to 1, nothing is refused.
IGNORE = "INFLUENCE_FAST_IGNORE_MEMORY"

_PROBES = (16, 32, 64)  # tokens
# trl computes log-probabilities for so many tokens at a time. Measured on the CPU with a vocabulary of 49152: 5.4 fp32
# numbers for each logit of these tokens; on a GPU its kernel keeps about 2.
_CHUNK = 32768
_COPIES = {"cpu": 5.4}
_GPU_COPIES = 2.0
# Measured on the CPU: what the process holds at its peak over what autograd keeps, since freed pieces are not returned
# at once. With it estimates of 1.0 to 3.1 GB lay within 6 % of what a step added, but for 0.2 GB of libraries.
_HELD = {"cpu": 1.6}
_TIGHT, _REFUSED = 0.9, 1.3  # of what is free: said, and not begun


@dataclass(frozen=True, slots=True)
class TrainingMemory:
    """Bytes that a fine-tuning takes.

    loaded: base weights and adapter, in memory already. needed: what the training adds, by name. tokens: of the largest
    batch, padding counted. free: what the device has left; None where that is not known.
    """

    loaded: int
    needed: dict[str, int]
    batch_size: int
    tokens: int
    free: int | None

    @property
    def total(self) -> int:
        """Return the bytes that the training adds."""
        return sum(self.needed.values())

    @property
    def fits(self) -> bool:
        """Return whether the training is expected to fit, with something to spare."""
        return self.free is None or self.total <= _TIGHT * self.free

    @property
    def refused(self) -> bool:
        """Return whether the training clearly does not fit: estimates are right to about a fifth."""
        return self.free is not None and self.total > _REFUSED * self.free

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {_size(count)}" for name, count in self.needed.items())
        free = "" if self.free is None else f", {_size(self.free)} free"
        return (
            f"memory: weights and adapter {_size(self.loaded)}, and about {_size(self.total)} more ({parts}) at "
            f"batches of {self.batch_size} rows, {self.tokens:,} tokens{free}"
        )

    def remedy(self) -> str:
        """Return the line for a training that does not fit."""
        assert self.free is not None
        return (
            f"this training needs about {_size(self.total)} of memory, and {_size(self.free)} are free: lower "
            f"{setting('training.batch_size')} {self.batch_size} and raise "
            f"{setting('training.gradient_accumulation_steps')} by as much (the updates stay the same), or set "
            f"{setting('training.gradient_checkpointing')}"
        )


def training_memory(
    model: torch.nn.Module, examples: Sequence[Mapping[str, Any]], config: TrainConfig
) -> TrainingMemory | None:
    """Estimate what `finetune` will hold; None for a model that does not read a short text.

    Activations are measured: what autograd keeps of two short texts tells what it keeps of a token, and of a pair of
    tokens where attention is written out. Gradient checkpointing keeps a layer's input in their place.

    model: with the adapter that is to be trained. examples: `{"input_ids"}`.
    """
    longest = sorted((len(example["input_ids"]) for example in examples), reverse=True)[: config.batch_size]
    width = config.packing or longest[0]
    rows = config.batch_size if config.packing else len(longest)
    with undisturbed(model):
        saved = [_kept_bytes(model, length) for length in _PROBES]
    if None in saved:
        return None
    # c + a n + b n^2 bytes of a text of n tokens; b is above 0 where attention is written out
    first, second, third = (float(count or 0) for count in saved)
    by_pair = max(0.0, ((third - second) / 32 - (second - first) / 16) / 48)
    by_token = (third - second) / 32 - 96 * by_pair
    activations = rows * width * (by_token + by_pair * width)
    base: Any = base_of(model)
    settings = text_config(base.config)
    layers = max(1, int(getattr(settings, "num_hidden_layers", 1)))
    parameters = list(model.parameters())
    trained = [p for p in parameters if p.requires_grad]
    device = next(iter(trained)).device
    one_layer = activations / layers
    if config.gradient_checkpointing:
        inputs = rows * width * int(getattr(settings, "hidden_size", 0)) * base.dtype.itemsize
        activations = layers * inputs + one_layer
    copies = _COPIES.get(device.type, _GPU_COPIES)
    needed = {
        "gradients and optimizer": sum(p.numel() * (p.element_size() + 2 * p.element_size()) for p in trained),
        "activations": round(
            (activations + one_layer) * _HELD.get(device.type, 1.0)
        ),  # the gradients inside one layer are as large
        "logits": round(min(rows * width, _CHUNK) * int(getattr(settings, "vocab_size", 0)) * 4 * copies),
    }
    loaded = sum(p.numel() * p.element_size() for p in parameters)
    return TrainingMemory(loaded, needed, config.batch_size, rows * width, _free(device))


def check_memory(memory: TrainingMemory) -> None:
    """Raise ConfigError for a training that clearly does not fit, unless `IGNORE` is set; say one that may not."""
    if memory.refused and os.environ.get(IGNORE, "0") in ("", "0"):
        raise ConfigError(f"{memory.remedy()} (to try it all the same, set {IGNORE}=1)")
    if not memory.fits:
        warn_once(logger, plain(memory.remedy()))


def _kept_bytes(model: Any, length: int) -> int | None:
    """Return the bytes that autograd keeps of a text of `length` tokens in training mode, weights not counted."""
    tensors = [*model.parameters(), *model.buffers()]
    weights = {tensor.untyped_storage().data_ptr() for tensor in tensors}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    base = base_of(model)
    ids = torch.zeros(1, length, dtype=torch.int64, device=base.get_input_embeddings().weight.device)
    model.train()
    try:
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = decoder_of(base)(input_ids=ids, use_cache=False)
        del out
    except Exception:  # models of any kind, some of which read more than tokens: no estimate is no fault
        return None
    return sum(kept.values())


def _free(device: torch.device) -> int | None:
    """Return the bytes that a device has left; on the CPU those of this process's container, where it is in one."""
    if device.type == "cuda":
        return free_bytes(device)
    if device.type != "cpu":
        return None
    import psutil

    left = [int(psutil.virtual_memory().available)]
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        with contextlib.suppress(OSError, ValueError):  # "max": no limit
            left.append(int(Path(limit).read_text()) - int(Path(used).read_text()))
    return max(0, min(left))


def _size(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
