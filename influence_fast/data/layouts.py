"""Converters of known column layouts: each takes prompt, completion and answer from a row."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from influence_fast.data.boxed import last_boxed
from influence_fast.data.cells import Cells, Turn, is_blank, is_null, truth
from influence_fast.data.conversations import Draft, Message, conversation, joined, messages, without_tags
from influence_fast.errors import setting

TRACE_CHOICES = ("first", "first_correct", "all", "all_correct")

Trace = str | int


@dataclass(frozen=True)
class Reading:
    """Choices of the reader: which of a row's traces to take, and which assistant turns have a loss."""

    trace: Trace = "first_correct"
    turns: str = "last"


Converter = Callable[[Cells, Reading], list[Draft]]

_VERDICTS = ("correctness_math_verify", "correctness_llama")
# NuminaMath writes these where a problem has no final answer.
_NO_ANSWER = ("proof", "notfound")
_METAMATH_MARK = "The answer is:"
_HH_START = re.compile(r"\s*Human:\s")
_HH_TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):[ ]?")
_LONGEST_RESULT = 200  # characters
# An answer of fewer words is a result and no solution.
_WORDED = 4


def prompt_completion(cells: Cells, reading: Reading) -> list[Draft]:
    """Take `prompt` and `completion`, text or messages; a column renamed to `reasoning` comes before the completion."""
    completion = _completion(cells)
    answer = cells.optional("answer")
    is_list = isinstance(cells.value("prompt"), list)
    prompt = messages(cells, "prompt") if is_list else [Message("user", cells.text("prompt"))]
    if "system" in cells.names:
        prompt = _after_system(cells, prompt)
    return [conversation(cells, [*prompt, completion], answer, reading.turns)]


def _completion(cells: Cells) -> Message:
    what = f"column {cells.column('completion')!r}"
    if isinstance(cells.value("completion"), list):
        found = messages(cells, "completion")
        if len(found) != 1 or found[0].role != "assistant":
            raise cells.error("column 'completion' must hold exactly one 'assistant' message; mend the row")
        if not found[0].learns:
            raise cells.error("column 'completion' holds a message with weight 0; remove the weight or the row")
        message = found[0]
    else:
        message = Message("assistant", cells.text("completion"))
    reasoning = cells.optional_text("reasoning") if "reasoning" in cells.names else None
    if reasoning is None:
        return message
    text, apart = joined(cells, without_tags(reasoning), message.content, what)
    return replace(message, content=text, reasoning=apart or message.reasoning)


def chat(column: str, *, reads_system: bool) -> Converter:
    """Return the converter of conversations in `column`.

    A `system` column is their first turn with `reads_system`, or where it is named. The answer is that of the column
    `answer`, else the last box in `solution`.
    """

    def convert(cells: Cells, reading: Reading) -> list[Draft]:
        found = messages(cells, column)
        if reads_system or "system" in cells.names:
            found = _after_system(cells, found)
        solution = cells.maybe("solution")
        answer = cells.optional("answer") or _boxed(solution if isinstance(solution, str) else None)
        return [conversation(cells, found, answer, reading.turns)]

    return convert


def _after_system(cells: Cells, found: list[Message]) -> list[Message]:
    """Return the messages with the text of the `system` column before them where the row has one."""
    system = cells.optional_text("system")
    if system is None:
        return found
    if found and found[0].role == "system":
        if found[0].content.strip() == system.strip():
            return found
        raise cells.error(
            f"column {cells.column('system')!r} differs from the conversation's own system turn; mend the row, or do "
            f"without the column by {setting('columns', {'system': None})}"
        )
    return [Message("system", system), *found]


def preference(cells: Cells, reading: Reading) -> list[Draft]:
    """Take `chosen` as the completion, after `prompt` or with the prompt inside it; `rejected` is not learned."""
    answer = cells.optional("answer")
    prompt: list[Message] = []
    if cells.maybe("prompt") is not None:
        is_list = isinstance(cells.maybe("prompt"), list)
        prompt = messages(cells, "prompt") if is_list else [Message("user", cells.text("prompt"))]
    if isinstance(cells.value("chosen"), list):
        chosen = messages(cells, "chosen")
        asked = next((each.content for each in reversed([*prompt, *chosen]) if each.role == "user"), "")
        if chosen and chosen[-1].role == "assistant":
            chosen[-1] = replace(chosen[-1], content=_without_prompt(cells, asked, chosen[-1].content))
    else:
        prompt, chosen = _chosen_text(cells, prompt)
    whole = _after_system(cells, _joined(cells, prompt, chosen))
    return [conversation(cells, whole, answer, reading.turns)]


def _chosen_text(cells: Cells, prompt: list[Message]) -> tuple[list[Message], list[Message]]:
    r"""Return the prompt and the chosen messages of a `chosen` that is text and may begin with the prompt's text.

    Text in the form of HH-RLHF, "\n\nHuman: ...\n\nAssistant: ...", is split into its turns.
    """
    chosen = cells.text("chosen")
    asked = prompt[0].content if len(prompt) == 1 and prompt[0].role == "user" else ""
    if _HH_START.match(asked):
        whole = chosen if chosen.strip().startswith(asked.strip()) else _hh_text(asked, chosen)
        return [], _hh_turns(whole)
    if _HH_START.match(chosen):
        return prompt, _hh_turns(chosen)
    if not prompt:
        raise cells.error(
            f"column {cells.column('chosen')!r} is text, and there is no prompt to it; name the column of the "
            f"prompt with {setting('columns', {'prompt': '...'})}"
        )
    return prompt, [Message("assistant", _without_prompt(cells, asked, chosen))]


def _without_prompt(cells: Cells, prompt: str, chosen: str) -> str:
    """Return `chosen` without the prompt before it, where `rejected` begins with the prompt too, or is null.

    Where `chosen` begins so by chance ("P" before "Paris"), `rejected` does not.
    """
    rejected = cells.maybe("rejected")
    if isinstance(rejected, list) and rejected and isinstance(rejected[-1], dict):
        rejected = rejected[-1].get("content", rejected[-1].get("value"))
    rest = _after_prompt(prompt, chosen)
    if rest and (not isinstance(rejected, str) or _after_prompt(prompt, rejected) is not None):
        return rest
    return chosen


def _after_prompt(prompt: str, text: str) -> str | None:
    """Return the text after the prompt; None where `text` does not begin with it, or goes on in the same word."""
    start, whole = prompt.strip(), text.strip()
    if not start or not whole.startswith(start):
        return None
    rest = whole[len(start) :]
    return None if start[-1].isalnum() and rest[:1].isalnum() else rest.strip()


def _hh_text(prompt: str, chosen: str) -> str:
    """Return HH-RLHF's prompt and chosen answer as one text; the prompt may end with "Assistant:" or before it."""
    is_marked = _HH_TURN.match(chosen) is not None or prompt.rstrip().endswith("\n\nAssistant:")
    return f"{prompt.rstrip()}{'' if is_marked else chr(10) * 2 + 'Assistant:'} {chosen.lstrip(' ')}"


def _hh_turns(text: str) -> list[Message]:
    marks = list(_HH_TURN.finditer(text))
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    roles = ["user" if mark[1] == "Human" else "assistant" for mark in marks]
    return [Message(role, text[mark.end() : end].strip()) for role, mark, end in zip(roles, marks, ends, strict=True)]


def _joined(cells: Cells, prompt: list[Message], chosen: list[Message]) -> list[Message]:
    """Return the conversation of a prompt and the chosen messages, which may begin with that prompt."""
    if not any(message.role == "user" for message in chosen):
        return [*prompt, *chosen]
    said = [message.turn for message in chosen]
    system = [message for message in prompt if message.role == "system"]
    asked = [message for message in prompt if message.role != "system"]
    if said[: len(prompt)] == [message.turn for message in prompt]:
        return chosen
    if said[: len(asked)] == [message.turn for message in asked]:
        return [*system, *chosen]
    # The prompt is the last question of several, as text.
    if len(prompt) == 1 and prompt[0].turn in said:
        return chosen
    raise cells.error(
        f"column {cells.column('chosen')!r} holds a conversation that does not begin with the prompt; mend the row, or "
        f"take the conversation alone by {setting('columns', {'prompt': None})}"
    )


def gsm8k(cells: Cells, reading: Reading) -> list[Draft]:
    """Take `question` and a worked `answer`, of which the final answer follows `####`."""
    solution = cells.text("answer")
    _, mark, answer = solution.rpartition("####")
    if not mark or not answer.strip():
        raise cells.error(
            f"column {cells.column('answer')!r} has no final answer after '####'; add it, or load the file as "
            f"{setting('format', 'orca_math')} (worded solutions) or {setting('format', 'prompt_completion')} with "
            + setting("columns", {"prompt": "...", "completion": "..."})
        )
    return [Draft(cells.text("question"), solution, answer.strip().replace(",", ""))]


def orca_math(cells: Cells, reading: Reading) -> list[Draft]:
    """Take `question` and a worded solution in `answer`; the final answer is that in a box, if there is one."""
    solution = cells.text("answer")
    return [Draft(cells.text("question"), solution, _boxed(solution))]


def is_worded(cells: Sequence[Cells]) -> bool:
    """Return whether the `answer` columns of these rows are worded solutions without the mark of GSM8K."""
    answers = [answer for each in cells if isinstance(answer := each.maybe("answer"), str)]
    if any("####" in answer for answer in answers):
        return False
    return 2 * sum(len(answer.split()) >= _WORDED for answer in answers) > len(answers)


def solved(prompt: str) -> Converter:
    """Return the converter of `prompt` and `solution`, with the answer in its own column or in the solution's box."""

    def convert(cells: Cells, reading: Reading) -> list[Draft]:
        solution = cells.text("solution")
        return [Draft(cells.text(prompt), solution, _answer(cells, "answer", _boxed(solution)))]

    return convert


def openmath(prompt: str) -> Converter:
    """Return the converter of NVIDIA's OpenMath sets, whose problem is in the column `prompt`."""

    def convert(cells: Cells, reading: Reading) -> list[Draft]:
        solution = cells.text("generated_solution")
        return [Draft(cells.text(prompt), solution, _answer(cells, "expected_answer", _boxed(solution)))]

    return convert


def metamath(cells: Cells, reading: Reading) -> list[Draft]:
    """Take `query` and `response`; the answer follows "The answer is:"."""
    response = cells.text("response")
    _, mark, answer = response.rpartition(_METAMATH_MARK)
    stated = answer.strip() if mark else ""
    return [Draft(cells.text("query"), response, cells.optional("answer") or stated or _boxed(response))]


def alpaca(cells: Cells, reading: Reading) -> list[Draft]:
    """Take `instruction`, with `input` after an empty line where there is any, and `output`."""
    instruction, given = cells.text("instruction"), cells.optional_text("input")
    prompt = instruction if given is None else f"{instruction}\n\n{given}"
    system = cells.optional_text("system")
    context: tuple[Turn, ...] = () if system is None else (("system", system),)
    return [Draft(prompt, cells.text("output"), cells.optional("answer"), context=context)]


def reasoned(prompt: str, reasoning: str, attempt: str, solution: str) -> Converter:
    """Return the converter of a trace in the column `reasoning` and the answer after it in `attempt`.

    A row without one of the two gives no draft. The reference answer is the last box in `solution`, else all of it
    where it is short enough to be a result; a worked solution without a box gives none.
    """

    def convert(cells: Cells, reading: Reading) -> list[Draft]:
        trace, answered = _single_text(cells, reasoning), _single_text(cells, attempt)
        if trace is None or answered is None:
            return []
        stated = cells.optional(solution)
        answer = _answer(cells, "answer", _boxed(stated) or _result(stated))
        text, apart = joined(cells, without_tags(trace), answered, f"column {cells.column(attempt)!r}")
        return [Draft(cells.text(prompt), text, answer, reasoning=apart)]

    return convert


def _single_text(cells: Cells, name: str) -> str | None:
    """Return the text of a column, or of the one entry of its list; None where it is null or blank."""
    value = cells.maybe(name)
    if isinstance(value, list):
        if len(value) > 1:
            raise cells.error(
                f"column {cells.column(name)!r} has {len(value)} texts where one is needed; keep one, or make a row "
                "of each"
            )
        value = value[0] if value else None
    return None if is_blank(value) else cells.as_text(value, f"column {cells.column(name)!r}")


def _boxed(solution: str | None) -> str | None:
    return (last_boxed(solution) or None) if solution is not None else None


def _result(solution: str | None) -> str | None:
    """Return `solution` where it is a result, that is one short line; else None."""
    found = (solution or "").strip()
    return found if found and len(found) <= _LONGEST_RESULT and len(found.splitlines()) == 1 else None


def _answer(cells: Cells, name: str, otherwise: str | None) -> str | None:
    """Return the answer in column `name`, else `otherwise`; None where the column says that there is none."""
    answer = cells.optional(name)
    if answer is None:
        return otherwise
    return None if answer.strip().lower() in _NO_ANSWER else answer


def openr1(cells: Cells, reading: Reading) -> list[Draft]:
    """Take the traces in `generations` that `reading.trace` selects; blank ones are skipped."""
    if cells.maybe("generations") is None:
        return []
    traces = cells.sequence("generations")
    usable = [i for i in range(len(traces)) if not is_blank(traces[i])]
    trace = reading.trace
    if isinstance(trace, int):
        chosen = [i for i in usable if i == trace]
    elif trace in ("first", "all") or not usable:
        chosen = usable
    else:
        chosen = [i for i in _correct_traces(cells, len(traces)) if i in usable]
    if trace in ("first", "first_correct"):
        chosen = chosen[:1]
    prompt, answer = cells.text("problem"), _answer(cells, "answer", None)
    drafts = []
    for i in chosen:
        text = cells.as_text(traces[i], f"trace {i} of {cells.column('generations')!r}")
        drafts.append(Draft(prompt, text, answer, trace=i))
    return drafts


def blank_traces(cells: Cells) -> list[int]:
    """Return the indices of the traces in `generations` that are null or blank."""
    traces = cells.maybe("generations")
    return [i for i, trace in enumerate(traces) if is_blank(trace)] if isinstance(traces, list) else []


def _correct_traces(cells: Cells, count: int) -> list[int]:
    """Return the indices of complete traces that math-verify found correct.

    Where it confirmed none of a row's traces, OpenR1's second verdict (`correctness_llama`) is read: it was made for
    the answers that math-verify cannot parse. A null verdict counts as not correct.
    """

    def flags(name: str) -> list[bool] | None:
        if cells.maybe(name) is None:
            return None
        found = cells.sequence(name)
        if len(found) != count:
            raise cells.error(
                f"column {cells.column(name)!r} has {len(found)} entries for {count} traces; mend the row"
            )
        odd = next((flag for flag in found if not is_null(flag) and truth(flag) is None), None)
        if odd is not None:
            raise cells.error(f"column {cells.column(name)!r} has the verdict {odd!r}; write true, false or null")
        return [bool(truth(flag)) for flag in found]

    verdicts = flags("correctness_math_verify")
    second = flags("correctness_llama")
    if verdicts is None and second is None and not any(cells.column(name) in cells.row for name in _VERDICTS):
        # This raises an error that names the column.
        cells.value("correctness_math_verify")
    if not any(verdicts or []):
        verdicts = second or []
    complete = flags("is_reasoning_complete") or [True] * count
    return [i for i, (right, whole) in enumerate(zip(verdicts or [], complete, strict=False)) if right and whole]
