"""The whole gradient path on a card: against float64 on the CPU, repeated, and with nothing that waits in a batch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import influence_fast as inf
from influence_fast.gradients.engine import GradientEngine
from influence_fast.gradients.find_lora import find_lora_linears
from influence_fast.gradients.fisher_labels import sample_labels
from influence_fast.gradients.model.backends import TORCH, TRITON
from influence_fast.gradients.per_example import iter_gradient_rows, packs_for
from influence_fast.gradients.rows.projection import Projection
from influence_fast.gradients.step.reduction import random_columns
from influence_fast.influence.sketch_fitting import fit_projection
from influence_fast.kernels.runtime import INTERPRETED, unavailable
from influence_fast.row_codec import encoded

WHY_NOT = "TRITON_INTERPRET=1 is set, so nothing would be launched" if INTERPRETED else unavailable("cuda")
pytestmark = [
    pytest.mark.requires_gpu,
    pytest.mark.skipif(bool(WHY_NOT), reason=f"the path needs a GPU: {WHY_NOT}"),
]

CUDA = torch.device("cuda")
PROJECTIONS = [
    None,
    Projection(dim=8),
    Projection(dim=8, width=64),
    Projection("kron", dim=8),
    Projection("sjlt", width=64),
    Projection("rademacher", width=64),
]


def make_examples(count: int = 40, seed: int = 0, longest: int = 90) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for i, n in enumerate(torch.randint(2, longest, (count,), generator=generator).tolist()):
        ids = torch.randint(0, 90, (n,), generator=generator)
        examples.append({"id": f"ex-{i}", "input_ids": ids, "labels": torch.where(torch.arange(n) < n // 3, -100, ids)})
    return examples


@pytest.fixture(params=["torch", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("projection", PROJECTIONS, ids=str)
def test_rows_agree_with_float64_on_the_cpu(
    tiny_lora: Callable[..., Any], backend: str, projection: Projection | None
) -> None:
    model, examples = tiny_lora(hidden_size=64, num_attention_heads=4), make_examples()
    truth = inf.per_example_gradients(copy.deepcopy(model).double(), examples, projection=projection)
    size = truth.norm(dim=1)
    for dtype, bound in ((torch.float32, 3e-5), (torch.bfloat16, 0.15)):
        cast = copy.deepcopy(model).to(CUDA, dtype)
        rows = inf.per_example_gradients(cast, examples, projection=projection, max_tokens=300, backend=backend)
        assert rows.device.type == "cuda"
        assert float(((rows.double().cpu() - truth).norm(dim=1) / size).max()) < bound


@pytest.mark.parametrize("projection", PROJECTIONS, ids=str)
def test_rows_repeat_bit_for_bit_and_cross_the_bus_unchanged(
    tiny_lora: Callable[..., Any], backend: str, projection: Projection | None
) -> None:
    model, examples = tiny_lora().to(CUDA, torch.bfloat16), make_examples()
    options: dict[str, Any] = {"projection": projection, "max_tokens": 300, "backend": backend}
    whole = inf.per_example_gradients(model, examples, **options)
    assert torch.equal(whole, inf.per_example_gradients(model, examples, **options))
    spec = inf.RowSpec.of(projection, dtype="fp32", max_tokens=300)
    for places, rows in iter_gradient_rows(model, examples, spec, backend=backend):
        assert rows.device.type == "cpu"
        assert torch.equal(rows, whole[places].cpu())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_long_traces_repeat_bit_for_bit(tiny_lora: Callable[..., Any], backend: str, dtype: torch.dtype) -> None:
    """Of many blocks of keys, whose parts of the queries' gradient attention adds up."""
    model = tiny_lora(hidden_size=256, num_attention_heads=4, max_position_embeddings=4096).to(CUDA, dtype)
    examples = make_examples(6, longest=3000)
    options: dict[str, Any] = {"projection": Projection(dim=8), "max_tokens": 8192, "backend": backend}
    first = inf.per_example_gradients(model, examples, **options)
    for _ in range(5):
        assert torch.equal(first, inf.per_example_gradients(model, examples, **options))


@pytest.mark.parametrize("projection", [p for p in PROJECTIONS if p is None or p.kind != "kron"], ids=str)
def test_recorded_steps_give_the_rows_of_steps_run_by_operations(
    tiny_lora: Callable[..., Any],
    caplog: pytest.LogCaptureFixture,
    recwarn: pytest.WarningsRecorder,
    projection: Projection | None,
) -> None:
    """Many packs of one shape, of examples that the kernels split, and packs of other shapes between; three times, so
    that graphs are replayed after others were recorded, and every result is kept while the next ones are made."""
    model = tiny_lora(hidden_size=64, num_attention_heads=4, max_position_embeddings=2048).to(CUDA, torch.bfloat16)
    examples = make_examples(100)
    for i in range(24):
        ids = torch.randint(0, 90, (600 if i % 2 else 420,), generator=torch.Generator().manual_seed(i))
        examples.append({"id": f"long-{i}", "input_ids": ids, "labels": ids})
    rows, losses = {}, {}
    for recorded in (False, True):
        with GradientEngine(model, projection, backend="triton", cuda_graphs=recorded) as engine:
            packs = packs_for(engine, examples, 1024)
            every = [engine.run(pack) for pack in packs * 3]
            results = every[-len(packs) :]
            shapes = [] if engine.runner.graphs is None else list(engine.runner.graphs._graphs)
        rows[recorded], losses[recorded] = (torch.cat(parts) for parts in zip(*results, strict=True))
        # the bits of a row do not depend on whether its step was replayed
        assert all(torch.equal(a[0], b[0]) for a, b in zip(every, results, strict=False))
    assert not caplog.records
    assert not [warning for warning in recwarn if "debug mode" in str(warning.message)]
    assert len(shapes) > 1
    assert any(shape.longest > 512 for shape in shapes)
    # products over padded tokens may be other kernels, whose sums round differently; another pack's rows differ by 1
    assert float((rows[True] - rows[False]).norm() / rows[False].norm()) < 3e-2
    assert float((losses[True] - losses[False]).norm() / losses[False].norm()) < 1e-2


@pytest.mark.parametrize("dim", [12, 16])
def test_random_columns_made_on_the_card_are_those_of_the_cpu(
    tiny_lora: Callable[..., Any], backend: str, dim: int
) -> None:
    projection, model = Projection(dim=dim), tiny_lora()
    here = [random_columns(projection, linear, TORCH) for linear in find_lora_linears(model)]
    chosen = TRITON if backend == "triton" else TORCH
    there = [random_columns(projection, linear, chosen) for linear in find_lora_linears(model.to(CUDA))]
    for pair in zip(here, there, strict=True):
        for cpu, card in zip(*pair, strict=True):
            assert card.is_cuda
            assert torch.equal(card.cpu(), cpu)


@pytest.mark.parametrize("recorded", [False, True])
def test_a_fitted_sketch_makes_the_rows_of_the_cpu(tiny_lora: Callable[..., Any], backend: str, recorded: bool) -> None:
    if recorded and backend == "torch":
        pytest.skip("only the Triton kernels are recorded")
    model, examples = tiny_lora(), make_examples()
    projection = fit_projection(model, examples, inf.RowSpec.of(Projection(dim=8, width=100)))
    truth = inf.per_example_gradients(copy.deepcopy(model).double(), examples, projection=projection)
    dtype, bound = (torch.bfloat16, 0.15) if recorded else (torch.float32, 3e-5)  # 16-bit models alone are recorded
    results = []
    with GradientEngine(model.to(CUDA, dtype), projection, backend=backend, cuda_graphs=recorded) as engine:
        packs = packs_for(engine, examples, 300)
        for _ in range(4):
            rows = torch.empty(truth.shape)
            for pack in packs:
                rows[pack.indices] = engine.run(pack)[0].cpu()
            results.append(rows)
    assert torch.equal(results[-2], results[-1])
    assert float((results[-1] - truth).norm() / truth.norm()) < bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_labels_are_drawn_as_on_the_cpu(tiny_lora: Callable[..., Any], backend: str, dtype: torch.dtype) -> None:
    """But where a uniform number falls between two roundings of a probability."""
    model, examples = tiny_lora(), make_examples(60)
    here = sample_labels(model.to(dtype), examples)
    model.to(CUDA)
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("INFLUENCE_FAST_BACKEND", backend)
        there = sample_labels(model, examples)
    pairs = [(a["labels"], b["labels"]) for a, b in zip(here, there, strict=True)]
    same = torch.cat([(a == b)[a != -100] for a, b in pairs]).double().mean()
    assert float(same) > (0.999 if dtype == torch.float32 else 0.9)
    assert all(torch.equal(a == -100, b == -100) for a, b in pairs)


@pytest.mark.parametrize(
    "projection",
    [None, Projection(dim=8), Projection(dim=8, width=64), Projection("sjlt", width=64)],
    ids=str,
)
@pytest.mark.parametrize("recorded", [False, True])
def test_no_batch_after_the_first_waits_for_the_card(
    tiny_lora: Callable[..., Any], backend: str, projection: Projection | None, recorded: bool
) -> None:
    if recorded and backend == "torch":
        pytest.skip("only the Triton kernels are recorded")
    model = tiny_lora().to(CUDA, torch.bfloat16)
    with GradientEngine(model, projection, backend=backend, cuda_graphs=recorded) as engine:
        packs = packs_for(engine, make_examples(), 300)
        for pack in packs * 3:  # compiles, records, brings the tables over, and fills the cache of pinned memory
            encoded(engine.run(pack)[0], "int8", engine.backend.int8_rows)
        torch.cuda.synchronize()
        try:
            torch.cuda.set_sync_debug_mode("error")
            for pack in packs:
                rows, _ = engine.run(pack)
                encoded(rows, "int8", engine.backend.int8_rows)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("projection", [Projection(dim=8), Projection(dim=8, width=64)], ids=str)
def test_a_store_has_the_bits_of_one_whose_rows_crossed_as_fp32(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tiny_lora: Callable[..., Any],
    projection: Projection,
    dtype: str,
) -> None:
    model, examples = tiny_lora().to(CUDA, torch.bfloat16), make_examples()
    given = replace(inf.RowSpec.of(projection, dtype=dtype, max_tokens=300), sketch="random")

    def in_fp32(model: Any, examples: Any, spec: inf.RowSpec, **more: Any) -> Any:
        return iter_gradient_rows(model, examples, replace(spec, dtype="fp32"), **more)

    built = inf.build_store(tmp_path / "short", model, examples, given).path
    as_fp32 = inf.build_store(
        tmp_path / "fp32",
        model,
        examples,
        given,
        options=inf.BuildOptions(gradients=in_fp32),
    ).path
    for path in Path(built).iterdir():
        assert (Path(as_fp32) / path.name).read_bytes() == path.read_bytes()
