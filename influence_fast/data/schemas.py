"""Dataset schemas: which columns hold the prompt, the completion and the answer, and how a row becomes examples.

| format              | columns                                                                    |
|---------------------|----------------------------------------------------------------------------|
| `prompt_completion` | `prompt`, `completion`: text, or TRL's list of messages in each            |
| `messages`          | `messages`: list of `{"role", "content"}`                                  |
| `gsm8k`             | `question`, `answer` with the final answer after `####`                    |
| `limo`              | `question`, `solution`, optional `answer`                                  |
| `math`              | `problem`, `solution`, optional `answer` (else the last `\\boxed{}`)        |
| `openr1`            | `problem`, `generations` (one text a trace) and verdicts parallel to them  |

Every schema may also have an id column (`id`, `uuid` or `unique_id`), `answer` and `label`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from influence_fast.data.boxed import last_boxed
from influence_fast.data.rows import Row, Rows
from influence_fast.errors import ConfigError, DataError, did_you_mean, listing

logger = logging.getLogger(__name__)

Turn = tuple[str, str]  # (role, content)

ID_COLUMNS = ("id", "uuid", "unique_id")
TRACE_CHOICES = ("first", "first_correct", "all", "all_correct")


@dataclass(frozen=True, slots=True)
class Example:
    """One training or validation example as plain text, before any chat template.

    `row` is the index of the source row and `trace` the index within the row's `generations` where it has
    several; `label` is the known kind of corruption, if any. `context` holds the (role, content) turns that
    come before the prompt in a conversation, system turn included; most examples have none. `between` holds the turns
    after the prompt and before the completion (an earlier assistant turn, a tool's result). `learnt` names the earlier
    assistant turns that are trained on beside the completion, as indices into `turns`. `reasoning` is reasoning that
    the data holds in a field of its own; `completion` begins with it, between `<think>\\n` and `\\n</think>\\n\\n`.
    `ended` is False for an answer that was cut off: nobody chose to end it there, so no end of turn follows it.
    `token_ids` are the tokens of a completion that was generated, its end included: they are taken as they are.
    """

    id: str
    prompt: str
    completion: str
    answer: str | None = None
    row: int = 0
    label: str | None = None
    trace: int | None = None
    context: tuple[Turn, ...] = ()
    ended: bool = True
    between: tuple[Turn, ...] = ()
    learnt: tuple[int, ...] = ()
    reasoning: str | None = None
    token_ids: tuple[int, ...] | None = None

    @property
    def turns(self) -> tuple[Turn, ...]:
        """All turns before the completion: the context, the prompt, and what lies between it and the completion."""
        return (*self.context, ("user", self.prompt), *self.between)


class Cells:
    """One source row, read through the column renames; every complaint names the row and the remedy."""

    def __init__(self, row: Row, index: int, rows: Rows, names: Mapping[str, str]) -> None:
        self.row = row
        self.index = index
        self.rows = rows
        self.names = names

    def column(self, name: str) -> str:
        """What the source calls the column that the schema calls `name`."""
        return self.names.get(name, name)

    def error(self, problem: str) -> DataError:
        return DataError(f"{self.rows.place(self.index)}: {problem}")

    def value(self, name: str) -> Any:
        column = self.column(name)
        if self.row.get(column) is None:
            state = "is null" if column in self.row else "is missing"
            raise self.error(f"column {column!r} {state}; fill it in or remove the row")
        return self.row[column]

    def as_text(self, value: Any, what: str) -> str:
        if not isinstance(value, str):
            raise self.error(f"{what} is a {type(value).__name__}, not text; convert it to a string")
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise self.error(f"{what} holds half a surrogate pair; re-encode the text as UTF-8") from None
        return value

    def text(self, name: str) -> str:
        return self.as_text(self.value(name), f"column {self.column(name)!r}")

    def optional(self, name: str) -> str | None:
        """An optional short value (answer, label); numbers become text, nothing or `""` (CSV's null) is None."""
        value = self.row.get(self.column(name))
        if value is None or isinstance(value, str):
            return value or None
        if isinstance(value, int | float):
            return str(value)
        raise self.error(
            f"column {self.column(name)!r} is a {type(value).__name__}, not text or a number; "
            "convert it, or drop the column"
        )

    def sequence(self, name: str) -> list[Any]:
        value = self.value(name)
        if not isinstance(value, list):
            raise self.error(f"column {self.column(name)!r} is a {type(value).__name__}, not a list")
        return value

    def turns(self, name: str) -> list[Turn]:
        """A list of messages as (role, content)."""
        column = self.column(name)
        turns = []
        for i, message in enumerate(self.sequence(name)):
            what = f"message {i} of column {column!r}"
            if not isinstance(message, dict) or not isinstance(message.get("role"), str):
                raise self.error(f'{what} is not of the form {{"role": ..., "content": ...}}; rewrite it so')
            for key in ("tool_calls", "function_call", "reasoning_content", "thinking"):
                if message.get(key):
                    raise self.error(f"{what} has {key!r}, which is not supported; put its text in 'content'")
            content = message.get("content")
            if isinstance(content, list) and all(_is_text_part(part) for part in content):
                content = "".join(part["text"] for part in content)
            turns.append((message["role"], self.as_text(content, f"the content of {what}")))
        return turns


def _is_text_part(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


@dataclass(frozen=True)
class Draft:
    """What a schema takes from a row; ids, labels and row numbers are the same for all schemas."""

    prompt: str
    completion: str
    answer: str | None
    trace: int | None = None
    context: tuple[Turn, ...] = ()
    cut: bool = False  # turns after the completion were left out


Trace = str | int


def _conversation(cells: Cells, turns: list[Turn], completion: str) -> Draft:
    """The last user turn is the prompt, what is before it the context."""
    if not turns or turns[-1][0] != "user":
        last = f"a {turns[-1][0]!r} turn" if turns else "nothing"
        raise cells.error(f"{last} comes before the completion where a 'user' turn is needed; mend the row")
    return Draft(turns[-1][1], completion, cells.optional("answer"), context=tuple(turns[:-1]))


def _prompt_completion(cells: Cells, trace: Trace) -> list[Draft]:
    if isinstance(cells.value("completion"), list):
        turns = cells.turns("completion")
        if len(turns) != 1 or turns[0][0] != "assistant":
            raise cells.error("column 'completion' must hold exactly one 'assistant' message; mend the row")
        completion = turns[0][1]
    else:
        completion = cells.text("completion")
    if isinstance(cells.value("prompt"), list):
        return [_conversation(cells, cells.turns("prompt"), completion)]
    return [Draft(cells.text("prompt"), completion, cells.optional("answer"))]


def _messages(cells: Cells, trace: Trace) -> list[Draft]:
    turns = cells.turns("messages")
    count = len(turns)
    while turns and turns[-1][0] != "assistant":
        turns.pop()
    if not turns:
        raise cells.error("no 'assistant' message to train on; add one or remove the row")
    return [replace(_conversation(cells, turns[:-1], turns[-1][1]), cut=len(turns) < count)]


def _gsm8k(cells: Cells, trace: Trace) -> list[Draft]:
    solution = cells.text("answer")
    _, mark, answer = solution.rpartition("####")
    if not mark or not answer.strip():
        raise cells.error(
            f"column {cells.column('answer')!r} has no final answer after '####'; add it, or load the file as "
            'format="prompt_completion" with columns={"prompt": ..., "completion": ...}'
        )
    return [Draft(cells.text("question"), solution, answer.strip().replace(",", ""))]


def _limo(cells: Cells, trace: Trace) -> list[Draft]:
    return [Draft(cells.text("question"), cells.text("solution"), cells.optional("answer"))]


def _math(cells: Cells, trace: Trace) -> list[Draft]:
    solution = cells.text("solution")
    return [Draft(cells.text("problem"), solution, cells.optional("answer") or last_boxed(solution) or None)]


def _openr1(cells: Cells, trace: Trace) -> list[Draft]:
    traces = cells.sequence("generations")
    if isinstance(trace, int):
        chosen = [trace] if trace < len(traces) else []
    elif trace in ("first", "all"):
        chosen = list(range(len(traces)))
    else:
        chosen = _correct_traces(cells, len(traces))
    if trace in ("first", "first_correct"):
        chosen = chosen[:1]
    prompt, answer = cells.text("problem"), cells.optional("answer")
    return [
        Draft(prompt, cells.as_text(traces[i], f"trace {i} of {cells.column('generations')!r}"), answer, trace=i)
        for i in chosen
    ]


def _correct_traces(cells: Cells, count: int) -> list[int]:
    """Indices of complete traces that math-verify found correct.

    Where it confirmed none of a row's traces, OpenR1's second verdict (`correctness_llama`) is asked: it was
    made for the answers that math-verify cannot parse.
    """

    def flags(name: str) -> list[Any] | None:
        if cells.row.get(cells.column(name)) is None:
            return None
        found = cells.sequence(name)
        if len(found) != count:
            raise cells.error(
                f"column {cells.column(name)!r} has {len(found)} entries for {count} traces; mend the row"
            )
        return found

    verdicts = flags("correctness_math_verify")
    second = flags("correctness_llama")
    if verdicts is None and second is None:
        cells.value("correctness_math_verify")  # raises, by name
    if not any(verdicts or []):
        verdicts = second or []
    complete = flags("is_reasoning_complete") or [True] * count
    return [i for i, (right, whole) in enumerate(zip(verdicts or [], complete, strict=False)) if right and whole]


@dataclass(frozen=True)
class Schema:
    """A known layout of columns: `convert` takes a row's cells and the choice of trace."""

    name: str
    required: tuple[str, ...]
    optional: tuple[str, ...]
    convert: Callable[[Cells, Trace], list[Draft]]


# In the order of detection: OpenR1 also has `messages` and `solution`, LIMO also has `answer`.
SCHEMAS: dict[str, Schema] = {
    schema.name: schema
    for schema in (
        Schema("prompt_completion", ("prompt", "completion"), ("answer",), _prompt_completion),
        Schema(
            "openr1",
            ("problem", "generations"),
            ("answer", "correctness_math_verify", "correctness_llama", "is_reasoning_complete"),
            _openr1,
        ),
        Schema("messages", ("messages",), ("answer",), _messages),
        Schema("limo", ("question", "solution"), ("answer",), _limo),
        Schema("math", ("problem", "solution"), ("answer",), _math),
        Schema("gsm8k", ("question", "answer"), (), _gsm8k),
    )
}


def check_trace(trace: Trace) -> None:
    """Raises ConfigError unless `trace` is one of TRACE_CHOICES or an index from 0."""
    if isinstance(trace, bool) or not (
        trace >= 0 if isinstance(trace, int) else isinstance(trace, str) and trace in TRACE_CHOICES
    ):
        raise ConfigError(
            f"trace {trace!r} is not known; {did_you_mean(str(trace), TRACE_CHOICES)}, or an index from 0"
        )


def choose_schema(rows: Rows, format: str, columns: Mapping[str, str | None]) -> Schema:
    """The schema named by `format`, or found from the columns when it is `"auto"`.

    Raises ConfigError for an unknown format or rename, DataError where the columns do not fit.
    """
    if format != "auto" and format not in SCHEMAS:
        raise ConfigError(f"format {format!r} is not known; {did_you_mean(format, ['auto', *SCHEMAS])}")
    candidates = list(SCHEMAS.values()) if format == "auto" else [SCHEMAS[format]]
    known = {"id", "label"}.union(*(schema.required + schema.optional for schema in candidates))
    for name in columns:
        if name not in known:
            raise ConfigError(f"columns: {name!r} is not a column to rename; {did_you_mean(name, known)}")
    present = set(rows.columns)
    for name, column in columns.items():
        if column is not None and column not in present:
            raise DataError(
                f"{rows.name}: has no column {column!r} to take as {name!r}; {did_you_mean(column, present)}"
            )
    available = present | set(columns)
    renamed = set(columns) - {"id", "label", "answer"}
    fitting = [
        schema
        for schema in candidates
        if available.issuperset(schema.required) and renamed.issubset(schema.required + schema.optional)
    ]
    if fitting:
        return fitting[0]
    if format == "auto":
        schemas = "; ".join(f"{schema.name}: {', '.join(schema.required)}" for schema in SCHEMAS.values())
        raise DataError(
            f"{rows.name}: the columns {', '.join(rows.columns)} fit no known schema; name yours with "
            'columns={"prompt": "...", "completion": "..."} '
            f"(known: {schemas})"
        )
    missing = next(name for name in candidates[0].required if name not in available)
    raise DataError(
        f"{rows.name}: format {format!r} needs a column {missing!r}, found {', '.join(rows.columns)}; "
        f'name yours with columns={{"{missing}": "..."}}'
    )


def id_column(rows: Rows, columns: Mapping[str, str | None]) -> str | None:
    """The column that holds ids, or None when the row index serves."""
    if "id" in columns:
        return columns["id"]
    return next((name for name in ID_COLUMNS if name in rows.columns), None)


def read_examples(rows: Rows, format: str, trace: Trace, columns: Mapping[str, str | None]) -> Iterator[list[Example]]:
    """The examples of each row in turn: one, or none or several where the row holds traces to choose from.

    A warning at the end names the conversations that went on after their last assistant turn.
    """
    schema = choose_schema(rows, format, columns)
    names = {name: column for name, column in columns.items() if column is not None}
    ids = id_column(rows, columns)
    wanted = {names.get(name, name) for name in (*schema.required, *schema.optional, "label")}
    cut: list[int] = []
    try:
        for index, row in enumerate(rows.read(wanted | ({ids} if ids else set()))):
            cells = Cells(row, index, rows, names)
            name = _row_id(cells, ids)
            label = cells.optional("label")
            drafts = schema.convert(cells, trace)
            if any(draft.cut for draft in drafts):
                cut.append(index)
            yield [
                Example(
                    id=name if draft.trace is None else f"{name}#{draft.trace}",
                    prompt=draft.prompt,
                    completion=draft.completion,
                    answer=draft.answer,
                    row=index,
                    label=label,
                    trace=draft.trace,
                    context=draft.context,
                )
                for draft in drafts
            ]
    finally:  # a reader that has enough stops in the middle
        if cut:
            places = listing(rows.place(i).removeprefix(f"{rows.name}, ") for i in cut)
            logger.warning(
                "%s: %d conversations do not end with an assistant turn; what comes after their last one is left out, "
                "as no answer to it is there to learn: %s", rows.name, len(cut), places,
            )  # fmt: skip


def _row_id(cells: Cells, column: str | None) -> str:
    if column is None:
        return str(cells.index)
    value = cells.row.get(column)
    if not isinstance(value, str | int) or isinstance(value, bool) or value == "":
        raise cells.error(
            f"the id in column {column!r} is {value!r}; fill it in, name another column with "
            'columns={"id": "..."}, or use row numbers with columns={"id": None}'
        )
    return str(value)
