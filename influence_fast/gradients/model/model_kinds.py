"""Say of a model that is no causal language model what it is."""

from __future__ import annotations

from typing import Any

from influence_fast.errors import ModelError

# Ends of transformers' class names, and what such a model does in place of predicting the next token.
_OTHER_TASKS = {
    "ForSequenceClassification": "sequence classification (peft's task type SEQ_CLS)",
    "ForMultipleChoice": "multiple choice",
    "ForTokenClassification": "token classification (peft's task type TOKEN_CLS)",
    "ForQuestionAnswering": "extractive question answering (peft's task type QUESTION_ANS)",
    "ForMaskedLM": "filling in masked tokens, of which each sees those after it",
}


def check_predicts_tokens(base: Any) -> None:
    """Raise ModelError for a model that is no causal language model, by the name of what it is."""
    kind = type(base).__name__
    remedy = "load it with transformers.AutoModelForCausalLM, and train its adapter as task_type='CAUSAL_LM'"
    for ending, task in _OTHER_TASKS.items():
        if kind.endswith(ending):
            raise ModelError(f"{kind} is a model for {task}, and no causal language model: {remedy}")
    if not hasattr(base, "get_output_embeddings") or not hasattr(base, "config"):
        raise ModelError(f"{kind} is no causal language model of transformers: {remedy}")
    if getattr(base.config, "is_encoder_decoder", False):
        raise ModelError(
            f"{kind} has an encoder that reads a text of its own (peft's task type SEQ_2_SEQ_LM), and is no causal "
            "language model: choose a decoder-only model, which transformers.AutoModelForCausalLM loads"
        )
    if base.get_output_embeddings() is None:
        raise ModelError(f"{kind} has no head that predicts tokens: {remedy}")
