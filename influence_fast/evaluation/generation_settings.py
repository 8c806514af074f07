"""Settings of generation: the same explicit parameters for every engine, and none taken from the model.

transformers fills in whatever a call leaves open from the model's `generation_config.json` (a repetition penalty, a
least number of tokens, ...), so that greedy decoding is no longer the likeliest token. Here all is given, and the
model's own settings are taken only where `evaluation.generation` is `model`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from influence_fast.data.rendering import end_of_turn
from influence_fast.errors import ConfigError, one_line, setting

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from influence_fast.evaluation.evaluate import EvalConfig

EXPLICIT, OWN = "explicit", "model"
KINDS = (EXPLICIT, OWN)

# What of transformers' settings vLLM calls otherwise, and what it has under the same name.
_VLLM_NAMES = {"min_new_tokens": "min_tokens"}
_VLLM_KNOWS = {"temperature", "top_p", "top_k", "min_p", "repetition_penalty", "min_new_tokens"}
# Of a model's own settings: which tokens are special, how much is answered, and how it is computed.
_NOT_SAMPLING = {
    "bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "transformers_version", "max_length",
    "max_new_tokens", "num_return_sequences", "use_cache", "cache_implementation", "cache_config", "max_cache_len",
    "return_dict_in_generate", "output_attentions", "output_hidden_states", "output_scores", "output_logits",
    "_from_model_config", "stop_strings",
}  # fmt: skip
# What needs one prompt at a time, another model, a clock, or code of its own.
_REFUSED = {
    "prompt_lookup_num_tokens", "assistant_early_exit", "is_assistant", "token_healing", "max_time", "penalty_alpha",
    "dola_layers", "force_words_ids", "constraints", "num_beam_groups", "custom_generate", "use_mtp",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Ends:
    """Ends of an answer: any of `tokens`, or one of `strings`, for an end of turn of several tokens."""

    tokens: frozenset[int]
    strings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class GenerationSettings:
    """The settings that an answer depends on beside model, prompt and seed.

    `sampling` has transformers' names: `do_sample`, and with it `temperature`, `top_p`, `top_k` (0: all tokens), or the
    model's own settings that differ from the defaults.
    """

    sampling: dict[str, Any]
    max_new_tokens: int
    samples: int
    ends: Ends
    # Whether these are the model's own settings.
    own: bool = False

    def called(self, generate: Any, **options: Any) -> torch.Tensor:
        """Call `generate` and return its result; raises ConfigError where the model's own settings prevent it."""
        try:
            return cast("torch.Tensor", generate(**options))
        except (ValueError, TypeError, KeyError, AttributeError, NotImplementedError) as error:
            if not self.own:
                raise
            raise ConfigError(
                f"{setting('evaluation.generation')} 'model': transformers does not answer by the model's "
                "generation_config.json "
                f"({one_line(error)}); mend that file, or use generation 'explicit'"
            ) from error

    def record(self) -> dict[str, Any]:
        """Return the settings as plain values, for the record beside transcripts."""
        ends = {"tokens": sorted(self.ends.tokens), "strings": list(self.ends.strings)}
        sampling = {name: value if _is_plain(value) else repr(value) for name, value in self.sampling.items()}
        return {"sampling": sampling, "max_new_tokens": self.max_new_tokens, "ends": ends}

    def for_transformers(self, pad: int) -> Any:
        """Return the settings as a `transformers.GenerationConfig`; `pad` is the id of the padding token."""
        from transformers import GenerationConfig

        return GenerationConfig(
            **self.sampling,
            max_new_tokens=self.max_new_tokens,
            num_return_sequences=self.samples,
            pad_token_id=pad,
            eos_token_id=sorted(self.ends.tokens) or None,
            stop_strings=list(self.ends.strings) or None,
            use_cache=True,
        )

    def for_vllm(self) -> dict[str, Any]:
        """Return the settings as keyword arguments of `vllm.SamplingParams`.

        Raises ConfigError for a setting of the model's own that vLLM does not have.
        """
        sampling = dict(self.sampling)
        if not sampling.pop("do_sample", False):
            # transformers does not read these for greedy decoding either.
            for name in ("temperature", "top_p", "top_k", "min_p"):
                sampling.pop(name, None)
            sampling["temperature"] = 0.0
        for name in sampling:
            if name not in _VLLM_KNOWS:
                raise ConfigError(
                    f"{setting('evaluation.generation')} 'model': vLLM has no {name!r}, which the model's "
                    "generation_config.json "
                    "sets; use engine 'transformers', or generation 'explicit'"
                )
        neutral = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "min_new_tokens": 0}
        merged: dict[str, Any] = neutral | sampling
        # Every version of vLLM takes -1 for all tokens.
        merged["top_k"] = merged["top_k"] or -1
        return {_VLLM_NAMES.get(name, name): value for name, value in merged.items()} | {
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "max_tokens": self.max_new_tokens,
            "stop_token_ids": sorted(self.ends.tokens),
            "stop": list(self.ends.strings) or None,
            # Without stop strings the tokens are decoded by the tokenizer that the other engine uses.
            "detokenize": bool(self.ends.strings),
        }


def generation_settings(config: EvalConfig, own: Any, ends: Ends) -> GenerationSettings:
    """Return the settings by which answers are generated.

    Args:
        config: the evaluation's settings.
        own: the model's `generation_config`; None where it has none.
        ends: what ends an answer.

    Raises ConfigError: several samples, and the model's own settings are greedy.
    """
    if config.generation == EXPLICIT:
        # top_k=0 switches off transformers' own default of 50, which nobody asked for
        drawn = {"do_sample": True, "temperature": config.temperature, "top_p": config.top_p, "top_k": 0}
        sampling = drawn if config.temperature > 0 else {"do_sample": False}
    else:
        named = {} if own is None else own.to_diff_dict()
        sampling = {str(k): value for k, value in named.items() if k not in _NOT_SAMPLING and value is not None}
        sampling.setdefault("do_sample", False)
        # transformers' defaults where the file says nothing, used for every engine.
        if sampling["do_sample"]:
            sampling = {"temperature": 1.0, "top_p": 1.0, "top_k": 50} | sampling
        for name in _REFUSED & sampling.keys():
            raise ConfigError(
                f"{setting('evaluation.generation')} 'model': the model's generation_config.json sets {name!r}, by "
                "which answers "
                "cannot be asked for in batches, or not twice alike; use generation 'explicit'"
            )
    if config.samples > 1 and not sampling["do_sample"]:
        raise ConfigError(
            f"{setting('evaluation.samples')} is {config.samples} but the model's generation_config.json does not "
            "sample, so all "
            "would be equal; use generation 'explicit' with a temperature"
        )
    own_settings = config.generation == OWN
    if own_settings and (strings := getattr(own, "stop_strings", None)):
        strings = (strings,) if isinstance(strings, str) else tuple(strings)
        ends = Ends(ends.tokens, (*ends.strings, *strings))
    return GenerationSettings(sampling, config.max_new_tokens, config.samples, ends, own_settings)


def _is_plain(value: Any) -> bool:
    """Return whether JSON can hold a setting unchanged."""
    return isinstance(value, str | int | float | bool | None) or (
        isinstance(value, list | tuple) and all(map(_is_plain, value))
    )


def find_ends(own: Any, tokenizer: PreTrainedTokenizerBase) -> Ends:
    """Return the ends of an answer: the chat template's end of turn, the tokenizer's EOS token, and the model's own.

    `own` is the model's `generation_config` (chat models name several end tokens there), or None. Raises ModelError
    where nothing ends a turn.
    """
    end = end_of_turn(tokenizer)
    named = getattr(own, "eos_token_id", None)
    candidates = [*(named if isinstance(named, list | tuple) else [named]), tokenizer.eos_token_id, end.token]
    tokens = frozenset(int(token) for token in candidates if token is not None)
    return Ends(tokens, () if end.token is not None else (end.text,))


@contextlib.contextmanager
def without_own_settings(model: torch.nn.Module) -> Iterator[None]:
    """Give `model` (and the base of a peft model) transformers' default generation settings inside the block."""
    from transformers import GenerationConfig

    base = getattr(model, "get_base_model", lambda: model)()
    holders = [part for part in {id(p): p for p in (model, base)}.values() if hasattr(part, "generation_config")]
    kept = [part.generation_config for part in holders]
    try:
        for part in holders:
            part.generation_config = GenerationConfig()
        yield
    finally:
        for part, own in zip(holders, kept, strict=True):
            part.generation_config = own
