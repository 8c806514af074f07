"""8-bit base products: the operands' rounding, the products against float64, and gradient rows made with them."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from loose import built_by

import influence_fast as inf
from benches.fp8_effect import RoundedLinear
from benches.fp8_effect import fp8 as rounding
from influence_fast import cli
from influence_fast.config import RunConfig
from influence_fast.distributed import builds as distributed
from influence_fast.distributed.builds import DistributedOptions
from influence_fast.errors import ConfigError, StoreError, warn_once
from influence_fast.gradients.find_lora import find_lora_linears
from influence_fast.gradients.model import fp8
from influence_fast.gradients.per_example import iter_gradient_rows
from influence_fast.gradients.rows.projection import Projection
from influence_fast.gradients.rows.row_spec import RowSpec
from influence_fast.influence.building import build_store
from influence_fast.kernels import fp8_rows
from influence_fast.settings import from_dict
from influence_fast.store.building import BuildOptions
from influence_fast.store.merge import merge_stores
from influence_fast.store.planning import identity_of
from influence_fast.store.reader import open_store

CPU = torch.device("cpu")
E4M3 = rounding(torch.float8_e4m3fn)
FITS = {"intermediate_size": 64}  # every linear of the tiny model is then a multiple of 16 by another
# How far 8-bit rows are from fp32 ones: e4m3 rounds by up to 1/16, and the tiny models have two layers.
LEAST, MOST = 1e-4, 0.1


def make_examples(lengths: tuple[int, ...] = (2, 7, 31, 13, 20)) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    examples = []
    for i, n in enumerate(lengths):
        ids = torch.randint(5, 300, (n,), generator=generator)
        labels = ids.clone()
        labels[: n // 3] = -100
        examples.append({"id": f"e{i}", "input_ids": ids, "labels": labels})
    return examples


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def wide(rows: fp8.Rows) -> torch.Tensor:
    return rows.values.double() * rows.scales.double()


def emulated(model: Any, examples: list[dict[str, Any]], fitting: Callable[[Any], bool]) -> torch.Tensor:
    """[E, k]: one backward an example through peft's own layers; base products of those that fit have rounded operands,
    multiplied in the model's dtype."""
    linears = [linear for linear in find_lora_linears(model) if fitting(linear)]
    layers = [linear.layer.get_base_layer() for linear in linears]
    factors = [parameter for name, parameter in model.named_parameters() if "lora_" in name]

    def forward(layer: Any) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda x: RoundedLinear.apply(x, layer.weight, layer.bias, E4M3, E4M3)

    try:
        for layer in layers:
            layer.forward = forward(layer)
        rows = []
        for example in examples:
            loss = model(input_ids=example["input_ids"][None], labels=example["labels"][None]).loss
            rows.append(torch.cat([grad.flatten() for grad in torch.autograd.grad(loss, factors)]))
        return torch.stack(rows)
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


# ---- rounding and products -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_rows_are_rounded_as_in_the_emulation_and_zeros_stay_zero(dtype: torch.dtype) -> None:
    matrix = random(6, 48, dtype=dtype) * torch.logspace(-8, 8, 6, dtype=dtype)[:, None]
    matrix[2] = 0
    rows = fp8.to_fp8(matrix)
    assert (rows.values.dtype, rows.scales.dtype) == (torch.float8_e4m3fn, torch.float32)
    assert torch.equal(wide(rows).float(), E4M3(matrix.float()))
    assert not wide(rows)[2].any()
    assert 0 < relative(wide(rows), matrix) < 2.0**-4


def test_the_columns_of_a_matrix_are_laid_out_as_rows() -> None:
    matrix = random(32, 48)
    rows = fp8.to_fp8(matrix.T)
    assert rows.values.is_contiguous()
    assert torch.equal(wide(rows), wide(fp8.to_fp8(matrix.T.contiguous())))


def test_the_copies_of_a_weight_take_two_bytes_a_number_and_four_a_scale() -> None:
    eight = fp8.Fp8Weight(random(32, 48), fp8.Product.on(CPU, torch.float32))
    held = [tensor for rows in (eight.rows, eight.columns) for tensor in (rows.values, rows.scales)]
    assert sum(tensor.untyped_storage().nbytes() for tensor in held) == 2 * 32 * 48 + 4 * (32 + 48)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_so_and_spoils_no_other_row(bad: float) -> None:
    matrix = random(3, 16)
    matrix[1, 5] = bad
    product = fp8.Product.on(CPU, torch.float32)(fp8.to_fp8(matrix), fp8.to_fp8(random(32, 16)))
    assert product.isfinite().all(dim=1).tolist() == [True, False, True]


@pytest.mark.parametrize("emulates", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 4e-3), (torch.float32, 1e-6)])
@pytest.mark.parametrize("tokens", [1, 5, 33])
def test_products_are_those_of_the_rounded_operands_in_float64(
    tokens: int, dtype: torch.dtype, tolerance: float, emulates: bool
) -> None:
    x, weight, bias = random(tokens, 48, dtype=dtype), random(32, 48, seed=1, dtype=dtype), random(32, dtype=dtype)
    g = random(tokens, 32, seed=2, dtype=dtype)
    x[0] = 0
    product = fp8.Product(dtype, scaled_mm=False) if emulates else fp8.Product.on(CPU, dtype)
    eight = fp8.Fp8Weight(weight, product)
    rounded_x, rounded_g = fp8.to_fp8(x), fp8.to_fp8(g)

    forward = eight.forward(rounded_x, bias)
    expected = wide(rounded_x) @ wide(fp8.to_fp8(weight)).T + bias.double()
    assert forward.dtype == dtype
    assert relative(forward, expected) < tolerance
    assert torch.equal(forward[0], bias)
    backward = eight.backward(rounded_g)
    assert backward.dtype == dtype
    assert relative(backward, wide(rounded_g) @ wide(fp8.to_fp8(weight.T)).T) < tolerance
    assert 1e-3 < relative(backward, g.double() @ weight.double()) < 0.1


# ---- what it runs on -------------------------------------------------------------------------------------------


def test_a_card_without_8_bit_products_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Old Card")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    with pytest.raises(ConfigError, match=r"compute capability 8\.9 or above, and Old Card has 8\.6; use 'auto'"):
        fp8.Product.on(torch.device("cuda", 0), torch.bfloat16)


def test_a_device_that_refuses_the_product_is_named_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*args: Any, **options: Any) -> torch.Tensor:
        raise RuntimeError("no such scaling\nmore")

    monkeypatch.setattr(torch, "_scaled_mm", refuses)
    with pytest.raises(ConfigError, match=r"cannot be used on meta \(no such scaling\); use 'auto'"):
        fp8.Product.on(torch.device("meta"), torch.bfloat16)


def test_a_cpu_that_refuses_it_multiplies_the_same_operands_itself(
    monkeypatch: pytest.MonkeyPatch, tiny_lora: Callable[..., Any]
) -> None:
    model, examples = tiny_lora("qwen2", **FITS), make_examples()
    exact = inf.per_example_gradients(model, examples)
    usual = inf.per_example_gradients(model, examples, precision="fp8")

    def refuses(*args: Any, **options: Any) -> torch.Tensor:
        raise RuntimeError("only per-tensor scaling")

    monkeypatch.setattr(torch, "_scaled_mm", refuses)
    assert fp8.Product.on(CPU, torch.float32) == fp8.Product(torch.float32, scaled_mm=False)
    found = inf.per_example_gradients(model, examples, precision="fp8")
    assert relative(found, usual) < 0.2 * relative(found, exact)


def test_fp32_models_take_bf16_products_where_there_are_no_others(
    monkeypatch: pytest.MonkeyPatch, tiny_lora: Callable[..., Any]
) -> None:
    def narrow(a: Any, b: Any, *, scale_a: Any, scale_b: Any, out_dtype: torch.dtype) -> torch.Tensor:
        if out_dtype != torch.bfloat16:
            raise ValueError("Only bf16 high precision output types are supported for row-wise scaling.")
        return (a.float() @ b.float() * scale_a * scale_b).bfloat16()

    model, examples = tiny_lora("qwen2", **FITS), make_examples()
    exact = inf.per_example_gradients(model, examples)
    monkeypatch.setattr(torch, "_scaled_mm", narrow)
    assert fp8.Product.on(CPU, torch.float32) == fp8.Product(torch.bfloat16)
    rows = inf.per_example_gradients(model, examples, precision="fp8")
    assert rows.dtype == torch.float32
    assert LEAST < relative(rows, exact) < MOST


def test_weights_that_are_spread_over_processes_are_refused(tiny_lora: Callable[..., Any], tmp_path: Path) -> None:
    linears = find_lora_linears(tiny_lora("qwen2", **FITS))
    spread = linears[1].weight.clone()
    spread.full_tensor = lambda: spread  # type: ignore[attr-defined]  # as a DTensor has
    with pytest.raises(ConfigError, match="spread over processes"):
        fp8.weights_of([linears[0], replace(linears[1], weight=spread)])
    with pytest.raises(ConfigError, match="spread over processes"):
        distributed.build_distributed(
            tmp_path / "s", None, [], RowSpec("none", precision="fp8"), options=DistributedOptions(group=object())
        )  # type: ignore[arg-type]


@pytest.mark.parametrize(("tokens", "rows"), [(1, 272), (33, 272), (271, 272), (272, 272), (273, 288), (1000, 1008)])
@pytest.mark.parametrize("emulates", [False, True])
def test_rows_of_zeros_beside_too_few_change_no_product(tokens: int, rows: int, emulates: bool) -> None:
    assert fp8.padded(tokens) == rows
    x, weight = random(tokens, 48), random(32, 48, seed=1)
    product = fp8.Product(torch.float32, scaled_mm=False) if emulates else fp8.Product.on(CPU, torch.float32)
    more, wider = (fp8.Rows(*fp8_rows.reference(each, rows), len(each)) for each in (x, weight))
    assert len(more.values) == len(more.scales) == rows
    assert not wide(more)[tokens:].any()
    torch.testing.assert_close(product(more, wider), product(fp8.to_fp8(x), fp8.to_fp8(weight)))


# ---- gradient rows ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("projection", [None, Projection(dim=8), Projection("kron", dim=4)])
@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "llama"])
def test_rows_are_8_bit_ones(tiny_lora: Callable[..., Any], kind: str, projection: Projection | None) -> None:
    model, examples = tiny_lora(kind, **FITS), make_examples()
    exact = inf.per_example_gradients(model, examples, projection=projection)
    rows = inf.per_example_gradients(model, examples, projection=projection, precision="fp8")
    assert (rows.shape, rows.dtype) == (exact.shape, torch.float32)
    assert LEAST < relative(rows, exact) < MOST
    assert torch.equal(inf.per_example_gradients(model, examples, projection=projection, precision="auto"), exact)


@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 1}], ids=["all fit", "q_proj fits beside k and v"])
def test_rows_are_those_of_rounded_operands(tiny_lora: Callable[..., Any], changes: dict[str, int]) -> None:
    model, examples = tiny_lora("qwen2", **FITS, **changes), make_examples()
    rows = inf.per_example_gradients(model, examples, precision="fp8")
    expected = emulated(model, examples, lambda linear: linear.d_out % 16 == 0)
    assert relative(rows, expected) < 0.2 * relative(rows, inf.per_example_gradients(model, examples))


def test_shapes_that_do_not_fit_keep_their_own_product_and_are_reported_once(
    tiny_lora: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    model, examples = tiny_lora("qwen2", intermediate_size=56), make_examples()
    warn_once.cache_clear()
    with caplog.at_level(logging.WARNING, logger="influence_fast.gradients.model.fp8"):
        rows = inf.per_example_gradients(model, examples, precision="fp8")
        inf.per_example_gradients(model, examples, precision="fp8")
    (record,) = caplog.records
    assert "mlp.gate_proj (56 x 32)" in record.getMessage()
    assert "q_proj" not in record.getMessage()
    exact = inf.per_example_gradients(model, examples)
    attention_only = emulated(model, examples, lambda linear: "mlp" not in linear.name)
    everywhere = emulated(model, examples, lambda linear: True)
    assert LEAST < relative(rows, exact) < MOST
    assert relative(rows, attention_only) < 0.2 * relative(rows, exact)
    assert relative(rows, everywhere) > 2 * relative(rows, attention_only)


def test_a_model_with_no_shape_that_fits_is_refused(tiny_lora: Callable[..., Any]) -> None:
    model = tiny_lora("qwen2", hidden_size=24, intermediate_size=40, num_attention_heads=2, num_key_value_heads=1)
    with pytest.raises(ConfigError, match=r"multiples of 16, and there is none: .*q_proj \(24 x 24\)"):
        inf.per_example_gradients(model, make_examples(), precision="fp8")


def test_a_bf16_model_has_bf16_products(tiny_lora: Callable[..., Any]) -> None:
    model, examples = tiny_lora("qwen2", **FITS), make_examples()
    exact = inf.per_example_gradients(model, examples)
    half = copy.deepcopy(model).bfloat16()
    assert fp8.Product.on(CPU, torch.bfloat16).dtype == torch.bfloat16
    plain = relative(inf.per_example_gradients(half, examples), exact)
    eight = relative(inf.per_example_gradients(half, examples, precision="fp8"), exact)
    assert plain < eight < 2 * MOST


def test_rows_do_not_depend_on_the_packing(tiny_lora: Callable[..., Any]) -> None:
    """Scales are a token's own, so that no example changes another's rounding."""
    model, examples = tiny_lora("qwen2", **FITS), make_examples()
    exact = inf.per_example_gradients(model, examples)
    together = inf.per_example_gradients(model, examples, precision="fp8")
    alone = inf.per_example_gradients(model, examples, precision="fp8", max_tokens=1)
    assert relative(alone, together) < 0.2 * relative(together, exact)


def test_the_model_is_left_as_it_was(tiny_lora: Callable[..., Any]) -> None:
    model, examples = tiny_lora("qwen2", **FITS), make_examples()
    before = inf.per_example_gradients(model, examples)
    weights = {name: parameter.clone() for name, parameter in model.named_parameters()}
    inf.per_example_gradients(model, examples, precision="fp8")
    assert all(torch.equal(parameter, weights[name]) for name, parameter in model.named_parameters())
    assert torch.equal(inf.per_example_gradients(model, examples), before)


def test_beside_the_triton_kernels_the_rows_are_the_same(interpreted: Callable[[str], Any]) -> None:
    errors = interpreted("interpreted_fp8.py")
    assert LEAST < errors["of fp8"] < MOST
    assert errors["between"] < 0.2 * errors["of fp8"]


# ---- settings and the store ------------------------------------------------------------------------------------


def test_an_unknown_precision_is_named_wherever_it_is_given(tiny_lora: Callable[..., Any], tmp_path: Path) -> None:
    model, examples = tiny_lora("qwen2", **FITS), make_examples()
    wrong = "unknown value 'fp9'; did you mean 'fp8'"
    with pytest.raises(ConfigError, match=wrong):
        inf.per_example_gradients(model, examples, precision="fp9")
    with pytest.raises(ConfigError, match=wrong):
        next(iter_gradient_rows(model, examples, RowSpec("none", dtype="fp32", precision="fp9")))
    with pytest.raises(ConfigError, match=wrong):
        build_store(tmp_path / "s", model, examples, RowSpec("none", precision="fp9"))
    assert not (tmp_path / "s").exists()
    config = {"output": "o", "model": {"path": "m"}, "data": {"pool": "p", "validation": "v", "test": "t"}}
    with pytest.raises(ConfigError, match=f"gradients.precision: {wrong}"):
        from_dict(RunConfig, config | {"gradients": {"precision": "fp9"}})


def test_the_command_line_refuses_it_before_any_work(capsys: pytest.CaptureFixture[str]) -> None:
    build = ["build", "--model", "no-model", "--adapter", "none", "--data", "none", "--output", "o", "--precision"]
    assert cli.main([*build, "fp9"]) == 2
    assert "--precision: unknown value 'fp9'; did you mean 'fp8'" in capsys.readouterr().err
    assert cli.main([*build, "fp8", "--fsdp", "2"]) == 2
    assert "--precision: fp8 keeps copies of whole base weights" in capsys.readouterr().err
    score = ["score", "--model", "m", "--adapter", "a", "--data", "d", "--validation", "v", "--output", "o.csv"]
    assert cli.main([*score, "--precision", "fp9"]) == 2
    assert "--precision: unknown value 'fp9'" in capsys.readouterr().err


def test_the_store_records_it_and_keeps_its_rows_apart(tiny_lora: Callable[..., Any], tmp_path: Path) -> None:
    model, examples = tiny_lora("qwen2", **FITS), make_examples()
    settings: dict[str, Any] = {"projection": Projection(dim=4), "dtype": "fp32", "progress": False}

    def build(name: str, precision: str, few: list[dict[str, Any]] = examples) -> Any:
        return build_store(tmp_path / name, model, few, **built_by(precision=precision, **settings))

    store = build("eight", "fp8")
    expected = inf.per_example_gradients(model, examples, projection=settings["projection"], precision="fp8")
    assert store.identity.precision == "fp8"
    assert torch.equal(store.rows(), expected)
    build("own", "auto")

    with pytest.raises(StoreError, match="precision is 'fp8' in the store and 'auto' here"):
        build("eight", "auto")
    with pytest.raises(StoreError, match="precision is 'auto' in the store and 'fp8' here"):
        build("own", "fp8")
    for name, other in (("eight", "auto"), ("own", "fp8")):
        wrong = identity_of(model, projection=settings["projection"], precision=other)
        with pytest.raises(StoreError, match=f"made with another precision: .* '{other}' here"):
            open_store(tmp_path / name, expect=wrong)
        right = identity_of(model, projection=settings["projection"], precision="fp8" if name == "eight" else "auto")
        assert len(open_store(tmp_path / name, expect=right)) == len(examples)

    more = [example | {"id": example["id"] + "b"} for example in examples]
    build("more-eight", "fp8", more)
    assert len(merge_stores([tmp_path / "eight", tmp_path / "more-eight"], tmp_path / "both")) == 2 * len(examples)
    for pair in (("own", "more-eight"), ("more-eight", "own")):
        with pytest.raises(StoreError, match="another precision"):
            merge_stores([tmp_path / name for name in pair], tmp_path / "mixed")


def test_a_store_without_8_bits_says_nothing_new(tiny_lora: Callable[..., Any], tmp_path: Path) -> None:
    """Its files are those of a version that knew no precision: such stores are read, and gone on with."""
    model, examples = tiny_lora("qwen2", **FITS), make_examples()
    build_store(tmp_path / "s", model, examples, RowSpec.of(Projection(dim=4)), options=BuildOptions(progress=False))
    manifest = json.loads((tmp_path / "s" / "manifest.json").read_text())
    assert "loss_reduction" in manifest["identity"]
    assert "precision" not in manifest["identity"]
    store = open_store(tmp_path / "s", expect={"precision": "auto"})
    identity = replace(store.identity, precision="auto")
    assert replace(store.manifest, identity=identity).fingerprints() == store.manifest.fingerprints()
    assert replace(store.manifest, identity=replace(identity, precision="fp8")).fingerprints() != (
        store.manifest.fingerprints()
    )


def test_another_source_of_rows_has_its_own_precision(tiny_lora: Callable[..., Any], tmp_path: Path) -> None:
    model, examples = tiny_lora("qwen2", **FITS), make_examples()
    with pytest.raises(ConfigError, match="precision: 'fp8' is for rows made here"):
        build_store(
            tmp_path / "s",
            model,
            examples,
            RowSpec("none", precision="fp8"),
            options=BuildOptions(gradients=iter_gradient_rows),
        )
