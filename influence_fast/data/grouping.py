"""Group examples by a column of their source: the task, the subject, the kind of problem."""

from __future__ import annotations

from influence_fast.data.cells import is_blank
from influence_fast.data.rows import Rows
from influence_fast.errors import DataError, did_you_mean


def row_groups(rows: Rows, column: str) -> list[str]:
    """Return the value of `column` in each source row, as text; that of an example is at its `row`.

    Raises DataError where the column does not exist or a row has no value in it.
    """
    if column not in rows.columns:
        raise DataError(f"{rows.name}: has no column {column!r} to group by; {did_you_mean(column, rows.columns)}")
    names = []
    for index, row in enumerate(rows.read([column])):
        value = row.get(column)
        if is_blank(value):
            raise DataError(f"{rows.place(index)}: column {column!r} is empty; fill it in or group by another")
        names.append(str(value))
    return names
