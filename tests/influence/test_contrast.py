"""Contrast queries against a dense float64 computation of their definition, and the settings that ask for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import influence_fast as inf
from influence_fast.data.schemas import Example
from influence_fast.errors import ConfigError, DataError
from influence_fast.evaluation.evaluate import EvalConfig
from influence_fast.influence.contrast import Pair, Pairs, contrasts, pair_answers
from influence_fast.influence.queries import answers_config, given_queries, make_queries, with_contrast
from influence_fast.influence.recipe import Recipe
from influence_fast.influence.settings import InfluenceConfig
from influence_fast.statistics.ranks import average_ranks

NAMES = ["none", "cosine", "ekfac", "ekfac_cosine", "fisher", "fisher_cosine", "datainf", "adam", "less"]
PAIRS = [Pair((0,), (1,)), Pair((2, 3), (4,)), Pair((5,), (6, 7, 8))]


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory, tiny_lora: Any) -> tuple[Any, torch.Tensor]:
    """A store of 24 rows in fp32 and 9 query rows."""
    model, generator = tiny_lora(), torch.Generator().manual_seed(0)
    examples = []
    for i in range(33):
        ids = torch.randint(5, 300, (int(torch.randint(2, 12, (), generator=generator)),), generator=generator)
        examples.append({"id": f"e{i}", "input_ids": ids, "labels": ids.clone()})
    store = inf.build_store(tmp_path_factory.mktemp("c") / "s", model, examples[:24], inf.RowSpec(dim=2, dtype="fp32"))
    return store, store.query_gradients(model, examples[24:])


def dense(store: Any, queries: torch.Tensor, scorer: Any, name: str) -> np.ndarray:
    """Return [N, P] contrast scores by the definition, in float64, from the influence matrix of an inverse Hessian."""
    rows, q = store.rows().double(), queries.double()
    base = {"ekfac_cosine": "ekfac", "fisher_cosine": "fisher", "cosine": "none", "less": "adam"}.get(name, name)
    plain = inf.Scorer.fit(store, preconditioner=base, fisher="data")
    inverse = plain.fitted.apply(torch.eye(store.width)).double()  # H^-1
    lengths = torch.einsum("qi,ij,qj->q", q, inverse, q).sqrt()
    row_lengths = torch.einsum("qi,ij,qj->q", rows, inverse, rows).sqrt()
    if name == "less":  # its own lengths: |q| of a query, |H^-1 g| of a row
        lengths, row_lengths = q.norm(dim=1), (rows @ inverse).norm(dim=1)
    unit = q @ inverse / lengths[:, None]
    columns = [unit[list(p.wrong)].mean(0) - unit[list(p.right)].mean(0) for p in PAIRS]
    found = rows @ torch.stack(columns).T
    return (found / row_lengths[:, None] if name.endswith("cosine") or name == "less" else found).numpy()


@pytest.mark.parametrize("name", NAMES)
def test_contrast_scores_follow_their_definition(stored: tuple[Any, torch.Tensor], name: str) -> None:
    store, queries = stored
    scorer = inf.Scorer.fit(store, preconditioner=name, fisher="data")
    table = scorer.scores(queries, {"correct": [0, 2]}, pairs=PAIRS)
    expected = dense(store, queries, scorer, name)
    wanted = expected.mean(axis=1)
    assert np.linalg.norm(table["s_contrast"] - wanted) <= 2e-5 * np.linalg.norm(wanted)
    assert np.array_equal(table["rank_contrast"], average_ranks(table["s_contrast"]))
    ranks = np.mean([average_ranks(column) for column in expected.T], axis=0)
    assert np.abs(table["mean_rank_contrast"] - ranks).max() <= 1  # rounding may swap two neighbours
    plain = scorer.scores(queries, {"correct": [0, 2]})
    assert "s_contrast" not in plain.columns
    assert np.array_equal(plain["s_correct"], table["s_correct"])


def test_equal_answers_have_no_contrast(stored: tuple[Any, torch.Tensor]) -> None:
    store, queries = stored
    same = torch.cat([queries[:1], queries[:1]])
    for name in ("none", "cosine"):
        scorer = inf.Scorer.fit(store, preconditioner=name)
        table = scorer.scores(same, {"correct": [0]}, pairs=[Pair((0,), (1,))])
        assert np.abs(table["s_contrast"]).max() == 0


def test_a_pair_must_have_two_sides_among_the_queries() -> None:
    unit = torch.eye(3)
    for pairs in ([], [Pair((0,), ())], [Pair((0,), (3,))], [Pair((-1,), (1,))]):
        with pytest.raises(DataError):
            contrasts(unit, pairs)


def test_questions_of_one_kind_are_left_out_and_named() -> None:
    groups = {"correct": [0, 3, 4], "incorrect": [1, 2, 5], "task": [0]}
    found = pair_answers(["a", "b", "a", "c", "a", "d"], groups)
    assert found == Pairs((Pair((0, 4), (2,)),), ("c",), ("b", "d"))
    with pytest.raises(DataError, match="both correct and incorrect"):
        pair_answers(["a"], {"correct": [0], "incorrect": [0]})
    with pytest.raises(DataError, match="name query 7"):
        pair_answers(["a"], {"correct": [7]})


def questions(count: int) -> list[Example]:
    return [Example(f"q{i}", f"What is {i}?", f"It is {i}.", str(i), row=i) for i in range(count)]


def answer(name: str, text: str, correct: bool) -> dict[str, Any]:
    return {"id": name, "generation": text, "token_ids": [], "correct": correct, "ended": True}


def test_own_answers_are_paired_by_their_question() -> None:
    answers = [
        *(answer("q0", "right", True), answer("q0", "wrong", False), answer("q0", "wrong too", False)),
        *(answer("q1", "right", True), answer("q1", "", False), answer("q2", "wrong", False)),
    ]
    queries = with_contrast(make_queries(questions(3), answers, None))
    assert [e.id for e in queries.examples] == ["q0", "q0/2", "q0/3", "q1", "q2"]
    assert queries.pairs == (Pair((0,), (1, 2)),)
    assert "1 validation questions are contrasted; of the others 1 have right answers alone and 1 wrong" in str(
        queries.warnings
    )
    assert queries.sizes.endswith("1 contrasted questions")
    with pytest.raises(ConfigError, match=r"influence\.samples") as raised:
        with_contrast(make_queries(questions(3), answers[3:], None))
    assert "1 have right answers alone and 1 wrong ones alone" in str(raised.value)


def test_answers_in_the_data_are_right_or_wrong_by_their_verdict() -> None:
    rows = questions(4)
    rows[1] = Example("other", rows[0].prompt, "It is 7.", "0", row=1)
    found = with_contrast(given_queries(rows, ["True", "no", "1", "INCORRECT"]))
    assert found.groups == {"correct": [0, 2], "incorrect": [1, 3]}
    assert found.pairs == (Pair((0,), (1,)),)
    with pytest.raises(DataError, match=r"q2: the verdict 'maybe' is neither .*influence\.verdicts"):
        given_queries(rows, ["true", "no", "maybe", "no"])


def test_samples_are_drawn_at_a_temperature() -> None:
    evaluation = EvalConfig(max_new_tokens=9)
    assert answers_config(InfluenceConfig(queries="contrast"), evaluation) is evaluation
    how = answers_config(InfluenceConfig(queries="contrast", samples=4, temperature=0.9), evaluation)
    assert (how.samples, how.temperature, how.max_new_tokens) == (4, 0.9, 9)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"samples": 0}, "influence.samples is 0"),
        ({"samples": 2, "queries": "reference"}, "influence.samples: with this influence.queries the model is asked"),
        ({"samples": 2, "queries": "contrast", "verdicts": "ok"}, "influence.samples: with this influence.verdicts"),
        ({"samples": 2, "queries": "contrast", "temperature": 0.0}, "influence.temperature is 0.0, and all 2 answers"),
        ({"verdicts": "ok"}, "influence.verdicts is read by influence.queries: contrast alone"),
        ({"queries": "contrasts"}, "did you mean 'contrast'"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as raised:
        Recipe.of(inf.RowSpec(), InfluenceConfig(**settings)).check()
    assert said in str(raised.value)


def test_saved_scorers_contrast_alike(stored: tuple[Any, torch.Tensor], tmp_path: Path) -> None:
    store, queries = stored
    scorer = inf.Scorer.fit(store, preconditioner="ekfac_cosine", fisher="data")
    scorer.save(tmp_path / "scorer")
    again = inf.Scorer.load(tmp_path / "scorer", store=store)
    one, other = (each.scores(queries, {"correct": [0]}, pairs=PAIRS)["s_contrast"] for each in (scorer, again))
    assert np.array_equal(one, other)
