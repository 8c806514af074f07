"""Dataset schemas: which columns hold the prompt, the completion and the answer, and how a row becomes examples.

| format              | columns                                                                                       |
|---------------------|-----------------------------------------------------------------------------------------------|
| `prompt_completion` | `prompt`, `completion`: text, or TRL's list of messages in each                               |
| `openr1`            | `problem`, `generations` (one text a trace) and verdicts parallel to them                     |
| `preference`        | `chosen` (taken), `rejected` (not read), optional `prompt`: text or messages                  |
| `s1k`               | `question`, `thinking_trajectories`, `attempt`, and the answer in `solution`                  |
| `s1k_1.1`           | the same with `deepseek_thinking_trajectory`, `deepseek_attempt`                              |
| `s1k_gemini`        | the same with `gemini_thinking_trajectory`, `gemini_attempt`                                  |
| `openthoughts`      | `problem`, `deepseek_reasoning`, `deepseek_solution`, optional `ground_truth_solution`        |
| `sharegpt`          | `conversations`: list of `{"from", "value"}` (also OpenThoughts), optional `system`           |
| `messages`          | `messages`: list of `{"role", "content"}` (also NuminaMath 1.0)                               |
| `openmath`          | `problem`, `generated_solution`, `expected_answer` (OpenMathReasoning, OpenMathInstruct-2)    |
| `openmath_1`        | the same with `question` (OpenMathInstruct-1)                                                 |
| `alpaca`            | `instruction`, optional `input` and `system`, `output`                                        |
| `metamath`          | `query`, `response` with the final answer after `The answer is:`                              |
| `limo`              | `question`, `solution`, optional `answer` (else the last `\\boxed{}`)                          |
| `math`              | `problem`, `solution`, optional `answer` (else the last `\\boxed{}`; also NuminaMath 1.5)      |
| `orca_math`         | `question`, `answer` that is a worded solution                                                |
| `gsm8k`             | `question`, `answer` with the final answer after `####`                                       |

The order is that of detection: a source is read by the first schema whose columns it has, those with a trace before
those that have a solution alone. Every schema may also have an id column (`id`, `uuid` or `unique_id`), `answer` and
`label`. NaN in any cell is a null. `prompt_completion` reads a column named as `reasoning` before the completion.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from numbers import Integral

from influence_fast import guards
from influence_fast.data import layouts
from influence_fast.data.cells import Cells, Turn, whole_number
from influence_fast.data.conversations import TURN_CHOICES, Draft
from influence_fast.data.layouts import TRACE_CHOICES, Converter, Reading, Trace
from influence_fast.data.read_warnings import ReadWarnings
from influence_fast.data.rows import Rows
from influence_fast.data.unread_columns import UnreadColumns, likely_columns
from influence_fast.errors import ConfigError, DataError, did_you_mean, setting, shown

__all__ = [
    "SCHEMAS", "TRACE_CHOICES", "TURN_CHOICES", "Cells", "Example", "Schema", "Trace", "Turn", "check_trace",
    "check_turns", "choose_schema", "id_column", "read_examples",
]  # fmt: skip

logger = logging.getLogger(__name__)

ID_COLUMNS = ("id", "uuid", "unique_id")

# What pandas reads as null from CSV, in lower case.
_CSV_NULLS = ("", "nan", "-nan", "na", "n/a", "#n/a", "#na", "<na>", "none", "null", "nat")

# Rows read to distinguish schemas of the same columns.
_SAMPLE = 32


@dataclass(frozen=True, slots=True)
class Example:
    r"""One training or validation example as plain text, before any chat template.

    Attributes:
        id: unique within its set.
        prompt: the last user turn before the completion.
        completion: the text that the loss is on.
        answer: the final answer, where the data states one.
        row: the index of the source row.
        label: the known kind of corruption, if any.
        trace: the index within the row's `generations` where it has several.
        context: the (role, content) turns before the prompt in a conversation, system turn included; most examples
            have none.
        ended: False for an answer that was cut off: nobody chose to end it there, so no end of turn follows it.
        between: the turns after the prompt and before the completion (an earlier assistant turn, a tool's result).
        learnt: the earlier assistant turns that are trained on beside the completion, as indices into `turns`.
        reasoning: reasoning that the data holds in a field of its own; `completion` begins with it, between
            `<think>\n` and `\n</think>\n\n`.
        token_ids: the tokens of a completion that was generated, its end included: they are taken unchanged.
    Example:
        >>> inf.Example("a", "What is 12 + 7?", "12 + 7 = 19.").turns
        (('user', 'What is 12 + 7?'),)
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
        """Return all turns before the completion: the context, the prompt, and the turns after it."""
        return (*self.context, ("user", self.prompt), *self.between)


@dataclass(frozen=True)
class Schema:
    """A known layout of columns: `convert` takes a row's cells and the reader's choices.

    `named`: columns that are read only where `columns` names them. `ignored`: columns that repeat what is read, or that
    `remark` is about. `remark`: a warning logged for every source of this layout. `fits`: returns whether rows that
    have the columns are of this layout, used only where the format is "auto".
    """

    name: str
    required: tuple[str, ...]
    optional: tuple[str, ...]
    convert: Converter
    named: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    remark: str | None = None
    fits: Callable[[Sequence[Cells]], bool] | None = None

    @property
    def columns(self) -> tuple[str, ...]:
        """Return all columns that can be renamed."""
        return self.required + self.optional + self.named

    def read(self, names: Mapping[str, str | None]) -> set[str]:
        """Return the source's columns that the converter reads."""
        named = [name for name in self.named if name in names]
        found = {names.get(name, name) for name in (*self.required, *self.optional, *named, "label")}
        return {column for column in found if column is not None}


_VERDICTS = ("correctness_math_verify", "correctness_llama", "is_reasoning_complete")
_OPEN_MATH = ("generated_solution",)

# In the order of detection: what has a trace stands before what has a solution alone, since most sets of traces keep
# the reference solution too. A conversation in `conversations` is the trace where `messages` shows the solution.
SCHEMAS: dict[str, Schema] = {
    schema.name: schema
    for schema in (
        Schema(
            "prompt_completion",
            ("prompt", "completion"),
            ("answer",),
            layouts.prompt_completion,
            named=("reasoning", "system"),
        ),
        Schema("openr1", ("problem", "generations"), ("answer", *_VERDICTS), layouts.openr1, ignored=("messages",)),
        Schema(
            "preference",
            ("chosen", "rejected"),
            ("prompt", "answer", "system"),
            layouts.preference,
            ignored=("messages", "rejected"),
            remark="rows of a preference: 'chosen' is taken as the completion, and 'rejected' is not read",
        ),
        *(
            Schema(
                name,
                (prompt, reasoning, attempt),
                (solution, "answer"),
                layouts.reasoned(prompt, reasoning, attempt, solution),
            )
            for name, prompt, reasoning, attempt, solution in (
                ("s1k", "question", "thinking_trajectories", "attempt", "solution"),
                ("s1k_1.1", "question", "deepseek_thinking_trajectory", "deepseek_attempt", "solution"),
                ("s1k_gemini", "question", "gemini_thinking_trajectory", "gemini_attempt", "solution"),
                ("openthoughts", "problem", "deepseek_reasoning", "deepseek_solution", "ground_truth_solution"),
            )
        ),
        Schema(
            "sharegpt",
            ("conversations",),
            ("answer", "solution", "system"),
            layouts.chat("conversations", reads_system=True),
        ),
        Schema(
            "messages",
            ("messages",),
            ("answer", "solution"),
            layouts.chat("messages", reads_system=False),
            named=("system",),
        ),
        Schema("openmath", ("problem", *_OPEN_MATH), ("expected_answer",), layouts.openmath("problem")),
        Schema("openmath_1", ("question", *_OPEN_MATH), ("expected_answer",), layouts.openmath("question")),
        Schema("alpaca", ("instruction", "output"), ("input", "system", "answer"), layouts.alpaca),
        Schema("metamath", ("query", "response"), ("answer",), layouts.metamath),
        Schema("limo", ("question", "solution"), ("answer",), layouts.solved("question")),
        Schema("math", ("problem", "solution"), ("answer",), layouts.solved("problem")),
        Schema("orca_math", ("question", "answer"), (), layouts.orca_math, fits=layouts.is_worded),
        Schema("gsm8k", ("question", "answer"), (), layouts.gsm8k),
    )
}

_CONVERSATIONS = ("prompt_completion", "preference", "sharegpt", "messages")


def has_turns(format: str) -> bool:
    """Return whether rows of this schema may be conversations of several turns."""
    return format in _CONVERSATIONS


def check_trace(trace: Trace) -> None:
    """Raise ConfigError unless `trace` is one of TRACE_CHOICES or an index from 0."""
    if isinstance(trace, bool) or not (
        trace >= 0 if isinstance(trace, int) else isinstance(trace, str) and trace in TRACE_CHOICES
    ):
        raise ConfigError(
            f"{setting('trace')} {shown(trace)} is not known; {did_you_mean(str(trace), TRACE_CHOICES)}, or an index "
            "from 0"
        )


def check_turns(turns: str) -> None:
    """Raise ConfigError unless `turns` is one of TURN_CHOICES."""
    if not isinstance(turns, str) or turns not in TURN_CHOICES:
        raise ConfigError(f"turns {shown(turns)} is not known; {did_you_mean(str(turns), TURN_CHOICES)}")


def choose_schema(rows: Rows, format: str, columns: Mapping[str, str | None]) -> Schema:
    """Return the schema named by `format`, or the one detected from the columns when it is `"auto"`.

    Raises ConfigError for an unknown format or rename, DataError where the columns do not fit.
    """
    if format != "auto" and (not isinstance(format, str) or format not in SCHEMAS):
        raise ConfigError(
            f"{setting('format')} {shown(format)} is not known; {did_you_mean(format, ['auto', *SCHEMAS])}"
        )
    candidates = list(SCHEMAS.values()) if format == "auto" else [SCHEMAS[format]]
    known = {"id", "label"}.union(*(schema.columns for schema in candidates))
    present = set(rows.columns)
    for name, column in columns.items():
        if name not in known:
            raise ConfigError(f"columns: {name!r} is not a column to rename; {did_you_mean(name, known)}")
        if column is not None and column not in present:
            raise DataError(
                f"{rows.name}: has no column {column!r} to take as {name!r}; {did_you_mean(column, present)}"
            )
    left_out = {name for name, column in columns.items() if column is None}
    available = (present | set(columns)) - left_out
    renamed = set(columns) - {"id", "label", "answer"}
    for schema in candidates:
        if not (available.issuperset(schema.required) and renamed.issubset(schema.columns)):
            continue
        if format != "auto" or schema.fits is None or schema.fits(_sample(rows, schema, columns)):
            return schema
    if format == "auto":
        raise _no_schema(rows)
    missing = next(name for name in candidates[0].required if name not in available)
    raise DataError(
        f"{rows.name}: format {format!r} needs a column {missing!r}, found {', '.join(rows.columns)}; "
        f"name yours with {setting('columns', {missing: '...'})}"
    )


def _sample(rows: Rows, schema: Schema, columns: Mapping[str, str | None]) -> list[Cells]:
    first = islice(rows.read(schema.read(columns)), _SAMPLE)
    return [Cells(row, index, rows, columns) for index, row in enumerate(first)]


def _no_schema(rows: Rows) -> DataError:
    prompt, completion, reasoning = likely_columns(rows.columns)
    named = {"prompt": prompt, "completion": completion} | ({} if reasoning is None else {"reasoning": reasoning})
    schemas = "; ".join(f"{schema.name}: {', '.join(schema.required)}" for schema in SCHEMAS.values())
    return DataError(
        f"{rows.name}: the columns {', '.join(rows.columns)} fit no known schema; name yours with "
        f"{setting('columns', named)} (known: {schemas})"
    )


def id_column(rows: Rows, columns: Mapping[str, str | None]) -> str | None:
    """Return the column that holds ids, or None where the row index serves."""
    if "id" in columns:
        return columns["id"]
    return next((name for name in ID_COLUMNS if name in rows.columns), None)


def read_examples(
    rows: Rows, format: str, trace: Trace, columns: Mapping[str, str | None], turns: str = "last"
) -> Iterator[list[Example]]:
    """Yield the examples of each row in turn: one, or none or several where the row holds traces to choose from.

    Warnings at the end name the conversations that went on after their last assistant turn, blank traces, and columns
    that look like traces and are not read.
    """
    schema = choose_schema(rows, format, columns)
    if schema.remark is not None:
        logger.warning("%s: %s", rows.name, schema.remark)
    ids = id_column(rows, columns)
    wanted = schema.read(columns) | ({ids} if ids else set())
    unread = UnreadColumns(rows, wanted, {columns.get(name, name) for name in schema.ignored})
    warnings, reading = ReadWarnings(rows), Reading(trace, turns)
    try:
        for index, row in enumerate(rows.read(wanted | unread.suspects)):
            cells = Cells(row, index, rows, columns)
            with guards.reading(rows.place(index)):
                name, label = _row_id(cells, ids), _label(cells)
                if label is not None and _is_verdict(label):
                    warnings.verdicts.append((index, label))
                    label = None
                drafts = schema.convert(cells, reading)
                warnings.see(cells, drafts)
                if schema.name == "openr1":
                    warnings.blank += [(index, i) for i in layouts.blank_traces(cells)]
                unread.see(row, drafts)
                found = [_example(draft, name, label, index) for draft in drafts]
            yield found
    finally:
        # A reader that has enough examples stops in the middle.
        warnings.say()
        unread.say(logger, SCHEMAS.values(), schema, columns)


def _example(draft: Draft, name: str, label: str | None, row: int) -> Example:
    return Example(
        id=name if draft.trace is None else f"{name}#{draft.trace}",
        prompt=draft.prompt,
        completion=draft.completion,
        answer=draft.answer,
        row=row,
        label=label,
        trace=draft.trace,
        context=draft.context,
        between=draft.between,
        learnt=draft.learnt,
        reasoning=draft.reasoning,
    )


def _label(cells: Cells) -> str | None:
    """Return the label of a row, None where it has none.

    CSV writes a null as one of `_CSV_NULLS`: no kind of corruption is called so, whereas an answer may be.
    """
    label = cells.optional("label")
    is_csv = cells.rows.suffix.startswith((".csv", ".tsv"))
    return None if is_csv and label is not None and label.strip().lower() in _CSV_NULLS else label


def _is_verdict(label: str) -> bool:
    """Return whether a label is a truth value or a number (KTO's are), which name no kind of corruption."""
    try:
        float(label)
    except ValueError:
        return label.strip().lower() in ("true", "false")
    return True


def _row_id(cells: Cells, column: str | None) -> str:
    if column is None:
        return str(cells.index)
    value = whole_number(cells.row.get(column))
    if not isinstance(value, str | Integral) or isinstance(value, bool) or value == "":
        raise cells.error(
            f"the id in column {column!r} is {value!r}; fill it in, name another column with "
            f"{setting('columns', {'id': '...'})}, or use row numbers with {setting('columns', {'id': None})}"
        )
    return str(value)
