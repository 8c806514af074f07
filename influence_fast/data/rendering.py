"""Render examples as text: the chat template's frame around a completion that is kept verbatim.

    prompt       what the template writes for a generation: the model meets just this when it answers
    lead         what the template writes between that and an assistant's content (often nothing)
    completion   the example's own, verbatim, but for a tag that the prompt has opened already
    end          the template's end of turn, and nothing after it

Templates change completions: they trim them, take reasoning out of them, or drop it. So no completion is rendered:
the template is given placeholders of the completion's shape, and the completion is put in their place.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date
from typing import TYPE_CHECKING, Any, NamedTuple

from influence_fast.data.conversations import REASONING_FIELDS, with_reasoning
from influence_fast.data.schemas import Example, Turn
from influence_fast.data.template_limits import check_template
from influence_fast.data.turn_borders import Border, find_border
from influence_fast.data.turn_ends import EndOfTurn, find_end
from influence_fast.errors import DataError, ModelError, one_line, warn_once

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

#: The day that templates print which print one. Tokens must not depend on the day that they are made on: a store that
#: is finished after midnight would mix two prompts. It is the day that Llama 3's template falls back to.
DAY = date(2024, 7, 26)

_THINK, _END_THINK = "<think>", "</think>"
_ASK, _SYSTEM, _SAID = ("user", "PlaceholderQuestion"), ("system", "PlaceholderRule"), "PlaceholderAnswer"
_DIRECTIVES = (*(f"-{letter}" for letter in "dHIjmMSyUW"), *"aAbBcdDeFGhHIjmMpRSTuUVwWxXyYzZ%")  # of strftime


@dataclass(frozen=True, slots=True)
class Rendered:
    """An example as text, of which the first `prompt` characters come before the completion.

    `learnt` are the character spans (start, end) that have a loss: earlier assistant turns where the example names
    some, and last what follows the prompt.
    """

    text: str
    prompt: int
    learnt: tuple[tuple[int, int], ...]


class _Frame(NamedTuple):
    """A template's text before an assistant's content, and after it."""

    head: str
    tail: str


def render_prompt(prompt: str | Example, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the text that the completion follows: the chat template's, else the prompt and a line break.

    Give the `Example` itself where it may have several turns. The text is complete, a beginning-of-text token included
    where the tokenizer would add one: encode it with `add_special_tokens=False`.

    Raises ModelError where there are several turns and no chat template, or the template cannot be used; DataError
    where the template refuses the conversation.
    """
    example = prompt if isinstance(prompt, Example) else Example("prompt", prompt, "")
    return Renderer(tokenizer).prompt(example)


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> EndOfTurn:
    """Return what ends an assistant's turn: the chat template's own end, else the tokenizer's EOS token.

    Raises ModelError where there is neither, or where the template cannot be used.
    """
    return Renderer(tokenizer).end


def added_bos(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the beginning-of-text token that the tokenizer itself puts before a text; empty where it does not."""
    bos = tokenizer.bos_token_id
    return str(tokenizer.bos_token) if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else ""


class Renderer:
    """Writes examples as text by the tokenizer's chat template, or plainly where it has none."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.name = repr(tokenizer.name_or_path or type(tokenizer).__name__)
        self.templated = bool(tokenizer.chat_template)
        # A chat template writes the token itself.
        self._bos = added_bos(tokenizer)
        # Whether content is a list of parts, as templates of multimodal models read it.
        self._parts = False
        # The turns that a conversation must begin with.
        self._opening: tuple[Turn, ...] = (_ASK,)
        self._source = ""
        self._template = self._usable_template() if self.templated else None
        if self.templated:
            self._find_form()

    @functools.cached_property
    def end(self) -> EndOfTurn:
        """Return what ends an assistant's turn. Raises ModelError where nothing does."""
        found = self._find_end()
        if found is None:
            raise ModelError(
                f"the tokenizer {self.name} has no EOS token and no chat template that ends a turn; set "
                "tokenizer.eos_token to the model's end-of-text token and save it again"
            )
        return found

    def prompt(self, example: Example) -> str:
        """Return the text that the completion of `example` follows. Raises as `render_prompt` does."""
        if self.templated:
            return self._apply(example.turns, example.id, generate=True)
        if example.context or example.between:
            raise ModelError(
                f"{example.id}: a conversation of several turns needs a chat template, and the tokenizer "
                f"{self.name} has none; set tokenizer.chat_template"
            )
        return f"{self._bos}{example.prompt}\n"

    def whole(self, example: Example) -> Rendered:
        """Return `example` as text, with the spans that have a loss.

        Raises as `render_prompt` does, and ModelError where the template drops the completion, writes the prompt
        differently when an answer follows, or changes an earlier turn that is to be learned.
        """
        prompt = self.prompt(example)
        if not self.templated:
            answer = example.completion + self.end.text * example.ended
        elif example.ended:
            answer = self._answer(example, prompt)
        else:
            # A completion that was cut off is taken as generated, white space included.
            answer = example.completion
        earlier = [self._span_of_turn(example, index, prompt) for index in example.learnt]
        text = prompt + answer
        return Rendered(text, len(prompt), (*earlier, (len(prompt), len(text))))

    # ---- the completion ------------------------------------------------------------------------------------

    def _answer(self, example: Example, prompt: str) -> str:
        """Return the text that follows the prompt: lead, completion and end."""
        frame, completion = self._framed(example, prompt)
        border = None
        if frame.head.startswith(prompt) or prompt.startswith(frame.head):
            border = find_border(prompt, frame.head, completion, self._source)
        else:
            border = self._border_after_last_turn(example, prompt, frame.head, completion)
        if border is None:
            raise ModelError(
                f"the chat template of {self.name} renders the prompt of {example.id} otherwise when an answer "
                "follows, so the two cannot be told apart; set a template whose generation prompt is the beginning of "
                "the assistant's turn"
            )
        if border.notice:
            warn_once(logger, f"the prompts of {self.name} {border.notice}")
        return border.lead + border.completion + self.end.within(frame.tail, self.tokenizer)

    def _border_after_last_turn(self, example: Example, prompt: str, head: str, completion: str) -> Border | None:
        """Find the border from what the template writes after the last turn, whatever it writes before it."""
        mark, _ = _placeholders(prompt + head)
        marked = _with_last_turn(example, mark)
        other = self.prompt(marked)
        parted = [text.rpartition(mark) for text in (other, self._framed(marked, other)[0].head)]
        ends = [after for _, found, after in parted if found]
        if len(ends) != 2 or not (prompt.endswith(ends[0]) and head.endswith(ends[1])):
            return None
        if prompt[: len(prompt) - len(ends[0])] != head[: len(head) - len(ends[1])]:
            warn_once(
                logger,
                f"the chat template of {self.name} writes a prompt otherwise when an answer follows; what it writes "
                "for a generation is taken in training and scoring too",
            )
        return find_border(ends[0], ends[1], completion, self._source)

    def _framed(self, example: Example, prompt: str) -> tuple[_Frame, str]:
        """Return the frame around the completion, and the completion as it stands in it."""
        if example.reasoning is not None and (told := self._told_apart(example, prompt)) is not None:
            return told
        return self._frame(example, prompt), example.completion

    def _told_apart(self, example: Example, prompt: str) -> tuple[_Frame, str] | None:
        """Return the frame around reasoning that the data holds apart, and the completion rendered from the two.

        Returns None where the template does not render reasoning: it then stands in the completion, between its tags.
        """
        thought, said = _placeholders(prompt)
        text = self._apply(example.turns, example.id, (said, thought))
        first, second = text.find(thought), text.rfind(said)
        if not 0 <= first < second:
            return None
        content = example.completion.removeprefix(with_reasoning(example.reasoning or "", ""))
        between = text[first + len(thought) : second]
        return _Frame(text[:first], text[second + len(said) :]), f"{example.reasoning}{between}{content}"

    def _frame(self, example: Example, prompt: str) -> _Frame:
        """Return the frame around a completion of the example's shape: with reasoning in it, or without."""
        completion = example.completion
        opens = completion.lstrip().startswith(_THINK)
        if opens or _END_THINK in completion:
            found = self._frames_of_reasoning(example, prompt, opens)
            if found:
                # Templates that take no reasoning from the content write an empty one before it.
                return min(found, key=lambda frame: len(frame.head))
        said, _ = _placeholders(prompt)
        text = self._apply(example.turns, example.id, (said, None))
        place = text.rfind(said)
        if place < 0:
            raise ModelError(
                f"the chat template of {self.name} drops the completion of {example.id}; set a template that renders "
                "the last turn whole (tokenizer.chat_template)"
            )
        return _Frame(text[:place], text[place + len(said) :])

    def _frames_of_reasoning(self, example: Example, prompt: str, opens: bool) -> list[_Frame]:
        """Return the frames in which the template keeps reasoning, given in the content or in a field of its own."""
        thought, said = _placeholders(prompt)
        content = f"{_THINK}\n" * opens + f"{thought}\n{_END_THINK}\n\n{said}"
        frames = []
        for answer in ((content, None), (said, thought)):
            text = self._apply(example.turns, example.id, answer)
            first, second = text.find(thought), text.rfind(said)
            head = text[:first].rstrip() if opens else text[:first]
            if 0 <= first < second and (not opens or head.endswith(_THINK)):
                frames.append(_Frame(head.removesuffix(_THINK) if opens else head, text[second + len(said) :]))
        return frames

    # ---- earlier turns -------------------------------------------------------------------------------------

    def _span_of_turn(self, example: Example, index: int, prompt: str) -> tuple[int, int]:
        """Return the span of an earlier assistant turn and its end in the prompt's text."""
        said, _ = _placeholders(prompt)
        turns = list(example.turns)
        role, content = turns[index]
        turns[index] = (role, said)
        text = self._apply(turns, example.id, generate=True)
        start = text.find(said)
        after = text[start + len(said) :]
        fits = start >= 0 and prompt.startswith(text[:start]) and prompt.endswith(after)
        end = len(prompt) - len(after)
        if not fits or prompt[start:end].strip() != content.strip():
            raise ModelError(
                f"the chat template of {self.name} changes turn {index} of {example.id} (it leaves out earlier "
                "reasoning, most likely), so that it cannot be learnt from; take the last turns alone (turns: last)"
            )
        end += self.end.after_turn(after, self.tokenizer)
        return start, end

    # ---- the template --------------------------------------------------------------------------------------

    def _usable_template(self) -> str | None:
        """Return the template to render by, after a trial in a limited process; None for the tokenizer's own."""
        try:
            template = self.tokenizer.get_chat_template()
        except (ValueError, AttributeError) as error:
            # The tokenizer has several templates and no default.
            raise ModelError(f"the chat template of {self.name} cannot be chosen ({one_line(error)})") from error
        if not isinstance(template, str):
            return None
        self._source = template
        special = {name: str(token) for name, token in self.tokenizer.special_tokens_map.items()}
        check_template(template, special, _tried_conversations(), self.name)
        if "strftime_now" not in template:
            return None
        warn_once(
            logger, f"the chat template of {self.name} prints the day: {DAY:%d %b %Y} in every text, on whichever day"
        )
        return _of_the_day(template)

    def _find_form(self) -> None:
        """Detect whether the template reads content as text or as parts, and how a conversation must begin."""
        for parts in (False, True):
            for opening in ((_ASK,), (_SYSTEM, _ASK)):
                self._parts, self._opening = parts, opening
                try:
                    text, again = (self._apply(opening, "a conversation", (_SAID, None)) for _ in range(2))
                except DataError:
                    # The template refuses one of the two forms, or conversations without a system turn.
                    continue
                if text != again:
                    raise ModelError(
                        f"the chat template of {self.name} writes another text each time; set one that does not"
                    )
                if _ASK[1] in text and _SAID in text:
                    return
        self._parts, self._opening = False, (_ASK,)

    def _find_end(self) -> EndOfTurn | None:
        tail, followed, before = "", None, ""
        if self.templated:
            try:
                text = self._apply(self._opening, "a conversation", (_SAID, None))
                tail = text[text.rfind(_SAID) + len(_SAID) :] if _SAID in text else ""
                before = text[: text.find(self._opening[0][1])]
                turns = [*self._opening, ("assistant", _SAID), ("user", "PlaceholderNext")]
                text = self._apply(turns, "a conversation", generate=True)
                followed = text[text.find(_SAID) + len(_SAID) :] if _SAID in text else None
            except DataError:
                # The template wants other turns; the end is then the EOS token, or what a completion shows.
                pass
        return find_end(tail, followed, before, self.tokenizer)

    def _apply(
        self,
        turns: Sequence[Turn],
        name: str,
        answer: tuple[str, str | None] | None = None,
        *,
        generate: bool = False,
    ) -> str:
        """Return the template's text of `turns` and the answer (content, reasoning).

        `name` is the example's, for errors. Raises DataError where the template refuses the conversation.
        """
        messages = [self._message(role, content) for role, content in turns]
        if answer is not None:
            messages.append(self._message("assistant", *answer))
        more: dict[str, Any] = {} if self._template is None else {"chat_template": self._template}
        try:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate, **more)
        except Exception as error:
            # A template is a program, which may raise anything.
            raise DataError(
                f"{name}: the chat template of {self.name} refuses the conversation ({one_line(error)}); change its "
                "roles or set another template"
            ) from error
        assert isinstance(text, str)  # tokenize=False
        return text

    def _message(self, role: str, content: str, reasoning: str | None = None) -> dict[str, Any]:
        message: dict[str, Any] = {"role": role, "content": content}
        if self._parts:
            message["content"] = [{"type": "text", "text": content}]
        if reasoning is not None:
            # Templates read reasoning under one of these names.
            message |= dict.fromkeys(REASONING_FIELDS, reasoning)
        return message


def _tried_conversations() -> list[list[dict[str, Any]]]:
    """Return short conversations of every kind, with which a template is tried before it is used."""
    roles = ["u", "ua", "uau", "uaua", "su", "sua", "suaua", "uat", "uata"]
    names = {"u": "user", "a": "assistant", "s": "system", "t": "tool"}
    plain: list[list[dict[str, Any]]] = [[{"role": names[r], "content": r} for r in turns] for turns in roles]
    parts = [[turn | {"content": [{"type": "text", "text": turn["content"]}]} for turn in turns] for turns in plain]
    return plain + parts[:2]


def _with_last_turn(example: Example, content: str) -> Example:
    """Return `example` with another content in the last turn before the completion."""
    if not example.between:
        return replace(example, prompt=content)
    return replace(example, between=(*example.between[:-1], (example.between[-1][0], content)))


def _placeholders(text: str) -> tuple[str, str]:
    """Return two words that are not in `text` and that no template changes."""
    number = 0
    while (first := f"Placeholder{number}A") in text or (second := f"Placeholder{number}B") in text:
        number += 1
    return first, second


def _of_the_day(template: str) -> str:
    """Return `template` with `strftime_now` as a macro that prints `DAY`: templates take no function."""
    # On a line of its own: the environment takes a line break after a tag away, and white space before one.
    values = [(f"%{directive}", DAY.strftime(f"%{directive}")) for directive in _DIRECTIVES]
    formed = "format" + "".join(f"|replace({directive!r}, {value!r})" for directive, value in values)
    return f"{{%- macro strftime_now(format) %}}{{{{ {formed} }}}}{{%- endmacro %}}\n{template}"
