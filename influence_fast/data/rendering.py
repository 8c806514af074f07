"""Examples as text: the chat template's frame around a completion that stands in it as it is.

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
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from typing import TYPE_CHECKING, Any, NamedTuple

from influence_fast.data.conversations import with_reasoning
from influence_fast.data.schemas import Example, Turn
from influence_fast.data.template_limits import check_template
from influence_fast.data.turn_ends import EndOfTurn, find_end, shared_start
from influence_fast.errors import DataError, ModelError, one_line, say_once

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

#: The day that templates print which print one. Tokens must not depend on the day that they are made on: a store that
#: is finished after midnight would mix two prompts. It is the day that Llama 3's template falls back to.
DAY = date(2024, 7, 26)

_THINK, _END_THINK = "<think>", "</think>"
_DIRECTIVES = (*(f"-{letter}" for letter in "dHIjmMSyUW"), *"aAbBcdDeFGhHIjmMpRSTuUVwWxXyYzZ%")  # of strftime
_LONE_TAG = re.compile(r"<([^<>/\s]+)>|\[([^\[\]/\s]+)\]")


@dataclass(frozen=True, slots=True)
class Rendered:
    """An example as text: `text` whole, of which `prompt` characters come before the completion.

    `learnt` are the places (start, end) of what has a loss, in characters: earlier assistant turns where the example
    names some, and last what follows the prompt.
    """

    text: str
    prompt: int
    learnt: tuple[tuple[int, int], ...]


class _Frame(NamedTuple):
    """What the template writes around an assistant's content: all before it, and all after it."""

    head: str
    tail: str


def render_prompt(prompt: str | Example, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the text that the completion follows: the chat template's, else the prompt and a line break.

    Give the `Example` itself where it may have more turns than one. The text is whole, a beginning-of-text token
    included where the tokenizer would add one: encode it with `add_special_tokens=False`.

    Raises ModelError: several turns and no chat template, or a template that cannot be used. DataError: the template
    refuses the conversation.
    """
    example = prompt if isinstance(prompt, Example) else Example("prompt", prompt, "")
    return Renderer(tokenizer).prompt(example)


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> EndOfTurn:
    """Return what ends an assistant's turn: the chat template's own end, else the tokenizer's EOS token.

    Raises ModelError where there is neither, or where the template cannot be used.
    """
    return Renderer(tokenizer).end


class Renderer:
    """Writes examples as text by the tokenizer's chat template, or plainly where it has none."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.name = repr(tokenizer.name_or_path or type(tokenizer).__name__)
        self.templated = bool(tokenizer.chat_template)
        # Special tokens come with a template's text; without one, add what the tokenizer would.
        bos = tokenizer.bos_token_id
        adds_bos = bos is not None and tokenizer("a")["input_ids"][0] == bos
        self._bos = tokenizer.bos_token if adds_bos else ""
        self._parts = False  # content as a list of parts, as templates of models with pictures read it
        self._template = self._usable_template() if self.templated else None
        if self.templated:
            self._find_form()

    @functools.cached_property
    def end(self) -> EndOfTurn:
        """What ends an assistant's turn. Raises ModelError where nothing does."""
        found = self._find_end()
        if found is None:
            raise ModelError(
                f"the tokenizer {self.name} has no EOS token and no chat template that ends a turn; set "
                "tokenizer.eos_token to the model's end-of-text token and save it again"
            )
        return found

    def prompt(self, example: Example) -> str:
        """Return what the completion of `example` follows. Raises as `render_prompt`."""
        if self.templated:
            return self._apply(example.turns, example.id, generate=True)
        if example.context or example.between:
            raise ModelError(
                f"{example.id}: a conversation of several turns needs a chat template, and the tokenizer "
                f"{self.name} has none; set tokenizer.chat_template"
            )
        return f"{self._bos}{example.prompt}\n"

    def whole(self, example: Example) -> Rendered:
        """Return `example` as text, with the places that have a loss.

        Raises as `render_prompt`, and ModelError where the template drops the completion, writes the prompt otherwise
        when an answer follows, or changes an earlier turn that is to be learnt.
        """
        prompt = self.prompt(example)
        if not self.templated:
            answer = example.completion + self.end.text * example.ended
        elif example.ended:
            answer = self._answer(example, prompt)
        else:  # as it was generated, white space included
            answer = example.completion
        earlier = [self._span_of_turn(example, index, prompt) for index in example.learnt]
        text = prompt + answer
        return Rendered(text, len(prompt), (*earlier, (len(prompt), len(text))))

    # ---- the completion ------------------------------------------------------------------------------------

    def _answer(self, example: Example, prompt: str) -> str:
        """What follows the prompt: lead, completion and end."""
        completion = example.completion
        if example.reasoning is not None and (told := self._told_apart(example, prompt)) is not None:
            frame, completion = told
        else:
            frame = self._frame(example, prompt)
        lead, rest = self._joined(example, prompt, frame.head, completion)
        return lead + rest + self.end.within(frame.tail, self.tokenizer)

    def _told_apart(self, example: Example, prompt: str) -> tuple[_Frame, str] | None:
        """The frame around reasoning that the data holds apart, and the completion as the template writes the two.

        None where the template knows no reasoning: it then stands in the completion, between its tags.
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
        """The frame around a completion of the example's shape: with reasoning in it, or without."""
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
        """The frames in which the template keeps reasoning, given in the content or in a field of its own."""
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

    def _joined(self, example: Example, prompt: str, head: str, completion: str) -> tuple[str, str]:
        """What stands between prompt and completion, and the completion less a tag that the prompt opened."""
        if head.startswith(prompt):
            return head[len(prompt) :], completion
        shared = shared_start(head, prompt)
        opened, lead = prompt[shared:], head[shared:]
        last = example.turns[-1][1].strip()
        if last and (last in opened or last in lead):
            raise ModelError(
                f"the chat template of {self.name} renders the prompt of {example.id} otherwise when an answer "
                "follows, so the two cannot be told apart; set a template whose generation prompt is the beginning of "
                "the assistant's turn"
            )
        for tag in (opened, opened.strip()):
            if not lead and tag and completion.startswith(tag):
                return "", completion[len(tag) :]
        found = _LONE_TAG.fullmatch(opened.strip())
        if lead or found is None:
            return lead, completion
        closing = f"</{found[1]}>" if found[1] else f"[/{found[2]}]"
        if closing in completion:
            return "", completion
        say_once(
            logger,
            f"the prompts of {self.name} open {opened.strip()}, and completions without it follow {closing}: mark what "
            f"is reasoning as {opened.strip()}...{closing}",
        )
        return f"\n{closing}\n\n", completion

    # ---- earlier turns -------------------------------------------------------------------------------------

    def _span_of_turn(self, example: Example, index: int, prompt: str) -> tuple[int, int]:
        """Where an earlier assistant turn and its end stand in the prompt's text."""
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
        ending = self.end.text
        if after.lstrip().startswith(ending):
            end += after.index(ending) + len(ending)
        return start, end

    # ---- the template --------------------------------------------------------------------------------------

    def _usable_template(self) -> str | None:
        """The template to render by, tried in a limited process; None: the tokenizer's own, as it is."""
        try:
            template = self.tokenizer.get_chat_template()
        except (ValueError, AttributeError) as error:  # several templates, none of which is the default
            raise ModelError(f"the chat template of {self.name} cannot be chosen ({one_line(error)})") from error
        if not isinstance(template, str):
            return None
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        parts = [turn | {"content": [{"type": "text", "text": turn["content"]}]} for turn in turns]
        special = {name: str(token) for name, token in self.tokenizer.special_tokens_map.items()}
        check_template(template, special, [turns[:1], turns, parts], self.name)
        if "strftime_now" not in template:
            return None
        say_once(
            logger, f"the chat template of {self.name} prints the day: {DAY:%d %b %Y} in every text, on whichever day"
        )
        return _of_the_day(template)

    def _find_form(self) -> None:
        """Finds out whether the template reads content as text or as a list of parts."""
        asked, said = "PlaceholderQuestion", "PlaceholderAnswer"
        for parts in (False, True):
            self._parts = parts
            try:
                text = self._apply([("user", asked)], "a conversation", (said, None))
            except DataError:  # refuses one of the two forms, or conversations without a system turn
                continue
            if asked in text and said in text:
                return
        self._parts = False

    def _find_end(self) -> EndOfTurn | None:
        tail, followed = "", None
        if self.templated:
            said = "PlaceholderAnswer"
            ask = ("user", "PlaceholderQuestion")
            try:
                text = self._apply([ask], "a conversation", (said, None))
                tail = text[text.rfind(said) + len(said) :] if said in text else ""
                text = self._apply(
                    [ask, ("assistant", said), ("user", "PlaceholderNext")], "a conversation", generate=True
                )
                followed = text[text.find(said) + len(said) :] if said in text else None
            except DataError:  # the template wants other turns: the tokenizer's EOS, or what a completion shows
                pass
        return find_end(tail, followed, self.tokenizer)

    def _apply(
        self,
        turns: Sequence[Turn],
        name: str,
        answer: tuple[str, str | None] | None = None,
        *,
        generate: bool = False,
    ) -> str:
        """The template's text of `turns` and the answer (content, reasoning). `name` is the example's."""
        messages = [self._message(role, content) for role, content in turns]
        if answer is not None:
            messages.append(self._message("assistant", *answer))
        more: dict[str, Any] = {} if self._template is None else {"chat_template": self._template}
        try:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate, **more)
        except Exception as error:  # a template is a program: it raises whatever it likes
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
            # the names that templates read it by: DeepSeek's and Qwen's, gpt-oss's, and OpenRouter's
            message |= dict.fromkeys(("reasoning_content", "thinking", "reasoning"), reasoning)
        return message


def _placeholders(text: str) -> tuple[str, str]:
    """Two words that are not in `text` and that no template changes."""
    number = 0
    while (first := f"Placeholder{number}A") in text or (second := f"Placeholder{number}B") in text:
        number += 1
    return first, second


def _of_the_day(template: str) -> str:
    """`template` with `strftime_now` of `DAY`: a macro, since the function itself cannot be given to a template."""
    # On a line of its own: the environment takes a line break after a tag away, and white space before one.
    values = [(f"%{directive}", DAY.strftime(f"%{directive}")) for directive in _DIRECTIVES]
    formed = "format" + "".join(f"|replace({directive!r}, {value!r})" for directive, value in values)
    return f"{{%- macro strftime_now(format) %}}{{{{ {formed} }}}}{{%- endmacro %}}\n{template}"
