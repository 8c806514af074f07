from __future__ import annotations

import math
from typing import Any

import pytest

from influence_fast.errors import ConfigError
from influence_fast.training.settings import LoraSettings, TrainConfig


@pytest.mark.parametrize(
    ("kind", "settings", "named"),
    [
        (TrainConfig, {"epochs": math.nan}, "training.epochs is nan"),
        (TrainConfig, {"epochs": math.inf}, "training.epochs is inf"),
        (TrainConfig, {"epochs": -1.0}, "training.epochs and training.max_steps are both not above 0"),
        (TrainConfig, {"learning_rate": math.inf}, "training.learning_rate is inf"),
        (TrainConfig, {"learning_rate": math.nan}, "training.learning_rate is nan"),
        (TrainConfig, {"weight_decay": math.nan}, "training.weight_decay is nan"),
        (TrainConfig, {"max_grad_norm": math.inf}, "training.max_grad_norm is inf"),
        (LoraSettings, {"alpha": math.nan}, "lora.alpha is nan"),
        (LoraSettings, {"alpha": 0.0}, "lora.alpha is 0.0"),
    ],
    ids=str,
)
def test_settings_that_train_nothing_or_not_a_number_are_refused(kind: Any, settings: Any, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        kind(**settings)
