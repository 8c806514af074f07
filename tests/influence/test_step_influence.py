"""Influence of steps: sums over steps are the example's influence, and a step's is that of its own tokens' loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import influence_fast as inf
from influence_fast.data.steps import split_steps, token_texts
from influence_fast.errors import ConfigError, DataError, ModelError, NumericError
from influence_fast.gradients.model.frozen import frozen

LENGTHS = (9, 2, 17, 5)


def make_examples(seed: int = 0, weights: bool = False) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for number, length in enumerate(LENGTHS):
        ids = torch.randint(5, 300, (length,), generator=generator)
        labels = ids.clone()
        labels[: length // 3] = -100
        examples.append({"id": f"e{number}", "input_ids": ids, "labels": labels})
        if weights:
            examples[-1]["weights"] = torch.rand(length, generator=generator) - 0.3
    return examples


def make_model(tiny_lora: Callable[..., Any], shape: str = "qwen2", dtype: torch.dtype = torch.float64) -> Any:
    model = tiny_lora(shape).to(dtype)
    return with_wide_norms(model) if dtype == torch.float64 else model


def with_wide_norms(model: Any) -> Any:
    """Let norms compute in the model's dtype: transformers rounds them to fp32, in forward mode's tangents too."""
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            eps = module.variance_epsilon
            module.forward = lambda x, m=module, e=eps: m.weight * x * (x.square().mean(-1, keepdim=True) + e).rsqrt()
    return model


@pytest.fixture(scope="module")
def model(tiny_lora: Callable[..., Any]) -> Any:
    return make_model(tiny_lora)


@pytest.fixture(scope="module")
def directions(model: Any) -> torch.Tensor:
    return inf.per_example_gradients(model, make_examples(seed=7)[:2])


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def thirds(text: str) -> list[tuple[int, int]]:
    step = max(1, len(text) // 3)
    return [(start, min(start + step, len(text))) for start in range(0, len(text), step)]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("shape", ["qwen2", "qwen3", "llama"])
def test_steps_add_up_to_the_influence(tiny_lora: Any, shape: str, reduction: str, weights: bool) -> None:
    model, examples = make_model(tiny_lora, shape), make_examples(weights=weights)
    queries = inf.per_example_gradients(model, make_examples(seed=7)[:2], loss_reduction=reduction)
    rows = inf.per_example_gradients(model, examples, loss_reduction=reduction)
    wanted = rows @ queries.T
    for method, most in (("jvp", 1e-10), ("auto", 1e-10), ("position", 1e-10), ("difference", 1e-5)):
        found = inf.step_influence(model, examples, queries, steps="tokens", method=method, loss_reduction=reduction)
        assert [each.id for each in found] == [e["id"] for e in examples]
        sums = torch.stack([each.influence.sum(dim=0) + each.rest for each in found])
        assert relative(sums, wanted) <= most, method
        if method != "position":
            assert all(bool((each.rest == 0).all()) for each in found)


def test_a_step_is_the_gradient_of_its_own_tokens_loss(model: Any, directions: torch.Tensor) -> None:
    """Against autograd of the loss whose other labels are masked."""
    (example,) = make_examples()[2:3]
    spans = [(5, 6, 7), (8,), (9, 10, 11, 12, 13, 14, 15, 16)]
    found = inf.step_influence(model, [example], directions, steps="tokens", method="jvp")[0]
    by_token = dict(zip([s.tokens[0] for s in found.steps], found.influence, strict=True))
    count = len(found.steps)
    for span in spans:
        masked = torch.full_like(example["labels"], -100)
        masked[list(span)] = example["labels"][list(span)]
        (row,) = inf.per_example_gradients(model, [{**example, "labels": masked}], loss_reduction="sum")
        wanted = (row @ directions.T) / count
        assert relative(torch.stack([by_token[t] for t in span]).sum(dim=0), wanted) <= 1e-10


def test_methods_agree_in_float32_and_leave_the_adapter(tiny_lora: Any) -> None:
    model, examples = make_model(tiny_lora, dtype=torch.float32), make_examples()
    queries = inf.per_example_gradients(model, make_examples(seed=7)[:2])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    found = {
        m: torch.cat(
            [each.influence for each in inf.step_influence(model, examples, queries, steps="tokens", method=m)]
        )
        for m in ("jvp", "difference")
    }
    assert relative(found["difference"], found["jvp"]) <= 5e-3
    assert found["jvp"].dtype == torch.float32
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(p.requires_grad == ("lora_" in name) for name, p in model.named_parameters())
    alone = inf.step_influence(model, examples[2:3], queries, steps="tokens", method="jvp")[0]
    assert torch.equal(alone.influence, found["jvp"][-len(alone.steps) - 4 : -4])  # 4 learnt tokens in the last


def test_streamed_scores_are_the_sums(model: Any, directions: torch.Tensor) -> None:
    examples = make_examples()
    found = inf.step_influence(model, examples, directions, steps="tokens")
    sums = torch.stack([each.influence.sum(dim=0) for each in found])
    assert relative(sums, inf.stream_influence(model, examples, directions)) <= 1e-10


def adapted(kind: str) -> Any:
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2}
    base = Qwen2ForCausalLM(Qwen2Config(**sizes, num_attention_heads=4, num_key_value_heads=2, attention_bias=True))
    options: dict[str, Any] = {"dora": {"use_dora": True}, "embedding": {}}[kind]
    targets = ["q_proj", "down_proj", *(["embed_tokens"] if kind == "embedding" else [])]
    model = get_peft_model(base, LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM", **options))
    for name, p in model.named_parameters():
        if "lora_B" in name or "embedding" in name:
            torch.nn.init.normal_(p, std=0.1)
    return with_wide_norms(model.double())


@pytest.mark.parametrize("kind", ["dora", "embedding"])
def test_other_adapters_add_up_too(kind: str) -> None:
    model, examples = adapted(kind), make_examples()
    queries = inf.per_example_gradients(model, make_examples(seed=7)[:2])
    wanted = inf.per_example_gradients(model, examples) @ queries.T
    found = inf.step_influence(model, examples, queries, steps="tokens", method="jvp")
    assert relative(torch.stack([each.influence.sum(dim=0) for each in found]), wanted) <= 1e-9
    by_difference = inf.step_influence(model, examples, queries, steps="tokens", method="difference")
    assert relative(torch.stack([each.influence.sum(dim=0) for each in by_difference]), wanted) <= 1e-5
    by_default = inf.step_influence(model, examples, queries, steps="tokens")
    assert all(torch.equal(a.influence, b.influence) for a, b in zip(by_default, found, strict=True))
    with pytest.raises(ModelError, match="position"):
        inf.step_influence(model, examples, queries, steps="tokens", method="position")


def test_a_model_without_forward_mode_takes_differences(tiny_lora: Any, caplog: pytest.LogCaptureFixture) -> None:
    model, examples = make_model(tiny_lora), make_examples()
    queries = inf.per_example_gradients(model, make_examples(seed=7)[:1])

    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return 2 * x

        @staticmethod
        def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
            return 2 * g

    norm = model.get_base_model().model.norm
    norm.register_forward_hook(lambda _, __, y: Twice.apply(y) / 2)
    found = inf.step_influence(model, examples, queries, steps="tokens")
    assert "central differences" in caplog.text
    with frozen(model):
        assert not model.training
    wanted = inf.step_influence(model, examples, queries, steps="tokens", method="difference")
    assert torch.equal(found[0].influence, wanted[0].influence)


# ---- steps of a text -------------------------------------------------------------------------------------------------


def coded(tokenizer: Any, text: str) -> dict[str, Any]:
    prompt, ids = tokenizer.encode("Ada has 12 apples."), tokenizer.encode(text, add_special_tokens=False)
    return {"input_ids": torch.tensor(prompt + ids), "labels": torch.tensor([-100] * len(prompt) + ids)}


@pytest.mark.parametrize(
    ("kind", "text", "parts"),
    [
        ("lines", "1. 12+30=42\nThe answer is 42.\n#### 42", ["1. 12+30=42\n", "The answer is 42.\n", "#### 42"]),
        ("lines", "\n\n12\n\n\n 30 \n\n", ["\n\n12\n\n\n", " 30 \n\n"]),
        ("lines", "12", ["12"]),
        ("sentences", "It is 3.5. So 4! Right?\nYes", ["It is 3.5. ", "So 4! ", "Right?\n", "Yes"]),
        (thirds, "abcdefghi", ["abc", "def", "ghi"]),
    ],
)
def test_texts_are_split_without_a_gap(tiny_tokenizer: Any, kind: Any, text: str, parts: list[str]) -> None:
    tokenizer = tiny_tokenizer()
    example = coded(tokenizer, text)
    steps = split_steps(example, kind, tokenizer)
    learnt = [i for i, label in enumerate(example["labels"].tolist()) if label != -100]
    assert [t for step in steps for t in step.tokens] == learnt
    assert "".join(step.text for step in steps) == text
    if not callable(kind):
        assert [step.text for step in steps] == parts
        for step in steps:
            assert tokenizer.decode(example["input_ids"][list(step.tokens)]) == step.text


@pytest.mark.parametrize("text", ["naïve ∑ 🙂🙃 日本", "\\frac{1}{2} = 0.5\n\n🙂", "a", "🙂"])
def test_every_token_has_its_characters(tiny_tokenizer: Any, text: str) -> None:
    tokenizer = tiny_tokenizer()
    ids = tokenizer.encode(text, add_special_tokens=False)
    found = token_texts(ids, tokenizer)
    assert found.text == tokenizer.decode(ids)
    assert len(found.bounds) == len(ids)
    assert found.bounds[0][0] == 0
    assert found.bounds[-1][1] == len(found.text)
    assert all(a[1] == b[0] or a == b for a, b in zip(found.bounds, found.bounds[1:], strict=False))


def test_the_end_of_the_turn_belongs_to_the_last_line(
    tiny_tokenizer: Any, model: Any, directions: torch.Tensor
) -> None:
    tokenizer = tiny_tokenizer()
    example = coded(tokenizer, "12+30=42\nThe answer is 42.\n")
    end = torch.tensor([tokenizer.eos_token_id])
    example = {"id": "x", **{key: torch.cat([value, end]) for key, value in example.items()}}
    found = inf.step_influence(model, [example], directions, tokenizer=tokenizer)[0]
    assert len(found.steps) == 2
    assert found.steps[-1].tokens[-1] == len(example["input_ids"]) - 1
    wanted = inf.per_example_gradients(model, [example]) @ directions.T
    assert relative(found.influence.sum(dim=0)[None], wanted) <= 1e-10


def test_spans_of_tokens_are_taken_as_they_are(model: Any, directions: torch.Tensor, tiny_tokenizer: Any) -> None:
    examples = make_examples()
    spans = [[(4, 5), (7, 9)], [(0, 2)], [(0, 1), (9, 12), (12, 17)], [(1, 5)]]
    found = inf.step_influence(model, examples, directions, steps=spans)
    assert [[step.tokens for step in each.steps] for each in found] == [
        [(3, 4, 5, 6), (7, 8)],  # before the first: to it; between: to the one before
        [(1,)],
        [(5, 6, 7, 8), (9, 10, 11), (12, 13, 14, 15, 16)],
        [(1, 2, 3, 4)],
    ]
    wanted = inf.per_example_gradients(model, examples) @ directions.T
    assert relative(torch.stack([each.influence.sum(dim=0) for each in found]), wanted) <= 1e-10
    named = inf.step_influence(model, examples, directions, steps=spans, tokenizer=tiny_tokenizer())
    assert all(torch.equal(a.influence, b.influence) for a, b in zip(named, found, strict=True))
    ids = examples[0]["input_ids"][3:7]
    assert named[0].steps[0].text == tiny_tokenizer().decode(ids)
    for bad, said in (
        (spans[:2], "spans of 2 examples"),
        ([[(0, 4), (3, 9)], *spans[1:]], "the spans of e0 overlap"),
        ([*spans[:3], [(1, 6)]], "leave its 5 tokens"),
        ([[3], *spans[1:]], "no .start, end. places"),
    ):
        with pytest.raises(DataError, match=said):
            inf.step_influence(model, examples, directions, steps=bad)


def test_bad_arguments_are_named(model: Any, directions: torch.Tensor, tiny_tokenizer: Any) -> None:
    examples = make_examples()
    for error, said, changes in (
        (ConfigError, "method: unknown value 'jvps'; did you mean 'jvp'", {"method": "jvps"}),
        (ConfigError, "steps: unknown value 'line'; did you mean 'lines'", {"steps": "line"}),
        (ConfigError, "give the tokenizer", {"steps": "lines"}),
        (ConfigError, "loss_reduction: unknown value", {"loss_reduction": "max"}),
        (DataError, "overlap", {"steps": lambda text: [(0, 2), (1, 3)], "tokenizer": tiny_tokenizer()}),
    ):
        with pytest.raises(error) as raised:
            inf.step_influence(model, examples, directions, **{"steps": "tokens", **changes})
        assert said in str(raised.value)
    with pytest.raises(DataError, match="do not fit"):
        inf.step_influence(model, examples, directions[:, 1:], steps="tokens")
    with pytest.raises(NumericError, match="NaN"):
        inf.step_influence(model, examples, directions * np.nan, steps="tokens")
    assert inf.step_influence(model, [], directions, steps="tokens") == []


@pytest.mark.parametrize("method", ["jvp", "difference"])
def test_a_batch_gives_what_its_examples_give_alone(model: Any, directions: torch.Tensor, method: str) -> None:
    examples = make_examples(seed=3) + [e | {"id": f"{e['id']}-again"} for e in make_examples(seed=4)]
    together = inf.step_influence(model, examples, directions, steps="tokens", method=method)
    for example, found in zip(examples, together, strict=True):
        (alone,) = inf.step_influence(model, [example], directions, steps="tokens", method=method)
        assert found.id == alone.id == example["id"]
        assert found.token_losses.shape == example["input_ids"].shape
        assert torch.allclose(found.token_losses, alone.token_losses, atol=1e-12)
        assert relative(found.influence, alone.influence) < {"jvp": 1e-12, "difference": 1e-5}[method]


def test_examples_of_a_model_that_looks_ahead_come_alone(
    tiny_lora: Callable[..., Any], directions: torch.Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    model = make_model(tiny_lora)
    embeddings = model.get_input_embeddings()
    handle = embeddings.register_forward_hook(lambda _, __, y: y + y.mean(dim=1, keepdim=True))
    try:
        examples = make_examples(seed=3)
        found = inf.step_influence(model, examples, directions, steps="tokens", method="jvp")
        assert "steps are scored one example at a time" in caplog.text
        for example, one in zip(examples, found, strict=True):
            (alone,) = inf.step_influence(model, [example], directions, steps="tokens", method="jvp")
            assert torch.equal(one.influence, alone.influence)
    finally:
        handle.remove()
