"""Models that are no causal language model, and adapters that are no LoRA, are refused as what they are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

import influence_fast as inf
from benches.model_zoo import examples_for, tiny, tiny_config, with_adapter
from influence_fast.errors import ModelError

OTHERS = {
    "AutoModelForSequenceClassification": ("llama", r"sequence classification \(peft's task type SEQ_CLS\)"),
    "AutoModelForTokenClassification": ("llama", "token classification"),
    "AutoModelForMaskedLM": ("bert", "filling in masked tokens"),
    "AutoModelForSeq2SeqLM": ("bart", "BartForConditionalGeneration has an encoder.*choose a decoder-only model"),
    "AutoModel": ("llama", "LlamaModel has no head that predicts tokens.*AutoModelForCausalLM"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_a_model_for_another_task_is_named_as_what_it_is(kind: str) -> None:
    name, message = OTHERS[kind]
    base = getattr(transformers, kind).from_config(tiny_config(name))
    targets = ["query"] if name == "bert" else ["q_proj"]
    model = get_peft_model(base, LoraConfig(r=2, target_modules=targets))
    with pytest.raises(ModelError, match=message):
        inf.per_example_gradients(model, examples_for(model))


def test_a_module_that_is_no_transformers_model_is_refused() -> None:
    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(3, 3)), LoraConfig(r=2, target_modules=["0"]))
    ids = torch.ones(2, dtype=torch.int64)
    with pytest.raises(ModelError, match="Sequential is no causal language model of transformers"):
        inf.per_example_gradients(model, [{"input_ids": ids, "labels": ids}])


def test_a_model_whose_own_forward_fails_is_refused_with_its_words() -> None:
    model = with_adapter(tiny("llama"))

    def fails(*args: Any, **kwargs: Any) -> None:
        raise ValueError("shared_kv_states cannot be None")

    model.get_base_model().register_forward_pre_hook(fails)
    with pytest.raises(ModelError, match=r"llama: the model's own forward of 2 tokens fails \(shared_kv_states cannot"):
        inf.per_example_gradients(model, examples_for(model))


def test_a_model_whose_forward_fails_with_a_cache_is_asked_without() -> None:
    model = with_adapter(tiny("llama"))
    examples = examples_for(model)
    wanted = inf.per_example_gradients(model, examples)

    def fails(_: Any, __: Any, kwargs: dict[str, Any]) -> None:
        if kwargs.get("use_cache") is not False:
            raise AttributeError("the configuration has no attribute num_hidden_layers")

    model.get_base_model().register_forward_pre_hook(fails, with_kwargs=True)
    assert torch.equal(inf.per_example_gradients(model, examples), wanted)


def test_reentrant_checkpointing_does_not_change_the_rows() -> None:
    model = with_adapter(tiny("llama"))
    examples = examples_for(model)
    wanted = inf.per_example_gradients(model, examples)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    own = model.get_base_model().model.layers[0]._gradient_checkpointing_func
    model.train()
    rows = inf.per_example_gradients(model, examples)
    assert (rows - wanted).norm() < 1e-12 * wanted.norm()
    assert model.get_base_model().model.layers[0]._gradient_checkpointing_func is own
    assert model.training
