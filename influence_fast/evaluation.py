"""Lets a model answer questions in batches and grades what it says; every transcript is kept."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from influence_fast.atomic import replacing
from influence_fast.data import Example, render_prompt
from influence_fast.errors import ConfigError, DataError, ModelError, listing
from influence_fast.grading import grade, normalise

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

STOPPED = "stop"  # the model ended its answer
CUT = "length"  # it was still talking at max_new_tokens
Z95 = 1.959963984540054  # 97.5 % point of the normal distribution


@dataclass(frozen=True, slots=True)
class EvalConfig:
    """How the model answers. `temperature` 0 is greedy; `samples` answers a question need a temperature above 0.

    `last_number` grades the last number of an answer that names none in a known form.
    """

    max_new_tokens: int = 512
    batch_size: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    samples: int = 1
    seed: int = 0
    last_number: bool = False
    grade_timeout: float = 5.0

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "batch_size", "samples", "grade_timeout"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"evaluation.{name} is {getattr(self, name)}; it must be above 0")
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ConfigError(
                f"evaluation.temperature {self.temperature} or top_p {self.top_p} is out of range: "
                "temperature is 0 or more, top_p above 0 and at most 1"
            )
        if self.samples > 1 and self.temperature == 0:
            raise ConfigError(
                f"evaluation.samples is {self.samples} but temperature is 0, so all would be equal; set a temperature"
            )


@dataclass(frozen=True, slots=True)
class EvalItem:
    """One answer: `generation` as the model wrote it, `extracted` the answer found in it (None: none).

    `finish_reason`: "stop", or "length" when the model had not ended after `max_new_tokens` tokens.
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


@dataclass(frozen=True, slots=True)
class EvalResult:
    """`accuracy` is pass@1: the mean over all answers. `interval` is its 95 % interval.

    Wilson's interval with one answer a question; with more, a bootstrap over questions, since answers to one
    question are not independent. `majority` is maj@n, None with one answer a question. `items` are in the order
    of the questions, samples side by side.
    """

    accuracy: float
    interval: tuple[float, float]
    items: list[EvalItem]
    majority: float | None = None
    truncated: int = 0
    tokens: int = 0
    seconds: float = field(default=0.0, compare=False)


def evaluate(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    config: EvalConfig,
    transcripts: str | Path | None = None,
    progress: bool = False,
) -> EvalResult:
    """Answers and grades every example's prompt; `transcripts` names a jsonl file for the items.

    Prompts of like length share a batch, padded on the left. Raises DataError for no examples or examples without
    an `answer`, ModelError for prompts that leave no room in the model's context.
    """
    if len(examples) == 0:
        raise DataError("no examples to evaluate on: check the test source and its limit")
    without = [example.id for example in examples if example.answer is None]
    if without:
        raise DataError(f"no answer to grade against in {listing(without)}: add an 'answer' column")
    start = time.perf_counter()
    answers = generate(
        model, tokenizer, [render_prompt(example, tokenizer) for example in examples], config=config, progress=progress
    )
    items = []
    for example, samples in zip(examples, answers, strict=True):
        assert example.answer is not None
        for number, (text, tokens, reason) in enumerate(samples):
            verdict = grade(text, example.answer, timeout=config.grade_timeout, last_number=config.last_number)
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
                )
            )
    n = config.samples
    by_question = [items[i : i + n] for i in range(0, len(items), n)]
    shares = [sum(item.correct for item in group) / n for group in by_question]
    accuracy = sum(shares) / len(shares)
    result = EvalResult(
        accuracy=accuracy,
        interval=wilson_interval(round(sum(shares)), len(shares)) if n == 1 else bootstrap_interval(shares),
        items=items,
        majority=None if n == 1 else sum(majority_correct(group) for group in by_question) / len(by_question),
        truncated=sum(item.finish_reason == CUT for item in items),
        tokens=sum(item.tokens for item in items),
        seconds=time.perf_counter() - start,
    )
    if transcripts is not None:
        write_transcripts(items, transcripts)
    return result


@torch.no_grad()
def generate(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    config: EvalConfig,
    progress: bool = False,
) -> list[list[tuple[str, int, str]]]:
    """For each prompt text its `config.samples` answers: (text, tokens before the end, finish reason)."""
    encoded: list[list[int]] = tokenizer(list(prompts), add_special_tokens=False, verbose=False)["input_ids"]
    _check_room(model, encoded, config)
    device = next(model.parameters()).device
    ends = _end_tokens(model, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(ends)
    # longest first: a batch too large for the memory fails at once, not at the end
    order = sorted(range(len(encoded)), key=lambda i: (-len(encoded[i]), i))
    per_batch = max(1, config.batch_size // config.samples)
    batches = [order[i : i + per_batch] for i in range(0, len(order), per_batch)]
    answers: list[list[tuple[str, int, str]]] = [[] for _ in encoded]
    was_training = model.training
    model.eval()
    torch.manual_seed(config.seed)
    try:
        for batch in _track(batches, progress):
            width = len(encoded[batch[0]])
            input_ids = torch.full((len(batch), width), pad, dtype=torch.int64)  # [B, width], padded on the left
            mask = torch.zeros_like(input_ids)
            for row, i in enumerate(batch):
                n = len(encoded[i])
                input_ids[row, width - n :] = torch.tensor(encoded[i], dtype=torch.int64)
                mask[row, width - n :] = 1
            output = model.generate(  # type: ignore[operator]
                input_ids=input_ids.to(device),
                attention_mask=mask.to(device),
                generation_config=_generation_config(config, pad, ends),
            )[:, width:].cpu()  # [B * samples, new tokens]
            for row, tokens in enumerate(output.tolist()):
                end = next((k for k, token in enumerate(tokens) if token in ends), None)
                kept = tokens if end is None else tokens[:end]
                text = tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False)
                reason = STOPPED if end is not None else CUT
                answers[batch[row // config.samples]].append((str(text), len(kept), reason))
    finally:
        model.train(was_training)
    return answers


def write_transcripts(items: Iterable[EvalItem], path: str | Path) -> None:
    """One JSON object an answer; the file appears whole or not at all."""
    with replacing(Path(path)) as partial, partial.open("w", encoding="utf-8") as file:
        for item in items:
            file.write(json.dumps(asdict(item), ensure_ascii=False) + "\n")


def majority_correct(samples: Sequence[EvalItem]) -> bool:
    """Whether the most frequent extracted answer is right; the earlier wins a tie, no answer has no vote."""
    votes: dict[str, list[EvalItem]] = {}
    for item in samples:
        if item.extracted is not None:
            votes.setdefault(normalise(item.extracted), []).append(item)
    if not votes:
        return False
    return max(votes.values(), key=len)[0].correct


def wilson_interval(correct: int, n: int, z: float = Z95) -> tuple[float, float]:
    """Wilson's score interval of a share (Wilson, JASA 1927): sane at 0 and 1 and for small n."""
    share = correct / n
    centre = share + z * z / (2 * n)
    spread = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    # rounding must not leave the share itself outside, as it can at 0 and 1
    return max(0.0, min(share, (centre - spread) / scale)), min(1.0, max(share, (centre + spread) / scale))


def bootstrap_interval(values: Sequence[float], *, draws: int = 10_000, seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval of the mean, resampling `values` (one a question) `draws` times."""
    import numpy as np

    rng = np.random.default_rng(seed)
    data = np.asarray(values, dtype=np.float64)
    means = np.array([data[rng.integers(0, len(data), len(data))].mean() for _ in range(draws)])
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def _generation_config(config: EvalConfig, pad: int, ends: set[int]) -> Any:
    from transformers import GenerationConfig

    sampling: dict[str, Any] = {"do_sample": False}
    if config.temperature > 0:
        # top_k=0 switches off transformers' own default of 50, which nobody asked for
        sampling = {"do_sample": True, "temperature": config.temperature, "top_p": config.top_p, "top_k": 0}
    return GenerationConfig(
        max_new_tokens=config.max_new_tokens,
        num_return_sequences=config.samples,
        pad_token_id=pad,
        eos_token_id=sorted(ends),
        use_cache=True,
        **sampling,
    )


def _end_tokens(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokenizer's EOS, and the others that the model names (chat models end a turn by another token)."""
    named = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    candidates = [*(named if isinstance(named, list | tuple) else [named]), tokenizer.eos_token_id]
    ends = {int(token) for token in candidates if token is not None}
    if not ends:
        raise ModelError("neither tokenizer nor model has an EOS token: set tokenizer.eos_token")
    return ends


def _check_room(model: torch.nn.Module, encoded: Sequence[Sequence[int]], config: EvalConfig) -> None:
    longest = max(len(tokens) for tokens in encoded)
    if min(len(tokens) for tokens in encoded) == 0:
        raise DataError("a prompt has no tokens: drop the empty prompts or set a chat template")
    limit = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if limit is not None and longest + config.max_new_tokens > limit:
        raise ModelError(
            f"the longest prompt ({longest} tokens) and evaluation.max_new_tokens ({config.max_new_tokens}) exceed "
            f"the model's context of {limit}: lower max_new_tokens to at most {max(1, limit - longest)} or drop "
            "the long prompts"
        )


def _track(batches: list[list[int]], progress: bool) -> Iterable[list[int]]:
    if not progress:
        return batches
    from rich.progress import track

    return track(batches, description="answering", transient=True)
