"""Cut the steps that harm most out of training examples, instead of dropping whole examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Integral, Real

import numpy as np

from influence_fast.data.schemas import Example
from influence_fast.errors import ConfigError, DataError, setting, shown, truncated_list
from influence_fast.influence.step_scores import HARM, StepTable
from influence_fast.settings import check_seed


@dataclass(frozen=True)
class StepSelection:
    """Which rows of a table of steps stay and which go, ascending row numbers, and how many tokens those have."""

    keep: np.ndarray  # [S - n] int64
    drop: np.ndarray  # [n] int64
    tokens: int
    dropped_tokens: int


def select_steps(
    table: StepTable, *, fraction: float | None = None, count: int | None = None, by: str = HARM, seed: int = 0
) -> StepSelection:
    """Drop the steps with the highest scores, until they have `fraction` of all tokens, or `count` of them.

    Args:
        table: scores of steps.
        fraction: share of the tokens to drop, 0 to 1: steps are taken in order while that brings their tokens nearer.
        count: number of steps to drop, instead.
        by: the column that is highest for what goes first.
        seed: breaks ties.

    Returns:
        A `StepSelection`.

    Raises:
        ConfigError: an impossible size, or one that leaves nothing.
        DataError: no such column, or one that is not finite.

    Example:
        >>> import numpy as np
        >>> from influence_fast.influence.step_scores import StepTable
        >>> from influence_fast.selection.step_pruning import select_steps
        >>> columns = {"tokens": np.array([4, 2, 2]), "harm": np.array([0.1, 0.9, -0.3])}
        >>> select_steps(StepTable(["a", "a", "b"], ["x", "y", "z"], columns), fraction=0.25).drop
        array([1])
    """
    if (fraction is None) == (count is None):
        raise ConfigError("give either a fraction of the tokens or a count of steps to drop")
    check_seed("seed", seed)
    scores, tokens = table[by], table["tokens"]
    if not bool(np.isfinite(scores).all()):
        raise DataError(f"the column {by!r} of the steps holds NaN or infinite numbers: score them again")
    order = np.lexsort((np.random.default_rng(int(seed)).permutation(len(table)), -scores))
    if fraction is not None:
        if not isinstance(fraction, Real) or not 0 <= fraction <= 1:
            raise ConfigError(f"{setting('fraction')} {shown(fraction)} is not between 0 and 1")
        sums = np.concatenate([[0], np.cumsum(tokens[order])])
        count = int(np.abs(sums - fraction * sums[-1]).argmin())
    if not isinstance(count, Integral) or isinstance(count, bool) or count < 0:
        raise ConfigError(f"{setting('count')} is {shown(count)}; give a whole number of steps to drop")
    if count >= len(table):
        raise ConfigError(f"dropping {count} of {len(table)} steps would leave none: choose a smaller size")
    drop = np.sort(order[:count])
    keep = np.setdiff1d(np.arange(len(table)), drop)
    return StepSelection(keep, drop, int(tokens.sum()), int(tokens[drop].sum()))


def without_steps(examples: Sequence[Example], table: StepTable, selection: StepSelection) -> dict[str, Example | None]:
    """Return what becomes of each example that loses a step, by id: None where nothing of its completion stays.

    Raises DataError where the table is of other texts than the examples.
    """
    known = {example.id: example for example in examples}
    rows = table.of_examples()
    if missing := [name for name in rows if name not in known]:
        raise DataError(
            f"the table of steps has ids that the data does not: {truncated_list(missing)}; give the data that was "
            "scored, read with the same options"
        )
    gone: dict[str, list[int]] = {}
    for row in selection.drop.tolist():
        gone.setdefault(table.ids[row], []).append(row)
    found: dict[str, Example | None] = {}
    for name, dropped in gone.items():
        example = known[name]
        _check_texts(example, table, rows[name])
        text = example.completion
        for row in sorted(dropped, reverse=True):
            start, end = int(table["start"][row]), int(table["end"][row])
            text = text[:start] + text[end:]
        # what ended a line before the last step now ends the text
        text = text.rstrip("\n") if not example.completion.endswith("\n") else text
        found[name] = replace(example, completion=text, token_ids=None) if text.strip() else None
    return found


def _check_texts(example: Example, table: StepTable, rows: np.ndarray) -> None:
    """Raise DataError unless the steps' texts are those of the example; the last may go on with the turn's end."""
    for row in rows.tolist():
        start, end = int(table["start"][row]), int(table["end"][row])
        if start < 0:
            raise DataError("these steps have no characters: score them with a tokenizer")
        own = example.completion[start:end]
        if (not own and start < len(example.completion)) or not table.text[row].startswith(own):
            raise DataError(
                f"the steps of {example.id} are not those of its text: give the data that was scored, read with the "
                "same options, or score this data"
            )
