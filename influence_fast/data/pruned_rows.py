"""Keep the source's own rows with only the kept examples in them, traces within a row included."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from influence_fast.data.cells import is_list, is_null, truth
from influence_fast.data.rows import Row, Rows
from influence_fast.data.schemas import Example
from influence_fast.errors import DataError

_TRACE_COLUMNS = (
    "correctness_math_verify",
    "correctness_llama",
    "is_reasoning_complete",
    "finish_reasons",
)


def kept_rows(
    rows: Rows, examples: Iterable[Example], columns: Mapping[str, str | None] | None = None
) -> Iterator[Row]:
    """Yield the source rows of `examples`, in source order and with all their columns.

    A row with traces keeps only those of `examples`: `generations` and every column parallel to it are
    filtered alike (the known verdict columns, and any list column as long as `generations` in every row).
    `correctness_count` is counted again, and where `messages` shows a trace that was dropped it shows the
    first kept one instead, so that a trainer that reads `messages` does not train on a pruned trace.

    Raises DataError, naming the row: a verdict column that is not as long as `generations`.
    """
    kept: dict[int, set[int] | None] = {}
    for example in examples:
        if example.trace is None:
            kept[example.row] = None
        else:
            traces = kept.setdefault(example.row, set())
            if traces is not None:
                traces.add(example.trace)
    generations = (columns or {}).get("generations") or "generations"
    parallel: list[str] = []
    if any(traces is not None for traces in kept.values()):
        parallel = _parallel_columns(rows, generations)
    for index, row in enumerate(rows):
        if index in kept:
            traces = kept[index]
            if traces is not None:
                _check_lengths(row, rows.place(index), generations, parallel)
            yield row if traces is None else _keep_traces(row, sorted(traces), generations, parallel)


def _parallel_columns(rows: Rows, generations: str) -> list[str]:
    # Columns of all rows, since those of JSON lines need not be in the first.
    parallel: dict[str, bool] = {}
    for row in rows:
        count = _count(row.get(generations))
        for column, value in row.items():
            parallel[column] = parallel.get(column, True) and (is_null(value) or _is_per_trace(value, count))
    return [column for column, same in parallel.items() if same or column in _TRACE_COLUMNS]


def _count(traces: Any) -> int:
    """Return the number of traces in a cell, which may be null or an array; 0 where it holds no list."""
    return len(traces) if is_list(traces) else 0


def _is_per_trace(value: Any, count: int) -> bool:
    """Return whether a cell is a list of `count` entries, one a trace.

    Messages are none, though two of them stand beside two traces in most rows of OpenR1.
    """
    if not is_list(value) or len(value) != count:
        return False
    return not any(isinstance(item, dict) and ("role" in item or "from" in item) for item in value)


def _check_lengths(row: Row, place: str, generations: str, parallel: list[str]) -> None:
    count = _count(row[generations])
    for column in parallel:
        value = row.get(column)
        if is_list(value) and len(value) != count:
            raise DataError(f"{place}: column {column!r} has {len(value)} entries for {count} traces; mend the row")


def _keep_traces(row: Row, kept: list[int], generations: str, parallel: list[str]) -> Row:
    result = dict(row)
    for column in parallel:
        if is_list(row.get(column)):
            result[column] = [row[column][i] for i in kept]
    verdicts = row.get("correctness_math_verify")
    if is_list(verdicts) and row.get("correctness_count") == sum(map(bool, map(truth, verdicts))):
        result["correctness_count"] = sum(map(bool, map(truth, result["correctness_math_verify"])))
    messages = row.get("messages")
    if is_list(messages) and len(messages) and isinstance(messages[-1], dict):
        shown = messages[-1].get("content")
        if shown in list(row[generations]) and shown not in result[generations]:
            result["messages"] = [*messages[:-1], {**messages[-1], "content": result[generations][0]}]
    return result


def with_completions(
    rows: Rows,
    examples: Sequence[Example],
    changed: Mapping[str, Example | None],
    columns: Mapping[str, str | None] | None = None,
) -> Iterator[Row]:
    """Yield the source rows of `examples` with other completions, in the row's own columns.

    changed: by id, an example as it is to be, or None: it is left out. A text of the row that equals the completion as
    it was is replaced wherever it stands (a column, a message, one of several traces).

    Raises DataError where no text of the row is the completion: its parts lie in several columns.
    """
    texts: dict[int, dict[str, str]] = {}
    for example in examples:
        now = changed.get(example.id)
        if now is not None:
            texts.setdefault(example.row, {})[example.completion] = now.completion
    kept = [example for example in examples if changed.get(example.id, example) is not None]
    places = sorted({example.row for example in kept})
    for place, row in zip(places, kept_rows(rows, kept, columns), strict=True):
        found = row
        for old, new in texts.get(place, {}).items():
            found, times = _replaced(found, old, new)
            if not times:
                raise DataError(
                    f"{rows.place(place)}: no column holds the completion as a whole (its reasoning stands apart, or "
                    "its text was trimmed), so that steps cannot be cut out of it: write prompt and completion as two "
                    "columns"
                )
        yield found


def _replaced(value: Any, old: str, new: str) -> tuple[Any, int]:
    """Return a row's value with every text `old` replaced, in lists and mappings too, and how many there were."""
    if isinstance(value, str):
        return (new, 1) if value == old else (value, 0)
    if isinstance(value, dict):
        parts = {name: _replaced(part, old, new) for name, part in value.items()}
        return {name: part for name, (part, _) in parts.items()}, sum(times for _, times in parts.values())
    if is_list(value):
        listed = [_replaced(part, old, new) for part in value]
        return [part for part, _ in listed], sum(times for _, times in listed)
    return value, 0
