"""Examples from every schema and container, their tokens, and the rows that pruning writes back."""

from __future__ import annotations

import builtins
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest

from influence_fast.data.boxed import last_boxed
from influence_fast.data.examples import (
    Example,
    kept_rows,
    load_examples,
    load_rows,
    save_examples,
    write_rows,
)
from influence_fast.errors import ConfigError, DataError
from influence_fast.evaluation.grading import extract_answer

Factory = Callable[..., Any]

PAIRS: list[dict[str, Any]] = [
    {"id": "a", "prompt": "1+1?", "completion": "The answer is 2.", "answer": "2", "label": "clean"},
    {"id": "b", "prompt": "Größe, 2 «Zeilen»\nund mehr", "completion": 'say "4", 你好\n', "answer": "4", "label": None},
    {"id": "c", "prompt": "3+3?", "completion": "x" * 200_000, "answer": None, "label": "off_topic"},
]
PAIR_EXAMPLES = [
    Example(r["id"], r["prompt"], r["completion"], r["answer"], row=i, label=r["label"]) for i, r in enumerate(PAIRS)
]


def jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def one_line(error: pytest.ExceptionInfo[Exception]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


# ---- containers ------------------------------------------------------------------------------------------


def as_container(kind: str, rows: list[dict[str, Any]], folder: Path) -> Any:
    """`rows` in a container of this kind, made by the library that usually makes it."""
    path = folder / f"data.{kind}"
    table = pa.Table.from_pylist(rows)
    if kind == "jsonl":
        return jsonl(path, rows)
    if kind == "json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif kind == "csv":
        datasets.Dataset(table).to_csv(str(path))
    elif kind == "parquet":
        pq.write_table(table, path, row_group_size=2)
    elif kind == "feather.arrow":
        pyarrow.feather.write_feather(table, str(path), compression="lz4")
    elif kind == "arrow":
        datasets.Dataset(table).save_to_disk(str(folder / "saved"))
        return next((folder / "saved").glob("*.arrow"))
    elif kind == "folder":
        datasets.Dataset(table).save_to_disk(str(folder / "saved"))
        return folder / "saved"
    elif kind == "folder-dict":
        datasets.DatasetDict({"train": datasets.Dataset(table)}).save_to_disk(str(folder / "saved"))
        return folder / "saved"
    elif kind == "dataset":
        return datasets.Dataset(table)
    elif kind == "dataset-dict":
        return datasets.DatasetDict({"train": datasets.Dataset(table)})
    elif kind == "repository":
        (folder / "repository").mkdir()
        return jsonl(folder / "repository" / "train.jsonl", rows).parent
    elif kind == "list":
        return rows
    return path


CONTAINERS = [
    "jsonl", "json", "csv", "parquet", "arrow", "feather.arrow", "folder", "folder-dict", "dataset",
    "dataset-dict", "repository", "list",
]  # fmt: skip


@pytest.mark.parametrize("kind", CONTAINERS)
def test_every_container_gives_the_same_examples(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    assert load_examples(as_container(kind, PAIRS, tmp_path)) == PAIR_EXAMPLES


def test_a_shuffled_dataset_is_read_in_its_own_order() -> None:
    data = datasets.Dataset.from_list(PAIRS).select([2, 0])
    assert [(e.id, e.row) for e in load_examples(data)] == [("c", 0), ("a", 1)]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_local_files_need_no_datasets_package(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = as_container(kind, PAIRS, tmp_path)
    imported = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] in ("datasets", "pandas"):
            raise ImportError(name)
        return imported(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    assert load_examples(source) == PAIR_EXAMPLES
    with pytest.raises(DataError, match="needs the datasets package; install it"):
        load_examples("openai/gsm8k")


def test_byte_order_mark_and_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b'{"prompt": "p", "completion": "c"}\n\n  \n{"prompt": "q", "completion": "d"}')
    assert [e.prompt for e in load_examples(path)] == ["p", "q"]
    assert load_rows(path).place(1) == f"{path}, line 4"
    assert load_examples(path.rename(tmp_path / "x.json"))[1].completion == "d"


def test_limit_and_split(tmp_path: Path) -> None:
    source = as_container("folder-dict", PAIRS, tmp_path)
    assert load_examples(source, limit=2) == PAIR_EXAMPLES[:2]
    with pytest.raises(DataError, match=r"no split 'trian'; did you mean 'train'"):
        load_examples(source, split="trian")


def test_a_folder_without_a_dataset_is_no_matter_of_the_network(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty: the folder is empty; give a file"):
        load_examples(tmp_path / "empty")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.xyz").write_text("nothing of the kind")
    with pytest.raises(DataError, match=r"other: the folder cannot be read as a dataset .*; give one of its files"):
        load_examples(tmp_path / "other")


def test_rows_beyond_the_limit_are_not_converted() -> None:
    rows = [{"prompt": "p", "completion": "c"}, {"prompt": "p", "completion": None}]
    assert [e.completion for e in load_examples(rows, limit=1)] == ["c"]
    with pytest.raises(DataError, match="row 1"):
        load_examples(rows, limit=2)


def test_a_hub_id_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError) as error:
        load_examples("someone/no-such-set:main")
    text = one_line(error)
    for part in ("someone/no-such-set:main", "hub", "check the id", "local file"):
        assert part in text


def test_hub_ids_pass_configuration_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(name: str, config: str | None, *, split: str) -> datasets.Dataset:
        asked.append((name, config, split))
        return datasets.Dataset.from_list(PAIRS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_examples("openai/gsm8k:main", split="test") == PAIR_EXAMPLES
    load_examples("GAIR/LIMO")
    assert asked == [("openai/gsm8k", "main", "test"), ("GAIR/LIMO", None, "train")]


# ---- schemas ---------------------------------------------------------------------------------------------


def only(rows: list[dict[str, Any]], **options: Any) -> Example:
    [example] = load_examples(rows, **options)
    return example


def test_gsm8k() -> None:
    row = {"question": "How many?", "answer": "16-3=<<16-3=13>>13\n#### 1,300"}
    assert only([row]) == Example("0", "How many?", row["answer"], "1300")


def test_limo() -> None:
    assert only([{"question": "q", "solution": "s", "answer": 72}]) == Example("0", "q", "s", "72")


def test_math_takes_the_boxed_answer_when_there_is_no_other() -> None:
    row = {"problem": "p", "solution": r"so \boxed{1}, no: \boxed{\frac{1}{2}}.", "unique_id": "x/1.json"}
    assert only([row]) == Example("x/1.json", "p", row["solution"], r"\frac{1}{2}")
    assert only([row | {"answer": "0.5"}]).answer == "0.5"
    assert last_boxed("no box") is None
    assert last_boxed(r"\boxed{cut") is None


@pytest.mark.parametrize(
    ("solution", "answer"),
    [
        (r"so \fbox{5}", "5"),
        (r"so \boxed {5}", "5"),
        (r"so \boxed 5.", "5"),
        (r"so \boxed{5} and \boxed{cut", "5"),
        (r"so \boxed{\{ 5 \}}", r"\{ 5 \}"),
        (r"so \boxed{ }", None),
    ],
)
def test_reference_answers_are_read_as_the_grader_reads(solution: str, answer: str | None) -> None:
    assert only([{"problem": "p", "solution": solution}]).answer == answer
    assert extract_answer(solution) == answer


def test_messages_keep_every_turn() -> None:
    turns = [
        {"role": "system", "content": "Think."},
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": [{"type": "text", "text": "and "}, {"type": "text", "text": "2+2?"}]},
        {"role": "assistant", "content": "4"},
        {"role": "user", "content": "thanks"},
    ]
    context = (("system", "Think."), ("user", "1+1?"), ("assistant", "2"))
    assert only([{"messages": turns, "uuid": "u"}]) == Example("u", "and 2+2?", "4", context=context)


def test_turns_that_nobody_answers_are_said(caplog: pytest.LogCaptureFixture) -> None:
    turns = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]
    thanks = {"role": "user", "content": "thanks"}
    rows = [{"messages": [*turns, thanks]}, {"messages": turns}, {"messages": [*turns, thanks]}]
    with caplog.at_level(logging.WARNING):
        assert len(load_examples(rows)) == 3
    (record,) = caplog.records
    assert "2 conversations do not end with an assistant turn" in record.getMessage()
    assert record.getMessage().endswith(": row 0, row 2")
    caplog.clear()
    load_examples(rows, limit=1)
    assert [r.getMessage().rpartition(": ")[2] for r in caplog.records] == ["row 0"]
    caplog.clear()
    load_examples(rows[1:2])
    assert not caplog.records


def test_conversational_prompt_and_completion() -> None:
    row = {
        "prompt": [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}],
        "completion": [{"role": "assistant", "content": "A"}],
    }
    assert only([row]) == Example("0", "U", "A", context=(("system", "S"),))


OPENR1 = [
    {
        "uuid": "u0", "problem": "p0", "solution": "ref", "answer": "1",
        "generations": ["wrong", "cut", "right", "right too"],
        "correctness_math_verify": [False, True, True, True],
        "is_reasoning_complete": [True, False, True, True],
        "correctness_llama": None, "correctness_count": 3, "finish_reasons": ["stop", "length", "stop", "stop"],
        "messages": [{"role": "user", "content": "p0"}, {"role": "assistant", "content": "right"}],
        "scores": [0.1, 0.2, 0.3, 0.4],
    },
    {
        "uuid": "u1", "problem": "p1", "solution": "ref", "answer": "2",
        "generations": ["never", "right by the judge"],
        "correctness_math_verify": [False, False],
        "is_reasoning_complete": [True, True],
        "correctness_llama": [False, True], "correctness_count": 1, "finish_reasons": None,
        "messages": [{"role": "user", "content": "p1"}, {"role": "assistant", "content": "right by the judge"}],
        "scores": [0.5, 0.6],
    },
    {
        "uuid": "u2", "problem": "p2", "solution": "ref", "answer": "3",
        "generations": ["wrong here", "wrong there"],
        "correctness_math_verify": [False, False],
        "is_reasoning_complete": [True, True],
        "correctness_llama": None, "correctness_count": 0, "finish_reasons": ["stop", "stop"],
        "messages": [{"role": "user", "content": "p2"}, {"role": "assistant", "content": "wrong here"}],
        "scores": [0.7, 0.8],
    },
]  # fmt: skip


@pytest.mark.parametrize(
    ("trace", "ids"),
    [
        ("first", ["u0#0", "u1#0", "u2#0"]),
        ("first_correct", ["u0#2", "u1#1"]),
        ("all", ["u0#0", "u0#1", "u0#2", "u0#3", "u1#0", "u1#1", "u2#0", "u2#1"]),
        ("all_correct", ["u0#2", "u0#3", "u1#1"]),
        (1, ["u0#1", "u1#1", "u2#1"]),
        (3, ["u0#3"]),
    ],
)
@pytest.mark.parametrize("kind", ["list", "parquet"])
def test_openr1_traces_are_explicit(trace: str | int, ids: list[str], kind: str, tmp_path: Path) -> None:
    examples = load_examples(as_container(kind, OPENR1, tmp_path), trace=trace)
    assert [e.id for e in examples] == ids
    for e in examples:
        row = OPENR1[e.row]
        assert e.id == f"{row['uuid']}#{e.trace}"
        assert (e.prompt, e.answer) == (row["problem"], row["answer"])
        assert e.completion == row["generations"][e.trace]  # type: ignore[index,call-overload]


def test_rows_without_a_trace_are_named(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        load_examples(OPENR1)
    assert "1 of 3 rows have no trace for trace='first_correct' and are left out: row 2" in caplog.text
    with pytest.raises(DataError, match="no row has a trace for trace=7; choose another"):
        load_examples(OPENR1, trace=7)


def test_openr1_without_verdicts(tmp_path: Path) -> None:
    rows = [{"problem": "p", "generations": ["a", "b"]}]
    assert load_examples(rows, trace="first")[0].id == "0#0"
    with pytest.raises(DataError, match=r"row 0: column 'correctness_math_verify' is missing"):
        load_examples(rows)
    with pytest.raises(DataError, match="1 entries for 2 traces"):
        load_examples([rows[0] | {"correctness_math_verify": [True]}])


def test_renamed_columns() -> None:
    row = {"ask": "p", "reply": "c", "problem": "other", "generations": ["g"], "key": 7, "kind": "noise"}
    columns: dict[str, str | None] = {"prompt": "ask", "completion": "reply", "id": "key", "label": "kind"}
    assert only([row], columns=columns) == Example("7", "p", "c", label="noise")
    assert only([{"q": "p", "generations": ["g"]}], columns={"problem": "q"}, trace="all").completion == "g"
    with pytest.raises(DataError, match=r"no column 'asc' to take as 'prompt'; did you mean 'ask'"):
        load_examples([row], columns={"prompt": "asc", "completion": "reply"})
    with pytest.raises(ConfigError, match=r"'promt' is not a column to rename; did you mean 'prompt'"):
        load_examples([row], columns={"promt": "ask"})


def test_ids() -> None:
    rows = [{"prompt": "p", "completion": "c", "id": i} for i in ("x", "y", "x", "z", "y", "x")]
    with pytest.raises(DataError, match=r"x \(3 times\), y \(2 times\)"):
        load_examples(rows)
    assert [e.id for e in load_examples(rows, columns={"id": None})] == list("012345")
    with pytest.raises(DataError, match=r"row 1: the id in column 'id' is None"):
        load_examples([rows[0], rows[1] | {"id": None}])


# ---- bad input -------------------------------------------------------------------------------------------

GOOD = {"prompt": "p", "completion": "c"}


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ('{"prompt": "p", "completion": "c"}\n{"prompt": \n', ["line 2", "not valid JSON"]),
        ('{"prompt": "p", "completion": "c"}\n\n[1, 2]\n', ["line 3", "list", "one JSON object"]),
        ("", ["no rows"]),
        ("\n\n", ["no rows"]),
        (json.dumps({"text": "t"}), ["columns text fit no known schema", "columns={", "prompt, completion"]),
        (json.dumps(GOOD) + "\n" + json.dumps({"prompt": "p"}), ["line 2", "'completion' is missing", "remove"]),
        (json.dumps(GOOD | {"prompt": None}), ["line 1", "'prompt' is null"]),
        (json.dumps(GOOD | {"prompt": 3}), ["line 1", "'prompt' is a int, not text", "convert"]),
        (json.dumps(GOOD | {"completion": " \n"}), ["empty completion in 1 example(s)", "line 1", "remove the row"]),
        (json.dumps(GOOD | {"answer": ["1"]}), ["line 1", "'answer' is a list"]),
        ('{"prompt": "p\\ud83d", "completion": "c"}', ["line 1", "'prompt'", "UTF-8"]),
        (json.dumps({"question": "q", "answer": "no mark"}), ["line 1", "after '####'"]),
        (json.dumps({"messages": "hi"}), ["line 1", "'messages' is a str, not a list"]),
        (json.dumps({"messages": ["hi"]}), ["line 1", "message 0", "role"]),
        (json.dumps({"messages": [{"role": "user", "content": "u"}]}), ["line 1", "no 'assistant' message"]),
        (json.dumps({"messages": [{"role": "assistant", "content": "a"}]}), ["line 1", "'user' turn is needed"]),
        (json.dumps(GOOD | {"completion": [{"role": "user", "content": "u"}]}), ["line 1", "exactly one 'assistant'"]),
        (json.dumps({"problem": "p", "generations": ["ok", 3]}), ["line 1", "trace 1", "int"]),
    ],
)
def test_bad_rows_are_one_line_with_file_row_and_remedy(content: str, parts: list[str], tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(DataError) as error:
        load_examples(path, trace="all")
    text = one_line(error)
    assert str(path) in text
    for part in parts:
        assert part in text


@pytest.mark.parametrize("suffix", [".json", ".csv", ".parquet", ".arrow", ".jsonl", ".xlsx"])
def test_damaged_files(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"bad{suffix}"
    path.write_bytes(b"[{\xff\xfe" if suffix != ".csv" else b'a,b\n1,2\n3,4,5\n"')
    with pytest.raises(DataError) as error:
        load_examples(path)
    assert str(path) in one_line(error)
    path.write_bytes(b"")
    with pytest.raises(DataError) as error:
        load_examples(path)
    assert str(path) in one_line(error)


def test_sources_that_are_not_there(tmp_path: Path) -> None:
    for source in (tmp_path / "none.jsonl", "none.parquet", "./none", "/none/at/all"):
        with pytest.raises(DataError, match="no such file") as error:
            load_examples(source)
        assert str(source) in one_line(error)
    with pytest.raises(DataError, match="from a int; give a path"):
        load_examples(3)
    with pytest.raises(DataError, match="the list given, row 1: is a str"):
        load_examples([GOOD, "x"])


def test_unknown_choices() -> None:
    with pytest.raises(ConfigError, match="did you mean 'gsm8k'"):
        load_examples([GOOD], format="gms8k")
    for trace in ("frist", -1, True, 1.5):
        with pytest.raises(ConfigError, match="trace"):
            load_examples([GOOD], trace=trace)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"format 'limo' needs a column 'question', found prompt, completion"):
        load_examples([GOOD], format="limo")


def test_every_empty_completion_is_named() -> None:
    rows = [{"id": f"e{i}", "prompt": "p", "completion": "" if i % 2 else "c"} for i in range(20)]
    with pytest.raises(DataError, match=r"in 10 example\(s\): e1 .*row 1.*, e3 .* and 5 more"):
        load_examples(rows)


# ---- writing ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet", "arrow", "folder"])
def test_pruned_rows_keep_format_and_columns(kind: str, tmp_path: Path) -> None:
    rows = [{"id": f"i{n}", "prompt": f"p{n}", "completion": f"c,\n{n}", "extra": f"é{n}"} for n in range(9)]
    source = load_rows(as_container(kind, rows, tmp_path))
    kept = [e for e in load_examples(source) if e.row % 3]
    path = tmp_path / f"pruned{source.suffix}"
    assert save_examples(kept[::-1], path, source) == 6
    again = load_rows(path)
    assert list(again) == [row for n, row in enumerate(rows) if n % 3]
    assert again.suffix == source.suffix
    if source.schema is not None:
        assert again.schema is not None
        assert again.schema.equals(source.schema)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_pruned_traces_leave_their_row_consistent(kind: str, tmp_path: Path) -> None:
    source = load_rows(as_container(kind, OPENR1, tmp_path))
    examples = load_examples(source, trace="all")
    kept = [e for e in examples if e.id in ("u0#3", "u0#0", "u2#0", "u2#1")]
    path = tmp_path / f"pruned{source.suffix}"
    assert save_examples(kept, path, source) == 2
    first, last = load_rows(path)
    assert first == OPENR1[0] | {
        "generations": ["wrong", "right too"],
        "correctness_math_verify": [False, True],
        "is_reasoning_complete": [True, True],
        "finish_reasons": ["stop", "stop"],
        "scores": [0.1, 0.4],
        "correctness_count": 1,
        # showed "right", which is pruned: a trainer that reads messages must not see it
        "messages": [{"role": "user", "content": "p0"}, {"role": "assistant", "content": "wrong"}],
    }
    assert last == OPENR1[2]
    assert [e.completion for e in load_examples(path, trace="all")] == [
        "wrong",
        "right too",
        "wrong here",
        "wrong there",
    ]


def test_two_messages_beside_two_traces_are_no_traces() -> None:
    rows = OPENR1[1:]  # two traces in each: `messages` is as long as `generations` in every row
    source = load_rows(rows)
    [row] = kept_rows(source, [e for e in load_examples(source, trace="all") if e.id == "u1#1"])
    assert row["generations"] == ["right by the judge"]
    assert row["correctness_llama"] == [True]
    assert row["messages"] == OPENR1[1]["messages"]


def test_a_column_that_the_first_row_lacks_is_filtered_too(tmp_path: Path) -> None:
    path = tmp_path / "traces.jsonl"
    first = {name: value for name, value in OPENR1[1].items() if name != "correctness_math_verify"}
    path.write_text("".join(json.dumps(row) + "\n" for row in (first, OPENR1[2] | {"scores": [0.5, 0.6]})))
    source = load_rows(path)
    [row] = kept_rows(source, [e for e in load_examples(source, trace="all") if e.id == "u2#1"])
    assert row["generations"] == OPENR1[2]["generations"][1:]
    assert row["correctness_math_verify"] == OPENR1[2]["correctness_math_verify"][1:]
    assert row["scores"] == [0.6]


@pytest.mark.parametrize("verdicts", [[True], [True, False, True]])
def test_verdicts_of_another_number_than_the_traces_are_named(verdicts: list[bool]) -> None:
    row = {"uuid": "u", "problem": "p", "answer": "1", "generations": ["a", "b"], "correctness_llama": verdicts}
    source = load_rows([row])
    kept = load_examples(source, trace="all")[1:]
    match = rf"the list given, row 0: column 'correctness_llama' has {len(verdicts)} entries for 2 traces; mend the row"
    with pytest.raises(DataError, match=match):
        list(kept_rows(source, kept))


def test_pruning_messages_of_openr1_keeps_whole_rows() -> None:
    source = load_rows(OPENR1)
    examples = load_examples(source, format="messages")
    assert list(kept_rows(source, examples[1:])) == OPENR1[1:]


def test_examples_without_a_source(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "x.jsonl"
    assert save_examples(PAIR_EXAMPLES, path) == 3
    assert load_examples(path) == PAIR_EXAMPLES
    turns = Example("t", "p", "c", context=(("system", "s"),))
    save_examples([turns], path)
    assert load_examples(path) == [turns]


def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    write_rows([GOOD], path)

    def rows() -> Any:
        yield GOOD
        raise RuntimeError("stopped")

    for name in ("x.jsonl", "y.parquet", "z.json", "folder"):
        with pytest.raises(RuntimeError, match="stopped"):
            write_rows(rows(), tmp_path / name)
    assert [p.name for p in tmp_path.iterdir()] == ["x.jsonl"]
    assert list(load_rows(path)) == [GOOD]


def test_what_a_format_cannot_hold(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"CSV cannot hold the nested columns generations"):
        write_rows([{"generations": ["a"]}], tmp_path / "x.csv")
    with pytest.raises(DataError, match=r"several types .*; write \.jsonl"):
        write_rows([{"a": 1}, {"a": "x"}], tmp_path / "x.parquet")
    with pytest.raises(DataError, match="JSON cannot hold"):
        write_rows([{"a": b"x"}], tmp_path / "x.jsonl")
    with pytest.raises(DataError, match=r"cannot write '\.txt'"):
        write_rows([GOOD], tmp_path / "x.txt")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "there").mkdir()
    with pytest.raises(DataError, match="existing folder"):
        write_rows([GOOD], tmp_path / "there")


def test_text_that_utf8_cannot_hold_is_kept_as_it_was(tmp_path: Path) -> None:
    rows = [{"text": "half \ud83d, whole 😀, é"}]
    for name in ("x.jsonl", "x.json"):
        write_rows(rows, tmp_path / name)
        assert list(load_rows(tmp_path / name)) == rows


def test_empty_results_are_written(tmp_path: Path) -> None:
    schema = pa.schema([("prompt", pa.string())])
    for name in ("x.jsonl", "x.json", "x.parquet", "x.arrow"):
        assert write_rows([], tmp_path / name, schema=schema) == 0
        with pytest.raises(DataError, match="no rows in it"):
            load_rows(tmp_path / name)


def test_rows_are_a_sequence(tmp_path: Path) -> None:
    rows = [{"n": n, "text": f"t{n}"} for n in range(600)]  # more than one batch
    for kind in ("jsonl", "parquet"):
        source = load_rows(as_container(kind, rows, tmp_path))
        assert list(source) == rows
        assert source[-1] == rows[-1]
        assert source[3:600:250] == rows[3:600:250]
        assert source.columns == ["n", "text"]
        with pytest.raises(IndexError):
            source[600]
    assert list(source.read(["n"])) == [{"n": n} for n in range(600)]
