"""The model's own plain forward is the reference: what agrees with it is exact, and all else is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import influence_fast as inf
from benches.model_zoo import by_autograd, examples_for, rows_against_autograd, tiny, tiny_config, with_adapter
from influence_fast.errors import ModelError
from influence_fast.gradients.engine import GradientEngine
from influence_fast.gradients.model.layer_outputs import CoarsestRounding
from influence_fast.gradients.model.packed_attention import implementations
from influence_fast.gradients.model.probe_texts import limits
from influence_fast.gradients.model.referee import Referee
from influence_fast.gradients.per_example import iter_gradient_rows, per_example_losses
from influence_fast.gradients.targets import gradient_layout

# Model type -> targets, and how it is called: in packs, alone, or with its own attention.
EXACT = {
    "llama": ("all-linear", "packs"),
    "bart": ("all-linear", "alone"),
    "qwen3": ("all-linear", "packs"),
    "gemma": ("all-linear", "packs"),
    "gemma2": ("all-linear", "own"),
    "gemma3_text": ("all-linear", "packs"),
    "mistral": ("all-linear", "packs"),
    "phi3": ("all-linear", "packs"),
    "gpt2": ("all-linear", "packs"),
    "gpt_neo": ("all-linear", "alone"),
    "gpt_oss": ("attention", "own"),
    "granite": ("all-linear", "packs"),
    "olmo2": ("all-linear", "packs"),
    "cohere": ("all-linear", "packs"),
    "cohere2": ("all-linear", "packs"),
    "zaya": ("all-linear", "alone"),
    "llama4_text": ("attention", "own"),
    "doge": ("all-linear", "own"),
    "qwen2_moe": ("attention", "own"),
    "bloom": ("all-linear", "alone"),
    "mpt": ("all-linear", "alone"),
    "falcon": ("all-linear", "alone"),
    "opt": ("all-linear", "packs"),
    "roberta": ("all-linear", "own"),
    "xlm-roberta": ("all-linear", "own"),
    "recurrent_gemma": ("all-linear", "alone"),
    "gemma4": ("attention", "packs"),
    "musicgen": ("attention", "alone"),
    "modernbert-decoder": ("all-linear", "packs"),
    "roc_bert": ("all-linear", "packs"),
}


@pytest.mark.parametrize("kind", EXACT)
def test_rows_of_a_model_type_are_autograds(kind: str) -> None:
    targets, mode = EXACT[kind]
    outcome = rows_against_autograd(kind, targets)
    assert (outcome.verdict, outcome.message) == ("exact", "")
    assert ("own" if outcome.own_attention else "packs" if outcome.packs else "alone") == mode


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gemma3_text", "roberta", "qwen2_moe"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_does_not_change_how_a_model_is_called(kind: str, dtype: torch.dtype) -> None:
    with GradientEngine(with_adapter(tiny(kind, dtype), EXACT[kind][0]), None) as engine:
        mode = "own" if engine.own_attention else "packs" if engine.packs_are_separate else "alone"
    assert mode == EXACT[kind][1]


def test_padding_tokens_inside_a_text_keep_their_positions() -> None:
    model = with_adapter(tiny("roberta"))
    ids = torch.tensor([5, 1, 9, 1, 1, 30, 7])
    examples = [{"input_ids": ids, "labels": ids}]
    assert model.config.pad_token_id == 1
    wanted = by_autograd(model, examples)
    assert (inf.per_example_gradients(model, examples) - wanted).norm() < 1e-8 * wanted.norm()


def test_a_model_that_agrees_in_no_way_is_refused_by_its_layer() -> None:
    model = with_adapter(tiny("llama"))
    decoder = model.get_base_model().model
    asked: list[bool] = []

    def note(_: Any, __: Any, kwargs: dict[str, Any]) -> None:
        asked.append(kwargs.get("use_cache") is False)

    decoder.register_forward_pre_hook(note, with_kwargs=True)
    decoder.layers[2].mlp.register_forward_hook(lambda _, __, output: output * 2 if asked[-1] else output)
    with pytest.raises(ModelError, match=r"llama: .*differ from the model's own by .*first after layers\.2"):
        inf.per_example_gradients(model, examples_for(model))


def test_the_first_pack_is_compared_and_its_examples_are_named() -> None:
    """A pack longer than those that an engine tries on opening, and wrong only then."""
    model = with_adapter(tiny("llama"))
    mlp = model.get_base_model().model.layers[1].mlp
    mlp.register_forward_hook(lambda _, __, output: output * 2 if output.shape[1] > 60 else output)
    examples = [{"id": f"ex-{n}", **example} for n, example in enumerate(examples_for(model, (20, 19, 18, 17, 16)))]
    message = r"not those of the model's own forward for ex-0 \(loss [\d.]+, plain [\d.]+\), ex-1 .*max_tokens=1"
    for ask in (inf.per_example_gradients, lambda *args: list(iter_gradient_rows(*args)), per_example_losses):
        with pytest.raises(ModelError, match=message):
            ask(model, examples)
    queries = torch.ones(1, sum(e.shape[0] * e.shape[1] for e in gradient_layout(model)), dtype=torch.float64)
    with pytest.raises(ModelError, match=message):
        inf.stream_influence(model, examples, queries)
    rows = inf.per_example_gradients(model, examples, max_tokens=1)
    assert (rows - by_autograd(model, examples)).norm() < 1e-8 * rows.norm()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_of_a_long_example_the_beginning_is_compared(monkeypatch: pytest.MonkeyPatch, reduction: str) -> None:
    monkeypatch.setattr("influence_fast.gradients.comparison.COMPARED_TOKENS", 30)
    model = with_adapter(tiny("llama"))
    mlp = model.get_base_model().model.layers[1].mlp
    examples = examples_for(model, (50, 40))
    examples[0]["labels"][:45] = -100  # none of those that are compared
    assert len(inf.per_example_gradients(model, examples, loss_reduction=reduction)) == 2
    mlp.register_forward_hook(lambda _, args, output: output * 2 if args[0].shape[1] == 30 and mlp.marked else output)
    mlp.marked = False
    with GradientEngine(model, None, reduction) as engine:
        mlp.marked = True  # from now on, and so in plain forwards alone of the two if the engine ran another length
        asked: list[int] = []
        handle = mlp.register_forward_pre_hook(lambda _, args: asked.append(args[0].shape[1]))
        from influence_fast.gradients.per_example import compare_once, packs_for

        pack = packs_for(engine, examples, None)[0]
        compare_once(engine, pack, engine.losses(pack), examples)
        compare_once(engine, pack, engine.losses(pack) + 1, examples)  # once an engine
        handle.remove()
    assert asked == [90, 30, 30, 90]


def test_a_window_that_no_text_can_try_must_be_handed_to_our_attention() -> None:
    from transformers import AutoModelForCausalLM

    for kind, handed in (("mistral", True), ("qwen2_moe", False)):
        config = tiny_config(kind)
        config.sliding_window, config.max_position_embeddings = 600, 2048
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with GradientEngine(with_adapter(model, "attention"), None) as engine:
            assert engine.own_attention == (not handed)
            assert engine.packs_are_separate == handed
            assert max(len(text.ids) for text in engine.referee.texts) == 512


def test_limits_are_windows_and_chunks_and_no_counts_of_layers() -> None:
    assert limits(tiny_config("gemma3_text")) == [8]
    assert limits(tiny_config("llama4_text")) == [8]
    assert limits(tiny_config("gpt_neo")) == [8]
    assert limits(tiny_config("deepseek_v32")) == [4]  # an indexer's top-k
    assert limits(tiny_config("llama")) == limits(tiny_config("bert")) == []


def test_texts_have_no_special_tokens_and_are_longer_than_windows() -> None:
    base = tiny("mistral")
    base.config.image_token_id = 77
    referee = Referee(base, base.model, torch.device("cpu"))
    lengths = [len(text.ids) for text in referee.texts]
    assert sorted(lengths)[:2] == [1, 2]
    assert max(lengths) > 2 * 8
    assert not {0, 1, 2, 77} & {int(i) for text in referee.texts for i in text.ids}


def test_the_model_is_as_it_was_given_while_plain_forwards_run() -> None:
    model = with_adapter(tiny("llama"))
    base = model.get_base_model()
    layer = base.model.layers[0].self_attn.q_proj
    before = base.config._attn_implementation
    with GradientEngine(model, None) as engine:
        assert "forward" in vars(layer)
        with engine.as_given():
            assert not any("forward" in vars(module) for module in base.modules())
            assert base.config._attn_implementation == before
        assert "forward" in vars(layer)
        assert base.config._attn_implementation != before
    assert "forward" not in vars(layer)


class _Product(torch.nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x @ self.weight.T
        return y if self.bias is None else y + self.bias


class _MoreThanAProduct(torch.nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 1.1


class _Router(torch.nn.Linear):
    def forward(self, x: torch.Tensor) -> Any:
        y = super().forward(x)
        return y, y.softmax(-1)


@pytest.mark.parametrize("kind", [_MoreThanAProduct, _Router])
def test_a_linear_that_is_no_product_is_refused_with_targets_that_work(kind: type[torch.nn.Linear]) -> None:
    base = tiny("llama")
    for layer in base.model.layers:
        layer.self_attn.q_proj.__class__ = kind
    model = with_adapter(base, ["q_proj", "v_proj"])
    with pytest.raises(
        ModelError, match=rf"q_proj: LoRA over {kind.__name__} is not supp.*target_modules=\['v_proj'\]"
    ):
        inf.per_example_gradients(model, examples_for(model))


def test_a_linear_by_another_name_is_taken_if_it_is_a_product() -> None:
    base = tiny("llama")
    for layer in base.model.layers:
        layer.self_attn.q_proj.__class__ = _Product
    model = with_adapter(base, ["q_proj", "v_proj"])
    examples = examples_for(model)
    wanted = by_autograd(model, examples)
    assert (inf.per_example_gradients(model, examples) - wanted).norm() < 1e-8 * wanted.norm()


def test_every_part_of_a_model_gets_its_own_attention_back() -> None:
    """gemma4's audio part runs in nothing but eager attention, and refuses that of its text."""
    model = with_adapter(tiny("gemma4"), "attention")
    base = model.get_base_model()
    before = [name for _, name in implementations(base)]
    assert {"sdpa", "eager"} <= set(before)
    with GradientEngine(model, None) as engine:
        assert before != [name for _, name in implementations(base)]
        with engine.as_given():
            assert before == [name for _, name in implementations(base)]
    assert before == [name for _, name in implementations(base)]


class _NormIn32(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x.float() / x.float().norm()).to(x.dtype)


@pytest.mark.parametrize("module", [torch.nn.LayerNorm(4, dtype=torch.float64), _NormIn32()])
def test_rounding_inside_a_float64_model_is_seen(module: torch.nn.Module) -> None:
    with CoarsestRounding() as coarsest:
        module(torch.randn(3, 4, dtype=torch.float64))
    inside = torch.float32 if isinstance(module, _NormIn32) else torch.float64
    assert coarsest.unit == torch.finfo(inside).eps


def test_errors_of_rounding_inside_a_float64_model_are_no_refusal() -> None:
    """llama's norms are of float32, gpt2's of the model's own dtype."""
    for kind, rounds in (("llama", True), ("gpt2", False)):
        base = tiny(kind)
        referee = Referee(base, base.get_decoder(), torch.device("cpu"))
        assert referee.accepts([1e-7]) == rounds
        assert not referee.accepts([1e-4])
