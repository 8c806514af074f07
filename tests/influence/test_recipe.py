"""The rules of which preconditioner, sketch and Fisher information go together, asked of their one place."""

from __future__ import annotations

from typing import Any

import pytest

from influence_fast.gradients.rows.layout import LayoutEntry
from influence_fast.gradients.rows.row_spec import RowSpec
from influence_fast.influence.preconditioners import PRECONDITIONERS, Identity, register
from influence_fast.influence.recipe import Recipe
from influence_fast.influence.settings import InfluenceConfig

LAYOUT = [LayoutEntry("m", "lora_A", (2, 5), 0), LayoutEntry("m", "lora_B", (5, 2), 10)]


@pytest.mark.parametrize(
    ("rows", "influence", "applied", "fitted", "fisher"),
    [
        # preconditioner, what is left of it for stored rows, examples beside the pool's, of these kept as rows
        ({}, {}, "ekfac_cosine", 1024, 1024),
        ({}, {"fisher": "data"}, "ekfac_cosine", 0, 0),
        ({}, {"preconditioner": "datainf", "fisher_examples": 7}, "datainf", 7, 7),
        ({}, {"preconditioner": "cosine"}, "cosine", 0, 0),
        ({}, {"preconditioner": "less"}, "less", 0, 0),
        ({"width": 9, "sketch": "eigen"}, {}, "cosine", 256, 0),
        ({"width": 9, "sketch": "eigen"}, {"preconditioner": "ekfac"}, "none", 256, 0),
        ({"width": 9, "sketch": "random"}, {}, "cosine", 0, 0),
        ({"width": 9, "sketch": "random"}, {"preconditioner": "fisher"}, "fisher", 1024, 1024),
        ({"width": 9, "kind": "sjlt"}, {}, "cosine", 0, 0),
        ({"width": 9, "sketch_examples": 5}, {}, "cosine", 5, 0),
    ],
)
def test_what_is_fitted_on_how_many(
    rows: dict[str, Any], influence: dict[str, Any], applied: str, fitted: int, fisher: int
) -> None:
    recipe = Recipe.of(RowSpec(**rows), InfluenceConfig(**influence))
    recipe.check()
    assert (recipe.applied, recipe.fitted_examples, recipe.fisher_examples) == (applied, fitted, fisher)


def test_a_layout_tells_whether_short_rows_are_sketched() -> None:
    """Without it "auto" may be either; rows of 20 numbers need no sketch to 20, and one to 19."""
    unsure = Recipe.of(RowSpec(width=20), InfluenceConfig())
    assert (unsure.fits_sketch, unsure.certain) == (True, False)
    short = Recipe.of(RowSpec(width=20), InfluenceConfig(), LAYOUT)
    assert (short.fits_sketch, short.applied, short.fisher_examples) == (False, "ekfac_cosine", 1024)
    wide = Recipe.of(RowSpec(width=19), InfluenceConfig(), LAYOUT)
    assert (wide.fits_sketch, wide.applied, wide.fisher_examples) == (True, "cosine", 0)


def test_examples_to_draw_for_are_unused_with_the_datas_labels() -> None:
    """Whether a sketch is fitted or not."""
    for rows in ({}, {"width": 64}):
        recipe = Recipe.of(RowSpec(**rows), InfluenceConfig(fisher="data", fisher_examples=9))
        assert [setting.key for setting in recipe.unused() if setting.changed] == ["influence.fisher_examples"]


def test_a_preconditioner_of_ones_own_is_one_class() -> None:
    try:

        @register("own")
        class Own:
            needs = ()
            fit_on = None
            after_sketch = "cosine"

            def fit(self, rows: Any, damping: Any) -> Identity:
                return Identity()

        recipe = Recipe.of(RowSpec(width=9), InfluenceConfig("own", damping=0.5))
        recipe.check()
        assert recipe.fits_sketch
        assert recipe.applied == "cosine"
        plain = Recipe.of(RowSpec(), InfluenceConfig("own", damping=0.5))
        assert [setting.key for setting in plain.unused() if setting.changed] == ["influence.damping"]
    finally:
        del PRECONDITIONERS["own"]
