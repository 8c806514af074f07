"""Labels drawn from the model: their distribution, what decides them, and the preconditioners fitted on them."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import influence_fast as inf
from influence_fast.errors import ConfigError, DataError, StoreError
from influence_fast.gradients import fisher_labels
from influence_fast.gradients.fisher_labels import sample_labels
from influence_fast.gradients.model import loss
from influence_fast.gradients.model.loss import drawn_tokens
from influence_fast.gradients.per_example import per_example_losses
from influence_fast.gradients.rows.projection import Projection
from influence_fast.gradients.rows.row_spec import RowSpec
from influence_fast.influence.fisher_rows import fisher_folders
from influence_fast.influence.pool_gradients import pool_gradients
from influence_fast.influence.preconditioners import fit
from influence_fast.influence.recipe import Recipe
from influence_fast.influence.row_access import blocks_of, factors_of
from influence_fast.influence.scorer import Scorer
from influence_fast.influence.settings import InfluenceConfig
from influence_fast.influence.sketch_fitting import SketchFit, fit_projection


def make_examples(count: int = 9, seed: int = 0) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for i, n in enumerate(torch.randint(3, 30, (count,), generator=generator).tolist()):
        ids = torch.randint(0, 90, (n,), generator=generator)
        labels = torch.where(torch.arange(n) < n // 3, -100, ids)
        examples.append({"id": f"{seed}-{i}", "input_ids": ids, "labels": labels, "more": i})
    return examples


def labels_of(examples: list[dict[str, Any]]) -> dict[str, list[int]]:
    return {example["id"]: example["labels"].tolist() for example in examples}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_tokens_are_drawn_as_often_as_the_model_predicts_them(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss, "tokens_at_once", lambda *_: 999)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 3, generator=generator).to(dtype)
    weight, bias = torch.randn(7, 3, generator=generator).to(dtype), torch.randn(7, generator=generator).to(dtype)
    count = 20_000
    uniform = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    drawn = drawn_tokens(hidden.expand(count, 3), weight, bias, uniform)
    share = torch.bincount(drawn, minlength=7).double() / count
    wanted = torch.softmax((hidden @ weight.T + bias).double(), dim=1)[0]
    assert float((share - wanted).abs().max()) < (2e-3 if dtype == torch.bfloat16 else 2e-4)
    never = bias.clone()
    never[[0, 6]] = -2000.0  # tokens of no probability, at both ends
    ends = torch.tensor([0.0, 1 - 2**-40], dtype=torch.float64)
    assert drawn_tokens(hidden.expand(2, 3), weight, never, ends).tolist() == [1, 5]


def test_what_decides_a_draw(tiny_lora: Callable[..., Any]) -> None:
    model, examples = tiny_lora(), make_examples()
    before = labels_of(examples)
    drawn = sample_labels(model, examples)
    assert labels_of(examples) == before
    for one, other in zip(examples, drawn, strict=True):
        assert torch.equal(one["input_ids"], other["input_ids"])
        assert other["more"] == one["more"]
        assert torch.equal(one["labels"] == -100, other["labels"] == -100)
        assert other["labels"].dtype == one["labels"].dtype
    found = labels_of(drawn)
    assert found != before
    assert labels_of(sample_labels(model, examples, max_tokens=1)) == found
    assert labels_of(sample_labels(model, examples[::-1][:4])).items() <= found.items()
    assert labels_of(sample_labels(model, examples, seed=1)) != found
    renamed = sample_labels(model, [{**example, "id": f"x{example['id']}"} for example in examples])
    assert list(labels_of(renamed).values()) == list(found.values())


def test_a_first_label_that_counts_for_nothing_is_left_as_it_is(tiny_lora: Callable[..., Any]) -> None:
    ids = torch.arange(5, 12)
    (drawn,) = sample_labels(tiny_lora(), [{"id": "a", "input_ids": ids, "labels": ids}])
    assert int(drawn["labels"][0]) == 5


def test_second_moments_are_the_fisher_information(
    tiny_lora: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one token after a prompt: the sum over the whole vocabulary against many draws."""
    numbers = iter(torch.rand(4000, 1, generator=torch.Generator().manual_seed(3), dtype=torch.float64))
    monkeypatch.setattr(fisher_labels, "_uniform", lambda *_: next(numbers))
    model, projection = tiny_lora(vocab_size=24), Projection(dim=2)
    prompt = torch.tensor([3, 1, 4, 1])
    every = [
        {"id": str(c), "input_ids": torch.cat([prompt, torch.tensor([9])]), "labels": torch.tensor([-100] * 4 + [c])}
        for c in range(24)
    ]
    rows = inf.per_example_gradients(model, every, projection=projection).double()
    chance = (-per_example_losses(model, every)).double().exp()
    assert abs(float(chance.sum()) - 1) < 1e-5
    exact = (rows * chance[:, None]).T @ rows
    asked = [{**every[0], "id": f"draw-{i}"} for i in range(4000)]
    drawn = sample_labels(model, asked)
    counts = torch.bincount(torch.tensor([int(example["labels"][-1]) for example in drawn]), minlength=24).double()
    sampled = (rows * (counts / 4000)[:, None]).T @ rows
    assert float((sampled - exact).norm() / exact.norm()) < 0.1
    assert float((counts / 4000 - chance).abs().max()) < 0.03


@pytest.mark.parametrize("name", ["ekfac", "ekfac_cosine", "fisher", "datainf", "default"])
def test_preconditioners_are_fitted_on_the_rows_that_are_given(
    tiny_lora: Callable[..., Any], tmp_path: Path, name: str
) -> None:
    model, pool, queries = tiny_lora(), make_examples(12), make_examples(3, 1)
    settings = RowSpec(dim=4, dtype="fp32")
    influence = InfluenceConfig(name, fisher_examples=7)
    seconds: dict[str, float] = {}
    made = pool_gradients(model, pool, queries, tmp_path / "s", settings, influence, seconds, progress=False)
    assert "fisher gradients" in seconds
    assert made.fisher is not None
    assert len(made.fisher) == 7
    by_id = {example["id"]: example for example in pool}
    drawn = sample_labels(model, [by_id[i] for i in made.fisher.ids])
    rows = inf.per_example_gradients(model, drawn, projection=settings.projection())
    assert torch.equal(made.fisher.rows(), rows)
    got = Scorer.fit(made.store, preconditioner=name, fisher=made.fisher).matrix(made.queries)
    applied = Recipe.of_store(made.store, influence).applied
    fitted = fit(applied, lambda: [rows], blocks_of(made.store), factors=factors_of(made.store))
    wanted = made.store.rows().double() @ fitted.apply(made.queries).double().T
    if name in ("ekfac_cosine", "default"):
        wanted /= fitted.row_norms(made.store.rows())[:, None]
    assert float((torch.from_numpy(got) - wanted).norm() / wanted.norm()) < 1e-3
    plain = torch.from_numpy(Scorer.fit(made.store, preconditioner=name, fisher="data").matrix(made.queries))
    assert float((plain - wanted).norm() / wanted.norm()) > 1e-2


@pytest.mark.parametrize(
    ("influence", "gradients"),
    [
        ({"preconditioner": "cosine"}, {}),
        ({"preconditioner": "adam"}, {}),
        ({"preconditioner": "ekfac", "fisher": "data"}, {}),
        ({}, {"width": 24}),  # of a fitted sketch
        ({}, {"width": 24, "sketch": "random"}),  # cosines of rows that have no blocks
    ],
)
def test_no_labels_are_drawn_where_nothing_reads_them(
    tiny_lora: Callable[..., Any], tmp_path: Path, influence: dict[str, Any], gradients: dict[str, Any]
) -> None:
    settings, how = RowSpec(dim=4, **gradients), InfluenceConfig(**influence)
    made = pool_gradients(tiny_lora(), make_examples(), make_examples(2, 1), tmp_path / "s", settings, how, {})
    assert made.fisher is None
    assert not fisher_folders(tmp_path / "s")


def test_rows_of_other_draws_or_settings_lie_beside_each_other(tiny_lora: Callable[..., Any], tmp_path: Path) -> None:
    model, queries = tiny_lora(), make_examples(2, 1)
    silent = {"id": "silent", "input_ids": torch.arange(4), "labels": torch.full((4,), -100)}
    pool = [*make_examples(), silent]  # which teaches nothing, and for which none are drawn
    asked = (model, pool, queries, tmp_path / "s")
    first = pool_gradients(*asked, RowSpec(dim=4), InfluenceConfig(fisher_examples=5), {}, progress=False)
    assert first.store.set_aside
    assert first.fisher is not None
    (folder,) = fisher_folders(tmp_path / "s")
    stamp = (folder / "manifest.json").stat().st_mtime_ns
    pool_gradients(*asked, RowSpec(dim=4), InfluenceConfig(fisher_examples=5), {}, progress=False)
    assert (folder / "manifest.json").stat().st_mtime_ns == stamp
    more = pool_gradients(*asked, RowSpec(dim=4), InfluenceConfig(fisher_examples=600), {}, progress=False)
    assert more.fisher is not None
    assert (len(first.fisher), len(more.fisher)) == (5, len(pool) - 1)
    assert len(fisher_folders(tmp_path / "s")) == 2
    shutil.rmtree(tmp_path / "s")
    wider = pool_gradients(*asked, RowSpec(dim=5), InfluenceConfig(fisher_examples=5), {}, progress=False)
    assert wider.fisher is not None
    assert wider.fisher.width > first.fisher.width


def test_a_store_keeps_its_shards_and_may_be_the_folder_one_is_in(
    tiny_lora: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, pool, queries = tiny_lora(), make_examples(), make_examples(2, 1)
    settings = RowSpec(dim=4)
    (tmp_path / "s").mkdir()
    built = inf.build_store(
        tmp_path / "s",
        model,
        pool,
        inf.RowSpec.of(settings.projection()),
        options=inf.BuildOptions(shard_rows=2, progress=False),
    )
    monkeypatch.chdir(tmp_path / "s")
    made = pool_gradients(model, pool, queries, Path(), settings, InfluenceConfig(), {}, progress=False)
    assert made.store.manifest == built.manifest
    assert made.fisher is not None
    assert len(fisher_folders(tmp_path / "s")) == len(fisher_folders(Path())) == 1
    (fisher_folders(Path())[0] / "manifest.json").unlink()
    with pytest.raises(StoreError, match="is made of what is at hand: it may be deleted"):
        pool_gradients(model, pool, queries, Path(), settings, InfluenceConfig(), {}, progress=False)


def test_what_is_no_tokens_or_no_store_is_named(tiny_lora: Callable[..., Any], tmp_path: Path) -> None:
    model, examples = tiny_lora(), make_examples()
    with pytest.raises(DataError, match=r"examples\[0\] is a str, not tokens"):
        sample_labels(model, ["hello"])  # type: ignore[list-item]
    store = inf.build_store(
        tmp_path / "s", model, examples, inf.RowSpec.of(Projection(dim=4)), options=inf.BuildOptions(progress=False)
    )
    with pytest.raises(ConfigError, match="fisher: unknown value 's'"):
        inf.Scorer.fit(store, fisher="s")
    with pytest.raises(ConfigError, match=r"fisher must be a store .*, not a int"):
        inf.Scorer.fit(store, fisher=3)  # type: ignore[arg-type]


def test_a_sketch_that_does_not_say_whose_labels_is_of_the_datas(tiny_lora: Callable[..., Any], tmp_path: Path) -> None:
    """As all were before labels were drawn: with a store, and of a build that was stopped before it had one."""
    model, examples, plain = tiny_lora(), make_examples(30), Projection(dim=4, width=40)
    made = fit_projection(model, examples, inf.RowSpec.of(plain), fit=SketchFit(labels="data"))
    assert made.sketch is not None
    older = {name: value for name, value in made.sketch.purpose.items() if name != "labels"}
    old = dataclasses.replace(made, sketch=dataclasses.replace(made.sketch, purpose=older))
    (tmp_path / "s").mkdir()
    assert old.sketch is not None
    old.sketch.save(tmp_path / "s")
    for _ in range(2):
        found = fit_projection(
            model, examples, inf.RowSpec.of(plain), fit=SketchFit(labels="data"), folder=tmp_path / "s"
        )
        assert found == old
        inf.build_store(
            tmp_path / "s", model, examples, inf.RowSpec.of(found), options=inf.BuildOptions(progress=False)
        )
    with pytest.raises(StoreError, match=r"another setting of labels .*: data there and model here"):
        fit_projection(model, examples, inf.RowSpec.of(plain), folder=tmp_path / "s")


def test_rows_of_another_adapter_or_projection_are_refused(tiny_lora: Callable[..., Any], tmp_path: Path) -> None:
    model, examples = tiny_lora(), make_examples()
    store = inf.build_store(
        tmp_path / "s", model, examples, inf.RowSpec.of(Projection(dim=4)), options=inf.BuildOptions(progress=False)
    )
    wrong = inf.build_store(
        tmp_path / "w", model, examples, inf.RowSpec.of(Projection(dim=5)), options=inf.BuildOptions(progress=False)
    )
    queries = inf.per_example_gradients(model, examples[:2], projection=Projection(dim=4))
    with pytest.raises(StoreError, match="projection_dim"):
        inf.Scorer.fit(store, preconditioner="ekfac", fisher=wrong).scores(queries, {"correct": [0]})
    inf.Scorer.fit(store, preconditioner="cosine", fisher=wrong).scores(queries, {"correct": [0]})  # reads none


def test_a_sketch_is_fitted_on_drawn_labels_unless_told_otherwise(
    tiny_lora: Callable[..., Any], tmp_path: Path
) -> None:
    model, examples = tiny_lora(), make_examples(30)
    plain = Projection(dim=4, width=40)
    drawn = fit_projection(model, examples, inf.RowSpec.of(plain))
    given = fit_projection(model, examples, inf.RowSpec.of(plain), fit=SketchFit(labels="data"))
    again = fit_projection(model, sample_labels(model, examples), inf.RowSpec.of(plain), fit=SketchFit(labels="data"))
    assert drawn.sketch is not None
    assert given.sketch is not None
    assert again.sketch is not None
    assert torch.equal(drawn.sketch.scale, again.sketch.scale)
    assert not torch.equal(drawn.sketch.scale, given.sketch.scale)
    fit_projection(model, examples, inf.RowSpec.of(plain), folder=tmp_path / "s")
    with pytest.raises(ConfigError, match="did you mean 'data'"):
        fit_projection(model, examples, inf.RowSpec.of(plain), fit=SketchFit(labels="date"))


def test_mistakes_in_settings_are_named() -> None:
    for settings, message in (
        ({"fisher": "modle"}, "influence.fisher: unknown value 'modle'; did you mean 'model'"),
        ({"fisher_examples": 0}, "influence.fisher_examples must be at least 1, not 0"),
        (
            {"fisher_examples": 5, "damping": "auto"},
            "'auto' needs at least 10 examples to be picked on, and is given 5",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            Recipe.of(RowSpec(), dataclasses.replace(InfluenceConfig(), **settings)).check()
