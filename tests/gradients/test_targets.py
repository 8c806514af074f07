"""Rows of plain linears, named by a projection's target, against autograd through the plain model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import influence_fast as inf
from influence_fast.errors import ConfigError, ModelError, StoreError
from influence_fast.gradients import targets
from influence_fast.gradients.engine import GradientEngine
from influence_fast.gradients.per_example import packs_for, per_example_losses
from influence_fast.gradients.rows.projection import Projection, random_matrix
from influence_fast.gradients.rows.row_sketch import RowSketch
from influence_fast.gradients.rows.row_spec import RowSpec
from influence_fast.gradients.streaming import stream_influence
from influence_fast.gradients.targets import gradient_layout
from influence_fast.influence.sketch_fitting import fit_projection
from influence_fast.store.queries import query_gradients

ALL = "all-linear"
EXACT = Projection("none", target=ALL)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def make_examples(count: int = 3) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(0, 320, (4 + 5 * n % 11,), generator=generator) for n in range(count)]
    return [{"id": str(n), "input_ids": i, "labels": i} for n, i in enumerate(ids)]


def make_gpt2(dtype: torch.dtype = torch.float64) -> Any:
    from transformers import AutoModelForCausalLM, GPT2Config

    torch.manual_seed(0)
    sizes = {"vocab_size": 320, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    config = GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)
    return AutoModelForCausalLM.from_config(config).to(dtype).eval()


def by_autograd(model: Any, examples: list[dict[str, Any]], projection: Projection = EXACT) -> list[torch.Tensor]:
    """Gradients [E, d_out, d_in] of each linear in the layout, of the mean loss of one example at a time."""
    layout = gradient_layout(model, projection)
    weights = [model.get_submodule(entry.module).weight for entry in layout]
    rows = []
    for example in examples:
        ids = example["input_ids"]
        loss = torch.nn.functional.cross_entropy(model(input_ids=ids[None]).logits[0, :-1], ids[1:])
        rows.append(torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True))
    stacked = [torch.stack(grads) for grads in zip(*rows, strict=True)]
    return [g.transpose(1, 2) if e.factor == "weight.T" else g for g, e in zip(stacked, layout, strict=True)]


def flat(blocks: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat([block.flatten(1) for block in blocks], dim=1)


def projected(block: torch.Tensor, projection: Projection, module: str) -> torch.Tensor:
    """R_out^T G R_in [E, p, p] of G [E, d_out, d_in], by hand."""
    left = random_matrix(projection, f"{module}/out", block.shape[1]).double()
    return left.T @ block @ random_matrix(projection, f"{module}/in", block.shape[2]).double()


@pytest.fixture(scope="module")
def llama(tiny_model: Callable[..., Any]) -> Any:
    return tiny_model("llama", torch.float64)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
def test_rows_of_plain_weights_are_autograds(kind: str, tiny_model: Callable[..., Any]) -> None:
    """Untied, tied (with biases), and Conv1D, whose weight is the other way round."""
    model = make_gpt2() if kind == "gpt2" else tiny_model(kind, torch.float64)
    grads = by_autograd(model, make_examples())
    assert relative(inf.per_example_gradients(model, make_examples(), projection=EXACT), flat(grads)) < 1e-12
    projection = Projection("kron", dim=5, seed=3, target=ALL)
    layout = gradient_layout(model, projection)
    assert {entry.shape for entry in layout} == {(5, 5)}
    assert not any("head" in entry.module for entry in layout)
    by_hand = [projected(block, projection, entry.module) for entry, block in zip(layout, grads, strict=True)]
    rows = inf.per_example_gradients(model, make_examples(), projection=projection)
    assert relative(rows, flat(by_hand)) < 1e-6  # the random columns are fp32
    narrow = Projection("kron", dim=5, seed=3, width=30, target=ALL)
    sketch = RowSketch(layout, narrow, torch.device("cpu"))
    sketched = inf.per_example_gradients(model, make_examples(), projection=narrow)
    assert relative(sketched, sketch(rows)) < 1e-10


@pytest.mark.parametrize("kind", ["sjlt", "rademacher"])
def test_flat_kinds_sketch_whole_weights(kind: str, llama: Any) -> None:
    projection = Projection(kind, width=40, target=["q_proj", "down_proj"])
    sketch = RowSketch(gradient_layout(llama, projection), projection, torch.device("cpu"))
    expected = torch.zeros(3, 40, dtype=torch.float64)
    for number, block in enumerate(by_autograd(llama, make_examples(), projection)):
        for row, values in zip(expected, block.flatten(1), strict=True):
            sketch.add(row, number, values)
    assert relative(inf.per_example_gradients(llama, make_examples(), projection=projection), expected) < 1e-6


def test_streamed_scores_of_plain_weights(llama: Any) -> None:
    exact = flat(by_autograd(llama, make_examples()))
    assert (
        relative(stream_influence(llama, make_examples(), exact, RowSpec("none", target=ALL)), exact @ exact.T) < 1e-12
    )


def test_losses_and_draws_of_a_model_without_an_adapter(llama: Any) -> None:
    from influence_fast.gradients.fisher_labels import sample_labels

    expected = []
    for ids in (example["input_ids"] for example in make_examples()):
        logits = llama(input_ids=ids[None]).logits[0, :-1].detach()
        expected.append(float(torch.nn.functional.cross_entropy(logits, ids[1:])))
    assert per_example_losses(llama, make_examples()).tolist() == pytest.approx(expected, rel=1e-10)
    assert len(sample_labels(llama, make_examples())) == 3


def test_targets_name_linears_by_endings_and_patterns(llama: Any) -> None:
    def names(target: Any, **more: Any) -> list[str]:
        layout = gradient_layout(llama, Projection("kron", target=target, **more))
        return [entry.module.removeprefix("model.layers.") for entry in layout]

    assert names("q_proj") == ["0.self_attn.q_proj", "1.self_attn.q_proj"]
    assert names("0.self_attn.q_proj") == ["0.self_attn.q_proj"]
    assert names([r".*\.1\.mlp\.(up|down)_proj", "q_proj"])[-2:] == ["1.mlp.up_proj", "1.mlp.down_proj"]
    assert names(r".*\.1\..*") == [name for name in names(ALL) if name.startswith("1.")]  # no norms
    assert names(ALL, layers=0.5) == names(r".*\.1\..*")
    assert names([ALL, "lm_head"]) == [*names(ALL), "lm_head"]


def test_an_untied_head_that_is_named_is_in_the_rows(llama: Any) -> None:
    projection = Projection("none", target=["lm_head", "o_proj"])
    expected = flat(by_autograd(llama, make_examples(), projection))
    assert relative(inf.per_example_gradients(llama, make_examples(), projection=projection), expected) < 1e-12


def test_targets_of_no_use_are_refused(llama: Any, tiny_model: Callable[..., Any], monkeypatch: Any) -> None:
    cases = {
        "embed_tokens": "is a Embedding, and rows are of the weights of linears",
        "mlp": "is a LlamaMLP.*name those in it: down_proj, gate_proj, up_proj",
        "qproj": "did you mean 'q_proj'",
    }
    for target, message in cases.items():
        with pytest.raises(ModelError, match=message):
            gradient_layout(llama, Projection(target=target))
    with pytest.raises(ModelError, match=r"lm_head: its weight is model.embed_tokens's too.*target='all-linear'"):
        gradient_layout(tiny_model("qwen2"), Projection(target="lm_head"))
    with pytest.raises(ModelError, match=r"no LoRA adapter.*target='all-linear'"):
        inf.per_example_gradients(llama, make_examples(), projection=Projection())
    monkeypatch.setattr(targets, "MOST_EXACT", 1000)
    with pytest.raises(ConfigError, match=r"an exact row of these weights has .*kind 'kron'"):
        inf.per_example_gradients(llama, make_examples(), projection=EXACT)


def test_a_model_with_an_adapter_takes_no_target(tiny_lora: Callable[..., Any]) -> None:
    for model in (tiny_lora(), tiny_lora().get_base_model()):
        with pytest.raises(ModelError, match=r"the model carries an adapter: call merge_and_unload"):
            gradient_layout(model, Projection(target=ALL))


def test_projection_checks_its_target() -> None:
    for target in ("", [], ["q_proj", 3], 7, 'a"b', "a("):
        with pytest.raises(ConfigError, match="projection target"):
            Projection(target=target)  # type: ignore[arg-type]
    assert Projection(target=["b", "a", "b"]) == Projection("kron", target=("a", "b"))
    assert Projection(target=["a"]).target == "a"
    assert "target" not in repr(Projection())  # names of what was fitted before there were targets
    assert "target='a'" in repr(Projection(target="a"))
    with pytest.raises(ConfigError, match="of the weights that target names"):
        Projection("none")
    with pytest.raises(ConfigError, match="leave out width"):
        Projection("none", width=5, target="a")


def test_an_unused_linear_has_zeros_which_is_said(
    tiny_model: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_model("llama", torch.float64)
    model.model.tower = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(4, 4).double()})
    found = inf.per_example_gradients(model, make_examples(), projection=EXACT)
    entry = next(entry for entry in gradient_layout(model, EXACT) if "tower" in entry.module)
    assert not bool(found[:, entry.columns].any())
    kept = torch.cat([found[:, : entry.offset], found[:, entry.columns.stop :]], dim=1)
    del model.model.tower
    assert relative(kept, flat(by_autograd(model, make_examples()))) < 1e-12
    assert "never calls the linears model.tower.q_proj" in caplog.text
    assert "as by target=['down_proj'" in caplog.text
    prefix = targets.working_targets(["a.lm.q", "a.lm.b.k", "v.lm.q", "v.lm.b.k"], ["v.lm.q", "v.lm.b.k"])
    assert prefix == ", as by target='a[.]lm[.].*'"


def test_a_linear_called_twice_adds_both_calls(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("llama", torch.float64)
    model.model.layers[1].mlp = model.model.layers[0].mlp  # of two inputs
    model.model.layers[1].self_attn.k_proj = model.model.layers[1].self_attn.v_proj  # of one input
    for projection in (EXACT, Projection("kron", dim=64, target=ALL)):
        rows = inf.per_example_gradients(model, make_examples(), projection=projection)
        grads = by_autograd(model, make_examples())
        if projection.kind == "kron":
            names = [entry.module for entry in gradient_layout(model, EXACT)]
            grads = [projected(block, projection, name) for block, name in zip(grads, names, strict=True)]
        assert relative(rows, flat(grads)) < (1e-12 if projection.exact else 1e-6)


class Routed(torch.nn.Module):
    """Three linears, of which each token takes one."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = torch.nn.Linear(32, 3, bias=False)
        self.experts = torch.nn.ModuleList(torch.nn.Linear(32, 32) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, 32)
        share, chosen = self.gate(flat).softmax(-1).max(dim=-1)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            rows = (chosen == number).nonzero().flatten()
            if len(rows):
                out = out.index_add(0, rows, expert(flat[rows]) * share[rows, None])
        return out.view(x.shape)


def test_routed_linears_and_their_router_are_autograds(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("llama", torch.float64)
    torch.manual_seed(0)
    for layer in model.model.layers:
        layer.mlp = Routed().double()
    expected = flat(by_autograd(model, make_examples()))
    assert relative(inf.per_example_gradients(model, make_examples(), projection=EXACT), expected) < 1e-12


def test_weights_with_another_use_are_refused_or_left_out(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("llama", torch.float64)
    first, second = (model.model.layers[n].mlp for n in (0, 1))
    second.up_proj.weight = first.up_proj.weight  # two modules, one weight
    with pytest.raises(ModelError, match=r"0.mlp.up_proj: its weight is model.layers.1.mlp.up_proj's too"):
        gradient_layout(model, Projection(target=["up_proj", "q_proj"]))
    layout = gradient_layout(model, Projection(target=ALL))
    assert not any("up_proj" in entry.module for entry in layout)

    model = tiny_model("llama", torch.float64)
    mlp = model.model.layers[0].mlp
    mlp.forward = lambda x: mlp.down_proj(mlp.gate_proj(x) + torch.nn.functional.linear(x, mlp.gate_proj.weight))
    with pytest.raises(ModelError, match=r"0.mlp.(gate|up)_proj: the model reads its weight beside"):
        inf.per_example_gradients(model, make_examples(), projection=Projection(target=["gate_proj", "q_proj"]))
    torch.nn.utils.parametrizations.weight_norm(model.model.layers[1].mlp.down_proj)
    with pytest.raises(ModelError, match="down_proj: its weight is computed from other parameters"):
        gradient_layout(model, Projection(target="down_proj"))
    assert not any(parameter.grad is not None for parameter in model.parameters())


def test_a_projected_step_forms_no_weight_gradient(tiny_model: Callable[..., Any]) -> None:
    """In the step no tensor is made that has a weight's shape, and no parameter asks for a gradient."""
    model = tiny_model("llama", torch.float64)
    shapes = {tuple(module.weight.shape) for module in model.modules() if isinstance(module, torch.nn.Linear)}
    shapes = {side for a, b in shapes for side in ((a, b), (b, a)) if a != b}
    made: set[tuple[int, ...]] = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and func._schema.returns[0].alias_info is None:  # no view
                made.update({tuple(out.shape), tuple(out.shape[1:])})
            return out

    with GradientEngine(model, Projection("kron", dim=3, target=ALL)) as engine:
        pack = packs_for(engine, make_examples(), None)[0]
        with Watch():
            engine.run(pack)
        assert not any(parameter.requires_grad for parameter in model.parameters())
    assert len(made) > 10
    assert not made & shapes
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_store_and_scores_of_a_fully_trained_model(llama: Any, tmp_path: Path) -> None:
    projection = Projection("kron", dim=4, target=["q_proj", "down_proj"])
    pool = make_examples(12)
    store = inf.build_store(
        tmp_path / "s", llama, pool, inf.RowSpec.of(projection, dtype="fp32"), options=inf.BuildOptions(progress=False)
    )
    assert (store.identity.adapter_hash, store.projection) == (None, projection)
    queries = query_gradients(store, llama, pool[:2])
    assert relative(queries.double(), inf.per_example_gradients(llama, pool[:2], projection=projection)) < 1e-6
    for name in ("default", "fisher_cosine", "ekfac", "less", "datainf"):
        table = inf.Scorer.fit(store, preconditioner=name, fisher="data").scores(queries, {"correct": [0, 1]})
        assert bool(torch.as_tensor(table.columns["s_correct"]).isfinite().all())
    other = Projection("kron", dim=4, target=ALL)
    with pytest.raises(StoreError, match=r"projection_target is '\[.*down_proj.*' in the store and 'all-linear'"):
        inf.build_store(
            tmp_path / "s", llama, pool, inf.RowSpec.of(other, dtype="fp32"), options=inf.BuildOptions(progress=False)
        )
    with pytest.raises(StoreError, match="projection_target"):
        inf.open_store(tmp_path / "s", expect={"projection": other})


def test_a_fitted_sketch_of_plain_weights_is_kept_with_its_target(llama: Any, tmp_path: Path) -> None:
    projection = Projection("kron", dim=3, width=6, target="q_proj")
    fitted = fit_projection(llama, make_examples(8), inf.RowSpec.of(projection))
    inf.build_store(tmp_path / "s", llama, make_examples(8), inf.RowSpec.of(fitted, dtype="fp32"))
    found = inf.open_store(tmp_path / "s").projection
    assert found == fitted
    assert found.target == "q_proj"


def test_identities_without_a_target_are_as_before() -> None:
    from influence_fast.store.identity import StoreIdentity, projection_fields

    plain = StoreIdentity(**projection_fields(Projection()))
    assert "projection_target" not in plain.body()
    assert "target" not in str(plain)
    assert plain.projection == Projection()
    for projection in (EXACT, Projection("kron", target=("a", "b")), Projection("sjlt", width=5, target="a")):
        assert StoreIdentity(**StoreIdentity(**projection_fields(projection)).body()).projection == projection
