"""The models and tokenizers of a run, as its configuration names them."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

from influence_fast.config import ModelConfig
from influence_fast.evaluation.evaluate import EvalResult
from influence_fast.evaluation.generation import ModelFiles
from influence_fast.training.fine_tuning import finetuned
from influence_fast.training.models import fit_vocabulary, load_model, load_tokenizer


def tokenizer_of(model: ModelConfig) -> Any:
    own: dict[str, Any] = {"adapter": model.adapter, "tokenizer": model.tokenizer}
    return load_tokenizer(model.path, **own, trust_remote_code=model.trust_remote_code)


def tokens_of(model: ModelConfig) -> str | None:
    """Return the adapter whose tokenizer may be in use."""
    return model.adapter if model.tokenizer is None else None


def model_of(model: ModelConfig) -> Any:
    """Load the base, with as many embeddings as the adapter that it will carry was trained with."""
    base = load_model(
        model.path,
        dtype=model.dtype,
        device=model.device,
        trust_remote_code=model.trust_remote_code,
        quantize=model.quantize,
    )
    if model.adapter is not None:
        fit_vocabulary(base, model.adapter, model.path)
    return base


def answering_model(
    base: Any, adapter: str | Path | None, files: ModelConfig, engine: str
) -> contextlib.AbstractContextManager[Any]:
    """Return what answers questions: the model in memory with its adapter, or for vLLM the files of both."""
    if engine == "vllm":
        folder = None if adapter is None else str(adapter)
        return contextlib.nullcontext(ModelFiles(files.path, folder, files.dtype, files.trust_remote_code))
    return contextlib.nullcontext(base) if adapter is None else finetuned(base, adapter)


def evaluation_record(result: EvalResult, questions: int, samples: int) -> dict[str, Any]:
    """Return what a run keeps of an evaluation on `questions` test questions with `samples` answers each."""
    low, high = result.interval
    return {
        "accuracy": result.accuracy,
        "low": low,
        "high": high,
        "n": questions,
        "samples": samples,
        "majority": result.majority,
        "pass_at": [dataclasses.asdict(found) for found in result.pass_at],
        "cut": result.truncated / len(result.items),
    }
