"""influence-fast: which chain-of-thought examples help or harm the reasoning of a fine-tuned language model.

Names are loaded on first use, so that `import influence_fast` costs nothing.
"""

from __future__ import annotations

import importlib
import warnings
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_EXPORTS: dict[str, str] = {
    "BuildOptions": "store.building",
    "Example": "data.examples",
    "InfluenceCallback": "influence.callback",
    "LoraSettings": "training.settings",
    "ProductOptions": "products.options",
    "RowSpec": "gradients.rows.row_spec",
    "ScoreTable": "influence.scores",
    "Scorer": "influence.scorer",
    "Store": "store.reader",
    "TrainConfig": "training.settings",
    "build_store": "influence.building",
    "check_model": "check.model_check",
    "evaluate": "evaluation.evaluate",
    "finetune": "training.fine_tuning",
    "inner_products": "products.inner_products",
    "load_examples": "data.examples",
    "load_finetuned": "training.fine_tuning",
    "load_model": "training.models",
    "load_tokenizer": "training.tokenizers",
    "merge_stores": "store.merge",
    "open_store": "store.reader",
    "per_example_gradients": "gradients.per_example",
    "select": "selection.pruning",
    "step_influence": "influence.step_influence",
    "stream_influence": "gradients.streaming",
    "tokenize": "data.examples",
    "validate": "validation.validate",
    "write_report": "report.page",
}

# Reachable here for one release more, with a warning that names the submodule.
_MOVED: dict[str, str] = {
    "EvalConfig": "evaluation.evaluate",
    "Projection": "gradients.rows.projection",
    "adam_moments": "influence.adam",
    "append_store": "store.merge",
    "build_distributed": "distributed.builds",
    "build_shards": "store.building",
    "checkpoint_scores": "influence.checkpoints",
    "contaminated": "data.decontamination",
    "example_embeddings": "selection.embeddings",
    "fit_projection": "influence.sketch_fitting",
    "grade": "evaluation.grading",
    "gradient_layout": "gradients.targets",
    "identity_of": "store.planning",
    "import_gradients": "store.importers",
    "learning_rates": "influence.checkpoints",
    "load_task": "evaluation.tasks",
    "near_duplicates": "data.diversity",
    "per_example_losses": "gradients.per_example",
    "plan": "run.planner",
    "plot_ranking_over_training": "report.ranking_plot",
    "quantize_rows": "products.inner_products",
    "query_gradients": "store.queries",
    "ranking_over_training": "influence.checkpoints",
    "sample_labels": "gradients.fisher_labels",
    "task_examples": "evaluation.tasks",
    "verify_store": "store.verification",
}

# As `_MOVED`, but these warn when they are called: `Scorer` replaces them.
_REPLACED: dict[str, str] = {
    "influence_matrix": "influence.scoring",
    "influence_scores": "influence.scoring",
    "top_influences": "influence.scoring",
}

__all__ = sorted([*_EXPORTS, "__version__"])


# What `__getattr__` gives, for type checkers and completion.
if TYPE_CHECKING:
    from influence_fast.check.model_check import check_model as check_model
    from influence_fast.data.decontamination import contaminated as contaminated
    from influence_fast.data.diversity import near_duplicates as near_duplicates
    from influence_fast.data.examples import Example as Example
    from influence_fast.data.examples import load_examples as load_examples
    from influence_fast.data.examples import tokenize as tokenize
    from influence_fast.distributed.builds import build_distributed as build_distributed
    from influence_fast.evaluation.evaluate import EvalConfig as EvalConfig
    from influence_fast.evaluation.evaluate import evaluate as evaluate
    from influence_fast.evaluation.grading import grade as grade
    from influence_fast.evaluation.tasks import load_task as load_task
    from influence_fast.evaluation.tasks import task_examples as task_examples
    from influence_fast.gradients.fisher_labels import sample_labels as sample_labels
    from influence_fast.gradients.per_example import per_example_gradients as per_example_gradients
    from influence_fast.gradients.per_example import per_example_losses as per_example_losses
    from influence_fast.gradients.rows.projection import Projection as Projection
    from influence_fast.gradients.rows.row_spec import RowSpec as RowSpec
    from influence_fast.gradients.streaming import stream_influence as stream_influence
    from influence_fast.gradients.targets import gradient_layout as gradient_layout
    from influence_fast.influence.adam import adam_moments as adam_moments
    from influence_fast.influence.building import build_store as build_store
    from influence_fast.influence.callback import InfluenceCallback as InfluenceCallback
    from influence_fast.influence.checkpoints import checkpoint_scores as checkpoint_scores
    from influence_fast.influence.checkpoints import learning_rates as learning_rates
    from influence_fast.influence.checkpoints import ranking_over_training as ranking_over_training
    from influence_fast.influence.scorer import Scorer as Scorer
    from influence_fast.influence.scores import ScoreTable as ScoreTable
    from influence_fast.influence.scoring import influence_matrix as influence_matrix
    from influence_fast.influence.scoring import influence_scores as influence_scores
    from influence_fast.influence.scoring import top_influences as top_influences
    from influence_fast.influence.sketch_fitting import fit_projection as fit_projection
    from influence_fast.influence.step_influence import step_influence as step_influence
    from influence_fast.products.inner_products import inner_products as inner_products
    from influence_fast.products.inner_products import quantize_rows as quantize_rows
    from influence_fast.products.options import ProductOptions as ProductOptions
    from influence_fast.report.page import write_report as write_report
    from influence_fast.report.ranking_plot import plot_ranking_over_training as plot_ranking_over_training
    from influence_fast.run.planner import plan as plan
    from influence_fast.selection.embeddings import example_embeddings as example_embeddings
    from influence_fast.selection.pruning import select as select
    from influence_fast.store.building import BuildOptions as BuildOptions
    from influence_fast.store.building import build_shards as build_shards
    from influence_fast.store.importers import import_gradients as import_gradients
    from influence_fast.store.merge import append_store as append_store
    from influence_fast.store.merge import merge_stores as merge_stores
    from influence_fast.store.planning import identity_of as identity_of
    from influence_fast.store.queries import query_gradients as query_gradients
    from influence_fast.store.reader import Store as Store
    from influence_fast.store.reader import open_store as open_store
    from influence_fast.store.verification import verify_store as verify_store
    from influence_fast.training.fine_tuning import finetune as finetune
    from influence_fast.training.fine_tuning import load_finetuned as load_finetuned
    from influence_fast.training.models import load_model as load_model
    from influence_fast.training.settings import LoraSettings as LoraSettings
    from influence_fast.training.settings import TrainConfig as TrainConfig
    from influence_fast.training.tokenizers import load_tokenizer as load_tokenizer
    from influence_fast.validation.validate import validate as validate


# A checker that sees this function takes every name for one of this package.
if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        where = (_EXPORTS | _MOVED | _REPLACED).get(name)
        if where is None:
            raise AttributeError(f"module 'influence_fast' has no attribute {name!r}")
        if name in _MOVED:
            warnings.warn(
                f"influence_fast.{name} is deprecated: write 'from influence_fast.{where} import {name}'",
                DeprecationWarning,
                stacklevel=2,
            )
        return getattr(importlib.import_module(f"influence_fast.{where}"), name)


def __dir__() -> list[str]:
    return __all__
