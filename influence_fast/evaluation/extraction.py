r"""Find the answer that a model's text states: in a box, behind `####`, "The answer is", a heading, or as an option.

No search costs more than a constant a character: repeats in patterns are bounded, and only the end of a text is read.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from influence_fast.data.boxed import last_boxed, last_boxes
from influence_fast.evaluation.answer_text import MAX_ANSWER, normalise

TAIL = 20 * MAX_ANSWER  # characters at the end of a text in which a stated answer is looked for

_STATED = re.compile(
    r"\b(?:final[ \t]{1,4}answer|answer)\b(?![ \t]{0,4}(?:choice|option)s?\b)[ \t*_`]{0,8}"
    r"(?:(?:to|for)[ \t]{1,4}(?:the|this|your)[ \t]{1,4}(?:question|problem)[ \t]{0,4})?"
    r"(?:(?:is|are|equals|(?:should|would|must|will)[ \t]{1,4}be|=|:)(?![a-z])[ \t*_`]{0,8}){1,3}"
    r"(?:equal[ \t]{1,4}to[ \t]{0,4}|:[ \t]{0,4})?([^\n]{0,400})",
    re.IGNORECASE,
)
# A heading alone on its line: **Final Answer**, ### Answer:, Answer:
_HEADING = re.compile(
    r"^[ \t>]{0,4}(?:#{1,6}[ \t]{0,4})?[*_`]{0,4}(?:the[ \t]{1,4})?(?:final[ \t]{1,4})?answer"
    r"(?:[ \t]{1,4}is)?[ \t]{0,4}[:*_`]{0,6}[ \t]{0,4}$",
    re.IGNORECASE | re.MULTILINE,
)
_INLINE_HEADING = re.compile(
    r"^[ \t]{0,4}#{1,6}[ \t]{0,4}(?:the[ \t])?(?:final[ \t])?answer\b[ \t:*-]{0,6}", re.IGNORECASE
)
_HASHES = re.compile(r"(?:^[ \t>]{0,4}|(?<=\s))####(?!#) ?([^\n]{0,4000})", re.MULTILINE)
_TAGGED = re.compile(r"<answer>([^<]{1,2000})</answer>", re.IGNORECASE)
_LETTERED = re.compile(r"^A:[ \t]{0,4}([^\n]{1,400})", re.MULTILINE)
_OPTION_B = re.compile(r"^B:", re.MULTILINE)
_RESULT = re.compile(r"[-+~≈$€£\\({\[.*`]{0,6}\d|[$\\]|\*\*|(?:yes|no|true|false)\b", re.IGNORECASE)
_DISPLAY = re.compile(r"\s{0,20}(?:\$\$.{1,2000}?\$\$|\\\[.{1,2000}?\\\])", re.DOTALL)
_STEP = re.compile(r"\d{1,3}[.):][ \t]{1,4}\S|step\b", re.IGNORECASE)
# A sign that touches a digit before it is the dash of a range; `1.5e3` is one number.
_NUMBER = re.compile(r"(?:(?<![\d.])-)?(?:\d[\d,]{0,400}(?:\.\d{1,400})?(?:[eE][+-]?\d{1,4}|/\d{1,400})?|\.\d{1,400})")


def extract_answer(text: str, *, last_number: bool = False) -> str | None:
    r"""Return the answer that a text states, None where it states none.

    It is the last `\boxed{...}` (several, where "and" or a comma joins them: `\boxed{3} and \boxed{7}` is `3, 7`), else
    the last `<answer>...</answer>`, else the last `#### ...`, else the last of "The answer is ...", `**Final Answer**`
    or `### Answer` before a line, and `A: ...`. With `last_number`, a text with none of these yields its last number.

    Example:
        >>> extract_answer("**Final Answer**\n\n73")
        '73'
    """
    text = _behind_thoughts(text)
    for find in (_boxes, _tagged, _last_hashes, _last_stated, _last_lettered):
        found = find(text)
        if found:
            return found
    if last_number:
        numbers = _NUMBER.findall(text[-MAX_ANSWER:])
        if numbers:
            return str(numbers[-1]).rstrip(",")
    return None


def _behind_thoughts(text: str) -> str:
    """Return what follows the last closed block of thoughts, where anything does: a thought is no answer yet."""
    said = text.rpartition("</think>")[2]
    return said if said.strip() else text


def _boxes(text: str) -> str | None:
    boxes = list(dict.fromkeys(last_boxes(text)))
    if len({normalise(box) for box in boxes}) < 2:
        return boxes[-1] if boxes else None
    return ", ".join(boxes)


def _tagged(text: str) -> str | None:
    """Return the last `<answer>12</answer>`, which models trained by reinforcement learning write."""
    found = _TAGGED.findall(text[-TAIL:])
    return _tidy(found[-1]) if found else None


def _last_hashes(text: str) -> str | None:
    """Return the last result after `####`; before other words it is a heading, unless the text ends with it."""
    tail = text[-TAIL:]
    if "####" not in tail:
        return None
    end = len(tail.rstrip())
    for match in reversed(list(_HASHES.finditer(tail))):
        line = next((group for group in match.groups() if group is not None), "").strip()
        if _INLINE_HEADING.match(match.group()):
            continue
        if not line:
            continue
        last = match.end() >= end
        if last or (_RESULT.match(line) and not _STEP.match(line)):
            return _tidy(line)
    return None


def _last_stated(text: str) -> str | None:
    """Return the last of the stated answers and the lines below a heading."""
    tail = text[-TAIL:]
    best: tuple[int, str | None] = (-1, None)
    for match in _STATED.finditer(tail):
        stated = match.group(1)
        if not stated.strip(" \t*_`"):  # "the answer is:" above displayed mathematics
            stated = _displayed(tail[match.end() : match.end() + 2 * MAX_ANSWER]) or ""
        found = _tidy(stated)
        if found:
            best = (match.start(), found)
    for match in _HEADING.finditer(tail):
        following = tail[match.end() : match.end() + 2 * MAX_ANSWER].strip().partition("\n")
        line = following[0]
        if line in ("$$", r"\[", r"\("):
            line = following[2].strip().partition("\n")[0]
        found = _tidy(re.sub(r"^[-*>] ", "", line)) if line else None
        if found and match.start() > best[0] and not _STATED.match(line):
            best = (match.start(), found)
    return best[1]


def _displayed(text: str) -> str | None:
    r"""Return the `\[...\]` or `$$...$$` that a text begins with, on one line; None where it begins otherwise."""
    found = _DISPLAY.match(text)
    return found and " ".join(found.group().split())


def _last_lettered(text: str) -> str | None:
    """Return the last `A: 18`, as question-and-answer data has it, unless the text lists options A, B, C."""
    tail = text[-TAIL:]
    matches = list(_LETTERED.finditer(tail))
    if not matches or _OPTION_B.search(tail):
        return None
    return _tidy(matches[-1].group(1))


_MATHEMATICS = re.compile(r"(\$\$?|\\\(|\\\[)(.{1,2000}?)(\$\$?|\\\)|\\\])", re.DOTALL)
_HEDGED = re.compile(
    r"(?:(?:approximately|approx\.?|about|around|roughly|nearly|exactly|simply|therefore|thus|equal to|is)(?![a-zA-Z])"
    r"[ \t:,]{0,4}|[:=][ \t]{0,4}|\\approx(?![a-zA-Z])[ \t]{0,4})",
    re.IGNORECASE,
)


_SENTENCE_END = re.compile(r"[.!?;](?=\s|$|\*)|,\s(?=(?:not|because|since|which|so|as|where)\b)")


def _tidy(line: str) -> str | None:
    """Cut a line after its first sentence and remove markup: `**$3.50$**. So we...` gives `3.50`."""
    line = _unmarked(line)
    for _ in range(4):
        hedged = _HEDGED.match(line)
        if hedged is None:
            break
        line = _unmarked(line[hedged.end() :])
    mathematics = _MATHEMATICS.match(line)
    if mathematics and not re.match(r"\$-?[\d.,]+[^$]*\b(?:and|or)\b[^$]*\$\d", line):
        behind = line[mathematics.end() :]
        if not re.match(r"[ \t]{0,2}(?:and|or|,|;)[ \t]{0,2}(?:\$|\\\()", behind):
            unit = re.match(
                r"[ \t]{0,2}((?:\\%|%|°|[A-Za-z][A-Za-z/^0-9]{0,30})(?: [a-z]{1,20}){0,3})[ \t]{0,2}[.*]{0,3}$", behind
            )
            return (mathematics.group(2).strip() + (f" {unit.group(1)}" if unit else "")) or None
    line = _SENTENCE_END.split(_abbreviated(line), maxsplit=1)[0].replace("\x00", ".")
    return _unmarked(line).strip("\"'").strip() or None


def _abbreviated(line: str) -> str:
    """Keep the full stops of `p.m.` from ending a sentence, and `5!` from losing its sign."""
    line = re.sub(r"\b([ap])\.[ ]?m\.", "\\1\x00m\x00", line)
    return re.sub(r"\b(approx|sq|cu)\.", "\\1\x00", line)


def _unmarked(line: str) -> str:
    line = line.strip()
    while line[:2] in ("**", "__") or line[:1] in ("*", "`", "_"):
        line = line[1:].lstrip()
    if line[-1:] in ("*", "`", "_"):
        line = line.rstrip("*`_").rstrip()
    return line


# --- options ----------------------------------------------------------------------------------------------------

# A letter that names an option. A and I are words too: as such they are followed by a word of a sentence.
_LETTER = r"(?:[B-HJ]|[AI](?!\s+(?!(?:because|since|as|and|with|for)\b)[a-z]))(?![\w'])(?!\s{0,4}[=<>+^])"
# Markup around a letter; bounded as every repeat here, so that no search is quadratic.
_MARKS = r"[ \t*$`_]{0,8}"
_STATED_CHOICE = re.compile(
    r"\b(?i:answer|choice|option)\b(?:\s{1,4}(?i:is|are|choice|option)\b){0,3}\s{0,4}"
    rf"{_MARKS}[:=]?\s{{0,4}}{_MARKS}(?i:(?:option|choice)\s{{1,4}})?(?:\\boxed\{{)?"
    rf"(?:\\(?:text|mathrm|textbf|mathbf)\{{)?{_MARKS}(?:\(\s?([A-Ja-j])\s?\)|({_LETTER}))"
)
_LONE_CHOICE = re.compile(rf"^{_MARKS}(?:\(([A-Ja-j])\)|([A-J])[.):]?){_MARKS}$", re.MULTILINE)
_BRACKETED_CHOICE = re.compile(r"\(([A-J])\)")
_TEXT = re.compile(r"\\(?:text|mathrm|textbf|mathbf|textit|mbox|rm)\s*\{([^{}]*)\}")
_BOXED_CHOICE = re.compile(
    r"(?:(?i:option|choice|answer)\s{1,4}:?\s{0,4})?(?:"
    r"\(\s?([A-Ja-j])\s?\)[.:]?(?:\s.*|[^\w\s=].*|)"  # (C) and whatever follows
    r"|([A-Ja-j])[.):]?"  # the letter alone
    r"|([A-J])[.):]\s?[^\s=].*"  # C. 3 eV
    rf"|({_LETTER})(?:\s|\\q?quad|~)+(?![=<>+*/^\\-]|\\cdot).*"  # C 3 eV
    r")",
    re.DOTALL,
)


def extract_choice(text: str) -> str | None:
    r"""Return the option that a text decides for, as a capital letter from A to J; None where it names none.

    It is the last `\boxed{C}` (also `\boxed{\text{(C)}}`), else the last "the answer is C", "Answer: (C)" or "option
    C", else the last line that is a letter and nothing more, else the last "(C)". A box with something else in it, as
    `\boxed{a = 5}`, names no option.
    """
    text = _behind_thoughts(text)
    boxed = last_boxed(text)
    if boxed and len(boxed) <= MAX_ANSWER:
        found = _BOXED_CHOICE.fullmatch(_TEXT.sub(r"\1", boxed).strip(" $*"))
        if found:
            return str(next(group for group in found.groups() if group)).upper()
    stated = stated_choice(text)
    if stated is not None:
        return stated
    tail = text[-TAIL:]
    for pattern in (_LONE_CHOICE, _BRACKETED_CHOICE):
        letter = _last_letter(pattern.finditer, tail)
        if letter is not None:
            return letter
    return None


def stated_choice(text: str) -> str | None:
    """Return the letter of the last "the answer is C" or "option C"; None where a text has none."""
    return _last_letter(_STATED_CHOICE.finditer, _behind_thoughts(text)[-TAIL:])


def _last_letter(search: Callable[[str], object], text: str) -> str | None:
    last = None
    for match in search(text):  # type: ignore[attr-defined]
        last = match
    return None if last is None else str(next(group for group in last.groups() if group)).upper()


def choice_letter(gold: str) -> str | None:
    """Return the letter of a reference such as `C`, `(c)` or `C.`; None where it is no option's letter."""
    found = re.fullmatch(r"\(?([A-Ja-j])[).]?", gold.strip())
    return found.group(1).upper() if found else None
