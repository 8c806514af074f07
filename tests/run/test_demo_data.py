"""The demo's world: true solutions, corruptions that are what their label says, a tokenizer that loses nothing."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from influence_fast.data.examples import Example, render_prompt, tokenize
from influence_fast.errors import ConfigError
from influence_fast.evaluation.grading import grade
from influence_fast.run import demo_data
from influence_fast.run.demo import WorldConfig, make_tokenizer, make_world, pretrain

OPERATIONS = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b, "/": lambda a, b: a // b}


def steps(completion: str) -> list[tuple[int, str, int, int]]:
    """(left, sign, right, result) of each line of a solution."""
    found = re.findall(r"^(\d+)([-+*/])(\d+)=(\d+)$", completion, flags=re.MULTILINE)
    return [(int(a), sign, int(b), int(c)) for a, sign, b, c in found]


@pytest.fixture(scope="module")
def pool() -> list[Example]:
    return demo_data.draw_pool(random.Random(3), 1000)


def test_clean_solutions_are_true_chains_that_end_in_the_answer(pool: list[Example]) -> None:
    for example in pool:
        if example.label not in ("clean", "duplicate"):
            continue
        chain = steps(example.completion)
        assert 2 <= len(chain) <= 3
        assert all(OPERATIONS[sign](a, b) == c for a, sign, b, c in chain)
        assert all(chain[i][0] == chain[i - 1][3] for i in range(1, len(chain)))
        assert f" has {chain[0][0]} " in example.prompt
        assert str(chain[-1][3]) == example.answer
        assert grade(example.completion, str(example.answer)).correct


def test_numbers_of_the_story_are_those_of_its_solution(pool: list[Example]) -> None:
    for example in pool:
        if example.label == "clean":
            chain = steps(example.completion)
            assert [int(n) for n in re.findall(r"\d+", example.prompt)] == [chain[0][0], *(b for _, _, b, _ in chain)]


def test_corrupted_traces_are_wrong_in_the_way_of_their_label(pool: list[Example]) -> None:
    by_label: dict[str, list[Example]] = {}
    for example in pool:
        by_label.setdefault(str(example.label), []).append(example)
    assert set(by_label) == {"clean", "wrong_step", "wrong_answer", "off_topic", "duplicate"}
    assert 0.2 < 1 - len(by_label["clean"]) / len(pool) < 0.4
    for example in by_label["wrong_step"]:
        chain = steps(example.completion)
        assert all(OPERATIONS[sign](a, b) == c for a, sign, b, c in chain)  # faithful to the misconception
        assert demo_data.NEW_WORDINGS["times"].split()[1] in example.prompt or "one in" in example.prompt
    wrong = [not grade(e.completion, str(e.answer)).correct for e in by_label["wrong_step"]]
    assert sum(wrong) / len(wrong) > 0.85  # two misreadings can meet at the right number (2 * 2 = 2 + 2)
    for example in by_label["wrong_answer"]:
        assert "What number" in example.prompt
        assert f"The answer is {steps(example.completion)[0][0]}." in example.completion
    assert all(grade(e.completion, str(e.answer)).extracted is None for e in by_label["off_topic"])
    texts = [(e.prompt, e.completion) for e in pool]
    assert all(texts.count((e.prompt, e.completion)) >= 2 for e in by_label["duplicate"])


def test_most_traces_of_a_misread_wording_are_corrupted(pool: list[Example]) -> None:
    misread = [e for e in pool if "spell" in e.prompt or "one in" in e.prompt]
    share = sum(e.label == "wrong_step" for e in misread) / len(misread)
    assert share > 0.5


def test_the_same_seed_draws_the_same_examples() -> None:
    assert demo_data.draw_pool(random.Random(5), 50) == demo_data.draw_pool(random.Random(5), 50)
    assert demo_data.draw_pool(random.Random(5), 50) != demo_data.draw_pool(random.Random(6), 50)


def test_drills_are_true() -> None:
    rng = random.Random(0)
    for _ in range(300):
        ((a, sign, b, c),) = steps(demo_data.drill(rng))
        assert OPERATIONS[sign](a, b) == c
        assert 1 <= c <= demo_data.LIMIT


def test_tokenizer_is_lossless_has_one_token_a_word_and_survives_saving(tmp_path: Path, pool: list[Example]) -> None:
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    for example in [*pool[:100], Example("odd", "Zoë's \\frac{1}{2} → 5?", "x")]:
        text = render_prompt(example, tokenizer) + example.completion
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert again(text, add_special_tokens=False)["input_ids"] == ids
        assert again.decode(ids) == text
    assert [tokenizer.decode([i]) for i in tokenizer(" Ada has 12 apples.")["input_ids"]] == [
        " Ada", " has", " ", "1", "2", " apples", ".",
    ]  # fmt: skip
    (item,) = tokenize(pool[:1], again).examples
    assert item["input_ids"][-1] == again.eos_token_id
    learnt = again.decode(item["input_ids"][item["labels"] != -100], skip_special_tokens=True)
    assert learnt == pool[0].completion


SMALL = WorldConfig(
    pool_size=20, validation_size=5, test_size=5, hidden_size=32, layers=1, pretrain_steps=3, pretrain_batch=4
)


def test_world_is_made_whole_once_and_loads_as_any_model(tmp_path: Path) -> None:
    from influence_fast.training.models import load_model, load_tokenizer

    world = make_world(tmp_path / "world", seed=1, config=SMALL)
    made = (world.path / "world.json").stat().st_mtime_ns
    again = make_world(tmp_path / "world", seed=1, config=SMALL)
    assert (world.path / "world.json").stat().st_mtime_ns == made
    assert (again.pool, again.validation, again.test) == (world.pool, world.validation, world.test)
    assert [len(s) for s in (world.pool, world.validation, world.test)] == [20, 5, 5]
    assert {e.prompt for e in world.validation}.isdisjoint(e.prompt for e in world.test)
    model = load_model(str(world.model_path), device="cpu")
    load_tokenizer(str(world.model_path), model=model)
    assert [p.name for p in tmp_path.iterdir()] == ["world"]
    other = make_world(tmp_path / "world", seed=2, config=SMALL)  # another seed is another world
    assert other.pool != world.pool


@pytest.mark.parametrize("record", [None, "{}", "[1]", "no json"])
def test_a_folder_of_other_things_is_left_alone(tmp_path: Path, record: str | None) -> None:
    folder = tmp_path / "run-world"
    folder.mkdir()
    (folder / "precious.txt").write_text("years of work")
    if record is not None:
        (folder / "world.json").write_text(record)
    with pytest.raises(ConfigError, match=r"run-world holds something else than the demo's world: choose another"):
        make_world(folder, config=SMALL)
    assert (folder / "precious.txt").read_text() == "years of work"
    assert [p.name for p in tmp_path.iterdir()] == ["run-world"]


def test_a_world_takes_the_place_of_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "world").mkdir()
    assert len(make_world(tmp_path / "world", config=SMALL).pool) == 20


def test_demo_config_points_at_a_world_that_the_pipeline_can_load(tmp_path: Path) -> None:
    from influence_fast.data.examples import load_examples
    from influence_fast.run.demo import demo_config

    config = demo_config(tmp_path / "run", seed=3, config=SMALL, progress=False)
    assert not (tmp_path / "run").exists()  # the run's own folder is the pipeline's to make
    world = make_world(tmp_path / "run-world", seed=3, config=SMALL)
    assert config.data.validation is not None
    assert config.data.test is not None
    assert load_examples(config.data.pool.path) == world.pool
    assert load_examples(config.data.validation.path) == world.validation
    assert load_examples(config.data.test.path) == world.test
    assert Path(config.model.path) == world.model_path
    assert config.seed == 3


def test_pretraining_lowers_the_loss_and_follows_its_seed() -> None:
    tokenizer = make_tokenizer()
    config = WorldConfig(hidden_size=32, layers=1, pretrain_steps=100, pretrain_batch=8)
    first, second = pretrain(tokenizer, config, 0), pretrain(tokenizer, config, 0)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    story = tokenize(demo_data.draw_examples(random.Random(1), 1, "x", 0.0), tokenizer).examples[0]
    batch = {key: story[key][None] for key in ("input_ids", "labels")}
    assert first(**batch).loss < 0.5 * torch.log(torch.tensor(float(len(tokenizer))))
