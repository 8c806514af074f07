"""Generate answers to prompts, by transformers' `generate` in batches or by vLLM."""

from __future__ import annotations

import bisect
import gc
import importlib.util
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from influence_fast.data.packing import context_of
from influence_fast.data.tokens import encode
from influence_fast.errors import ConfigError, DataError, ModelError, one_line, setting
from influence_fast.evaluation.generation_settings import Ends, find_ends, generation_settings, without_own_settings
from influence_fast.guards import reading
from influence_fast.progress import track

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from influence_fast.evaluation.evaluate import EvalConfig

ENGINES = ("auto", "transformers", "vllm")
# The model ended its answer.
STOPPED = "stop"
# The answer was cut at max_new_tokens.
CUT = "length"
_EMBEDDINGS = re.compile(r"\b(?:embed_tokens|wte|embed_in|lm_head|embed_out)\b(?!.*lora_).*\.weight$")
# The values that vLLM accepts as max_lora_rank.
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


class Answer(NamedTuple):
    """A generated answer: its text, its number of tokens, and why it ended (STOPPED or CUT).

    `text` is without special tokens and `tokens` counts those before the end; `token_ids` are all that were generated,
    the end included.
    """

    text: str
    tokens: int
    reason: str
    token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A model by its files, for an engine that loads it itself: hub id or folder, and a LoRA adapter's folder."""

    path: str
    adapter: str | None = None
    dtype: str = "float32"
    trust_remote_code: bool = False


def choose_engine(engine: str) -> str:
    """Return `transformers` or `vllm`; `auto` is vLLM where it is installed and there is a GPU.

    Raises ConfigError for `vllm` where it is not installed.
    """
    installed = importlib.util.find_spec("vllm") is not None
    if engine == "vllm" and not installed:
        raise ConfigError(
            f"{setting('evaluation.engine')} is 'vllm', which is not installed: pip install vllm, or use engine "
            "'transformers'"
        )
    if engine == "auto":
        return "vllm" if installed and torch.cuda.is_available() else "transformers"
    return engine


def generate(
    model: torch.nn.Module | ModelFiles,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    config: EvalConfig,
    progress: bool = False,
) -> list[list[Answer]]:
    """Return `config.samples` answers for each prompt text; see `answer_batches`."""
    answers: list[list[Answer]] = [[] for _ in prompts]
    for batch in answer_batches(model, tokenizer, prompts, config=config, progress=progress):
        for i, samples in batch.items():
            answers[i] = samples
    return answers


def answer_batches(
    model: torch.nn.Module | ModelFiles,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    config: EvalConfig,
    answered: Callable[[int], bool] = lambda i: False,
    progress: bool = False,
) -> Iterator[dict[int, list[Answer]]]:
    """Yield the answers of each prompt by its index in `prompts`, `config.samples` of them, batch by batch.

    A model in memory answers by transformers: prompts of like length share a batch, padded on the left, the longest
    first. Each batch has a seed of its own, so a batch whose prompts are all `answered` is left out and the others
    come out the same. `ModelFiles` are answered by vLLM, all in one batch.

    Raises ConfigError where `config.engine` says otherwise, DataError for a prompt without tokens, ModelError for
    prompts that leave no room in the model's context.
    """
    encoded = encode(prompts, tokenizer)
    if isinstance(model, ModelFiles):
        if config.engine == "transformers":
            raise ConfigError(
                f"{setting('evaluation.engine')} 'transformers' answers by a model in memory: load it (load_model)"
            )
        yield dict(enumerate(_vllm_answers(model, tokenizer, encoded, config, progress)))
        return
    if config.engine == "vllm":
        raise ConfigError(
            f"{setting('evaluation.engine')} 'vllm' loads the model from its files: give ModelFiles, not a module"
        )
    check_room(getattr(model, "config", None), encoded, config)
    yield from _transformers_answers(model, tokenizer, encoded, config, answered, progress)


# ---- transformers ----------------------------------------------------------------------------------------


def _transformers_answers(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    encoded: Sequence[Sequence[int]],
    config: EvalConfig,
    answered: Callable[[int], bool],
    progress: bool,
) -> Iterator[dict[int, list[Answer]]]:
    device = next(model.parameters()).device
    own = getattr(model, "generation_config", None)
    settings = generation_settings(config, own, find_ends(own, tokenizer))
    ends = settings.ends
    pad = _padding(model, [tokenizer.pad_token_id, *sorted(ends.tokens)])
    asked = settings.for_transformers(pad)
    # transformers finds stop strings by the tokenizer.
    more: dict[str, Any] = {"tokenizer": tokenizer} if ends.strings else {}
    # longest first: a batch too large for the memory fails at once, not at the end
    order = sorted(range(len(encoded)), key=lambda i: (-len(encoded[i]), i))
    per_batch = max(1, config.batch_size // config.samples)
    batches = [order[i : i + per_batch] for i in range(0, len(order), per_batch)]
    was_training = model.training
    model.eval()
    try:
        for number, batch in enumerate(track(batches, "answering", shown=progress)):
            if all(answered(i) for i in batch):
                continue
            width = len(encoded[batch[0]])
            input_ids = torch.full((len(batch), width), pad, dtype=torch.int64)  # [B, width], padded on the left
            mask = torch.zeros_like(input_ids)
            for row, i in enumerate(batch):
                n = len(encoded[i])
                input_ids[row, width - n :] = torch.tensor(encoded[i], dtype=torch.int64)
                mask[row, width - n :] = 1
            torch.manual_seed((config.seed * 1_000_003 + number) % 2**64)
            with torch.no_grad(), without_own_settings(model):
                tokens = {"input_ids": input_ids.to(device), "attention_mask": mask.to(device)}
                # [B * samples, new tokens]
                output = settings.called(model.generate, **tokens, generation_config=asked, **more)[:, width:].cpu()
            rows = [_answer(new, ends, tokenizer) for new in output.tolist()]
            n = config.samples
            yield {i: rows[row * n : (row + 1) * n] for row, i in enumerate(batch)}
    finally:
        model.train(was_training)


def _padding(model: torch.nn.Module, candidates: Sequence[int | None]) -> int:
    """Return the first candidate id that the model has an embedding for, else 0; padding is masked anyway."""
    embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    rows = None if embeddings is None else len(embeddings.weight)
    return next((i for i in candidates if i is not None and i >= 0 and (rows is None or i < rows)), 0)


def _answer(tokens: list[int], ends: Ends, tokenizer: PreTrainedTokenizerBase, cut: bool = True) -> Answer:
    """Build an answer from new tokens, dropping what follows their end; without an end, `cut` says it was cut."""
    place = next((k for k, token in enumerate(tokens) if token in ends.tokens), None)
    said = tokens if place is None else tokens[:place]
    whole = tokens if place is None else tokens[: place + 1]
    text, raw = _decode(said, tokenizer), _decode(said, tokenizer, special=True)
    stop = min((found for string in ends.strings if (found := raw.find(string)) >= 0), default=None)
    if stop is not None:
        # Of the first tokens whose text has the string, and of those before it.
        whole = said[: _fewest(said, lambda text: any(string in text for string in ends.strings), tokenizer)]
        said = whole[: _fewest(whole, lambda text: len(text) >= stop, tokenizer)]
        # Decoded again without special tokens, where there are some.
        text = raw[:stop] if text == raw else _decode(said, tokenizer)
        return Answer(text, len(said), STOPPED, tuple(whole))
    reason = CUT if place is None and cut else STOPPED
    return Answer(text, len(said), reason, tuple(whole))


def _fewest(tokens: list[int], enough: Callable[[str], bool], tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the least number of leading tokens whose text is `enough`, which the text of all of them must be."""
    return bisect.bisect_left(
        range(len(tokens)), True, key=lambda k: enough(_decode(tokens[:k], tokenizer, special=True))
    )


def _decode(tokens: list[int], tokenizer: PreTrainedTokenizerBase, *, special: bool = False) -> str:
    return str(tokenizer.decode(tokens, skip_special_tokens=not special, clean_up_tokenization_spaces=False))


def check_room(model_config: Any, encoded: Sequence[Sequence[int]], config: EvalConfig) -> None:
    """Raise DataError for an empty prompt, ModelError where prompt and answer may exceed the model's context."""
    longest = max(len(tokens) for tokens in encoded)
    if min(len(tokens) for tokens in encoded) == 0:
        raise DataError("a prompt has no tokens: drop the empty prompts or set a chat template")
    limit = context_of(model_config)
    if limit is not None and longest + config.max_new_tokens > limit:
        raise ModelError(
            f"the longest prompt ({longest} tokens) and {setting('evaluation.max_new_tokens')} "
            f"({config.max_new_tokens}) exceed "
            f"the model's context of {limit}: lower max_new_tokens to at most {max(1, limit - longest)} or drop "
            "the long prompts"
        )


# ---- vLLM ------------------------------------------------------------------------------------------------


def _vllm_answers(
    files: ModelFiles,
    tokenizer: PreTrainedTokenizerBase,
    encoded: Sequence[Sequence[int]],
    config: EvalConfig,
    progress: bool,
) -> list[list[Answer]]:
    """Return the answers of a vLLM engine that lives for this call alone, with the adapter as a LoRARequest.

    Checked against vLLM's documented interface only (`LLM`, `SamplingParams`, `LoRARequest`, `RequestOutput`): it
    has not been run with vLLM itself.
    """
    choose_engine("vllm")
    from transformers import AutoConfig, GenerationConfig
    from vllm import LLM, SamplingParams

    with reading(f"the model {files.path}", ModelError):
        own_config = AutoConfig.from_pretrained(files.path, trust_remote_code=files.trust_remote_code)
    check_room(own_config, encoded, config)
    options: dict[str, Any] = {
        "model": files.path,
        "dtype": files.dtype,
        "seed": config.seed % 2**32,  # it seeds NumPy's generator, too
        "trust_remote_code": files.trust_remote_code,
        # All sampling settings are in the parameters below, and none of the model's own is used.
        "generation_config": "vllm",
    }
    request = None
    if files.adapter is not None:
        from vllm.lora.request import LoRARequest

        _check_vocabulary(files.adapter, own_config)
        options |= {"enable_lora": True, "max_lora_rank": _vllm_rank(files.adapter)}
        request = LoRARequest("adapter", 1, files.adapter)
    # vLLM's default, 90 % of the GPU, ignores what this process already holds.
    if torch.cuda.is_initialized():
        free, total = torch.cuda.mem_get_info()
        options["gpu_memory_utilization"] = round(0.9 * free / total, 3)
    try:
        own = GenerationConfig.from_pretrained(files.path)
    except Exception:
        # The model has no such file, or one that transformers cannot read.
        own = None
    settings = generation_settings(config, own, find_ends(own, tokenizer))
    ends, parameters = settings.ends, settings.for_vllm()
    first = config.seed * 1_000_003
    llm = LLM(**options)
    try:
        outputs = llm.generate(
            [{"prompt_token_ids": list(tokens)} for tokens in encoded],
            [
                # sample j of a request has the seed plus j
                SamplingParams(**parameters, n=config.samples, seed=(first + i * config.samples) % 2**63)
                for i in range(len(encoded))
            ],
            use_tqdm=progress,
            lora_request=request,
        )
    finally:
        del llm
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
    return [
        [
            _answer(list(map(int, one.token_ids)), ends, tokenizer, one.finish_reason == "length")
            for one in output.outputs
        ]
        for output in outputs
    ]


def _check_vocabulary(adapter: str, model_config: Any) -> None:
    """Raise ModelError for an adapter that stores embeddings of another number of tokens than the base has.

    vLLM takes the base's matrices from its files and resizes none.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(adapter) / "adapter_model.safetensors"
    text_config = model_config.get_text_config() if hasattr(model_config, "get_text_config") else model_config
    size = getattr(text_config, "vocab_size", None)
    if size is None or not path.is_file():
        return
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path} is damaged ({one_line(error, 200)}); save the adapter again") from error
    for name, shape in sorted(shapes.items()):
        if _EMBEDDINGS.search(name) and len(shape) == 2 and shape[0] != size:
            raise ModelError(
                f"the adapter {adapter} stores {shape[0]} embeddings ({name}) and its base {size}; vLLM resizes no "
                "vocabulary: use engine 'transformers'"
            )


def _vllm_rank(adapter: str) -> int:
    """Return the least maximal rank that vLLM offers for the adapter. Raises ModelError where it offers none."""
    path = Path(adapter) / "adapter_config.json"
    if not path.is_file():
        raise ModelError(f"{path}: no such file; vLLM needs the adapter as a local folder")
    with reading(path, ModelError):
        config = json.loads(path.read_text(encoding="utf-8"))
        rank = max([int(config["r"]), *(config.get("rank_pattern") or {}).values()])
    for known in VLLM_RANKS:
        if rank <= known:
            return known
    raise ModelError(f"{adapter} has LoRA rank {rank}; vLLM takes at most {VLLM_RANKS[-1]}, use engine 'transformers'")
