"""Tasks: each reads its source's columns, every mistake is named, and the order of options is the row's own."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from influence_fast.cli import main
from influence_fast.errors import ConfigError, DataError
from influence_fast.evaluation.evaluate import EvalConfig
from influence_fast.evaluation.grading import grade
from influence_fast.evaluation.lm_eval_export import export_lm_eval
from influence_fast.evaluation.tasks import known_tasks, load_task, task_examples

# a row as the source has it, and the reference answer that must come of it
ROWS: dict[str, tuple[dict[str, Any], str]] = {
    "gsm8k": ({"question": "1,000 + 234?", "answer": "<<1000+234=1234>>\n#### 1,234"}, "1,234"),
    "math500": (
        {"problem": "Half?", "solution": r"\boxed{\frac12}", "answer": r"\frac{1}{2}", "unique_id": "test/a/1.json"},
        r"\frac{1}{2}",
    ),
    "amc23": ({"id": 3, "question": "How many?", "answer": "27", "url": "x"}, "27"),
    "aime24": ({"id": 60, "problem": "Find it.", "solution": "It is 204.", "answer": "204", "year": "2024"}, "204"),
    "olympiadbench": (
        {"id": 7, "question": "All roots?", "solution": ["Since ..."], "final_answer": ["$2$, $3$"], "context": None},
        "2, 3",
    ),
    "minerva": ({"question": "Speed?", "answer": r"\sqrt{2}"}, r"\sqrt{2}"),
    "gpqa": (
        {
            "Record ID": "rec1",
            "Question": "Which?",
            "Correct Answer": "right\n",
            "Incorrect Answer 1": "one",
            "Incorrect Answer 2": "two",
            "Incorrect Answer 3": "three",
        },
        "D",
    ),
}


def jsonl(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_task(folder: Path, **changes: Any) -> Path:
    raw = {
        "source": {"path": "own.jsonl"},
        "columns": {"question": "q", "answer": "a"},
        "prompt": "Q: {{ question }}",
    }
    path = folder / "own.yaml"
    path.write_text(yaml.safe_dump(raw | changes))
    return path


def test_there_is_a_row_for_every_task() -> None:
    assert known_tasks() == sorted(ROWS)


@pytest.mark.parametrize("name", sorted(ROWS))
def test_tasks_of_the_package_read_their_sources(name: str, tmp_path: Path) -> None:
    task = load_task(name)
    row, answer = ROWS[name]
    (example,) = task_examples(task, source=jsonl(tmp_path / "rows.jsonl", row))
    assert example.answer == answer
    assert example.completion
    assert row[task.columns.question] in example.prompt
    assert "{{" not in example.prompt
    assert example.id == (str(row[task.columns.id]) if task.columns.id else "0")
    assert task.evaluation.answer_kind == task.answer
    assert task.citation
    assert task.source.path.count("/") == 1
    told = f"The answer is ({answer})." if task.answer == "choice" else rf"\boxed{{{answer}}}"
    assert grade(told, answer, kind=task.answer).correct


def test_options_are_shuffled_by_the_id_alone(tmp_path: Path) -> None:
    task = load_task("gpqa")
    rows = [ROWS["gpqa"][0] | {"Record ID": f"rec{i}"} for i in range(200)]
    examples = task_examples(task, source=jsonl(tmp_path / "rows.jsonl", *rows))
    for example in examples:
        assert f"({example.answer}) right\n" in example.prompt
        assert sorted(line[4:] for line in example.prompt.splitlines() if line[:1] == "(") == [
            "one", "right", "three", "two",
        ]  # fmt: skip
    assert min(Counter(example.answer for example in examples).values()) > 30  # of 50 expected
    # another order, other rows beside it: the same prompt
    again = task_examples(task, source=jsonl(tmp_path / "again.jsonl", *rows[:20:-7]))
    by_id = {example.id: example for example in examples}
    assert all((e.prompt, e.answer) == (by_id[e.id].prompt, by_id[e.id].answer) for e in again)


def test_a_task_of_ones_own(tmp_path: Path) -> None:
    jsonl(tmp_path / "own.jsonl", *({"q": f"{i}+1?", "a": i + 1, "level": i} for i in range(5)))
    path = write_task(
        tmp_path,
        prompt="{{ question }} (level {{ row.level }})",
        answer="last_number",
        sampling={"samples": 4, "temperature": "7e-1", "pass_at": 2},
    )
    task = load_task(path)
    assert task.evaluation == EvalConfig(
        answer_kind="last_number", samples=4, temperature=0.7, pass_at=(2,), max_new_tokens=2048
    )
    examples = task_examples(task, limit=3)  # the source lies beside the task
    assert [(e.id, e.prompt, e.answer) for e in examples] == [
        (str(i), f"{i}+1? (level {i})", str(i + 1)) for i in range(3)
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"promt": "x"}, "unknown key 'promt'; did you mean 'prompt'"),
        ({"columns": {"question": "q", "answr": "a"}}, "unknown key 'columns.answr'; did you mean 'answer'"),
        ({"sampling": {"top_k": 5}}, "unknown key 'sampling.top_k'; did you mean 'top_p'"),
        ({"columns": {"question": "q"}}, "name an 'answer' column"),
        ({"answer": "maths"}, "unknown value 'maths'; did you mean 'math'"),
        ({"prompt": "{{ question"}, "not a Jinja template"),
        ({"sampling": {"samples": 4}}, "set a temperature"),
        ({"columns": {"question": "q", "answer": "a", "distractors": "b"}}, "needs 'answer: choice'"),
        ({"source": 7}, "source: expected a mapping"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_mistakes_in_a_task_are_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=rf"own\.yaml: .*{message}"):
        load_task(write_task(tmp_path, **changes))


def test_unknown_and_unsafe_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"unknown task 'gsm8'; did you mean 'gsm8k'.*olympiadbench.*path of a \.yaml"
    ):
        load_task("gsm8")
    with pytest.raises(ConfigError, match=r"absent\.yaml: no such task file"):
        load_task(tmp_path / "absent.yaml")
    unsafe = tmp_path / "unsafe.yaml"
    unsafe.write_text("source: !!python/object/apply:os.getcwd []\n")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_task(unsafe)
    unsafe.write_text("- 1\n")
    with pytest.raises(ConfigError, match="a task is a mapping of keys, not list"):
        load_task(unsafe)


@pytest.mark.parametrize(
    ("rows", "changes", "message"),
    [
        ([{"q": "1?", "b": "2"}], {}, "has no column 'a', which task 'own' reads"),
        ([{"q": "1?", "a": "2"}, {"q": "1?", "a": None}], {}, "line 2: column 'a' is null"),
        ([{"q": 1, "a": "2"}], {}, "line 1: column 'q' is a int, not text"),
        ([{"q": "1?", "a": " "}], {}, "line 1: column 'a' is empty"),
        ([{"q": "1?", "a": "12"}], {"answer": "choice"}, "line 1: the answer '12' is no letter"),
        ([{"q": "1?", "a": "2"}], {"prompt": "{{ other }}"}, "'other' is undefined"),
        ([{"q": "1?", "a": "2"}], {"prompt": "{{ ''.__class__.__mro__ }}"}, "is unsafe|cannot be rendered"),
        (
            [{"q": "1?", "a": "2", "i": "x"}] * 2,
            {"columns": {"question": "q", "answer": "a", "id": "i"}},
            r"repeated are x \(2 times\)",
        ),
        ([{"q": "1?", "s": "so 5"}], {"columns": {"question": "q", "solution": "s"}}, "states no final answer"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_rows_that_do_not_fit_are_named(
    tmp_path: Path, rows: list[dict[str, Any]], changes: dict[str, Any], message: str
) -> None:
    jsonl(tmp_path / "own.jsonl", *rows)
    with pytest.raises(DataError, match=message):
        task_examples(load_task(write_task(tmp_path, **changes)))


def test_the_export_grades_as_we_do(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "rows.jsonl", *({"question": f"{i}+1?", "answer": f"#### {i + 1}"} for i in range(3)))
    task = load_task("gsm8k")
    examples = task_examples(task, source=source)
    command = export_lm_eval("gsm8k", examples, task.evaluation, tmp_path / "out")
    assert "--tasks influence_fast_gsm8k" in command
    folder = tmp_path / "out"
    text = (folder / "influence_fast_gsm8k.yaml").read_text()
    settings = yaml.safe_load(text.replace("!function ", ""))
    assert settings["generation_kwargs"] == {"until": [], "max_gen_toks": 1024, "do_sample": False}
    rows = [
        json.loads(line) for line in Path(settings["dataset_kwargs"]["data_files"]["test"]).read_text().splitlines()
    ]
    assert [(row["prompt"], row["answer"]) for row in rows] == [(e.prompt, e.answer) for e in examples]
    module, function = settings["process_results"].split(".")
    names: dict[str, Any] = {}
    exec((folder / f"{module}.py").read_text(), names)
    assert names[function](rows[2], ["2+1 is three: \\boxed{3.0}"]) == {"exact_match": 1.0}
    assert names[function](rows[2], ["#### 4"]) == {"exact_match": 0.0}


def test_the_command_line_takes_tasks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny_model: Any, tiny_tokenizer: Any
) -> None:
    model = tmp_path / "model"
    tiny_model().save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    data = jsonl(tmp_path / "rows.jsonl", *({"question": f"{i}+1?", "answer": f"#### {i + 1}"} for i in range(3)))
    transcripts = tmp_path / "t.jsonl"

    def run(*more: Any) -> tuple[int, str]:
        code = main(["eval", "--task", "gsm8k", "--data", str(data), "--quiet", *map(str, more)])
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    settings = ("--max-new-tokens", 5, "--samples", 4, "--temperature", 1, "--top-p", 0.9, "--seed", 7)
    code, said = run("--model", model, "--output", transcripts, *settings, "--pass-at", 1, 2)
    assert code == 0, said
    for words in ("4 samples each, transformers", "pass@1 0.0000", "pass@2 0.0000", "maj@4", "of 12 answers"):
        assert words in said
    assert len(transcripts.read_text(encoding="utf-8").splitlines()) == 12
    assert "12 of 12 answers are an earlier run's" in run("--model", model, "--output", transcripts, *settings)[1]
    code, said = run("--export-lm-eval", tmp_path / "out")
    assert code == 0, said
    assert f"--include_path {tmp_path / 'out'}" in said
    assert run() == (2, "error: eval needs --model and --output; only --export-lm-eval does without\n")
    assert "pass@8 cannot be estimated from 4" in run("--samples", 4, "--temperature", 1, "--pass-at", 8)[1]
    assert "--format, --trace and --turns" in run("--format", "math")[1]
    assert main(["eval", "--model", "m", "--output", "o"]) == 2
    assert "--task (aime24, amc23" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("prompt", "part"),
    [
        ("{{ 1 / (question | length - 1) }}", "q.jsonl, line 2: the prompt of task 't' cannot be rendered (division"),
        ("{{ question + 5 }}", "line 1: the prompt of task 't' cannot be rendered (can only concatenate"),
        ("{{ question * 10**11 }}", "takes more than 1 GiB of memory"),
        ("{{ question * 10**7 }}", "makes a text of"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "does not end within"),
    ],
    ids=["second-row", "type", "memory", "long", "endless"],
)
def test_templates_that_break_name_the_row(tmp_path: Path, prompt: str, part: str) -> None:
    (tmp_path / "q.jsonl").write_text('{"q": "two", "a": "1"}\n{"q": "x", "a": "2"}\n')
    columns = {"question": "q", "answer": "a"}
    task = {"source": {"path": "q.jsonl", "split": "train"}, "columns": columns, "prompt": prompt}
    (tmp_path / "t.yaml").write_text(yaml.safe_dump(task))
    with pytest.raises(DataError) as error:
        task_examples(load_task(tmp_path / "t.yaml"))
    assert part in str(error.value)


def test_a_template_that_does_not_compile_in_time_is_refused(tmp_path: Path) -> None:
    task = {
        "source": {"path": "q"},
        "columns": {"question": "q", "answer": "a"},
        "prompt": "{{ '%0999999999d' % 5 }}",
    }
    (tmp_path / "t.yaml").write_text(yaml.safe_dump(task))
    with pytest.raises(ConfigError, match=r"t\.yaml: prompt: not a Jinja template: it"):
        load_task(tmp_path / "t.yaml")


def test_prompts_see_the_row_as_python_has_it(tmp_path: Path) -> None:
    import datetime

    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"q": ["x"], "a": ["1"], "d": [datetime.date(2024, 5, 6)]}), tmp_path / "q.parquet")
    columns = {"question": "q", "answer": "a"}
    task = {"source": {"path": "q.parquet"}, "columns": columns, "prompt": "{{ row.d.year + 1 }} {{ question }}"}
    (tmp_path / "t.yaml").write_text(yaml.safe_dump(task))
    (example,) = task_examples(load_task(tmp_path / "t.yaml"))
    assert example.prompt == "2025 x"
