"""The sets of a run: the pool that is scored and pruned, the validation questions that ask, the test that judges."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from influence_fast.config import DataConfig, RunConfig
from influence_fast.data.decontamination import contaminated, plain_prompt
from influence_fast.data.examples import Example, TokenizedSet, tokenize
from influence_fast.errors import ConfigError, DataError, setting, truncated_list
from influence_fast.run.inputs import examples_hash, read_source
from influence_fast.selection.difficulty import check_answers
from influence_fast.selection.strategies import PASS_RATE, needed_columns


@dataclass(frozen=True)
class Splits:
    """The three sets, and the pool tokenized. `set_aside`: {"id", "why"} of what leaked; `warnings` are for people.

    `read`: SHA-256 of the examples of each source (`data.pool`, ...) as they were read, before any is held out.
    """

    pool: list[Example]
    validation: list[Example]
    test: list[Example]
    tokenized: TokenizedSet
    for_target: TokenizedSet  # the same pool in the target model's tokens; `tokenized` itself where there is one model
    set_aside: list[dict[str, str]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    read: Mapping[str, str] = field(default_factory=dict)


def load_splits(config: RunConfig, tokenizer: Any, target_tokenizer: Any) -> Splits:
    """Load what `config.data` names, hold out, decontaminate and tokenize it.

    `target_tokenizer` is `tokenizer` itself where one model scores and is fine-tuned. Raises ConfigError where holding
    out would leave nothing, DataError for rows that cannot be used.
    """
    data = config.data
    sources = {"pool": data.pool, "validation": data.validation, "test": data.test}
    found = {name: read_source(source) for name, source in sources.items() if source is not None}
    pool, validation, test = _held_out(data, config.seed, found)
    _check_graded(config, validation, test)
    set_aside: list[dict[str, str]] = []
    warnings: list[str] = []
    if data.decontaminate:
        pool, set_aside, warnings = _decontaminated(pool, test)
    for name, part in (("validation", validation), ("test", test)):
        warnings += _asked_again(pool, name, part)
    if PASS_RATE in needed_columns(config.pruning.strategies):
        check_answers(pool)
    tokenized = tokenize(pool, tokenizer, max_length=data.max_length, truncate=data.truncate)
    warnings += _about(tokenized, len(pool), data)
    for_target = tokenized
    if config.target_model is not None:
        for_target = tokenize(pool, target_tokenizer, max_length=data.max_length, truncate=data.truncate)
        warnings += _about(for_target, len(pool), data, " in the target model's tokens")
        # the pool is what both models can read
        both = {e["id"] for e in tokenized.examples} & {e["id"] for e in for_target.examples}
        for tokens in (tokenized, for_target):
            tokens.examples[:] = [e for e in tokens.examples if e["id"] in both]
    usable = {example["id"] for example in tokenized.examples}
    kept = [example for example in pool if example.id in usable]
    read = {f"data.{name}": examples_hash(examples) for name, examples in found.items()}
    return Splits(kept, validation, test, tokenized, for_target, set_aside, warnings, read)


def _held_out(
    data: DataConfig, seed: int, found: Mapping[str, list[Example]]
) -> tuple[list[Example], list[Example], list[Example]]:
    """Return pool, validation and test; what has no source of its own among `found` is drawn from the pool."""
    pool = found["pool"]
    held = data.holdout_validation * (data.validation is None) + data.holdout_test * (data.test is None)
    if held >= len(pool):
        raise ConfigError(f"data: holding out {held} of the pool's {len(pool)} examples would leave none")
    order = list(range(len(pool)))
    if held:
        random.Random(seed).shuffle(order)
    taken = iter(order)
    validation = found.get("validation") or [pool[next(taken)] for _ in range(data.holdout_validation)]
    test = found.get("test") or [pool[next(taken)] for _ in range(data.holdout_test)]
    return [pool[i] for i in sorted(taken)], validation, test


def _check_graded(config: RunConfig, validation: Sequence[Example], test: Sequence[Example]) -> None:
    """Raise DataError naming questions that are to be answered and have no answer to be graded against."""
    graded = [("test", test)]
    if config.influence.queries != "reference":  # whose questions nobody answers
        graded.insert(0, ("validation", validation))
    for name, part in graded:
        without = [example.id for example in part if example.answer is None]
        if without:
            raise DataError(
                f"{name}: no final answer to grade against in {truncated_list(without)}: add an 'answer' column, "
                r"or solutions that end in \boxed{} or ####"
            )


def _decontaminated(pool: list[Example], test: list[Example]) -> tuple[list[Example], list[dict[str, str]], list[str]]:
    """Return the pool without what shares words with the test set, what is set aside, and a warning that says so."""
    overlaps = contaminated(pool, {"test": test})
    if len(overlaps) == len(pool):
        raise DataError(
            f"{setting('data.decontaminate')}: every pool example shares words with the test set; is it the same data?"
        )
    warnings = []
    if overlaps:
        names = truncated_list(f"{found.id} ({found.item}: {found.ngram!r})" for found in overlaps)
        warnings.append(
            f"{len(overlaps)} of {len(pool)} pool examples share words with the test set and were set aside: {names}"
        )
    aside = {found.id: found.why for found in overlaps}
    kept = [example for example in pool if example.id not in aside]
    return kept, [{"id": name, "why": why} for name, why in aside.items()], warnings


def _asked_again(pool: list[Example], name: str, part: Sequence[Example]) -> list[str]:
    """Return a warning if the pool has questions of a held-out set word for word."""
    held = {plain_prompt(example.prompt) for example in part}
    same = [example.id for example in pool if plain_prompt(example.prompt) in held]
    if not same:
        return []
    why = "which raises their scores" if name == "validation" else "and give its answer away"
    return [f"{len(same)} of {len(pool)} pool examples ask a question of the {name} set, {why}: {truncated_list(same)}"]


def _about(tokens: TokenizedSet, count: int, data: DataConfig, whose: str = "") -> list[str]:
    """Return warnings of the `count` examples that were left out or cut."""
    warnings = []
    if tokens.too_long:
        names = truncated_list(f"{name} ({n} tokens)" for name, n in tokens.too_long)
        why = ", where cut nothing of their completion is left," if data.truncate else ""
        warnings.append(
            f"{len(tokens.too_long)} of {count} pool examples are longer than max_length {data.max_length}{whose}{why} "
            f"and were left out: {names}"
        )
    if tokens.truncated:
        warnings.append(f"{len(tokens.truncated)} pool examples were cut to {data.max_length} tokens{whose}")
    return warnings
