"""A table of scores, one row an example: what scoring makes and pruning reads."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from influence_fast.atomic import replacing
from influence_fast.errors import DataError


@dataclass(frozen=True)
class ScoreTable:
    """`ids` in the data's order and float64 columns of the same length.

    Columns that scoring writes: `s_correct`, `s_incorrect` (mean influence on the queries of each group),
    `rank_correct`, `rank_incorrect` (rank of that mean, 1 = lowest), `mean_rank_correct`, `mean_rank_incorrect`
    (mean over queries of the per-query ranks), `loss`, `tokens`.
    """

    ids: list[str]
    columns: dict[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, column in self.columns.items():
            if len(column) != len(self.ids):
                raise DataError(f"score column {name!r} has {len(column)} rows for {len(self.ids)} examples")

    def with_columns(self, columns: dict[str, np.ndarray]) -> ScoreTable:
        """A copy with more columns."""
        return ScoreTable(self.ids, self.columns | columns)

    def save(self, path: str | Path) -> None:
        """Writes `.parquet` or `.csv`, by the ending; the file appears whole or not at all."""
        import pyarrow as pa
        import pyarrow.csv
        import pyarrow.parquet

        path = Path(path)
        table = pa.table({"id": self.ids, **{name: np.asarray(c, np.float64) for name, c in self.columns.items()}})
        write = {".parquet": pyarrow.parquet.write_table, ".csv": pyarrow.csv.write_csv}.get(path.suffix)
        if write is None:
            raise DataError(f"{path}: a score table is written as .parquet or .csv")
        with replacing(path) as temporary:
            write(table, temporary)

    @classmethod
    def load(cls, path: str | Path) -> ScoreTable:
        """Reads what `save` wrote. Raises DataError naming the file."""
        import pyarrow.csv
        import pyarrow.parquet

        path = Path(path)
        if not path.exists():
            raise DataError(f"{path}: no such score table; make one with 'influence-fast score'")
        as_text = pyarrow.csv.ConvertOptions(column_types={"id": "string"})
        table = (
            pyarrow.csv.read_csv(path, convert_options=as_text)
            if path.suffix == ".csv"
            else pyarrow.parquet.read_table(path)
        )
        if "id" not in table.column_names:
            raise DataError(f"{path}: no 'id' column, so this is not a score table")
        columns = {name: table[name].to_numpy() for name in table.column_names if name != "id"}
        return cls(table["id"].to_pylist(), columns)
