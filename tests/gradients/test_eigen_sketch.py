"""A sketch fitted to the data: the leading coordinates of ekfac's H^-1/2, alone, in rows, and in a store."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from loose import built_by, fitted_by
from safetensors import safe_open
from safetensors.torch import save_file

from influence_fast.data.examples import Example, tokenize
from influence_fast.errors import ConfigError, DataError, StoreError
from influence_fast.gradients.per_example import iter_gradient_rows, per_example_gradients
from influence_fast.gradients.rows.eigen_sketch import EigenRows, EigenSketch, file_of
from influence_fast.gradients.rows.layout import LayoutEntry, layout_width
from influence_fast.gradients.rows.projection import Projection
from influence_fast.gradients.rows.row_spec import RowSpec
from influence_fast.gradients.targets import gradient_layout
from influence_fast.influence import sketch_fitting
from influence_fast.influence.building import build_store
from influence_fast.influence.ekfac import fit_ekfac
from influence_fast.influence.recipe import Recipe
from influence_fast.influence.scorer import Scorer
from influence_fast.influence.settings import InfluenceConfig
from influence_fast.influence.sketch_fitting import SketchFit, fit_projection, leading, resolved, width_of
from influence_fast.statistics.ranks import spearman
from influence_fast.store.building import BuildOptions, build_shards
from influence_fast.store.merge import append_store, merge_stores
from influence_fast.store.planning import identity_of
from influence_fast.store.reader import open_store
from influence_fast.store.verification import verify_store

WHOLE = Projection(dim=6, seed=3)
NARROW = replace(WHOLE, width=40)


@pytest.fixture(scope="module")
def model(tiny_lora: Callable[..., Any]) -> Any:
    return tiny_lora("qwen2")


def make_examples(n: int = 24, seed: int = 0) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for i in range(n):
        ids = torch.randint(5, 300, (int(torch.randint(3, 40, (), generator=generator)),), generator=generator)
        examples.append({"id": f"s{seed}-{i}", "input_ids": ids, "labels": ids.clone()})
    return examples


@pytest.fixture(scope="module")
def examples() -> list[dict[str, Any]]:
    return make_examples()


@pytest.fixture(scope="module")
def fitted(model: Any, examples: list[dict[str, Any]]) -> Projection:
    return fit_projection(model, examples, RowSpec.of(NARROW))


@pytest.fixture(scope="module")
def sketch(fitted: Projection) -> EigenSketch:
    assert fitted.sketch is not None
    return fitted.sketch


def the_file(folder: Path) -> Path:
    """The only sketch in a store's folder."""
    (found,) = folder.glob("sketch-*")
    return found


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


# ---- what it computes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shapes", [[(4, 6), (6, 4)] * 3, [(4, 4)] * 5, [(1, 3), (3, 1), (2, 5), (5, 2)]], ids=str)
@pytest.mark.parametrize("width", [1, 7, None])
def test_rows_are_the_leading_coordinates_of_the_whitened_ones(shapes: list[tuple[int, int]], width: Any) -> None:
    layout, offset = [], 0
    for i, shape in enumerate(shapes):
        layout.append(LayoutEntry(f"m{i // 2}", "lora_A", shape, offset))
        offset += shape[0] * shape[1]
    generator = torch.Generator().manual_seed(1)
    spread = torch.logspace(-2, 1, offset)
    rows = torch.randn(50, offset, generator=generator) * spread
    fitted = fit_ekfac(lambda: [rows[:20], rows[20:]], layout, 0.2)
    white = fitted.whiten(rows)
    count = offset if width is None else width
    made = leading(fitted, Projection(width=count))
    energy = white.square().mean(dim=0)
    assert set(made.chosen.tolist()) == set(energy.argsort(descending=True)[:count].tolist())
    assert made.share == pytest.approx(float(energy[made.chosen].sum() / energy.sum()))
    found = EigenRows(made, torch.device("cpu"), torch.float64)(rows.double())
    assert found.shape == (50, count)
    assert error(found, white[:, made.chosen]) < 1e-6  # its bases are kept in fp32


def test_a_block_without_gradients_is_left_out_first() -> None:
    layout = [LayoutEntry("m", "lora_A", (2, 3), 0), LayoutEntry("m", "lora_B", (3, 2), 6)]
    rows = torch.randn(30, 12, generator=torch.Generator().manual_seed(0))
    rows[:, :6] = 0
    made = leading(fit_ekfac(lambda: [rows], layout, 0.1), Projection(width=6))
    assert made.chosen.tolist() == list(range(6, 12))
    assert made.share == pytest.approx(1.0)


def test_at_full_width_scores_are_those_of_ekfac(tmp_path: Path, model: Any, examples: list[dict[str, Any]]) -> None:
    full = replace(WHOLE, width=layout_width(gradient_layout(model, WHOLE)))
    made = fit_projection(model, examples, RowSpec.of(full), fit=SketchFit(damping=0.3, labels="data"))
    plain, fitted = (
        build_store(tmp_path / name, model, examples, RowSpec.of(projection, dtype="fp32"))
        for name, projection in (("plain", WHOLE), ("fitted", made))
    )
    asked = make_examples(5, seed=9)
    for name in ("ekfac", "ekfac_cosine", "default"):
        matrices = []
        for store in (plain, fitted):
            queries = per_example_gradients(model, asked, projection=store.projection)
            matrices.append(Scorer.fit(store, preconditioner=name, damping=0.3, fisher="data").matrix(queries))
        assert np.linalg.norm(matrices[1] - matrices[0]) < 1e-4 * np.linalg.norm(matrices[0])


def test_on_rows_that_it_was_not_fitted_on_it_agrees_better_than_a_random_sketch(
    model: Any, examples: list[dict[str, Any]]
) -> None:
    half, others = replace(WHOLE, width=336), make_examples(24, seed=4)
    whole = per_example_gradients(model, examples, projection=WHOLE)
    fitted = fit_ekfac(lambda: [whole], gradient_layout(model, WHOLE), 0.1)
    white = fitted.whiten(per_example_gradients(model, others, projection=WHOLE))
    truth = torch.nn.functional.normalize(white, dim=1)
    found = {}
    for name, projection in (("eigen", fit_projection(model, examples, RowSpec.of(half))), ("random", half)):
        rows = per_example_gradients(model, others, projection=projection)
        unit = torch.nn.functional.normalize(rows.double(), dim=1)
        off = ~torch.eye(len(unit), dtype=torch.bool)
        found[name] = spearman((unit @ unit.T)[off].numpy(), (truth @ truth.T)[off].numpy())
    assert found["eigen"] > found["random"] + 0.1


@pytest.mark.parametrize("kind", ["one_sided", "kron"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_row_does_not_depend_on_its_batch(tiny_lora: Callable[..., Any], kind: str, dtype: torch.dtype) -> None:
    model, examples = tiny_lora("qwen2", dtype), make_examples(12)
    fitted = fit_projection(model, examples, RowSpec.of(Projection(kind, dim=6, width=30)))
    whole = per_example_gradients(model, examples, projection=fitted)
    assert whole.shape == (12, 30)
    assert whole.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    alone = torch.cat([per_example_gradients(model, [e], projection=fitted) for e in examples[::-1]])
    assert error(alone.flip(0), whole) < (2e-2 if dtype == torch.bfloat16 else 1e-5)


# ---- fitting -------------------------------------------------------------------------------------------------------


def test_the_sample_is_drawn_from_the_data_and_no_larger(model: Any, examples: list[dict[str, Any]]) -> None:
    seen: list[str] = []

    def watched(model: Any, given: Any, spec: RowSpec) -> Any:
        seen.extend(example["id"] for example in given)
        return iter_gradient_rows(model, given, spec)

    fit_projection(model, examples, RowSpec.of(NARROW, sketch_examples=7), fit=SketchFit(gradients=watched))
    assert len(seen) == len(set(seen)) == 7
    assert seen != [example["id"] for example in examples[:7]]
    again = list(seen)
    seen.clear()
    fit_projection(model, examples, RowSpec.of(NARROW, sketch_examples=7), fit=SketchFit(gradients=watched))
    assert seen == again


@pytest.mark.parametrize("damping", ["auto", 0.1])
def test_rows_are_fitted_on_in_the_order_of_their_examples(
    model: Any, examples: list[dict[str, Any]], damping: Any
) -> None:
    """Which rows are held out follows from their order, and batches come by length."""

    def shuffled(model: Any, given: Any, spec: RowSpec) -> Any:
        rows = {
            place: row
            for places, batch in iter_gradient_rows(model, given, spec)
            for place, row in zip(places, batch, strict=True)
        }
        for place, row in sorted(rows.items(), reverse=True):
            yield [place], row[None]

    spec, fit = RowSpec.of(NARROW), SketchFit(damping=damping, labels="data")
    usual = fit_projection(model, examples, spec, fit=fit)
    assert usual.sketch is not None
    assert fit_projection(model, examples, spec, fit=replace(fit, gradients=shuffled)) == usual
    whole = per_example_gradients(model, examples, projection=WHOLE)
    by_hand = leading(fit_ekfac(lambda: [whole], gradient_layout(model, WHOLE), damping), NARROW)
    torch.testing.assert_close(usual.sketch.scale, by_hand.scale, rtol=1e-4, atol=0)
    picked = fit_ekfac(lambda: [whole], gradient_layout(model, WHOLE), damping).damping
    assert usual.sketch.purpose.get(sketch_fitting.PICKED) == (picked if damping == "auto" else None)


def test_texts_tokens_and_tokens_without_ids_give_one_sketch(
    tiny_lora: Callable[..., Any], tiny_tokenizer: Callable[..., Any]
) -> None:
    model, tokenizer = tiny_lora("qwen2"), tiny_tokenizer()
    texts = [Example(f"t{i}", f"what is {i}", f"The answer is {i}.") for i in range(9)]
    tokens = tokenize(texts, tokenizer).examples
    nameless = [{k: v for k, v in e.items() if k != "id"} for e in tokens]
    made = [fit_projection(model, data, RowSpec.of(NARROW), tokenizer=tokenizer) for data in (texts, tokens, nameless)]
    assert made[0] == made[1] == made[2]
    assert made[0] != NARROW


def test_examples_without_a_finite_gradient_are_left_out(
    model: Any, examples: list[dict[str, Any]], fitted: Projection
) -> None:
    nothing = torch.full((1, layout_width(gradient_layout(model, WHOLE))), torch.nan)

    def with_nan(model: Any, given: Any, spec: RowSpec) -> Any:
        yield [0], nothing
        yield from iter_gradient_rows(model, given, spec)

    assert fit_projection(model, examples, RowSpec.of(NARROW), fit=SketchFit(gradients=with_nan)) == fitted
    with pytest.raises(DataError, match="has a finite gradient"):
        fit_projection(
            model, examples, RowSpec.of(NARROW), fit=SketchFit(gradients=lambda *args, spec: [([0], nothing)])
        )


def test_what_cannot_be_fitted_is_refused(model: Any, examples: list[dict[str, Any]]) -> None:
    silent = [{**example, "labels": torch.full_like(example["labels"], -100)} for example in examples]
    for settings, kind, message in (
        ({"projection": WHOLE}, ConfigError, "needs the width"),
        ({"projection": Projection("sjlt", width=8)}, ConfigError, "'sjlt' is a random sketch itself"),
        ({"projection": replace(WHOLE, width=10**6)}, ConfigError, "more than the 672 numbers that a row has"),
        ({"projection": NARROW, "sketch_examples": 0}, ConfigError, "sketch_examples is 0; it must be at least 1"),
        ({"projection": NARROW, "damping": 0}, ConfigError, "damping must be above 0"),
        ({"projection": NARROW, "data": []}, DataError, "no example to fit"),
        ({"projection": NARROW, "data": silent}, DataError, "no completion token to learn from"),
    ):
        with pytest.raises(kind, match=message):
            fit_projection(model, **fitted_by(**{"data": examples, **settings}))


def test_another_model_or_projection_cannot_use_it(
    tiny_lora: Callable[..., Any], examples: list[dict[str, Any]], sketch: EigenSketch, fitted: Projection
) -> None:
    for other in ({"seed": 4}, {"width": 39}, {"kind": "sjlt"}, {"layers": 0.5}):
        with pytest.raises(ConfigError, match="fitted for Projection"):
            replace(NARROW, **other, sketch=sketch)
    with pytest.raises(ConfigError, match="another model's rows"):
        per_example_gradients(tiny_lora("qwen2", r=2), examples, projection=fitted)


# ---- on disk -------------------------------------------------------------------------------------------------------


def test_it_comes_back_from_disk_as_it_was(tmp_path: Path, fitted: Projection, examples: Any, model: Any) -> None:
    assert fitted.sketch is not None
    fitted.sketch.save(tmp_path)
    found = EigenSketch.load(the_file(tmp_path))
    assert found == fitted.sketch
    assert (found.share, found.purpose) == (fitted.sketch.share, fitted.sketch.purpose)
    rows = [per_example_gradients(model, examples, projection=p) for p in (fitted, replace(NARROW, sketch=found))]
    assert torch.equal(*rows)


def test_a_missing_or_damaged_file_is_named(tmp_path: Path, sketch: EigenSketch) -> None:
    path = tmp_path / file_of(sketch.fingerprint)
    with pytest.raises(StoreError, match=rf"{path.name} is missing"):
        EigenSketch.load(path)
    sketch.save(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    with pytest.raises(StoreError, match=rf"{path.name} is damaged"):
        EigenSketch.load(path)
    path.write_bytes(whole[:-9] + bytes(9))
    with pytest.raises(StoreError, match=rf"{path.name} is not what was written"):
        EigenSketch.load(path)


def built(path: Path, model: Any, examples: Any, projection: Projection = NARROW, **options: Any) -> Any:
    settings = {"dtype": "fp32", "shard_rows": 7, "progress": False} | options
    return build_store(path, model, examples, **built_by(projection=projection, **settings))


def test_a_store_keeps_it_and_checks_it(
    tmp_path: Path, model: Any, examples: list[dict[str, Any]], fitted: Projection
) -> None:
    store = built(tmp_path / "s", model, examples, fitted)
    assert store.projection == fitted != NARROW
    assert error(store.rows(), per_example_gradients(model, examples, projection=fitted)) < 1e-5
    assert verify_store(tmp_path / "s") == []
    open_store(tmp_path / "s", expect=identity_of(model, projection=fitted))
    with pytest.raises(StoreError, match="rows were made by the fitted sketch"):
        open_store(tmp_path / "s", expect={"projection": NARROW})
    with pytest.raises(StoreError, match="rows were made by the fitted sketch"):
        built(tmp_path / "s", model, examples)
    other = fit_projection(model, examples, RowSpec.of(NARROW, sketch_examples=9))
    with pytest.raises(StoreError, match="rows were made by the fitted sketch"):
        built(tmp_path / "s", model, examples, other)
    assert open_store(tmp_path / "s").projection == fitted
    random = built(tmp_path / "random", model, examples)
    assert random.projection == NARROW
    assert "projection_sketch" not in json.loads((tmp_path / "random" / "manifest.json").read_text())["identity"]


def test_a_lost_or_changed_file_of_a_store_shows_and_is_mended_by_building_again(
    tmp_path: Path, model: Any, examples: list[dict[str, Any]], fitted: Projection
) -> None:
    built(tmp_path, model, examples, fitted)
    path = the_file(tmp_path)
    with safe_open(path, framework="pt") as file:
        about, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    tensors["scale"][3] *= 1.001
    save_file(tensors, path, about)
    for _ in range(2):
        (said,) = verify_store(tmp_path)
        assert path.name in said
        with pytest.raises(StoreError, match="run the same build again, which fits it again"):
            open_store(tmp_path).projection  # noqa: B018
        path.unlink(missing_ok=True)
    built(tmp_path, model, examples, fitted)
    assert verify_store(tmp_path) == []


def test_scores_of_its_rows(tmp_path: Path, model: Any, examples: list[dict[str, Any]], fitted: Projection) -> None:
    store = built(tmp_path / "s", model, examples, fitted)
    queries = per_example_gradients(model, make_examples(4, seed=5), projection=store.projection)
    rows = store.rows().double()
    dot = rows @ queries.double().T
    cosine = dot / rows.norm(dim=1, keepdim=True) / queries.double().norm(dim=1)
    for name, expected in (("default", cosine), ("ekfac_cosine", cosine), ("ekfac", dot)):
        table = Scorer.fit(store, preconditioner=name, fisher="data").scores(queries, {"all": range(4)})
        assert np.allclose(table.columns["s_all"], expected.mean(dim=1).numpy(), rtol=1e-4, atol=1e-6)
    for name in ("none", "cosine", "fisher", "adam"):
        with pytest.raises(ConfigError, match=f"cannot be scored by '{name}'"):
            Scorer.fit(store, preconditioner=name, fisher="data").matrix(queries)


def test_merged_and_appended_stores_keep_it(
    tmp_path: Path, model: Any, examples: list[dict[str, Any]], fitted: Projection
) -> None:
    whole = built(tmp_path / "whole", model, examples, fitted)
    spec = RowSpec.of(fitted, dtype="fp32")
    for rank in range(2):
        options = BuildOptions(shard_rows=7, progress=False, part=(rank, 2))
        build_shards(tmp_path / f"part{rank}", model, examples, spec, options=options)
    merged = merge_stores([tmp_path / "part0", tmp_path / "part1"], tmp_path / "merged")
    assert torch.equal(merged.rows(), whole.rows())
    assert merged.projection == fitted
    assert verify_store(tmp_path / "merged") == []
    more = built(tmp_path / "more", model, make_examples(5, seed=7), open_store(tmp_path / "whole").projection)
    assert len(append_store(tmp_path / "merged", tmp_path / "more")) == len(whole) + len(more)
    built(tmp_path / "foreign", model, make_examples(5, seed=8))
    with pytest.raises(StoreError, match="a random sketch or none"):
        merge_stores([tmp_path / "whole", tmp_path / "foreign"], tmp_path / "out")


def test_a_merge_that_is_refused_changes_nothing(
    tmp_path: Path, model: Any, examples: list[dict[str, Any]], fitted: Projection
) -> None:
    built(tmp_path / "a", model, examples, fitted)
    other = fit_projection(model, examples, RowSpec.of(NARROW, sketch_examples=9))
    built(tmp_path / "b", model, examples, other)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "notes.txt").touch()
    for target in ("b", "notes"):
        before = sorted((tmp_path / target).iterdir())
        with pytest.raises(StoreError):
            merge_stores([tmp_path / "a"], tmp_path / target)
        with pytest.raises(StoreError):
            fit_projection(model, examples, RowSpec.of(NARROW), fit=SketchFit(damping=0.7), folder=tmp_path / target)
        assert sorted((tmp_path / target).iterdir()) == before
    assert verify_store(tmp_path / "b") == []


# ---- again, after an interruption ----------------------------------------------------------------------------------


@pytest.fixture
def no_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **options: Any) -> Any:
        raise AssertionError("gradients were computed")

    monkeypatch.setattr(sketch_fitting, "iter_gradient_rows", refuse)


def test_what_was_fitted_for_the_same_is_not_fitted_again(
    tmp_path: Path, model: Any, examples: list[dict[str, Any]], fitted: Projection, no_gradients: None
) -> None:
    assert fitted.sketch is not None
    fitted.sketch.save(tmp_path)  # by a build that was killed before its manifest
    assert fit_projection(model, examples, RowSpec.of(NARROW), fit=SketchFit(damping=0.1), folder=tmp_path) == fitted
    for other in ({"damping": 0.5}, {"sketch_examples": 5}, {"projection": replace(NARROW, width=39)}):
        with pytest.raises(AssertionError, match="gradients were computed"):  # no store stands on it yet
            fit_projection(model, examples, **fitted_by(**{"projection": NARROW, "folder": tmp_path, **other}))
    the_file(tmp_path).write_bytes(b"torn")
    with pytest.raises(AssertionError, match="gradients were computed"):
        fit_projection(model, examples, RowSpec.of(NARROW), folder=tmp_path)


def test_the_base_model_counts(
    tmp_path: Path, tiny_lora: Callable[..., Any], examples: list[dict[str, Any]], fitted: Projection
) -> None:
    model = tiny_lora("qwen2")
    assert fit_projection(model, examples, RowSpec.of(NARROW), folder=tmp_path) == fitted
    with torch.no_grad():
        model.get_base_model().model.norm.weight += 0.5
    assert fit_projection(model, examples, RowSpec.of(NARROW), folder=tmp_path) != fitted


def test_one_that_a_store_stands_on_is_not_fitted_anew(
    tmp_path: Path, model: Any, examples: list[dict[str, Any]], fitted: Projection, no_gradients: None
) -> None:
    built(tmp_path / "s", model, examples, fitted)
    assert (
        fit_projection(model, examples, RowSpec.of(NARROW), fit=SketchFit(damping=0.1), folder=tmp_path / "s") == fitted
    )
    with pytest.raises(StoreError, match=r"influence.damping\): 0.1 there and 0.5 here"):
        fit_projection(model, examples, RowSpec.of(NARROW), fit=SketchFit(damping=0.5), folder=tmp_path / "s")
    with pytest.raises(StoreError, match=r"another setting of sample: 24 examples, .* there and 5 examples"):
        fit_projection(model, examples, RowSpec.of(NARROW, sketch_examples=5), folder=tmp_path / "s")
    built(tmp_path / "random", model, examples)
    with pytest.raises(StoreError, match="its rows were made by a random sketch or none"):
        fit_projection(model, examples, RowSpec.of(NARROW), folder=tmp_path / "random")
    assert not list((tmp_path / "random").glob("sketch-*"))


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_bytes(b"torn")])
def test_one_that_a_store_stands_on_and_that_was_lost_is_fitted_again_and_taken_if_it_is_the_same(
    tmp_path: Path, model: Any, examples: list[dict[str, Any]], fitted: Projection, damage: Callable[[Path], None]
) -> None:
    built(tmp_path, model, examples, fitted)
    path = the_file(tmp_path)
    whole = path.read_bytes()
    damage(path)
    with pytest.raises(
        StoreError, match=rf"{path.name} is missing or damaged, and fitted again it comes out otherwise"
    ):
        fit_projection(model, examples, RowSpec.of(NARROW, sketch_examples=9), folder=tmp_path)
    assert fit_projection(model, examples, RowSpec.of(NARROW), folder=tmp_path) == fitted
    assert the_file(tmp_path).read_bytes() == whole
    assert verify_store(tmp_path) == []


def test_two_processes_that_fit_at_once_end_with_one_store(
    tmp_path: Path, model: Any, examples: list[dict[str, Any]]
) -> None:
    """Each with other bits, as another number of threads gives: the slower one takes what the store was built with."""
    first = fit_projection(model, examples, RowSpec.of(NARROW, max_tokens=64))

    def slower(model: Any, given: Any, spec: RowSpec) -> Any:
        rows = list(iter_gradient_rows(model, given, spec))
        built(tmp_path, model, examples, first)
        for places, batch in rows:
            yield places, batch * (1 + 1e-6)

    assert first.sketch is not None
    first.sketch.save(tmp_path)
    (tmp_path / file_of(first.sketch.fingerprint)).unlink()  # not there yet when the slower one looks
    found = fit_projection(model, examples, RowSpec.of(NARROW), fit=SketchFit(gradients=slower), folder=tmp_path)
    assert found == first == open_store(tmp_path).projection
    assert verify_store(tmp_path) == []


def test_a_build_that_stopped_before_its_manifest_starts_anew(
    tmp_path: Path, tiny_lora: Callable[..., Any], model: Any, examples: list[dict[str, Any]]
) -> None:
    fit_projection(tiny_lora("qwen2", seed=5), examples, RowSpec.of(NARROW), folder=tmp_path / "s")  # then killed
    made = fit_projection(model, examples, RowSpec.of(NARROW), folder=tmp_path / "s")
    assert len(list((tmp_path / "s").glob("sketch-*"))) == 2
    store = built(tmp_path / "s", model, examples, made)
    assert the_file(tmp_path / "s").name == file_of(store.identity.projection_sketch)  # the other was swept
    assert torch.equal(store.rows(), built(tmp_path / "whole", model, examples, made).rows())


# ---- settings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gradients", "preconditioner", "fits"),
    [
        ({}, "default", False),
        ({"width": 64}, "default", True),
        ({"width": 64}, "ekfac", True),
        ({"width": 64, "kind": "kron"}, "ekfac_cosine", True),
        ({"width": 64}, "cosine", False),
        ({"width": 64}, "fisher", False),
        ({"width": 64, "kind": "sjlt"}, "default", False),
        ({"width": 64, "sketch": "random"}, "default", False),
        ({"width": 64, "sketch": "eigen"}, "default", True),
        ({"kind": "none"}, "default", False),
    ],
)
def test_when_a_sketch_is_fitted(gradients: dict[str, Any], preconditioner: str, fits: bool) -> None:
    config = RowSpec(**gradients)
    recipe = Recipe.of(config, InfluenceConfig(preconditioner=preconditioner))
    recipe.check()
    assert recipe.fits_sketch is fits


@pytest.mark.parametrize(
    ("gradients", "influence", "message"),
    [
        ({"sketch": "eigen"}, {}, "RowSpec.sketch: a fitted sketch needs the width"),
        ({"sketch": "eigen", "kind": "sjlt", "width": 9}, {}, "RowSpec.sketch: .*random sketch itself"),
        ({"sketch": "eigne", "width": 9}, {}, "is no store's folder; did you mean 'eigen'"),
        ({"width": 9, "sketch_examples": 0}, {}, "sketch_examples is 0; it must be at least 1"),
        ({"kind": "none", "width": 9}, {}, "'none' keeps whole gradients of all layers: leave out RowSpec.width"),
        ({"kind": "none", "sketch": "eigen"}, {}, "RowSpec.sketch: exact rows have no sketch"),
        ({"kind": "one_side"}, {}, "did you mean 'one_sided'"),
        ({"width": 9, "sketch": "random"}, {"preconditioner": "ekfac"}, "random sketch to gradients.width mixes"),
        ({"width": 9, "sketch": "eigen"}, {"preconditioner": "adam"}, "cannot be scored by 'adam'"),
        ({"width": 9, "sketch": "eigen"}, {"preconditioner": "cosine"}, "cannot be scored by 'cosine'"),
    ],
)
def test_settings_that_do_not_fit_together(gradients: Any, influence: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Recipe.of(RowSpec(**gradients), InfluenceConfig(**influence)).check()


def test_short_rows_are_left_as_they_are_and_a_store_lends_its_sketch(
    tmp_path: Path, model: Any, examples: list[dict[str, Any]], fitted: Projection
) -> None:
    def settled(projection: Projection | None, sketch: str, preconditioner: str = "default", fit: Any = None) -> Any:
        def refuse(spec: RowSpec) -> Projection:
            raise AssertionError("fitted")

        spec = RowSpec.of(projection) if projection is None else replace(RowSpec.of(projection), sketch=sketch)
        found = resolved(spec, preconditioner, model, fit or refuse)
        assert found.is_settled
        return found.projection()

    def width(wide: int, sketch: str, preconditioner: str) -> int:
        return width_of(replace(RowSpec.of(WHOLE), width=wide, sketch=sketch), preconditioner, model)

    assert settled(NARROW, "auto", fit=lambda spec: fit_projection(model, examples, spec)) == fitted
    for wide in (672, 8192):
        assert settled(replace(WHOLE, width=wide), "auto") == WHOLE
        assert width(wide, "auto", "default") == 672
        assert width(wide, "auto", "cosine") == wide
        assert width(wide, "random", "default") == wide
    assert settled(NARROW, "random") == NARROW
    assert settled(NARROW, "auto", "cosine") == NARROW
    assert settled(None, "auto") is None
    built(tmp_path / "s", model, examples, fitted)
    assert settled(NARROW, str(tmp_path / "s")) == fitted
    with pytest.raises(ConfigError, match="not of a sketch fitted for"):
        settled(replace(NARROW, width=39), str(tmp_path / "s"))
    built(tmp_path / "random", model, examples)
    with pytest.raises(ConfigError, match="not of a sketch fitted for"):
        settled(NARROW, str(tmp_path / "random"))
