"""From a dataset to token ids: examples as text, the chat template, and labels on the completion only."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch

from influence_fast.data.conversations import with_reasoning
from influence_fast.data.packing import IGNORED
from influence_fast.data.pruned_rows import kept_rows
from influence_fast.data.row_files import write_rows
from influence_fast.data.rows import Row, Rows, load_rows
from influence_fast.data.schemas import Example, check_trace, check_turns, read_examples
from influence_fast.errors import ConfigError, DataError, ModelError, listing

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "IGNORED",
    "Example",
    "Rows",
    "TokenizedSet",
    "kept_rows",
    "load_examples",
    "load_rows",
    "render_prompt",
    "save_examples",
    "tokenize",
    "write_rows",
]

logger = logging.getLogger(__name__)

_CHUNK = 1024  # examples in one call of the tokenizer: enough for its threads, little to hold


# ---- examples --------------------------------------------------------------------------------------------


def load_examples(
    source: Any,
    *,
    split: str = "train",
    format: str = "auto",
    trace: str | int = "first_correct",
    limit: int | None = None,
    columns: Mapping[str, str | None] | None = None,
    turns: str = "last",
) -> list[Example]:
    """The examples of `source` (see `load_rows` for what it may be) in the order of its rows.

    `format`: a schema's name (schemas.py has the table), or `"auto"` to find it from the columns. `trace`:
    which of a row's `generations` are used in OpenR1 data, `"first"`, `"first_correct"`, `"all"`,
    `"all_correct"` or an index; other schemas have one completion a row. `limit`: at most so many examples.
    `columns`: the source's name for a schema's column, `{"prompt": "my_col"}`; `{"id": None}` numbers the rows
    instead of reading ids, and any other None does without an optional column. `turns`: of a conversation of several
    assistant turns the loss is on the `"last"`, or with `"all"` on all of them; one whose `weight` is 0 gets none.

    Ids are the row's own (`id`, `uuid` or `unique_id`, the first there is), else the row index; a trace's is
    `<row id>#<trace index>`. Rows without a trace that fits `trace` are left out with a warning that names them, and so
    are null and blank traces. Columns that look like traces and are not read are named in a warning.

    Raises DataError, naming file, row and remedy: unreadable source, missing or mistyped column, repeated ids,
    empty completions. Raises ConfigError for an unknown format, trace, turns or rename.
    """
    check_trace(trace)
    check_turns(turns)
    if limit is not None and limit < 1:
        raise ConfigError(f"limit is {limit}; it must be at least 1, or left out")
    rows = load_rows(source, split=split)
    examples: list[Example] = []
    without: list[int] = []
    seen = 0
    for index, found in enumerate(read_examples(rows, format, trace, columns or {}, turns)):
        seen += 1
        examples += found
        if not found:
            without.append(index)
        if limit is not None and len(examples) >= limit:  # before the next row is converted, which may be broken
            break
    if limit is not None:
        del examples[limit:]
    places = listing(rows.place(i).removeprefix(f"{rows.name}, ") for i in without)
    if not examples:
        raise DataError(
            f"{rows.name}: no row has a trace for trace={trace!r}; choose another, such as trace='first', or fill in "
            f"the traces of {places}"
        )
    if without:
        logger.warning(
            "%s: %d of %d rows have no trace for trace=%r and are left out: %s",
            rows.name, len(without), seen, trace, places,
        )  # fmt: skip
    _check_ids(examples, rows)
    _check_completions(examples, lambda e: f"{e.id} ({rows.place(e.row)})")
    return examples


def _check_ids(examples: list[Example], rows: Rows) -> None:
    counts = Counter(example.id for example in examples)
    if len(counts) < len(examples):
        repeated = [f"{name} ({n} times)" for name, n in counts.items() if n > 1]
        raise DataError(
            f"{rows.name}: ids must be unique, repeated are {listing(repeated)}; remove the copies, name "
            'another column with columns={"id": "..."}, or use row numbers with columns={"id": None}'
        )


def _check_completions(examples: Iterable[Example], name: Any = lambda e: e.id) -> None:
    empty = [name(example) for example in examples if not example.completion.strip()]
    if empty:
        raise DataError(f"empty completion in {len(empty)} example(s): {listing(empty)}; fill it in or remove the row")


def save_examples(
    examples: Sequence[Example],
    path: str | os.PathLike[str],
    source_rows: Rows | None = None,
    columns: Mapping[str, str | None] | None = None,
) -> int:
    """Write `examples` to `path` and return the number of rows; the format is the extension's (`write_rows`).

    With `source_rows` (from `load_rows`) the file has the source's own rows and columns, of which only those
    of `examples` are kept, traces within a row included; `columns` are the renames given to `load_examples`.
    `source_rows.suffix` is the extension that keeps the source's format. Without it the columns are `id`,
    `prompt` and `completion`, and `answer` and `label` where any example has one; prompt and completion are messages
    where any example has other turns than the prompt, or reasoning apart. Read again with `turns="all"`, the loss is on
    the same turns: earlier assistant turns have a `weight`.
    """
    if source_rows is not None:
        return write_rows(kept_rows(source_rows, examples, columns), path, schema=source_rows.schema)
    optional = [name for name in ("answer", "label") if any(getattr(e, name) is not None for e in examples)]
    chat = any(e.context or e.between or e.reasoning is not None for e in examples)
    return write_rows([_as_row(example, optional, chat) for example in examples], path)


def _as_row(example: Example, optional: list[str], chat: bool) -> Row:
    values = asdict(example)
    row: Row = {name: values[name] for name in ("id", "prompt", "completion", *optional)}
    if chat:
        row["prompt"] = [
            {"role": role, "content": content} | ({"weight": int(i in example.learnt)} if role == "assistant" else {})
            for i, (role, content) in enumerate(example.turns)
        ]
        row["completion"] = [_last_message(example)]
    return row


def _last_message(example: Example) -> Row:
    """The completion as a message, with its reasoning in a field of its own where the example has it so."""
    message = {"role": "assistant", "content": example.completion}
    if example.reasoning is None:
        return message
    opening = with_reasoning(example.reasoning, "")
    return message | {"reasoning": example.reasoning, "content": example.completion.removeprefix(opening)}


# ---- tokens ----------------------------------------------------------------------------------------------


@dataclass(slots=True)
class TokenizedSet:
    """Token ids of a set of examples, and what was left out or cut.

    `examples`: `{"id": str, "input_ids": int64 (n,), "labels": int64 (n,)}` in the order given; labels are
    aligned with input_ids (the shift by one happens in the loss) and IGNORED on the prompt. `too_long`:
    (id, number of tokens) of each example left out; `truncated`: the same for each that was cut to fit.
    """

    examples: list[dict[str, Any]] = field(default_factory=list)
    too_long: list[tuple[str, int]] = field(default_factory=list)
    truncated: list[tuple[str, int]] = field(default_factory=list)


def render_prompt(prompt: str | Example, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text that the completion follows: the chat template's, else the prompt and a line break.

    Give the `Example` itself where it may have earlier turns (`context`). The text is whole, a
    beginning-of-text token included where the tokenizer would add one: encode it with
    `add_special_tokens=False`.

    Raises ModelError: earlier turns and no chat template. DataError: the template refuses the conversation.
    """
    example = prompt if isinstance(prompt, Example) else Example("prompt", prompt, "")
    return _Renderer(tokenizer).prompt(example)


def tokenize(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None = None,
    truncate: bool = False,
) -> TokenizedSet:
    """Token ids and labels of `examples`; the completion and its end are what the loss sees.

    With a chat template the text is the template's, to its end of turn; without, `prompt + "\\n" + completion`
    and the EOS token; neither end where the completion has not `ended`. Prompt and completion are tokenized apart and
    joined: tokenized as one text, a token may straddle the border, and then either the loss sees some of the prompt or
    the model learns from ids that it never meets when it generates, where the prompt always comes already tokenized.

    `max_length` counts tokens of prompt and completion together. A longer example is left out and listed in
    `too_long`, or with `truncate` cut at its end and listed in `truncated`; when nothing of its completion would
    remain it is left out all the same.

    Raises ModelError: no EOS token, or a template that does not fit (named). DataError: empty completions, by id.
    """
    eos = _eos_id(tokenizer)
    _check_completions(examples)
    if max_length is not None and max_length < 2:
        raise DataError(f"max_length is {max_length}; it must be at least 2, one token to predict another from")
    renderer = _Renderer(tokenizer)
    result = TokenizedSet()
    rest = iter(examples)
    while chunk := list(islice(rest, _CHUNK)):
        pairs = [renderer.pair(example) for example in chunk]
        prompts = _encode(tokenizer, [prompt for prompt, _ in pairs])
        completions = _encode(tokenizer, [completion for _, completion in pairs])
        for example, prompt, completion in zip(chunk, prompts, completions, strict=True):
            if not renderer.templated and example.ended:
                completion.append(eos)
            n = len(prompt) + len(completion)
            if max_length is not None and n > max_length:
                # The first token of all is never predicted, so a cut without a prompt must leave two.
                if not truncate or max(len(prompt), 1) >= max_length:
                    result.too_long.append((example.id, n))
                    continue
                result.truncated.append((example.id, n))
            input_ids = torch.tensor((prompt + completion)[:max_length], dtype=torch.int64)
            labels = input_ids.clone()
            labels[: len(prompt)] = IGNORED
            result.examples.append({"id": example.id, "input_ids": input_ids, "labels": labels})
    return result


def _encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    # verbose=False: the warning about texts beyond model_max_length is ours to give, by id.
    return tokenizer(
        texts, add_special_tokens=False, return_attention_mask=False, verbose=False
    )["input_ids"]  # fmt: skip


def _eos_id(tokenizer: PreTrainedTokenizerBase) -> int:
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"the tokenizer {_name(tokenizer)} has no EOS token; set tokenizer.eos_token to the model's "
            "end-of-text token and save it again"
        )
    return int(tokenizer.eos_token_id)


def _name(tokenizer: PreTrainedTokenizerBase) -> str:
    return repr(tokenizer.name_or_path or type(tokenizer).__name__)


class _Renderer:
    """Examples as text, by the tokenizer's chat template or plainly."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.templated = bool(tokenizer.chat_template)
        # Special tokens come with a template's text; without one, add what the tokenizer would.
        bos = tokenizer.bos_token_id
        adds_bos = bos is not None and tokenizer("a")["input_ids"][0] == bos
        self.bos = tokenizer.bos_token if adds_bos else ""

    def prompt(self, example: Example) -> str:
        if not self.templated:
            if example.context:
                raise ModelError(
                    f"{example.id}: a conversation of several turns needs a chat template, and the tokenizer "
                    f"{_name(self.tokenizer)} has none; set tokenizer.chat_template"
                )
            return f"{self.bos}{example.prompt}\n"
        return self._apply(example, generate=True)

    def pair(self, example: Example) -> tuple[str, str]:
        """The prompt's text and the completion's; joined they are the whole conversation's."""
        prompt = self.prompt(example)
        if not self.templated:
            return prompt, example.completion
        whole = self._apply(example, generate=False)
        if not whole.startswith(prompt):
            raise ModelError(
                f"the chat template of {_name(self.tokenizer)} renders the prompt of {example.id} otherwise when "
                "an answer follows, so the two cannot be told apart; set a template whose generation prompt "
                "is the beginning of the assistant's turn"
            )
        completion = whole[len(prompt) :]
        if not _holds(completion, example.completion):
            raise ModelError(
                f"the chat template of {_name(self.tokenizer)} drops part of the completion of {example.id} "
                "(its reasoning, most likely); set a template that renders the last turn whole"
            )
        if not example.ended:  # as it was generated, white space included
            return prompt, example.completion
        # What follows the end of turn (a line break in most templates) is never generated: no loss on it.
        ended = completion.rstrip()
        eos = self.tokenizer.eos_token
        if ended.endswith(eos):
            return prompt, ended
        if ended.endswith(example.completion.rstrip()):  # the template ends no turn: the model must learn to
            return prompt, completion + eos
        return prompt, completion

    def _apply(self, example: Example, generate: bool) -> str:
        turns = [*example.context, ("user", example.prompt)]
        if not generate:
            turns.append(("assistant", example.completion))
        messages = [{"role": role, "content": content} for role, content in turns]
        from jinja2 import TemplateError

        try:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate)
        except TemplateError as error:
            raise DataError(
                f"{example.id}: the chat template of {_name(self.tokenizer)} refuses the conversation ({error}); "
                "change its roles or set another template"
            ) from error
        assert isinstance(text, str)  # tokenize=False
        return text


def _holds(rendered: str, text: str) -> bool:
    """Whether `rendered` has all of `text`, white space apart (templates strip and re-wrap)."""
    return text.strip() in rendered or "".join(text.split()) in "".join(rendered.split())
