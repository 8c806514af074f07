"""Evaluation tasks: small YAML files with the source of the questions, the prompt and the grading.

Those of the package are in `eval_tasks/`; a file of one's own has the same keys:

    source: {path: owner/name, config: main, split: test}   # or a local file beside the YAML
    columns: {question: question, answer: answer}           # also id, solution, distractors
    answer: math                                            # math, last_number or choice
    prompt: "{{ question }}"                                # Jinja; also `options` (letter, text) and the whole `row`
    sampling: {max_new_tokens: 1024}                        # also temperature, top_p, samples, pass_at
    citation: "..."
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from influence_fast.data.examples import check_limit
from influence_fast.data.rows import load_rows
from influence_fast.data.schemas import Cells, Example
from influence_fast.errors import ConfigError, DataError, did_you_mean, shown, truncated_list
from influence_fast.evaluation.evaluate import EvalConfig
from influence_fast.evaluation.grading import ANSWER_KINDS, choice_letter, extract_answer
from influence_fast.guards import reading
from influence_fast.isolation import limited
from influence_fast.settings import from_dict, read_mapping

FOLDER = Path(__file__).with_name("eval_tasks")
LETTERS = "ABCDEFGHIJ"


@dataclass(frozen=True)
class TaskSource:
    """A hub id (or a local file), its configuration and its split."""

    path: str
    config: str | None = None
    split: str = "test"


@dataclass(frozen=True)
class TaskColumns:
    """The source's names of the columns that a task reads.

    Without an `answer` column the final answer is the solution's, in a box or after ####. With `distractors` (columns
    of text, or one column that is a list) the answer is the text of the right option, and the options are shuffled.
    """

    question: str
    answer: str | None = None
    id: str | None = None
    solution: str | None = None
    distractors: tuple[str, ...] = ()


@dataclass(frozen=True)
class TaskSampling:
    """Defaults of a task for the settings of the same names in `EvalConfig`."""

    max_new_tokens: int = 2048
    temperature: float = 0.0
    top_p: float = 1.0
    samples: int = 1
    pass_at: tuple[int, ...] = ()


@dataclass(frozen=True)
class Task:
    """A task as its file says; `name` is the file's name without its extension."""

    name: str
    source: TaskSource
    columns: TaskColumns
    prompt: str
    answer: str = "math"
    sampling: TaskSampling = field(default_factory=TaskSampling)
    citation: str = ""

    @property
    def evaluation(self) -> EvalConfig:
        """Return the settings to evaluate with; `dataclasses.replace` changes them."""
        return EvalConfig(answer_kind=self.answer, **asdict(self.sampling))


def known_tasks() -> list[str]:
    """Return the names of the tasks in the package."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_task(name_or_path: str | Path) -> Task:
    """Load an evaluation task: one of the package by its name, or your own by the path of its YAML file.

    Args:
        name_or_path: "gsm8k", "math500", ..., or a path that ends in .yaml or .yml.
    Returns:
        The task, for `task_examples`; its `evaluation` is the `EvalConfig` to use.
    Raises:
        ConfigError: unknown name (with all known), no such file, unknown or missing key, a value that does not fit, a
            prompt that is no Jinja template.
    Example:
        >>> load_task("gsm8k").source.path
        'openai/gsm8k'
    """
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        known = known_tasks()
        if str(name_or_path) not in known:
            hint = did_you_mean(str(name_or_path), known)
            raise ConfigError(f"unknown task {str(name_or_path)!r}; {hint}, or give the path of a .yaml file")
        path = FOLDER / f"{name_or_path}.yaml"
    try:
        raw = read_mapping(path, "a task")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such task file; {did_you_mean(path.stem, known_tasks())}") from None
    if isinstance(source := raw.get("source"), dict) and isinstance(source.get("path"), str):
        beside = path.parent / source["path"]
        if os.path.isfile(beside):
            raw = raw | {"source": source | {"path": str(beside)}}
    try:
        with reading("the task", ConfigError):
            task: Task = from_dict(Task, {"name": path.stem} | raw)
            _check(task)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error.marked}") from error.__cause__
    return task


def _check(task: Task) -> None:
    if task.answer not in ANSWER_KINDS:
        raise ConfigError(f"answer: unknown value {shown(task.answer)}; {did_you_mean(task.answer, ANSWER_KINDS)}")
    if task.columns.answer is None and task.columns.solution is None:
        raise ConfigError("columns: name an 'answer' column, or a 'solution' that holds the final answer")
    if task.columns.distractors and (task.answer != "choice" or task.columns.answer is None):
        raise ConfigError("columns.distractors: needs 'answer: choice' and an 'answer' column, the right option's text")
    if why := _no_template(task.prompt):
        raise ConfigError(f"prompt: not a Jinja template: {why}")
    # This raises where the sampling settings do not fit together.
    _ = task.evaluation


def task_examples(
    task: Task, limit: int | None = None, source: str | Path | None = None, split: str | None = None
) -> list[Example]:
    """Load the questions of a task as examples, in the order of the rows.

    Args:
        task: as `load_task` returns it.
        limit: the number of questions at most.
        source: a local file in place of the task's own source.
        split: in place of the task's own.
    Returns:
        Examples whose `prompt` is the rendered template, `answer` the reference (a letter for a choice), and
        `completion` the solution where the source has one, else the answer.
    Raises:
        DataError: naming file and row: source not found, a column missing, repeated ids, a row without a usable
            answer, a prompt that cannot be rendered.
        ConfigError: a `limit` that is no whole number of at least 1.
    Example:
        >>> questions = task_examples(load_task("gsm8k"), limit=100)  # doctest: +SKIP
    """
    check_limit(limit)
    path = source if source is not None else _hub_path(task.source)
    rows = load_rows(str(path), split=split or task.source.split)
    names = {name: column for name, column in asdict(task.columns).items() if isinstance(column, str)}
    for column in [*names.values(), *task.columns.distractors]:
        if column not in rows.columns:
            raise DataError(
                f"{rows.name}: has no column {column!r}, which task {task.name!r} reads; "
                f"{did_you_mean(column, rows.columns)}"
            )
    wanted = None if "row" in task.prompt else {*names.values(), *task.columns.distractors}
    questions = (
        _question(task, Cells(row, index, rows, names)) for index, row in enumerate(islice(rows.read(wanted), limit))
    )
    examples: list[Example] = []
    while batch := list(islice(questions, _BATCH)):
        examples += _with_prompts(task, batch)
    repeated = [f"{name} ({n} times)" for name, n in Counter(e.id for e in examples).items() if n > 1]
    if repeated:
        raise DataError(
            f"{rows.name}: ids must be unique, repeated are {truncated_list(repeated)}; name another id column"
        )
    return examples


@dataclass(frozen=True)
class _Question:
    """One row as an example without its prompt, and the values for the prompt's template."""

    cells: Cells
    example: Example
    values: dict[str, Any]


def _question(task: Task, cells: Cells) -> _Question:
    with reading(cells.rows.place(cells.index)):
        name = str(cells.value("id")) if task.columns.id else str(cells.index)
        question = cells.text("question")
        answer = _answer(task, cells)
        solution = _joined(cells.value("solution"), "\n\n") if task.columns.solution else ""
        options: list[tuple[str, str]] = []
        if task.columns.distractors:
            options, answer = _options(name, answer, list(_distractors(task, cells)), cells)
        example = Example(id=name, prompt="", completion=solution or answer, answer=answer, row=cells.index)
        row = cells.row if "row" in task.prompt else {}
        return _Question(cells, example, {"question": question, "options": options, "row": row})


# ---- the prompt: a program of whoever wrote the task, so it runs in a limited process ------------------------------

_BATCH = 1000  # questions rendered by one process
# Seconds of processor time for a batch; a thousand prompts take a twentieth of a second.
_SECONDS = 2
_MEMORY = 1 << 30  # bytes of address space
# Characters of one prompt.
_CHARACTERS = 1 << 22


def _render(template: str, values: list[dict[str, Any]]) -> tuple[list[str], int | None, str]:
    """Render `template` for `values` in a limited process.

    Returns the texts up to an error, the error's place (None: in all), and the error ("" for none).
    """
    work = {"task": "prompts", "template": template, "values": values, "characters": _CHARACTERS}
    done = limited(work, seconds=_SECONDS, memory=_MEMORY)
    if done.stopped == "time":
        return [], None, f"it does not end within {_SECONDS} s of processor time"
    if done.stopped == "memory":
        return [], None, f"it takes more than {_MEMORY >> 30} GiB of memory"
    try:
        found = json.loads(done.output)
    except ValueError:
        return [], None, f"its process ended without a word ({done.errors[-200:].decode(errors='replace')})"
    place, error = found["error"] or (None, "")
    return found["texts"], place, error


@functools.lru_cache(maxsize=64)
def _no_template(template: str) -> str:
    """Return why `template` cannot be compiled, "" where it can.

    Compiling computes constant parts, which may never end.
    """
    return _render(template, [])[2]


def _with_prompts(task: Task, questions: Sequence[_Question]) -> list[Example]:
    first = questions[0].cells
    with reading(f"{first.rows.place(first.index)} and those after it, for task {task.name!r}"):
        texts, place, error = _render(task.prompt, [question.values for question in questions])
    if error:
        at = questions[place or 0].cells
        raise at.error(f"the prompt of task {task.name!r} cannot be rendered ({error}); mend its template")
    return [replace(question.example, prompt=text) for question, text in zip(questions, texts, strict=True)]


def _hub_path(source: TaskSource) -> str:
    return source.path if source.config is None else f"{source.path}:{source.config}"


def _joined(value: Any, between: str) -> str:
    """Return the text of a cell; the entries of a list are joined."""
    return between.join(str(part) for part in value) if isinstance(value, list) else str(value)


def _answer(task: Task, cells: Cells) -> str:
    """Return the reference answer of a row as text."""
    if task.columns.answer is None:
        answer = extract_answer(_joined(cells.value("solution"), "\n\n"))
        if answer is None:
            raise cells.error(
                f"column {cells.column('solution')!r} states no final answer (in a box or after ####); add one, or "
                "name an answer column"
            )
    else:
        answer = _joined(cells.value("answer"), ", ")
    if task.answer != "choice":
        # These dollar signs enclose mathematics and are no price.
        answer = re.sub(r"(?<!\\)\$", "", answer)
    elif not task.columns.distractors and choice_letter(answer) is None:
        raise cells.error(f"the answer {answer!r} is no letter from A to J; name the columns of the other options")
    answer = answer.strip()
    if not answer:
        raise cells.error(f"column {cells.column('answer')!r} is empty; fill it in or remove the row")
    return answer


def _distractors(task: Task, cells: Cells) -> Iterator[str]:
    for column in task.columns.distractors:
        value = cells.value(column)
        yield from (str(part).strip() for part in (value if isinstance(value, list) else [value]))


def _options(name: str, right: str, wrong: list[str], cells: Cells) -> tuple[list[tuple[str, str]], str]:
    """Return the options as (letter, text), and the letter of the right one.

    Their order is a function of the row's id alone: that of SHA-256 over the id and the option's place.
    """
    texts = [right, *wrong]
    if not 2 <= len(texts) <= len(LETTERS):
        raise cells.error(f"has {len(texts)} options; a choice has from 2 to {len(LETTERS)}")
    order = sorted(range(len(texts)), key=lambda i: hashlib.sha256(f"{name}\n{i}".encode()).digest())
    options = [(LETTERS[place], texts[i]) for place, i in enumerate(order)]
    return options, LETTERS[order.index(0)]
