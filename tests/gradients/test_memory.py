"""The memory sum against the bytes of the tensors that are alive in the real engine, operation by operation."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import influence_fast as inf
from influence_fast.data.packing import pack_examples
from influence_fast.errors import ConfigError
from influence_fast.gradients.engine import GradientEngine
from influence_fast.gradients.find_lora import find_lora_linears
from influence_fast.gradients.model import packed_attention as attention
from influence_fast.gradients.model.fp8 import weights_of
from influence_fast.gradients.rows.projection import Projection
from influence_fast.gradients.step.memory import BaseWeights, GradientMemory, PackSize, gradient_memory, layer_bytes
from influence_fast.kernels import runtime

# The sum leaves out ids, positions and losses: some tens of bytes a token of some thousands.
TOLERANCE = 0.01
BASE = {"hidden_size": 128, "intermediate_size": 640, "num_attention_heads": 4, "num_key_value_heads": 2}
WIDE_HEAD = {"vocab_size": 2000, "hidden_size": 64, "intermediate_size": 64, "head_dim": 16}


class LiveMemory(TorchDispatchMode):
    """Within this context `peak` is the most that tensors made in it, and not yet freed, held at a time.

    On any device, `meta` too, where nothing is computed. What an operation uses inside itself is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {id(leaf.untyped_storage()) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                if id(storage) not in given and id(storage) not in self._known:
                    self._add(storage)
        self.peak = max(self.peak, self.live)
        return out

    def _add(self, storage: Any) -> None:
        key, size = id(storage), storage.nbytes()

        def freed(_: Any) -> None:
            self.live -= size
            self._known.pop(key, None)

        self._known[key] = weakref.ref(storage, freed)
        self.live += size


class Forgetful(list[Any]):
    """In place of the launches that `runtime.recording` lists: they would keep their tensors alive."""

    def append(self, launch: Any) -> None:
        pass


def measured(
    model: Any, lengths: list[int], projection: Projection, precision: str = "auto", triton: bool = False
) -> int:
    """Peak bytes of one batch, weights and what the engine keeps of them not counted; kernels are not run."""
    vocabulary = model.get_base_model().config.vocab_size
    ids = [torch.randint(0, vocabulary, (n,)) for n in lengths]
    (pack,) = pack_examples([{"input_ids": i, "labels": i} for i in ids], sum(lengths))
    backend = "triton" if triton else "torch"
    with (
        mock.patch.object(runtime, "_recorded", Forgetful()),
        GradientEngine(model, projection, backend=backend, precision=precision) as engine,
    ):
        engine.run(pack)
        with LiveMemory() as memory:
            engine.run(pack)
    return memory.peak


def summed(model: Any, lengths: list[int], spec: inf.RowSpec, **options: Any) -> GradientMemory:
    """The sum for examples of these lengths of which all tokens but the first are predicted."""
    return gradient_memory(
        model.get_base_model().config,
        PackSize(sum(lengths), len(lengths), sum(lengths) - len(lengths)),
        BaseWeights(1),
        spec,
        **options,
    )


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("qwen2", BASE | {"num_hidden_layers": 2}),
        pytest.param("qwen2", BASE | {"num_hidden_layers": 6}, marks=pytest.mark.exhaustive),
        pytest.param("llama", BASE | {"num_hidden_layers": 3, "num_key_value_heads": 4}, marks=pytest.mark.exhaustive),
        ("qwen3", BASE | {"num_hidden_layers": 3, "head_dim": 64}),
        ("llama", WIDE_HEAD | {"num_hidden_layers": 2}),  # the loss decides
    ],
    ids=str,
)
@pytest.mark.parametrize("precision", ["auto", "fp8"])
def test_the_sum_is_the_measured_peak(
    tiny_lora: Callable[..., Any], kind: str, changes: dict[str, Any], checkpointing: bool, precision: str
) -> None:
    lengths, dim, rank = [300, 211, 1, 100], 8, 4
    model = tiny_lora(kind, torch.bfloat16, r=rank, **changes)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    spec = inf.RowSpec(dim=dim, precision=precision)
    memory = summed(model, lengths, spec, rank=rank, checkpointing=checkpointing, triton=False)
    found = measured(model, lengths, Projection(dim=dim), precision)
    assert memory.batch == pytest.approx(found, rel=TOLERANCE), memory.fullest


@pytest.mark.parametrize(
    ("changes", "dim", "fullest"),
    [
        (BASE | {"num_hidden_layers": 3}, 16, "the backward of the bottom layer"),
        (WIDE_HEAD | {"num_hidden_layers": 2}, 16, "the loss"),
        (BASE | {"num_hidden_layers": 8, "intermediate_size": 64}, 112, "the sums of examples"),
    ],
    ids=str,
)
def test_the_sum_for_the_kernels(
    tiny_lora: Callable[..., Any], changes: dict[str, Any], dim: int, fullest: str
) -> None:
    lengths, rank = [300, 211, 1, 100], 16
    model = tiny_lora("llama", torch.bfloat16, r=rank, **changes)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    memory = summed(model, lengths, inf.RowSpec(dim=dim), rank=rank)
    assert memory.fullest == fullest
    assert memory.batch == pytest.approx(measured(model, lengths, Projection(dim=dim), triton=True), rel=TOLERANCE)


@pytest.mark.parametrize(
    ("kind", "checkpointing", "precision"),
    [
        ("qwen2", False, "auto"),
        ("llama", False, "auto"),
        ("qwen3", False, "auto"),
        ("qwen3", True, "auto"),
        ("gelu", False, "auto"),
        ("llama", False, "fp8"),
        ("llama", True, "fp8"),
    ],
)
def test_the_sum_for_the_kernels_of_every_kind(
    tiny_lora: Callable[..., Any], kind: str, checkpointing: bool, precision: str
) -> None:
    lengths, changes = [300, 211, 1, 100], BASE | {"num_hidden_layers": 3}
    more: dict[str, Any] = {"qwen3": {"head_dim": 64}, "gelu": {"hidden_act": "gelu"}}.get(kind, {})
    model = tiny_lora("llama" if kind == "gelu" else kind, torch.bfloat16, r=16, **(changes | more))
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    memory = summed(model, lengths, inf.RowSpec(dim=16, precision=precision), checkpointing=checkpointing)
    found = measured(model, lengths, Projection(dim=16), precision, triton=True)
    assert memory.batch == pytest.approx(found, rel=TOLERANCE), memory.fullest


def test_short_layers_and_many_columns_fill_up_at_the_sums(tiny_lora: Callable[..., Any]) -> None:
    model = tiny_lora("qwen2", torch.bfloat16, r=16, **(BASE | {"num_hidden_layers": 8, "intermediate_size": 64}))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    memory = gradient_memory(
        model.get_base_model().config, PackSize(600, 2), BaseWeights(1), inf.RowSpec(dim=64), triton=False
    )
    assert memory.fullest == "the sums of examples"
    assert memory.batch == pytest.approx(measured(model, [400, 200], Projection(dim=64)), rel=TOLERANCE)


def test_the_factors_are_those_of_the_engine(tiny_lora: Callable[..., Any]) -> None:
    model = tiny_lora("llama", torch.bfloat16, r=4, **BASE)
    config = model.get_base_model().config
    parameters = sum(p.numel() for name, p in model.named_parameters() if "lora_" not in name)
    memory = gradient_memory(config, PackSize(100), BaseWeights(parameters), inf.RowSpec(dim=8), rank=4)
    weights, factors = memory.throughout.values()
    assert weights == 2 * parameters
    with GradientEngine(model, Projection(dim=8), backend="torch") as engine:
        kept = [g.forward_weight.nbytes + sum(b.nbytes for b in g.backward_weights) for g in engine.opened.groups]
        kept += [g.factors_a.nbytes for g in engine.opened.groups if len(g.members) > 1]  # else a view
        lora = sum(p.nbytes for name, p in model.named_parameters() if "lora_" in name)
        assert factors == sum(kept) + lora


def test_the_copies_in_8_bits_are_those_of_the_engine(tiny_lora: Callable[..., Any]) -> None:
    model = tiny_lora("llama", torch.bfloat16, r=4, **BASE)
    memory = gradient_memory(model.get_base_model().config, PackSize(100), BaseWeights(1), inf.RowSpec(precision="fp8"))
    *_, copies = memory.throughout.values()
    weights = [weight for weight in weights_of(find_lora_linears(model)) if weight is not None]
    rounded = [rows for weight in weights for rows in (weight.rows, weight.columns)]
    assert copies == sum(rows.values.nbytes + rows.scales.nbytes for rows in rounded)


def fused_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any) -> torch.Tensor:
    return _FusedAttention.apply(query, key, value)


class _FusedAttention(torch.autograd.Function):
    """What flash attention keeps: q, k, v, its output, and one fp32 number a token and head."""

    @staticmethod
    def forward(ctx: Any, *inputs: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(inputs[0])
        ctx.save_for_backward(*inputs, out, out.new_empty(out.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


@pytest.mark.parametrize("triton", [False, True])
@pytest.mark.parametrize(("layers", "checkpointing", "tokens"), [(8, True, 32_768), (4, False, 16_384)])
def test_the_shape_of_a_7b_model_with_no_numbers_in_it(
    monkeypatch: pytest.MonkeyPatch, layers: int, checkpointing: bool, tokens: int, triton: bool
) -> None:
    """Qwen2.5-7B on the meta device: every tensor that the engine would make, at its size."""
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen2Config, Qwen2ForCausalLM

    monkeypatch.setattr(attention, "scaled_dot_product_attention", fused_attention)
    config = Qwen2Config(
        vocab_size=152_064,
        hidden_size=3584,
        intermediate_size=18_944,
        num_hidden_layers=layers,
        num_attention_heads=28,
        num_key_value_heads=4,
        max_position_embeddings=tokens,
    )
    with torch.device("meta"):
        model = Qwen2ForCausalLM(config)
        lora = LoraConfig(r=16, target_modules="all-linear")
        model = get_peft_model(model, lora, autocast_adapter_dtype=False).to(torch.bfloat16)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    weights = BaseWeights(7_615_616_512)
    memory = gradient_memory(
        config, PackSize(tokens), weights, inf.RowSpec(dim=16), checkpointing=checkpointing, triton=triton
    )
    found = measured(model, [tokens], Projection(dim=16), triton=triton)
    assert memory.batch == pytest.approx(found, rel=TOLERANCE)


@pytest.mark.parametrize("projection", [Projection(dim=8), None], ids=str)
def test_a_pack_that_would_not_fit_is_computed_again_with_the_same_bits(
    tiny_lora: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, projection: Projection | None
) -> None:
    """On a pretended card of which so much is free that a pack of 300 tokens fits, and one of 301 does not."""
    model = tiny_lora("qwen2", torch.bfloat16, **BASE)
    columns = 4 + (8 if projection else 0)
    layer = layer_bytes(model.get_base_model().config, columns=columns, inputs=projection is None)
    room = int(300 * layer * len(model.get_base_model().model.layers) / 0.8) + 1
    ids = torch.randint(0, 200, (301,))
    calls = []
    handle = model.get_base_model().model.layers[0].self_attn.register_forward_pre_hook(lambda *_: calls.append(1))

    def run(tokens: int, free: int | None) -> tuple[torch.Tensor, int]:
        monkeypatch.setattr("influence_fast.gradients.step.opened.free_bytes", lambda device: free)
        (pack,) = pack_examples([{"input_ids": ids[:tokens], "labels": ids[:tokens]}], tokens)
        with GradientEngine(model, projection) as engine:
            calls.clear()
            return engine.run(pack)[0], len(calls)

    for tokens, passes in ((300, 1), (301, 2)):
        rows, found = run(tokens, room)
        assert found == passes
        assert torch.equal(rows, run(tokens, None)[0])
    handle.remove()
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    assert not any(module.training or "_gradient_checkpointing_func" in vars(module) for module in model.modules())
    assert not model.get_input_embeddings()._forward_hooks  # the model's own switch would leave one


@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_what_the_kernels_keep_decides_whether_a_pack_overflows(
    tiny_lora: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, activation: str
) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    model = tiny_lora("llama", torch.bfloat16, hidden_act=activation, **BASE)
    base = model.get_base_model()
    layer = layer_bytes(base.config, columns=12, fused_norms=True, fused_mlp=activation == "silu")
    assert layer < layer_bytes(base.config, columns=12)
    room = int(300 * layer * len(base.model.layers) / 0.8) + 1
    monkeypatch.setattr("influence_fast.gradients.step.opened.free_bytes", lambda device: room)
    with runtime.recording(), GradientEngine(model, Projection(dim=8), backend="triton") as engine:
        assert (engine.overflows(300), engine.overflows(301)) == (False, True)


def test_what_a_layer_keeps_grows_with_its_columns_and_dtype(tiny_config: Callable[..., Any]) -> None:
    config = tiny_config("llama")
    plain = layer_bytes(config)
    assert layer_bytes(config, columns=24) - plain == 7 * 24 * 2
    assert layer_bytes(config, weight_bytes=4) > plain


def test_a_model_of_another_kind_is_named() -> None:
    from transformers import GPT2Config

    with pytest.raises(ConfigError, match="no memory sum for a gpt2 model: its configuration has no intermediate_size"):
        gradient_memory(GPT2Config(), PackSize(10), BaseWeights(1), inf.RowSpec())
