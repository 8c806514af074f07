"""The demo's language: arithmetic word problems with numbered solutions, some of them corrupted on purpose.

A problem is a small story: a start value and one or two events. Pre-training texts know two kinds of events,
`gain` and `lose`; the fine-tuning pool, validation and test add `times`, `share` and `crates`, which is what
fine-tuning has to teach. Corrupted traces follow *consistent misconceptions* (adding where one must multiply,
...), concentrated on some kinds of problems: random noise would be averaged away by training, a misconception
that most traces of its kind share is learnt.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

from influence_fast.data import Example

NAMES = ["Ada", "Ben", "Chen", "Dina", "Emil", "Fay", "Goran", "Hana", "Ivo", "Jade"]
THINGS = ["apples", "books", "coins", "cards", "shells", "stamps", "pens", "marbles", "plums", "eggs"]
KNOWN_KINDS = ("gain", "lose")
NEW_KINDS = ("times", "share", "crates")
MISREAD_KINDS = ("times", "share")  # the kinds whose traces are corrupted by `wrong_step`
LIMIT = 40  # no value in a story is larger

NEW_SHARE = 0.66  # of pool, validation and test problems: those with a new kind of event
INVENTORY_SHARE = 0.12  # of all problems: those that ask the inventory question
CORRUPTED_SHARE = 0.62  # of the problems a misconception applies to: a clear majority, so that it is learnt
OFF_TOPIC_SHARE = 0.04
DUPLICATE_SHARE = 0.03

PHRASES: dict[str, list[str]] = {
    "start": ["{name} has {n} {things}.", "{name} starts with {n} {things}."],
    "gain": ["{name} buys {n} more.", "{name} finds {n} more.", "A friend gives {name} {n} more."],
    "lose": ["{name} sells {n}.", "{name} loses {n}.", "{name} gives away {n}."],
    "times": ["A wizard makes it {n} times as many.", "Soon {name} has {n} times as many."],
    "share": ["{name} splits them into {n} equal shares and keeps one.", "Only one of {n} equal parts is left."],
    "crates": ["{name} gets {n} crates of {m} each.", "Then come {n} crates with {m} in each."],
}
PLAIN_QUESTION = "How many {things} does {name} have now?"
INVENTORY_QUESTION = "What number goes into the list of {name}?"


@dataclass(frozen=True)
class Event:
    """One event of a story: `n` (and `m`, the content of a crate) as the text gives them."""

    kind: str
    n: int
    m: int = 0


@dataclass(frozen=True)
class Problem:
    """A story, before it is written out."""

    start: int
    events: tuple[Event, ...]
    inventory: bool  # which of the two questions is asked
    prompt: str

    @property
    def kinds(self) -> set[str]:
        return {event.kind for event in self.events}


def _draw_event(rng: random.Random, kind: str, value: int) -> Event | None:
    """An event that keeps the story's value within 1..LIMIT, or None where there is none."""
    if kind == "gain":
        return Event(kind, rng.randint(2, 9)) if value <= LIMIT - 9 else None
    if kind == "lose":
        return Event(kind, rng.randint(2, min(9, value - 1))) if value >= 3 else None
    if kind == "times":
        return Event(kind, rng.randint(2, 4)) if value <= 10 else None
    if kind == "share":
        shares = [n for n in range(2, 5) if value % n == 0 and value > n]
        return Event(kind, rng.choice(shares)) if shares else None
    n, m = rng.randint(2, 4), rng.randint(2, 5)
    return Event(kind, n, m) if value + n * m <= LIMIT else None


def _apply(event: Event, value: int) -> tuple[list[str], int]:
    """The solution lines of one event, and the value after it."""
    if event.kind == "crates":
        total = event.n * event.m
        return [f"{event.n}*{event.m}={total}", f"{value}+{total}={value + total}"], value + total
    sign, result = {
        "gain": ("+", value + event.n),
        "lose": ("-", value - event.n),
        "times": ("*", value * event.n),
        "share": ("/", value // event.n),
    }[event.kind]
    return [f"{value}{sign}{event.n}={result}"], result


def _misapply(event: Event, value: int) -> tuple[list[str], int]:
    """The same under the misconception: times adds, share subtracts, crates count as many as they are."""
    if event.kind == "crates":
        total = event.n + event.m
        return [f"{event.n}+{event.m}={total}", f"{value}+{total}={value + total}"], value + total
    swapped = {"times": "gain", "share": "lose"}.get(event.kind)
    return _apply(event if swapped is None else replace(event, kind=swapped), value)


def draw_problem(rng: random.Random, kinds: list[str], inventory: bool = False) -> Problem:
    """A problem with these kinds of events, in this order."""
    while True:
        start = rng.randint(2, 10 if kinds[0] == "times" else 20)
        value, events = start, []
        for kind in kinds:
            event = _draw_event(rng, kind, value)
            if event is None:
                break
            events.append(event)
            value = _apply(event, value)[1]
        if len(events) == len(kinds):
            break
    name, things = rng.choice(NAMES), rng.choice(THINGS)
    question = INVENTORY_QUESTION if inventory else PLAIN_QUESTION
    sentences = [rng.choice(PHRASES["start"]).format(name=name, things=things, n=start)]
    sentences += [rng.choice(PHRASES[e.kind]).format(name=name, things=things, n=e.n, m=e.m) for e in events]
    sentences.append(question.format(name=name, things=things))
    return Problem(start, tuple(events), inventory, " ".join(sentences))


def solve(problem: Problem, step: Callable[[Event, int], tuple[list[str], int]] = _apply) -> tuple[list[str], int]:
    """The solution's lines and its answer; `step` is how one event is worked out."""
    lines: list[str] = []
    value = problem.start
    for event in problem.events:
        new_lines, value = step(event, value)
        lines += new_lines
    return lines, value


def write_solution(lines: list[str], answer: int) -> str:
    """The steps, one a line, and the sentence that the grader reads."""
    return "\n".join([*lines, f"The answer is {answer}."])


def wrong_step(problem: Problem) -> str:
    """A trace with the misconception in it: each line is true arithmetic, the operation is the wrong one."""
    return write_solution(*solve(problem, _misapply))


def wrong_answer(problem: Problem) -> str:
    """Right steps, but the final line repeats the number that the story starts with."""
    return write_solution(solve(problem)[0], problem.start)


def off_topic(rng: random.Random) -> str:
    """A trace that talks about another story and comes to no answer."""
    name, things = rng.choice(NAMES), rng.choice(THINGS)
    return f"{name} has no {things}. {name} loses them now. How many {things} does {name} have now?"


def clean_example(problem: Problem, id: str) -> Example:
    """The problem with its right solution."""
    lines, answer = solve(problem)
    return Example(id, problem.prompt, write_solution(lines, answer), str(answer), label="clean")


def draw_story(rng: random.Random, new_share: float) -> Problem:
    """Two events; with probability `new_share` one of them is of a kind that pre-training never told of."""
    kinds = [rng.choice(KNOWN_KINDS) for _ in range(2)]
    if rng.random() < new_share:
        kinds[rng.randrange(2)] = rng.choice(NEW_KINDS)
    return draw_problem(rng, kinds, inventory=rng.random() < INVENTORY_SHARE)


def drill(rng: random.Random) -> str:
    """One line of bare arithmetic, within the stories' range."""
    kind = rng.choices(["gain", "lose", "times", "share"], [3, 3, 2, 2])[0]
    while True:
        value = rng.randint(2, 10 if kind == "times" else LIMIT)
        event = _draw_event(rng, kind, value)
        if event is not None:
            return _apply(event, value)[0][0]


def draw_examples(rng: random.Random, count: int, prefix: str, new_share: float = NEW_SHARE) -> list[Example]:
    """`count` clean examples with ids `<prefix>-0000`, ..."""
    return [clean_example(draw_story(rng, new_share), f"{prefix}-{i:04d}") for i in range(count)]


def draw_pool(rng: random.Random, count: int) -> list[Example]:
    """The fine-tuning pool: clean and corrupted traces in random order, each labelled with what was done to it."""
    copies = round(DUPLICATE_SHARE * count)
    pool = []
    for _ in range(count - copies):
        problem = draw_story(rng, NEW_SHARE)
        example = clean_example(problem, "")
        if rng.random() < OFF_TOPIC_SHARE:
            example = replace(example, completion=off_topic(rng), label="off_topic")
        elif problem.kinds & set(MISREAD_KINDS) and rng.random() < CORRUPTED_SHARE:
            example = replace(example, completion=wrong_step(problem), label="wrong_step")
        elif problem.inventory and rng.random() < CORRUPTED_SHARE:
            example = replace(example, completion=wrong_answer(problem), label="wrong_answer")
        pool.append(example)
    clean = [example for example in pool if example.label == "clean"]
    pool += [replace(example, label="duplicate") for example in rng.sample(clean, copies)]
    rng.shuffle(pool)
    return [replace(example, id=f"pool-{i:04d}", row=i) for i, example in enumerate(pool)]
