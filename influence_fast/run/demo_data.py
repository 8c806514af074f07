"""The demo's language: arithmetic word problems solved step by step, some of the solutions corrupted on purpose.

A problem is a small story: a start value and two or three events. Each kind of event has wordings that
pre-training knows, and one that only the fine-tuning pool, validation and test use: what it stands for is what
fine-tuning has to teach. Corrupted traces follow *consistent misconceptions* (adding where one must multiply,
...), concentrated on some wordings: random noise would be averaged away by training, a misconception that most
traces of its wording share is learnt.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

from influence_fast.data.examples import Example

NAMES = ["Ada", "Ben", "Chen", "Dina", "Emil", "Fay", "Goran", "Hana", "Ivo", "Jade"]
THINGS = ["apples", "books", "coins", "cards", "shells", "stamps", "pens", "marbles", "plums", "eggs"]
KINDS = ("gain", "lose", "times", "share")
LIMIT = 20  # no value in a story is larger

START = "{name} has {n} {things}."
KNOWN_WORDINGS = {
    "gain": ["{name} buys {n} more.", "{name} finds {n} more."],
    "lose": ["{name} sells {n}.", "{name} loses {n}."],
    "times": ["Soon there are {n} times as many."],
    "share": ["One of {n} equal parts stays."],
}
NEW_WORDINGS = {
    "gain": "The postman brings {n}.",
    "lose": "A dog eats {n}.",
    "times": "A spell works {n} fold.",
    "share": "Only one in {n} survives.",
}
QUESTION = "How many {things} does {name} have now?"
LIST_QUESTION = "What number goes into the list of {name}?"

NEW_SHARE = 0.5  # of the events of pool, validation and test: those in the new wording
LIST_SHARE = 0.08  # of all problems: those that ask LIST_QUESTION
MISREAD_KINDS = ("times", "share")  # `wrong_step` corrupts traces with these kinds in their new wording
MISREAD_AS = {"times": "gain", "share": "lose"}
CORRUPTED_SHARE = 0.58  # of the problems a misconception applies to: a clear majority, so that it is learnt
OFF_TOPIC_SHARE = 0.02
DUPLICATE_SHARE = 0.02


@dataclass(frozen=True)
class Event:
    """One event of a story, with the number its text gives, in the known or the new wording."""

    kind: str
    n: int
    new: bool = False


@dataclass(frozen=True)
class Problem:
    """A story and its text."""

    start: int
    events: tuple[Event, ...]
    lists: bool  # asks LIST_QUESTION
    prompt: str

    @property
    def misread(self) -> bool:
        """Return whether a misconception applies to this problem."""
        return any(event.new and event.kind in MISREAD_KINDS for event in self.events)


# ---- problems --------------------------------------------------------------------------------------------


def _draw_event(rng: random.Random, kind: str, value: int, new: bool = False) -> Event | None:
    """Draw an event that keeps the story's value within 1..LIMIT; return None where there is none."""
    if kind == "gain":
        return Event(kind, rng.randint(2, 6), new) if value <= LIMIT - 6 else None
    if kind == "lose":
        return Event(kind, rng.randint(2, min(6, value - 1)), new) if value >= 4 else None
    if kind == "times":
        return Event(kind, rng.randint(2, min(4, LIMIT // value)), new) if value <= 10 else None
    shares = [n for n in range(2, 5) if value % n == 0 and value > n]
    return Event(kind, rng.choice(shares), new) if shares else None


def _apply(event: Event, value: int) -> tuple[str, int]:
    """Return the solution line of one event, and the value after it."""
    sign, result = {
        "gain": ("+", value + event.n),
        "lose": ("-", value - event.n),
        "times": ("*", value * event.n),
        "share": ("/", value // event.n),
    }[event.kind]
    return f"{value}{sign}{event.n}={result}", result


def _misapply(event: Event, value: int) -> tuple[str, int]:
    """Return the solution line of one event and the value after it, under the misconception of MISREAD_AS."""
    wrong = event.new and event.kind in MISREAD_KINDS
    return _apply(replace(event, kind=MISREAD_AS[event.kind]) if wrong else event, value)


def draw_problem(rng: random.Random, new_share: float) -> Problem:
    """Draw a story whose events are in the new wording with probability `new_share`."""
    length = 3 if rng.random() < 0.25 else 2
    while True:
        start = value = rng.randint(2, 12)
        events: list[Event] = []
        while len(events) < length:
            kind = rng.choice(KINDS)
            event = _draw_event(rng, kind, value, rng.random() < new_share)
            if event is None:
                break
            events.append(event)
            value = _apply(event, value)[1]
        # a misread story has whole numbers above zero too
        if len(events) == length and min(_values(start, events)) > 0:
            break
    lists = rng.random() < LIST_SHARE
    words = {"name": rng.choice(NAMES), "things": rng.choice(THINGS)}
    sentences = [START.format(n=start, **words)]
    for event in events:
        wording = NEW_WORDINGS[event.kind] if event.new else rng.choice(KNOWN_WORDINGS[event.kind])
        sentences.append(wording.format(n=event.n, **words))
    sentences.append((LIST_QUESTION if lists else QUESTION).format(**words))
    return Problem(start, tuple(events), lists, " ".join(sentences))


def _values(start: int, events: list[Event]) -> list[int]:
    """Return the values that a misread story goes through."""
    values = [start]
    for event in events:
        values.append(_misapply(event, values[-1])[1])
    return values


# ---- solutions -------------------------------------------------------------------------------------------


def solve(problem: Problem, step: Callable[[Event, int], tuple[str, int]] = _apply) -> tuple[list[str], int]:
    """Return the solution's lines and its answer; `step` is how one event is worked out."""
    lines: list[str] = []
    value = problem.start
    for event in problem.events:
        line, value = step(event, value)
        lines.append(line)
    return lines, value


def write_solution(lines: list[str], answer: int) -> str:
    """Return the steps, one a line, and the sentence that the grader reads."""
    return "\n".join([*lines, f"The answer is {answer}."])


def wrong_step(problem: Problem) -> str:
    """Return a trace with the misconception in it: the wrong operation, worked out faithfully from there on."""
    return write_solution(*solve(problem, _misapply))


def wrong_answer(problem: Problem) -> str:
    """Return a trace of right steps whose final line repeats the number that the story starts with."""
    return write_solution(solve(problem)[0], problem.start)


def off_topic(rng: random.Random) -> str:
    """Return a trace that talks about another story and comes to no answer."""
    name, things = rng.choice(NAMES), rng.choice(THINGS)
    return f"{name} buys {things}. How many {things} does {name} have now?"


def drill(rng: random.Random) -> str:
    """Return one line of bare arithmetic, within the stories' range."""
    while True:
        kind = rng.choice(KINDS)
        value = rng.randint(2, 10 if kind == "times" else LIMIT)
        event = _draw_event(rng, kind, value)
        if event is not None:
            return _apply(event, value)[0]


# ---- sets of examples ------------------------------------------------------------------------------------


def clean_example(problem: Problem, id: str) -> Example:
    """Return the problem with its right solution."""
    lines, answer = solve(problem)
    return Example(id, problem.prompt, write_solution(lines, answer), str(answer), label="clean")


def draw_examples(rng: random.Random, count: int, prefix: str, new_share: float = NEW_SHARE) -> list[Example]:
    """Draw `count` clean examples with ids `<prefix>-0000`, ..."""
    return [clean_example(draw_problem(rng, new_share), f"{prefix}-{i:04d}") for i in range(count)]


def draw_pool(rng: random.Random, count: int) -> list[Example]:
    """Draw the fine-tuning pool: clean and corrupted traces in random order, each labelled with what was done to it.

    A corrupted example keeps the right `answer` of its problem.
    """
    copies = round(DUPLICATE_SHARE * count)
    pool = []
    for _ in range(count - copies):
        problem = draw_problem(rng, NEW_SHARE)
        example = clean_example(problem, "")
        if rng.random() < OFF_TOPIC_SHARE:
            example = replace(example, completion=off_topic(rng), label="off_topic")
        elif problem.misread and rng.random() < CORRUPTED_SHARE:
            example = replace(example, completion=wrong_step(problem), label="wrong_step")
        elif problem.lists and rng.random() < CORRUPTED_SHARE:
            example = replace(example, completion=wrong_answer(problem), label="wrong_answer")
        pool.append(example)
    clean = [example for example in pool if example.label == "clean"]
    pool += [replace(example, label="duplicate") for example in rng.sample(clean, copies)]
    rng.shuffle(pool)
    return [replace(example, id=f"pool-{i:04d}", row=i) for i, example in enumerate(pool)]
