"""Generate a model's answers to questions and grade them; every transcript is kept."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from influence_fast import __version__
from influence_fast.data.fingerprints import tokenizer_hash, weight_hashes
from influence_fast.data.rendering import Renderer
from influence_fast.data.schemas import Example
from influence_fast.data.tokens import encode
from influence_fast.errors import ConfigError, DataError, setting, truncated_list
from influence_fast.evaluation.generation import CUT, ENGINES, Answer, ModelFiles, answer_batches
from influence_fast.evaluation.generation_settings import EXPLICIT, KINDS, OWN, find_ends, generation_settings
from influence_fast.evaluation.grading import ANSWER_KINDS, choice_letter, grade, normalise
from influence_fast.evaluation.transcripts import EvalItem, Journal, record_of, write_transcripts
from influence_fast.settings import check_seed, one_of
from influence_fast.statistics.intervals import bootstrap_interval, wilson_interval

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class EvalConfig:
    """Settings of an evaluation: how the model answers, and how its answers are graded.

    Attributes:
        max_new_tokens: limit of a generated answer.
        batch_size: answers generated at a time.
        temperature: 0 is greedy; several `samples` a question need a temperature above 0.
        top_p: nucleus sampling, above 0 and at most 1.
        samples: answers a question.
        seed: of the sampling.
        pass_at: the k for which pass@k is estimated, each at most `samples`.
        answer_kind: `math`; `last_number`, which grades the last number of an answer that names none in a known form;
            or `choice`, the letter of an option.
        engine: `transformers`, `vllm`, or `auto`, by which a model in memory answers itself and one named by its files
            is vLLM's where that is installed and there is a GPU.
        grade_timeout: seconds that comparing one answer may take.
        generation: `explicit` samples by these settings alone; with `model` the model's own `generation_config.json`
            says how to sample, and `temperature` and `top_p` must be left out.
    Raises:
        ConfigError: a value that is out of range or unknown, or values that do not fit together.
    Example:
        >>> EvalConfig(samples=4, temperature=0.6, pass_at=(1, 4)).answer_kind
        'math'
    """

    max_new_tokens: int = 512
    batch_size: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    samples: int = 1
    seed: int = 0
    pass_at: tuple[int, ...] = ()
    answer_kind: str = "math"
    engine: str = "auto"
    grade_timeout: float = 5.0
    generation: str = EXPLICIT

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "batch_size", "samples", "grade_timeout"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"is {getattr(self, name)}; it must be above 0", key=f"evaluation.{name}")
        check_seed("evaluation.seed", self.seed)
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ConfigError(
                f"{setting('evaluation.temperature')} {self.temperature} or top_p {self.top_p} is out of range: "
                "temperature is 0 or more, top_p above 0 and at most 1"
            )
        if self.generation == OWN and (self.temperature, self.top_p) != (0.0, 1.0):
            raise ConfigError(
                f"{setting('evaluation.generation')} 'model' samples by the model's own generation_config.json: "
                "leave temperature "
                "and top_p out, or use generation 'explicit'"
            )
        if self.samples > 1 and self.temperature == 0 and self.generation == EXPLICIT:
            raise ConfigError(
                f"{setting('evaluation.samples')} is {self.samples} but temperature is 0, so all would be equal; set "
                "a temperature"
            )
        for k in self.pass_at:
            if not 1 <= k <= self.samples:
                raise ConfigError(
                    f"{setting('evaluation.pass_at')}: pass@{k} cannot be estimated from {self.samples} samples a "
                    "question; "
                    "take k from 1 up to samples"
                )
        for name, known in (("answer_kind", ANSWER_KINDS), ("engine", ENGINES), ("generation", KINDS)):
            one_of(f"evaluation.{name}", getattr(self, name), known)


@dataclass(frozen=True, slots=True)
class PassAt:
    """An estimate of pass@k, the chance that one of `k` answers to a question is right, with its 95 % interval."""

    k: int
    value: float
    interval: tuple[float, float]


@dataclass(frozen=True, slots=True)
class EvalResult:
    """The result of an evaluation.

    Attributes:
        accuracy: pass@1, the mean over all answers.
        interval: its 95 % interval: Wilson's with one answer a question; with more, a bootstrap over questions, since
            answers to one question are not independent.
        items: the answers in the order of the questions, samples side by side.
        majority: maj@n, None with one answer a question.
        pass_at: pass@k for the k of the settings.
        truncated: number of answers cut at `max_new_tokens`.
        reused: number of answers taken from an earlier run.
    """

    accuracy: float
    interval: tuple[float, float]
    items: list[EvalItem]
    majority: float | None = None
    pass_at: tuple[PassAt, ...] = ()
    truncated: int = 0
    tokens: int = 0
    engine: str = "transformers"
    reused: int = field(default=0, compare=False)
    seconds: float = field(default=0.0, compare=False)


def evaluate(
    model: torch.nn.Module | ModelFiles,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    config: EvalConfig,
    transcripts: str | Path | None = None,
    overwrite: bool = True,
    progress: bool = False,
) -> EvalResult:
    """Generate and grade answers to every example's prompt.

    Transcripts are written as the answers come. When the same questions are put to the same weights with the same
    settings again, the answers that are there already are used; delete the file to generate anew. Those of `ModelFiles`
    are always generated anew, since their weights are not at hand to be compared. The answers of other questions,
    weights or settings are replaced, or without `overwrite` refused.

    Args:
        model: a module, which answers by transformers, or `ModelFiles`, which vLLM answers (see `answer_batches`).
        tokenizer: the model's.
        examples: questions with an `answer` to grade against.
        config: how to answer and to grade.
        transcripts: a .jsonl file for the items; None writes none.
        overwrite: whether answers of another evaluation at `transcripts` may be replaced.
        progress: show a bar.
    Returns:
        Accuracy, interval and items.
    Raises:
        DataError: no examples, or examples without an `answer` (`choice`: without a letter).
        ModelError: prompts that leave no room in the model's context.
        ConfigError: an engine that does not fit the model, or transcripts of another evaluation.
    Example:
        >>> questions = task_examples(load_task("gsm8k"), limit=100)  # doctest: +SKIP
        >>> inf.evaluate(model, tokenizer, questions, config=EvalConfig()).accuracy  # doctest: +SKIP
        0.42
    """
    if len(examples) == 0:
        raise DataError("no examples to evaluate on: check the test source and its limit")
    without = [example.id for example in examples if example.answer is None]
    if without:
        raise DataError(f"no answer to grade against in {truncated_list(without)}: add an 'answer' column")
    if config.answer_kind == "choice":
        strange = [f"{e.id} ({e.answer!r})" for e in examples if choice_letter(e.answer or "") is None]
        if strange:
            raise DataError(
                f"answer_kind 'choice' needs a letter from A to J as the answer, not {truncated_list(strange)}"
            )
    start = time.perf_counter()
    renderer = Renderer(tokenizer)
    prompts = [renderer.prompt(example) for example in examples]
    journal = None
    if transcripts is not None:
        if not isinstance(model, ModelFiles):
            record = _run_record(model, tokenizer, examples, prompts, config)
            journal = Journal(transcripts, record, overwrite=overwrite)
        elif not overwrite and Path(transcripts).exists():
            why = f"{transcripts} holds the answers of another evaluation"
            raise ConfigError(f"{why}: choose another file, or delete it")
    answered: dict[int, list[EvalItem]] = dict(journal.found) if journal else {}
    reused = sum(len(items) for items in answered.values())
    with contextlib.closing(journal) if journal else contextlib.nullcontext():
        for batch in answer_batches(
            model, tokenizer, prompts, config=config, answered=answered.__contains__, progress=progress
        ):
            for i, samples in batch.items():
                if i not in answered:
                    answered[i] = _graded(examples[i], samples, config)
                    if journal is not None:
                        journal.add(i, answered[i])
        items = [item for i in range(len(examples)) for item in answered[i]]
        if journal is not None:
            journal.finish(items)
        elif transcripts is not None:
            # The record there belongs to other answers.
            record_of(Path(transcripts)).unlink(missing_ok=True)
            write_transcripts(items, transcripts)
    n = config.samples
    by_question = [answered[i] for i in range(len(examples))]
    right = [sum(item.correct for item in group) for group in by_question]
    shares = [c / n for c in right]
    return EvalResult(
        accuracy=sum(shares) / len(shares),
        interval=wilson_interval(sum(right), len(right)) if n == 1 else bootstrap_interval(shares),
        items=items,
        majority=None if n == 1 else sum(majority_correct(group) for group in by_question) / len(by_question),
        pass_at=tuple(_pass_at(k, n, right) for k in config.pass_at),
        truncated=sum(item.finish_reason == CUT for item in items),
        tokens=sum(item.tokens for item in items),
        engine="vllm" if isinstance(model, ModelFiles) else "transformers",
        reused=reused,
        seconds=time.perf_counter() - start,
    )


def _graded(example: Example, samples: Sequence[Answer], config: EvalConfig) -> list[EvalItem]:
    assert example.answer is not None
    items = []
    for number, (text, tokens, reason, token_ids) in enumerate(samples):
        verdict = grade(text, example.answer, timeout=config.grade_timeout, kind=config.answer_kind)
        items.append(
            EvalItem(
                id=example.id,
                prompt=example.prompt,
                generation=text,
                answer=example.answer,
                extracted=verdict.extracted,
                correct=verdict.correct,
                finish_reason=reason,
                sample=number,
                tokens=tokens,
                note=verdict.note,
                token_ids=token_ids,
            )
        )
    return items


def _run_record(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    prompts: Sequence[str],
    config: EvalConfig,
) -> dict[str, Any]:
    """Return all that graded answers depend on; two evaluations with equal records may share them."""
    asked = [[example.id, example.answer] for example in examples]
    own = getattr(model, "generation_config", None)
    generation = generation_settings(config, own, find_ends(own, tokenizer)).record()
    settings = dataclasses.asdict(config)
    # These are applied after the answers, or determined by the model.
    for name in ("pass_at", "engine"):
        settings.pop(name)
    base, adapter = weight_hashes(model)
    return {
        "version": __version__,
        "config": settings,
        "questions": hashlib.sha256(json.dumps(asked).encode()).hexdigest(),
        "tokens": hashlib.sha256(json.dumps(encode(prompts, tokenizer)).encode()).hexdigest(),
        "generation": generation,
        "tokenizer": tokenizer_hash(tokenizer),
        "weights": base,
        "adapter": adapter,
    }


def pass_at_k(n: int, c: int, k: int) -> float:
    """Estimate pass@k without bias from `n` answers of which `c` are right: 1 - C(n-c, k) / C(n, k).

    Chen et al., Evaluating Large Language Models Trained on Code (2021), equation 1. Raises ValueError unless
    0 <= c <= n and 1 <= k <= n.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass@{k} of {c} right among {n}: need 0 <= c <= n and 1 <= k <= n")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def _pass_at(k: int, n: int, right: Sequence[int]) -> PassAt:
    values = [pass_at_k(n, c, k) for c in right]
    return PassAt(k, sum(values) / len(values), bootstrap_interval(values))


def majority_correct(samples: Sequence[EvalItem]) -> bool:
    """Return whether the most frequent extracted answer is right; the earlier wins a tie, no answer has no vote."""
    votes: dict[str, list[EvalItem]] = {}
    for item in samples:
        if item.extracted is not None:
            votes.setdefault(normalise(item.extracted), []).append(item)
    if not votes:
        return False
    return max(votes.values(), key=len)[0].correct
