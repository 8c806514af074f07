"""influence-fast: which chain-of-thought examples help or harm the reasoning of a fine-tuned language model.

Names are loaded on first use, so that `import influence_fast` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_EXPORTS: dict[str, str] = {
    "Example": "data",
    "EvalConfig": "evaluation",
    "LoraSettings": "training",
    "Projection": "projection",
    "ScoreTable": "scores",
    "Store": "store",
    "TrainConfig": "training",
    "adam_moments": "adam",
    "append_store": "store_merge",
    "build_distributed": "distributed",
    "build_shards": "building",
    "build_store": "building",
    "checkpoint_scores": "checkpoints",
    "contaminated": "decontamination",
    "evaluate": "evaluation",
    "example_embeddings": "embeddings",
    "finetune": "training",
    "fit_projection": "sketch_fitting",
    "gradient_layout": "lora",
    "identity_of": "building",
    "import_gradients": "importers",
    "influence_matrix": "scoring",
    "influence_scores": "scoring",
    "inner_products": "products",
    "learning_rates": "checkpoints",
    "load_examples": "data",
    "load_finetuned": "training",
    "load_model": "models",
    "load_task": "tasks",
    "load_tokenizer": "models",
    "merge_stores": "store_merge",
    "near_duplicates": "diversity",
    "open_store": "store",
    "per_example_gradients": "gradients",
    "per_example_losses": "gradients",
    "plan": "planner",
    "plot_ranking_over_training": "checkpoints",
    "quantize_rows": "products",
    "query_gradients": "pool_gradients",
    "ranking_over_training": "checkpoints",
    "sample_labels": "fisher_labels",
    "select": "pruning",
    "stream_influence": "streaming",
    "task_examples": "tasks",
    "tokenize": "data",
    "top_influences": "scoring",
    "validate": "proof",
    "verify_store": "store",
    "write_report": "report",
}

__all__ = sorted([*_EXPORTS, "__version__"])


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(f"influence_fast.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module 'influence_fast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
