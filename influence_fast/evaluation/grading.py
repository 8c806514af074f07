"""Finds the answer in a model's text and compares it with the reference.

Equal strings and plain numbers are decided at once. Everything else goes to `math-verify`, in a worker process:
sympy can hang in C code or eat all memory, which no exception stops, and math-verify's own limits need the main
thread. A worker that overruns is killed and replaced.
"""

from __future__ import annotations

import atexit
import json
import os
import queue
import re
import subprocess
import sys
import threading
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from influence_fast.data.boxed import last_boxed
from influence_fast.errors import ConfigError

ANSWER_KINDS = ("math", "last_number", "choice")
MAX_ANSWER = 2000  # characters; a longer "answer" is no answer, and only costs time to parse
WORKER_MEMORY = 4 << 30  # bytes of address space: 9^9^9^9 must fail in the worker, not take the machine
START_LIMIT = 120.0  # seconds for the worker to import sympy, on a busy machine


@dataclass(frozen=True, slots=True)
class Grade:
    """`extracted` is the answer as found in the text (None: there is none); `note` says how it was decided."""

    correct: bool
    extracted: str | None
    note: str


def grade(text: str, gold: str, *, timeout: float = 5.0, kind: str = "math") -> Grade:
    """Whether `text` comes to the answer `gold`. Never raises on hostile text, never takes much over `timeout`.

    `kind`: `math`; `last_number`, which takes the last number of a text that states no answer in a known form; or
    `choice`, where `gold` is the letter of an option. Raises ValueError for another kind, ConfigError where the worker
    process does not start. Thread-safe.
    """
    if kind not in ANSWER_KINDS:
        raise ValueError(f"unknown kind of answer {kind!r}; known: {', '.join(ANSWER_KINDS)}")
    extracted = extract_choice(text) if kind == "choice" else extract_answer(text, last_number=kind == "last_number")
    if extracted is None:
        return Grade(False, None, "no answer found")
    if kind == "choice":
        return Grade(extracted == choice_letter(gold), extracted, "compared as letters")
    if len(extracted) > MAX_ANSWER:
        return Grade(False, extracted[:MAX_ANSWER], f"answer longer than {MAX_ANSWER} characters")
    correct, note = equal_answers(extracted, gold, timeout=timeout)
    return Grade(correct, extracted, note)


def equal_answers(answer: str, gold: str, *, timeout: float = 5.0) -> tuple[bool, str]:
    """Compares two bare answers: (equal, how it was decided)."""
    if normalise(answer) == normalise(gold):
        return True, "same text"
    first, second = _plain_number(answer), _plain_number(gold)
    if first is not None and second is not None:
        return first == second, "compared as numbers"
    return _WORKER.verify(answer, gold, timeout)


# --- extraction -------------------------------------------------------------------------------------------------

_STATED = re.compile(
    r"\b(?:final\s+answer|answer)\s*(?:is|are|equals|=|:)\s*(?:equal\s+to\s*|:\s*)?([^\n]{1,400})", re.IGNORECASE
)
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:/\d+)?")


def extract_answer(text: str, *, last_number: bool = False) -> str | None:
    r"""The last `\boxed{...}`, else the last `#### ...`, else the last "The answer is ...", else None.

    With `last_number`, a text with none of these yields its last number.
    """
    for find in (last_boxed, _last_hashes, _last_stated):
        found = find(text)
        if found:
            return found
    if last_number:
        numbers = _NUMBER.findall(text[-MAX_ANSWER:])
        if numbers:
            return numbers[-1].rstrip(",")
    return None


# A letter that names an option. A and I are words too: as such they are followed by a word of a sentence.
_LETTER = r"(?:[B-HJ]|[AI](?!\s+(?!(?:because|since|as|and|with|for)\b)[a-z]))(?![\w'])"
_MARKS = r"[ \t*$`_]{0,8}"  # markup that may stand around a letter; bounded, as every repeat here: no quadratic search
_STATED_CHOICE = re.compile(
    r"\b(?i:answer|choice|option)\b(?:\s{1,4}(?i:is|are|choice|option)\b){0,3}\s{0,4}[:=]?"
    rf"\s{{0,4}}{_MARKS}(?i:(?:option|choice)\s{{1,4}})?(?:\\(?:text|mathrm|textbf|mathbf)\{{)?{_MARKS}"
    rf"(?:\(\s?([A-Ja-j])\s?\)|({_LETTER}))"
)
_LONE_CHOICE = re.compile(rf"^{_MARKS}(?:\(([A-Ja-j])\)|([A-J])[.):]?){_MARKS}$", re.MULTILINE)
_BRACKETED_CHOICE = re.compile(r"\(([A-J])\)")
_LEADING_LETTER = re.compile(r"\(?\s*([A-Ja-j])\s*(?:$|[).:,\s])")


def extract_choice(text: str) -> str | None:
    r"""The option that a text comes to, as a capital letter from A to J; None where it names none.

    The last `\boxed{C}` (also `\boxed{\text{(C)}}`), else the last "the answer is C", "Answer: (C)" or "option C",
    else the last line that is a letter and nothing more, else the last "(C)".
    """
    boxed = last_boxed(text)
    if boxed:
        found = _LEADING_LETTER.match(_TEXT.sub(r"\1", boxed[:MAX_ANSWER]).strip(" $*"))
        if found:
            return found.group(1).upper()
    tail = text[-20 * MAX_ANSWER :]
    for pattern in (_STATED_CHOICE, _LONE_CHOICE, _BRACKETED_CHOICE):
        matches = list(pattern.finditer(tail))
        if matches:
            return str(next(group for group in matches[-1].groups() if group)).upper()
    return None


def choice_letter(gold: str) -> str | None:
    """The letter of a reference such as `C`, `(c)` or `C.`; None where it is no option's letter."""
    found = re.fullmatch(r"\(?([A-Ja-j])[).]?", gold.strip())
    return found.group(1).upper() if found else None


def _last_hashes(text: str) -> str | None:
    at = text.rfind("####")
    if at < 0:
        return None
    line = text[at + 4 : at + 4 + 2 * MAX_ANSWER].strip().partition("\n")[0]
    return _tidy(line)


def _last_stated(text: str) -> str | None:
    found = _STATED.findall(text, max(0, len(text) - 20 * MAX_ANSWER))
    return _tidy(found[-1]) if found else None


def _tidy(line: str) -> str | None:
    """Cuts a line after its first sentence and takes off markup: `**$3.50$**. So we...` gives `3.50`."""
    line = line.strip().strip("*").strip()
    mathematics = re.match(r"(\$\$?|\\\(|\\\[)(.+?)(\$\$?|\\\)|\\\])", line)
    if mathematics:
        return mathematics.group(2).strip()
    line = re.split(r"[.!?;](?=\s|$|\*)", line, maxsplit=1)[0]
    return line.strip().strip("*`\"'").strip() or None


# --- the quick path ---------------------------------------------------------------------------------------------

_SPACES = re.compile(r"\s+|\\[,;:! ]|~|\\quad|\\qquad")
_TEXT = re.compile(r"\\(?:text|mathrm|textbf|mathbf|textit|mbox)\s*\{([^{}]*)\}")
_SHORT_FRACTION = re.compile(r"\\frac\s*(\d)\s*(\d)(?!\d)")
_PLAIN = re.compile(r"([+-]?)(\d{1,40})(?:\.(\d{1,40}))?(?:/([1-9]\d{0,39}))?")
_LATEX_FRACTION = re.compile(r"([+-]?)\\frac\{([+-]?\d{1,40})\}\{(\d{1,40})\}")


def normalise(answer: str) -> str:
    """The answer without what changes its look and not its sense: spaces, `$`, `\\left`, `\\text`, `\\dfrac`."""
    if len(answer) > MAX_ANSWER:
        return answer
    answer = answer.strip().removesuffix(".")
    for old, new in (("\\dfrac", "\\frac"), ("\\tfrac", "\\frac"), ("\\left", ""), ("\\right", ""), ("$", "")):
        answer = answer.replace(old, new)
    answer = _TEXT.sub(r"\1", answer)
    answer = _SHORT_FRACTION.sub(r"\\frac{\1}{\2}", answer)
    return _SPACES.sub("", answer)


def _plain_number(answer: str) -> Fraction | None:
    """An integer, decimal, `a/b` or `\\frac{a}{b}` as an exact number; None for anything else."""
    answer = normalise(answer)
    if re.fullmatch(r"[+-]?\d{1,3}(,\d{3})+(\.\d+)?", answer):
        answer = answer.replace(",", "")
    match = _LATEX_FRACTION.fullmatch(answer)
    if match:
        sign, top, bottom = match.groups()
        if int(bottom) == 0:
            return None
        return Fraction(int(top), int(bottom)) * (-1 if sign == "-" else 1)
    match = _PLAIN.fullmatch(answer)
    if match is None:
        return None
    sign, whole, decimals, bottom = match.groups()
    if decimals and bottom:
        return None
    value = Fraction(f"{whole}.{decimals}") if decimals else Fraction(int(whole), int(bottom or 1))
    return -value if sign == "-" else value


# --- math-verify in a process of its own ------------------------------------------------------------------------


class _Worker:
    """Owns one worker process: one JSON line in, one out. Started on first use, restarted after a kill."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._owner = 0

    def verify(self, answer: str, gold: str, timeout: float) -> tuple[bool, str]:
        """math-verify's verdict and a note; (False, "timed out ...") when it takes longer than `timeout` seconds."""
        with self._lock:
            for _ in range(2):  # a worker may have died since its last item: once more with a new one
                process = self._started()
                request = {"answer": answer, "gold": gold, "timeout": timeout}
                try:
                    assert process.stdin is not None
                    process.stdin.write(json.dumps(request) + "\n")
                    process.stdin.flush()
                    line = self._lines.get(timeout=timeout + 1.0)
                except queue.Empty:
                    self.stop()
                    return False, f"timed out after {timeout:g} s"
                except (BrokenPipeError, OSError):
                    line = None
                if line is not None:
                    reply = json.loads(line)
                    return bool(reply["correct"]), str(reply["note"])
                self.stop()
            return False, "the grading worker died on this answer"

    def _started(self) -> subprocess.Popen[str]:
        if self._process is not None and self._process.poll() is None and self._owner == os.getpid():
            return self._process
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        self._owner = os.getpid()
        self._lines = queue.Queue()
        threading.Thread(target=_pump, args=(self._process, self._lines), daemon=True).start()
        try:
            ready = self._lines.get(timeout=START_LIMIT)
        except queue.Empty:
            ready = None
        if ready is None:
            self.stop()
            raise ConfigError(f"the grading worker did not start: run `{sys.executable} -m {__name__}` to see why")
        return self._process

    def stop(self) -> None:
        """Kills the worker; the next item starts a new one."""
        if self._process is not None and self._owner == os.getpid():
            self._process.kill()
            self._process.wait()
        self._process = None


def _pump(process: subprocess.Popen[str], lines: queue.Queue[str | None]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        lines.put(line)
    lines.put(None)  # the worker is gone


_WORKER = _Worker()
atexit.register(_WORKER.stop)


class _OutOfTime(BaseException):
    """Not an Exception: math-verify and sympy catch those."""


def _serve() -> None:
    """The worker's loop. An alarm ends most overruns here, cheaper than a kill and a new import of sympy."""
    import logging
    import signal

    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (WORKER_MEMORY, WORKER_MEMORY))
    except (ImportError, ValueError, OSError):
        pass  # no such limit on this system; the time limit still holds
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not be read as a reply
    logging.disable(logging.CRITICAL)
    import math_verify

    def verdict(answer: str, gold: str) -> bool:
        def parse(text: str) -> list[Any]:
            return math_verify.parse(f"${text}$", parsing_timeout=None) or math_verify.parse(text, parsing_timeout=None)

        return bool(math_verify.verify(parse(gold), parse(answer), timeout_seconds=None))

    def alarm(signum: int, frame: object) -> None:
        raise _OutOfTime

    signal.signal(signal.SIGALRM, alarm)
    verdict("\\frac{1}{2}", "0.5")  # warm the parser before the clock runs
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        correct, note = False, "compared by math-verify"
        try:
            signal.setitimer(signal.ITIMER_REAL, request["timeout"])
            correct = verdict(request["answer"], request["gold"])
        except _OutOfTime:
            note = f"timed out after {request['timeout']:g} s"
        except (Exception, RecursionError, MemoryError) as error:
            note = f"math-verify failed: {type(error).__name__}"
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps({"correct": correct, "note": note}), file=replies, flush=True)


if __name__ == "__main__":
    _serve()
