"""The cells of one source row, read through the column renames; every error names the row and the remedy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, TypeGuard

from influence_fast.data.rows import Row, Rows
from influence_fast.errors import DataError, setting

Turn = tuple[str, str]  # (role, content)


def is_null(value: Any) -> bool:
    """Return whether `value` is a missing value: None, NaN of any float type, pandas' NA and NaT."""
    if value is None:
        return True
    if isinstance(value, str | int | list | tuple | dict):
        return False
    if type(value).__name__ in ("NAType", "NaTType"):
        return True
    try:
        return bool(value != value)
    except (TypeError, ValueError):
        # An array has no single truth value.
        return False


def is_blank(value: Any) -> bool:
    """Return whether `value` is null or text of white space alone."""
    return is_null(value) or (isinstance(value, str) and not value.strip())


def is_list(value: Any) -> TypeGuard[Sequence[Any]]:
    """Return whether `value` is a list in a cell: pandas and Arrow hold them as arrays, too."""
    return isinstance(value, list | tuple) or type(value).__name__ == "ndarray"


def texts(value: Any) -> Iterator[str]:
    """Yield the texts in a cell: itself, or those of its list of texts or messages, but no numbers and flags."""
    if isinstance(value, str):
        if not is_blank(value):
            yield value.strip()
    elif isinstance(value, dict):
        for key, part in value.items():
            if key not in ("role", "from", "type", "name"):
                yield from texts(part)
    elif is_list(value):
        for part in value:
            yield from texts(part)


def truth(value: Any) -> bool | None:
    """Return the value of a flag: False and True, 0 and 1, or these as text; None for anything else.

    Example:
        >>> truth("False"), truth(1.0), truth("maybe")
        (False, True, None)
    """
    if isinstance(value, str):
        return {"true": True, "false": False, "1": True, "0": False}.get(value.strip().lower())
    if is_list(value) or isinstance(value, dict) or is_null(value):
        return None
    return bool(value) if value in (0, 1) else None


class Cells:
    """One source row, read through `names`: the schema's name of a column -> the source's, or None to leave it out."""

    def __init__(self, row: Row, index: int, rows: Rows, names: Mapping[str, str | None]) -> None:
        self.row = row
        self.index = index
        self.rows = rows
        self.names = names

    def column(self, name: str) -> str | None:
        """Return the source's name of the column that the schema calls `name`; None where it is left out."""
        return self.names.get(name, name)

    def error(self, problem: str) -> DataError:
        """Return a DataError that names the row and states `problem`."""
        return DataError(f"{self.rows.place(self.index)}: {problem}")

    def maybe(self, name: str) -> Any:
        """Return the value of a column, None where it is null or missing; arrays and tuples become lists."""
        column = self.column(name)
        value = None if column is None else self.row.get(column)
        if is_null(value):
            return None
        return list(value) if is_list(value) else value

    def value(self, name: str) -> Any:
        """Return the value of a column. Raises DataError where it is null or missing."""
        value = self.maybe(name)
        if value is None:
            column = self.column(name)
            state = "is null" if column in self.row else "is missing"
            raise self.error(f"column {column!r} {state}; fill it in or remove the row")
        return value

    def as_text(self, value: Any, what: str) -> str:
        """Return `value` if it is text that UTF-8 can hold; raises DataError otherwise, in which `what` names it."""
        if is_null(value):
            raise self.error(f"{what} is null; fill it in or remove the row")
        if not isinstance(value, str):
            raise self.error(f"{what} is a {type(value).__name__}, not text; convert it to a string")
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise self.error(f"{what} holds half a surrogate pair; re-encode the text as UTF-8") from None
        return value

    def text(self, name: str) -> str:
        """Return a column of text. Raises DataError where it is null, missing or not text."""
        return self.as_text(self.value(name), f"column {self.column(name)!r}")

    def optional_text(self, name: str) -> str | None:
        """Return a column of text, None where it is null, missing or blank."""
        value = self.maybe(name)
        return None if is_blank(value) else self.as_text(value, f"column {self.column(name)!r}")

    def optional(self, name: str) -> str | None:
        """Return an optional short value (answer, label) as text, None where there is none.

        `""`, which is CSV's null, is None. A whole number that is held as a float is written without its point:
        pandas makes floats of whole numbers as soon as one row of the column has none.

        Raises DataError for lists and other nested values.
        """
        value = self.maybe(name)
        if value is None or isinstance(value, str):
            return value or None
        if isinstance(value, Real) or type(value).__name__ in ("bool_", "bool", "Decimal"):
            return str(whole_number(value))
        what = f"a list of {len(value)}" if isinstance(value, list) else f"a {type(value).__name__}"
        raise self.error(
            f"column {self.column(name)!r} is {what}, not text or a number; write one text or number in it, or do "
            f"without it by {setting('columns', {name: None})}"
        )

    def sequence(self, name: str) -> list[Any]:
        """Return a column that is a list. Raises DataError where it is null, missing or not a list."""
        value = self.value(name)
        if not isinstance(value, list):
            raise self.error(f"column {self.column(name)!r} is a {type(value).__name__}, not a list")
        return value


def whole_number(value: Any) -> Any:
    """Return `value` as an int where it is a float without a fraction, else unchanged."""
    if isinstance(value, Real) and not isinstance(value, Integral) and float(value).is_integer():
        return int(float(value))
    return value
