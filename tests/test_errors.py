"""Errors keep the settings that they name as data, and each front end writes them in its own way."""

from __future__ import annotations

import argparse
import pickle
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import influence_fast as inf
from influence_fast.cli import build_parser
from influence_fast.cli.messages import as_option, by_flags
from influence_fast.config import PruningConfig
from influence_fast.data.examples import load_examples
from influence_fast.errors import ConfigError, DataError, InfluenceFastError, ModelError, Setting, plain, setting
from influence_fast.influence.recipe import Recipe
from influence_fast.influence.settings import InfluenceConfig
from influence_fast.settings import check_seed, from_dict, one_of

ANSWERS = f"set {setting('influence.fallback', 'reference')}, or lower {setting('training.learning_rate')}"


def verbs() -> dict[str, argparse.ArgumentParser]:
    (group,) = (a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    return dict(group.choices)


def test_settings_in_a_message_are_data() -> None:
    error = ConfigError(f"no answer is right: {ANSWERS}")
    assert str(error) == "no answer is right: set influence.fallback: reference, or lower training.learning_rate"
    assert f"{error}" == str(error) == error.args[0]
    assert [part for part in error.parts if isinstance(part, Setting)] == [
        Setting("influence.fallback", "reference"),
        Setting("training.learning_rate"),
    ]
    assert error.key == "influence.fallback"
    assert error.render(lambda named: named.key.upper()).startswith("no answer is right: set INFLUENCE.FALLBACK, or")


def test_key_value_and_remedy_make_the_text() -> None:
    error = ConfigError("is 0; it must be above 0", key="influence.damping", value=0, remedy=ANSWERS)
    assert str(error).startswith("influence.damping is 0; it must be above 0; set influence.fallback: reference, or")
    assert (error.key, error.value) == ("influence.damping", 0)
    assert str(ConfigError(": unknown value 'x'", key="fisher")) == "fisher: unknown value 'x'"
    assert str(ConfigError("is 0", key="--count", remedy=setting("a b", 3))) == "--count is 0; a b=3"
    assert (DataError("plain").key, DataError("plain").value, DataError().parts) == (None, None, [])


@pytest.mark.parametrize("kind", [ConfigError, DataError, ModelError])
def test_errors_cross_processes_whole(kind: type[InfluenceFastError]) -> None:
    error = kind(f"is 0: {ANSWERS}", key="lora.r", value=0)
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind
    assert (str(again), again.parts, again.key, again.value) == (str(error), error.parts, "lora.r", 0)


def test_an_error_in_another_keeps_its_settings() -> None:
    outer = DataError(f"a.yaml: {ConfigError(ANSWERS).marked}")
    assert outer.key == "influence.fallback"
    assert outer.renamed(lambda named: Setting("x")) == f"a.yaml: set {setting('x')}, or lower {setting('x')}"
    assert plain(ANSWERS) == "set influence.fallback: reference, or lower training.learning_rate"


@pytest.mark.parametrize(
    "text",
    [
        "data.limit is 0",
        "influence.fallback: reference",
        "limit is 3",
        'columns={"id": None}',
        "\x02x\x1f\x03",
        "\x02\x1f{",
    ],
)
def test_text_of_a_user_is_not_rewritten(text: str) -> None:
    args = Namespace(limit=1, fallback=None, columns=None)
    assert by_flags(DataError(f"row 1: {text!r}"), args) == f"row 1: {text!r}"
    said = by_flags(DataError(f"row 1: {text}"), args)
    assert said.isprintable()
    assert "--" not in said


@pytest.mark.parametrize(
    ("named", "said"),
    [
        (Setting("data.limit"), "--limit"),
        (Setting("training.learning_rate"), "--learning-rate"),
        (Setting("lora.r"), "--rank"),
        (Setting("lora.alpha"), "lora.alpha"),  # no option of this verb
        (Setting("influence.fallback", "reference"), "--fallback reference"),
        (Setting("influence.optimizer", "x"), "influence.optimizer: x"),
        (Setting("limit"), "--limit"),
        (Setting("columns", {"prompt": "question", "completion": "..."}), "--columns prompt=question,completion=..."),
        (Setting("columns", {"id": None}), "--columns id="),
        (Setting("format", "s1k_1.1"), "--format s1k_1.1"),
        (Setting("turns", "all"), "--turns all"),
        (Setting("split", "..."), "--split"),
        (Setting("key", "..."), "--option key=..."),
    ],
)
def test_settings_become_options_of_the_verb(named: Setting, said: str) -> None:
    args = Namespace(columns=None, limit=1, learning_rate=None, rank=4, fallback=None, option=None)
    assert as_option(named, args) == said
    error = DataError(f"mend {setting(named.key, named.value)}, please")
    assert by_flags(error, args) == f"mend {said}, please"
    assert by_flags(error, Namespace(config="c.yaml", **vars(args))) == f"mend {named}, please"


def test_options_beside_the_data_have_a_prefix() -> None:
    args = Namespace(columns=None)
    assert as_option(Setting("columns", {"answer": None}), args, "validation-") == "--validation-columns answer="
    assert as_option(Setting("split", "..."), args, "validation-") == "--validation-split"


@pytest.mark.parametrize("verb", sorted(verbs()))
def test_no_option_is_named_that_the_verb_lacks(verb: str) -> None:
    """Every name of an option's value leads to a flag that the verb has."""
    parser = verbs()[verb]
    flags = {flag for action in parser._actions for flag in action.option_strings}
    named = [a for a in parser._actions if a.option_strings and a.dest not in ("help", "config")]
    args = Namespace(**{action.dest: None for action in named})
    wrong = [a.dest for a in named if as_option(Setting(f"data.{a.dest}"), args).split()[0] not in flags]
    assert wrong == []


RAISED: list[tuple[Callable[[], Any], str, Any]] = [
    (lambda: check_seed("pruning.seeds", -1), "pruning.seeds", -1),
    (lambda: one_of("influence.queries", "own", ("own_answers",)), "influence.queries", "own"),
    (lambda: from_dict(PruningConfig, {"seeds": ["x"]}, "pruning."), "pruning.seeds", "x"),
    (lambda: from_dict(inf.RowSpec, {"max_tokens": 0}, "gradients."), "gradients.max_tokens", 0),
    (lambda: from_dict(inf.RowSpec, {"store_dtype": "int7"}, "gradients."), "gradients.store_dtype", "int7"),
    (lambda: from_dict(inf.RowSpec, {"precision": "fp7"}, "gradients."), "gradients.precision", "fp7"),
    (lambda: inf.RowSpec(dtype="int7"), "RowSpec.dtype", "int7"),
    (lambda: inf.LoraSettings(r=0), "lora.r", None),
    (lambda: inf.TrainConfig(warmup_ratio=2.0), "training.warmup_ratio", None),
    (lambda: Recipe.of(inf.RowSpec(), InfluenceConfig(explain=-1)).check(), "influence.explain", None),
]


@pytest.mark.parametrize(("work", "key", "value"), RAISED, ids=[key for _, key, _ in RAISED])
def test_errors_say_which_setting_is_wrong(work: Callable[[], Any], key: str, value: Any) -> None:
    with pytest.raises(ConfigError) as raised:
        work()
    assert raised.value.key == key
    if value is not None:
        assert raised.value.value == value
    assert str(raised.value).isprintable()


def test_columns_are_said_as_python_and_as_options(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"id": "a", "prompt": "p", "completion": "c"}\n' * 2)
    with pytest.raises(DataError) as raised:
        load_examples(path)
    assert 'with columns={"id": "..."}, or use row numbers with columns={"id": None}' in str(raised.value)
    said = by_flags(raised.value, Namespace(columns=None))
    assert "with --columns id=..., or use row numbers with --columns id=" in said
