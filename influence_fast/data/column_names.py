"""Tell from the name of a column or field whether it holds a trace, a part of the prompt, or neither."""

from __future__ import annotations

import re

_PART = re.compile(r"[A-Z]+(?=[A-Z][a-z])|[A-Z]?[a-z]+|[A-Z]+|\d+")
# Written in one piece, or in an odd case, by known sets of data.
_SPELLINGS = {"cots": "cot", "chainofthought": "chain of thought", "chainofthoughts": "chain of thought"}


def _set(text: str) -> frozenset[str]:
    return frozenset(text.split())


_TRACE_WORDS = _set(
    "thinking think thought thoughts reasoning cot rationale rationales trajectory trajectories trace traces chosen "
    "generation generations response responses attempt attempts completion completions output outputs scratchpad "
    "explanation explanations conversation conversations dialogue dialog messages steps analysis reflection solutions "
    "candidates proof"
)
_MODELS = _set("deepseek r gemini qwen gpt claude llama o mistral teacher student")
_MAKERS = _MODELS | _set("full detailed generated model predicted distilled long cot")
_RESULTS = _set("solution solutions answer answers text texts content details")
_PROCESS = _set(
    "thinking think thought thoughts reasoning cot rationale rationales trajectory trajectories trace traces scratchpad"
)
# A name that ends so speaks of something beside the text.
_METADATA = _set(
    "id ids uuid type types model models name names source sources language lang score scores grade grades reason "
    "length len count counts tokens token num number date time timestamp url hash index idx role state status version "
    "format category domain difficulty level rate mode dataset split label labels license key header ip country"
)
_PROMPT_NAMES = ("system", "system prompt", "tools", "history", "context", "input")


def words(name: str) -> list[str]:
    """Return the words of a name in lower case, numbers left out.

    Example:
        >>> words("deepseekReasoning"), words("r1_solution_1"), words("Complex_CoT")
        (['deepseek', 'reasoning'], ['r', 'solution'], ['complex', 'cot'])
    """
    found = " ".join(part.lower() for part in _PART.findall(name.replace("CoT", "Cot")) if not part.isdigit())
    for odd, plain in _SPELLINGS.items():
        found = re.sub(rf"\b{odd}\b", plain, found)
    return found.split()


def is_trace_name(name: str) -> bool:
    """Return whether a column of this name holds a trace or a solution: `r1_cot_1`, not `cot_type`."""
    found = words(name)
    # Names such as messages_r1 and traces_r1 end with a model.
    while len(found) > 1 and found[-1] in _MODELS:
        found = found[:-1]
    if not found:
        return False
    last = found[-1]
    if last in _TRACE_WORDS or found == ["step", "by", "step"]:
        return True
    # A predicted answer is a result of a few characters in every known dataset.
    if found[-2:] == ["predicted", "answer"]:
        return False
    if last in _RESULTS or last in ("process", "chain"):
        return bool(_PROCESS.intersection(found[:-1]) or _MAKERS.intersection(found[:-1]))
    return False


def is_reasoning_name(name: str) -> bool:
    """Return whether a column of this name holds what comes before an answer: `Complex_CoT`, `thinking`."""
    return is_trace_name(name) and bool(_PROCESS.intersection(words(name)))


def is_prompt_name(name: str) -> bool:
    """Return whether a column of this name belongs to the prompt: `system_prompt`, `tools`."""
    return " ".join(words(name)) in _PROMPT_NAMES


def is_metadata_name(name: str) -> bool:
    """Return whether a name speaks of something beside the text: `cot_type`, `trace_id`, `language`."""
    found = words(name)
    return not found or found[-1] in _METADATA
