"""A sketch fitted to the data: the leading coordinates of ekfac's H^-1/2, alone, in rows, and in a store."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from influence_fast import sketch_fitting
from influence_fast.building import build_shards, build_store, identity_of
from influence_fast.config import GradientConfig, InfluenceConfig, check_influence
from influence_fast.eigen_sketch import EigenRows, EigenSketch, kept_sketch
from influence_fast.ekfac import fit_ekfac
from influence_fast.errors import ConfigError, DataError, StoreError
from influence_fast.gradients import iter_gradient_rows, per_example_gradients
from influence_fast.lora import LayoutEntry, gradient_layout, layout_width
from influence_fast.projection import Projection
from influence_fast.scoring import influence_matrix, influence_scores, spearman
from influence_fast.sketch_fitting import fit_eigen_sketch, leading
from influence_fast.store import open_store, verify_store
from influence_fast.store_manifest import RESTORE, SKETCH_NAME
from influence_fast.store_merge import append_store, merge_stores

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
def sketch(model: Any, examples: list[dict[str, Any]]) -> EigenSketch:
    return fit_eigen_sketch(model, examples, projection=NARROW)


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
    width = layout_width(gradient_layout(model, WHOLE))
    full = replace(WHOLE, width=width)
    made = fit_eigen_sketch(model, examples, projection=full, damping=0.3)
    options: dict[str, Any] = {"dtype": "fp32", "progress": False}
    plain = build_store(tmp_path / "plain", model, None, examples, projection=WHOLE, **options)
    fitted = build_store(tmp_path / "fitted", model, None, examples, projection=full, sketch=made, **options)
    asked = make_examples(5, seed=9)
    for name in ("ekfac", "ekfac_cosine", "default"):
        matrices = []
        for store in (plain, fitted):
            queries = per_example_gradients(model, asked, projection=store.projection, sketch=store.sketch)
            matrices.append(influence_matrix(store, queries, preconditioner=name, damping=0.3))
        assert np.linalg.norm(matrices[1] - matrices[0]) < 1e-4 * np.linalg.norm(matrices[0])


def test_a_narrow_one_agrees_better_than_a_random_sketch(model: Any, examples: list[dict[str, Any]]) -> None:
    whole = per_example_gradients(model, examples, projection=WHOLE)
    fitted = fit_ekfac(lambda: [whole], gradient_layout(model, WHOLE), 0.1)
    truth = torch.nn.functional.normalize(fitted.whiten(whole), dim=1)
    found, half = {}, replace(WHOLE, width=336)
    for name, made in (("eigen", fit_eigen_sketch(model, examples, projection=half)), ("random", None)):
        rows = per_example_gradients(model, examples, projection=half, sketch=made)
        unit = torch.nn.functional.normalize(rows.double(), dim=1)
        off = ~torch.eye(len(unit), dtype=torch.bool)
        found[name] = spearman((unit @ unit.T)[off].numpy(), (truth @ truth.T)[off].numpy())
    assert found["eigen"] > found["random"] + 0.1


@pytest.mark.parametrize("kind", ["one_sided", "kron"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_row_does_not_depend_on_its_batch(tiny_lora: Callable[..., Any], kind: str, dtype: torch.dtype) -> None:
    model, examples = tiny_lora("qwen2", dtype), make_examples(12)
    projection = Projection(kind, dim=6, width=30)
    made = fit_eigen_sketch(model, examples, projection=projection)
    whole = per_example_gradients(model, examples, projection=projection, sketch=made)
    assert whole.shape == (12, 30)
    assert whole.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    alone = torch.cat([per_example_gradients(model, [e], projection=projection, sketch=made) for e in examples[::-1]])
    assert error(alone.flip(0), whole) < (2e-2 if dtype == torch.bfloat16 else 1e-5)


# ---- fitting -------------------------------------------------------------------------------------------------------


def test_the_sample_is_drawn_from_the_data_and_no_larger(model: Any, examples: list[dict[str, Any]]) -> None:
    seen: list[str] = []

    def watched(model: Any, given: Any, **options: Any) -> Any:
        seen.extend(example["id"] for example in given)
        return iter_gradient_rows(model, given, **options)

    fit_eigen_sketch(model, examples, projection=NARROW, examples=7, gradients=watched)
    assert len(seen) == len(set(seen)) == 7
    assert seen != [example["id"] for example in examples[:7]]
    again = list(seen)
    seen.clear()
    fit_eigen_sketch(model, examples, projection=NARROW, examples=7, gradients=watched)
    assert seen == again


def test_texts_and_tokens_give_one_sketch(tiny_lora: Callable[..., Any], tiny_tokenizer: Callable[..., Any]) -> None:
    from influence_fast.data import Example, tokenize

    model, tokenizer = tiny_lora("qwen2"), tiny_tokenizer()
    texts = [Example(f"t{i}", f"what is {i}", f"The answer is {i}.") for i in range(9)]
    tokens = tokenize(texts, tokenizer).examples
    made = [
        fit_eigen_sketch(model, data, tokenizer, projection=NARROW, examples=9).fingerprint for data in (texts, tokens)
    ]
    assert made[0] == made[1]


def test_examples_without_a_finite_gradient_are_left_out(
    model: Any, examples: list[dict[str, Any]], sketch: EigenSketch
) -> None:
    def with_nan(model: Any, given: Any, **options: Any) -> Any:
        yield [0], torch.full((1, layout_width(gradient_layout(model, WHOLE))), torch.nan)
        yield from iter_gradient_rows(model, given, **options)

    found = fit_eigen_sketch(model, examples, projection=NARROW, gradients=with_nan)
    assert torch.equal(found.chosen, sketch.chosen)

    def nothing_else(model: Any, given: Any, **options: Any) -> Any:
        yield [0], torch.full((1, layout_width(gradient_layout(model, WHOLE))), torch.nan)

    with pytest.raises(DataError, match="has a finite gradient"):
        fit_eigen_sketch(model, examples, projection=NARROW, gradients=nothing_else)


def test_what_cannot_be_fitted_is_refused(model: Any, examples: list[dict[str, Any]]) -> None:
    silent = [{**example, "labels": torch.full_like(example["labels"], -100)} for example in examples]
    for settings, kind, message in (
        ({"projection": WHOLE}, ConfigError, "needs the width"),
        ({"projection": Projection("sjlt", width=8)}, ConfigError, "'sjlt' is a random sketch itself"),
        ({"projection": replace(WHOLE, width=10**6)}, ConfigError, "more than the 672 numbers that a row has"),
        ({"projection": NARROW, "examples": 0}, ConfigError, "at least one example"),
        ({"projection": NARROW, "damping": 0}, ConfigError, "damping must be above 0"),
        ({"projection": NARROW, "dataset": []}, DataError, "no example to fit"),
        ({"projection": NARROW, "dataset": silent}, DataError, "no completion token to learn from"),
    ):
        with pytest.raises(kind, match=message):
            fit_eigen_sketch(model, **{"dataset": examples, **settings})


def test_another_model_or_projection_cannot_use_it(
    tiny_lora: Callable[..., Any], model: Any, examples: list[dict[str, Any]], sketch: EigenSketch
) -> None:
    with pytest.raises(ConfigError, match="fitted for Projection"):
        per_example_gradients(model, examples, projection=replace(NARROW, seed=4), sketch=sketch)
    for projection in (WHOLE, None, Projection("sjlt", width=40)):
        with pytest.raises(ConfigError, match="fitted for Projection"):
            per_example_gradients(model, examples, projection=projection, sketch=sketch)
    with pytest.raises(ConfigError, match="another model's rows"):
        per_example_gradients(tiny_lora("qwen2", r=2), examples, projection=NARROW, sketch=sketch)


# ---- on disk -------------------------------------------------------------------------------------------------------


def test_it_comes_back_from_disk_as_it_was(tmp_path: Path, sketch: EigenSketch, examples: Any, model: Any) -> None:
    sketch.save(tmp_path)
    found = EigenSketch.load(tmp_path)
    assert found.fingerprint == sketch.fingerprint
    assert (found.share, found.purpose, found.projection) == (sketch.share, sketch.purpose, sketch.projection)
    rows = [per_example_gradients(model, examples, projection=NARROW, sketch=s) for s in (found, sketch)]
    assert torch.equal(*rows)


def test_a_missing_or_damaged_file_is_named(tmp_path: Path, sketch: EigenSketch) -> None:
    with pytest.raises(StoreError, match=rf"{SKETCH_NAME} is missing"):
        EigenSketch.load(tmp_path)
    sketch.save(tmp_path)
    path = tmp_path / SKETCH_NAME
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(StoreError, match=rf"{SKETCH_NAME} is damaged"):
        EigenSketch.load(tmp_path)


def built(path: Path, model: Any, examples: Any, sketch: Any, **options: Any) -> Any:
    settings = {"projection": NARROW, "dtype": "fp32", "shard_rows": 7, "progress": False} | options
    return build_store(path, model, None, examples, sketch=sketch, **settings)


def test_a_store_keeps_it_and_checks_it(
    tmp_path: Path, model: Any, examples: list[dict[str, Any]], sketch: EigenSketch
) -> None:
    store = built(tmp_path / "s", model, examples, sketch)
    assert store.sketch is not None
    assert store.sketch.fingerprint == sketch.fingerprint == store.identity.projection_sketch
    assert error(store.rows(), per_example_gradients(model, examples, projection=NARROW, sketch=sketch)) < 1e-5
    assert verify_store(tmp_path / "s") == []
    open_store(tmp_path / "s", expect=identity_of(model, projection=NARROW, sketch=sketch))
    with pytest.raises(StoreError, match="rows were made by the fitted sketch"):
        open_store(tmp_path / "s", expect={"projection": NARROW})
    with pytest.raises(StoreError, match="rows were made by the fitted sketch"):
        built(tmp_path / "s", model, examples, None)  # a random one
    other = fit_eigen_sketch(model, examples, projection=NARROW, examples=9)
    with pytest.raises(StoreError, match="rows were made by the fitted sketch"):
        built(tmp_path / "s", model, examples, other)
    assert open_store(tmp_path / "s").sketch.fingerprint == sketch.fingerprint  # type: ignore[union-attr]
    other.save(tmp_path / "s")
    assert verify_store(tmp_path / "s") == [
        f"{tmp_path / 's' / SKETCH_NAME} is not the one that the rows were made by; {RESTORE}"
    ]
    (tmp_path / "s" / SKETCH_NAME).unlink()
    with pytest.raises(StoreError, match="is missing"):
        open_store(tmp_path / "s").sketch  # noqa: B018
    random = built(tmp_path / "random", model, examples, None)
    assert random.sketch is None
    assert "projection_sketch" not in json.loads((tmp_path / "random" / "manifest.json").read_text())["identity"]


def test_scores_of_its_rows(tmp_path: Path, model: Any, examples: list[dict[str, Any]], sketch: EigenSketch) -> None:
    store = built(tmp_path / "s", model, examples, sketch)
    queries = per_example_gradients(model, make_examples(4, seed=5), projection=NARROW, sketch=store.sketch)
    rows = store.rows().double()
    dot = rows @ queries.double().T
    cosine = dot / rows.norm(dim=1, keepdim=True) / queries.double().norm(dim=1)
    for name, expected in (("default", cosine), ("ekfac_cosine", cosine), ("ekfac", dot), ("none", dot)):
        table = influence_scores(store, queries, {"all": range(4)}, preconditioner=name)
        assert np.allclose(table.columns["s_all"], expected.mean(dim=1).numpy(), rtol=1e-4, atol=1e-6)
    assert np.isfinite(influence_matrix(store, queries, preconditioner="fisher")).all()
    with pytest.raises(ConfigError, match="an optimizer has no moments"):
        influence_matrix(store, queries, preconditioner="adam", moments=torch.ones(40))


def test_merged_and_appended_stores_keep_it(
    tmp_path: Path, model: Any, examples: list[dict[str, Any]], sketch: EigenSketch
) -> None:
    whole = built(tmp_path / "whole", model, examples, sketch)
    options: dict[str, Any] = {"projection": NARROW, "dtype": "fp32", "shard_rows": 7, "progress": False}
    for rank in range(2):
        build_shards(tmp_path / f"part{rank}", model, None, examples, sketch=sketch, part=(rank, 2), **options)
    merged = merge_stores([tmp_path / "part0", tmp_path / "part1"], tmp_path / "merged")
    assert torch.equal(merged.rows(), whole.rows())
    assert merged.sketch is not None
    assert verify_store(tmp_path / "merged") == []
    more = built(tmp_path / "more", model, make_examples(5, seed=7), sketch)
    assert len(append_store(tmp_path / "merged", tmp_path / "more")) == len(whole) + len(more)
    foreign = built(tmp_path / "foreign", model, make_examples(5, seed=8), None)
    assert len(foreign) == 5
    with pytest.raises(StoreError, match="a random sketch or none"):
        merge_stores([tmp_path / "whole", tmp_path / "foreign"], tmp_path / "out")


# ---- again, after an interruption ----------------------------------------------------------------------------------


def test_what_was_fitted_for_the_same_is_not_fitted_again(
    tmp_path: Path, model: Any, examples: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = fit_eigen_sketch(model, examples, projection=NARROW, folder=tmp_path)

    def refuse(*args: Any, **options: Any) -> Any:
        raise AssertionError("gradients were computed again")

    monkeypatch.setattr(sketch_fitting, "iter_gradient_rows", refuse)
    assert fit_eigen_sketch(model, examples, projection=NARROW, folder=tmp_path).fingerprint == first.fingerprint
    for other in ({"damping": 0.5}, {"examples": 5}, {"projection": replace(NARROW, width=39)}):
        with pytest.raises(AssertionError, match="computed again"):  # no store stands on it yet
            fit_eigen_sketch(model, examples, **{"projection": NARROW, "folder": tmp_path, **other})


def test_one_that_a_store_stands_on_is_not_replaced(tmp_path: Path, model: Any, examples: list[dict[str, Any]]) -> None:
    made = fit_eigen_sketch(model, examples, projection=NARROW, folder=tmp_path)
    built(tmp_path, model, examples, made)
    assert kept_sketch(tmp_path, made.purpose) is not None
    with pytest.raises(StoreError, match="a sketch that was fitted with another"):
        fit_eigen_sketch(model, examples, projection=NARROW, damping=0.5, folder=tmp_path)


def test_a_build_that_stopped_before_its_manifest_starts_anew(
    tmp_path: Path, tiny_lora: Callable[..., Any], model: Any, examples: list[dict[str, Any]]
) -> None:
    fit_eigen_sketch(tiny_lora("qwen2", seed=5), examples, projection=NARROW, folder=tmp_path / "s")  # then killed
    made = fit_eigen_sketch(model, examples, projection=NARROW, folder=tmp_path / "s")
    store = built(tmp_path / "s", model, examples, made)
    whole = built(tmp_path / "whole", model, examples, made)
    assert torch.equal(store.rows(), whole.rows())
    shutil.rmtree(tmp_path / "s")
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "notes.txt").touch()
    with pytest.raises(StoreError, match="not empty and not a store"):
        built(tmp_path / "s", model, examples, made)


def test_numbers_changed_on_disk_show(tmp_path: Path, sketch: EigenSketch, model: Any, examples: Any) -> None:
    built(tmp_path, model, examples, sketch)
    path = tmp_path / SKETCH_NAME
    with safe_open(path, framework="pt") as file:
        about, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    tensors["scale"][3] *= 1.001
    save_file(tensors, path, about)
    assert len(verify_store(tmp_path)) == 1
    with pytest.raises(StoreError, match="not the one that the rows were made by"):
        open_store(tmp_path).sketch  # noqa: B018


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
        ({"width": 64, "sketch": "eigen"}, "fisher", True),
    ],
)
def test_when_a_sketch_is_fitted(gradients: dict[str, Any], preconditioner: str, fits: bool) -> None:
    config = GradientConfig(**gradients)
    check_influence(InfluenceConfig(preconditioner=preconditioner), config)
    assert config.fits_sketch(preconditioner) is fits


@pytest.mark.parametrize(
    ("gradients", "influence", "message"),
    [
        ({"sketch": "eigen"}, {}, "gradients.sketch: a fitted sketch needs the width"),
        ({"sketch": "eigen", "kind": "sjlt", "width": 9}, {}, "gradients.sketch: .*random sketch itself"),
        ({"sketch": "eigne", "width": 9}, {}, "did you mean 'eigen'"),
        ({"width": 9, "sketch_examples": 0}, {}, "sketch_examples must be at least 1"),
        ({"width": 9, "sketch": "random"}, {"preconditioner": "ekfac"}, "random sketch to gradients.width mixes"),
        ({"width": 9, "sketch": "eigen"}, {"preconditioner": "adam", "optimizer": "x"}, "gradients.sketch: random"),
    ],
)
def test_settings_that_do_not_fit_together(gradients: Any, influence: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_influence(InfluenceConfig(**influence), GradientConfig(**gradients))
