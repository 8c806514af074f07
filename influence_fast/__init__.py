"""influence-fast: which chain-of-thought examples help or harm the reasoning of a fine-tuned language model.

Names are loaded on first use, so that `import influence_fast` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_EXPORTS: dict[str, str] = {
    "Example": "data.examples",
    "EvalConfig": "evaluation.evaluate",
    "LoraSettings": "training.fine_tuning",
    "Projection": "gradients.projection",
    "ScoreTable": "influence.scores",
    "Store": "store.reader",
    "TrainConfig": "training.fine_tuning",
    "adam_moments": "influence.adam",
    "append_store": "store.merge",
    "build_distributed": "distributed.builds",
    "build_shards": "store.building",
    "build_store": "store.building",
    "checkpoint_scores": "influence.checkpoints",
    "contaminated": "data.decontamination",
    "evaluate": "evaluation.evaluate",
    "example_embeddings": "selection.embeddings",
    "finetune": "training.fine_tuning",
    "fit_projection": "influence.sketch_fitting",
    "grade": "evaluation.grading",
    "gradient_layout": "gradients.lora",
    "identity_of": "store.building",
    "import_gradients": "store.importers",
    "influence_matrix": "influence.scoring",
    "influence_scores": "influence.scoring",
    "inner_products": "products.inner_products",
    "learning_rates": "influence.checkpoints",
    "load_examples": "data.examples",
    "load_finetuned": "training.fine_tuning",
    "load_model": "training.models",
    "load_task": "evaluation.tasks",
    "load_tokenizer": "training.tokenizers",
    "merge_stores": "store.merge",
    "near_duplicates": "data.diversity",
    "open_store": "store.reader",
    "per_example_gradients": "gradients.per_example",
    "per_example_losses": "gradients.per_example",
    "plan": "run.planner",
    "plot_ranking_over_training": "report.ranking_plot",
    "quantize_rows": "products.inner_products",
    "query_gradients": "influence.pool_gradients",
    "ranking_over_training": "influence.checkpoints",
    "sample_labels": "gradients.fisher_labels",
    "select": "selection.pruning",
    "stream_influence": "gradients.streaming",
    "task_examples": "evaluation.tasks",
    "tokenize": "data.examples",
    "top_influences": "influence.scoring",
    "validate": "proof.validate",
    "verify_store": "store.reader",
    "write_report": "report.page",
}

__all__ = sorted([*_EXPORTS, "__version__"])


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(f"influence_fast.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module 'influence_fast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
