"""Stream mode against inner products of exact gradients in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

import influence_fast as inf
from influence_fast.errors import DataError, NumericError
from influence_fast.gradients import streaming
from influence_fast.gradients.rows.row_spec import RowSpec
from influence_fast.gradients.streaming import StreamReducer, stream_influence
from influence_fast.gradients.targets import gradient_layout

LENGTHS = (7, 2, 13, 31, 5, 17)
FEW, MANY = 2, 9  # queries that ride along as columns, and queries that do not


def make_examples(lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for i, n in enumerate(lengths):
        ids = torch.randint(0, 320, (n,), generator=generator)
        labels = ids.clone()
        labels[: max(1, n // 3)] = -100
        examples.append({"id": f"ex-{i}", "input_ids": ids, "labels": labels})
    return examples


def make_queries(model: Any, count: int, **options: Any) -> torch.Tensor:
    """[count, k] gradients of other examples, each block at a scale of its own, as an H^-1 would leave them."""
    lengths = tuple(3 + 5 * i % 19 for i in range(count))
    rows = inf.per_example_gradients(copy.deepcopy(model).double(), make_examples(lengths, seed=1), **options)
    generator = torch.Generator().manual_seed(2)
    for entry in gradient_layout(model):
        rows[:, entry.offset : entry.offset + entry.shape[0] * entry.shape[1]] *= torch.rand(1, generator=generator) + 1
    return rows


def truth(model: Any, queries: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
    exact = inf.per_example_gradients(copy.deepcopy(model).double(), make_examples(), loss_reduction=reduction)
    return exact @ queries.double().T


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.fixture
def model(tiny_lora: Any) -> Any:
    return tiny_lora("qwen2", torch.float64)


@pytest.mark.parametrize("count", [1, FEW, MANY])
@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "llama"])
def test_scores_are_inner_products_of_exact_gradients(tiny_lora: Any, kind: str, count: int) -> None:
    model = tiny_lora(kind, torch.float64)
    queries = make_queries(model, count)
    expected = truth(model, queries)
    scores = stream_influence(model, make_examples(), queries)
    assert scores.dtype == torch.float64
    assert relative(scores, expected) < 1e-10
    single = stream_influence(model.float(), make_examples(), queries)
    assert single.dtype == torch.float32
    assert relative(single, expected) < 1e-5


def test_both_ways_of_multiplying_are_taken(model: Any) -> None:
    """Few queries need no x in the backward, many do: what the parameters above stand for."""
    from influence_fast.gradients.find_lora import find_lora_linears
    from influence_fast.gradients.rows.layout import layout_of

    linears = find_lora_linears(model)
    for count, way in ((FEW, "ride"), (MANY, "form")):
        reducer = StreamReducer(linears, layout_of(linears), make_queries(model, count))
        reducer.begin([0, 3])
        assert reducer.way == way
        assert reducer.needs_input is (way == "form")


@pytest.mark.parametrize("count", [FEW, MANY])
def test_summed_losses_and_small_packs(model: Any, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    queries = make_queries(model, count)
    expected = truth(model, queries, "sum")
    for max_tokens, chunk in ((1, 1 << 24), (33, 1), (None, 400)):
        monkeypatch.setattr(streaming, "_CHUNK", chunk)  # examples one by one, and a few at a time
        scores = stream_influence(
            model, make_examples(), queries, RowSpec("none", loss_reduction="sum", max_tokens=max_tokens)
        )
        assert relative(scores, expected) < 1e-10


@pytest.mark.parametrize("count", [FEW, MANY])
def test_ranks_that_differ_and_rank_stabilised_scaling(tiny_model: Any, count: int) -> None:
    from peft import LoraConfig, get_peft_model

    pattern = {"q_proj": 2, "down_proj": 7}
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", rank_pattern=pattern, use_rslora=True)
    model = get_peft_model(tiny_model("qwen2", torch.float64), config, autocast_adapter_dtype=False)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    queries = make_queries(model, count)
    assert relative(stream_influence(model, make_examples(), queries), truth(model, queries)) < 1e-10


@pytest.mark.parametrize("count", [FEW, MANY])
def test_gradient_checkpointing_changes_nothing(model: Any, count: int) -> None:
    queries = make_queries(model, count)
    expected = truth(model, queries)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    assert relative(stream_influence(model, make_examples(), queries), expected) < 1e-10
    assert model.training


def test_a_bf16_model_is_as_close_as_its_own_gradients(tiny_lora: Any) -> None:
    model = tiny_lora("qwen2", torch.bfloat16)
    queries = make_queries(model, FEW)
    expected = truth(model, queries)
    scores = stream_influence(model, make_examples(), queries)
    assert scores.dtype == torch.float32  # and the queries do not ride: their columns would be rounded to bf16
    rows = inf.per_example_gradients(model, make_examples())
    assert relative(scores, rows.double() @ queries.T) < 1e-4
    assert relative(scores, expected) < 0.2


def test_an_example_scores_the_same_whatever_it_is_packed_with(model: Any) -> None:
    queries = make_queries(model, FEW).float()
    model = model.float()
    examples = make_examples()
    packed = stream_influence(model, examples, queries)
    backwards = stream_influence(model, examples[::-1], queries).flip(0)
    alone = torch.cat([stream_influence(model, [example], queries) for example in examples])
    assert relative(backwards, packed) < 1e-5
    assert relative(alone, packed) < 1e-5


def test_a_preconditioner_folds_into_the_queries(model: Any) -> None:
    """Stream mode with H^-1 on the query side equals the stored rows' own scores."""
    from influence_fast.influence import preconditioners
    from influence_fast.influence.row_access import module_blocks

    rows = inf.per_example_gradients(model, make_examples())
    fitted = preconditioners.fit("fisher", lambda: [rows], module_blocks(gradient_layout(model)))
    queries = fitted.apply(make_queries(model, FEW))
    assert relative(stream_influence(model, make_examples(), queries), rows @ queries.T) < 1e-10


def test_mistakes_are_named(model: Any) -> None:
    queries = make_queries(model, FEW)
    for wrong in (queries[:, :-1], queries[0], queries[:0]):
        with pytest.raises(DataError, match=rf"exact rows \(q, {queries.shape[1]}\).*projection=None"):
            stream_influence(model, make_examples(), wrong)
    broken = queries.clone()
    broken[1, 5] = float("nan")
    with pytest.raises(NumericError, match="row 1"):
        stream_influence(model, make_examples(), broken)
    masked = make_examples()
    masked[3]["labels"] = torch.full_like(masked[3]["labels"], -100)
    with pytest.raises(DataError, match="ex-3"):
        stream_influence(model, masked, queries)


def test_a_nan_is_pinned_on_its_own_example(model: Any) -> None:
    queries = make_queries(model, FEW)
    examples = make_examples()
    poison = int(examples[3]["input_ids"][0])
    spared = [i for i, e in enumerate(examples) if poison not in e["input_ids"] and i != 3]
    with torch.no_grad():
        model.get_input_embeddings().weight[poison] = float("nan")
    untied = copy.deepcopy(model)
    base = untied.get_base_model()
    base.lm_head.weight = torch.nn.Parameter(model.get_input_embeddings().weight.detach().nan_to_num())
    with pytest.raises(NumericError, match="ex-3") as caught:
        stream_influence(untied, examples, queries)
    assert not any(f"ex-{i}" in str(caught.value) for i in spared)


def test_the_kernel_agrees_with_float64(interpreted: Callable[[str], Any]) -> None:
    errors = interpreted("interpreted_stream.py")
    assert len(errors) == 6
    for case, found in errors.items():
        if case.startswith("float32"):
            assert found["triton"] < 1e-5, case
        else:  # a tiny model's own bf16 noise, whatever computes it
            assert found["triton"] < 1.1 * found["torch"] < 0.3, (case, found)
