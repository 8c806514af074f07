"""Settings of a fine-tuning: how it goes (`TrainConfig`), and the adapter that it trains (`LoraSettings`)."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from influence_fast.errors import ConfigError, did_you_mean, setting
from influence_fast.settings import MAX_TRAINING_SEED, check_seed

PRECISIONS = ("auto", "fp32", "bf16")
SCHEDULES = ("constant", "constant_with_warmup", "cosine", "linear")


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """Settings of a fine-tuning.

    Batches hold examples of like length; the loss is the mean over completion tokens.

    Attributes:
        epochs, max_steps: how long; `max_steps` > 0 overrides `epochs`.
        save_checkpoints: True keeps one checkpoint an epoch, a number N one every N optimizer steps, each with its
            optimizer state.
        precision: "auto" is bf16 on a GPU that has it.
        packing: examples share rows of so many tokens (best fit decreasing), each seeing itself alone, and `batch_size`
            counts rows; None pads.

    Example:
        >>> inf.TrainConfig(epochs=2, learning_rate=1e-4).batch_size
        16
    """

    epochs: float = 3.0
    learning_rate: float = 2e-4
    batch_size: int = 16
    gradient_accumulation_steps: int = 1
    schedule: str = "cosine"
    warmup_ratio: float = 0.03
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    seed: int = 0
    max_steps: int = -1
    save_checkpoints: bool | int = False
    precision: str = "auto"
    gradient_checkpointing: bool = False
    packing: int | None = None

    def __post_init__(self) -> None:
        for name, value, known in (
            ("precision", self.precision, PRECISIONS),
            ("schedule", self.schedule, SCHEDULES),
        ):
            if value not in known:
                key = f"training.{name}"
                raise ConfigError(f"{value!r} is unknown; {did_you_mean(str(value), known)}", key=key, value=value)
        for name in ("learning_rate", "batch_size", "gradient_accumulation_steps"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"is {getattr(self, name)}; it must be above 0, and finite", key=f"training.{name}")
        for name in ("epochs", "weight_decay", "max_grad_norm"):
            if not math.isfinite(getattr(self, name)):
                raise ConfigError(f"is {getattr(self, name)}; it must be a finite number", key=f"training.{name}")
        check_seed("training.seed", self.seed, MAX_TRAINING_SEED)
        if self.epochs <= 0 and self.max_steps <= 0:
            raise ConfigError(
                f"{setting('training.epochs')} and {setting('training.max_steps')} are both not above 0; set one of "
                "them"
            )
        if not 0 <= self.warmup_ratio < 1:
            raise ConfigError(
                f"{setting('training.warmup_ratio')} is {self.warmup_ratio}; it must be at least 0 and below 1"
            )
        if self.packing is not None and self.packing < 2:
            raise ConfigError(
                f"{setting('training.packing')} is {self.packing}; it is the tokens of a row, or left out"
            )
        if self.save_checkpoints < 0:
            raise ConfigError(
                f"{setting('training.save_checkpoints')} is {self.save_checkpoints}; use true, false or a step count"
            )


@dataclass(frozen=True, slots=True)
class LoraSettings:
    """Settings of a peft adapter: `y = W x + (alpha / r) B A x` on `target_modules` (Hu et al., arXiv 2106.09685).

    Attributes:
        target_modules: "all-linear" is every linear layer but the head that can be scored.
        target_parameters: names of parameters with an adapter too, as of experts in one tensor
            ("experts.gate_up_proj"), for which dropout is 0.

    Example:
        >>> inf.LoraSettings(r=8, alpha=16).target_modules
        'all-linear'
    """

    r: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    target_modules: str | tuple[str, ...] = "all-linear"
    target_parameters: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.r < 1:
            raise ConfigError(f"{setting('lora.r')} is {self.r}; it must be at least 1")
        if not math.isfinite(self.alpha) or self.alpha == 0:
            raise ConfigError(f"{setting('lora.alpha')} is {self.alpha}; it must be a finite number, and not 0")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"{setting('lora.dropout')} is {self.dropout}; it must be at least 0 and below 1")
        if tuple(self.target_modules) == ("all-linear",):
            object.__setattr__(self, "target_modules", "all-linear")
        if not isinstance(self.target_modules, str):
            object.__setattr__(self, "target_modules", tuple(self.target_modules))
        object.__setattr__(self, "target_parameters", tuple(self.target_parameters))
        if self.target_parameters and self.dropout:
            raise ConfigError(
                f"{setting('lora.dropout')} is {self.dropout}; it must be 0 with {setting('lora.target_parameters')}"
            )

    def record(self) -> dict[str, Any]:
        """Return the settings as they are written beside a result; those without an effect are left out."""
        return {name: value for name, value in asdict(self).items() if name != "target_parameters" or value}
