"""What the training examples are scored against: the model's own answers by group, or the reference solutions."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from influence_fast.data.examples import Example
from influence_fast.errors import ConfigError, DataError, setting, shown, truncated_list
from influence_fast.evaluation.evaluate import EvalConfig, evaluate
from influence_fast.evaluation.generation import CUT
from influence_fast.evaluation.generation_settings import EXPLICIT
from influence_fast.influence.contrast import Pair, pair_answers
from influence_fast.influence.settings import InfluenceConfig

_RIGHT, _WRONG = ("true", "1", "yes", "correct"), ("false", "0", "no", "incorrect")


@dataclass(frozen=True)
class Queries:
    """Texts that the training examples are scored against, and their places by group.

    `references`: the places of reference solutions; the others are answers of the model. `questions`: the name of the
    question that each text answers. `pairs`: right and wrong answers to the same question, where they are contrasted.
    """

    examples: list[Example]
    groups: dict[str, list[int]]
    warnings: list[str]
    references: frozenset[int] = frozenset()
    questions: tuple[str, ...] = ()
    pairs: tuple[Pair, ...] = ()

    @property
    def of_references(self) -> list[str]:
        """Return the groups that are reference solutions alone."""
        return [name for name, members in self.groups.items() if members and self.references.issuperset(members)]

    @property
    def sizes(self) -> str:
        """Return the sizes in words: `3 correct answers, 1 incorrect answers`, or `4 reference solutions`."""
        solutions = {name: "reference solutions" + f" of {name}" * (name != "correct") for name in self.of_references}
        sizes = [f"{len(m)} {solutions.get(name, f'{name} answers')}" for name, m in self.groups.items()]
        return ", ".join([*sizes, *([f"{len(self.pairs)} contrasted questions"] if self.pairs else [])])


def own_answers(
    model: Any,
    tokenizer: Any,
    validation: Sequence[Example],
    config: EvalConfig,
    transcripts: Path | None = None,
    *,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Generate the model's answers to the validation questions and grade them.

    Returns for each answer its `id`, `generation` (text), `token_ids` as they were generated, whether it was `correct`,
    and whether it `ended` before it was cut.
    """
    result = evaluate(model, tokenizer, validation, config=config, transcripts=transcripts, progress=progress)
    return [
        {
            "id": item.id,
            "generation": item.generation,
            "token_ids": list(item.token_ids),
            "correct": bool(item.correct),
            "ended": item.finish_reason != CUT,
        }
        for item in result.items
    ]


def make_queries(
    validation: Sequence[Example],
    answers: Sequence[dict[str, Any]] | None,
    fallback: str | None,
    needed: Collection[str] = ("correct", "incorrect"),
) -> Queries:
    """Make queries from the model's own `answers`, or from the reference solutions if `answers` is None.

    Raises ConfigError when one of the groups `needed` is empty and `fallback` does not cover it; another one that is
    empty is left out, with a warning.
    """
    if answers is None:
        every = range(len(validation))
        names = tuple(example.id for example in validation)
        return Queries(list(validation), {"correct": list(every)}, [], frozenset(every), names)
    by_id = {example.id: example for example in validation}
    asked: list[Example] = []
    groups: dict[str, list[int]] = {"correct": [], "incorrect": []}
    warnings = []
    questions: list[str] = []
    silent = 0
    references: frozenset[int] = frozenset()
    for answer in answers:
        if not answer["generation"].strip():
            silent += 1
            continue
        groups["correct" if answer["correct"] else "incorrect"].append(len(asked))
        questions.append(answer["id"])
        asked.append(_answered(by_id[answer["id"]], answer, questions.count(answer["id"])))
    if silent == len(answers) and fallback is None:
        raise ConfigError(
            f"all {silent} answers of the model to the validation questions are empty: look at its chat template and "
            f"training loss, set {setting('influence.fallback', 'reference')}, or use "
            f"{setting('influence.queries', 'reference')}"
        )
    if silent:
        warnings.append(f"{silent} validation questions got an empty answer, which has no gradient")
    if not groups["correct"] and fallback == "reference":
        warnings.append(
            "the model answered no validation question correctly: the reference solutions stand in for the correct "
            "group, as influence.fallback asks"
        )
        groups["correct"] = list(range(len(asked), len(asked) + len(validation)))
        references = frozenset(groups["correct"])
        asked += [dataclasses.replace(example, id=f"{example.id}/reference") for example in validation]
        questions += by_id
    _check_groups({name: groups[name] for name in needed}, silent=silent == len(answers))
    for name in [name for name, members in groups.items() if not members]:
        warnings.append(f"no own answer is {name}, so there are no scores of that group")
        del groups[name]
    return Queries(asked, groups, warnings, references, tuple(questions))


def answers_config(influence: InfluenceConfig, evaluation: EvalConfig) -> EvalConfig:
    """Return how the validation questions are answered: as the test's are, or by `influence.samples` answers each."""
    if influence.samples == 1:
        return evaluation
    sampling: dict[str, Any] = {"samples": influence.samples, "temperature": influence.temperature}
    return dataclasses.replace(evaluation, generation=EXPLICIT, pass_at=(), **sampling)


def given_queries(validation: Sequence[Example], verdicts: Sequence[str]) -> Queries:
    """Make queries from answers that the validation rows hold, each right or wrong by its row's verdict.

    verdicts: of each row of the source, "true" or "false" (or 1 and 0, yes and no, correct and incorrect).

    Raises DataError for another verdict.
    """
    groups: dict[str, list[int]] = {"correct": [], "incorrect": []}
    for place, example in enumerate(validation):
        verdict = verdicts[example.row].strip().lower()
        if verdict not in (*_RIGHT, *_WRONG):
            raise DataError(
                f"{example.id}: the verdict {shown(verdicts[example.row])} is neither true nor false; mend the column "
                f"that {setting('influence.verdicts')} names"
            )
        groups["correct" if verdict in _RIGHT else "incorrect"].append(place)
    questions = tuple(repr(example.turns) for example in validation)
    return Queries(list(validation), {k: v for k, v in groups.items() if v}, [], frozenset(), questions)


def with_contrast(queries: Queries) -> Queries:
    """Return `queries` with the pairs of right and wrong answers to the same question (see `contrast`).

    Questions with answers of one kind alone are left out of the pairs, and counted in a warning. Raises ConfigError if
    no question has both.
    """
    found = pair_answers(queries.questions, queries.groups)
    counts = f"{len(found.right_only)} have right answers alone and {len(found.wrong_only)} wrong ones alone"
    if not found.pairs:
        raise ConfigError(
            f"no validation question has both a right and a wrong answer to contrast: {counts}; raise "
            f"{setting('influence.samples')}, add questions, or name given answers by {setting('influence.verdicts')}"
        )
    warnings = list(queries.warnings)
    if found.right_only or found.wrong_only:
        warnings.append(f"{len(found.pairs)} validation questions are contrasted; of the others {counts}")
    return dataclasses.replace(queries, pairs=found.pairs, warnings=warnings)


def _answered(question: Example, answer: Mapping[str, Any], number: int) -> Example:
    """Return the question with the model's answer: its own tokens, which rendering the text again might change.

    number: 1 for the first answer to the question; later ones have it in their id.
    """
    return dataclasses.replace(
        question,
        id=question.id if number == 1 else f"{question.id}/{number}",
        completion=answer["generation"],
        ended=answer.get("ended", True),
        reasoning=None,
        learnt=(),
        token_ids=tuple(answer.get("token_ids", ())) or None,
    )


def with_tasks(queries: Queries, tasks: Sequence[str]) -> Queries:
    """Return `queries` with a group for each task: its members of the correct group (see the strategy `less`).

    `tasks` has the task of each row of the validation data. Raises ConfigError for a task with a group's own name.
    """
    groups = dict(queries.groups)
    taken = sorted(set(tasks) & {"correct", "incorrect", "contrast"})
    if taken:
        raise ConfigError(
            f"{setting('influence.tasks')}: a task cannot be called {taken[0]!r}, as one of the groups is; rename it"
        )
    for place in queries.groups["correct"]:
        groups.setdefault(tasks[queries.examples[place].row], []).append(place)
    asked = {tasks[example.row] for example in queries.examples}
    silent = sorted(asked - groups.keys())
    warnings = [f"no correct answer to ask for the tasks {truncated_list(silent)}"] if silent else []
    return dataclasses.replace(queries, groups=groups, warnings=queries.warnings + warnings)


def _check_groups(groups: Mapping[str, Sequence[int]], *, silent: bool = False) -> None:
    """Raise ConfigError saying which of the `groups` of own answers is empty, and what can be done about it.

    silent: every answer was empty, so that there is none of either kind.
    """
    if "correct" in groups and not len(groups["correct"]):
        raise ConfigError(
            "every one of the model's own validation answers is incorrect, so there is no correct group: add easier "
            f"questions, set {setting('influence.fallback', 'reference')}, or use "
            f"{setting('influence.queries', 'reference')}"
        )
    if "incorrect" in groups and not len(groups["incorrect"]):
        what = "empty" if silent else "correct"
        raise ConfigError(
            f"every one of the model's own validation answers is {what}, so there is no incorrect group: add harder "
            "questions, or use strategies that read no wrong answers (low_benefit), with "
            f"{setting('influence.queries', 'reference')}"
        )
