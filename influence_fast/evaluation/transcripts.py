"""Transcripts of an evaluation on disk: written as the answers come, and reused when the run is repeated.

Beside `answers.jsonl` lies `answers.jsonl.run.json`, which says what the answers depend on. While the evaluation goes
on, the answers are in `answers.jsonl.partial`, whose first line says the same.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from influence_fast.atomic import replacing, writing
from influence_fast.errors import ConfigError, DataError, one_line
from influence_fast.guards import reading


@dataclass(frozen=True, slots=True)
class EvalItem:
    """One graded answer: `generation` as the model wrote it, and `extracted`, the answer found in it (None: none).

    `finish_reason`: "stop", or "length" when the model had not ended after `max_new_tokens` tokens. `token_ids`: the
    answer as it was generated, its end included; none in transcripts of earlier versions.
    """

    id: str
    prompt: str
    generation: str
    answer: str
    extracted: str | None
    correct: bool
    finish_reason: str
    sample: int = 0
    tokens: int = 0
    note: str = ""
    token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        # JSON gives a list.
        object.__setattr__(self, "token_ids", tuple(self.token_ids))


def write_transcripts(items: Iterable[EvalItem], path: str | Path) -> None:
    """Write one JSON object a line for each answer, atomically."""
    with replacing(Path(path)) as partial, partial.open("w", encoding="utf-8") as file:
        for item in items:
            file.write(_line(asdict(item)))


def record_of(transcripts: Path) -> Path:
    """Return the path of the record beside finished transcripts."""
    return transcripts.with_name(f"{transcripts.name}.run.json")


class Journal:
    """The answers of one evaluation as they come, by the index of their question.

    `run` is a JSON object of all that the answers depend on. What an earlier run with an equal `run` left at `path` is
    used again: `found` has the items of each question that was finished. What a different run left is overwritten, or
    with `overwrite` False is a ConfigError that names the first difference.
    """

    def __init__(self, path: str | Path, run: dict[str, Any], *, overwrite: bool = True) -> None:
        self.path = Path(path)
        _check_own(self.path)
        self.run: dict[str, Any] = json.loads(json.dumps(run))
        if not overwrite and (other := self._other()):
            raise ConfigError(
                f"{path} holds the answers of another evaluation ({other}): choose another file, or delete it"
            )
        self.found = self._finished() or self._interrupted()
        self._file: IO[str] | None = None

    @property
    def _record(self) -> Path:
        return record_of(self.path)

    @property
    def _partial(self) -> Path:
        return self.path.with_name(f"{self.path.name}.partial")

    def add(self, question: int, items: Sequence[EvalItem]) -> None:
        """Append the items of a question; they have been passed to the operating system when this returns."""
        with writing(self._partial):
            if self._file is None:
                self._partial.parent.mkdir(parents=True, exist_ok=True)
                self._file = self._partial.open("w", encoding="utf-8")
                self._file.write(_line({"run": self.run}))
                # Written again without the torn end that an interruption may leave.
                for earlier, kept in self.found.items():
                    self._append(earlier, kept)
            self._append(question, items)
            self._file.flush()

    def finish(self, items: Sequence[EvalItem]) -> None:
        """Replace the journal by the transcripts, in the order of the questions, and their record."""
        self.close()
        # A record must never lie beside transcripts of another run.
        self._record.unlink(missing_ok=True)
        write_transcripts(items, self.path)
        with replacing(self._record) as temporary:
            temporary.write_text(json.dumps({"run": self.run, "answers": len(items)}, indent=1) + "\n")
        self._partial.unlink(missing_ok=True)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _append(self, question: int, items: Sequence[EvalItem]) -> None:
        assert self._file is not None
        self._file.write(_line({"question": question, "items": [asdict(item) for item in items]}))

    def _other(self) -> str:
        """Return how the run whose answers are there differs from this one; "" where none is, or it is this one."""
        from influence_fast.settings import difference

        there = self.path.exists() and self.path.stat().st_size > 0
        if there and not self._record.exists():
            return "without a record of what it was"
        if there:
            before = _record_in(self._record)["run"]
        elif self._partial.exists() and (rows := _read_lines(self._partial)):
            before = rows[0].get("run") or {}
        else:
            return ""
        found = difference(before, self.run) or ""
        name = found.partition(":")[0]
        # Two hashes would tell the user nothing.
        return f"other {name}" if len(str(before.get(name))) == 64 else found

    def _finished(self) -> dict[int, list[EvalItem]]:
        """Return the items of complete transcripts, if their record is this run's."""
        if not (self._record.exists() and self.path.exists()):
            return {}
        record = _record_in(self._record)
        rows = _read_lines(self.path)
        if record["run"] != self.run:
            return {}
        samples = int(self.run["config"]["samples"])
        # With missing lines a line's place does not tell its question.
        if len(rows) != record["answers"]:
            warnings.warn(
                f"{self.path} is damaged: {len(rows)} of its {record['answers']} lines can be read; it is kept as "
                f"{self.path.name}.damaged, and the questions are asked again",
                stacklevel=4,
            )
            shutil.copyfile(self.path, self.path.with_name(f"{self.path.name}.damaged"))
            return {}
        with reading(self.path):
            items = [EvalItem(**row) for row in rows]
        return {i: items[i * samples : (i + 1) * samples] for i in range(len(items) // samples)}

    def _interrupted(self) -> dict[int, list[EvalItem]]:
        if not self._partial.exists():
            return {}
        rows = _read_lines(self._partial)
        with reading(self._partial):
            if not rows or rows[0].get("run") != self.run:
                return {}
            return {int(row["question"]): [EvalItem(**item) for item in row["items"]] for row in rows[1:]}


def _check_own(path: Path) -> None:
    """Raise DataError where `path` is a file of something else, which transcripts would replace."""
    if path.is_file() and path.stat().st_size:
        rows = _read_lines(path)
        if not rows or not isinstance(rows[0], dict) or not {"generation", "extracted"} <= rows[0].keys():
            raise DataError(f"{path} is there and holds no transcripts, and would be lost: give another file")


def _record_in(path: Path) -> dict[str, Any]:
    """Return the record beside finished transcripts. Raises ConfigError for a damaged one."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {"run": dict(found["run"]), "answers": int(found["answers"])}
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError) as error:
        raise ConfigError(
            f"{path} is damaged ({one_line(error, 120)}): restore it, or delete it with the answers to ask anew"
        ) from None


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the JSON objects of a file up to the first line that is none: an interruption may have torn it."""
    rows = []
    with path.open("rb") as file:
        for line in file:
            try:
                rows.append(json.loads(line.decode("utf-8")))
            except (ValueError, RecursionError):
                # The line is no JSON, or ends within a character.
                break
    return rows


def _line(value: dict[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False) + "\n"
