"""What a run scores its pool against: own answers, answers that the data holds, or reference solutions."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

from influence_fast.config import RunConfig
from influence_fast.data.examples import Example, load_rows
from influence_fast.data.grouping import row_groups
from influence_fast.evaluation.evaluate import EvalConfig
from influence_fast.influence.queries import (
    Queries,
    answers_config,
    given_queries,
    make_queries,
    with_contrast,
    with_tasks,
)
from influence_fast.influence.settings import CONTRAST, REFERENCE


def validation_queries(
    config: RunConfig,
    validation: Sequence[Example],
    own_answers: Callable[[EvalConfig], list[dict[str, Any]]],
    columns: Collection[str],
) -> Queries:
    """Return the queries that `config.influence` asks for.

    Args:
        config: the run's settings.
        validation: its validation questions.
        own_answers: makes the model's answers to them, or reads those that were made.
        columns: the score columns that will be read, which decide what groups are needed.

    Raises:
        ConfigError: a group that is needed is empty, or no question has both a right and a wrong answer to contrast.
        DataError: a column of the validation rows that is named is not there, or has no value somewhere.
    """
    influence = config.influence

    def column(name: str) -> list[str]:
        source = config.data.validation or config.data.pool
        return row_groups(load_rows(source.path, split=source.split), name)

    if influence.verdicts is not None:
        found = given_queries(validation, column(influence.verdicts))
    elif influence.queries == REFERENCE:
        found = make_queries(validation, None, None)
    else:
        reads_wrong = influence.queries == CONTRAST or any(name.endswith("_incorrect") for name in columns)
        needed = ("correct", "incorrect") if reads_wrong else ("correct",)
        answers = own_answers(answers_config(influence, config.evaluation))
        found = make_queries(validation, answers, influence.fallback, needed)
    if influence.tasks is not None:
        found = with_tasks(found, column(influence.tasks))
    return with_contrast(found) if influence.queries == CONTRAST else found
