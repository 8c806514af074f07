"""influence-fast: which chain-of-thought examples help or harm the reasoning of a fine-tuned language model.

Names are loaded on first use, so that `import influence_fast` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_EXPORTS: dict[str, str] = {
    "Projection": "projection",
    "gradient_layout": "lora",
    "per_example_gradients": "gradients",
    "per_example_losses": "gradients",
}

__all__ = sorted([*_EXPORTS, "__version__"])


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(f"influence_fast.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module 'influence_fast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
