"""A table of scores, one row an example: what scoring makes and pruning reads."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from influence_fast.atomic import replacing
from influence_fast.errors import DataError, did_you_mean, one_line
from influence_fast.guards import check_no_pipe, reading

FINGERPRINT = "fingerprint"  # the text column that holds `text_fingerprint` of each row's example


def check_format(path: str | Path) -> None:
    """Raise DataError for a file that no score table can be written to."""
    if Path(path).suffix not in (".parquet", ".csv"):
        raise DataError(f"{path}: a score table is written as .parquet or .csv")


@dataclass(frozen=True, repr=False)
class ScoreTable:
    """Scores of examples: `ids` in the data's order, float64 `columns` and text columns (`texts`) of the same length.

    Columns that scoring writes: `s_correct`, `s_incorrect` (mean influence on the queries of each group),
    `rank_correct`, `rank_incorrect` (rank of that mean), `mean_rank_correct`, `mean_rank_incorrect` (mean over queries
    of the per-query ranks), the same three for each task where tasks are named, `loss`, `tokens`, and where a strategy
    needs them `embedding_rank` (the place in the order of taking: 1 = taken first) and `pass_rate` (0 to 1). Ranks of
    scores go from 1 = lowest to the number of rows = highest, here, in results.json and in the report. The text
    `fingerprint` tells which text each row is of (see `data.fingerprints.text_fingerprint`). Pruning adds `kept`,
    `drop_priority` and the text `why`.

    Example:
        >>> table = inf.ScoreTable(["a", "b"], {"s_correct": np.array([0.5, -0.25])})
        >>> table.sort("s_correct", ascending=True).ids
        ['b', 'a']
    """

    ids: list[str]
    columns: dict[str, np.ndarray] = field(default_factory=dict)
    texts: dict[str, list[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, column in (self.columns | self.texts).items():
            if len(column) != len(self.ids):
                raise DataError(f"score column {name!r} has {len(column)} rows for {len(self.ids)} examples")

    def __len__(self) -> int:
        return len(self.ids)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield each row as a mapping of its id and its columns."""
        names = ["id", *self.columns, *self.texts]
        for row in zip(self.ids, *self.columns.values(), *self.texts.values(), strict=True):
            yield dict(zip(names, row, strict=True))

    def __contains__(self, name: object) -> bool:
        """Return whether there is a column of that name."""
        return name == "id" or name in self.columns or name in self.texts

    def __bool__(self) -> bool:
        return True  # a table of no rows is still a table

    def __repr__(self) -> str:
        return f"ScoreTable({len(self):,} rows: {', '.join(['id', *self.columns, *self.texts])})"

    def __getitem__(self, name: str) -> np.ndarray:
        """Return the column of that name, [N]: float64, or texts as objects (`id` too). Raises DataError where it is
        not there."""
        if name in self.columns:
            return self.columns[name]
        texts = {"id": self.ids, **self.texts}
        if name not in texts:
            raise DataError(f"no score column {name!r}; {did_you_mean(str(name), [*self.columns, *texts])}")
        return np.array(texts[name], dtype=object)

    def sort(self, by: str, *, ascending: bool = False) -> ScoreTable:
        """Return a copy in the order of a column, largest first; equal rows keep their order, NaN comes last.

        Raises DataError where the table has no such column.
        """
        column = self[by]
        if column.dtype == object:
            order = np.array(sorted(range(len(self)), key=lambda row: column[row], reverse=not ascending), np.int64)
        else:
            order = np.argsort(column if ascending else -column, kind="stable")
        return ScoreTable(
            [self.ids[row] for row in order],
            {name: column[order] for name, column in self.columns.items()},
            {name: [text[row] for row in order] for name, text in self.texts.items()},
        )

    def to_pandas(self) -> Any:
        """Return a `pandas.DataFrame` with the ids as its index."""
        import pandas as pd

        return pd.DataFrame({**self.columns, **self.texts}, index=pd.Index(self.ids, name="id"))

    def with_columns(
        self, columns: Mapping[str, np.ndarray], *, texts: Mapping[str, list[str]] | None = None
    ) -> ScoreTable:
        """Return a copy with more columns."""
        return ScoreTable(self.ids, {**self.columns, **columns}, {**self.texts, **(texts or {})})

    def save(self, path: str | Path) -> None:
        """Write `.parquet` or `.csv`, by the ending; the file appears whole or not at all."""
        import pyarrow as pa
        import pyarrow.csv
        import pyarrow.parquet

        path = Path(path)
        numbers = {name: np.asarray(column, np.float64) for name, column in self.columns.items()}
        table = pa.table({"id": self.ids, **numbers, **self.texts})
        check_format(path)
        write = pyarrow.parquet.write_table if path.suffix == ".parquet" else pyarrow.csv.write_csv
        with replacing(path) as temporary:
            write(table, temporary)

    @classmethod
    def load(cls, path: str | Path) -> ScoreTable:
        """Read what `save` wrote.

        Raises DataError naming the file: no score table, a column that comes twice or is neither number nor text, ids
        that are missing or come twice.
        """
        path = Path(path)
        check_no_pipe(path)
        if not os.path.exists(path):
            raise DataError(f"{path}: no such score table; make one with 'influence-fast score'")
        with reading(path):
            return cls._loaded(path)

    @classmethod
    def _loaded(cls, path: Path) -> ScoreTable:
        import pyarrow as pa
        import pyarrow.csv
        import pyarrow.parquet

        as_text = pyarrow.csv.ConvertOptions(column_types={"id": "string"})
        try:
            table = (
                pyarrow.csv.read_csv(path, convert_options=as_text)
                if path.suffix == ".csv"
                else pyarrow.parquet.read_table(path)
            )
        except (pa.ArrowException, OSError) as error:
            reason = one_line(error, limit=200)
            raise DataError(f"{path} is no score table in .csv or .parquet ({reason})") from None
        if "id" not in table.column_names:
            raise DataError(f"{path}: no 'id' column, so this is not a score table")
        if repeated := _repeated(table.column_names):
            raise DataError(f"{path}: the column {repeated!r} comes twice; leave one of the two out")
        columns: dict[str, np.ndarray] = {}
        texts: dict[str, list[str]] = {}
        for name in table.column_names:
            kind = table.schema.field(name).type
            if name == "id":
                continue
            if pa.types.is_string(kind) or pa.types.is_large_string(kind):
                texts[name] = table[name].to_pylist()
            elif pa.types.is_floating(kind) or pa.types.is_integer(kind):
                columns[name] = table[name].to_numpy().astype(np.float64)
            else:
                raise DataError(f"{path}: column {name!r} holds {kind}, and a score table holds numbers and texts")
        return cls(_ids(path, table["id"]), columns, texts)


def _repeated(names: Sequence[str]) -> str | None:
    """Return the first name that comes twice."""
    return next((name for name, count in Counter(names).items() if count > 1), None)


def _ids(path: Path, column: Any) -> list[str]:
    """Return the ids of a table, which may be whole numbers where another tool wrote it."""
    found = column.to_pylist()
    if not all(isinstance(name, str | int) and not isinstance(name, bool) for name in found):
        raise DataError(f"{path}: the column 'id' holds {column.type} or nothing in some rows; ids are texts")
    names = [str(name) for name in found]
    if repeated := _repeated(names):
        raise DataError(f"{path}: the id {repeated!r} comes twice; give the table as 'influence-fast score' wrote it")
    return names
