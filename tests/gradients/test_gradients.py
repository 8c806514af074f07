"""Per-example gradients against torch.autograd, one example at a time, in float64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import influence_fast as inf
from influence_fast.data.packing import pack_examples
from influence_fast.errors import ConfigError, DataError, ModelError, NumericError, warn_once
from influence_fast.gradients.engine import GradientEngine
from influence_fast.gradients.model import loss
from influence_fast.gradients.model.backends import TORCH
from influence_fast.gradients.per_example import KeptEngine, iter_gradient_rows, per_example_losses
from influence_fast.gradients.rows.layout import LayoutEntry, in_top_layers
from influence_fast.gradients.rows.projection import Projection, random_matrix
from influence_fast.gradients.rows.row_spec import RowSpec
from influence_fast.gradients.step.input_groups import InputGroup
from influence_fast.gradients.targets import gradient_layout

VOCAB = 97
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
SHAPES = {
    "qwen2-tied": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=True)),
    "qwen3-untied": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=8, tie_word_embeddings=False)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, attention_bias=True)),
    "qwen2-window": lambda: Qwen2ForCausalLM(
        Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=5, max_window_layers=1)
    ),
}
LENGTHS = (7, 2, 13, 31, 5, 17)


def make_model(shape: str = "qwen2-tied", dtype: torch.dtype = torch.float64, **lora: Any) -> Any:
    torch.manual_seed(1)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "lora_dropout": 0.1} | lora
    model = get_peft_model(SHAPES[shape](), LoraConfig(**settings), autocast_adapter_dtype=False)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at the start, which would make every dA zero
            torch.nn.init.normal_(parameter, std=0.2)
    return model.to(dtype)


def make_examples(lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for i, n in enumerate(lengths):
        ids = torch.randint(0, VOCAB, (n,), generator=generator)
        labels = ids.clone()
        labels[: max(1, n // 3)] = -100
        examples.append({"id": f"ex-{i}", "input_ids": ids, "labels": labels})
    return examples


def by_autograd(model: Any, examples: list[dict[str, Any]], reduction: str = "mean") -> torch.Tensor:
    """[E, k] exact rows: one ordinary forward and backward an example, cross-entropy in the model's dtype."""
    model = copy.deepcopy(model).eval()
    factors = [p for name, p in model.named_parameters() if "lora_" in name]
    rows = []
    for example in examples:
        logits = model(input_ids=example["input_ids"][None]).logits[0, :-1]
        loss = F.cross_entropy(logits, example["labels"][1:], reduction=reduction)
        rows.append(torch.cat([grad.flatten() for grad in torch.autograd.grad(loss, factors)]))
    return torch.stack(rows)


def relative(ours: torch.Tensor, reference: torch.Tensor) -> float:
    """Largest relative norm of the error over rows."""
    ours, reference = ours.double(), reference.double()
    return float(((ours - reference).norm(dim=1) / reference.norm(dim=1)).max())


def projected_by_hand(rows: torch.Tensor, model: Any, projection: Projection) -> torch.Tensor:
    """Projects exact rows factor by factor, straight from the definition."""
    out = []
    for entry in gradient_layout(model):
        size = entry.shape[0] * entry.shape[1]
        grad = rows[:, entry.offset : entry.offset + size].view(-1, *entry.shape)
        key = entry.module.removeprefix("base_model.model.")
        if entry.factor == "lora_A":
            side = random_matrix(projection, f"{key}/in", entry.shape[1]).to(rows.dtype)
            grad = grad @ side
            if projection.kind == "kron":
                grad = random_matrix(projection, f"{key}/rank", entry.shape[0]).to(rows.dtype).T @ grad
        else:
            side = random_matrix(projection, f"{key}/out", entry.shape[0]).to(rows.dtype)
            grad = side.T @ grad
            if projection.kind == "kron":
                grad = grad @ random_matrix(projection, f"{key}/rank", entry.shape[1]).to(rows.dtype)
        out.append(grad.flatten(1))
    return torch.cat(out, dim=1)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("shape", SHAPES)
def test_exact_rows_are_autograds_in_float64(shape: str, reduction: str) -> None:
    model, examples = make_model(shape), make_examples()
    rows = inf.per_example_gradients(model, examples, loss_reduction=reduction)
    assert relative(rows, by_autograd(model, examples, reduction)) < 1e-10


@pytest.mark.parametrize("shape", ["qwen2-tied", "qwen3-untied", "llama"])
def test_fp32_rows_are_close_to_float64_ones(shape: str) -> None:
    model, examples = make_model(shape), make_examples()
    rows = inf.per_example_gradients(copy.deepcopy(model).float(), examples)
    assert rows.dtype == torch.float32
    assert relative(rows, by_autograd(model, examples)) < 1e-5


def test_bf16_rows_are_as_close_as_a_plain_bf16_backward() -> None:
    model, examples = make_model().bfloat16(), make_examples()
    truth = by_autograd(copy.deepcopy(model).double(), examples)
    rows = inf.per_example_gradients(model, examples)
    assert rows.dtype == torch.float32
    ours = (rows.double() - truth).norm()
    plain = (by_autograd(model, examples).double() - truth).norm()
    assert ours < 1.5 * plain < 0.15 * truth.norm()


@pytest.mark.parametrize("pattern", [{}, {"k_proj": 2}], ids=["one scaling", "two scalings"])
def test_outputs_and_input_gradients_of_a_group(pattern: dict[str, int]) -> None:
    """Where the factors are not folded into the weights, as in 16-bit models and on cards; with biases."""
    model = make_model("llama", rank_pattern=pattern).eval()
    engine = GradientEngine(model, Projection(dim=8))
    q, k, v = engine.linears[:3]
    group = InputGroup(
        [q, k, v], [0, 1, 2], engine.reducer, fused=False, backend=TORCH, products=[None] * 3, dtype=q.dtype
    )
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(9, q.d_in, dtype=torch.float64, generator=generator)
    outputs = list(group.outputs(x, [x @ member.a.T for member in group.members]))
    for member, found in zip(group.members, outputs, strict=True):
        torch.testing.assert_close(found, member.layer(x))
    grads = [torch.randn(9, member.d_out, dtype=torch.float64, generator=generator) for member in group.members]
    for present in ([0, 1, 2], [1], [0, 2], []):
        given = [grads[i] if i in present else None for i in range(3)]
        u = [None if g is None else g @ member.b for g, member in zip(given, group.members, strict=True)]
        found = group.input_gradient(given, u)
        if not present:
            assert found is None
            continue
        weights = [m.weight + m.scaling * m.b @ m.a for m in group.members]
        torch.testing.assert_close(found, sum(grads[i] @ weights[i] for i in present))


def test_a_kept_engine_serves_several_calls_and_closes_at_the_end() -> None:
    model, examples = make_model(), make_examples()
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    fresh = [rows for _, rows in iter_gradient_rows(model, examples)]
    with KeptEngine() as kept:
        assert "forward" not in vars(layer)  # opened by the first call
        for _ in range(2):
            again = [rows for _, rows in iter_gradient_rows(model, examples, engine=kept)]
            assert all(torch.equal(one, other) for one, other in zip(again, fresh, strict=True))
            assert "forward" in vars(layer)
        with pytest.raises(ValueError, match="one set of settings"):
            next(iter_gradient_rows(model, examples, RowSpec("none", dtype="fp32", loss_reduction="sum"), engine=kept))
        with pytest.raises(ValueError, match="one model"):
            next(iter_gradient_rows(make_model(), examples, engine=kept))
    assert "forward" not in vars(layer)


def test_layout_follows_named_parameters() -> None:
    model = make_model(target_modules=["q_proj", "down_proj"])
    layout = gradient_layout(model)
    parameters = dict(model.named_parameters())
    offset = 0
    for entry in layout:
        assert parameters[f"{entry.module}.{entry.factor}.default.weight"].shape == entry.shape
        assert entry.offset == offset
        offset += entry.shape[0] * entry.shape[1]
    assert inf.per_example_gradients(model, make_examples()[:1]).shape == (1, offset)


@pytest.mark.parametrize("kind", ["one_sided", "kron"])
@pytest.mark.parametrize("width", [None, 50])
def test_projected_is_the_projection_of_exact(kind: str, width: int | None) -> None:
    model, examples = make_model("qwen3-untied"), make_examples()
    projection = Projection(kind, dim=6, seed=3)
    expected = projected_by_hand(by_autograd(model, examples), model, projection)
    rows = inf.per_example_gradients(model, examples, projection=projection)
    assert relative(rows, expected) < 1e-10
    if width is not None:
        sketched = Projection(kind, dim=6, seed=3, width=width)
        rows = inf.per_example_gradients(model, examples, projection=sketched)
        assert relative(rows, sketch_by_hand(expected, model, sketched)) < 1e-10


def sketch_by_hand(rows: torch.Tensor, model: Any, projection: Projection) -> torch.Tensor:
    from influence_fast.philox import sjlt_map

    assert projection.width is not None
    out = torch.zeros(rows.shape[0], projection.width, dtype=rows.dtype)
    for entry in gradient_layout(model, projection):
        n = entry.shape[0] * entry.shape[1]
        key = entry.module.removeprefix("base_model.model.")
        bucket, sign = sjlt_map(projection.seed, f"{key}/row/{entry.factor}", n, projection.width)
        for i in range(n):
            out[:, bucket[i]] += rows[:, entry.offset + i] * sign[i]
    return out


def test_flat_sjlt_sketches_the_exact_row() -> None:
    model, examples = make_model(target_modules=["q_proj", "up_proj"]), make_examples()
    projection = Projection("sjlt", seed=5, width=64)
    rows = inf.per_example_gradients(model, examples, projection=projection)
    assert relative(rows, sketch_by_hand(by_autograd(model, examples), model, projection)) < 1e-10


def test_flat_rademacher_is_a_dense_sign_product() -> None:
    from influence_fast.philox import sign_matrix

    model, examples = make_model(target_modules=["k_proj", "gate_proj"]), make_examples()
    projection = Projection("rademacher", seed=5, width=40)
    exact = by_autograd(model, examples)
    expected = torch.zeros(len(examples), 40, dtype=torch.float64)
    for entry in gradient_layout(model):
        n = entry.shape[0] * entry.shape[1]
        key = entry.module.removeprefix("base_model.model.")
        signs = sign_matrix(5, f"{key}/row/{entry.factor}", n, 40, dtype=torch.float64)
        expected += exact[:, entry.offset : entry.offset + n] @ signs / 40**0.5
    rows = inf.per_example_gradients(model, examples, projection=projection)
    assert relative(rows, expected) < 1e-10


@pytest.mark.parametrize("kind", ["one_sided", "kron", "sjlt", "rademacher"])
def test_projected_inner_products_are_unbiased(kind: str) -> None:
    """Over 150 seeds the mean of <P g1, P g2> is within 4 standard errors of <g1, g2>."""
    model = make_model(target_modules=["q_proj"]).float()
    examples = make_examples((9, 12))
    exact = by_autograd(model.double(), examples)
    truth = float(exact[0] @ exact[1])
    model.float()
    estimates = []
    for seed in range(150):
        width = 32 if kind in ("sjlt", "rademacher") else None
        projection = Projection(kind, dim=8, seed=seed, width=width)
        rows = projected_by_hand(exact, model, projection) if width is None else None
        if rows is None:
            rows = inf.per_example_gradients(model, examples, projection=projection).double()
        estimates.append(float(rows[0] @ rows[1]))
    sample = torch.tensor(estimates, dtype=torch.float64)
    standard_error = float(sample.std() / len(estimates) ** 0.5)
    assert abs(float(sample.mean()) - truth) < 4 * standard_error
    assert standard_error > 0


@pytest.mark.parametrize("projection", [None, Projection(dim=8), Projection(dim=8, width=100)], ids=str)
@pytest.mark.parametrize("max_tokens", [1, 20, 33, 4096])
def test_a_row_does_not_depend_on_its_batch(projection: Projection | None, max_tokens: int) -> None:
    """Alone, packed with others and in another order: the same row, to fp32 rounding."""
    model, examples = make_model("qwen3-untied", torch.float32), make_examples()
    alone = torch.cat([inf.per_example_gradients(model, [e], projection=projection) for e in examples])
    packed = inf.per_example_gradients(model, examples, projection=projection, max_tokens=max_tokens)
    assert relative(packed, alone) < 1e-5
    order = [3, 0, 5, 1, 4, 2]
    shuffled = inf.per_example_gradients(
        model, [examples[i] for i in order], projection=projection, max_tokens=max_tokens
    )
    assert relative(shuffled, alone[order]) < 1e-5


def test_a_neighbour_changes_nothing_even_when_it_is_huge() -> None:
    """Examples in one pack do not see each other: poisoning one leaves the others as they were."""
    model, examples = make_model(), make_examples()
    before = inf.per_example_gradients(model, examples)
    changed = [dict(e) for e in examples]
    changed[3] = make_examples((31,), seed=99)[0]
    after = inf.per_example_gradients(model, changed)
    kept = [0, 1, 2, 4, 5]
    assert relative(after[kept], before[kept]) < 1e-12
    assert relative(after[[3]], before[[3]]) > 0.1


def test_length_one_completion() -> None:
    model = make_model()
    example = {"input_ids": torch.tensor([5, 9, 2]), "labels": torch.tensor([-100, -100, 2])}
    rows = inf.per_example_gradients(model, [example, *make_examples()])
    assert relative(rows[:1], by_autograd(model, [example])) < 1e-10


def test_gradient_checkpointing_gives_the_same_rows() -> None:
    model, examples = make_model(lora_dropout=0.0), make_examples()
    expected = inf.per_example_gradients(model, examples, projection=Projection(dim=8))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    layer = model.get_base_model().model.layers[0]
    calls = []
    with GradientEngine(model, Projection(dim=8)) as engine:
        handle = layer.self_attn.register_forward_pre_hook(lambda *_: calls.append(1))
        (pack,) = pack_examples(examples, 10_000)
        rows = engine.run(pack)[0]
        handle.remove()
    assert relative(rows, expected[pack.indices]) < 1e-12
    assert len(calls) == 2  # the forward, and the recomputation


def test_model_is_left_as_it_was() -> None:
    model, examples = make_model(), make_examples()
    model.train()
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    before = {name: p.clone() for name, p in model.named_parameters()}
    implementation = model.get_base_model().config._attn_implementation
    for projection in (None, Projection(dim=4)):
        inf.per_example_gradients(model, examples, projection=projection)
    assert model.training
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert all(p.grad is None and torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert model.get_base_model().config._attn_implementation == implementation
    assert not any("forward" in vars(module) for module in model.modules())
    model.eval()
    ids = examples[3]["input_ids"][None]
    with torch.no_grad():
        assert torch.isfinite(model(input_ids=ids).logits).all()


def test_rank_pattern_and_rslora() -> None:
    model = make_model(rank_pattern={"q_proj": 2, "down_proj": 7}, use_rslora=True)
    examples = make_examples()
    exact = by_autograd(model, examples)
    assert relative(inf.per_example_gradients(model, examples), exact) < 1e-10
    projection = Projection(dim=5)
    rows = inf.per_example_gradients(model, examples, projection=projection)
    assert relative(rows, projected_by_hand(exact, model, projection)) < 1e-10


def test_lora_on_the_head_takes_the_whole_models_logits() -> None:
    model = make_model("qwen3-untied", target_modules=["q_proj", "lm_head"])
    examples = make_examples()
    rows = inf.per_example_gradients(model, examples)
    assert relative(rows, by_autograd(model, examples)) < 1e-10


def test_adapter_read_from_disk_gives_the_same_rows(tmp_path: Any) -> None:
    from peft import PeftModel

    model, examples = make_model(dtype=torch.float32), make_examples()
    model.save_pretrained(tmp_path)
    torch.manual_seed(1)
    base = SHAPES["qwen2-tied"]()
    base.load_state_dict(
        {k.replace(".base_layer", ""): v for k, v in model.get_base_model().state_dict().items() if "lora_" not in k}
    )
    loaded = PeftModel.from_pretrained(base, tmp_path)
    assert relative(inf.per_example_gradients(loaded, examples), inf.per_example_gradients(model, examples)) < 1e-6


def test_losses_are_the_models_own() -> None:
    model, examples = make_model(dtype=torch.float32), make_examples()
    model.eval()
    expected = torch.tensor(
        [float(model(input_ids=e["input_ids"][None], labels=e["labels"][None]).loss.detach()) for e in examples]
    )
    torch.testing.assert_close(per_example_losses(model, examples), expected, rtol=1e-5, atol=0)


def test_rows_come_once_each_with_their_indices() -> None:
    model, examples = make_model(dtype=torch.float32), make_examples()
    whole = inf.per_example_gradients(model, examples)
    seen = []
    for indices, rows in iter_gradient_rows(model, examples, RowSpec("none", dtype="fp32", max_tokens=33)):
        assert relative(rows, whole[indices]) < 1e-5
        seen += indices
    assert sorted(seen) == list(range(len(examples)))


def test_packs_hold_every_example_once_within_the_budget() -> None:
    examples = make_examples(tuple(range(2, 40)))
    packs = pack_examples(examples, 64)
    assert sorted(i for pack in packs for i in pack.indices) == list(range(38))
    assert all(len(pack.input_ids) <= 64 for pack in packs)
    for pack in packs:
        for i, start in zip(pack.indices, pack.cu_seqlens[:-1], strict=True):
            n = len(examples[i]["input_ids"])
            assert torch.equal(pack.input_ids[start : start + n], examples[i]["input_ids"])
            assert torch.equal(pack.targets[start : start + n - 1], examples[i]["labels"][1:])
            assert pack.targets[start + n - 1] == -100


def test_ignored_labels_are_an_error_that_names_the_id() -> None:
    examples = make_examples()
    examples[2]["labels"] = torch.full_like(examples[2]["labels"], -100)
    # labels[0] has nothing before it to predict it
    examples[4]["labels"] = torch.tensor([3, -100, -100, -100, -100])
    with pytest.raises(DataError, match="ex-2, ex-4"):
        inf.per_example_gradients(make_model(), examples)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.tensor([1, 2])}, "ex-1: input_ids and labels"),
        ({"input_ids": torch.tensor([1, VOCAB])}, "ex-1: token id outside"),
        ({"input_ids": torch.tensor([1, 2]), "labels": torch.tensor([-100, VOCAB])}, f"ex-1: label {VOCAB} is neither"),
        ({"input_ids": torch.tensor([1, 2]), "labels": torch.tensor([-7, 2])}, "ex-1: label -7 is neither"),
    ],
)
def test_malformed_examples_are_named(change: dict[str, Any], message: str) -> None:
    examples = make_examples()
    examples[1] = {"id": "ex-1", "input_ids": torch.tensor([1, 2, 3]), "labels": torch.tensor([-100, 2, 3])}
    if "input_ids" in change:
        examples[1]["labels"] = torch.tensor([-100, 5])
    examples[1] |= change
    with pytest.raises(DataError, match=message):
        inf.per_example_gradients(make_model(), examples)


def test_nan_weights_are_an_error_that_names_the_examples() -> None:
    model = make_model()
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "lora_B" in name)[0, 0] = float("nan")
    with pytest.raises(NumericError, match="ex-0, ex-1"):
        inf.per_example_gradients(model, make_examples())


def test_models_that_cannot_be_differentiated_are_refused_by_name() -> None:
    with pytest.raises(ModelError, match="no LoRA adapter"):
        inf.per_example_gradients(SHAPES["qwen2-tied"](), make_examples())
    merged = make_model()
    merged.merge_adapter()
    with pytest.raises(ModelError, match="merged"):
        inf.per_example_gradients(merged, make_examples())
    model = make_model()
    for ask in (inf.per_example_gradients, per_example_losses):
        with model.disable_adapter(), pytest.raises(ModelError, match=r"the adapter is disabled; leave"):
            ask(model, make_examples())


def test_layers_of_another_adapter_are_no_part_of_a_row() -> None:
    targets = {"default": ["q_proj", "v_proj"], "b": ["k_proj", "v_proj"]}
    model = make_model(target_modules=targets["default"])
    model.add_adapter("b", LoraConfig(r=3, target_modules=targets["b"], init_lora_weights=False))
    model = model.double()
    for name, other in (("b", "default"), ("default", "b")):
        model.set_adapter(name)
        found = {entry.module.rpartition(".")[2] for entry in gradient_layout(model)}
        assert found == set(targets[name])
        alone = copy.deepcopy(model)
        alone.delete_adapter(other)
        alone.set_adapter(name)
        reference = by_autograd(alone, make_examples())
        assert relative(inf.per_example_gradients(model, make_examples()), reference) < 1e-10


def test_an_active_adapter_that_no_layer_has_is_named() -> None:
    model = make_model()
    for module in model.modules():
        if hasattr(module, "lora_A"):
            module._active_adapter = ["other"]
    with pytest.raises(ModelError, match=r"no layer has the active adapter other; they have default: call set_adapter"):
        gradient_layout(model)


def test_top_layers_are_a_part_of_the_whole_row() -> None:
    model, examples = make_model(), make_examples()
    whole, part = Projection(dim=4), Projection(dim=4, layers=0.5)
    rows = inf.per_example_gradients(model, examples, projection=whole)
    upper = inf.per_example_gradients(model, examples, projection=part)
    names = {entry.module for entry in gradient_layout(model, part)}
    assert names
    assert all(".layers.1." in name for name in names)
    columns = [
        torch.arange(entry.offset, entry.offset + entry.shape[0] * entry.shape[1])
        for entry in gradient_layout(model, whole)
        if entry.module in names
    ]
    torch.testing.assert_close(upper, rows[:, torch.cat(columns)], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("share", "count", "kept"),
    [(0.28, 25, 7), (0.07, 100, 7), (0.55, 100, 55), (0.5, 25, 13), (0.01, 25, 1), (0.3, 10, 3)],
)
def test_a_share_of_layers_is_rounded_up_from_what_was_meant(share: float, count: int, kept: int) -> None:
    entries = [LayoutEntry(f"model.layers.{n}.self_attn.q_proj", "lora_A", (1, 1), n) for n in range(count)]
    assert in_top_layers(entries, Projection(dim=4, layers=share)) == entries[count - kept :]


def test_the_backward_ends_at_the_lowest_layer_in_the_row() -> None:
    model = make_model()
    layers = model.get_base_model().model.layers
    seen = []
    with GradientEngine(model, Projection(dim=4, layers=0.5)) as engine:
        handles = [layer.register_full_backward_hook(lambda *_, n=n: seen.append(n)) for n, layer in enumerate(layers)]
        for pack in pack_examples(make_examples(), 10_000):
            engine.run(pack)
        for handle in handles:
            handle.remove()
    assert seen
    assert set(seen) == {1}


@pytest.mark.parametrize("at_once", [1, 3, 7, 100])
@pytest.mark.parametrize("biased", [True, False])
def test_the_loss_in_chunks_is_that_of_autograd(monkeypatch: pytest.MonkeyPatch, at_once: int, biased: bool) -> None:
    monkeypatch.setattr(loss, "tokens_at_once", lambda vocabulary, device: at_once)
    generator = torch.Generator().manual_seed(0)
    options = {"dtype": torch.float64, "generator": generator}
    hidden = torch.randn(7, 5, **options).requires_grad_()
    weight, bias = torch.randn(11, 5, **options), torch.randn(11, **options) if biased else None
    targets, weights = torch.randint(0, 11, (7,), generator=generator), torch.rand(7, **options)
    found, token_losses = loss.CompletionLoss.apply(hidden, weight, bias, targets, weights, loss.by_pytorch)
    expected = F.cross_entropy(F.linear(hidden, weight, bias), targets, reduction="none")
    torch.testing.assert_close(token_losses, expected)
    (gradient,) = torch.autograd.grad(2 * found, hidden)
    (wanted,) = torch.autograd.grad(2 * (expected * weights).sum(), hidden)
    torch.testing.assert_close(gradient, wanted)


@pytest.mark.parametrize(
    ("vocabulary", "kind", "tokens"), [(4096, "cpu", 1024), (151_936, "cpu", 256), (9, "meta", 1024)]
)
def test_a_large_vocabulary_still_has_many_tokens_in_a_chunk(vocabulary: int, kind: str, tokens: int) -> None:
    assert loss.tokens_at_once(vocabulary, torch.device(kind)) == tokens


@pytest.mark.parametrize("more", [{"modules_to_save": ["lm_head"]}, {"bias": "lora_only"}], ids=str)
def test_what_an_adapter_trains_beside_its_factors_is_named(
    tiny_model: Any, caplog: pytest.LogCaptureFixture, more: dict[str, Any]
) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_model("llama"), LoraConfig(r=2, target_modules=["q_proj"], **more))
    warn_once.cache_clear()
    gradient_layout(model)
    gradient_layout(model)
    (record,) = caplog.records
    assert "trains more than LoRA factors" in record.getMessage()
    assert ("lm_head" if "modules_to_save" in more else "bias='lora_only'") in record.getMessage()
    caplog.clear()
    warn_once.cache_clear()
    gradient_layout(get_peft_model(tiny_model("llama"), LoraConfig(r=2, target_modules=["q_proj"])))
    assert not caplog.records


def test_lora_that_was_injected_without_peft_models_is_found(tiny_model: Any) -> None:
    from peft import LoraConfig, get_peft_model, inject_adapter_in_model

    injected = inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj"]), tiny_model("llama"))
    wrapped = get_peft_model(tiny_model("llama"), LoraConfig(r=2, target_modules=["q_proj"]))
    assert len(gradient_layout(injected)) == len(gradient_layout(wrapped)) == 4
    assert len(gradient_layout(wrapped.get_base_model())) == 4


def test_what_is_no_tokens_is_named(tiny_lora: Any) -> None:
    model, ids = tiny_lora(), [1, 2, 3]
    with pytest.raises(DataError, match="input_ids is no list of whole numbers; give a 1-D int tensor"):
        inf.per_example_gradients(model, [{"input_ids": "text", "labels": ids}])
    with pytest.raises(DataError, match=r"examples\[0\] is a Example, not tokens: give inf.tokenize"):
        inf.per_example_gradients(model, [inf.Example("a", "b", "c")])
    tokens = {"input_ids": torch.tensor(ids), "labels": torch.tensor(ids)}
    with pytest.raises(ConfigError, match="max_tokens is 0"):
        inf.per_example_gradients(model, [tokens], max_tokens=0)
    with pytest.raises(ConfigError, match="loss_reduction must be"):
        inf.per_example_gradients(model, [tokens], loss_reduction="median")
