"""How a run and the command line have data read: `turns`, and columns that are done without."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from influence_fast.cli import build_parser, options
from influence_fast.cli.messages import by_flags
from influence_fast.cli.scoring import _load_beside
from influence_fast.config import DataConfig, ModelConfig, RunConfig, Source, load_config
from influence_fast.data.spooling import TokenSource, _examples, mapped_rows
from influence_fast.errors import ConfigError, DataError
from influence_fast.run.dry_run import _local_examples
from influence_fast.run.inputs import read_source
from influence_fast.run.unread import unread_settings

TURNS = [
    {"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"},
    {"role": "user", "content": "and 2+2?"}, {"role": "assistant", "content": "4"},
]  # fmt: skip


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"messages": TURNS, "answer": ["4"]}) + "\n")
    return path


@pytest.mark.parametrize(("turns", "learnt"), [("last", ()), ("all", (1,))])
def test_a_source_says_which_turns_are_trained_on(chats: Path, turns: str, learnt: tuple[int, ...]) -> None:
    source = Source(str(chats), turns=turns, columns={"answer": None})
    found = [read_source(source), _local_examples(source)]
    tokens = TokenSource(chats, turns=turns, columns={"answer": None})
    found.append(list(_examples(mapped_rows(chats, "train", chats.parent), tokens, [])))
    for examples in found:
        assert examples is not None
        assert [example.learnt for example in examples] == [learnt]


def test_turns_and_left_out_columns_in_a_configuration(chats: Path) -> None:
    path = chats.parent / "run.yaml"
    text = """
output: out
model: {{path: m}}
data:
  pool: {{path: chats.jsonl, turns: {turns}, columns: {{answer: null}}}}
  holdout_validation: 1
  holdout_test: 1
"""
    path.write_text(text.format(turns="all"))
    pool = load_config(path).data.pool
    assert (pool.turns, pool.columns) == ("all", {"answer": None})
    path.write_text(text.format(turns="every"))
    with pytest.raises(ConfigError, match="turns 'every' is not known"):
        load_config(path)


def parsed(verb: str, chats: Path, *more: str) -> Any:
    needed = {
        "score": ["--model", "m", "--adapter", "a", "--validation", str(chats), "--output", "s.csv"],
        "prune": ["--scores", "s.csv", "--strategy", "combined", "--fraction", "0.5", "--output", "o.jsonl"],
    }
    return build_parser().parse_args([verb, "--data", str(chats), *needed[verb], *more])


def test_options_of_turns_for_data_and_beside_it(chats: Path) -> None:
    columns = ("--columns", "answer=")
    args = parsed("score", chats, "--turns", "all", *columns, "--validation-columns", "answer=")
    assert [e.learnt for e in options.read_examples(args)] == [(1,)]
    assert [e.learnt for e in _load_beside(args, "validation", args.validation)] == [()]
    args = parsed("prune", chats, *columns, "--decontaminate-turns", "all", "--decontaminate-columns", "answer=")
    assert [e.learnt for e in options.read_examples(args)] == [()]
    assert [e.learnt for e in _load_beside(args, "decontaminate", str(chats))] == [(1,)]


def test_an_answer_that_is_a_list_names_the_options(chats: Path) -> None:
    args = parsed("score", chats)
    with pytest.raises(DataError) as error:
        options.read_examples(args)
    text = by_flags(error.value, args)
    assert f"{chats}, line 1: column 'answer' is a list of 1" in text
    assert text.endswith("do without it by --columns answer=")
    with pytest.raises(DataError, match="--validation-columns answer="):
        _load_beside(args, "validation", str(chats))


def test_turns_of_rows_without_conversations_are_unread(chats: Path, tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"question": "q", "solution": "s", "answer": "1"}\n')
    data = DataConfig(Source(str(pairs), turns="all"), validation=Source(str(chats), turns="all"), holdout_test=1)
    found = unread_settings(RunConfig("out", ModelConfig("m"), data))
    assert [line for line in found if "turns" in line] == [
        "data.pool.turns is 'all', which nothing reads here: the file's rows are no conversations"
    ]
