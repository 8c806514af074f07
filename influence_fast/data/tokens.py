"""Turn examples into token ids and labels: those of the complete text, split where the completion begins."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from influence_fast.data.packing import IGNORED
from influence_fast.data.rendering import Rendered, Renderer, added_bos
from influence_fast.data.schemas import Example
from influence_fast.data.turn_ends import shared_start
from influence_fast.errors import DataError, InfluenceFastError, ModelError, truncated_list, warn_once

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

# Examples in one call of the tokenizer: enough for its threads, and little to hold in memory.
_CHUNK = 1024
_PROBES = (
    Example("plain", "What is 12 + 7?", "12 + 7 = 19.\n\nSo \\boxed{19}."),
    Example("reasoning", "What is 12 + 7?", "<think>\n12 + 7 = 19\n</think>\n\n19", context=(("system", "Think."),)),
    Example("turns", "And 1 more?", " 20 ", context=(("user", "12 + 7?"), ("assistant", "19"))),
)
_COMPARED = 16  # examples of a call whose tokens are decoded again and compared with their texts


@dataclass(slots=True)
class TokenizedSet:
    """Token ids of a set of examples, and the examples that were left out or cut.

    `examples`: `{"id": str, "input_ids": int64 [n], "labels": int64 [n]}` in the order given; labels are aligned with
    input_ids (the shift by one happens in the loss) and IGNORED on the prompt. `too_long`: (id, number of tokens) of
    each example left out; `truncated`: (id, number of tokens before the cut) of each that was cut to fit.
    """

    examples: list[dict[str, Any]] = field(default_factory=list)
    too_long: list[tuple[str, int]] = field(default_factory=list)
    truncated: list[tuple[str, int]] = field(default_factory=list)


def tokenize(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None = None,
    truncate: bool = False,
) -> TokenizedSet:
    r"""Turn examples into token ids and labels; the loss is on the completion and its end.

    With a chat template the text is the template's, to its end of turn; without, `prompt + "\n" + completion` and the
    EOS token; neither end where the completion has not `ended`. The text is tokenized as a whole: tokenizers in
    SentencePiece's manner put a mark of a word before a text that is tokenized alone. A token that begins in the prompt
    and ends in the completion belongs to the completion. A completion that was generated has its tokens already
    (`Example.token_ids`), and they follow those of the prompt.

    Args:
        examples: as `load_examples` returns them.
        tokenizer: a transformers tokenizer.
        max_length: the limit of tokens of prompt and completion together.
        truncate: cut longer examples at their end and list them in `truncated`. Otherwise, or where nothing of the
            completion would remain, they are left out and listed in `too_long`.
    Returns:
        A `TokenizedSet`, whose `examples` hold `input_ids` and `labels`, int64 [n], -100 where there is no loss.
    Raises:
        ModelError: nothing ends a turn, or a template that does not fit (named).
        DataError: empty completions, by id, or a `max_length` below 2.
    Example:
        >>> tokens = inf.tokenize(inf.load_examples("train.jsonl"), tokenizer, max_length=4096)  # doctest: +SKIP
        >>> len(tokens.examples), tokens.too_long  # doctest: +SKIP
        (7473, [])
    """
    _check_texts(examples, tokenizer)
    check_completions(examples)
    whole = isinstance(max_length, int) and not isinstance(max_length, bool)
    if max_length is not None and not (whole and max_length >= 2):
        raise DataError(
            f"is {max_length!r}; it must be at least 2, one token to predict another from",
            key="max_length",
            value=max_length,
        )
    renderer = Renderer(tokenizer)
    # A missing end raises here, and not at the first completion that ended.
    _ = renderer.end
    result = TokenizedSet()
    for start in range(0, len(examples), _CHUNK):
        chunk = examples[start : start + _CHUNK]
        for example, (ids, labels) in zip(chunk, _encoded(chunk, renderer), strict=True):
            n, first = len(ids), next((i for i, label in enumerate(labels) if label != IGNORED), len(ids))
            if max_length is not None and n > max_length:
                # The first token of all is never predicted, so a cut without a prompt must leave two.
                if not truncate or max(first, 1) >= max_length:
                    result.too_long.append((example.id, n))
                    continue
                result.truncated.append((example.id, n))
            tokens = {"input_ids": ids[:max_length], "labels": labels[:max_length]}
            result.examples.append(
                {"id": example.id} | {name: torch.tensor(t, dtype=torch.int64) for name, t in tokens.items()}
            )
    return result


def _check_texts(examples: Any, tokenizer: Any) -> None:
    """Raise DataError for what is no list of examples, ModelError for what is no tokenizer."""
    for place, example in enumerate(examples if isinstance(examples, Iterable) else [examples]):
        if not hasattr(example, "completion"):
            raise DataError(
                f"examples[{place}] is a {type(example).__name__}, not an Example: read files and rows by "
                "inf.load_examples(...), and give what it returns"
            )
    if not callable(tokenizer) or not hasattr(tokenizer, "decode"):
        raise ModelError(f"the tokenizer is a {type(tokenizer).__name__}: give what inf.load_tokenizer returns")


def tokenization_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a SHA-256 of how texts become tokens: those of a few fixed examples, by this version and this tokenizer.

    Two stores of the same texts with different hashes hold rows of different tokens: the chat template was changed, it
    prints something that changes by itself, or an earlier version of this package wrote the text differently.
    """
    found = hashlib.sha256()
    for example in _PROBES:
        try:
            [(ids, labels)] = _encoded([example], Renderer(tokenizer))
            tokens: Any = [ids, labels]
        except InfluenceFastError as error:
            # The template takes no system turn.
            tokens = str(error)
        found.update(json.dumps(tokens).encode() + b"\n")
    return found.hexdigest()


def encode(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Return the token ids of complete texts, to which nothing is added."""
    return _called(tokenizer, texts) if texts else []


def check_completions(examples: Sequence[Example], name: Callable[[Example], str] = lambda example: example.id) -> None:
    """Raise DataError naming the examples, by `name`, whose completion is empty."""
    empty = [name(example) for example in examples if not example.completion.strip() and not example.token_ids]
    if empty:
        raise DataError(
            f"empty completion in {len(empty)} example(s): {truncated_list(empty)}; fill it in or remove the row"
        )


def _encoded(examples: Sequence[Example], renderer: Renderer) -> list[tuple[list[int], list[int]]]:
    """Return (input_ids, labels) of each example."""
    tokenizer = renderer.tokenizer
    given = {i: renderer.prompt(e) for i, e in enumerate(examples) if e.token_ids is not None}
    texts = {i: renderer.whole(e) for i, e in enumerate(examples) if e.token_ids is None}
    found: dict[int, tuple[list[int], list[int]]] = {}
    for i, prompt in zip(given, encode(list(given.values()), tokenizer), strict=True):
        answer = list(examples[i].token_ids or ())
        found[i] = prompt + answer, [IGNORED] * len(prompt) + answer
    if texts:
        found |= dict(zip(texts, _tokens_of(list(texts.values()), renderer), strict=True))
        for i in texts:
            _check_end(examples[i], texts[i], found[i][0], renderer)
    return [found[i] for i in range(len(examples))]


def _check_end(example: Example, text: Rendered, ids: list[int], renderer: Renderer) -> None:
    """Raise ModelError where the end of turn is a single token and the tokenizer reads the text as another."""
    end = renderer.end
    if example.ended and end.token is not None and text.text.endswith(end.text) and ids[-1] != end.token:
        raise ModelError(
            f"{example.id}: the tokenizer {renderer.name} does not read the end of turn {end.text!r} as the token "
            f"{end.token}, where a generation stops; look at split_special_tokens, and at single_word of that token"
        )


def _tokens_of(texts: list[Rendered], renderer: Renderer) -> list[tuple[list[int], list[int]]]:
    """Return (input_ids, labels) of each text, tokenized as a whole."""
    prompts = encode([text.text[: text.prompt] for text in texts], renderer.tokenizer)
    whole = encode([text.text for text in texts], renderer.tokenizer)
    found = []
    for i, (text, prompt, ids) in enumerate(zip(texts, prompts, whole, strict=True)):
        tokens = _Tokens(text, ids)
        split = tokens.completion(prompt, renderer)
        labels = [IGNORED] * split + tokens.ids[split:]
        for start, end in text.learnt[:-1]:
            first, last = (tokens.before(place, renderer) for place in (start, end))
            labels[first:last] = tokens.ids[first:last]
        found.append((tokens.ids, labels))
        if i < _COMPARED:
            _compare(text, tokens.ids[split:], renderer)
    return found


@dataclass(frozen=True, slots=True)
class _Tokens:
    """A text and its tokens."""

    text: Rendered
    ids: list[int]

    def completion(self, prompt: list[int], renderer: Renderer) -> int:
        """Return the index of the completion's first token: the first not among those of the `prompt` alone."""
        # The prompt has the same tokens when the model answers.
        if self.ids[: len(prompt)] == prompt:
            return len(prompt)
        warn_once(
            logger,
            f"the tokenizer {renderer.name} cuts the end of a prompt otherwise when a completion follows it; a token "
            "across that border belongs to the completion, and a generation begins with other tokens",
        )
        return self.before(self.text.prompt, renderer)

    def before(self, place: int, renderer: Renderer) -> int:
        """Return how many tokens end at or before character `place`."""
        # A tokenizer in Python does not report the offsets of its tokens.
        if not renderer.tokenizer.is_fast:
            return shared_start(self.ids, encode([self.text.text[:place]], renderer.tokenizer)[0])
        bos = _added_bos(renderer.tokenizer)
        start = len(bos) if self.text.text.startswith(bos) else 0
        found = renderer.tokenizer(
            self.text.text[start:], add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        ends = [start] * (start > 0) + [start + end for _, end in found["offset_mapping"]]
        return next((i for i, end in enumerate(ends) if end > place), len(self.ids))


def _compare(text: Rendered, learnt: list[int], renderer: Renderer) -> None:
    """Warn where the learned tokens decode to another text than the one given."""
    decoded = str(renderer.tokenizer.decode(learnt, skip_special_tokens=False, clean_up_tokenization_spaces=False))
    if text.text[text.prompt :].strip() not in decoded:
        warn_once(
            logger,
            f"the tokenizer {renderer.name} does not keep texts as they are (unknown characters, white space or case): "
            "what is learnt and scored is what it keeps",
        )


def _called(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Return the token ids of complete texts. Raises DataError for a text with half a surrogate pair."""
    bos = _added_bos(tokenizer)
    cut = [text.removeprefix(bos) for text in texts] if bos else list(texts)
    try:
        # verbose=False: the warning about texts beyond model_max_length is ours to give, by id.
        found = tokenizer(cut, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    except (TypeError, UnicodeEncodeError):
        for text in texts:
            if re.search("[\ud800-\udfff]", text):
                raise DataError(f"a text holds half a surrogate pair: {text[:60]!r}; re-encode it as UTF-8") from None
        raise
    if not bos:
        return list(found)
    return [
        [int(tokenizer.bos_token_id)] * (len(text) > len(rest)) + ids
        for text, rest, ids in zip(texts, cut, found, strict=True)
    ]


def _added_bos(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the BOS token that plain texts begin with; it is put before their tokens and not read as text.

    A tokenizer in SentencePiece's manner marks the first word of a text, and not one that follows a special token: what
    it makes of the text alone is what others train on. In a chat template's text BOS stands where the template writes
    it, and "" is returned.
    """
    return "" if tokenizer.chat_template else added_bos(tokenizer)
